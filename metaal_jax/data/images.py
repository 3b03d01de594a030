"""The one conversion of images, done once when they are read: channels, size, polarity.

In this order, all in uint8:

1. Channels. RGB to grey by luma, `0.299 R + 0.587 G + 0.114 B`; grey to RGB by repetition; transparency is dropped.
2. Size. The mean over the area that falls on each new pixel when neither side grows (Pillow's BOX), linear
   interpolation otherwise (Pillow's BILINEAR). Sides are scaled each on its own: nothing is cropped or padded.
3. Polarity. `255 - x` where `invert` holds. `invert=None` inverts the sets that are known to be dark ink on light
   paper (`DARK_ON_LIGHT`), so that ink is bright as in MNIST whatever the source.
"""

import numpy as np
from PIL import Image

from metaal_jax.data.arrays import Arrays, DataError

DARK_ON_LIGHT = frozenset({"omniglot"})  # ink is 0 and paper 255 in these; `invert=None` turns them round

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def check_image_shape(image_shape: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """Returns `image_shape` as plain integers, or raises a DataError unless it is (h, w, 1), (h, w, 3) or None."""
    if image_shape is None:
        return None
    try:
        height, width, channels = (int(size) for size in image_shape)
        good = tuple(image_shape) == (height, width, channels) and min(height, width) > 0 and channels in (1, 3)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise DataError(
            f"image_shape must be (height, width, 1) for grey or (height, width, 3) for colour, got {image_shape!r}; "
            "give for example (28, 28, 1), or None to keep the stored shape"
        )
    return height, width, channels


def wants_inversion(name: str, invert: bool | None) -> bool:
    """Whether the set `name` (`name`, `name/config` or `name:version`) is to be inverted: `invert`, or its default."""
    if not (invert is None or isinstance(invert, bool | np.bool_)):
        raise DataError(f"invert must be True, False or None, got {invert!r}")
    return name.split("/")[0].split(":")[0] in DARK_ON_LIGHT if invert is None else bool(invert)


def convert_image(image: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Converts the channels and the size of one picture; returns uint8 [h, w, c]."""
    height, width, channels = image_shape
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    if image.size != (width, height):
        shrinks = width <= image.width and height <= image.height
        image = image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_shape)


def convert_images(x: np.ndarray, image_shape: tuple[int, int, int] | None, *, invert: bool = False) -> np.ndarray:
    """Converts a stack of images by the rules at the top of this file.

    Args:
      x: uint8 [n, h, w, c] with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels.
      image_shape: (h, w, c) wanted, c = 1 or 3; None for the stored one.
      invert: take `255 - x` in the end.

    Returns:
      uint8 [n, h, w, c]; x itself when there is nothing to do.

    Raises:
      DataError: x is not such a stack, a bad `image_shape`, or channels that have no meaning as a colour.
    """
    image_shape = check_image_shape(image_shape)
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or not x.size:
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise DataError(
            f"images must be uint8 [n, h, w, c] with at least one row, got {given}; give check_arrays(x, y).x, or "
            "scale floats to uint8 first"
        )
    if image_shape is not None and x.shape[1:] != image_shape:
        if x.shape[-1] not in _MODES:
            raise DataError(
                f"images have {x.shape[-1]} channels, and image_shape={image_shape} needs 1 to 4; choose the channels "
                "yourself, or give image_shape=None"
            )
        squeezed = x[..., 0] if x.shape[-1] == 1 else x
        converted = np.empty((len(x), *image_shape), np.uint8)
        for row, pixels in enumerate(squeezed):
            converted[row] = convert_image(Image.fromarray(pixels), image_shape)
        x = converted
    return 255 - x if invert else x


def convert_arrays(
    arrays: Arrays, image_shape: tuple[int, int, int] | None, *, invert: bool, name: str = "the data"
) -> Arrays:
    """Applies `convert_images` to a split; raises a DataError where x is not uint8 images and something is asked."""
    if image_shape is None and not invert:
        return arrays
    if arrays.x.dtype != np.uint8:
        raise DataError(
            f"{name}: x is {arrays.x.dtype} of shape {arrays.x.shape}, and image_shape and invert need uint8 images; "
            "leave both out, or store the images as uint8 [n, h, w, c]"
        )
    return arrays._replace(x=convert_images(arrays.x, image_shape, invert=invert))
