"""Policies that are trained, and the problems and learners that they are trained and judged with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from typing_extensions import Doc

from metaal_jax import learners, models, policies
from metaal_jax.base import Learner, Policy, PyTree
from metaal_jax.names import Given, Strategy
from metaal_jax.policies import features
from metaal_jax.studies.cells import linear_learners
from metaal_jax.studies.forms import Composition, make_sampler
from metaal_jax.studies.options import Range, above, choices
from metaal_jax.studies.usage import UsageError, by_usual_names, strategies

BASELINE = "max_herding"
POLICIES = {
    "linear": "scores rows, linear in the features, with factors that move with some of the situation's",
    "row": "scores every row by a small network",
    "set": "scores every row in view of the others",
    "selector": "chooses among rules in every round, linear as well",
}
LEARNERS = {
    "linear": "logistic regression, as in strategies.py",
    "ridge": "ridge regression on a linear map of the embedding; both can be meta-trained",
}


@dataclass(frozen=True)
class PolicyOptions:
    """The policy before its training."""

    policy: Annotated[str, Doc(choices(POLICIES))] = "linear"
    arms: str = "random,margin,badge,typical,max_herding"
    """Comma-separated rules that a selector chooses among; max_herding, which it begins with, among them."""
    start: Annotated[float, Range()] = 1.0
    """Factor of the feature uncertain_cover with which scores begin, four times that for reinforce, ppo and pathwise,
    whose draws are then near the best rows; of a selector, the head start of max_herding, the same for all ways."""
    situation: str = "labels,margin"
    """Comma-separated features of the situation that a linear policy's factors move with."""


@dataclass(frozen=True)
class LearnerOptions:
    """The learner in the episodes."""

    learner: Annotated[str, Doc(choices(LEARNERS))] = "linear"
    ridge: Annotated[float, above(0)] = 20.0
    """Ridge that meta-training begins with."""
    scale: Annotated[float, above(0)] = 5.0
    """Factor on the ridge regression's outputs that meta-training begins with."""
    linear_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of the linear layer, a logistic regression."""
    solver_steps: int = 64
    """Steps of its solver."""
    refit_steps: int = 16
    """Steps where labels are tried."""


class Game(NamedTuple):
    """Problems of one kind, and what learns in them."""

    problems: Composition
    learning: LearnerOptions

    def learners(self) -> tuple[Learner, Learner]:
        """The learner, and its quicker form for what refits it by the thousand."""
        own, ways = self.learning, self.problems.kind.ways
        if own.learner == "ridge":
            return (self.ridge(),) * 2
        return linear_learners(ways, ridge=own.linear_ridge, steps=own.solver_steps, refit_steps=own.refit_steps)

    def ridge(self) -> Learner:
        """Ridge regression on a linear map of the embedding, which is smooth in the weights of its rows."""
        model = models.Projection(self.problems.kind.ways)
        own = self.learning
        return learners.r2d2(model, ridge=own.ridge, scale=own.scale, intercept=True, absent=None)

    def given(self) -> Given:
        """What rules are made from."""
        learner, refit = self.learners()
        kind = self.problems.kind
        return Given(k=kind.batch, rounds=kind.budget // kind.batch, classes=kind.ways, learner=learner, refit=refit,
                    loss_learner=learner)  # fmt: skip

    def first_meta(self, forms: PyTree, *, seed: int) -> PyTree:
        """The learner's meta-parameters before training."""
        rows = jax.eval_shape(make_sampler(self.problems), jax.random.key(0), forms).x
        return self.learners()[0].init(jax.random.key(seed), jnp.zeros(rows.shape))


class Chooser(NamedTuple):
    """A policy without parameters.

    Attributes:
      network: scores rows, or a selector's rules.
      arms: the rules of a selector; `()` for what scores rows.
      slow: whether it learns at a tenth of the rate, as networks of several layers do.
    """

    network: Any
    arms: tuple[Strategy, ...] = ()
    slow: bool = False

    def make(self, game: Game, **options: Any) -> Policy:
        """The policy as it will be used, or with the options of its training."""
        if self.arms:
            rules = [arm.build(game.given()) for arm in self.arms]
            return policies.selector(rules, self.network, k=game.problems.kind.batch, **options)
        return policies.learned(self.network, k=game.problems.kind.batch, **options)

    def start(self, game: Game, key: Array) -> PyTree:
        """Its parameters before training."""
        return self.make(game).init(key)


def plain_rules(option: str, text: str) -> dict[str, Strategy]:
    """The rules of a report or a selector's, by name.

    Raises:
      UsageError: where the baseline is not among them, or a rule asks more than one plain model.
    """
    rules = by_usual_names(strategies(text))
    plain = [name for name, one in rules.items() if not one.committee and not one.costly and not one.memory
             and "loss_learner" not in one.needs]  # fmt: skip
    if BASELINE not in rules or len(plain) < len(rules):
        raise UsageError(f"--{option} {text!r} must hold {BASELINE}, and none that asks more than one plain model")
    return rules


def make_chooser(
    options: PolicyOptions, situation: tuple[str, ...], arms: Mapping[str, Strategy], *, sharpness: float
) -> Chooser:
    """The policy.

    Args:
      options: what it is.
      situation: the features that a linear policy's factors move with.
      arms: the rules that a selector chooses among.
      sharpness: factor of the scores of rows that training begins with.
    """
    prior = policies.prior(uncertain_cover=options.start * sharpness)
    if options.policy == "row":
        return Chooser(models.RowNetwork(prior=prior), slow=True)
    if options.policy == "set":
        return Chooser(models.SetNetwork(prior=prior), slow=True)
    moving = tuple(features.SITUATION.index(name) for name in situation)
    # A single model has no disagreement: its factors would be noise.
    place = features.ROWS.index("disagreement")
    ignored = (place, place + len(features.ROWS))
    chosen = tuple(arms.values()) if options.policy == "selector" else ()
    if chosen:
        prior = policies.favoured(list(arms).index(BASELINE), options.start)
    return Chooser(models.LinearNetwork(ignored=ignored, situation=moving, prior=prior), chosen)
