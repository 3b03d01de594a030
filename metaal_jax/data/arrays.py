"""The records that every data source yields, and the checks that stand between a file and a training run."""

from collections.abc import Callable
from pathlib import Path
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


class Source(NamedTuple):
    """One split, opened: what `load` and `stream` share.

    Attributes:
      rows: the number of rows n.
      shape: the shape of one row of x.
      dtype: the type of x, uint8 or float32.
      classes: the number of classes.
      read: row numbers int64 [k] -> (x [k, *shape], y int32 [k]), converted and checked; threads may call it at once.
      key: names the data and their form in the cache; None for sources that are not worth caching.
      cache_folders: where the decoded split is kept, in the order of preference.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype
    classes: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    key: str | None = None
    cache_folders: tuple[Path, ...] = ()


def check_labels(
    y: Any, *, classes: int | None = None, name: str = "the data", rows: np.ndarray | None = None
) -> np.ndarray:
    """Checks labels and returns them as int32.

    Args:
      y: integers [n], at least one.
      classes: the number of classes, or None where any label from 0 is right.
      name: what the message calls the data.
      rows: [n] the row numbers that the message gives; None for 0, 1, ...

    Returns:
      y as int32 [n].

    Raises:
      DataError: no labels, another rank, not integers, masked, or outside `0 <= y < classes`.
    """
    y = _unmasked(y, "y", name)
    if y.ndim != 1:
        raise DataError(
            f"{name}: y must be [n], one label per row, got the shape {y.shape}; give y.reshape(-1), or "
            "y.argmax(-1) if it is one-hot"
        )
    if not len(y):
        raise DataError(f"{name}: the set is empty (y has shape {y.shape}); give at least one row")
    if y.dtype.kind not in "iu":
        what = f"the first is {y[0]!r}" if y.dtype.kind != "f" else ""
        if y.dtype.kind == "f":
            odd = np.flatnonzero(~np.isfinite(y) | (y != np.floor(y)))
            what = f"row {odd[0]} holds {y[odd[0]]}" if len(odd) else "all of them whole"
        raise DataError(
            f"{name}: labels must be integers from 0, got {y.dtype} ({what}); number the classes first, as in "
            "np.unique(y, return_inverse=True)[1]"
        )
    limit = np.iinfo(np.int32).max if classes is None else int(classes)
    bad = np.flatnonzero((y < 0) | (y >= limit))
    if len(bad):
        raise DataError(
            f"{name}: labels must lie in 0 to {limit - 1}, got label {y[bad[0]]} in row "
            f"{bad[0] if rows is None else rows[bad[0]]} ({len(bad)} such rows); renumber the labels or drop those rows"
        )
    return y.astype(np.int32, copy=False)


def check_number(y: np.ndarray, *, name: str = "the data") -> int:
    """The number of classes of labels that `check_labels` passed: the largest plus one.

    Raises:
      DataError: more classes than rows: the labels are codes or row numbers, and a model of so many outputs a mistake.
    """
    classes = int(y.max()) + 1
    if classes > len(y):
        row = int(y.argmax())
        raise DataError(
            f"{name}: label {classes - 1} in row {row} makes {classes} classes of {len(y)} rows; number the classes "
            "first, as in np.unique(y, return_inverse=True)[1]"
        )
    return classes


def _unmasked(given: Any, what: str, name: str) -> np.ndarray:
    """As an array; refuses sparse matrices and masked cells, which `np.asarray` would take for something else."""
    if hasattr(given, "toarray"):
        raise DataError(f"{name}: {what} is a sparse matrix; give {what}.toarray()")
    if isinstance(given, np.ma.MaskedArray) and np.ma.getmaskarray(given).any():
        masked = np.argwhere(np.ma.getmaskarray(given))
        raise DataError(
            f"{name}: {what} has {len(masked)} masked values, the first in {_place(masked[0])}; fill them or drop "
            "those rows"
        )
    return np.asarray(given)


def _place(cell: np.ndarray) -> str:
    row, *rest = (int(i) for i in cell)
    if not rest:
        return f"row {row}"
    return f"row {row}, column {rest[0]}" if len(rest) == 1 else f"row {row}, pixel {tuple(rest)}"


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
    x = _unmasked(x, "x", name)
    if x.ndim not in (2, 3, 4):
        raise DataError(f"{name}: x must be [n, h, w, c], [n, h, w] or [n, d], got the shape {x.shape}; reshape it")
    if not x.size:
        raise DataError(f"{name}: the set is empty (x has shape {x.shape}); give at least one row and one feature")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name}: x must be uint8 pixels or float32 features, got {x.dtype}; convert it first")
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype.kind in "biu" and x.ndim == 4:
        if x.dtype != np.uint8:
            low, high = int(x.min()), int(x.max())
            if low < 0 or high > 255:
                raise DataError(
                    f"{name}: pixels must lie in 0 to 255, got {low} to {high}; rescale them to uint8 or give float32"
                )
            x = x.astype(np.uint8)
        return x
    with np.errstate(over="ignore"):  # what overflows float32 is reported below as infinite
        x = x.astype(np.float32, copy=False)
    finite = np.isfinite(x)
    if not finite.all():
        place = _place(np.argwhere(~finite)[0])
        raise DataError(
            f"{name}: x holds {int((~finite).sum())} NaN or infinite float32 values, the first in {place}; drop those "
            "rows or use np.nan_to_num"
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
      DataError: as `check_pixels`, `check_labels` and `check_number`, or x and y of different lengths, or `classes`
        that is no positive integer.

    Example:
      >>> import numpy as np
      >>> check_arrays(np.zeros((4, 8, 8), np.uint8), [0, 1, 2, 1]).x.shape
      (4, 8, 8, 1)
    """
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 1):
        raise DataError(f"{name}: classes must be a positive integer or None, got {classes!r}")
    try:
        x, y = _unmasked(x, "x", name), _unmasked(y, "y", name)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{name}: not an array ({error}); give rows of one shape") from error
    rows, labels = x.shape[:1], y.shape[:1]
    if rows != labels:
        raise DataError(
            f"{name}: x has {rows[0] if rows else 'no'} rows and y has {labels[0] if labels else 'no'}, "
            "not one label per row; cut both to the same rows"
        )
    x = check_pixels(x, name=name)
    y = check_labels(y, classes=classes, name=name)
    return Arrays(x=x, y=y, classes=check_number(y, name=name) if classes is None else int(classes))
