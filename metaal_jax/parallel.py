"""Several devices: the only file of the package that knows of them.

`pmap` is always outermost. The functions below are factories: they build their `pmap` once, so keep what they return.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import Scorer
from metaal_jax.acquisition.pool import score_pool
from metaal_jax.base import Learner, PyTree, rows_of
from metaal_jax.outer import MetaState, OuterLoop

AXIS = "devices"


def split_rows(f: Callable[[PyTree, PyTree], PyTree], *, devices: Sequence[Any] | None = None) -> Callable:
    """`f(shared, rows)` with the rows of its second argument spread over devices.

    `f` must treat rows independently (a vmapped run over seeds, a scorer over a pool). Rows are padded by repeats of
    the last one up to a multiple of the device count, and the padding's results are dropped.

    Args:
      f: `(shared, rows) -> results`, leaves `[n, ...] -> [n, ...]`.
      devices: which, None for all local ones.

    Returns:
      A function `(shared, rows) -> results` with the results of `f` on all rows.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    mapped = jax.pmap(f, in_axes=(None, 0), devices=devices)

    def split(shared: PyTree, rows: PyTree) -> PyTree:
        n, count = rows_of(rows), len(devices)
        each = -(-n // count)
        place = jnp.minimum(jnp.arange(each * count), n - 1).reshape(count, each)
        results = mapped(shared, jax.tree.map(lambda leaf: leaf[place], rows))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], results)

    return split


def pool_scorer(
    learner: Learner, scorer: Scorer, *, chunk: int | None = None, devices: Sequence[Any] | None = None
) -> Callable[[Array, PyTree, PyTree, Array], Array]:
    """`acquisition.score_pool` with the pool spread over devices: the same scores, in the same order.

    Returns:
      A function `(key, params, x, row) -> scores [n]`.
    """

    def score(shared: tuple[Array, PyTree], rows: tuple[PyTree, Array]) -> Array:
        (key, params), (x, row) = shared, rows
        return score_pool(key, learner, params, scorer, x, row, chunk=chunk)

    split = split_rows(score, devices=devices)
    return lambda key, params, x, row: split((key, params), (x, row))


def outer_run(
    outer: OuterLoop, *, steps: int, devices: Sequence[Any] | None = None
) -> Callable[[Array, MetaState, PyTree], tuple[MetaState, dict[str, Array]]]:
    """`outer.run` with each step's tasks spread over devices, for a loop made with `axis_name=parallel.AXIS`.

    Tasks are keyed by their number, so the result is that of one device up to the order of summation.

    Returns:
      A function `(key, state, data) -> (state, metrics)`.
    """

    def run(key: Array, state: MetaState, data: PyTree) -> tuple[MetaState, dict[str, Array]]:
        return outer.run(key, state, data, steps=steps)

    devices = list(jax.local_devices() if devices is None else devices)
    # pmap wants one mapped argument to know its size by.
    mapped = jax.pmap(
        lambda _, key, state, data: run(key, state, data),
        axis_name=AXIS,
        in_axes=(0, None, None, None),
        out_axes=None,
        devices=devices,
    )
    return lambda key, state, data: mapped(jnp.arange(len(devices)), key, state, data)
