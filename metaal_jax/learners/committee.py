"""A committee of any learner."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import Batch, Learner, Metrics, Prediction, PyTree, Task, require, rows_of


def committee(
    learner: Learner, *, members: int, source: Literal["bootstrap", "initialisation", "both"] = "bootstrap"
) -> Learner:
    """`members` copies of a learner that differ, adapted and evaluated side by side by `vmap`.

    The same initialisation, steps and labels would give identical members, so the source of their difference is
    named:

    * `"bootstrap"`: every member weighs the labelled rows by its own draws from Exp(1), the Bayesian bootstrap, so
      that no class is lost from a small set. The meta-parameters are shared, as meta-learning wants.
    * `"initialisation"`: every member has its own meta-parameters (leading axis `[members]`), drawn by `init`.
    * `"both"`.

    Draws belong to positions in the batch, so padding changes no member.

    Args:
      learner: the base learner.
      members: how many, at least 2.
      source: of the difference.

    Returns:
      A `Learner` whose predictions have a leading axis of `members` times the base learner's own.

    Raises:
      ValueError: for fewer than two members or an unknown source.

    Reference: Seung, Opper, Sompolinsky: Query by Committee, 1992; Rubin: The Bayesian Bootstrap, 1981.
    """
    require(members >= 2, f"committee: members must be at least 2, got {members}")
    if source not in ("bootstrap", "initialisation", "both"):
        raise ValueError(f"committee: source must be 'bootstrap', 'initialisation' or 'both', got {source!r}")
    meta_axis = None if source == "bootstrap" else 0

    def init(key: Array, x: PyTree, /) -> PyTree:
        if meta_axis is None:
            return learner.init(key, x)
        return jax.vmap(learner.init, in_axes=(0, None))(jax.random.split(key, members), x)

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        def one(key: Array, meta: PyTree, start: PyTree) -> PyTree:
            weight_key, adapt_key = jax.random.split(key)
            mine = batch
            if source != "initialisation":
                mine = batch._replace(weight=batch.weight * _exponential(weight_key, rows_of(batch)))
            return learner.adapt(adapt_key, meta, mine, unlabelled=unlabelled, start=start)

        start_axis = None if start is None else 0
        return jax.vmap(one, in_axes=(0, meta_axis, start_axis))(jax.random.split(key, members), meta, start)

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        each = jax.vmap(learner.predict, in_axes=(0, None))(params, x)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), each)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        if meta_axis is None:
            return learner.meta_grad(key, meta, task, step=step)
        keys = jax.random.split(key, members)
        grads, metrics = jax.vmap(lambda k, m: learner.meta_grad(k, m, task, step=step))(keys, meta)
        return grads, jax.tree.map(lambda value: value.mean(0), metrics)

    return Learner(init=init, adapt=adapt, predict=predict, meta_grad=meta_grad)


def _exponential(key: Array, rows: int) -> Array:
    draw = jax.vmap(lambda position: jax.random.exponential(jax.random.fold_in(key, position)))
    return draw(jnp.arange(rows))
