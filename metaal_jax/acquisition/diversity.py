"""Where the rows lie in the embedding: distances, rows that stand for the pool, and rules that spread out."""

import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.lifts import fixed_rule, pick_in_turn, select_top
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.rows import squared_distances


def unit_rows(embedding: Array) -> Array:
    """Rows divided by their length; rows of length 0 stay 0."""
    length = jnp.sqrt((embedding**2).sum(-1, keepdims=True))
    return embedding / jnp.where(length > 0, length, 1.0)


def centred(view: PoolView) -> Array:
    """The pool's embedding less the mean of its real rows, `[n, d]`: the same distances, less rounding in float32."""
    embedding = view.prediction.embedding.mean(0)
    real = (view.weight > 0)[:, None]
    return embedding - jnp.where(real, embedding, 0.0).sum(0) / jnp.maximum(real.sum(), 1)


def distance_to_labelled(embedding: Array, view: PoolView) -> Array:
    """Squared distance of the rows of `embedding` `[n, d]` to the nearest labelled row, `[n]`; inf where none is."""
    distance = squared_distances(embedding, embedding[view.labelled_index])
    return jnp.where(view.labelled_index >= 0, distance, jnp.inf).min(-1, initial=jnp.inf)


def stand_ins(key: Array, view: PoolView, count: int) -> tuple[Array, Array]:
    """Random real rows that stand for the pool, in random order: `(index int32 [a], found bool [a])`.

    `a` is the smaller of `count` and the pool's size; `found` is False beyond the number of real rows.
    """
    n = view.row.shape[0]
    return select_top(key, jnp.zeros(n), view.weight > 0, view.row, min(count, n))


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
        anchor, found = stand_ins(key, view, anchors)
        distance = jnp.where(found, jnp.sqrt(squared_distances(embedding, embedding[anchor])), jnp.inf)
        # A row that is itself an anchor must not count as its own neighbour.
        distance = jnp.where(anchor == jnp.arange(n)[:, None], jnp.inf, distance)
        nearest = -lax.top_k(-distance, min(neighbours, anchor.shape[0]))[0]
        known = jnp.isfinite(nearest)
        mean = jnp.where(known, nearest, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1)
        return embedding, 1.0 / jnp.maximum(mean, 1e-6)

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding, typicality = policy_state

        def cover(novelty: Array, position: Array) -> Array:
            distance = ((embedding - embedding[position]) ** 2).sum(-1)
            return jnp.minimum(novelty, jnp.sqrt(distance))

        # 2 is the largest distance of unit vectors: before any label all rows are equally new.
        novelty = jnp.minimum(jnp.sqrt(distance_to_labelled(embedding, view)), 2.0)
        return pick_in_turn(key, view, k, novelty, lambda novelty: typicality * novelty, cover)

    return fixed_rule(act, begin)


def k_center(*, k: int) -> Policy:
    """Greedy core-set: each pick is the row farthest from all that is labelled or picked.

    The next row is `argmax_i min_{j in labelled and picked} |z_i - z_j|`, so that the largest distance from a row to
    the labelled set is at most twice the smallest possible. Distances are Euclidean, in the embedding of the current
    model. From a cold start the first row is random. Rows asked for without an answer cover nothing.

    Args:
      k: rows a round.

    Returns:
      A `Policy`; the decision's scores are squared distances before the first pick.

    Raises:
      ValueError: for `k` below 1.

    Reference: Sener, Savarese: Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018.
    """
    require(k >= 1, f"k_center: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding = centred(view)
        square = (embedding**2).sum(-1)

        def cover(distance: Array, position: Array) -> Array:
            # A matrix-vector product reads the embedding at the speed of memory; differences are 30 times slower.
            mine = square - 2.0 * (embedding @ embedding[position]) + square[position]
            return jnp.minimum(distance, jnp.maximum(mine, 0.0))

        # No distance is larger: before any label all rows are equally far.
        largest = 4.0 * jnp.where(view.weight > 0, square, 0.0).max()
        distance = jnp.minimum(distance_to_labelled(embedding, view), largest)
        return pick_in_turn(key, view, k, distance, lambda distance: distance, cover)

    return fixed_rule(act)
