"""Tables, pictures and result rows of learning curves."""

from pathlib import Path

import numpy as np

from metaal_jax.metrics import interval, labels_to_reach
from metaal_jax.studies.statistics import finite, numbers


class Study:
    """Learning curves of arms over seeds, all on the same problems.

    Attributes:
      labels: int `[rounds]`.
      curves: `{(learner, strategy): {metric: [seeds, rounds]}}`.
      final: `{(learner, strategy): {metric: [seeds]}}`: `final_...` on all test rows at the full budget, `cold_...`
        without any label.
    """

    def __init__(self, labels, curves: dict, final: dict):
        self.labels, self.curves, self.final = np.asarray(labels), curves, final

    def at(self, arm: tuple[str, str], metric: str, labels: int) -> np.ndarray:
        """One value per seed at a number of labels; raises a ValueError for one that the curves do not have."""
        if labels not in self.labels:
            raise ValueError(f"no curve has a point at {labels} labels, only at {self.labels.tolist()}")
        return self.curves[arm][metric][:, int(np.flatnonzero(self.labels == labels)[0])]

    def area(self, arm: tuple[str, str]) -> np.ndarray:
        """Mean accuracy along the curve, one value per seed."""
        return self.curves[arm]["accuracy"].mean(1)

    def labels_to(self, arm: tuple[str, str], target: float) -> np.ndarray:
        """Labels at which each seed's curve reaches a target accuracy, infinity where it does not."""
        return np.asarray(labels_to_reach(self.labels, self.curves[arm]["accuracy"], target))


def shown_labels(labels) -> list[int]:
    """The columns of a table: a handful of the numbers of labels."""
    labels = [int(n) for n in labels]
    if len(labels) <= 6:
        return labels
    usual = [n for n in (10, 20, 30, 50, 100, 200, 300) if n in labels]
    return usual if len(usual) >= 3 else [labels[i] for i in np.linspace(0, len(labels) - 1, 5).astype(int)]


def table(study: Study, targets=(0.80, 0.90, 0.95)) -> str:
    """Labels against test accuracy in percent with 95 % intervals, area, and the median labels to reach targets."""
    from tabulate import tabulate

    columns = shown_labels(study.labels)
    rows = []
    for arm in study.curves:
        row = [*arm]
        for n in columns:
            low = interval(study.at(arm, "accuracy", n))
            row.append(f"{100 * low.mean:.1f} ± {100 * (low.high - low.mean):.1f}")
        area = interval(study.area(arm))
        row.append(f"{100 * area.mean:.1f} ± {100 * (area.high - area.mean):.1f}")
        for target in targets:
            median = np.median(study.labels_to(arm, target))
            row.append(f"{median:.0f}" if np.isfinite(median) else f"> {study.labels[-1]}")
        rows.append(row)
    header = ["learner", "strategy", *[f"{n} labels" for n in columns], "area", *[f"to {t:.0%}" for t in targets]]
    return tabulate(rows, header, stralign="right", colalign=("left", "left"), disable_numparse=True)


def comparisons(study: Study, against: tuple[str, ...]) -> list[dict]:
    """Paired differences of every arm to the same strategy with the learners `against`, in the results' form."""
    rows = []
    for learner, strategy in study.curves:
        for other in against:
            if learner in ("maml", "frozen") and other != learner and (other, strategy) in study.curves:
                a, b = (learner, strategy), (other, strategy)
                for n in shown_labels(study.labels):
                    rows.append(_pair(a, b, "accuracy", n, study.at(a, "accuracy", n) - study.at(b, "accuracy", n)))
                rows.append(_pair(a, b, "area", int(study.labels[-1]), study.area(a) - study.area(b)))
    return rows


def _pair(a: tuple[str, str], b: tuple[str, str], metric: str, labels: int, values: np.ndarray) -> dict:
    name = lambda arm: {"learner": arm[0], "strategy": arm[1]}  # noqa: E731
    return {"a": name(a), "b": name(b), "metric": metric, "labels": labels, **numbers(values, "difference")}


def result_rows(study: Study, *, source: str, target: str) -> list[dict]:
    """All curves, areas and labels to reach a target, in the results' form."""
    rows = []

    def add(arm: tuple[str, str], metric: str, labels: int, values: np.ndarray) -> None:
        rows.append({"learner": arm[0], "strategy": arm[1], "source": source, "target": target, "metric": metric,
                     "labels": labels, **numbers(values)})  # fmt: skip

    for arm, metrics in study.curves.items():
        for metric, values in metrics.items():
            for i, n in enumerate(study.labels):
                add(arm, metric, int(n), values[:, i])
        add(arm, "area", int(study.labels[-1]), study.area(arm))
        for metric, values in study.final[arm].items():
            add(arm, metric, 0 if metric.startswith("cold_") else int(study.labels[-1]), values)
        for target_accuracy in (0.80, 0.90, 0.95):
            needed = study.labels_to(arm, target_accuracy)
            rows.append({"learner": arm[0], "strategy": arm[1], "source": source, "target": target,
                         "metric": f"labels_to_{round(100 * target_accuracy)}", "labels": int(study.labels[-1]),
                         "median": finite(np.median(needed)), "reached": int(np.isfinite(needed).sum()),
                         "seeds": len(needed)})  # fmt: skip
    return rows


def picture(study: Study, path: Path, title: str) -> None:
    """Learning curves with 95 % bands, one panel a learner; one for all learners where there is one strategy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    learners, strategies = (list(dict.fromkeys(arm[i] for arm in study.curves)) for i in (0, 1))
    by_learner = len(strategies) > 1 or len(learners) == 1
    panels, lines = (learners, strategies) if by_learner else (strategies, learners)
    styles = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in plt.colormaps["tab10"].colors]
    style = dict(zip(lines, styles, strict=False))
    width = max(3.4 * len(panels), 5.0 if by_learner else 8.0)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.8 if by_learner else 5.0), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for arm, metrics in study.curves.items():
            own, line = arm if by_learner else arm[::-1]
            if own != panel:
                continue
            rows = [interval(column) for column in 100 * metrics["accuracy"].T]
            colour, dash = style[line]
            axis.plot(study.labels, [r.mean for r in rows], dash, label=line, color=colour, linewidth=1.6)
            if rows[0].seeds > 1:
                axis.fill_between(study.labels, [r.low for r in rows], [r.high for r in rows],
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axis.set_title(panel)
        axis.set_xlabel("labels bought")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][-1].legend(frameon=False, loc="lower right", ncols=1 + (len(lines) > 8))
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
