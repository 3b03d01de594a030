"""Rows of a pool: random numbers of their own, predictions in chunks, distances and neighbours."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import Learner, Prediction, PyTree, require, rows_of


def row_noise(key: Array, row: Array) -> Array:
    """30 random bits for each row number, int32 `[n]`, drawn from `fold_in(key, row)`.

    The draw belongs to the row and not to its position: whole, chunked, sharded, permuted and padded pools agree.
    """
    bits = jax.vmap(lambda r: jax.random.bits(jax.random.fold_in(key, r), dtype=jnp.uint32))(row)
    return (bits >> 2).astype(jnp.int32)


def place_in_group(group: Array, scores: Array, noise: Array, *, groups: int) -> Array:
    """The place of each row among those of its group: 0 for the highest score, then for the lowest noise.

    Args:
      group: int32 `[n]`, below `groups`.
      scores: `[n]`.
      noise: int32 `[n]`, see `row_noise`.
      groups: how many, static.

    Returns:
      int32 `[n]`.
    """
    size = jax.ops.segment_sum(jnp.ones_like(group), group, groups)
    order, place = jnp.lexsort((noise, -scores, group)), jnp.arange(group.shape[0], dtype=jnp.int32)
    return place.at[order].set(place - (jnp.cumsum(size) - size)[group[order]])


def in_chunks(f, arrays: PyTree, chunk: int | None) -> PyTree:
    """`f` on slices of `chunk` rows, one after the other; `f` must treat rows independently. None for all at once."""
    n = rows_of(arrays)
    if chunk is None or chunk >= n:
        return f(arrays)
    whole = n // chunk * chunk
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), arrays)
    parts = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(f, blocks))]
    if whole < n:
        parts.append(f(jax.tree.map(lambda leaf: leaf[whole:], arrays)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def predict_pool(learner: Learner, params: PyTree, x: PyTree, *, chunk: int | None = None) -> Prediction:
    """`learner.predict(params, x)`, `chunk` rows at a time.

    The result is that of the whole pool, provided that the learner treats rows independently (a batch norm over the
    rows at hand does not). Logits and embeddings are kept for the whole pool; `acquisition.score_pool` does not.

    Raises:
      ValueError: for a chunk below 1.
    """
    require(chunk is None or chunk >= 1, f"predict_pool: chunk must be at least 1 or None, got {chunk}")
    if chunk is None or chunk >= rows_of(x):
        return learner.predict(params, x)

    def rows_first(x: PyTree) -> Prediction:
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), learner.predict(params, x))

    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), in_chunks(rows_first, x, chunk))


def squared_distances(a: Array, b: Array) -> Array:
    """Squared Euclidean distances of the rows of `a` `[n, d]` and `b` `[m, d]`, `[n, m]`, by one matrix product."""
    # The squares first: then the distance of i to j is that of j to i to the last bit.
    square = (a**2).sum(-1)[:, None] + (b**2).sum(-1)
    return jnp.maximum(square - 2.0 * a @ b.T, 0.0)


def nearest_neighbours(x: Array, present: Array, *, neighbours: int, chunk: int = 256) -> tuple[Array, Array]:
    """The nearest other rows of each row.

    Distances to all rows exist for `chunk` rows at a time, so memory is linear in the number of rows.

    Args:
      x: `[n, d]`.
      present: bool `[n]`, False for rows that are nobody's neighbours.
      neighbours: how many, static; fewer where there are fewer rows.
      chunk: rows whose neighbours are looked for at a time.

    Returns:
      `(index int32 [n, k], squared distance [n, k])`, nearest first, the distance inf where there is no neighbour; `k`
      is the smaller of `neighbours` and `n - 1`.

    Raises:
      ValueError: for arguments below 1.
    """
    for name, value in (("neighbours", neighbours), ("chunk", chunk)):
        require(value >= 1, f"nearest_neighbours: {name} must be at least 1, got {value}")
    n = x.shape[0]

    def nearest(block: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, own = block
        possible = present & (own[:, None] != jnp.arange(n))
        closeness, index = lax.top_k(jnp.where(possible, -squared_distances(rows, x), -jnp.inf), min(neighbours, n - 1))
        return index.astype(jnp.int32), -closeness

    return in_chunks(nearest, (x, jnp.arange(n)), chunk)
