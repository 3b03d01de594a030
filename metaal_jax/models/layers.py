"""Layers that stay fast inside `lax.scan` and under `vmap` over their weights."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.losses import clear_padding


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def patches(x: Array, kernel: tuple[int, int], strides: tuple[int, int]) -> Array:
    """Patches of a batch of images with SAME padding, by strided slices.

    Args:
      x: `[n, h, w, c]`.
      kernel: height and width of a patch.
      strides: steps between patches.

    Returns:
      `[n, ceil(h / stride), ceil(w / stride), kernel_h * kernel_w * c]`, the last axis in the order of a kernel
      `[kernel_h, kernel_w, c, features]` reshaped to `[-1, features]`.
    """
    _, h, w, _ = x.shape
    x = jnp.pad(x, [(0, 0), _same_padding(h, kernel[0], strides[0]), _same_padding(w, kernel[1], strides[1]), (0, 0)])
    rows, columns = -(-h // strides[0]), -(-w // strides[1])
    shifted = [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return jnp.concatenate(shifted, axis=-1)


class Conv(nn.Module):
    """2-D convolution with SAME padding: the numbers and the parameters of `flax.linen.Conv`.

    `implementation="patches"` gathers patches by strided slices and multiplies once. XLA's CPU convolution is more
    than ten times slower inside a `lax.scan`, and under `vmap` over weights it becomes a grouped convolution, while a
    matrix product stays one. `"lax"` calls `lax.conv_general_dilated`.

    Attributes:
      features: output channels.
      kernel_size, strides: height and width.
      use_bias: adds a bias.
      implementation: `"patches"` or `"lax"`.
      dtype: of the computation; None takes that of the input and parameters.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    use_bias: bool = True
    implementation: Literal["patches", "lax"] = "patches"
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[n, h, w, c]` -> `[n, ceil(h / stride), ceil(w / stride), features]`."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features), jnp.float32)
        bias = (
            self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.implementation == "lax":
            y = lax.conv_general_dilated(x, kernel, self.strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        elif self.implementation == "patches":
            y = patches(x, self.kernel_size, self.strides) @ kernel.reshape(-1, self.features)
        else:
            raise ValueError(f"implementation must be 'patches' or 'lax', got {self.implementation!r}")
        return y if bias is None else y + bias[None, None, None]


def max_pool(x: Array) -> Array:
    """2 x 2 max pooling with stride 2, `[n, h, w, c]` -> `[n, h // 2, w // 2, c]`; an odd last row is dropped."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]
    return jnp.maximum(jnp.maximum(corners[0], corners[1]), jnp.maximum(corners[2], corners[3]))


class BatchNorm(nn.Module):
    """Batch normalisation with the statistics of the batch at hand, in training and in prediction.

    This is the few-shot field's convention and it is transductive: the prediction for a row depends on the rows
    beside it. Rows of weight 0 do not count towards the statistics.

    Where the variables hold statistics (collection `batch_stats`) they are used instead, and no row depends on another;
    `learners.support_statistics` puts those of the labelled rows there. Applied with `mutable=["batch_stats"]` the
    layer uses the batch at hand and gives its statistics back.

    Reference: Ioffe, Szegedy: Batch Normalization, 2015; Nichol, Achiam, Schulman: On First-Order Meta-Learning
    Algorithms, 2018 (on transduction).
    """

    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, weight: Array | None = None) -> Array:
        """`[n, ..., c]` normalised over all axes but the last; `weight` float32 `[n]`."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide if weight is None else clear_padding(wide, weight)
        collecting = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        if self.has_variable("batch_stats", "mean") and not collecting:
            mean: Array = self.get_variable("batch_stats", "mean")
            variance: Array = self.get_variable("batch_stats", "variance")
        else:
            mean, variance = self._statistics(wide, weight)
        if collecting:
            self.put_variable("batch_stats", "mean", mean)
            self.put_variable("batch_stats", "variance", variance)
        lead = (None,) * (x.ndim - 1)
        y = (wide - mean[lead]) * lax.rsqrt(variance + self.epsilon)[lead] * scale[lead] + bias[lead]
        return y.astype(self.dtype or x.dtype)

    def _statistics(self, x: Array, weight: Array | None) -> tuple[Array, Array]:
        """Mean and variance `[c]` of the rows of weight; 0 and 1 without any."""
        axes = tuple(range(x.ndim - 1))
        weight = jnp.ones(x.shape[0], x.dtype) if weight is None else weight.astype(x.dtype)
        weight = weight.reshape((-1,) + (1,) * (x.ndim - 1))
        positions = 1
        for size in x.shape[1:-1]:
            positions *= size
        total = weight.sum() * positions
        counted = jnp.where(total > 0, total, 1.0)
        mean = (weight * x).sum(axes) / counted
        variance = (weight * (x - mean[(None,) * (x.ndim - 1)]) ** 2).sum(axes) / counted
        return mean, jnp.where(total > 0, variance, 1.0)


class Dropout(nn.Module):
    """Dropout whose masks belong to rows, or to a member of a committee.

    With the random stream `dropout` each row has a mask of its own, drawn from its position, so that padding changes no
    other row: for training. With the stream `mask` all rows share one mask, and the same key gives the same mask to any
    rows: a network drawn from the posterior of Monte Carlo dropout. Without either, nothing is dropped.

    Attributes:
      rate: probability of dropping a feature; those kept are divided by `1 - rate`.
      shared_axes: axes that share a mask, such as height and width where whole channels are dropped.

    Reference: Srivastava et al.: Dropout, 2014; Tompson et al.: Efficient Object Localization Using Convolutional
    Networks, 2015 (whole channels); Gal, Ghahramani: Dropout as a Bayesian Approximation, 2016.
    """

    rate: float
    shared_axes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[n, ..., c]` -> `[n, ..., c]`."""
        rows, mask = self.has_rng("dropout"), self.has_rng("mask")
        if self.rate == 0 or not (rows or mask):
            return x
        shape = tuple(1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape))[1:]
        if rows:
            key = self.make_rng("dropout")
            keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(jnp.arange(x.shape[0]))
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, shape))(keys)
        else:
            kept = jax.random.bernoulli(self.make_rng("mask"), 1 - self.rate, (1, *shape))
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))
