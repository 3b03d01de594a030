"""Flax Linen networks.

A model is any `flax.linen.Module` whose `__call__(x, weight=None)` returns `(logits [n, c], embedding [n, d])`, the
embedding being the input of the last layer. `weight` (float32 `[n]`, 0 = padding) matters only to layers that look at
the whole batch; a model with such layers says so by `normalises_by_batch = True`. A last layer named `head` lets
learners treat it apart from the body.
"""

from metaal_jax.models.layers import BatchNorm, Conv, Dropout, max_pool
from metaal_jax.models.networks import MLP, Conv4, Projection, ResNet12, as_float
from metaal_jax.models.policy import LinearNetwork, RowNetwork, SetNetwork

__all__ = [
    "MLP",
    "BatchNorm",
    "Conv",
    "Conv4",
    "Dropout",
    "LinearNetwork",
    "Projection",
    "ResNet12",
    "RowNetwork",
    "SetNetwork",
    "as_float",
    "max_pool",
]
