"""Classes without labels: one image, distorted in many ways, is one class.

Natural images meta-train a learner for drawn shapes poorly when their tasks ask for objects and textures. Here a class
is one level set of a smoothed crop of an image (its contour, or the region inside) and its examples are distortions of
it, so that what has to be learned is the shape under deformation, and no label of the source is used.

Reference: Dosovitskiy et al.: Discriminative Unsupervised Feature Learning with Exemplar CNNs, 2014; Khodadadeh,
Boloni, Shah: Unsupervised Meta-Learning for Few-Shot Image Classification (UMTRA), 2019.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax.base import require
from metaal_jax.tasks.class_data import check_count


def shape_exemplars(
    *,
    examples: int,
    size: int = 28,
    crop: tuple[float, float] = (5.0, 11.0),
    filled: float = 0.15,
    affine: float = 1.0,
    elastic: float = 0.1,
    smoothing: float = 1.0,
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Draws one class of shapes from one image.

    A crop of the image is seen through a soft elliptical window; the class is its level set at a random quantile of
    the brightness, drawn as a line of random width or, sometimes, as a filled region. Each example deforms the crop
    (rotation, shear, scale, shift and a smooth displacement) before the level set is taken, and varies the level and
    the width of the line.

    Args:
      examples: examples of the class.
      size: height and width of an example in pixels.
      crop: least and greatest half-width of the crop, in pixels of the image.
      filled: probability that the class is a filled region.
      affine: strength of rotation, shear, scale and shift; 1 is a standard deviation of 9 degrees, 0.18, 13 % and 7 %
        of half the width.
      elastic: standard deviation of the displacement at 4 x 4 control points, in half-widths.
      smoothing: standard deviation of the Gaussian blur of the image, in pixels.

    Returns:
      `(key, image uint8 or float [h, w] or [h, w, channels]) -> (x uint8 [examples, size, size, 1], ink float32 [])`;
      `ink` is the share of bright pixels: close to 0 or 1, the class shows nothing and is better left out.

    Raises:
      ValueError: for numbers out of range; in the sampler for what is no image of at least 2 x 2 pixels.
    """
    check_count("shape_exemplars", "examples", examples)
    check_count("shape_exemplars", "size", size, 8)
    require(
        len(crop) == 2 and 0 < crop[0] <= crop[1] < np.inf,
        f"shape_exemplars: crop must be two rising half-widths, got {crop}",
    )
    require((filled >= 0) & (filled <= 1), f"shape_exemplars: filled must be a probability, got {filled}")
    for name, value in (("affine", affine), ("elastic", elastic), ("smoothing", smoothing)):
        require(
            (value >= 0) & (value < np.inf), f"shape_exemplars: {name} must be finite and not negative, got {value}"
        )
    line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    grid_y, grid_x = np.meshgrid(line, line, indexing="ij")
    control = _interpolation(size, 4)

    def draw(key: Array, image: Array) -> tuple[Array, Array]:
        if image.ndim not in (2, 3) or min(image.shape[:2]) < 2:
            raise ValueError(
                "shape_exemplars: an image must be [h, w] or [h, w, channels] of at least 2 x 2 pixels, got the shape "
                f"{list(image.shape)}"
            )
        keys = jax.random.split(key, 10)
        picture = _blurred(image, smoothing)
        middle = (picture.shape[0] - 1) / 2
        half = jax.random.uniform(keys[0], minval=crop[0], maxval=crop[1])
        centre = middle + jax.random.uniform(keys[1], (2,), minval=-1.0, maxval=1.0) * jnp.maximum(
            middle - 0.9 * half, 0.0
        )
        turn = jax.random.uniform(keys[2], maxval=2 * jnp.pi)
        window_y = jax.random.uniform(keys[3], minval=0.6, maxval=0.85)
        window_x = jax.random.uniform(keys[4], minval=0.4, maxval=0.85)
        is_filled = jax.random.bernoulli(keys[5], filled)
        line_width = jax.random.uniform(keys[6], minval=0.8, maxval=2.0)
        inside = jnp.where(jax.random.bernoulli(keys[7]), 1.0, -1.0)

        def crop_at(y: Array | np.ndarray, x: Array | np.ndarray) -> tuple[Array, Array]:
            window = jax.nn.sigmoid(6 * (1 - (y / window_y) ** 2 - (x / window_x) ** 2))
            rows = centre[0] + half * (jnp.cos(turn) * y - jnp.sin(turn) * x)
            columns = centre[1] + half * (jnp.sin(turn) * y + jnp.cos(turn) * x)
            return _bilinear(picture, rows, columns), window

        value, window = crop_at(grid_y, grid_x)
        seen = window > 0.5
        quantile = jax.random.uniform(keys[8], minval=0.2, maxval=0.8)
        ordered = jnp.sort(jnp.where(seen, value, jnp.inf).reshape(-1))
        level = ordered[(quantile * seen.sum()).astype(jnp.int32)]
        mean = (window * value).sum() / window.sum()
        spread = jnp.sqrt((window * (value - mean) ** 2).sum() / window.sum())

        def example(key: Array) -> Array:
            y, x, level_key, width_key = deform(key)
            value, window = crop_at(y, x)
            down, right = jnp.gradient(value)
            slope = jnp.sqrt(down**2 + right**2 + 1e-6)
            # Distance to the level set in pixels, where the picture is not flat.
            distance = (value - level - 0.08 * spread * jax.random.normal(level_key)) / jnp.maximum(
                slope, 0.12 * spread
            )
            width = line_width * jnp.exp(0.25 * jax.random.normal(width_key))
            ink = jnp.where(
                is_filled, jax.nn.sigmoid(3 * inside * distance), jax.nn.sigmoid(3 * (width - abs(distance)))
            )
            return jnp.clip(255 * ink * window, 0, 255).astype(jnp.uint8)[..., None]

        drawn = jax.vmap(example)(jax.random.split(keys[9], examples))
        return drawn, (drawn > 127).mean()

    def deform(key: Array) -> tuple[Array, Array, Array, Array]:
        keys = jax.random.split(key, 7)
        bend = elastic * jax.random.normal(keys[0], (2, 4, 4))
        angle, shear = affine * jax.random.normal(keys[1], (2,)) * jnp.array([0.16, 0.18])
        scale = jnp.exp(0.13 * affine * jax.random.normal(keys[2], (2,)))
        shift = 0.07 * affine * jax.random.normal(keys[3], (2,))
        y = grid_y + control @ bend[0] @ control.T - shift[0]
        x = grid_x + control @ bend[1] @ control.T - shift[1]
        y, x = (
            scale[0] * (jnp.cos(angle) * y - jnp.sin(angle) * x),
            scale[1] * (jnp.sin(angle) * y + jnp.cos(angle) * x),
        )
        return y, x + shear * y, keys[4], keys[5]

    return draw


def _interpolation(size: int, points: int) -> np.ndarray:
    """Cubic interpolation from `points` evenly spaced control points, float32 `[size, points]`."""
    from scipy.ndimage import zoom

    columns = [zoom(np.eye(points)[i], size / points, order=3, mode="nearest") for i in range(points)]
    return np.stack(columns, axis=1).astype(np.float32)


def _blurred(image: Array, sigma: float) -> Array:
    """Grey values 0..1 `[h, w]` of an image, smoothed by a Gaussian, the border repeated."""
    grey = image.astype(jnp.float32) / (255.0 if jnp.issubdtype(image.dtype, jnp.integer) else 1.0)
    grey = grey.mean(-1) if grey.ndim == 3 else grey
    return _blur_matrix(grey.shape[0], sigma) @ grey @ _blur_matrix(grey.shape[1], sigma).T


def _blur_matrix(n: int, sigma: float) -> np.ndarray:
    if sigma <= 0:
        return np.eye(n, dtype=np.float32)
    reach = int(4 * sigma + 0.5)
    matrix = np.zeros((n, n), np.float32)
    for offset in range(-reach, reach + 1):
        column = np.clip(np.arange(n) + offset, 0, n - 1)
        np.add.at(matrix, (np.arange(n), column), np.exp(-0.5 * (offset / sigma) ** 2))
    return matrix / matrix.sum(1, keepdims=True)


def _bilinear(image: Array, y: Array, x: Array) -> Array:
    """Values of `image` `[h, w]` at real positions, clamped to its border."""
    h, w = image.shape
    y, x = jnp.clip(y, 0, h - 1.001), jnp.clip(x, 0, w - 1.001)
    top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    dy, dx = y - top, x - left
    flat, corner = image.reshape(-1), top * w + left
    upper = flat[corner] * (1 - dx) + flat[corner + 1] * dx
    lower = flat[corner + w] * (1 - dx) + flat[corner + w + 1] * dx
    return upper * (1 - dy) + lower * dy
