"""Targets of many kinds: a set, or the classes of one group of it, as problems for active learning."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax import data, tasks
from metaal_jax.base import Problem
from metaal_jax.data.local import SPLITS
from metaal_jax.names import Strategy
from metaal_jax.studies.arms import standardised
from metaal_jax.studies.cells import Cell, Drawn, Layer, Place, Program, Work, check_work, seed_keys
from metaal_jax.studies.usage import UsageError, need


class Target(NamedTuple):
    """A target as it is named, `SET` or `SET:LABEL=NUMBER`: the classes of one group of a set.

    Attributes:
      name: as it was given.
      base: the set.
      label, number: the group; the label is empty for the whole set.
      table: whether its rows are columns of a table, and no images.
    """

    name: str
    base: str
    label: str
    number: int
    table: bool


class Sizes(NamedTuple):
    """How large the problems of a target are, by its rows alone."""

    pool: int
    test: int
    budget: int
    batch: int


def find_targets(text: str, data_dir: str | None) -> list[Target]:
    """Comma-separated targets, parsed; which are tables is looked up.

    Raises:
      UsageError: for one in another form, one named twice, or none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--targets {text!r} is empty or names one twice")
    found = []
    for name in names:
        base, _, group = name.partition(":")
        label, _, number = group.partition("=")
        if group and not number.isdigit():
            raise UsageError(f"--targets: {name!r} must be SET or SET:LABEL=NUMBER, such as omniglot:alphabet=5")
        may_be = base in data.TABLES or base.endswith(".npz")
        table = may_be and len(data.load(base, "test", data_dir=data_dir).x.shape) == 2
        found.append(Target(name, base, label, int(number or 0), table))
    return found


def load_target(target: Target, shape: tuple[int, int, int] | None, data_dir: str | None) -> data.Arrays:
    """All rows of a target, of both splits, its classes numbered from 0; images of a shape, tables without one."""
    read = functools.partial(data.load, target.base, data_dir=data_dir, image_shape=None if target.table else shape)
    parts = []
    for split in SPLITS:
        arrays = read(split)
        keep = read(split, label=target.label).y == target.number if target.label else np.ones(len(arrays.y), bool)
        parts.append((arrays.x[keep], arrays.y[keep]))
    x, y = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    if len(np.unique(y)) < 2:
        raise UsageError(f"--targets: {target.name!r} has {len(np.unique(y))} classes; give another NUMBER")
    classes, y = np.unique(y, return_inverse=True)
    return data.Arrays(x, y.astype(np.int32), len(classes))


def sizes_of(rows: int) -> Sizes:
    """Two fifths for the test, at most 1,000; the rest is the pool, at most 2,000; ten rounds."""
    test = min(2 * rows // 5, 1000)
    pool = min(rows - test, 2000)
    budget = 100 if pool >= 400 else 50
    if budget > pool:
        raise UsageError(f"a target of {rows} rows is too small: {budget} labels are asked for; give another --targets")
    return Sizes(pool, test, budget, budget // 10)


def target_problems(
    targets: Mapping[str, data.Arrays], embed: Callable[[Any], Any] | None, *, seed: int, seeds: int
) -> dict[Place, Drawn]:
    """Every seed's problem of every target, embedded, by `(kind of embedding, target)`.

    Args:
      targets: their rows, by name.
      embed: `images -> [n, d]`; tables are taken as their columns, standardised over all rows.
      seed: decides the problems.
      seeds: problems of each.
    """
    tqdm = need("tqdm", extra="experiments").tqdm
    keys = seed_keys(seed, 1, seeds)
    found = {}
    for name, arrays in tqdm(targets.items(), desc="embedding"):
        if embed is None or arrays.x.ndim == 2:
            z = (arrays.x - arrays.x.mean(0)) / np.maximum(arrays.x.std(0), 1e-6)
        else:
            z = np.concatenate([np.asarray(embed(arrays.x[i : i + 1000])) for i in range(0, len(arrays.x), 1000)])
        sizes = sizes_of(len(arrays.y))
        sampler = tasks.composed_problems(ways=arrays.classes, parts=1, pool=sizes.pool, test=sizes.test)
        rows = jax.device_put(tasks.class_data(z.astype(np.float32), arrays.y))

        @jax.jit
        @jax.vmap
        def draw(key: Array, sampler: Any = sampler, rows: Any = rows) -> Problem:
            return standardised(lambda x: x, sampler(key, rows))[0]

        found["columns" if arrays.x.ndim == 2 else "meta", name] = Drawn(draw(keys), jnp.float32(0.0))
    return found


def check_targets(targets: Mapping[str, data.Arrays], chosen: Mapping[str, Strategy], layer: Layer) -> None:
    """Makes every run on every target once, see `check_work`; raises a `UsageError` for what cannot be made."""
    sizes = {name: sizes_of(len(arrays.y)) for name, arrays in targets.items()}
    check_work([Work(arrays.classes, Program(strategy, sizes[name].batch, sizes[name].budget), ())
                for name, arrays in targets.items() for strategy in chosen], chosen, layer)  # fmt: skip


def target_work(strategies: list[str], targets: Mapping[str, data.Arrays], places: Mapping[Place, Drawn]) -> list[Work]:
    """The programs, in this order of strategies; targets of one shape share theirs."""
    groups: dict[Any, list[Place]] = {}
    for place, drawn in places.items():
        arrays = targets[place[1]]
        shape = (arrays.classes, sizes_of(len(arrays.y)), drawn.problems.x.shape)
        groups.setdefault(shape, []).append(place)
    return [
        Work(classes, Program(name, size.batch, size.budget),
             tuple(Cell(*place, size.batch, name) for place in group))
        for name in strategies for (classes, size, _), group in groups.items()
    ]  # fmt: skip
