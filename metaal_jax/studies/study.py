"""Learning curves of arms over seeds: their numbers, tables, pictures and result files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import interval, labels_to_reach
from metaal_jax.studies.results import Record, environment, write_results
from metaal_jax.studies.statistics import finite, holm, numbers, paired_p
from metaal_jax.studies.usage import need

Arm = tuple[str, str]  # learner and strategy
TARGETS = (0.80, 0.90, 0.95)


@dataclass(frozen=True)
class Study:
    """Learning curves of arms over seeds, all on the same problems.

    Attributes:
      labels: int `[rounds]`.
      curves: `{(learner, strategy): {metric: [seeds, rounds]}}`, the same metrics for all.
      final: `{(learner, strategy): {metric: [seeds]}}`: `final_...` on all test rows at the full budget, `cold_...`
        without any label.
      about: what the study was of: `source`, `target`, `config`, `seconds`.
    """

    labels: NDArray[Any]
    curves: Mapping[Arm, Mapping[str, NDArray[Any]]]
    final: Mapping[Arm, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def at(self, arm: Arm, metric: str, labels: int) -> NDArray[Any]:
        """One value per seed at a number of labels; raises a ValueError for one that the curves do not have."""
        if labels not in self.labels:
            raise ValueError(f"no curve has a point at {labels} labels, only at {np.asarray(self.labels).tolist()}")
        values: NDArray[Any] = self.curves[arm][metric][:, int(np.flatnonzero(np.asarray(self.labels) == labels)[0])]
        return values

    def area(self, arm: Arm, metric: str = "accuracy") -> NDArray[Any]:
        """Mean along the curve, one value per seed."""
        values: NDArray[Any] = self.curves[arm][metric].mean(1)
        return values

    def labels_to(self, arm: Arm, target: float) -> NDArray[Any]:
        """Labels at which each seed's curve reaches a target accuracy, infinity where it does not."""
        return np.asarray(labels_to_reach(self.labels, self.curves[arm]["accuracy"], target))

    def columns(self) -> list[int]:
        """The columns of a table: a handful of the numbers of labels."""
        labels = [int(n) for n in self.labels]
        if len(labels) <= 6:
            return labels
        usual = [n for n in labels if n in (10, 20, 30, 50, 100, 200, 300)]
        return usual if len(usual) >= 3 else [labels[i] for i in np.linspace(0, len(labels) - 1, 5).astype(int)]

    def table(self, *, targets: Sequence[float] = TARGETS, metric: str = "accuracy") -> str:
        """Labels against the test metric in percent with 95 % intervals, area, and median labels to reach targets.

        Needs the extra `experiments`.
        """
        rows = []
        for arm in self.curves:
            found = [interval(self.at(arm, metric, n)) for n in self.columns()] + [interval(self.area(arm, metric))]
            row = [*arm, *[f"{100 * one.mean:.1f} ± {100 * (one.high - one.mean):.1f}" for one in found]]
            for target in targets:
                median = np.median(self.labels_to(arm, target))
                row.append(f"{median:.0f}" if np.isfinite(median) else f"> {self.labels[-1]}")
            rows.append(row)
        to = [f"to {target:.0%}" for target in targets]
        header = ["learner", "strategy", *[f"{n} labels" for n in self.columns()], "area", *to]
        return str(need("tabulate", extra="experiments").tabulate(
            rows, header, stralign="right", colalign=("left", "left"), disable_numparse=True))  # fmt: skip

    def paired(self, to: Arm | str | None = None, *, metric: str = "accuracy") -> list[Record]:
        """Differences of every arm to one of them, over the same problems, by area and at a handful of labels.

        Args:
          to: an arm, or a strategy, compared within each learner; None for random where it is there, else for the
            first arm.
          metric: of the curves.

        Returns:
          Rows in the results' form: `difference` with its 95 % interval, `p` of Student's paired t-test, and `p_holm`
          corrected for the number of arms.
        """
        if to is None:
            to = "random" if any(strategy == "random" for _, strategy in self.curves) else next(iter(self.curves))
        pairs = [(arm, (arm[0], to) if isinstance(to, str) else to) for arm in self.curves]
        pairs = [(arm, other) for arm, other in pairs if other in self.curves and arm != other]
        if not pairs:
            raise ValueError(f"paired: no arm to compare with {to!r}; the arms are {', '.join(map(str, self.curves))}")
        rows: list[Record] = []
        last = int(self.labels[-1])
        points = [("area", last, {arm: self.area(arm, metric) for arm in self.curves})]
        points += [(metric, n, {arm: self.at(arm, metric, n) for arm in self.curves}) for n in self.columns()]
        for name, labels, values in points:
            differences = {(a, b): values[a] - values[b] for a, b in pairs}
            p = {both: paired_p(difference) for both, difference in differences.items()}
            corrected = holm(p)
            rows += [pair(*both, name, labels, difference) | {"p": p[both], "p_holm": corrected[both]}
                     for both, difference in differences.items()]  # fmt: skip
        return rows

    def rows(self) -> list[Record]:
        """All curves, areas and labels to reach a target, in the results' form."""
        rows: list[Record] = []
        where: Record = {name: self.about[name] for name in ("source", "target") if name in self.about}

        def add(arm: Arm, metric: str, labels: int, values: NDArray[Any]) -> None:
            rows.append({"learner": arm[0], "strategy": arm[1], **where, "metric": metric, "labels": labels,
                         **numbers(values)})  # fmt: skip

        for arm, metrics in self.curves.items():
            for metric, values in metrics.items():
                for i, n in enumerate(self.labels):
                    add(arm, metric, int(n), values[:, i])
            add(arm, "area", int(self.labels[-1]), self.area(arm))
            for metric, values in self.final.get(arm, {}).items():
                add(arm, metric, 0 if metric.startswith("cold_") else int(self.labels[-1]), values)
            for target in TARGETS:
                needed = self.labels_to(arm, target)
                rows.append({"learner": arm[0], "strategy": arm[1], **where,
                             "metric": f"labels_to_{round(100 * target)}", "labels": int(self.labels[-1]),
                             "median": finite(np.median(needed)), "reached": int(np.isfinite(needed).sum()),
                             "seeds": len(needed)})  # fmt: skip
        return rows

    def save(self, path: str | Path, *, command: str | None = None, paired: Sequence[Record] | None = None) -> None:
        """Writes the study in the form of all results, one small JSON file, whole or not at all.

        Args:
          path: of the file.
          command: that made it; by default the call of `compare`.
          paired: differences to write beside the rows; by default those of `paired()`, if there are several arms.
        """
        if paired is None:
            paired = self.paired() if len(self.curves) > 1 else []
        write_results(
            Path(path), command=command or str(self.about.get("call", "")), environment=environment(),
            seconds=float(self.about.get("seconds", 0.0)), config=dict(self.about.get("config", {})),
            rows=self.rows(), paired=paired,
        )  # fmt: skip

    def plot(self, path: str | Path | None = None, *, title: str = "", metric: str = "accuracy") -> Any:
        """Learning curves with 95 % bands, a panel a learner; one for all learners where there is one strategy.

        Needs the extra `experiments`.

        Args:
          path: where to write the picture; None for none.
          title: above it.
          metric: of the curves.

        Returns:
          Matplotlib's figure.
        """
        need("matplotlib", extra="experiments")
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        learners, strategies = (list(dict.fromkeys(arm[i] for arm in self.curves)) for i in (0, 1))
        by_learner = len(strategies) > 1 or len(learners) == 1
        panels, lines = (learners, strategies) if by_learner else (strategies, learners)
        styles = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in colormaps["tab10"](range(10))]
        style = dict(zip(lines, styles, strict=False))
        width = max(3.4 * len(panels), 5.0 if by_learner else 8.0)
        figure = Figure(figsize=(width, 3.8 if by_learner else 5.0))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            for arm, metrics in self.curves.items():
                own, line = arm if by_learner else arm[::-1]
                if own != panel:
                    continue
                rows = [interval(column) for column in 100 * metrics[metric].T]
                colour, dash = style[line]
                axis.plot(self.labels, [r.mean for r in rows], dash, label=line, color=colour, linewidth=1.6)
                if rows[0].seeds > 1:
                    axis.fill_between(self.labels, [r.low for r in rows], [r.high for r in rows],
                                      color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            axis.set_title(panel)
            axis.set_xlabel("labels bought")
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(f"test {metric.replace('_', ' ')}, %")
        axes[0][-1].legend(frameon=False, loc="lower right", ncols=1 + (len(lines) > 8))
        figure.suptitle(title)
        figure.tight_layout()
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=140)
        return figure


def pair(a: Arm, b: Arm, metric: str, labels: int, values: NDArray[Any]) -> Record:
    """A paired difference of two arms, in the results' form."""
    first, second = ({"learner": arm[0], "strategy": arm[1]} for arm in (a, b))
    return {"a": first, "b": second, "metric": metric, "labels": labels, **numbers(values, "difference")}
