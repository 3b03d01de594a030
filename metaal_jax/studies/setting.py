"""The data of a run, checked and on the device, and the sizes that follow from them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax import data, tasks
from metaal_jax.base import Batch
from metaal_jax.studies.groups import Run, Sizes, Transfer
from metaal_jax.studies.usage import UsageError

HELD_OUT = 300  # rows beside the pool, where a strategy chooses by them; all arms then draw their pools in one way


class Setting(NamedTuple):
    """The data of a run, checked and on the device, and the sizes that follow from them.

    Attributes:
      source, target: names of the data sets.
      shape: of a row.
      classes: of the target.
      pool, test, held_out: rows of a problem's pool, its test rows, and rows beside the pool for strategies that choose
        by them.
      problem_data: what problems are drawn from.
      full_test: all test rows of the target.
      train_source, validation_source: the source's splits, on the host.
      kinds: of tasks that the source is made into, `classes` and `shapes`.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    classes: int
    pool: int
    test: int
    held_out: int
    problem_data: tasks.ProblemData
    full_test: Batch
    train_source: data.Arrays
    validation_source: data.Arrays
    kinds: tuple[str, ...]

    def can_hold_shapes(self) -> bool:
        """Whether rows are square grey images."""
        return _can_hold_shapes(self.shape)

    def row(self) -> jax.Array:
        """A row of zeros, `[1, ...]`, to initialise a network with."""
        return jnp.zeros((1, *self.shape), self.train_source.x.dtype)


def load_setting(
    transfer: Transfer, *, run: Run, sizes: Sizes = Sizes(), tasks_of: str = "auto", held_out: int = 0
) -> Setting:
    """Loads everything.

    Args:
      transfer: source and target.
      run: says where prepared sets are.
      sizes: budget, pool and test rows.
      tasks_of: what meta-training tasks are made of, see `MetaTraining.tasks`.
      held_out: rows beside the pool.

    Raises:
      DataError, UsageError: before anything is computed.
    """
    read = functools.partial(data.load, data_dir=run.data_dir)
    first = read(transfer.target, "test", image_shape=_image_shape(transfer.target)).x
    shape: tuple[int, ...] = first.shape[1:]
    image_shape = (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
    target_train, target_test, source_train, source_test = (
        read(name, split, image_shape=image_shape)
        for name in (transfer.target, transfer.source)
        for split in ("train", "test")
    )
    if source_train.x.shape[1:] != shape:
        raise UsageError(
            f"source {transfer.source!r} has rows of shape {source_train.x.shape[1:]}, target {transfer.target!r} of "
            f"{shape}; give sets of one kind"
        )
    labels = np.unique(target_train.y)
    if transfer.source == transfer.target:
        if len(labels) < 4:
            raise UsageError(f"{transfer.target!r} has {len(labels)} classes, too few to split between source and "
                             "target; give another --source")  # fmt: skip
        of_source, of_target = np.split(labels, [len(labels) // 2])
        source_train, source_test = (_only(part, of_source) for part in (source_train, source_test))
        target_train, target_test = (_only(part, of_target) for part in (target_train, target_test))
        labels = of_target
    pool = sizes.pool if sizes.pool is not None else min(5000, int(0.6 * len(target_train.y)))
    most = len(target_train.y) - held_out
    if not 1 <= pool <= most:
        beside = f" beside the {held_out} held out" if held_out else ""
        raise UsageError(f"a pool of {pool} rows wanted, {transfer.target!r} has {most} training rows{beside}; "
                         f"give --pool 1 to {most}")  # fmt: skip
    if sizes.budget > pool:
        raise UsageError(f"a budget of {sizes.budget} labels is larger than the pool of {pool} rows; "
                         f"give --budget {pool} or less")  # fmt: skip
    missing = np.setdiff1d(labels, target_test.y)
    if len(missing):
        raise UsageError(f"the test rows of {transfer.target!r} lack class {missing[0]}; give --target a set with "
                         "test rows of every class")  # fmt: skip
    rows = jax.device_put(
        tasks.ProblemData(*(tasks.class_data(part.x, part.y, classes=labels) for part in (target_train, target_test)))
    )
    return Setting(
        source=transfer.source,
        target=transfer.target,
        shape=shape,
        classes=len(labels),
        pool=pool,
        test=min(sizes.test, len(target_test.y)),
        held_out=held_out,
        problem_data=rows,
        full_test=Batch(x=rows.test.x, y=rows.test.y, weight=jnp.ones(rows.test.y.shape[0])),
        train_source=source_train,
        validation_source=source_test,
        kinds=_task_kinds(transfer, tasks_of, shape, run.data_dir),
    )


def _task_kinds(transfer: Transfer, tasks_of: str, shape: tuple[int, ...], data_dir: str | None) -> tuple[str, ...]:
    can_hold_shapes = _can_hold_shapes(shape)
    kinds: tuple[str, ...]
    if tasks_of != "auto":
        kinds = ("classes", "shapes") if tasks_of == "both" else (tasks_of,)
    elif transfer.source == transfer.target or not can_hold_shapes:
        kinds = ("classes",)
    elif transfer.source.startswith("omniglot"):
        kinds = ("classes", "shapes")
    else:
        stored = data.load(transfer.source, "test", data_dir=data_dir).x.shape[1:]
        natural = len(stored) == 3 and stored[2] == 3 and min(stored[:2]) >= 32
        kinds = ("shapes",) if natural else ("classes",)
    if "shapes" in kinds and not can_hold_shapes:
        raise UsageError(f"shape tasks are square grey images, rows here have shape {shape}; give --tasks classes")
    return kinds


def _can_hold_shapes(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] == shape[1] and shape[2] == 1


def _image_shape(name: str) -> tuple[int, int, int] | None:
    return (28, 28, 1) if name.startswith("omniglot") else None


def _only(arrays: data.Arrays, classes: np.ndarray[Any, Any]) -> data.Arrays:
    keep = np.isin(arrays.y, classes)
    return arrays._replace(x=arrays.x[keep], y=arrays.y[keep])
