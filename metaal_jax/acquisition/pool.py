"""Prediction and scores for pools whose intermediate results would not fit memory at once."""

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import Scorer
from metaal_jax.base import Learner, PoolView, Prediction, PyTree, empty_batch, require, rows_of


def _in_chunks(f, arrays: PyTree, chunk: int | None) -> PyTree:
    """`f` on slices of `chunk` rows, one after the other; `f` must treat rows independently."""
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
    rows at hand does not). Logits and embeddings are kept for the whole pool; `score_pool` does not keep them.

    Raises:
      ValueError: for a chunk below 1.
    """
    require(chunk is None or chunk >= 1, f"predict_pool: chunk must be at least 1 or None, got {chunk}")
    if chunk is None or chunk >= rows_of(x):
        return learner.predict(params, x)

    def rows_first(x: PyTree) -> Prediction:
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), learner.predict(params, x))

    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), _in_chunks(rows_first, x, chunk))


def score_pool(
    key: Array, learner: Learner, params: PyTree, scorer: Scorer, x: PyTree, row: Array, *, chunk: int | None = None
) -> Array:
    """Scores of a pool for a pointwise rule; no more than `chunk` rows' predictions exist at a time.

    Args:
      key: consumed by the scorer; its noise belongs to rows, so chunks do not change it.
      learner: whose `predict` is asked.
      params: adapted parameters.
      scorer: a pointwise rule, `(key, view) -> [n]`, that reads only `x`, `row` and `prediction`.
      x: the pool, leaves `[n, ...]`.
      row: int32 `[n]`, global row numbers.
      chunk: rows at a time, None for all at once.

    Returns:
      float32 `[n]`.

    Raises:
      ValueError: for a chunk below 1.
    """
    require(chunk is None or chunk >= 1, f"score_pool: chunk must be at least 1 or None, got {chunk}")

    def score(block: tuple[PyTree, Array]) -> Array:
        x, row = block
        n = row.shape[0]
        view = PoolView(
            x=x,
            row=row,
            weight=jnp.ones(n),
            queried=jnp.zeros(n, bool),
            cost=jnp.ones(n),
            prediction=learner.predict(params, x),
            labelled=empty_batch(x, 0),
            labelled_index=jnp.zeros(0, jnp.int32),
            meta=(),
            params=params,
            budget=jnp.full((), jnp.inf),
            spent=jnp.zeros(()),
        )
        return scorer(key, view)

    return _in_chunks(score, (x, row), chunk)
