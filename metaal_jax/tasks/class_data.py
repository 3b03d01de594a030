"""A labelled set with the rows of each class, and what draws classes and rows from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.base import PyTree, rows_of, take


class ClassData(NamedTuple):
    """A labelled set with the rows of each class, made by `class_data`.

    Attributes:
      x: leaves `[n, ...]`.
      y: int32 `[n]`, classes 0..c-1.
      rows: int32 `[c, most]`, the rows of each class, padded with 0 beyond `count`.
      count: int32 `[c]`.
    """

    x: PyTree
    y: Array
    rows: Array
    count: Array  # type: ignore[assignment]


def class_data(x: PyTree, y: np.ndarray, *, classes: np.ndarray | None = None) -> ClassData:
    """Indexes a labelled set by class, on the host.

    Args:
      x: leaves `[n, ...]`.
      y: integers `[n]`.
      classes: keep only rows of these classes, numbered 0.. in this order; None for all that occur, in order.

    Returns:
      `ClassData`, NumPy arrays; put it on the device once with `jax.device_put`.

    Raises:
      ValueError: for an empty set, or a class that has no row.
    """
    y = np.asarray(y)
    if y.ndim != 1 or y.size == 0 or rows_of(x) != y.size:
        raise ValueError(f"class_data needs as many rows as labels and at least one, got y of shape {y.shape}")
    wanted = np.unique(y) if classes is None else np.asarray(classes)
    keep = np.isin(y, wanted)
    if keep.sum() < y.size:
        x, y = jax.tree.map(lambda leaf: leaf[keep], x), y[keep]
    number = {int(label): i for i, label in enumerate(wanted)}
    y = np.asarray([number[int(label)] for label in y], np.int32)
    count = np.bincount(y, minlength=len(wanted)).astype(np.int32)
    if (count == 0).any():
        raise ValueError(f"class {wanted[int(np.flatnonzero(count == 0)[0])]} has no row; leave it out of classes")
    rows = np.zeros((len(wanted), count.max()), np.int32)
    rows[np.arange(rows.shape[1]) < count[:, None]] = np.argsort(y, kind="stable")
    index: Any = (y, rows, count)  # NumPy arrays until the caller puts them on a device
    return ClassData(x, *index)


def split_classes(classes: int, shares: tuple[int, ...], *, seed: int = 0) -> list[np.ndarray]:
    """Disjoint random groups of class numbers of the given sizes, for meta-training, validation and test.

    Raises:
      ValueError: where the groups together need more classes than there are.
    """
    if sum(shares) > classes:
        raise ValueError(f"groups of {shares} classes need {sum(shares)}, the set has {classes}; ask for fewer")
    order = np.random.default_rng(seed).permutation(classes)
    return [np.sort(part) for part in np.split(order[: sum(shares)], np.cumsum(shares)[:-1])]


def draw_classes(key: Array, data: ClassData, ways: int, rotations: bool) -> tuple[Array, Array]:
    """`ways` distinct classes in random order and how many quarter turns each takes."""
    classes = data.count.shape[0] * (4 if rotations else 1)
    if ways > classes:
        raise ValueError(f"{ways} ways wanted, the set has {classes} classes; ask for fewer ways")
    drawn = jax.random.permutation(key, classes)[:ways]
    return drawn % data.count.shape[0], drawn // data.count.shape[0]


def draw_rows(key: Array, data: ClassData, label: Array, k: int) -> tuple[Array, Array]:
    """`k` distinct rows of each class: `(row int32 [ways, k], real bool [ways, k])`, real rows first."""
    most = data.rows.shape[1]
    if k > most:
        raise ValueError(f"{k} rows of a class wanted, the largest class has {most}; ask for fewer shots or queries")
    noise = jax.random.uniform(key, (label.shape[0], most))
    noise = jnp.where(jnp.arange(most) < data.count[label][:, None], noise, -1.0)
    value, column = lax.top_k(noise, k)
    return jnp.take_along_axis(data.rows[label], column, axis=1), value >= 0


def gather(data: ClassData, row: Array, turn: Array | None) -> PyTree:
    """Rows of the set, each turned by `turn` quarter turns (broadcast against `row`), or as they are for None."""
    if turn is None:
        return take(data.x, row)

    def turned(leaf: Array) -> Array:
        x = leaf[row]
        if leaf.ndim < 3:
            return x
        height = row.ndim
        turns = [x] + [jnp.rot90(x, i, axes=(height, height + 1)) for i in (1, 2, 3)]
        which = jnp.broadcast_to(turn, row.shape).reshape(row.shape + (1,) * (leaf.ndim - 1))
        return jnp.select([which == i for i in range(4)], turns)

    return jax.tree.map(turned, data.x)
