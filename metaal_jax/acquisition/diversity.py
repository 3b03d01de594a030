"""Rules that look at where the rows lie in the embedding."""

import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.lifts import fixed_rule, pick_in_turn, select_top
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require


def squared_distances(a: Array, b: Array) -> Array:
    """Squared Euclidean distances of the rows of `a` `[n, d]` and `b` `[m, d]`, `[n, m]`, by one matrix product."""
    square = (a**2).sum(-1)[:, None] - 2.0 * a @ b.T + (b**2).sum(-1)
    return jnp.maximum(square, 0.0)


def unit_rows(embedding: Array) -> Array:
    """Rows divided by their length; rows of length 0 stay 0."""
    length = jnp.sqrt((embedding**2).sum(-1, keepdims=True))
    return embedding / jnp.where(length > 0, length, 1.0)


def typical(*, k: int, neighbours: int = 20, anchors: int = 1000) -> Policy:
    """Typical rows far from the labelled ones, chosen one after the other: TypiClust's idea without its clustering.

    A row's typicality is the inverse of its mean distance to its nearest `neighbours` among `anchors` random rows of
    the pool; its novelty is the distance to the nearest row that is labelled or already chosen in this batch. The rule
    picks the row with the largest product. From a cold start the first pick is the most typical row. Embeddings are
    those of the run's first model, scaled to length 1; typicality is computed once, in `begin`. Rows asked for
    without an answer are not asked again and cover nothing.

    Args:
      k: rows a round.
      neighbours: for the typicality; fewer where the pool has fewer rows.
      anchors: how many rows stand for the pool, which keeps the cost linear in its size.

    Returns:
      A `Policy`; its state holds the embedding and typicality of the pool.

    Raises:
      ValueError: for arguments below 1.

    Reference: Hacohen, Dekel, Weinshall: Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets,
    2022.
    """
    for name, value in (("k", k), ("neighbours", neighbours), ("anchors", anchors)):
        require(value >= 1, f"typical: {name} must be at least 1, got {value}")

    def begin(key: Array, view: PoolView) -> PyTree:
        embedding = unit_rows(view.prediction.embedding.mean(0))
        n = embedding.shape[0]
        count = min(anchors, n)
        real = view.weight > 0
        anchor, found = select_top(key, jnp.zeros(n), real, view.row, count)
        distance = jnp.where(found, jnp.sqrt(squared_distances(embedding, embedding[anchor])), jnp.inf)
        # A row that is itself an anchor must not count as its own neighbour.
        distance = jnp.where(anchor == jnp.arange(n)[:, None], jnp.inf, distance)
        nearest = -lax.top_k(-distance, min(neighbours, count))[0]
        known = jnp.isfinite(nearest)
        mean = jnp.where(known, nearest, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1)
        return embedding, 1.0 / jnp.maximum(mean, 1e-6)

    def act(policy_state: PyTree, key: Array, view: PoolView) -> Decision:
        embedding, typicality = policy_state

        def cover(novelty: Array, position: Array) -> Array:
            distance = ((embedding - embedding[position]) ** 2).sum(-1)
            return jnp.minimum(novelty, jnp.sqrt(distance))

        # 2 is the largest distance of unit vectors: before any label all rows are equally new.
        covered = squared_distances(embedding, embedding[view.labelled_index])
        covered = jnp.where(view.labelled_index >= 0, jnp.sqrt(covered), 2.0)
        novelty = jnp.minimum(covered.min(-1, initial=2.0), 2.0)
        return pick_in_turn(key, view, k, novelty, lambda novelty: typicality * novelty, cover)

    return fixed_rule(act, begin)
