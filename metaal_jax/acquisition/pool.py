"""Scores for pools whose predictions would not fit memory at once."""

import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import Scorer
from metaal_jax.base import Learner, PoolView, PyTree, empty_batch, require
from metaal_jax.rows import in_chunks


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

    return in_chunks(score, (x, row), chunk)
