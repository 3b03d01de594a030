"""What policies are trained on: forms, embedded once, and problems whose classes are composed of a few of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from metaal_jax import tasks
from metaal_jax.base import Problem, PyTree
from metaal_jax.studies.arms import make_embed, make_model, standardised, without_head
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.options import above, numbers_of
from metaal_jax.studies.usage import UsageError
from strategies import main_config, main_network

MADE_OF = {
    "auto": "shapes, where the main job learns from such; else classes",
    "shapes": "shapes drawn from the source's images, as many examples of each as wanted",
    "classes": "the source's own classes and their images",
}


class Kind(NamedTuple):
    """A kind of problems.

    Attributes:
      ways: classes.
      pool: rows of the pool.
      batch: labels of a round.
      budget: labels of an episode.
    """

    ways: int
    pool: int
    batch: int
    budget: int

    def __str__(self) -> str:
        return f"{self.ways} classes, {self.pool} rows, {self.budget} labels by {self.batch}"


def kinds_of(text: str) -> tuple[Kind, ...]:
    """Kinds as they are written, `WAYS:POOL:BATCH:BUDGET` with commas between them; raises `UsageError`."""
    found = []
    for part in text.split(","):
        try:
            kind = Kind(*(int(number) for number in part.split(":")))
        except (TypeError, ValueError):
            raise UsageError(f"--kinds {text!r}: {part!r} must be four whole numbers, classes:rows:batch:labels, such "
                             "as 10:600:10:100") from None  # fmt: skip
        if min(kind) < 1 or kind.ways < 2:
            raise UsageError(f"--kinds {text!r}: {part!r} must have two classes or more and numbers above 0")
        if kind.budget > kind.pool or kind.budget % kind.batch:
            raise UsageError(f"--kinds {text!r}: the {kind.budget} labels of {part!r} must be whole batches, and no "
                             "more than the pool's rows")  # fmt: skip
        found.append(kind)
    if len(set(found)) < len(found):
        raise UsageError(f"--kinds {text!r} names one kind twice")
    return tuple(found)


def strengths_of(config: Any) -> list[float]:
    """The strengths of distortion."""
    return numbers_of("--strengths", config.strengths, of=float, allowed=above(0), like="0.6,1.2")


def main_job(config: Any) -> Any:
    """The config with the seed of the main job."""
    return dataclasses.replace(config, seed=config.meta_seed)


def embedded_forms(config: Any, setting: Any, folder: RunFolder) -> tuple[PyTree, PyTree, PyTree]:
    """The forms that problems are composed of, embedded: for training, validation and report.

    `ClassData` with leaves `[s, ...]`; `s` counts strengths of distortion, 1 for a source's own classes.
    """
    meta = main_network(main_job(config), setting, folder)
    model = make_model(setting.classes, setting.shape, main_config(config))
    meta = without_head(model, meta, jnp.zeros((1, *setting.shape), setting.train_source.x.dtype))
    embed = jax.jit(functools.partial(make_embed(model, 100), meta))
    found = []
    if config.made_of == "shapes" and not setting.can_hold_shapes():
        raise UsageError(f"--made-of shapes: they are square grey images, rows here have shape {setting.shape}; give "
                         "--made-of classes")  # fmt: skip
    if config.made_of == "shapes" or (config.made_of == "auto" and "shapes" in setting.kinds):
        held = setting.validation_source.x
        wanted = ((setting.train_source.x, config.forms), *[(held, config.validation_forms)] * 2)
        for part, (images, count) in enumerate(wanted):
            key = jax.random.fold_in(jax.random.key(config.seed), part)
            banks = [draw_forms(jax.random.fold_in(key, i), images, count, config.examples, strength, embed)
                     for i, strength in enumerate(tqdm(strengths_of(config), desc="drawing forms"))]  # fmt: skip
            found.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks))
        return found[0], found[1], found[2]
    held = setting.validation_source
    # Every other class is for validation; where they are too few, every other image of each.
    by_class = len(np.unique(held.y)) >= 2 * max(kind.ways for kind in kinds_of(config.kinds)) * config.parts
    turn = np.unique(held.y, return_inverse=True)[1] if by_class else np.argsort(np.argsort(held.y, kind="stable"))
    for rows, part in ((slice(None), setting.train_source), (turn % 2 == 0, held), (turn % 2 == 1, held)):
        x = part.x[rows]
        z = np.concatenate([np.asarray(embed(x[i : i + 5000])) for i in range(0, len(x), 5000)])
        found.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tasks.class_data(z, part.y[rows])))
    return found[0], found[1], found[2]


def draw_forms(
    key: jax.Array, images: np.ndarray, count: int, examples: int, strength: float, embed: Callable
) -> tasks.ClassData:
    """`count` shape classes at one strength of distortion, embedded; those that show nothing are left out."""
    draw = jax.jit(jax.vmap(tasks.shape_exemplars(
        examples=examples, size=images.shape[1], affine=strength, elastic=0.1 * strength)))  # fmt: skip
    at_once, found, held = 50, [], 0
    for turn in range(20 * (count // at_once + 1)):
        pick_key, draw_key = jax.random.split(jax.random.fold_in(key, turn))
        row = np.asarray(jax.random.randint(pick_key, (at_once,), 0, len(images)))
        x, ink = draw(jax.random.split(draw_key, at_once), images[row])
        shown = np.asarray((ink > 0.05) & (ink < 0.5))
        z = np.asarray(embed(x.reshape(-1, *x.shape[2:]))).reshape(at_once, examples, -1)
        found.append(z[shown])
        held += int(shown.sum())
        if held >= count:
            break
    else:
        raise UsageError("the source's images show too few shapes; give another --source")
    z = np.concatenate(found)[:count]
    return tasks.class_data(z.reshape(count * examples, -1), np.repeat(np.arange(count), examples))


def make_sampler(config: Any, kind: Kind) -> Callable[[jax.Array, PyTree], Problem]:
    """`(key, forms) -> Problem`, embedded rows that are standardised by the pool.

    There are fewer test rows than `config.test` where classes of one form each have no more.
    """

    def sample(key: jax.Array, forms: PyTree) -> Problem:
        room = kind.ways * forms.rows.shape[-1] - kind.pool - config.held_out
        if room < 1:
            raise ValueError(f"problems of {kind} leave no test rows: a form has {forms.rows.shape[-1]} examples; give "
                             "--kinds of fewer rows, or a smaller --held-out")  # fmt: skip
        composed = tasks.composed_problems(
            ways=kind.ways, parts=config.parts, pool=kind.pool, test=min(config.test, room), validation=config.held_out,
            imbalance=config.imbalance,
        )  # fmt: skip
        which_key, key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, forms.y.shape[0])
        problem = composed(key, jax.tree.map(lambda leaf: leaf[which], forms))
        return standardised(lambda x: x, problem)[0]

    return sample
