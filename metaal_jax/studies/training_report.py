"""The report of a policy's training: the policy, its start and rules on held-out problems."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import interval
from metaal_jax.studies.folder import Records, RunFolder, round_to
from metaal_jax.studies.forms import Forms, Kind
from metaal_jax.studies.pictures import bars, canvas, keep
from metaal_jax.studies.policy_choosers import BASELINE
from metaal_jax.studies.policy_training import Course, Trained, areas_of
from metaal_jax.studies.results import Record
from metaal_jax.studies.statistics import numbers, shown
from metaal_jax.studies.text import points
from metaal_jax.studies.usage import need

Curves = Mapping[str, NDArray[Any]]  # accuracies [problems, rounds] by name


def play_all(course: Course, folder: RunFolder, trained: Trained, forms: Forms, *, seed: int) -> dict[Kind, Curves]:
    """Accuracies on held-out problems of each kind, a step of the run folder each: the policy, its start, and rules.

    The start has the learner's as well; rules have the learner as it is after training. Where the policy plans, it is
    also there without plans, as `one_by_one`.
    """
    found: dict[Kind, Curves] = {}
    for place, game in enumerate(course.games):
        kind = game.problems.kind
        planned = not course.chooser.arms and min(course.plan, kind.ways) > kind.batch
        used = f"-plan-{course.plan}" if planned else ""
        compute = functools.partial(_played, course, trained, forms, place=place, planned=planned, seed=seed)
        records = folder.step(f"report-{trained.best:02d}-{place}{used}", compute)
        found[kind] = {name: np.asarray([r["accuracy"] for r in records if r["series"] == name])
                       for name in dict.fromkeys(r["series"] for r in records)}  # fmt: skip
    return found


def _played(course: Course, trained: Trained, forms: Forms, *, place: int, planned: bool, seed: int) -> Records:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 7), place)
    game, chooser, meta = course.games[place], course.chooser, trained.metas[place]
    plain = areas_of(game, chooser)
    policy = areas_of(game, chooser, plan=course.plan) if planned else plain
    first = game.first_meta(forms.train, seed=seed)
    compared = {"policy": (policy, meta, trained.params), "start": (policy, first, chooser.start(game, key))}
    compared |= {"one_by_one": (plain, meta, trained.params)} if planned else {}
    compared |= {name: (areas_of(game, rule), meta, ()) for name, rule in course.rules.items()}
    found: Records = []
    bar = need("tqdm", extra="experiments").tqdm(compared.items(), desc=f"report, {game.problems.kind}")
    for name, (play, *own) in bar:
        accuracy = play(key, *own, forms.report, course.schedule.report_problems)
        found += [{"series": name, "kind": list(game.problems.kind), "problem": i,
                   "accuracy": [round_to(v) for v in row]} for i, row in enumerate(np.asarray(accuracy))]  # fmt: skip
    return found


def training_rows(
    course: Course, source: str, curves: Mapping[Kind, Curves], records: Records
) -> tuple[list[Record], list[Record]]:
    """Areas on held-out problems, the validation along the training, and paired differences, as results."""
    rows: list[Record] = []
    paired: list[Record] = []
    common = {"source": source, "target": source}
    for kind, found in curves.items():
        where = {**common, "ways": kind.ways, "pool": kind.pool, "batch": kind.batch, "labels": kind.budget}
        for name, accuracy in found.items():
            rows.append({"strategy": name, **where, "metric": "area", **numbers(accuracy.mean(1), of="problems")})
            if name not in ("policy", "start"):
                paired.append({"a": {"strategy": "policy"}, "b": {"strategy": name}, **where, "metric": "area",
                               **numbers((found["policy"] - accuracy).mean(1), "difference", "problems")})  # fmt: skip
    rows += [{"strategy": "policy", **common, "metric": "validation_area", "step": r["at"], "seconds": r["seconds"],
              "mean": round(r["validation"], 5)} for r in records]  # fmt: skip
    seconds, trainer = records[-1]["seconds"], course.trainer
    if trainer.way in ("evolution", "reinforce") and seconds > 0:
        episodes = records[-1]["at"] * trainer.problems * trainer.episodes * len(curves)
        rows.append({"strategy": "policy", **common, "metric": "episodes_per_second",
                     "mean": round(episodes / seconds, 2)})  # fmt: skip
    return rows, paired


def training_text(title: str, curves: Mapping[Kind, Curves]) -> str:
    """Areas of all on each kind of problems, and what each has more than the baseline."""
    lines = [title]
    for kind, found in curves.items():
        lines.append(str(kind))
        for name, accuracy in found.items():
            less = shown((accuracy - found[BASELINE]).mean(1))
            lines.append(f"  {name:12} {points(accuracy.mean(1))}   less {BASELINE}: {less}")
    return "\n".join(lines)


def training_picture(title: str, records: Records, curves: Mapping[Kind, Curves], path: Path) -> None:
    """Validation along the training, and the differences to the best rules on held-out problems of each kind."""
    figure, axes = canvas(1, 2, size=(10.5, 3.8))
    left, right = axes[0]
    minutes = [r["seconds"] / 60 for r in records]
    for number, kind in enumerate(curves):
        gained = [100 * (r[f"validation_{number}"] - records[0][f"validation_{number}"]) for r in records]
        left.plot(minutes, gained, marker=".", label=str(kind))
    left.set_xlabel("minutes of training")
    left.set_ylabel("validation area gained, points")
    left.legend(frameon=False, fontsize=8)
    first = next(iter(curves.values()))
    names = [name for name in first if name not in ("policy", "random", "margin")]
    for shift, name in enumerate(names):
        having: Sequence[Curves] = [found for found in curves.values() if name in found]
        at = [number for number, found in enumerate(curves.values()) if name in found]
        gaps = [interval(100 * (found["policy"] - found[name]).mean(1)) for found in having]
        place = np.asarray(at) + 0.2 * (shift - (len(names) - 1) / 2)
        right.errorbar([f.mean for f in gaps], place, xerr=bars(gaps), fmt="o", label=f"less {name}", capsize=3)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(curves)), [str(kind) for kind in curves], fontsize=8)
    right.set_xlabel("area of the policy less that of a rule, points")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    keep(figure, path)
