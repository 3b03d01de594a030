"""Sinusoid regression, the few-shot field's smallest problem."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import Batch, PyTree, Task, require


def sinusoids(
    *,
    shots: int,
    queries: int,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    x: tuple[float, float] = (-5.0, 5.0),
) -> Callable[[Array, PyTree], Task]:
    """Tasks `y = a sin(x - p)`: amplitude `a`, phase `p` and all inputs are uniform; there is no noise.

    Args:
      shots: support rows.
      queries: query rows.
      amplitude, phase, x: lowest and highest value of each.

    Returns:
      A sampler `(key, data) -> Task` that reads no data, give `()`; `x` float32 `[n, 1]`, `y` float32 `[n]`. Learn it
      with `loss=losses.squared_error` and a model of one output.

    Raises:
      ValueError: for numbers below 1, or a highest value below the lowest.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.
    """
    for name, value in (("shots", shots), ("queries", queries)):
        require(value >= 1, f"sinusoids: {name} must be a positive integer, got {value}")
    for name, pair in (("amplitude", amplitude), ("phase", phase), ("x", x)):
        require(pair[0] <= pair[1], f"sinusoids: {name} must be (lowest, highest), got {pair}")

    def sample(key: Array, data: PyTree) -> Task:
        del data
        keys = jax.random.split(key, 3)
        a = jax.random.uniform(keys[0], minval=amplitude[0], maxval=amplitude[1])
        p = jax.random.uniform(keys[1], minval=phase[0], maxval=phase[1])
        rows = jax.random.uniform(keys[2], (shots + queries,), minval=x[0], maxval=x[1])
        y = a * jnp.sin(rows - p)

        def part(own: slice) -> Batch:
            return Batch(x=rows[own, None], y=y[own], weight=jnp.ones_like(y[own]))

        return Task(support=part(slice(0, shots)), query=part(slice(shots, None)))

    return sample
