"""The record that every data source yields, and the checks that stand between a file and a training run."""

from typing import Any, NamedTuple

import numpy as np


class DataError(ValueError):
    """A data set, file or array that cannot be used; the message is one line and says what to do next."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Arrays(NamedTuple):
    """One split of a data set on the host.

    Attributes:
      x: uint8 [n, h, w, c] images with values 0 to 255, or float32 [n, d] rows (or float32 [n, h, w, c] images that
        came as floats and are left as they are).
      y: int32 [n] labels, `0 <= y < classes`.
      classes: the number of classes of the whole data set. A split need not hold every class: Omniglot's `train`
        and `test` share none.
    """

    x: np.ndarray
    y: np.ndarray
    classes: int


def check_labels(y: Any, *, classes: int | None = None, name: str = "the data") -> np.ndarray:
    """Checks labels and returns them as int32.

    Args:
      y: integers [n], at least one.
      classes: the number of classes, or None where any label from 0 is right.
      name: what the message calls the data.

    Returns:
      y as int32 [n].

    Raises:
      DataError: no labels, another rank, not integers, or outside `0 <= y < classes`.
    """
    y = np.asarray(y)
    if y.ndim != 1:
        raise DataError(
            f"{name}: y has shape {y.shape}, allowed is [n], one label per row; give y.reshape(-1) or "
            "y.argmax(-1) if it is one-hot"
        )
    if not len(y):
        raise DataError(f"{name}: the set is empty (y has shape {y.shape}); give at least one row")
    if y.dtype.kind not in "iu":
        raise DataError(
            f"{name}: labels are {y.dtype}, allowed are integers from 0; number the classes first, as in "
            "np.unique(y, return_inverse=True)[1]"
        )
    limit = np.iinfo(np.int32).max if classes is None else int(classes)
    bad = np.flatnonzero((y < 0) | (y >= limit))
    if len(bad):
        raise DataError(
            f"{name}: label {y[bad[0]]} in row {bad[0]} ({len(bad)} such rows), allowed are 0 to {limit - 1}; "
            "renumber the labels or drop those rows"
        )
    return y.astype(np.int32, copy=False)


def check_pixels(x: Any, *, name: str = "the data") -> np.ndarray:
    """Checks images or rows of features and returns them in one of the forms of `Arrays.x`.

    Integers of shape [n, h, w] or [n, h, w, c] become uint8 [n, h, w, c] and must lie in 0 to 255; anything of shape
    [n, d], and floats, become float32.

    Args:
      x: [n, h, w, c], [n, h, w] or [n, d] numbers.
      name: what the message calls the data.

    Returns:
      uint8 [n, h, w, c], float32 [n, d] or float32 [n, h, w, c].

    Raises:
      DataError: another rank, no rows, an empty axis, not numbers, integer pixels outside 0 to 255, NaN or infinity.
    """
    x = np.asarray(x)
    if x.ndim not in (2, 3, 4):
        raise DataError(f"{name}: x has shape {x.shape}, allowed are [n, h, w, c], [n, h, w] and [n, d]; reshape it")
    if not x.size:
        raise DataError(f"{name}: the set is empty (x has shape {x.shape}); give at least one row and one feature")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name}: x is {x.dtype}, allowed are uint8 pixels and float32 features; convert it first")
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype.kind in "biu" and x.ndim == 4:
        if x.dtype != np.uint8:
            low, high = int(x.min()), int(x.max())
            if low < 0 or high > 255:
                raise DataError(
                    f"{name}: pixels run from {low} to {high}, allowed are 0 to 255; rescale them to uint8 "
                    "or give float32"
                )
            x = x.astype(np.uint8)
        return x
    with np.errstate(over="ignore"):  # what overflows float32 is reported below as infinite
        x = x.astype(np.float32, copy=False)
    finite = np.isfinite(x)
    if not finite.all():
        row = int(np.argwhere(~finite)[0, 0])
        raise DataError(
            f"{name}: x holds {int((~finite).sum())} NaN or infinite values, the first in row {row}, allowed "
            "are finite float32 numbers; drop those rows or use np.nan_to_num"
        )
    return x


def check_arrays(x: Any, y: Any, *, classes: int | None = None, name: str = "the data") -> Arrays:
    """Checks arrays of any origin and brings them into the form of `Arrays`; every source goes through it.

    Args:
      x: [n, h, w, c], [n, h, w] or [n, d] numbers, see `check_pixels`.
      y: [n] integers.
      classes: the number of classes; None for the largest label plus one.
      name: what the messages call the data.

    Returns:
      The `Arrays`; nothing is copied that has the right type already.

    Raises:
      DataError: as `check_pixels` and `check_labels`, or x and y of different lengths, or `classes` below 1.

    Example:
      >>> import numpy as np
      >>> check_arrays(np.zeros((4, 8, 8), np.uint8), [0, 1, 2, 1]).x.shape
      (4, 8, 8, 1)
    """
    if classes is not None and classes < 1:
        raise DataError(f"{name}: classes={classes}, allowed is 1 or more; give the number of classes or None")
    try:
        x, y = np.asarray(x), np.asarray(y)
    except ValueError as error:
        raise DataError(
            f"{name}: not an array ({error}), allowed are rows of one shape; make them equally long"
        ) from error
    rows, labels = x.shape[:1], y.shape[:1]
    if rows != labels:
        raise DataError(
            f"{name}: x has {rows[0] if rows else 'no'} rows and y has {labels[0] if labels else 'no'}, "
            "allowed is one label per row; cut both to the same rows"
        )
    x = check_pixels(x, name=name)
    y = check_labels(y, classes=classes, name=name)
    return Arrays(x=x, y=y, classes=int(y.max()) + 1 if classes is None else int(classes))
