"""The ways to train a policy: a trainer for each kind of problems, of which each gets a step in turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import optax
from jax import Array
from typing_extensions import Doc

from metaal_jax import policies
from metaal_jax.base import Batch, Learner, Policy, PyTree
from metaal_jax.policies import PolicyTrainer
from metaal_jax.studies.forms import make_sampler
from metaal_jax.studies.options import above, choices
from metaal_jax.studies.policy_choosers import Chooser, Game

TRAINED = {
    "policy": "the policy alone",
    "learner": "the learner's meta-parameters alone, under the policy's start",
    "both": "both at once",
}
Common = dict[str, Any]  # what all trainers take
Make = Callable[[Game, Chooser, "Trainer", int, Common], PolicyTrainer]


def _evolution(game: Game, chooser: Chooser, trainer: "Trainer", steps: int, common: Common) -> PolicyTrainer:
    policy = chooser.make(game, anchors=trainer.anchors)
    return policies.evolution(policy=policy, problems=trainer.problems, pairs=trainer.episodes // 2,
                              deviation=trainer.deviation, **common)  # fmt: skip


def _drawing(game: Game, chooser: Chooser, trainer: "Trainer", candidates: int) -> Policy:
    """The policy with batches drawn by its probabilities, among that many rows a round; a selector draws rules."""
    options = {} if chooser.arms else {"candidates": candidates}
    return chooser.make(game, anchors=trainer.anchors, sample=True, **options)


def _reinforce(game: Game, chooser: Chooser, trainer: "Trainer", steps: int, common: Common) -> PolicyTrainer:
    return policies.reinforce(policy=_drawing(game, chooser, trainer, trainer.candidates), problems=trainer.problems,
                              rollouts=trainer.episodes, **common)  # fmt: skip


def _ppo(game: Game, chooser: Chooser, trainer: "Trainer", steps: int, common: Common) -> PolicyTrainer:
    episodes = max(trainer.problems * trainer.episodes // 4, 1)
    kind = game.problems.kind
    parts = math.gcd(4, episodes * (kind.budget // kind.batch))
    return policies.ppo(policy=_drawing(game, chooser, trainer, trainer.candidates), episodes=episodes,
                        minibatches=parts, **common)  # fmt: skip


def _supervised(target: Literal["regression", "imitation", "classification"]) -> Make:
    def make(game: Game, chooser: Chooser, trainer: "Trainer", steps: int, common: Common) -> PolicyTrainer:
        return policies.supervised(policy=_drawing(game, chooser, trainer, trainer.tried), target=target,
                                   refit=game.learners()[1], episodes=trainer.problems, expert_steps=steps // 2,
                                   **common)  # fmt: skip

    return make


def _pathwise(game: Game, chooser: Chooser, trainer: "Trainer", steps: int, common: Common) -> PolicyTrainer:
    joint = trainer.train != "policy"
    if joint:
        groups = {"policy": common["optimizer"] if trainer.train == "both" else optax.set_to_zero(),
                  "learner": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(trainer.learner_rate))}  # fmt: skip
        common = {**common, "optimizer": optax.partition(groups, ("policy", "learner"))}
    # Logistic regression leaves out classes without a label, so its derivative does not see what a class's first label
    # is worth. A learner that is trained as well may say less and less: see `pathwise`.
    own = game.learning.learner == "ridge" and trainer.train != "both"
    return policies.pathwise(policy=_drawing(game, chooser, trainer, trainer.candidates), problems=trainer.problems,
                             joint=joint, refit=None if own else _with_own_start(game.ridge()), **common)  # fmt: skip


def _with_own_start(learner: Learner) -> Learner:
    """The learner with meta-parameters of its own, before any training, in place of those it is given."""

    def adapt(
        key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree | None = None, start: PyTree | None = None
    ) -> PyTree:
        del meta
        own = learner.init(jax.random.key(0), batch.x)
        return learner.adapt(key, own, batch, unlabelled=unlabelled, start=start)

    return learner._replace(adapt=adapt)


class Way(NamedTuple):
    """A way to train.

    Attributes:
      line: what it does, for `--help`.
      make: `(game, chooser, trainer's options, steps of a piece, what all trainers take) -> trainer`.
      rate: factor of the learning rate.
      sharpness: factor of the scores of rows that training begins with. What is learned from draws is how to draw; what
        is used are the rows with the best scores. Sharp scores draw little else. A selector's scores have none.
    """

    line: str
    make: Make
    rate: float = 1.0
    sharpness: float = 1.0


WAYS = {
    "evolution": Way("evolution strategies: the parameters are varied, whole episodes compared", _evolution),
    "reinforce": Way("policy gradient, other episodes of the same problem as baseline", _reinforce, sharpness=4.0),
    # Sixteen updates a step, from the same episodes, want smaller ones.
    "ppo": Way("clipped policy gradient with a learned value", _ppo, rate=0.2, sharpness=4.0),
    "regression": Way("what a label is worth, measured by refitting, as a regression (LAL)", _supervised("regression")),
    "imitation": Way("the greedy oracle imitated, with data aggregation", _supervised("imitation")),
    "classification": Way("whether a row's label helps, as a classifier", _supervised("classification")),
    "pathwise": Way(
        "gradients through a relaxed choice, the learner's adaptation and the loss", _pathwise, rate=0.2, sharpness=4.0
    ),
}


@dataclass(frozen=True)
class Trainer:
    """How a policy is trained."""

    way: Annotated[str, Doc(choices({name: way.line for name, way in WAYS.items()}))] = "evolution"
    problems: int = 8
    """Problems of a step."""
    episodes: int = 16
    """Episodes of each problem in a step (evolution and reinforce); ppo runs a quarter as many in all, each of a
    problem of its own, the supervised ways and pathwise one of each problem."""
    deviation: Annotated[float, above(0)] = 0.15
    """Of evolution's noise on the parameters."""
    policy_rate: float = 0.05
    """Learning rate of the policy (Adam); row and set take a tenth of it, ppo and pathwise a fifth."""
    anchors: int = 1000
    """Rows that stand for the pool in training, at most all of it; by default as many as in use. With fewer the same
    parameters choose worse, and training is for another policy than the one that is used."""
    candidates: int = 200
    """Rows a round that reinforce, ppo and pathwise choose from."""
    tried: int = 48
    """Rows a round that imitation, regression and classification try."""
    train: Annotated[str, Doc("What the way pathwise trains. " + choices(TRAINED))] = "policy"
    learner_rate: float = 3e-3
    """Learning rate of the learner's meta-parameters (Adam)."""


def make_trainers(trainer: Trainer, chooser: Chooser, games: Sequence[Game], *, steps: int) -> PolicyTrainer:
    """The way to train on all kinds in turn, or, where the learner is trained as well, on the only one.

    Args:
      trainer: how.
      chooser: what is trained.
      games: the kinds of problems.
      steps: of a piece.
    """
    way = WAYS[trainer.way]
    rate = trainer.policy_rate * way.rate * (0.1 if chooser.slow else 1.0)
    trainers = []
    for game in games:
        kind = game.problems.kind
        common = {
            "learner": game.learners()[0], "sampler": make_sampler(game.problems),
            "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
            "budget": kind.budget, "k": kind.batch, "chunk": 1 if jax.default_backend() == "cpu" else None,
        }  # fmt: skip
        trainers.append(way.make(game, chooser, trainer, steps, common))
    return policies.in_turn(trainers) if trainer.train == "policy" else trainers[0]
