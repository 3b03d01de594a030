"""Data that do not fit: batches from the files, decoded in background threads, put on the device ahead of use."""

import contextlib
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from metaal_jax.data.arrays import DataError, Source
from metaal_jax.data.sources import open_source, read_ahead

_T = TypeVar("_T")


class StreamBatch(NamedTuple):
    """A batch of a fixed size `b`; the last one of a pass is padded.

    Attributes:
      x: uint8 [b, h, w, c], or float32 [b, d] from a file of rows; zeros where padded.
      y: int32 [b] labels; 0 where padded.
      row: int64 [b] row numbers, those of `load`; the number of rows n where padded, so that JAX drops what is
        scattered there.
      weight: float32 [b], 1 for rows of the set, 0 where padded.
    """

    x: np.ndarray
    y: np.ndarray
    row: np.ndarray
    weight: np.ndarray


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise DataError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def stream(
    name: str | os.PathLike[str],
    split: str,
    *,
    batch_size: int,
    image_shape: tuple[int, int, int] | None = None,
    invert: bool | None = None,
    label: str | None = None,
    shuffle_seed: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int = 2,
) -> Generator[StreamBatch, None, None]:
    """One pass over a split in batches, holding only a few of them in memory.

    Every row comes once. All batches have the same shape: the last one is padded, with weight 0. Rows are decoded by
    threads while the caller works on earlier batches. What is no TFDS set is read whole.

    Args:
      name: the data set, as in `metaal_jax.data.load`.
      split: the split, as in `load`.
      batch_size: b, the rows of each batch.
      image_shape: (h, w, c) to convert to, as in `load`.
      invert: as in `load`.
      label: as in `load`.
      shuffle_seed: None for the order of the files, or a seed from 0 for a permutation of all rows; give another seed
        for each pass.
      data_dir: where TFDS sets are prepared, as in `load`.
      workers: decoding threads. At most `2 * workers + 1` batches are in memory.

    Returns:
      A generator of `StreamBatch`; closing it, or dropping it, ends the threads.

    Raises:
      DataError: at the call, as `load` does, or for a bad `batch_size`, `workers` or `shuffle_seed`; from the generator
        for records that cannot be read.

    Example:
      >>> [batch.x.shape for batch in stream("digits", "test", batch_size=200)]
      [(200, 8, 8, 1), (200, 8, 8, 1)]
    """
    batch_size, workers = _check_count("batch_size", batch_size), _check_count("workers", workers)
    is_seed = isinstance(shuffle_seed, int | np.integer) and not isinstance(shuffle_seed, bool)
    if shuffle_seed is not None and not (is_seed and 0 <= shuffle_seed < 2**32):
        raise DataError(f"shuffle_seed must be None or an integer from 0 to 2**32 - 1, got {shuffle_seed!r}")
    source = open_source(name, split, image_shape=image_shape, invert=invert, label=label, data_dir=data_dir)
    return _batches(source, batch_size, shuffle_seed, workers)


def _batches(
    source: Source, batch_size: int, shuffle_seed: int | None, workers: int
) -> Generator[StreamBatch, None, None]:
    if shuffle_seed is None:
        order = np.arange(source.rows, dtype=np.int64)
    else:  # RandomState because its stream is frozen: one seed, one order under every NumPy
        order = np.random.RandomState(shuffle_seed).permutation(source.rows).astype(np.int64, copy=False)

    def batch(start: int) -> StreamBatch:
        rows = order[start : start + batch_size]
        x, y = source.read(rows)
        missing = batch_size - len(rows)
        weight = np.ones(len(rows), np.float32)
        if missing:
            x = np.concatenate([x, np.zeros((missing, *source.shape), x.dtype)])
            y, weight = np.pad(y, (0, missing)), np.pad(weight, (0, missing))
            rows = np.pad(rows, (0, missing), constant_values=source.rows)
        return StreamBatch(x=x, y=y, row=rows, weight=weight)

    yield from read_ahead(batch, range(0, source.rows, batch_size), workers=workers, ahead=2 * workers)


def prefetch(
    iterator: Iterable[_T], *, size: int = 2, device: jax.Device | jax.sharding.Sharding | None = None
) -> Generator[_T, None, None]:
    """Puts what an iterator yields on the device ahead of its use, in a background thread.

    Args:
      iterator: yields pytrees of arrays, such as `StreamBatch`. On a CPU device the arrays may be shared with the host
        copy, so it must not write to them again. int64 becomes int32 unless JAX is in its 64-bit mode.
      size: how many items wait on the device, one more being put.
      device: a device or sharding, as in `jax.device_put`; None for the default device of the caller.

    Returns:
      A generator of the same pytrees with `jax.Array` leaves, in the same order. An exception of the iterator is raised
      in its place. When the generator ends, is closed or dropped, the thread closes the iterator and ends; closing
      waits for the item that the iterator is making.

    Raises:
      DataError: a bad `size`.

    Example:
      >>> [int(x.sum()) for x in prefetch([np.ones(2), np.ones(3)])]
      [2, 3]
    """
    size = _check_count("size", size)
    if device is None:
        default = getattr(jax.config, "jax_default_device", None)  # set for the caller's thread only
        device = default if isinstance(default, jax.Device) else None
    return _prefetched(iter(iterator), size, device)


def _fill(iterator: Iterator[Any], ready: queue.Queue, stop: threading.Event, device: Any) -> None:
    """Puts (item, None) for every item, then (None, None) or (None, exception); ends early when `stop` is set."""
    error: BaseException | None = None
    try:
        for item in iterator:
            if stop.is_set():
                break
            ready.put((jax.device_put(item, device), None))
            if stop.is_set():
                break
    except BaseException as raised:  # travels to the consumer
        error = raised
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
    if not stop.is_set():
        ready.put((None, (error,)))


def _prefetched(iterator: Iterator[Any], size: int, device: Any) -> Generator[Any, None, None]:
    ready: queue.Queue = queue.Queue(maxsize=size)
    stop = threading.Event()
    thread = threading.Thread(
        target=_fill, args=(iterator, ready, stop, device), name="metaal_jax-prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            item, end = ready.get()
            if end is not None:
                if end[0] is not None:
                    raise end[0]
                return
            yield item
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):  # the thread may wait for room; after `stop` it puts at most one item
            while True:
                ready.get_nowait()
        if thread is not threading.current_thread():
            thread.join()
