"""The few-shot benchmark's data: sets in classes for training, validation and test, and what fits into their tasks."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metaal_jax import data, tasks
from metaal_jax.studies.few_shot_presets import ANY_WAYS, Preset
from metaal_jax.studies.options import above, numbers_of
from metaal_jax.studies.usage import UsageError

# Bertinetto et al.'s split of CIFAR-100, by the classes' numbers (beaver, beetle, ...; baby, bed, ...).
CIFAR_FS = {
    "validation": [4, 7, 14, 15, 19, 26, 27, 32, 40, 47, 48, 55, 71, 73, 87, 89],
    "test": [2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99],
}
SHAPES = {"omniglot": (28, 28, 1), "cifar_fs": (32, 32, 3)}


@dataclass(frozen=True)
class Benchmark:
    """Sets and tasks."""

    train: str = "omniglot"
    """Comma-separated sources: omniglot, cifar_fs (their training classes) or TFDS image sets (all their classes)."""
    weights: str | None = None
    """Comma-separated weights with which tasks are drawn from the sources; by default even ones."""
    test: str | None = None
    """What to test on: omniglot, cifar_fs (their test classes) or a TFDS image set; by default the first source."""
    ways: int = 5
    """Classes of a test task."""
    shots: int = 1
    """Labelled rows of each class."""
    queries: int = 15
    """Test rows of each class."""
    test_tasks: int = 600
    """Test tasks."""
    validation_tasks: int = 200
    """Validation tasks after each twentieth of the training."""


class Sources(NamedTuple):
    """Names of the sets that tasks are drawn from, their weights, and the name of what is tested on."""

    names: tuple[str, ...]
    weights: list[float]
    target: str


class Parts(NamedTuple):
    """The classes of a set for training, validation and test, and whether rotations count as classes in training."""

    train: tasks.ClassData
    validation: tasks.ClassData
    test: tasks.ClassData
    rotations: bool


class TaskData(NamedTuple):
    """What tasks are drawn from, checked.

    Attributes:
      parts: of every source.
      test: the target's test classes.
      ways, shots: of a meta-training task.
      classes: that the network tells apart in training.
    """

    parts: tuple[Parts, ...]
    test: tasks.ClassData
    ways: int
    shots: int
    classes: int


def sources_of(benchmark: Benchmark, learner: str) -> Sources:
    """The sets by name; raises `UsageError` for those that do not go together."""
    sources = tuple(part.strip() for part in benchmark.train.split(",") if part.strip())
    if not sources or len(set(sources)) < len(sources):
        raise UsageError(f"--train {benchmark.train!r} is empty or repeats a set")
    weights = [1.0] * len(sources)
    if benchmark.weights is not None:
        weights = numbers_of("--weights", benchmark.weights, of=float, allowed=above(0), like="3,1")
    if len(weights) != len(sources):
        raise UsageError(f"--weights {benchmark.weights!r}: {len(sources)} sources need as many weights above 0")
    target = benchmark.test or sources[0]
    same = [{"cifar_fs": "cifar100"}.get(name, name) for name in {*sources, target}]
    if len(set(same)) < len(same):
        raise UsageError("cifar_fs is cifar100: one would be trained on what the other is tested on; give one")
    if learner == "supervised" and len(sources) > 1:
        raise UsageError("--learner supervised trains on the classes of a single source; give one in --train")
    return Sources(sources, weights, target)


@functools.cache
def load_parts(name: str, shape: tuple[int, int, int] | None, data_dir: str | None) -> Parts:
    """The parts of a set by name; a plain set has all classes in each, 4/5 and 1/5 of its training rows in two."""
    read = functools.partial(data.load, image_shape=shape, data_dir=data_dir)
    if name not in SHAPES:
        train, test = read(name, "train"), read(name, "test")
        order = np.random.default_rng(0).permutation(len(train.y))
        parts = map(np.sort, np.split(order, [len(order) * 4 // 5]))
        own, validation = (tasks.class_data(train.x[rows], train.y[rows]) for rows in parts)
        return Parts(own, validation, tasks.class_data(test.x, test.y), rotations=False)
    both = [read({"cifar_fs": "cifar100"}.get(name, name), split) for split in ("train", "test")]
    x, y = np.concatenate([part.x for part in both]), np.concatenate([part.y for part in both])
    groups: list[Any]
    if name == "omniglot":
        groups = list(tasks.split_classes(1623, (1100, 100, 423)))
    else:
        held = [np.array(CIFAR_FS[part]) for part in ("validation", "test")]
        groups = [np.setdiff1d(np.arange(100), np.concatenate(held)), *held]
    own, validation, other = (tasks.class_data(x, y, classes=group) for group in groups)
    return Parts(own, validation, other, rotations=name == "omniglot")


def load_tasks(
    benchmark: Benchmark, sources: Sources, learner: str, preset: Preset, *, data_dir: str | None
) -> TaskData:
    """Loads everything.

    Raises:
      DataError, UsageError: for sets that are not there, rows of several shapes, and tasks that a set is too small for.
    """
    if learner not in ANY_WAYS and preset.train_ways not in (None, benchmark.ways):
        raise UsageError(f"--train-ways {preset.train_ways}: the head of {learner} is meta-learned for as many "
                         f"classes as test tasks have; leave it out or give --ways {preset.train_ways}")  # fmt: skip
    every = (*sources.names, sources.target)
    shape = next((SHAPES[name] for name in every[-1:] + every if name in SHAPES), None)
    *parts, target = (load_parts(name, shape, data_dir) for name in every)
    shapes = {name: part.test.x.shape[1:] for name, part in zip(every, (*parts, target), strict=True)}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"rows of one shape wanted, got {shapes}; give sets of one kind, or omniglot or cifar_fs "
                         "among them, whose shape all others then take")  # fmt: skip
    ways = benchmark.ways if preset.train_ways is None else preset.train_ways
    shots = benchmark.shots if preset.train_shots is None else preset.train_shots
    supervised = learner == "supervised"
    available = [part.train.count.shape[0] * (4 if part.rotations else 1) for part in parts]
    held = min(part.validation.count.shape[0] for part in parts)
    tested = target.test.count.shape[0]
    if not supervised and ways > min(available):
        raise UsageError(f"meta-training tasks of {ways} ways wanted, a source has {min(available)} classes; give "
                         f"--train-ways {min(available)} or less")  # fmt: skip
    if benchmark.ways > min(held, tested):
        raise UsageError(f"--ways {benchmark.ways} wanted, {sources.target!r} has {tested} test classes and a source "
                         f"{held} for validation; give --ways {min(held, tested)} or less")  # fmt: skip
    held_rows = [part.validation.rows.shape[1] for part in parts] + [target.test.rows.shape[1]]
    train_rows = [part.train.rows.shape[1] for part in parts]
    for needed, have, options in (
        (benchmark.shots + benchmark.queries, min(held_rows), "--shots or --queries"),
        (0 if supervised else shots + preset.train_queries, min(train_rows), "--train-shots"),
    ):
        if needed > have:
            raise UsageError(f"tasks of {needed} rows a class wanted, the largest class of a set has {have}; give "
                             f"fewer {options}")  # fmt: skip
    return TaskData(tuple(parts), target.test, ways, shots, available[0] if supervised else ways)
