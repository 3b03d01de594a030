"""The data of a run, checked and on the device, and the sizes that follow from them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax import data, tasks
from metaal_jax.base import Batch
from metaal_jax.names import find
from metaal_jax.studies.usage import UsageError, strategy_names

HELD_OUT = 300


class Setting:
    """The data of a run, checked and on the device, and the sizes that follow from them."""

    def __init__(self, config: Any):
        """Loads everything; raises `DataError` or `UsageError` before anything is computed."""
        target = functools.partial(data.load, config.target, data_dir=config.data_dir)
        self.shape = target("test", image_shape=_image_shape(config.target)).x.shape[1:]
        image_shape = self.shape if len(self.shape) == 3 else None
        target_train, target_test = (target(split, image_shape=image_shape) for split in ("train", "test"))
        source_train, source_test = (_source(config, split, image_shape) for split in ("train", "test"))
        if source_train.x.shape[1:] != self.shape:
            raise UsageError(
                f"source {config.source!r} has rows of shape {source_train.x.shape[1:]}, target {config.target!r} of "
                f"{self.shape}; give sets of one kind"
            )
        labels = np.unique(target_train.y)
        if config.source == config.target:
            if len(labels) < 4:
                raise UsageError(f"{config.target!r} has {len(labels)} classes, too few to split between source and "
                                 "target; give another --source")  # fmt: skip
            of_source, of_target = np.split(labels, [len(labels) // 2])
            source_train, source_test = (_only(part, of_source) for part in (source_train, source_test))
            target_train, target_test = (_only(part, of_target) for part in (target_train, target_test))
            labels = of_target
        self.classes = len(labels)
        self.pool = config.pool if config.pool is not None else min(5000, int(0.6 * len(target_train.y)))
        self.test = min(config.test, len(target_test.y))
        # Rows beside the pool, for strategies that choose by them; all arms then draw their pools in the same way.
        self.held_out = HELD_OUT if any(find(name).held_out for name in strategy_names(config.strategies)) else 0
        most = len(target_train.y) - self.held_out
        if not 1 <= self.pool <= most:
            beside = f" beside the {self.held_out} held out" if self.held_out else ""
            raise UsageError(f"a pool of {self.pool} rows wanted, {config.target!r} has {most} training rows{beside}; "
                             f"give --pool 1 to {most}")  # fmt: skip
        if config.budget > self.pool:
            raise UsageError(f"a budget of {config.budget} labels is larger than the pool of {self.pool} rows; "
                             f"give --budget {self.pool} or less")  # fmt: skip
        put = jax.device_put
        missing = np.setdiff1d(labels, target_test.y)
        if len(missing):
            raise UsageError(f"the test rows of {config.target!r} lack class {missing[0]}; give --target a set with "
                             "test rows of every class")  # fmt: skip
        self.problem_data = put(
            tasks.ProblemData(
                *(tasks.class_data(part.x, part.y, classes=labels) for part in (target_train, target_test))
            )
        )
        test = self.problem_data.test
        self.full_test = Batch(x=test.x, y=test.y, weight=jnp.ones(test.y.shape[0]))
        self.train_source, self.validation_source = source_train, source_test
        self.kinds = self.task_kinds(config)

    def task_kinds(self, config: Any) -> tuple[str, ...]:
        """The kinds of tasks that `--tasks` asks for, `classes` and `shapes`."""
        if config.tasks != "auto":
            kinds = ("classes", "shapes") if config.tasks == "both" else (config.tasks,)
        elif config.source == config.target or not self.can_hold_shapes():
            kinds = ("classes",)
        elif config.source.startswith("omniglot"):
            kinds = ("classes", "shapes")
        else:
            stored = data.load(config.source, "test", data_dir=config.data_dir).x.shape[1:]
            natural = len(stored) == 3 and stored[2] == 3 and min(stored[:2]) >= 32
            kinds = ("shapes",) if natural else ("classes",)
        if "shapes" in kinds and not self.can_hold_shapes():
            raise UsageError(f"shape tasks are square grey images, rows here have shape {self.shape}; give --tasks "
                             "classes")  # fmt: skip
        return kinds

    def can_hold_shapes(self) -> bool:
        """Whether rows are square grey images."""
        return len(self.shape) == 3 and self.shape[0] == self.shape[1] and self.shape[2] == 1


def _image_shape(name: str) -> tuple[int, int, int] | None:
    return (28, 28, 1) if name.startswith("omniglot") else None


def _source(config: Any, split: str, image_shape: tuple[int, int, int] | None) -> data.Arrays:
    return data.load(config.source, split, image_shape=image_shape, data_dir=config.data_dir)


def _only(arrays: data.Arrays, classes: np.ndarray) -> data.Arrays:
    keep = np.isin(arrays.y, classes)
    return arrays._replace(x=arrays.x[keep], y=arrays.y[keep])
