"""The few-shot benchmark's learners by name, the settings of their presets, and the papers' figures beside them."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flax.linen as nn
import optax

from metaal_jax import learners, models
from metaal_jax.base import Learner
from metaal_jax.studies.options import at_least
from metaal_jax.studies.usage import UsageError, names

LEARNERS = {
    "maml": "MAML, second order",
    "fomaml": "first-order MAML",
    "anil": "MAML that adapts the last layer alone",
    "meta_sgd": "MAML with a learned step size for every parameter",
    "maml_plus_plus": "MAML with a multi-step loss, learned step sizes and norm layers per step",
    "reptile": "Reptile",
    "implicit_maml": "MAML with implicit gradients",
    "protonet": "prototypical networks",
    "r2d2": "ridge regression on a meta-learned embedding",
    "metaoptnet": "a support vector machine on a meta-learned embedding",
    "supervised": "plain training on all source classes, then ridge regression on its embedding",
}


@dataclass(frozen=True)
class Preset:
    """The settings of one learner; a task of meta-training may have other ways and shots than one of the test."""

    network: Literal["conv4", "resnet12"] = "conv4"
    filters: int = 32
    downsample: Literal["stride", "pool"] = "stride"
    norm: Literal["batch", "group", "none"] = "batch"
    statistics: Literal["batch", "support"] = "batch"
    train_ways: int | None = None
    train_shots: int | None = None
    train_queries: int = 5
    steps: int = 30000
    tasks: int = 8
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 3e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    inner_rate: float = 0.4
    inner_steps: int = 1
    eval_steps: int = 3
    minibatch: int | None = None
    proximal: float = 2.0
    solver_steps: int = 5
    damping: float = 0.0
    scale: float = 1.0
    ridge: float = 1.0


@dataclass(frozen=True)
class Instead:
    """What is other than in the preset."""

    filters: int | None = None
    """Channels of the network's blocks."""
    norm: Literal["batch", "group", "none"] | None = None
    """Norm layers."""
    statistics: Literal["batch", "support"] | None = None
    """What batch norm normalises query rows by in meta-training."""
    train_ways: int | None = None
    """Classes of a meta-training task."""
    train_shots: int | None = None
    """Labelled rows of each class in meta-training."""
    steps: int | None = None
    """Outer steps."""
    tasks: int | None = None
    """Tasks of an outer step."""
    rate: float | None = None
    """Outer learning rate."""
    inner_rate: float | None = None
    """Inner learning rate."""
    inner_steps: Annotated[int | None, at_least(0)] = None
    """Inner steps in meta-training."""
    proximal: float | None = None
    """Pull to the initialisation of implicit_maml."""
    damping: float | None = None
    """What implicit_maml adds to the Hessian when it solves for the gradient."""
    eval_steps: Annotated[int | None, at_least(0)] = None
    """Inner steps on test tasks."""


PIECES = 20  # of the training; a validation after each
SECOND_ORDER = Preset()
CLOSED = Preset(train_ways=20, norm="group", tasks=2, inner_steps=0, eval_steps=0)
SCALED = dataclasses.replace(CLOSED, scale=8.0)  # regressions and margins are about 1, the cross entropy wants more

BUDGET: dict[str, Preset] = {
    "maml": SECOND_ORDER,
    "fomaml": dataclasses.replace(SECOND_ORDER, inner_rate=0.1, inner_steps=5, eval_steps=10, steps=12000),
    "anil": dataclasses.replace(SECOND_ORDER, inner_rate=0.1, inner_steps=5, eval_steps=5, steps=15000),
    "meta_sgd": dataclasses.replace(SECOND_ORDER, eval_steps=1, steps=15000),
    "maml_plus_plus": dataclasses.replace(
        SECOND_ORDER, inner_rate=0.1, inner_steps=3, eval_steps=3, tasks=4, steps=8000
    ),
    "reptile": dataclasses.replace(
        SECOND_ORDER, train_shots=10, train_queries=1, inner_rate=0.1, inner_steps=5, eval_steps=50, minibatch=10,
        optimizer="sgd", rate=0.5, schedule="linear", tasks=4,
    ),
    "implicit_maml": dataclasses.replace(
        SECOND_ORDER, inner_rate=0.3, inner_steps=12, eval_steps=12, tasks=4, proximal=0.5, damping=5.0, steps=8000
    ),
    "protonet": CLOSED,
    "r2d2": SCALED,
    "metaoptnet": dataclasses.replace(SCALED, steps=15000),
    "supervised": dataclasses.replace(SCALED, rate=1e-3, tasks=1, train_queries=64),
}  # fmt: skip

# The protocols of the papers as far as networks, tasks and numbers of steps go; without augmentation, and with one
# preset for all ways and shots. For a GPU.
PAPER: dict[str, dict[str, Preset]] = {
    "omniglot": {
        "maml": Preset(filters=64, steps=60000, tasks=32, rate=1e-3, schedule="constant", train_queries=1),
        "fomaml": Preset(filters=64, steps=60000, tasks=32, rate=1e-3, schedule="constant", train_queries=1),
        "anil": Preset(filters=64, steps=60000, tasks=32, rate=1e-3, schedule="constant", train_queries=1),
        "meta_sgd": Preset(filters=64, steps=60000, tasks=32, rate=1e-3, schedule="constant", eval_steps=1),
        "maml_plus_plus": Preset(
            filters=64, downsample="pool", steps=75000, tasks=16, rate=1e-3, inner_rate=0.1, inner_steps=5, eval_steps=5
        ),
        "reptile": Preset(
            filters=64, train_shots=10, train_queries=1, steps=100000, tasks=5, optimizer="sgd", rate=1.0,
            schedule="linear", inner_rate=0.1, inner_steps=5, eval_steps=50, minibatch=10,
        ),
        "implicit_maml": Preset(
            filters=64, steps=20000, tasks=32, rate=1e-3, inner_rate=0.1, inner_steps=16, eval_steps=16, damping=10.0,
        ),
        "protonet": Preset(
            filters=64, downsample="pool", statistics="support", train_ways=60, steps=60000, tasks=1, rate=1e-3,
        ),
        "r2d2": Preset(
            filters=64, downsample="pool", statistics="support", train_ways=60, steps=60000, tasks=1, rate=1e-3,
        ),
        "metaoptnet": Preset(
            filters=64, downsample="pool", statistics="support", train_ways=20, steps=60000, tasks=4, rate=1e-3,
        ),
        "supervised": Preset(filters=64, downsample="pool", steps=60000, tasks=1, train_queries=256, rate=1e-3),
    },
}  # fmt: skip
_CIFAR: dict[str, Any] = {"downsample": "pool", "filters": 64}
PAPER["cifar_fs"] = {
    **{name: dataclasses.replace(preset, downsample="pool") for name, preset in PAPER["omniglot"].items()},
    "maml": Preset(
        **_CIFAR, steps=60000, tasks=4, rate=1e-3, schedule="constant", inner_rate=0.01, inner_steps=5,
        eval_steps=10, train_queries=15,
    ),
    "protonet": Preset(**_CIFAR, statistics="support", train_ways=20, train_queries=15, steps=40000, tasks=1),
    "r2d2": Preset(**_CIFAR, statistics="support", train_ways=20, train_queries=15, steps=40000, tasks=1),
    "metaoptnet": Preset(
        network="resnet12", statistics="support", train_shots=5, train_queries=6, steps=60000, tasks=8, optimizer="sgd",
        rate=0.1,
    ),
}  # fmt: skip

# Accuracy in percent by (data, learner, metric): (ways, shots) -> figure of the paper.
PUBLISHED: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {
    ("omniglot", "maml", "transductive"): {(5, 1): 98.7, (5, 5): 99.9, (20, 1): 95.8, (20, 5): 98.9},
    ("omniglot", "reptile", "transductive"): {(5, 1): 97.68, (5, 5): 99.48, (20, 1): 89.43, (20, 5): 97.12},
    ("omniglot", "maml_plus_plus", "transductive"): {(5, 1): 99.47, (20, 1): 97.65},
    ("omniglot", "protonet", "non_transductive"): {(5, 1): 98.8, (5, 5): 99.7, (20, 1): 96.0, (20, 5): 98.9},
    ("cifar_fs", "metaoptnet", "non_transductive"): {(5, 1): 72.0, (5, 5): 84.2},
    ("cifar_fs", "protonet", "non_transductive"): {(5, 1): 55.5, (5, 5): 72.0},
}
# Learners whose head is made from the labels: their meta-training tasks may have other classes than those of the test.
ANY_WAYS = ("protonet", "r2d2", "metaoptnet", "supervised")
# What a preset says and a learner does not read.
UNREAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ANY_WAYS, ("inner_rate", "inner_steps", "eval_steps", "proximal", "damping")),
    **dict.fromkeys(("maml", "fomaml", "anil", "meta_sgd", "reptile"), ("proximal", "damping")),
    "maml_plus_plus": ("eval_steps", "proximal", "damping"),
}


def preset_of(name: str, learner: str, data: str) -> Preset:
    """The preset of a learner; the papers' protocols for other data are those for Omniglot."""
    return BUDGET[learner] if name == "budget" else PAPER.get(data, PAPER["omniglot"])[learner]


def settings_of(name: str, learner: str, data: str, instead: Instead) -> Preset:
    """The preset of a learner with what was given instead; all pieces of the training have as many steps.

    Raises:
      UsageError: for an unknown learner, and settings that it does not read.
    """
    if names(learner, LEARNERS, "learner") != (learner,):
        raise UsageError(f"--learner {learner!r}: give one name; choose from {', '.join(LEARNERS)}")
    preset = preset_of(name, learner, data)
    given = {option: value for option, value in dataclasses.asdict(instead).items() if value is not None}
    unread = UNREAD.get(learner, ()) + (("filters", "norm") if preset.network == "resnet12" else ())
    for option in sorted(given):
        if option in unread:
            raise UsageError(f"--{option.replace('_', '-')} says nothing to {learner} with this network; leave it out")
    preset = dataclasses.replace(preset, **given)
    # The schedules end with the last piece.
    pieces = min(PIECES, max(preset.steps, 1))
    return dataclasses.replace(preset, steps=-(-preset.steps // pieces) * pieces)


def preset_model(preset: Preset, classes: int) -> nn.Module:
    """The preset's network."""
    if preset.network == "resnet12":
        return models.ResNet12(classes)
    return models.Conv4(classes, filters=preset.filters, downsample=preset.downsample, norm=preset.norm)


def preset_learner(name: str, model: nn.Module, preset: Preset, *, testing: bool) -> Learner:
    """A learner by name, as it is meta-trained or as it adapts to test tasks."""
    steps = preset.eval_steps if testing else preset.inner_steps
    common: dict[str, Any] = {"statistics": preset.statistics}
    sgd: dict[str, Any] = {"optimizer": optax.sgd(preset.inner_rate), "steps": steps, "unroll": True, **common}
    if name in ("maml", "fomaml"):
        return learners.maml(model, first_order=name == "fomaml", **sgd)
    if name == "anil":
        return learners.anil(model, **sgd)
    if name == "meta_sgd":
        return learners.meta_sgd(model, **sgd)
    if name == "maml_plus_plus":
        return learners.maml_plus_plus(
            model, optimizer=optax.sgd(preset.inner_rate), steps=preset.inner_steps,
            anneal_steps=max(preset.steps // 4, 1), per_step_norm=preset.norm != "none", unroll=True, **common,
        )  # fmt: skip
    if name == "reptile":
        # The paper's Adam keeps its second moments from task to task. Begun anew in every task it was ten points behind
        # plain gradient descent; likely because its first steps have one size in all directions, noise as well.
        inner = optax.sgd(preset.inner_rate)
        # The papers' test tasks are learned in mini-batches of as many rows as there are.
        return learners.reptile(model, optimizer=inner, steps=steps, minibatch=None if testing else preset.minibatch,
                                **common)  # fmt: skip
    if name == "implicit_maml":
        return learners.implicit_maml(
            model, optimizer=optax.sgd(preset.inner_rate), steps=steps, proximal=preset.proximal,
            solver_steps=preset.solver_steps, damping=preset.damping, **common,
        )  # fmt: skip
    if name == "protonet":
        return learners.protonet(model, temperature=preset.scale, learn=("temperature",), **common)
    if name == "r2d2" or (name == "supervised" and testing):
        learn = ("ridge", "scale") if name == "r2d2" else ()
        return learners.r2d2(model, ridge=preset.ridge, scale=preset.scale, learn=learn, **common)
    if name == "metaoptnet":
        return learners.metaoptnet(model, scale=preset.scale, **common)
    return learners.fine_tune(model, optimizer=optax.sgd(preset.inner_rate), steps=0, statistics=preset.statistics)


def preset_optimizer(preset: Preset) -> optax.GradientTransformation:
    """The outer optimiser with its schedule."""
    rate: Any = preset.rate
    if preset.schedule == "cosine":
        rate = optax.cosine_decay_schedule(preset.rate, preset.steps)
    elif preset.schedule == "linear":
        rate = optax.linear_schedule(preset.rate, 0.0, preset.steps)
    return optax.adam(rate) if preset.optimizer == "adam" else optax.sgd(rate)
