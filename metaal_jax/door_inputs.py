"""What people hand in at the doors, checked and turned into what the library takes."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from numpy.typing import ArrayLike

from metaal_jax import inputs, learners, models, names
from metaal_jax.base import Learner, Policy, PyTree

Labels = Mapping[int, Hashable] | Sequence[Hashable | None] | np.ndarray
# What each door has for a strategy at most, of `names.NEEDS`.
SUGGESTS = frozenset(("logits", "embedding", "committee", "x", "labels", "learner", "refit", "loss_learner", "classes",
                      "rounds"))  # fmt: skip
HAS = {
    "suggest": SUGGESTS,
    "pick": frozenset(("logits", "embedding", "committee", "labels", "classes", "rounds")),
    "compare": SUGGESTS | {"truth"},
}
# A name of `names.LEARNERS`, the file of a meta-trained learner, that learner, or `(classes) -> Learner`.
LearnerLike = str | learners.Trained | Callable[[int], Learner]


class Memory(NamedTuple):
    """What `suggest` and `pick` give to the next call.

    Attributes:
      classes: the labels in the order of their numbers.
      rows: the rows that had labels, in the order of labelling.
      policy: what the strategy remembers, or its leaves; `()` for one that does not.
    """

    classes: tuple[Hashable, ...]
    rows: tuple[int, ...]
    policy: PyTree


class Parts(NamedTuple):
    """What names stand for.

    Attributes:
      learner: the base learner.
      policy: the strategy's.
      meta: its meta-parameters where it has been trained, to be passed to programs; None where its `init` makes them.
    """

    learner: Learner
    policy: Policy
    meta: PyTree


def parts_of(
    learner: LearnerLike, strategy: str, *, k: int, classes: int, members: int = 20, rounds: int | None = None
) -> Parts:
    """Learner and policy for a number of classes; raises `ValueError` as `names.strategy` does."""
    quick = meta = None
    if isinstance(learner, learners.Trained):
        base, meta = learner.learner(classes), learner.start(classes)
    else:
        base = names.learner(learner, classes=classes) if isinstance(learner, str) else learner(classes)
        quick = learners.linear(classes, steps=16) if learner == "linear" else None
    policy = names.strategy(
        strategy,
        k=k,
        rounds=rounds,
        classes=classes,
        learner=base,
        refit=quick or base,
        loss_learner=loss_learner(classes),
        posterior=names.posterior(base, members=members),
    )
    return Parts(base, policy, meta)


def loss_learner(classes: int) -> Learner:
    """A network of two hidden layers that learns to foresee its loss, for the rule `predicted_loss`."""
    return learners.loss_predictor(models.MLP(classes), optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=60)


def scaled(name: str, x: ArrayLike, scale: str) -> np.ndarray:
    """Rows as float32, `"columns"`, `"common"` or not at all brought to mean 0 and variance 1; see `suggest`.

    Raises:
      ValueError: in the name of who asks, for rows that are no finite numbers or an unknown scale.
    """
    if scale not in ("columns", "common", "none"):
        raise ValueError(f"{name}: scale must be 'columns', 'common' or 'none', got {scale!r}")
    rows = np.asarray(inputs.rows(name, on_host(x)), np.float64)
    if rows.ndim < 2:
        raise ValueError(f"{name}: x must be rows [n, d], got shape {list(rows.shape)}; one column is x[:, None]")
    if scale == "none":
        return rows.astype(np.float32)
    rows = rows - rows.mean(0)
    spread = rows.std(0) if scale == "columns" else np.full(rows.shape[1:], rows.std())
    # A column that never changes is 0, whatever rounding has left of it.
    still = spread <= 1e-12 * np.abs(np.asarray(on_host(x), np.float64)).max(0)
    return np.where(still, 0.0, rows / np.where(still, 1.0, spread)).astype(np.float32)


def doors_of(name: str) -> tuple[str, ...]:
    """The doors that can have a strategy, given all that they may be given."""
    found = []
    for door, has in HAS.items():
        with contextlib.suppress(ValueError):
            strategy_of(door, name, has)
            found.append(door)
    return tuple(found)


def strategy_of(door: str, name: str, given: Set[str]) -> names.Strategy:
    """The strategy, or the reason why the door cannot have it."""
    found = names.find(name)
    if door != "pick" and found.labels == "targets":
        raise ValueError(f"{door}: {name} is for targets that are numbers, and labels here are classes; give "
                         f"strategy={names.DEFAULT!r}, or names.strategy({name!r}) to active_learner")  # fmt: skip
    for need in found.needs:
        if need in given:
            continue
        way = f"give {need}=" if door == "pick" and need in ("logits", "embedding") else {
            "rounds": "give rounds=",
            "classes": "give classes=",
            "committee": "give logits of shape [m, n, c]",
            "labels": "give labelled={row: class number}",
            "truth": "run it with compare or active_learner",
        }.get(need, "use suggest, or names.strategy with active_learner")  # fmt: skip
        raise ValueError(f"{door}: {name} needs {names.NEEDS[need]}: {way}")
    return found


def learner_of(door: str, learner: LearnerLike) -> Any:
    """A name, a meta-trained learner or a function; files are loaded."""
    if isinstance(learner, str) and learner not in names.LEARNERS:
        place = Path(learner)
        if not place.is_file():
            raise ValueError(f"{door}: " + names.unknown("learner", learner, names.LEARNERS) + ", or give the path of "
                             "one that learners.save wrote")  # fmt: skip
        return _loaded(learner, place.stat().st_mtime)
    if isinstance(learner, str | learners.Trained) or (callable(learner) and not isinstance(learner, Learner)):
        return learner
    raise ValueError(f"{door}: learner must be one of {', '.join(names.LEARNERS)}, what meta_train gave, its file, or "
                     f"a function (classes) -> Learner, got a {type(learner).__name__}")  # fmt: skip


def known_labels(door: str, labels: Labels | None, n: int, state: Memory | None) -> dict[int, Hashable]:
    """Labels by row, checked, in the order of labelling."""
    if labels is None:
        given: dict[Any, Any] = {}
    elif isinstance(labels, Mapping):
        given = dict(labels)
    else:
        entries = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
        if len(entries) != n:
            raise ValueError(f"{door}: labels has {len(entries)} entries for {n} rows; give one for each row, None "
                             "where there is no label, or {row: label}")  # fmt: skip
        given = dict(enumerate(entries))
    known = {}
    for row, label in given.items():
        if isinstance(row, bool) or not isinstance(row, int | np.integer) or not 0 <= row < n:
            raise ValueError(f"{door}: labels has row {row!r}; the pool has rows 0 to {n - 1}")
        if label is None:
            continue
        label = label.item() if isinstance(label, np.generic) else label
        if label != label:
            raise ValueError(f"{door}: the label of row {row} is {label!r}; use None for no label")
        try:
            hash(label)
        except TypeError:
            raise ValueError(f"{door}: the label of row {row} is a {type(label).__name__}, which cannot be hashed; "
                             "give a string, a number or a tuple") from None  # fmt: skip
        known[int(row)] = label
    first = [row for row in (() if state is None else state.rows) if row in known]
    return {row: known[row] for row in [*first, *[row for row in known if row not in set(first)]]}


def classes_of(door: str, known: Mapping[int, Hashable], state: Memory | None) -> tuple[Hashable, ...]:
    """Labels in the order of their numbers: those of the state, then new ones, sorted where they can be."""
    before = () if state is None else state.classes
    new = list(dict.fromkeys(label for label in known.values() if label not in before))
    try:
        new = sorted(new)  # type: ignore[type-var]
    except TypeError:
        new = sorted(new, key=lambda label: (type(label).__name__, str(label)))
    return (*before, *new)


def class_numbers(door: str, y: Any, n: int) -> tuple[tuple[Hashable, ...], np.ndarray]:
    """The labels in the order of their numbers, and the number of each row's, int32 `[n]`; every row must have one."""
    known = known_labels(door, y if isinstance(y, Mapping) else list(np.asarray(y, object)), n, None)
    missing = next((row for row in range(n) if row not in known), None)
    if missing is not None:
        raise ValueError(f"{door}: row {missing} has no label; leave out rows without one")
    classes = classes_of(door, known, None)
    if len(classes) < 2:
        raise ValueError(f"{door}: all rows have the label {classes[0]!r}; there is nothing to learn")
    place = {label: number for number, label in enumerate(classes)}
    return classes, np.asarray([place[known[row]] for row in range(n)], np.int32)


def check_count(door: str, k: object) -> None:
    """Raises `ValueError` unless `k` is a positive integer."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{door}: k must be a positive integer, got {k!r}")


def on_host(x: Any) -> Any:
    """Tensors of PyTorch as NumPy arrays, wherever they are; other things as they are."""
    if hasattr(x, "detach") and hasattr(x, "cpu"):
        return x.detach().cpu().numpy()
    if hasattr(x, "toarray"):
        raise ValueError(f"x is sparse ({type(x).__name__}); give x.toarray(), or fewer columns, such as "
                         "sklearn.decomposition.TruncatedSVD(200).fit_transform(x)")  # fmt: skip
    return x


def array_of(what: str, value: Any, dimensions: tuple[int, ...]) -> np.ndarray | None:
    """What `pick` is given as float32, checked; None where it is not given."""
    if value is None:
        return None
    array = np.asarray(inputs.rows("pick", np.asarray(on_host(value)), what=what), np.float32)
    if array.ndim not in dimensions:
        shapes = {"logits": "[n, c] or [m, n, c]", "embedding": "[n, d]"}
        raise ValueError(f"pick: {what} must be {shapes[what]}, got shape {list(array.shape)}")
    return array


@functools.lru_cache(maxsize=8)
def _loaded(path: str, changed: float) -> learners.Trained:
    """The learner of a file, one and the same for as long as the file does not change."""
    del changed
    return learners.load(path)
