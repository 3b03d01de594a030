"""Sources that need no data set library: the sets that come with scikit-learn, and `.npz` files."""

import os
from pathlib import Path

import numpy as np

from metaal_jax.data.arrays import Arrays, DataError, check_arrays, check_labels, check_number

SPLITS = ("train", "test")
TABLES = ("wine", "iris", "breast_cancer")
EMBEDDED = ("digits", *TABLES)


def check_split(name: str, split: str) -> None:
    """Raises a DataError unless `split` is `train` or `test`."""
    if split not in SPLITS:
        raise DataError(
            f"{name} has no split {split!r}; give {' or '.join(map(repr, SPLITS))}, and slice the arrays for less"
        )


def split_rows(rows: int, split: str) -> np.ndarray:
    """The row numbers of a split of data that come as one piece: a fixed permutation, the last fifth for `test`.

    Args:
      rows: how many rows there are in all.
      split: `train` or `test`.

    Returns:
      int64 [rows - rows // 5] or [rows // 5].
    """
    # RandomState because its stream is frozen: the split must be the same under every NumPy.
    order = np.random.RandomState(0).permutation(rows)
    return order[: rows - rows // 5] if split == "train" else order[rows - rows // 5 :]


def read_digits(split: str) -> Arrays:
    """Reads the digits that come with scikit-learn: 1797 grey images of 8x8, 10 classes, no network and no files.

    The values 0 to 16 are scaled to 0 to 255 and rounded. The splits are those of `split_rows`: 1438 and 359 rows.

    Args:
      split: `train` or `test`.

    Returns:
      x uint8 [n, 8, 8, 1], y int32 [n].

    Raises:
      DataError: another split.
    """
    check_split("'digits'", split)
    from sklearn.datasets import load_digits

    digits = load_digits()
    keep = split_rows(len(digits.target), split)
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return check_arrays(pixels[keep], digits.target[keep], classes=10, name="'digits'")


def read_table(name: str, split: str) -> Arrays:
    """Reads one of the tables that come with scikit-learn, in its own units: columns are not standardised.

    Args:
      name: `wine` (178 rows of 13 columns, 3 classes), `iris` (150 of 4, 3) or `breast_cancer` (569 of 30, 2).
      split: `train` or `test`, those of `split_rows`.

    Returns:
      x float32 [n, d], y int32 [n].

    Raises:
      DataError: another split.
    """
    check_split(repr(name), split)
    from sklearn import datasets

    table = getattr(datasets, f"load_{name}")()
    keep = split_rows(len(table.target), split)
    return check_arrays(table.data[keep], table.target[keep], classes=len(table.target_names), name=repr(name))


def read_npz(path: str | os.PathLike[str], split: str) -> Arrays:
    """Reads a `.npz` file that holds `x` and `y`, and for its own test split `x_test` and `y_test`.

    Without `x_test` and `y_test` the rows are divided by `split_rows`, the same way on every call. The number of
    classes is the largest label of both splits plus one. Both splits are checked on every call.

    Args:
      path: the file, as written by `np.savez(path, x=x, y=y)`.
      split: `train` or `test`.

    Returns:
      The arrays in a form of `Arrays`.

    Raises:
      DataError: no such file, not a `.npz`, arrays missing, another split, or what `check_arrays` refuses.
    """
    name = repr(os.fspath(path))
    check_split(name, split)
    if not Path(path).is_file():
        raise DataError(
            f"{name}: no such file (looked in {str(Path(path).absolute().parent)!r}); check the path, or write it with "
            "np.savez(path, x=x, y=y)"
        )
    try:
        with open(path, "rb") as raw:  # np.load leaves a damaged file open
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise ValueError("it holds a single array, as np.save writes it")
            with found as file:
                given = {key: file[key] for key in file.files if key in ("x", "y", "x_test", "y_test")}
                held = ", ".join(file.files) or "nothing"
    except Exception as error:  # a damaged archive raises nearly anything
        raise DataError(
            f"{name} cannot be read ({type(error).__name__}: {error}); write it again with np.savez(path, x=x, y=y) "
            "from plain arrays of numbers"
        ) from error
    if not {"x", "y"} <= given.keys() or ("x_test" in given) != ("y_test" in given):
        raise DataError(
            f"{name} holds {held}, and must hold x and y, or x, y, x_test and y_test; write it again with "
            "np.savez(path, x=x, y=y)"
        )
    if "x_test" not in given:
        whole = check_arrays(given["x"], given["y"], name=name)
        if len(whole.y) < 5:
            raise DataError(
                f"{name} has {len(whole.y)} rows, and 5 is the least without a test split (a fifth is set apart); "
                "give x_test and y_test in the file"
            )
        keep = split_rows(len(whole.y), split)
        return whole._replace(x=whole.x[keep], y=whole.y[keep])
    labels = [check_labels(given[key], name=f"{name}, array {key!r}") for key in ("y", "y_test")]
    classes = check_number(np.concatenate(labels), name=name)
    # Both are checked whichever is asked for: that the other is wrong should not come out after the training.
    train, test = (
        check_arrays(given["x" + end], given["y" + end], classes=classes, name=f"{name}, split {part!r}")
        for part, end in (("train", ""), ("test", "_test"))
    )
    if (train.x.shape[1:], train.x.dtype) != (test.x.shape[1:], test.x.dtype):
        raise DataError(
            f"{name}: rows of x are {train.x.dtype} {list(train.x.shape[1:])}, those of x_test {test.x.dtype} "
            f"{list(test.x.shape[1:])}; give both the same form"
        )
    return train if split == "train" else test
