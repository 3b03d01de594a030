"""The report of trained policies on a new task, beside rules and the oracle."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import interval, labels_to_reach
from metaal_jax.policies import Saved
from metaal_jax.studies.cells import Cell, Place
from metaal_jax.studies.judged_policies import short
from metaal_jax.studies.pictures import bars, canvas, curve, keep, win_matrix
from metaal_jax.studies.ranking import Table, wins
from metaal_jax.studies.results import Record
from metaal_jax.studies.statistics import finite, holm, numbers, paired_p, shown
from metaal_jax.studies.text import plain, points

PLACE: Place = ("meta", "plain")
BOUNDS = ("random", "oracle")
GOALS = (0.8, 0.9)


class Evaluation(NamedTuple):
    """What is evaluated.

    Attributes:
      table: the curves.
      trained: the policies by name; the first is compared with everything.
      scrambled: names of the runs in which it sees one feature in a random order.
      source: what the policies were trained on.
      target: the new task.
      budget: labels bought in all.
      seeds: problems.
    """

    table: Table
    trained: Mapping[str, Saved]
    scrambled: Sequence[str]
    source: str
    target: str
    budget: int
    seeds: int

    def first(self) -> str:
        """The name of the first policy."""
        return next(iter(self.trained))

    def batches(self) -> list[int]:
        """The batch sizes."""
        return sorted({cell.batch for cell in self.table.labels})

    def names(self, k: int) -> list[str]:
        """The strategies in batches of a size, those with a scrambled feature left out."""
        return [c.strategy for c in self.table.labels if c.batch == k and c.strategy not in self.scrambled]

    def rules(self, names: Iterable[str]) -> list[str]:
        """Those that are neither a trained policy nor the oracle."""
        return [name for name in names if name not in self.trained and name != "oracle"]

    def cell(self, name: str, k: int) -> Cell:
        """The cell of a strategy."""
        return Cell(*PLACE, k, name)

    def area(self, name: str, k: int) -> NDArray[Any]:
        """Accuracy along the curve, one value per seed."""
        return self.table.area(self.cell(name, k), self.budget)

    def by_area(self, names: Iterable[str], k: int) -> list[str]:
        """The names, the largest mean area first."""
        return sorted(names, key=lambda name: -self.area(name, k).mean())

    def needed(self, name: str, k: int) -> list[float]:
        """Median labels to each of `GOALS`, infinity where most seeds do not reach it."""
        cell = self.cell(name, k)
        accuracy = self.table.values[cell]["accuracy"]
        return [float(np.median(labels_to_reach(self.table.labels[cell], accuracy, goal))) for goal in GOALS]

    def gain(self, name: str, k: int) -> float | None:
        """The share of what the oracle gains on random rows; NaN where it gains nothing, None where it did not run."""
        if not {self.cell(bound, k) for bound in BOUNDS} <= self.table.labels.keys():
            return None
        most = (self.area("oracle", k) - self.area("random", k)).mean()
        return float((self.area(name, k) - self.area("random", k)).mean() / most) if most else np.nan

    def losses(self, k: int) -> dict[str, NDArray[Any]]:
        """Area that the first policy loses without each feature, where that was run."""
        held = [name for name in self.scrambled if self.cell(name, k) in self.table.labels]
        return {name.rpartition("~")[2]: self.area(self.first(), k) - self.area(name, k) for name in held}


def evaluation_rows(of: Evaluation) -> tuple[list[Record], list[Record]]:
    """Areas, shares of the oracle's gain, labels to goals and paired differences of every policy to every rule."""
    rows: list[Record] = []
    paired: list[Record] = []
    for k in of.batches():
        area = {name: of.area(name, k) for name in of.names(k)}
        where = {"source": of.source, "target": of.target, "batch": k}
        for name in of.by_area(area, k):
            rows += _strategy_rows(of, name, k, {"strategy": name, **where})
        for policy in of.trained:
            less = {name: area[policy] - area[name] for name in of.by_area(area, k) if name not in of.trained}
            corrected = holm({name: paired_p(less[name]) for name in of.rules(less)})
            for name, difference in less.items():
                p = {"p_holm": float(f"{corrected[name]:.3g}")} if name in corrected else {}
                paired.append({"a": {"strategy": policy}, "b": {"strategy": name}, **where, "metric": "area",
                               "labels": of.budget, **numbers(difference, "difference"), **p})  # fmt: skip
        rows += [{"strategy": of.first(), **where, "metric": "importance", "feature": feature, "labels": of.budget,
                  **numbers(lost)} for feature, lost in of.losses(k).items()]  # fmt: skip
    return rows, paired


def _strategy_rows(of: Evaluation, name: str, k: int, common: Record) -> list[Record]:
    labels, values = of.table.labels[of.cell(name, k)], of.table.values[of.cell(name, k)]
    every = max(of.budget // 10, 1)
    rows = [{**common, "metric": "area", "labels": of.budget, **numbers(of.area(name, k))}]
    rows += [{**common, "metric": "accuracy", "labels": int(n), **numbers(values["accuracy"][:, i])}
             for i, n in enumerate(labels) if n % every == 0]  # fmt: skip
    if "shares" in values and name in of.trained:  # the start of a selector, which is asked as a rule, has them too
        rows += [{**common, "metric": "share_of_rule", "rule": rule, "labels": int(n), "mean": round(float(share), 4)}
                 for n, shares in zip(labels, values["shares"].mean(0), strict=True) if n % every == 0
                 for rule, share in zip(of.trained[name].rules, shares, strict=True)]  # fmt: skip
    rows += [{**common, "metric": f"labels_to_{round(100 * goal)}", "labels": of.budget, "median": finite(needed)}
             for goal, needed in zip(GOALS, of.needed(name, k), strict=True)]  # fmt: skip
    gain = of.gain(name, k)
    if gain is not None:
        rows.append({**common, "metric": "share_of_oracle", "labels": of.budget, "mean": finite(round(gain, 4))})
    return rows


def evaluation_tables(of: Evaluation) -> str:
    """The same as text, a table for each batch size."""
    parts = []
    for k in of.batches():
        lines = []
        for name in of.by_area(of.names(k), k):
            gain = of.gain(name, k)
            lines.append([
                name, points(of.area(name, k)), "" if gain is None or np.isnan(gain) else f"{gain:.2f}",
                *(f"{n:.0f}" if np.isfinite(n) else f"> {of.budget}" for n in of.needed(name, k)),
                "" if name in of.trained else shown(of.area(of.first(), k) - of.area(name, k)),
            ])  # fmt: skip
        header = ["strategy", "area", "share of the oracle's gain", *(f"to {100 * goal:.0f} %" for goal in GOALS),
                  f"{of.first()} less this"]  # fmt: skip
        title = f"{of.target}, batches of {k}, up to {of.budget} labels, {of.seeds} seeds"
        parts.append(f"{title}\n\n{plain(lines, header)}")
    return "\n\n".join(parts)


def evaluation_picture(of: Evaluation, path: Path) -> None:
    """Differences to the best rule along the curve, and what each feature is worth to the policy."""
    sizes = of.batches()
    panels = len(sizes) + bool(of.scrambled)
    figure, axes = canvas(1, panels, size=(4.6 * panels, 4.0))
    for axis, k in zip(axes[0], sizes, strict=False):
        names = of.names(k)
        rules = of.by_area(of.rules(names), k)
        base = of.table.values[of.cell(rules[0], k)]["accuracy"]
        near = [name for name in rules[1:4] if name != "random"]  # so far below that it hides the rest
        for name in [*of.trained, *near, *(n for n in ("oracle",) if n in names)]:
            cell = of.cell(name, k)
            curve(axis, of.table.labels[cell], 100 * (of.table.values[cell]["accuracy"] - base), label=short(name))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"batches of {k}", fontsize=10)
        axis.set_xlabel("labels bought")
        axis.set_ylabel(f"accuracy less that of {rules[0]}, points")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    if of.scrambled:
        axis = axes[0][-1]
        found = {name: interval(100 * lost) for name, lost in of.losses(sizes[-1]).items()}
        order = sorted(found, key=lambda name: found[name].mean)
        axis.barh(range(len(order)), [found[n].mean for n in order], xerr=bars([found[n] for n in order]))
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_xlabel("area lost without the feature, points")
        axis.set_title(f"what {short(of.first())} looks at", fontsize=10)
    figure.suptitle(f"{of.source} to {of.target}, {of.seeds} seeds")
    keep(figure, path)


def draw_wins(of: Evaluation, folder: Path) -> None:
    """Who beats whom, a picture for each batch size."""
    for k in of.batches():
        held, won = wins(of.table.only(of.cell(name, k) for name in of.names(k)), of.budget, (*PLACE, k))
        win_matrix([short(name) for name in held], won.astype(int), 1, folder / f"wins_{k}.png",
                   f"wins by area in batches of {k}, 5 % after Holm's correction")  # fmt: skip
