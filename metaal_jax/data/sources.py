"""Where labelled data come from: one name, one split, one form.

A name is `digits`, `wine`, `iris` or `breast_cancer` (they come with scikit-learn), the path of a `.npz` file, or an
image-classification set of TensorFlow Datasets (TFDS), which must have been prepared on this machine
(`python -m metaal_jax.data.prepare NAME`).
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from metaal_jax.data.arrays import Arrays, DataError, Source, check_arrays
from metaal_jax.data.cache import read_cache, write_cache
from metaal_jax.data.images import check_image_shape, convert_arrays, wants_inversion
from metaal_jax.data.local import EMBEDDED, read_digits, read_npz, read_table

_T = TypeVar("_T")
_R = TypeVar("_R")

_CHUNK = 1024  # rows decoded by one call in `load`


def open_source(
    name: str | os.PathLike[str],
    split: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    invert: bool | None = None,
    label: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a split without reading all of it (what is no TFDS set is read); arguments as in `load`."""
    image_shape = check_image_shape(image_shape)
    if not isinstance(name, str | os.PathLike):
        raise DataError(
            f"name must be a string or a path, got {name!r}; give 'digits', the path of a .npz, or the name of a TFDS "
            "data set"
        )
    if not isinstance(split, str):
        raise DataError(f"split must be a string, got {split!r}; give for example 'train' or 'test'")
    if label is not None and not isinstance(label, str):
        raise DataError(f"label must be the name of a class label or None, got {label!r}")
    check_folder("data_dir", data_dir)
    name = os.fspath(name)
    inverted = wants_inversion(name, invert)
    if name in EMBEDDED or name.endswith(".npz"):
        if label is not None:
            raise DataError(
                f"{name!r} has one label alone, asked for is {label!r}; leave label out, or give a TFDS set"
            )
        if name in EMBEDDED:
            arrays = read_digits(split) if name == "digits" else read_table(name, split)
        else:
            arrays = read_npz(Path(name).expanduser(), split)
        arrays = convert_arrays(arrays, image_shape, invert=inverted, name=repr(name))

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return arrays.x[rows], arrays.y[rows]

        return Source(
            rows=len(arrays.y), shape=arrays.x.shape[1:], dtype=arrays.x.dtype, classes=arrays.classes, read=read
        )
    from metaal_jax.data.tfds import open_tfds

    return open_tfds(name, split, image_shape=image_shape, invert=inverted, label=label, data_dir=data_dir)


def check_folder(name: str, value: object) -> None:
    """Raises a DataError unless `value` is a path or None."""
    if not (value is None or isinstance(value, str | os.PathLike)):
        raise DataError(f"{name} must be the path of a folder or None, got {value!r}")


def read_ahead(
    function: Callable[[_T], _R], items: Iterable[_T], *, workers: int, ahead: int
) -> Generator[_R, None, None]:
    """Yields `function(item)` in the order of `items`, computed by threads before it is asked for.

    Args:
      function: what the threads call.
      items: its arguments, taken as room comes free.
      workers: the number of threads.
      ahead: how many results may be under way or waiting.

    Yields:
      The results; an exception in `function` is raised where its result would have come. Closing the generator ends
      the threads after the calls that they are in.
    """
    executor = ThreadPoolExecutor(workers, thread_name_prefix="metaal_jax-read")
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _read_all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    x = np.empty((source.rows, *source.shape), source.dtype)
    y = np.empty(source.rows, np.int32)
    chunks: Sequence[np.ndarray] = [
        np.arange(start, min(start + _CHUNK, source.rows)) for start in range(0, source.rows, _CHUNK)
    ]
    workers = min(4, os.cpu_count() or 1)
    for rows, (x_chunk, y_chunk) in zip(
        chunks, read_ahead(source.read, chunks, workers=workers, ahead=2 * workers), strict=True
    ):
        x[rows[0] : rows[-1] + 1], y[rows[0] : rows[-1] + 1] = x_chunk, y_chunk
    return x, y


def load(
    name: str | os.PathLike[str],
    split: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    invert: bool | None = None,
    label: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Arrays:
    """Reads one split of a data set into host memory.

    A TFDS set is decoded once, and the result kept as a file that reads in well under a second. What does not fit the
    memory is for `metaal_jax.data.stream`.

    Args:
      name: `"digits"`; one of the tables `"wine"`, `"iris"` and `"breast_cancer"`; a path that ends in `.npz` (see
        `metaal_jax.data.local.read_npz`); or a TFDS set as `name`, `name/config`, `name:version` or
        `name/config:version`.
      split: `"train"` or `"test"`; for TFDS any split of the set, also `"train[:80%]"` or `"train+test"`.
      image_shape: (h, w, c) to convert images to, c = 1 or 3; None for the stored shape. The rules, area mean, luma
        and the rest, are at the top of `metaal_jax.data.images`.
      invert: whether to take `255 - x`. None inverts the sets known to be dark ink on light paper (Omniglot), so that
        ink is bright as in MNIST.
      label: another class label of a TFDS set than its usual one, such as CIFAR-100's `"coarse_label"` or Omniglot's
        `"alphabet"`; rows come in the same order.
      data_dir: where TFDS sets are prepared; None for the default of TFDS (`$TFDS_DATA_DIR`, `~/tensorflow_datasets`).
      cache_dir: where decoded TFDS splits are kept. None for `metaal_jax_cache` in `data_dir`, or
        `~/.cache/metaal_jax` if that cannot be written, or no file at all if neither can.

    Returns:
      `Arrays`; the labels are those of the set, so `classes` counts all of its classes.

    Raises:
      DataError: an unknown or unprepared set (within seconds, the network is never asked), an unknown split, a set
        that is not image classification, a file that is missing or holds something else, labels out of range, NaN, no
        rows, or arguments that make no sense. The message is one line and says what to do.

    Example:
      >>> load("digits", "train").x.shape
      (1438, 8, 8, 1)
    """
    check_folder("cache_dir", cache_dir)
    source = open_source(name, split, image_shape=image_shape, invert=invert, label=label, data_dir=data_dir)
    if source.key is None:
        x, y = source.read(np.arange(source.rows))
        return Arrays(x=x, y=y, classes=source.classes)
    folders = source.cache_folders if cache_dir is None else (Path(cache_dir).expanduser(),)
    cached = read_cache(folders, source.key, rows=source.rows, shape=source.shape, classes=source.classes)
    if cached is None:
        cached = _read_all(source)
        write_cache(folders, source.key, *cached, required=cache_dir is not None)
    return check_arrays(*cached, classes=source.classes, name=repr(name))
