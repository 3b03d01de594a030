"""The report of trained policies on many targets: areas, mean ranks and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import interval
from metaal_jax.studies.judged_policies import short
from metaal_jax.studies.pictures import bars, canvas, keep
from metaal_jax.studies.ranking import Table
from metaal_jax.studies.results import Record
from metaal_jax.studies.statistics import numbers, ranked, shown
from metaal_jax.studies.text import plain


class Compared(NamedTuple):
    """What is compared.

    Attributes:
      area: accuracy along the curve, one value per seed, by target and strategy.
      targets: names.
      trained: names of trained policies; each is ranked among the rules, without the others.
      rules: names of the rules.
      source: what the policies were trained on.
      seeds: problems of each target.
    """

    area: Mapping[tuple[str, str], NDArray[Any]]
    targets: Sequence[str]
    trained: Sequence[str]
    rules: Sequence[str]
    source: str
    seeds: int

    def ranks(self, policy: str) -> dict[str, NDArray[Any]]:
        """Mean rank over the targets by area, 1 the best, for each seed, of a policy among the rules."""
        names = [policy, *self.rules]
        values = np.asarray([[self.area[target, name] for name in names] for target in self.targets])
        return dict(zip(names, ranked(values).mean(0), strict=True))

    def overall(self, strategy: str) -> NDArray[Any]:
        """Mean area over the targets, for each seed."""
        mean: NDArray[Any] = np.mean([self.area[target, strategy] for target in self.targets], axis=0)
        return mean

    def less(self, policy: str, other: str) -> dict[str, NDArray[Any]]:
        """Differences of area by target, and over all of them."""
        found = {target: self.area[target, policy] - self.area[target, other] for target in self.targets}
        return {**found, "all": self.overall(policy) - self.overall(other)}


def compared(
    table: Table, targets: Sequence[str], trained: Sequence[str], rules: Sequence[str], source: str
) -> Compared:
    """What a table of cells compares."""
    area = {(cell.condition, cell.strategy): table.area(cell, int(table.labels[cell][-1])) for cell in table.labels}
    return Compared(area, targets, trained, rules, source, len(next(iter(area.values()))))


def target_rows(of: Compared) -> tuple[list[Record], list[Record]]:
    """Areas, mean ranks and paired differences on each target and over all of them."""
    rows: list[Record] = []
    paired: list[Record] = []
    for strategy in (*of.trained, *of.rules):
        rows += [{"strategy": strategy, "source": of.source, "target": target, "metric": "area",
                  **numbers(of.area[target, strategy])} for target in of.targets]  # fmt: skip
    for policy in of.trained:
        rank = of.ranks(policy)
        for name in sorted(rank, key=lambda name: rank[name].mean()):
            common = {"strategy": name, "ranked_with": policy, "source": of.source, "target": "all"}
            rows.append({**common, "metric": "mean_rank", **numbers(rank[name])})
            rows.append({**common, "metric": "area", **numbers(of.overall(name))})
            if name == policy:
                continue
            both = {"a": {"strategy": policy}, "b": {"strategy": name}}
            paired += [{**both, "target": target, "metric": "area", **numbers(values, "difference")}
                       for target, values in of.less(policy, name).items()]  # fmt: skip
            paired.append({**both, "target": "all", "metric": "mean_rank",
                           **numbers(rank[policy] - rank[name], "difference")})  # fmt: skip
    return rows, paired


def target_tables(of: Compared) -> str:
    """The same as text, for each policy: all strategies, and each target's best rule."""
    parts = []
    for policy in of.trained:
        rank = of.ranks(policy)
        lines = []
        for name in sorted(rank, key=lambda name: rank[name].mean()):
            less = "" if name == policy else shown(of.less(policy, name)["all"])
            lines.append([name, f"{rank[name].mean():.1f}", f"{100 * of.overall(name).mean():.2f}", less,
                          *[f"{100 * of.area[target, name].mean():.1f}" for target in of.targets]])  # fmt: skip
        header = ["strategy", "mean rank", "area", f"{short(policy)} less this", *of.targets]
        title = f"{short(policy)} among {len(of.rules)} rules on {len(of.targets)} targets, {of.seeds} seeds"
        parts.append(f"{title}\n\n{plain(lines, header)}")
        lines = []
        for target in of.targets:
            best = max(of.rules, key=lambda name: of.area[target, name].mean())
            lines.append([target, shown(of.less(policy, "random")[target]), best, shown(of.less(policy, best)[target])])
        parts.append(plain(lines, ["target", "less random", "best rule there", f"{short(policy)} less it"]))
    return "\n\n".join(parts)


def target_picture(of: Compared, path: Path) -> None:
    """Mean ranks of the best, and the first policy's differences to random and to the best rule overall."""
    policy = of.trained[0]
    rank = {name: interval(values) for name, values in of.ranks(policy).items()}
    order = sorted(rank, key=lambda name: rank[name].mean)[:12][::-1]
    figure, axes = canvas(1, 2, size=(11.0, 4.4))
    left, right = axes[0]
    left.errorbar([rank[n].mean for n in order], range(len(order)), xerr=bars([rank[n] for n in order]), fmt="o",
                  capsize=3)  # fmt: skip
    left.set_yticks(range(len(order)), [short(name) for name in order], fontsize=8)
    left.set_xlabel(f"mean rank of {len(rank)} over {len(of.targets)} targets")
    overall = max(of.rules, key=lambda name: of.overall(name).mean())
    for shift, other in ((-0.15, "random"), (0.15, overall)):
        less = of.less(policy, other)
        found = [interval(100 * less[target]) for target in of.targets]
        right.errorbar([f.mean for f in found], np.arange(len(found)) + shift, xerr=bars(found), fmt="o", capsize=3,
                       label=f"less {other}")  # fmt: skip
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(of.targets)), of.targets, fontsize=8)
    right.set_xlabel(f"area of {short(policy)}, points")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    keep(figure, path)
