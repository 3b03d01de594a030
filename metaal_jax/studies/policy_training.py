"""Acquisition policies trained by any way, in pieces that a run folder keeps, and judged by whole episodes."""

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from metaal_jax import checkpoint, policies
from metaal_jax.base import Policy, PyTree
from metaal_jax.names import Strategy
from metaal_jax.policies import features
from metaal_jax.policies.episodes import episode
from metaal_jax.studies import groups
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.forms import MADE_OF, Forms, Material, Problems, compositions, make_sampler, strengths_of
from metaal_jax.studies.policy_choosers import (
    LEARNERS,
    POLICIES,
    Chooser,
    Game,
    LearnerOptions,
    PolicyOptions,
    make_chooser,
    plain_rules,
)
from metaal_jax.studies.policy_ways import TRAINED, WAYS, Trainer, make_trainers
from metaal_jax.studies.usage import UsageError, names, need

# A run may go on for longer: what is there stays as it is.
FREE = groups.FREE | {"save_policy", "minutes", "pieces", "plan"}


@dataclass(frozen=True)
class Schedule:
    """How long a training lasts, and by how many problems it is judged."""

    minutes: float = 20.0
    """Time to train; it is checked after each piece."""
    pieces: int = 40
    """Most pieces of the training, each followed by a validation and a checkpoint."""
    piece_steps: int = 5
    """Steps of the trainer in a piece, each one of every kind of problems."""
    piece_seconds: float = 0.0
    """Least time of a piece, whose steps are repeated until then, so that trainings of one length have as many
    checkpoints to choose from. Its end is then a matter of time as well."""
    validation_problems: int = 80
    """Problems of each kind that choose the checkpoint."""
    report_problems: int = 200
    """Problems of each kind in the report."""


@dataclass(frozen=True)
class Compared:
    """What the report compares."""

    plan: int = 10
    """Rows that the policy chooses at a time where it is asked for fewer, one a class at most. It is for the report and
    for later use; in training and validation single rows are chosen one by one, which costs less."""
    rules: str = "random,margin,typiclust,max_herding,uncertain_herding"
    """Comma-separated rules in the report; max_herding, the one that counts, among them."""


@dataclass(frozen=True)
class Training:
    """A training as its options say it; `parse_training` gives what they mean."""

    trainer: Trainer = Trainer()
    policy_options: PolicyOptions = PolicyOptions()
    learner_options: LearnerOptions = LearnerOptions()
    problem_options: Problems = Problems()
    material: Material = Material()
    schedule: Schedule = Schedule()
    compared: Compared = Compared()


class Course(NamedTuple):
    """A training, checked.

    Attributes:
      games: the kinds of problems.
      chooser: the policy that is trained.
      trainer: how.
      schedule: how long.
      arms, rules: the rules of a selector, and those of the report, by name.
      plan: of the policy in the report.
    """

    games: tuple[Game, ...]
    chooser: Chooser
    trainer: Trainer
    schedule: Schedule
    arms: dict[str, Strategy]
    rules: dict[str, Strategy]
    plan: int

    def joint(self) -> bool:
        """Whether the learner is trained as well."""
        return self.trainer.train != "policy"

    def check(self) -> None:
        """Makes the trainer once; raises a `ValueError` for what cannot be made."""
        make_trainers(self.trainer, self.chooser, self.games, steps=self.schedule.piece_steps)

    def first_metas(self, forms: PyTree, *, seed: int) -> tuple[PyTree, ...]:
        """The learners' meta-parameters before training, of each kind of problems."""
        return tuple(game.first_meta(forms, seed=seed) for game in self.games)


def parse_training(of: Training) -> Course:
    """What the options of a training mean, checked without data.

    Raises:
      UsageError: for unknown names, and options that do not go together.
    """
    trainer, policy, learner = of.trainer, of.policy_options, of.learner_options
    known: tuple[tuple[str, Any, str], ...] = (
        (trainer.way, WAYS, "way"), (policy.policy, POLICIES, "policy"), (learner.learner, LEARNERS, "learner"),
        (trainer.train, TRAINED, "train"), (of.material.made_of, MADE_OF, "made-of"),
    )  # fmt: skip
    for text, among, what in known:
        if names(text, among, what) != (text,):
            raise UsageError(f"--{what} {text!r}: give one; choose from {', '.join(among)}")
    if trainer.way in ("evolution", "reinforce") and (trainer.episodes < 2 or trainer.episodes % 2):
        raise UsageError(f"--episodes {trainer.episodes} must be an even number from 2 on")
    strengths_of(of.material.strengths)
    situation = names(policy.situation, features.SITUATION, "situation")
    games = tuple(Game(one, learner) for one in compositions(of.problem_options, of.material.imbalance))
    largest = max(game.problems.kind.batch for game in games)
    for option, rows in (("candidates", trainer.candidates), ("tried", trainer.tried)):
        if rows < largest:
            raise UsageError(f"--{option} {rows} are fewer than a batch of {largest}")
    rules, arms = plain_rules("rules", of.compared.rules), plain_rules("arms", policy.arms)
    if policy.policy == "selector" and trainer.way not in ("evolution", "reinforce", "ppo"):
        raise UsageError(f"--way {trainer.way} needs scores of single rows, which a selector does not give; choose "
                         "evolution, reinforce or ppo")  # fmt: skip
    if trainer.train != "policy" and (trainer.way != "pathwise" or len(games) > 1):
        raise UsageError(f"--train {trainer.train} needs gradients that reach the learner, and problems of one kind: "
                         "give --way pathwise and one of --kinds")  # fmt: skip
    if trainer.train != "policy" and learner.learner != "ridge":
        raise UsageError(f"--train {trainer.train}: a new task's classes come in any order, so a linear layer has no "
                         "start worth learning; give --learner ridge")  # fmt: skip
    chooser = make_chooser(policy, situation, arms, sharpness=WAYS[trainer.way].sharpness)
    return Course(games, chooser, trainer, of.schedule, arms if chooser.arms else {}, rules, of.compared.plan)


Areas = Callable[[Array, PyTree, PyTree, PyTree, int], Array]


@functools.cache
def areas_of(game: Game, who: Chooser | Strategy, *, plan: int = 1) -> Areas:
    """`(key, meta, params, forms, number) -> accuracy [number, rounds]`: the same problems for all policies.

    One program for all who ask for the same.

    Args:
      game: the problems, and the learner.
      who: a policy, or a rule.
      plan: of a policy that scores rows, see `policies.learned`.
    """
    policy: Policy
    if isinstance(who, Strategy):
        policy = who.build(game.given())
    else:
        policy = who.make(game, plan=plan) if plan > 1 else who.make(game)
    kind, sampler = game.problems.kind, make_sampler(game.problems)
    play = episode(game.learners()[0], policy, budget=kind.budget, k=kind.batch, record=False)

    def run(key: Array, meta: PyTree, params: PyTree, forms: PyTree, number: int) -> Array:
        def one(key: Array) -> Array:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, meta, params, sampler(problem_key, forms)).accuracy

        found: Array = jax.lax.map(one, jax.random.split(key, number), batch_size=8)
        return found

    compiled: Areas = jax.jit(run, static_argnums=4)
    return compiled


class Programs(NamedTuple):
    """What a training compiles: the trainer's `init`, and its `run` over the steps of a piece."""

    init: Callable[[Array, PyTree, PyTree], policies.TrainState]
    run: Any


@functools.cache
def programs_of(trainer: Trainer, chooser: Chooser, games: tuple[Game, ...], steps: int) -> Programs:
    """The programs of a training: those that differ in seed and time alone share theirs."""
    made = make_trainers(trainer, chooser, games, steps=steps)
    return Programs(jax.jit(made.init), jax.jit(functools.partial(made.run, steps=steps)))


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
      params: the policy's parameters that validation chose.
      metas: the learners' meta-parameters of the same piece, for each kind of problems.
      best: that piece.
      records: a line for each piece.
    """

    params: PyTree
    metas: tuple[PyTree, ...]
    best: int
    records: Records


def train(course: Course, folder: RunFolder, forms: Forms, *, seed: int) -> Trained:
    """Trains in pieces until the time is spent, or goes on from the last piece that the folder holds."""
    games, schedule, alone = course.games, course.schedule, course.joint()
    judges = [areas_of(game, course.chooser) for game in games]
    programs = programs_of(course.trainer, course.chooser, games, schedule.piece_steps)
    metas = course.first_metas(forms.train, seed=seed)
    init_key, run_key, validation_key = jax.random.split(jax.random.key(seed), 3)
    data = forms.train if alone else (forms.train,) * len(games)
    state = programs.init(init_key, metas[0] if alone else metas, data)
    # Compiled here, so that the time to train is time spent on training.
    run = programs.run.lower(run_key, state, data).compile()
    shape = state
    records: Records = []

    def path(piece: int, what: str = "params") -> Any:
        return folder.path / "checkpoints" / f"{what}_{piece:02d}"

    def metas_of(meta: PyTree) -> tuple[PyTree, ...]:
        return (meta,) if alone else tuple(meta)

    def validated(state: policies.TrainState) -> dict[str, float]:
        found = [judge(validation_key, meta, state.params, forms.validation, schedule.validation_problems).mean()
                 for judge, meta in zip(judges, metas_of(state.meta), strict=True)]  # fmt: skip
        return {"validation": round_to(np.mean(found)),
                **{f"validation_{number}": round_to(value) for number, value in enumerate(found)}}  # fmt: skip

    def keep(piece: int) -> None:
        checkpoint.save(path(piece), (state.params, state.meta))
        checkpoint.save(path(piece, "state"), state)
        # The state may be large, with what a trainer remembers; the one before is for a run that is killed here.
        shutil.rmtree(path(piece - 2, "state"), ignore_errors=True)

    def begin() -> Records:
        keep(0)
        return [{"series": "train", "at": 0, "seconds": 0.0, **validated(state)}]

    records += folder.step("piece-00", begin)
    loaded = 0
    tqdm = need("tqdm", extra="experiments").tqdm
    for piece in tqdm(range(1, schedule.pieces + 1), desc=course.trainer.way):

        def compute(piece: int = piece, last: dict[str, Any] = records[-1]) -> Records:
            nonlocal state, loaded
            if loaded != piece - 1:
                state = jax.device_put(checkpoint.restore(path(piece - 1, "state"), shape))
            start, steps, seconds = time.perf_counter(), 0, 0.0
            while steps == 0 or seconds < schedule.piece_seconds:
                state, metrics = jax.block_until_ready(run(run_key, state, data))  # type: ignore[no-untyped-call]
                steps += schedule.piece_steps
                seconds = time.perf_counter() - start
            loaded = piece
            keep(piece)
            return [{"series": "train", "at": last["at"] + steps, "seconds": round(last["seconds"] + seconds, 1),
                     **validated(state),
                     **{name: round_to(values.mean()) for name, values in metrics.items()}}]  # fmt: skip

        if not folder.done(f"piece-{piece:02d}") and records[-1]["seconds"] >= 60 * schedule.minutes:
            break
        records += folder.step(f"piece-{piece:02d}", compute)
        for name in sorted(set(records[-1]) - {"series", "at"}):
            folder.board(f"train/{name}", records[-1][name], records[-1]["at"])
    best = int(np.argmax([record["validation"] for record in records]))
    params, meta = jax.device_put(checkpoint.restore(path(best), (shape.params, shape.meta)))
    return Trained(params, metas_of(meta), best, records)
