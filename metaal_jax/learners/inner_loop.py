"""The inner loop itself, and what an optimiser must be to run in it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import PyTree


def inner_loop(
    loss: Callable[..., Array],
    params: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    each: PyTree = None,
    factors: PyTree = None,
    first_order: bool = False,
    path: bool = False,
    remat: bool = False,
    unroll: int | bool = 1,
) -> PyTree:
    """`steps` steps of `optimizer` down `loss` from `params`, differentiable with respect to `params`.

    Args:
      loss: scalar function of the parameters; what else it reads may be traced.
      params: where to start.
      optimizer: any Optax transformation of gradients alone, see `check_optimizer`; its state starts afresh.
      steps: number of steps, static.
      each: what differs between steps (keys, ...), leaves `[steps, ...]`: step `i` descends `loss(params, each[i])`;
        None for `loss(params)`.
      factors: what each step's update is multiplied by, leaves `[steps, ...]` that broadcast against those of `params`.
      first_order: treats each step's gradient as a constant (FOMAML).
      path: gives the parameters after every step.
      remat: recomputes a step in the backward pass instead of storing it (`jax.checkpoint`), so that memory holds
        the parameters of every step but the activations of one. It needs a loop: of steps unrolled beside each other
        XLA merges what is computed twice, and keeps it.
      unroll: as in `lax.scan`; unrolled steps run faster under a gradient and compile more slowly.

    Returns:
      Parameters with the structure of `params`; with `path` leaves `[steps, ...]`.

    Raises:
      ValueError: for `remat` of unrolled steps.
    """
    check_remat(remat, unroll)

    def step(carry: tuple[PyTree, PyTree], now: tuple[PyTree, PyTree]) -> tuple[tuple[PyTree, PyTree], PyTree]:
        params, state = carry
        item, factor = now
        grads = jax.grad(loss)(params) if item is None else jax.grad(loss)(params, item)
        if first_order:
            grads = lax.stop_gradient(grads)
        updates, state = optimizer.update(grads, state, params)
        if factor is not None:
            updates = jax.tree.map(jnp.multiply, updates, factor)
        params = optax.apply_updates(params, updates)
        return (params, state), params if path else None

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    (params, _), after = lax.scan(step, (params, optimizer.init(params)), (each, factors), length=steps, unroll=unroll)
    return after if path else params


def draw_rows(key: Array, weight: Array, k: int) -> Array:
    """`k` row numbers, those of positive weight first, in random order."""
    return lax.top_k(jnp.where(weight > 0, jax.random.uniform(key, weight.shape), -1.0), k)[1]


def check_optimizer(optimizer: Any) -> None:
    """Raises `ValueError` for what is no Optax transformation, or one that needs more than gradients.

    Line searches and step sizes that follow the loss (`optax.lbfgs`, `optax.polyak_sgd`, ...) ask for its value.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"optimizer must be an Optax transformation such as optax.sgd(0.1), got {optimizer!r}")

    def update(params: PyTree) -> PyTree:
        return optimizer.update(params, optimizer.init(params), params)

    layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    try:
        jax.eval_shape(update, {"params": {"hidden": layer, "head": layer}})
    except TypeError as error:
        if "required keyword-only argument" in str(error):
            wanted = str(error).partition("argument")[2].strip("s: ")
            raise ValueError(
                f"optimizer must work from gradients alone, and this one asks for {wanted}; use "
                "optax.sgd, optax.adam or another without a line search"
            ) from None
    except Exception:
        pass  # it reads names of parameters that these are none of


def check_remat(remat: bool, unroll: int | bool) -> None:
    """Raises `ValueError` for rematerialised steps that are unrolled."""
    if remat and (unroll is True or unroll > 1):  # True equals 1
        raise ValueError(f"remat needs the steps in a loop, unroll=1, got unroll={unroll}")
