"""Decoded splits on disk: an uncompressed `.npz` with the arrays `x` and `y`, which reads at the speed of the disk.

One file per split and form, so that x and y are replaced together; its sums are checked on every read, so that a torn
or damaged file counts as missing and is written again; so does one whose labels the set does not have.
"""

import hashlib
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaal_jax.data.arrays import DataError

_FORM = 1  # part of every file name: raise it when the conversion of images changes


def cache_path(folder: Path, key: str) -> Path:
    """The file for `key`: readable where it can be, and unique by a digest."""
    digest = hashlib.sha256(f"{_FORM} {key}".encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', key).strip('_')[:80]}-{digest}.npz"


def read_cache(
    folders: Sequence[Path], key: str, *, rows: int, shape: tuple[int, ...], classes: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads the first sound copy in `folders`.

    Args:
      folders: where to look, in this order.
      key: names the data and its form.
      rows: the number of rows expected.
      shape: the shape of one row of x expected.
      classes: their number; labels from 0 below it are sound.

    Returns:
      x uint8 [rows, *shape] and y int32 [rows], or None if there is no sound copy.
    """
    for folder in folders:
        try:
            # Opened here: np.load leaves the file open when the archive is damaged.
            with open(cache_path(folder, key), "rb") as raw, np.load(raw, allow_pickle=False) as file:
                x, y = file["x"], file["y"]
        except Exception:  # a damaged archive raises nearly anything; each means that there is no sound copy
            continue
        sound = x.shape == (rows, *shape) and x.dtype == np.uint8 and y.shape == (rows,) and y.dtype == np.int32
        if sound and y.min(initial=0) >= 0 and y.max(initial=0) < classes:
            return x, y
    return None


def write_cache(folders: Sequence[Path], key: str, x: np.ndarray, y: np.ndarray, *, required: bool) -> None:
    """Writes x and y into the first folder that takes them, whole or not at all.

    Args:
      folders: where to write, tried in this order.
      key: names the data and its form.
      x: uint8 [n, ...].
      y: int32 [n].
      required: whether it is an error if none of the folders can be written.

    Raises:
      DataError: `required` and nothing could be written.
    """
    reason: OSError | None = None
    for folder in folders:
        path = cache_path(folder, key)
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    np.savez(file, x=x, y=y)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            return
        except OSError as error:
            reason = error
    if required:
        raise DataError(
            f"cache_dir={str(folders[0])!r} cannot be written ({reason}); give another folder, or None for the default"
        )
