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
      sets: int32 `[s, most]`, which classes stand together, padded with a class without rows: a task then draws its
        classes from one of the `s` sets, see `class_sets`. None where all classes are of one set.
    """

    x: PyTree
    y: Array
    rows: Array
    count: Array  # type: ignore[assignment]
    sets: Array | None = None


def class_data(x: PyTree, y: np.ndarray, *, classes: np.ndarray | None = None) -> ClassData:
    """Indexes a labelled set by class, on the host.

    Args:
      x: leaves `[n, ...]`, arrays of numbers.
      y: integers `[n]`.
      classes: keep only rows of these classes, numbered 0.. in this order; None for all that occur, in order.

    Returns:
      `ClassData`, NumPy arrays; put it on the device once with `jax.device_put`.

    Raises:
      ValueError: for an empty set, another number of rows than of labels, values that are not finite, labels that are
        no integers, negative ones unless `classes` leaves them out, or a class that is named twice or has no row.
    """
    y = np.asarray(y)
    _check_rows(x)
    if y.ndim != 1 or y.size == 0 or rows_of(x) != y.size:
        raise ValueError(
            f"class_data needs as many rows as labels and at least one, got {rows_of(x)} rows and y of shape {y.shape}"
        )
    _check_integers("labels", y)
    wanted = np.unique(y) if classes is None else np.asarray(classes)
    if classes is None and wanted[0] < 0:
        raise ValueError(
            f"class_data: label {wanted[0]} in row {int(y.argmin())} is negative; leave out rows without a label, or "
            "name the classes to keep"
        )
    if wanted.ndim != 1 or wanted.size == 0:
        raise ValueError(f"class_data: classes must be a list of at least one class, got the shape {wanted.shape}")
    _check_integers("classes", wanted)
    if len(np.unique(wanted)) < len(wanted):
        twice = next(label for label in wanted.tolist() if (wanted == label).sum() > 1)
        raise ValueError(f"class_data: class {twice} is named twice in classes; name each once")
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


def check_count(function: str, name: str, value: int, least: int = 1) -> None:
    """Raises a `ValueError` unless `value` is an integer of at least `least`; lets traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{function}: {name} must be {kind}, got {value!r}")


def require_one_set(function: str, *data: ClassData) -> None:
    """Raises a `ValueError` for classes of several sets, where those of one are wanted."""
    for one in data:
        if one.sets is not None:
            raise ValueError(
                f"{function}: the classes are of {one.sets.shape[0]} sets, and a problem is of one; give class_data(x, "
                "y) of a single set"
            )


def check_rotations(function: str, x: PyTree) -> None:
    """Raises a `ValueError` unless some leaf of `x` holds images that a quarter turn changes, and all are square.

    Without one, turned classes would be one and the same row under several labels.
    """
    images = [leaf.shape for leaf in jax.tree.leaves(x) if leaf.ndim >= 3]
    if not images:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(x))
        raise ValueError(
            f"{function}: rotations turn images [n, h, w] or [n, h, w, channels], got rows of shape {shapes}; leave "
            "rotations out, or reshape the rows to images"
        )
    for shape in images:
        if shape[1] != shape[2] or shape[1] < 2:
            raise ValueError(
                f"{function}: rotations need square images of at least 2 x 2 pixels, got {shape[1]} x {shape[2]}; "
                "leave rotations out, or make the images square"
            )


def _check_integers(what: str, y: np.ndarray) -> None:
    if y.dtype.kind in "iu":
        return
    given = f"{y.dtype}, {y[0]!s} the first"
    if y.dtype.kind == "f":
        odd = np.flatnonzero(~np.isfinite(y) | (y != np.floor(y)))
        given = f"{y.dtype}, {y[odd[0]]} in row {odd[0]}" if len(odd) else f"{y.dtype}"
    raise ValueError(
        f"class_data: {what} must be integers, got {given}; number the classes first, as in "
        "np.unique(y, return_inverse=True)[1]"
    )


def _check_rows(x: PyTree) -> None:
    """Raises a `ValueError` for leaves that are no arrays of finite numbers, with the place of the first."""
    if not jax.tree.leaves(x):
        raise ValueError("class_data: x has no arrays; give an array of rows, or a dictionary of such arrays")
    for place, leaf in jax.tree_util.tree_leaves_with_path(x):
        name = f"x{jax.tree_util.keystr(place)}"
        if not getattr(leaf, "ndim", 0):
            raise ValueError(f"class_data: {name} must be an array [n, ...], got {type(leaf).__name__}")
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise ValueError(f"class_data: {name} must hold numbers, got {leaf.dtype}; convert it first")
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not (finite := np.isfinite(np.asarray(leaf))).all():
            row, *cell = (int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"class_data: {name} holds {int((~finite).sum())} NaN or infinite values, the first in row {row}"
                f"{f' at {cell}' if cell else ''}; drop those rows or use np.nan_to_num"
            )


def draw_classes(key: Array, data: ClassData, ways: int, rotations: bool) -> tuple[Array, Array]:
    """`ways` distinct classes in random order and how many quarter turns each takes.

    Of several sets one is drawn first, evenly. Where it has fewer classes, those without rows follow the real ones.
    """
    own = jnp.arange(data.count.shape[0])
    if data.sets is not None:
        set_key, key = jax.random.split(key)
        own = data.sets[jax.random.randint(set_key, (), 0, data.sets.shape[0])]
    classes = own.shape[0] * (4 if rotations else 1)
    if ways > classes:
        raise ValueError(f"{ways} ways wanted, the set has {classes} classes; ask for fewer ways")
    drawn = jax.random.permutation(key, classes)
    if data.sets is not None:
        drawn = drawn[jnp.argsort(data.count[own[drawn % own.shape[0]]] == 0)]  # stable: the order stays random
    drawn = drawn[:ways]
    return own[drawn % own.shape[0]], drawn // own.shape[0]


def draw_rows(key: Array, data: ClassData, label: Array, k: int) -> tuple[Array, Array]:
    """`k` distinct rows of each class: `(row int32 [ways, k], real bool [ways, k])`, real rows first."""
    most = data.rows.shape[1]
    if k > most:
        raise ValueError(f"{k} rows of a class wanted, the largest class has {most}; ask for fewer shots or queries")
    noise = jax.random.uniform(key, (label.shape[0], most))
    noise = jnp.where(jnp.arange(most)[None] < data.count[label][:, None], noise, -1.0)
    value, column = lax.top_k(noise, k)
    return jnp.take_along_axis(data.rows[label], column, axis=1), value >= 0


def gather(data: ClassData, row: Array, turn: Array | None) -> PyTree:
    """Rows of the set, each turned by `turn` quarter turns (broadcast against `row`), or as they are for None."""
    if turn is None:
        return take(data.x, row)

    def turned(leaf: Array) -> Array:
        x = leaf[row]
        if leaf.ndim < 3:  # what stands beside the images; `check_rotations` has seen that there are some
            return x
        height = row.ndim
        turns = [x] + [jnp.rot90(x, i, axes=(height, height + 1)) for i in (1, 2, 3)]
        which = jnp.broadcast_to(turn, row.shape).reshape(row.shape + (1,) * (leaf.ndim - 1))
        return jnp.select([which == i for i in range(4)], turns)

    return jax.tree.map(turned, data.x)
