"""A person's own labelled tasks: several sets, each with classes of its own, checked and indexed for the samplers."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaal_jax import inputs
from metaal_jax.tasks.class_data import ClassData, class_data


class LabelledSet(NamedTuple):
    """One task: rows and the numbers of their classes.

    Attributes:
      name: what a person calls it: its place in the list, or its group.
      x: `[n, ...]`.
      y: integers `[n]`, classes 0..c-1.
    """

    name: Hashable
    x: np.ndarray
    y: np.ndarray


class LabelledSets(NamedTuple):
    """What can be used of a person's tasks, and a line for each class and task that cannot."""

    sets: tuple[LabelledSet, ...]
    left_out: tuple[str, ...]


def labelled_sets(
    given: Any, groups: Sequence[Hashable] | None = None, *, rows: int = 2, name: str = "labelled_sets"
) -> LabelledSets:
    """Checks a person's labelled tasks and numbers the classes of each.

    >>> from metaal_jax import tasks
    >>> x = [[0.0], [0.1], [1.0], [1.1], [5.0]]
    >>> found = tasks.labelled_sets([(x, ["low", "low", "high", "high", "odd"])])
    >>> found.sets[0].y
    array([0, 0, 1, 1], dtype=int32)
    >>> found.left_out
    ("task 0: class 'odd' has 1 row of the 2 that a class needs",)

    Args:
      given: a list of tasks `(x, y)`, with `x` numbers `[n, ...]` of one shape of row in all tasks and `y` a label for
        each row, of any hashable kind; or, with `groups`, one pair `(x, y)`.
      groups: the task of each row, of any hashable kind; tasks come in the order of their first row.
      rows: the least number of rows of a class. Classes with fewer are left out, and so are tasks of fewer than two
        classes.
      name: of the function that was called, for messages.

    Returns:
      `LabelledSets`, on the host. Classes are numbered in the order of their first row.

    Raises:
      ValueError: for what is no list of such pairs; another number of labels or groups than rows; rows of different
        shapes, without numbers, or with a NaN or infinite cell; labels that are missing or cannot be hashed; and where
        no task is left. The message names the task and the row.
    """
    sets, left_out = [], []
    for one in _parts(name, given) if groups is None else _grouped(name, given, groups):
        label = f"task {one.name!r}"
        counts = Counter(one.y)
        for kind, count in counts.items():
            if count < rows:
                left_out.append(f"{label}: class {kind!r} has {_many(count, 'row')} of the {rows} that a class needs")
        number = {kind: i for i, kind in enumerate(kind for kind, count in counts.items() if count >= rows)}
        if len(number) < 2:
            left_out.append(f"{label}: left out, {_many(len(number), 'class')} of the 2 that a task needs")
            continue
        keep = np.asarray([kind in number for kind in one.y])
        y = np.asarray([number[kind] for kind in one.y if kind in number], np.int32)
        sets.append(LabelledSet(one.name, one.x[keep], y))
    if not sets:
        raise ValueError(
            f"{name}: no task has two classes of at least {rows} rows ({left_out[-1]}); give larger tasks, or ask for "
            "fewer rows of a class"
        )
    return LabelledSets(tuple(sets), tuple(left_out))


def class_sets(sets: Sequence[LabelledSet]) -> ClassData:
    """All classes of several sets as one `ClassData`, from which a task draws the classes of one set.

    `few_shot` and `growing` take it: `ways` is then the most classes of a task, and where the set that was drawn has
    fewer, the others have no rows.

    Returns:
      NumPy arrays; put it on the device once with `jax.device_put`.

    Raises:
      ValueError: without sets; see `class_data`.
    """
    if not sets:
        raise ValueError("class_sets: give at least one set")
    sizes = [int(one.y.max()) + 1 for one in sets]
    first = np.concatenate([[0], np.cumsum(sizes)])
    data: Any = class_data(
        np.concatenate([one.x for one in sets]),
        np.concatenate([one.y + start for one, start in zip(sets, first[:-1], strict=True)]),
    )
    empty = len(data.count)  # a class without rows pads the shorter sets
    table = np.full((len(sets), max(sizes)), empty, np.int32)
    for place, (start, size) in enumerate(zip(first[:-1], sizes, strict=True)):
        table[place, :size] = start + np.arange(size)
    return data._replace(
        rows=np.concatenate([data.rows, np.zeros_like(data.rows[:1])]),
        count=np.append(data.count, np.int32(0)),
        sets=table,
    )


class _Given(NamedTuple):
    """A task as it was given: checked, its labels still a person's."""

    name: Hashable
    x: np.ndarray
    y: list[Hashable]


def _parts(name: str, given: Any) -> list[_Given]:
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{name}: give a list of tasks (x, y), or one (x, y) with groups=; got {type(given).__name__}")
    found: list[_Given] = []
    for place, pair in enumerate(given):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            have = f"a list of {len(pair)}" if isinstance(pair, list | tuple) else type(pair).__name__
            raise ValueError(
                f"{name}: task {place} is {have}, not a pair (x, y); give a list of such pairs, or one (x, y) with "
                "groups= that tells the task of each row"
            )
        x = _rows(name, pair[0], f"task {place}, x")
        if found and x.shape[1:] != found[0].x.shape[1:]:
            raise ValueError(
                f"{name}: task {place} has rows of shape {list(x.shape[1:])}, task 0 of {list(found[0].x.shape[1:])}; "
                "give all tasks the same columns"
            )
        found.append(_Given(place, x, _labels(name, pair[1], len(x), f"task {place}, y")))
    return found


def _grouped(name: str, given: Any, groups: Sequence[Hashable]) -> list[_Given]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        have = f"{len(given)} tasks" if isinstance(given, list | tuple) else type(given).__name__
        raise ValueError(f"{name}: groups= divides one pair (x, y), got {have}; give the pair, or leave groups out")
    x = _rows(name, given[0], "x")
    y = _labels(name, given[1], len(x), "y")
    places: dict[Hashable, list[int]] = {}
    for row, group in enumerate(_labels(name, groups, len(x), "groups")):
        places.setdefault(group, []).append(row)
    return [_Given(group, x[rows], [y[row] for row in rows]) for group, rows in places.items()]


def _rows(name: str, x: Any, what: str) -> np.ndarray:
    if isinstance(x, dict):
        raise ValueError(f"{name}: {what} is a dict; give one array with a row for each example")
    if not hasattr(x, "dtype"):
        try:
            x = np.asarray(x)
        except ValueError:
            raise ValueError(f"{name}: {what} has rows of different lengths; give all rows the same columns") from None
    found = np.asarray(inputs.rows(name, x, what=what))
    if found.ndim < 2:
        raise ValueError(f"{name}: {what} is a list of {len(found)} numbers; give an array [n, columns] or [n, h, w]")
    return found


def _labels(name: str, y: Any, count: int, what: str) -> list[Hashable]:
    if not hasattr(y, "__len__") or isinstance(y, str | dict):
        raise ValueError(f"{name}: {what} is {type(y).__name__}; give a list with one entry for each row")
    labels = y.tolist() if hasattr(y, "tolist") else list(y)
    if not isinstance(labels, list) or len(labels) != count:
        have = len(labels) if isinstance(labels, list) else 1
        raise ValueError(f"{name}: {what} has {have} entries for {count} rows; give one for each row")
    labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
    for row, label in enumerate(labels):
        try:
            hash(label)
        except TypeError:
            raise ValueError(
                f"{name}: {what}[{row}] is a {type(label).__name__}; give one number, string or tuple for each row"
            ) from None
        if label is None or label != label:
            raise ValueError(f"{name}: {what}[{row}] is {label}; leave out rows without one")
    return labels


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"
