"""Checks of what a person or a file hands in, outside compiled programs, where values are concrete.

Traced values pass: a compiled program cannot stop, so there what cannot be right never counts as right.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax.base import Answer, Decision, Problem, PyTree, is_classes, rows_of


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf belongs to a program that is being compiled, so that its values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def rows(name: str, x: PyTree, *, what: str = "x") -> PyTree:
    """Checks input rows and gives them as JAX arrays.

    Args:
      name: of the function that was called, for the message.
      x: leaves `[n, ...]`.
      what: name of the argument.

    Raises:
      ValueError: for no rows, leaves of different numbers of rows, values that are no numbers, or a cell that is NaN,
        infinite or beyond what JAX keeps, which it names.
    """
    if not jax.tree.leaves(x):
        raise ValueError(f"{name}: {what} is empty; give an array with one row for each example")
    if is_traced(x):
        return x
    x = jax.tree.map(lambda leaf: leaf if isinstance(leaf, Array) else np.asarray(leaf), x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        label = what + jax.tree_util.keystr(path)
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise ValueError(f"{name}: {label} holds {_kind(leaf)}, not numbers; encode it first")
        if leaf.ndim == 0:
            raise ValueError(f"{name}: {label} is a single number; give an array with one row for each example")
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            cell = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(leaf, np.float64)))[0])
            raise ValueError(
                f"{name}: {label}[{', '.join(map(str, cell))}] is {np.asarray(leaf)[cell]}; fill in or leave out rows "
                "with missing values"
            )
        _check_kept(name, label, leaf)
    if rows_of(x) == 0:
        raise ValueError(f"{name}: {what} has no rows")
    return jax.tree.map(jnp.asarray, x)


def _check_kept(name: str, label: str, leaf: np.ndarray) -> None:
    """Raises a `ValueError` for numbers beyond the narrower type that JAX keeps them in."""
    kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if kept == leaf.dtype or leaf.dtype.kind not in "iuf":
        return
    limits: Any = np.finfo(kept) if leaf.dtype.kind == "f" else np.iinfo(kept)
    if (beyond := (leaf < limits.min) | (leaf > limits.max)).any():
        cell = tuple(int(i) for i in np.argwhere(beyond)[0])
        raise ValueError(
            f"{name}: {label}[{', '.join(map(str, cell))}] is {leaf[cell]}, beyond what {kept} holds; give the column "
            "another unit"
        )


def labels(name: str, y: Any, *, count: int, what: str = "y", classes: int | None = None) -> Array:
    """Checks labels and gives them as int32 classes or float32 targets.

    Args:
      name: of the function that was called, for the message.
      y: one label a row: integers or booleans for classes, floats for targets.
      count: how many rows there are.
      what: name of the argument.
      classes: how many classes the model has outputs for; None where that is not known yet.

    Raises:
      ValueError: for another number of labels than rows, labels that are no numbers, NaN or infinite targets, negative
        classes, or, with `classes`, labels that are no integers below it. The message names the first of them.
    """
    if is_traced(y):
        return y if y.ndim and jnp.issubdtype(y.dtype, jnp.floating) else jnp.asarray(y, jnp.int32)
    given = np.asarray(y)
    if given.ndim == 0 or given.shape[0] != count:
        have = "a single value" if given.ndim == 0 else f"{given.shape[0]} labels"
        raise ValueError(f"{name}: {what} has {have} for {count} rows; give one label for each row")
    if given.dtype.kind in "OUS":
        first = next(iter(given.reshape(-1).tolist()), "")
        hint = (
            "leave out unlabelled rows: pass y=None and the labels that exist as known={row: label}"
            if any(value is None for value in given.reshape(-1).tolist())
            else f"number them: names, {what} = np.unique({what}, return_inverse=True)"
        )
        raise ValueError(f"{name}: {what} holds {_kind(given)} such as {first!r}; {hint}")
    if given.dtype.kind == "f" or jnp.issubdtype(given.dtype, jnp.floating):
        given = given.astype(np.float64)
        if not np.isfinite(given).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(given))[0])
            raise ValueError(
                f"{name}: {what}[{', '.join(map(str, place))}] is {given[place]}; leave out rows without a label"
            )
        if classes is not None and given.ndim == 1:
            wrong = int(np.argmax(given != np.round(given)))
            raise ValueError(
                f"{name}: {what}[{wrong}] is {given[wrong]}; with classes={classes} labels must be integers from 0 to "
                f"{classes - 1}"
            )
        return jnp.asarray(given, jnp.float32)
    if given.dtype.kind not in "iub":
        raise ValueError(f"{name}: {what} holds {given.dtype}; labels must be integers (classes) or floats (targets)")
    _check_range(name, given, what=what, classes=classes)
    return jnp.asarray(given, jnp.int32)


def _check_range(name: str, y: np.ndarray, *, what: str, classes: int | None) -> None:
    if y.ndim != 1 or y.size == 0:
        return
    limit = np.iinfo(np.int32).max if classes is None else classes
    wrong = (y < 0) | (y >= limit)
    if wrong.any():
        place = int(np.argmax(wrong))
        allowed = "0 upwards" if classes is None else f"0 to {classes - 1}"
        have = "" if classes is None else f", since the model has {classes} outputs"
        raise ValueError(
            f"{name}: {what}[{place}] is {y[place]}; classes must be numbered from {allowed}{have}. "
            f"Number them anew with np.unique({what}, return_inverse=True), or give the model more outputs"
        )


def in_range(name: str, y: Array | None, weight: Array, *, what: str, classes: int) -> None:
    """Checks that classes have an output each; traced labels, targets and rows of weight 0 pass.

    Raises:
      ValueError: naming the first label that the model has no output for.
    """
    if y is None or is_traced(y, weight) or not jnp.issubdtype(y.dtype, jnp.integer) or y.ndim != 1:
        return
    real = np.asarray(weight) > 0
    _check_range(name, np.where(real, np.asarray(y), 0), what=what, classes=classes)


def row_numbers(name: str, index: Any, *, count: int, what: str = "initial") -> Array:
    """Checks row numbers of a pool, -1 for none, and gives them as int32 `[i]`.

    Raises:
      ValueError: for numbers that are no integers, outside of the pool, or given twice.
    """
    if is_traced(index):
        return jnp.asarray(index, jnp.int32)
    given = np.asarray(index)
    if given.size == 0:
        return jnp.zeros(0, jnp.int32)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(f"{name}: {what} must be a list of row numbers, got {given.dtype} of shape {given.shape}")
    outside = (given < -1) | (given >= count)
    if outside.any():
        place = int(np.argmax(outside))
        raise ValueError(f"{name}: {what}[{place}] is {given[place]}; the pool has rows 0 to {count - 1}")
    seen, times = np.unique(given[given >= 0], return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{name}: {what} has row {seen[times > 1][0]} {times[times > 1][0]} times; give each row once")
    return jnp.asarray(given, jnp.int32)


def check_problem(problem: Problem, outputs: Callable[[], int]) -> None:
    """Checks that the labels of a problem are of one kind and have an output each; traced labels pass the second.

    Raises:
      ValueError: naming what differs.
    """
    given = [("problem.y", problem.y, problem.weight), ("problem.validation.y", *problem.validation[1:])]
    if problem.test is not None:
        given.append(("problem.test.y", *problem.test[1:]))
    if problem.initial_y is not None:
        given.append(("problem.initial_y", problem.initial_y, problem.initial >= 0))
    example = problem.validation.y
    for what, y, weight in given:
        if y is None:
            continue
        if is_classes(y) != is_classes(example) or y.shape[1:] != example.shape[1:]:
            raise ValueError(
                f"active_learner: {what} is {y.dtype} {list(y.shape)} and problem.validation.y {example.dtype} "
                f"{list(example.shape)}; labels must be of one kind"
            )
        if is_classes(y) and not is_traced(y, weight):
            in_range("active_learner", y, weight, what=what, classes=outputs())


def check_answer(answer: Answer, buffer: Array, decision: Decision, outputs: Callable[[], int]) -> Answer:
    """What a person hands to `tell`, as arrays; `buffer` are the labels held so far. Traced answers pass.

    Raises:
      ValueError: for answers of another number, kind or shape than asked for, NaN, or a class without an output.
    """
    if not isinstance(answer, Answer):
        raise ValueError(f"tell: answer must be ml.Answer(y=...), got {type(answer).__name__}")
    k = decision.index.shape[0]
    if is_traced(answer, decision):
        y = jnp.asarray(answer.y)
    else:
        asked = np.asarray(decision.valid)
        for name, value in (("weight", answer.weight), ("later", answer.later), ("cost", answer.cost)):
            if value is not None and (np.shape(value) != (k,) or not np.isfinite(np.asarray(value, np.float64)).all()):
                raise ValueError(f"tell: {name} must be {k} finite numbers, one for each row asked for, got {value}")
        if answer.weight is not None:
            asked = asked & (np.asarray(answer.weight) > 0)
        if answer.later is not None:
            asked = asked & ~np.asarray(answer.later, bool)
        given = np.asarray(answer.y)
        # What stands beside a missing answer means nothing.
        if given.shape[:1] == (k,) and given.dtype.kind in "iuf":
            given = np.where(asked.reshape((k,) + (1,) * (given.ndim - 1)), given, np.zeros((), given.dtype))
        y = labels("tell", given, count=k, classes=outputs() if is_classes(buffer) else None)
    if jnp.issubdtype(y.dtype, jnp.integer) and jnp.issubdtype(buffer.dtype, jnp.floating):
        y = y.astype(buffer.dtype)
    if y.dtype != buffer.dtype or y.shape != (k, *buffer.shape[1:]):
        raise ValueError(
            f"tell: y must be {buffer.dtype} {[k, *buffer.shape[1:]]}, one label for each row asked for, got {y.dtype} "
            f"{list(y.shape)}"
        )
    more = (None if field is None else jnp.asarray(field) for field in answer[1:])
    return Answer(y, *more)


def _kind(array: np.ndarray) -> str:
    return {"U": "strings", "S": "bytes", "O": "Python objects"}.get(array.dtype.kind, str(array.dtype))
