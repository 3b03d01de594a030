"""Rows of a pool: what cannot be used, random numbers of their own, predictions in chunks, distances and neighbours."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import Learner, PoolView, Prediction, PyTree, require, rows_of

Rows = TypeVar("Rows")
Values = TypeVar("Values")


def finite_rows(x: PyTree, axis: int = 0) -> Array:
    """Bool `[n]`: the rows whose floating-point entries are all finite; rows lie along `axis` of every leaf."""
    sound = jnp.ones(jax.tree.leaves(x)[0].shape[axis], bool)
    for leaf in jax.tree.leaves(x):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sound &= jnp.isfinite(leaf).all([i for i in range(leaf.ndim) if i != axis])
    return sound


def clean(view: PoolView, *, logits: bool = False, embedding: bool = False) -> PoolView:
    """The view with rows that hold NaN made padding, and with zeros in all padding.

    The one place where rules are protected from rows that are not numbers: a row of the result either has weight and
    holds finite numbers, or has weight 0 and holds zeros, so that nothing it held reaches a sum, a mean or a distance.
    Such a row is no labelled row any more, either. Logits may be -inf for classes without a label.

    Args:
      view: any view.
      logits: whether the rule reads them; a row with NaN among them, or without a finite one, then stands for nothing.
      embedding: the same. What a rule does not read is neither looked at nor changed, so it costs nothing.

    Returns:
      A `PoolView`. Rows that are available in `view` but not in it should come last: see `lifts.contained`.
    """
    sound = (view.weight > 0) & finite_rows(view.x)
    given = view.prediction
    if logits:
        numbers = ~jnp.isnan(given.logits) & (given.logits < jnp.inf)
        sound &= (numbers.all(-1) & (given.logits.max(-1) > -jnp.inf)).all(0)
    if embedding:
        sound &= finite_rows(given.embedding, axis=1)

    def kept(leaf: Array, which: Array) -> Array:
        return jnp.where(which.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    known = view.labelled_index >= 0
    lost = known & ~sound[view.labelled_index]
    batch = view.labelled
    return view._replace(
        x=jax.tree.map(lambda leaf: kept(leaf, sound), view.x),
        weight=kept(view.weight, sound),
        prediction=Prediction(
            logits=jnp.where(sound[:, None], given.logits, 0.0) if logits else given.logits,
            embedding=jnp.where(sound[:, None], given.embedding, 0.0) if embedding else given.embedding,
        ),
        labelled=batch._replace(
            x=jax.tree.map(lambda leaf: kept(leaf, ~lost), batch.x), weight=jnp.where(lost, 0.0, batch.weight)
        ),
        labelled_index=jnp.where(lost, -1, view.labelled_index),
    )


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


def in_chunks(f: Callable[[Rows], Values], arrays: Rows, chunk: int | None) -> Values:
    """`f` on slices of `chunk` rows, one after the other; `f` must treat rows independently. None for all at once."""
    n = rows_of(arrays)
    if chunk is None or chunk >= n:
        return f(arrays)
    whole = n // chunk * chunk
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), arrays)
    parts: list[Values] = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(f, blocks))]
    if whole < n:
        parts.append(f(jax.tree.map(lambda leaf: leaf[whole:], arrays)))
    joined: Values = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return joined


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

    def swapped(prediction: Prediction) -> Prediction:
        return Prediction(prediction.logits.swapaxes(0, 1), prediction.embedding.swapaxes(0, 1))

    return swapped(in_chunks(lambda x: swapped(learner.predict(params, x)), x, chunk))


def squared_distances(a: Array, b: Array) -> Array:
    """Squared Euclidean distances of the rows of `a` `[n, d]` and `b` `[m, d]`, `[n, m]`, by one matrix product.

    What the product rounds off is a ten-millionth of the squared lengths: centre the rows first (`middle`).
    """
    # The squares first: then the distance of i to j is that of j to i to the last bit.
    square = (a**2).sum(-1)[:, None] + (b**2).sum(-1)[None]
    return jnp.maximum(square - 2.0 * a @ b.T, 0.0)


def middle(x: Array, present: Array, row: Array | None = None, *, sample: int = 256) -> Array:
    """A point amid the rows of `x`, `[d]`: the median of each coordinate, which outliers do not move.

    Distances by a matrix product are as exact as the rows lie near the origin; seen from the mean, one row far out
    puts all others far away. The point need not be exact, so of a large pool `sample` rows are looked at.

    Args:
      x: `[n, d]`.
      present: bool `[n]`, rows that count. Without any the point is 0.
      row: int32 `[n]`, row numbers that the choice of the sample belongs to; needed for more than `sample` rows.
      sample: at most so many rows are sorted.
    """
    n = x.shape[0]
    if n > sample:
        number = jnp.arange(n, dtype=jnp.int32) if row is None else row
        # Any order that has nothing to do with the data: multiples of an odd number, as positive floats.
        mixed = (number.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 9
        _, place = lax.top_k(jnp.where(present, mixed.astype(jnp.float32), -1.0), sample)
        x, present = x[place], present[place]
    ordered = jnp.sort(jnp.where(present[:, None], x, jnp.inf), axis=0)
    return jnp.where(present.any(), ordered[jnp.maximum(present.sum() - 1, 0) // 2], 0.0)


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
    # Rows that are nobody's neighbours may hold anything; where they are numbers they have neighbours of their own.
    x = jnp.where((present | finite_rows(x))[:, None], x, 0.0)
    x = x - middle(x, present)[None]

    def nearest(block: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, own = block
        possible = present[None] & (own[:, None] != jnp.arange(n)[None])
        closeness, index = lax.top_k(jnp.where(possible, -squared_distances(rows, x), -jnp.inf), min(neighbours, n - 1))
        return index.astype(jnp.int32), -closeness

    return in_chunks(nearest, (x, jnp.arange(n)), chunk)
