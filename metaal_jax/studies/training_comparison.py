"""Trainings of policies beside each other: ways at equal time, or learner, policy and both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from metaal_jax.base import PyTree
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.forms import Forms, Kind
from metaal_jax.studies.groups import Run, Transfer
from metaal_jax.studies.policy_choosers import BASELINE
from metaal_jax.studies.policy_training import Areas, Course, Trained, Training, areas_of
from metaal_jax.studies.results import Record
from metaal_jax.studies.statistics import numbers, shown
from metaal_jax.studies.text import points
from metaal_jax.studies.usage import need

Pair = tuple[str, str]  # policy and learner
Curves = Mapping[Pair, NDArray[Any]]  # accuracies [runs, problems, rounds]


@dataclass(frozen=True)
class TrainingRun:
    """One of the trainings, as its run folder keeps it."""

    training: Training
    transfer: Transfer
    meta_seed: int
    run: Run


class Player(NamedTuple):
    """Who plays: a policy and a learner, by name.

    Attributes:
      policy, learner: names.
      play: what gives accuracies, see `areas_of`.
      params, meta: the policy's parameters, and the learner's.
    """

    policy: str
    learner: str
    play: Areas
    params: PyTree
    meta: PyTree


def players(courses: Mapping[str, Course], trained: Mapping[str, Trained], forms: Forms, *, seed: int) -> list[Player]:
    """Every way's policy with the untrained learner; or every policy with every learner."""
    course = next(iter(courses.values()))
    game = course.games[0]
    start = course.chooser.start(game, jax.random.key(seed))
    learners: dict[str, PyTree] = {"start": game.first_meta(forms.train, seed=seed)}
    choosers: dict[str, tuple[Areas, PyTree]] = {
        BASELINE: (areas_of(game, course.rules[BASELINE]), ()),
        "start": (areas_of(game, course.chooser), start),
    }
    for name, of in trained.items():
        if courses[name].trainer.train != "learner":
            choosers[name] = (areas_of(game, courses[name].chooser), of.params)
        if courses[name].joint():
            learners[name] = of.metas[0]
    return [Player(policy, learner, *choosers[policy], meta) for policy in choosers
            for learner, meta in learners.items()]  # fmt: skip


def judge(
    folder: RunFolder, courses: Mapping[str, Course], trained: Mapping[str, Trained], forms: Forms, *, seed: int,
    run: int,
) -> dict[Pair, NDArray[Any]]:  # fmt: skip
    """Accuracies `[problems, rounds]` by policy and learner on the same held-out problems."""
    key = jax.random.fold_in(jax.random.key(seed), 7)
    problems = next(iter(courses.values())).schedule.report_problems

    def compute() -> Records:
        found: Records = []
        tqdm = need("tqdm", extra="experiments").tqdm
        for player in tqdm(players(courses, trained, forms, seed=seed), desc="report"):
            accuracy = player.play(key, player.meta, player.params, forms.report, problems)
            who = {"series": player.policy, "learner": player.learner, "run": run}
            found += [{**who, "problem": i, "accuracy": [round_to(v) for v in row]}
                      for i, row in enumerate(np.asarray(accuracy))]  # fmt: skip
        return found

    bests = "-".join(f"{of.best:02d}" for of in trained.values())
    records = folder.step(f"report-{run}-{'-'.join(trained)}-{bests}", compute)
    places = dict.fromkeys((r["series"], r["learner"]) for r in records)
    return {place: np.asarray([r["accuracy"] for r in records if (r["series"], r["learner"]) == place])
            for place in places}  # fmt: skip


def comparison_rows(
    curves: Curves, seconds: Mapping[tuple[str, int], float], *, source: str, kind: Kind
) -> tuple[list[Record], list[Record]]:
    """Areas and all paired differences, and the seconds of each training, by name and run."""
    where = {"source": source, "target": source, "ways": kind.ways, "pool": kind.pool, "batch": kind.batch,
             "labels": kind.budget, "metric": "area"}  # fmt: skip
    rows: list[Record] = []
    paired: list[Record] = []
    for one, accuracy in curves.items():
        who = dict(zip(("strategy", "learner"), one, strict=True))
        rows.append({**who, **where, **numbers(accuracy.mean((0, 2)), of="problems"),
                     "runs": [round(float(mean), 5) for mean in accuracy.mean((1, 2))]})  # fmt: skip
        for other, theirs in curves.items():
            if other != one:
                paired.append({"a": who, "b": dict(zip(("strategy", "learner"), other, strict=True)), **where,
                               **numbers((accuracy - theirs).mean((0, 2)), "difference", "problems")})  # fmt: skip
    rows += [{"strategy": name, "run": run, "source": source, "target": source, "metric": "seconds_of_training",
              "mean": value} for (name, run), value in seconds.items()]  # fmt: skip
    return rows, paired


def comparison_text(title: str, curves: Curves) -> str:
    """Areas of all, best first, and what the best has more."""
    best = max(curves, key=lambda player: curves[player].mean())
    lines = [title]
    for (policy, learner), accuracy in sorted(curves.items(), key=lambda item: -item[1].mean()):
        less = shown((curves[best] - accuracy).mean((0, 2)))
        of_runs = ", ".join(f"{100 * mean:.2f}" for mean in accuracy.mean((1, 2)))
        lines.append(f"  {policy:15} {learner:8} {points(accuracy.mean((0, 2)))}   the best less this: {less}   "
                     f"runs: {of_runs}")  # fmt: skip
    return "\n".join(lines)
