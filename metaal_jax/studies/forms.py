"""What policies are trained on: forms, embedded once, and problems whose classes are composed of a few of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from typing_extensions import Doc

from metaal_jax import tasks
from metaal_jax.base import Problem, PyTree
from metaal_jax.studies.arms import standardised
from metaal_jax.studies.options import above, at_least, choices, numbers_of
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.usage import UsageError, need

MADE_OF = {
    "auto": "shapes, where the main job learns from such; else classes",
    "shapes": "shapes drawn from the source's images, as many examples of each as wanted",
    "classes": "the source's own classes and their images",
}


@dataclass(frozen=True)
class Problems:
    """The problems that policies are trained and judged on."""

    kinds: str = "10:600:10:100,30:360:10:100,3:150:5:50,10:600:1:100"
    """Comma-separated kinds of problems: classes:rows of the pool:rows asked for in a round:labels of an episode."""
    parts: int = 3
    """Most forms of a class."""
    test: int = 400
    """Most test rows of a problem."""
    held_out: int = 100
    """Its validation rows, which imitation, regression and classification measure labels by."""


@dataclass(frozen=True)
class Material:
    """The forms that their classes are composed of."""

    imbalance: Annotated[float, at_least(1)] = 10.0
    """How many times rarer a problem's rarest class may be than its most frequent one."""
    made_of: Annotated[str, Doc(choices(MADE_OF))] = "auto"
    forms: int = 560
    """Shape classes for training, at each strength."""
    validation_forms: int = 140
    """Shape classes for validation, and as many others for the report, at each strength."""
    examples: int = 120
    """Examples of each."""
    strengths: str = "0.6,0.9,1.2,1.5,1.8"
    """Strengths of their distortion; a problem's forms share one."""


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


class Composition(NamedTuple):
    """How a problem of a kind is drawn.

    Attributes:
      kind: its size.
      parts: most forms of a class.
      test: most test rows.
      held_out: validation rows.
      imbalance: of its rarest class.
    """

    kind: Kind
    parts: int
    test: int
    held_out: int
    imbalance: float


class Forms(NamedTuple):
    """The forms, embedded: `ClassData` with leaves `[s, ...]`.

    `s` counts strengths of distortion, 1 for a source's own classes.
    """

    train: PyTree
    validation: PyTree
    report: PyTree


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


def compositions(problems: Problems, imbalance: float) -> tuple[Composition, ...]:
    """The problems of each kind, parsed; raises `UsageError`."""
    return tuple(Composition(kind, problems.parts, problems.test, problems.held_out, imbalance)
                 for kind in kinds_of(problems.kinds))  # fmt: skip


def strengths_of(text: str) -> list[float]:
    """The strengths of distortion; raises `UsageError`."""
    return numbers_of("--strengths", text, of=float, allowed=above(0), like="0.6,1.2")


def embedded_forms(
    setting: Setting,
    embed: Callable[[Any], Array],
    material: Material,
    composed: Sequence[Composition],
    *,
    seed: int,
) -> Forms:
    """The forms that problems are composed of.

    Args:
      setting: the source.
      embed: `x -> [n, d]`.
      material: what forms are made of.
      composed: the problems; the classes that they need decide how a source's own are divided.
      seed: decides shapes.

    Raises:
      UsageError: where shapes are asked for, and rows are no square grey images.
    """
    if material.made_of == "shapes" and not setting.can_hold_shapes():
        raise UsageError(f"--made-of shapes: they are square grey images, rows here have shape {setting.shape}; give "
                         "--made-of classes")  # fmt: skip
    if material.made_of == "shapes" or (material.made_of == "auto" and "shapes" in setting.kinds):
        return _shapes(setting, embed, material, seed)
    return _own_classes(setting, embed, most=max(one.kind.ways * one.parts for one in composed))


def _shapes(setting: Setting, embed: Callable[[Any], Array], material: Material, seed: int) -> Forms:
    tqdm = need("tqdm", extra="experiments").tqdm
    strengths = strengths_of(material.strengths)
    held = setting.validation_source.x
    wanted = ((setting.train_source.x, material.forms), *[(held, material.validation_forms)] * 2)
    found = []
    for part, (images, count) in enumerate(wanted):
        key = jax.random.fold_in(jax.random.key(seed), part)
        banks = [draw_forms(jax.random.fold_in(key, i), images, count, material.examples, strength, embed)
                 for i, strength in enumerate(tqdm(strengths, desc="drawing forms"))]  # fmt: skip
        found.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks))
    return Forms(*found)


def _own_classes(setting: Setting, embed: Callable[[Any], Array], *, most: int) -> Forms:
    """A source's classes; every other one held out is for validation, or where they are too few, every other image."""
    held = setting.validation_source
    by_class = len(np.unique(held.y)) >= 2 * most
    turn = np.unique(held.y, return_inverse=True)[1] if by_class else np.argsort(np.argsort(held.y, kind="stable"))
    found = []
    for rows, part in ((slice(None), setting.train_source), (turn % 2 == 0, held), (turn % 2 == 1, held)):
        x = part.x[rows]
        z = np.concatenate([np.asarray(embed(x[i : i + 5000])) for i in range(0, len(x), 5000)])
        found.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tasks.class_data(z, part.y[rows])))
    return Forms(*found)


def draw_forms(
    key: Array, images: np.ndarray[Any, Any], count: int, examples: int, strength: float, embed: Callable[[Any], Array]
) -> tasks.ClassData:
    """`count` shape classes at one strength of distortion, embedded; those that show nothing are left out."""
    draw = jax.jit(jax.vmap(tasks.shape_exemplars(
        examples=examples, size=images.shape[1], affine=strength, elastic=0.1 * strength)))  # fmt: skip
    at_once, held = 50, 0
    found: list[np.ndarray[Any, Any]] = []
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


def make_sampler(of: Composition) -> Callable[[Array, PyTree], Problem]:
    """`(key, forms) -> Problem`, embedded rows that are standardised by the pool.

    There are fewer test rows than asked for where classes of one form each have no more.
    """
    kind = of.kind

    def sample(key: Array, forms: PyTree) -> Problem:
        room = kind.ways * forms.rows.shape[-1] - kind.pool - of.held_out
        if room < 1:
            raise ValueError(f"problems of {kind} leave no test rows: a form has {forms.rows.shape[-1]} examples; give "
                             "--kinds of fewer rows, or a smaller --held-out")  # fmt: skip
        composed = tasks.composed_problems(
            ways=kind.ways, parts=of.parts, pool=kind.pool, test=min(of.test, room), validation=of.held_out,
            imbalance=of.imbalance,
        )  # fmt: skip
        which_key, key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, forms.y.shape[0])
        problem = composed(key, jax.tree.map(lambda leaf: leaf[which], forms))
        return standardised(lambda x: x, problem)[0]

    return sample
