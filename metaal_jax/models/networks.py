"""The networks of the few-shot field."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from metaal_jax.models.layers import BatchNorm, Conv, Dropout, max_pool


def as_float(x: Array) -> Array:
    """Integer inputs (uint8 images) scaled from 0..255 to 0..1; floating-point inputs unchanged."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32) / 255.0


class MLP(nn.Module):
    """Multi-layer perceptron on flattened rows; with no hidden layer, a linear classifier.

    Attributes:
      classes: number of logits.
      hidden: widths of the hidden layers; the last one is the embedding (the input itself where there is none).
      zero_head: starts the last layer at 0, so that an unlabelled problem has uniform predictions.
      dropout: rate of the dropout after each hidden layer, see `Dropout`; without its random streams nothing is
        dropped.
      dtype: of the computation (for example `jnp.bfloat16`); logits and embedding are float32 or wider.
    """

    classes: int
    hidden: Sequence[int] = (64, 64)
    zero_head: bool = False
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        _check_dropout("MLP", self.dropout)
        if self.dropout and not self.hidden:
            raise ValueError("MLP: dropout follows hidden layers, and there is none")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """`[n, ...]` -> logits `[n, classes]`, embedding `[n, d]`."""
        x = as_float(x).reshape(x.shape[0], -1)
        for width in self.hidden:
            x = Dropout(self.dropout)(nn.relu(nn.Dense(width, dtype=self.dtype)(x)))
        return _head(x, self.classes, self.zero_head)


class Projection(nn.Module):
    """A linear map of rows that are embedded already, from the identity, and a linear classifier.

    The embedding is `x + x W` with a square `W` that starts at 0: what a few tasks can teach about the directions of an
    embedding that stays as it is.

    Attributes:
      classes: number of logits.
    """

    classes: int

    @nn.compact
    def __call__(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """`[n, ...]` -> logits `[n, classes]`, embedding `[n, d]`."""
        x = as_float(x).reshape(x.shape[0], -1)
        moved = nn.Dense(x.shape[1], use_bias=False, kernel_init=nn.initializers.zeros_init(), name="map")(x)
        return _head(x + moved, self.classes, zero=False)


class Conv4(nn.Module):
    """The few-shot field's convolutional network: blocks of 3 x 3 convolution, norm, ReLU, each halving the image.

    Attributes:
      classes: number of logits.
      filters: channels of each block; the papers use 32 or 64.
      blocks: number of blocks, 4 in the papers.
      downsample: `"stride"` (strided convolutions, as for Omniglot) or `"pool"` (2 x 2 max pooling).
      norm: `"group"` (batch-independent), `"batch"` (statistics of the batch at hand: transductive) or `"none"`.
      groups: of the group norm.
      zero_head: starts the last layer at 0.
      implementation: of the convolutions, see `Conv`.
      dropout: rate of the dropout of whole channels after each block, see `Dropout`; without its random streams
        nothing is dropped.
      dtype: of the computation (for example `jnp.bfloat16`); logits and embedding are float32 or wider.

    Reference: Vinyals et al.: Matching Networks for One Shot Learning, 2016; Finn, Abbeel, Levine: Model-Agnostic
    Meta-Learning, 2017.
    """

    classes: int
    filters: int = 32
    blocks: int = 4
    downsample: Literal["stride", "pool"] = "stride"
    norm: Literal["group", "batch", "none"] = "group"
    groups: int = 8
    zero_head: bool = False
    implementation: Literal["patches", "lax"] = "patches"
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        _check_dropout("Conv4", self.dropout)
        for name, value, allowed in (
            ("downsample", self.downsample, ("stride", "pool")),
            ("norm", self.norm, ("group", "batch", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"Conv4: {name} must be one of {allowed}, got {value!r}")
        if self.norm == "group" and self.filters % self.groups:
            raise ValueError(f"Conv4: {self.filters} filters do not divide into {self.groups} groups")
        super().__post_init__()

    @property
    def normalises_by_batch(self) -> bool:
        """Whether a row's prediction depends on the rows beside it."""
        return self.norm == "batch"

    @nn.compact
    def __call__(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """`[n, h, w, channels]` -> logits `[n, classes]`, embedding `[n, d]`."""
        x = as_float(x)
        if self.downsample == "pool" and min(x.shape[1:3]) < 2**self.blocks:
            raise ValueError(
                f"Conv4: {self.blocks} blocks of pooling need images of {2**self.blocks} pixels, got {x.shape[1:3]}"
            )
        strides = (2, 2) if self.downsample == "stride" else (1, 1)
        for _ in range(self.blocks):
            x = Conv(self.filters, strides=strides, implementation=self.implementation, dtype=self.dtype)(x)
            if self.norm == "group":
                x = nn.GroupNorm(num_groups=self.groups, dtype=self.dtype)(x)
            elif self.norm == "batch":
                x = BatchNorm(dtype=self.dtype)(x, weight)
            x = nn.relu(x)
            if self.downsample == "pool":
                x = max_pool(x)
            x = Dropout(self.dropout, shared_axes=(1, 2))(x)
        return _head(x.reshape(x.shape[0], -1), self.classes, self.zero_head)


class ResNet12(nn.Module):
    """The few-shot field's residual network: four blocks of three convolutions, each halving the image.

    A block is three times convolution, batch norm and leaky ReLU (slope 0.1), plus a 1 x 1 convolution around them,
    then 2 x 2 max pooling. Different from the reference: the embedding is the mean over positions instead of all of
    them, and dropout of whole channels after each block stands in for DropBlock.

    Attributes:
      classes: number of logits.
      filters: channels of each block.
      zero_head: starts the last layer at 0.
      implementation: of the convolutions, see `Conv`.
      dropout: rate of the dropout of whole channels after each block.
      dtype: of the computation; logits and embedding are float32 or wider.

    Reference: Lee, Maji, Ravichandran, Soatto: Meta-Learning with Differentiable Convex Optimization, 2019.
    """

    classes: int
    filters: Sequence[int] = (64, 160, 320, 640)
    zero_head: bool = False
    implementation: Literal["patches", "lax"] = "patches"
    dropout: float = 0.0
    dtype: Any = None
    normalises_by_batch = True

    def __post_init__(self):
        _check_dropout("ResNet12", self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """`[n, h, w, channels]` -> logits `[n, classes]`, embedding `[n, filters[-1]]`."""
        x = as_float(x)
        blocks = len(self.filters)
        if min(x.shape[1:3]) < 2**blocks:
            raise ValueError(f"ResNet12: {blocks} blocks need images of {2**blocks} pixels, got {x.shape[1:3]}")
        for width in self.filters:
            around = Conv(
                width, kernel_size=(1, 1), use_bias=False, implementation=self.implementation, dtype=self.dtype
            )(x)
            around = BatchNorm(dtype=self.dtype)(around, weight)
            for layer in range(3):
                x = Conv(width, use_bias=False, implementation=self.implementation, dtype=self.dtype)(x)
                x = BatchNorm(dtype=self.dtype)(x, weight)
                x = nn.leaky_relu(x + around if layer == 2 else x, 0.1)
            x = Dropout(self.dropout, shared_axes=(1, 2))(max_pool(x))
        return _head(x.mean((1, 2)), self.classes, self.zero_head)


def _check_dropout(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: dropout must be at least 0 and below 1, got {rate}")


def _head(x: Array, classes: int, zero: bool) -> tuple[Array, Array]:
    embedding = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    init = nn.initializers.zeros_init() if zero else nn.initializers.lecun_normal()
    return nn.Dense(classes, kernel_init=init, name="head")(embedding), embedding
