"""Pictures of comparisons; they need Matplotlib, of the extra `experiments`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import Interval, interval
from metaal_jax.studies.cells import Cell
from metaal_jax.studies.ranking import Table
from metaal_jax.studies.usage import need

SHOWN = (10, 20, 50, 100, 200, 300)
FOLLOWED = ("random", "margin", "bald", "batch_bald", "badge", "typical", "typiclust", "max_herding",
            "uncertain_herding", "oracle")  # fmt: skip
Panel = tuple[NDArray[Any], NDArray[Any]]  # labels [rounds], shares [rounds, rules]


def canvas(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Any, NDArray[Any]]:
    """A figure and its axes `[rows, columns]`, without a window."""
    need("matplotlib", extra="experiments")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def keep(figure: Any, path: Path, *, rect: tuple[float, float, float, float] = (0, 0, 1, 1)) -> None:
    """Writes a figure."""
    figure.tight_layout(rect=rect)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def bars(found: Sequence[Interval]) -> NDArray[Any]:
    """Lengths of the error bars of intervals, `[2, n]`, below and above."""
    return np.asarray([[f.mean - f.low for f in found], [f.high - f.mean for f in found]])


def curve(axis: Any, labels: NDArray[Any], values: NDArray[Any], **options: Any) -> None:
    """A mean curve of `[seeds, rounds]` with its 95 % band."""
    found = [interval(column) for column in values.T]
    (line,) = axis.plot(labels, [f.mean for f in found], **options)
    if found[0].seeds > 1:
        axis.fill_between(labels, [f.low for f in found], [f.high for f in found], color=line.get_color(), alpha=0.12,
                          linewidth=0)  # fmt: skip


def learning_curves(table: Table, path: Path, title: str) -> None:
    """Learning curves of the strategies that texts speak of most, one panel for each condition and embedding."""
    need("matplotlib", extra="experiments")
    from matplotlib import colormaps

    places = list(dict.fromkeys(cell[:2] for cell in table.labels))
    batch = min((cell.batch for cell in table.labels if cell.batch > 1), default=1)
    embeddings, conditions = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    colours = dict(zip(FOLLOWED, colormaps["tab10"](range(10)), strict=True))
    figure, axes = canvas(len(embeddings), len(conditions), sharex=True, sharey="row",
                          size=(3.6 * len(conditions), 3.4 * len(embeddings)))  # fmt: skip
    for embedding, condition in places:
        axis = axes[embeddings.index(embedding)][conditions.index(condition)]
        for name in FOLLOWED:
            cell = Cell(embedding, condition, batch, name)
            if cell in table.labels:
                curve(axis, table.labels[cell], 100 * table.values[cell]["accuracy"], label=name, color=colours[name],
                      linewidth=1.5)  # fmt: skip
        axis.set_title(f"{embedding} embedding, {condition}", fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks([n for n in SHOWN if n >= batch], [str(n) for n in SHOWN if n >= batch])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("labels bought")
    for line in axes:
        line[0].set_ylabel("test accuracy, %")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
    axes[0][0].legend(handles, labels, frameon=False, loc="lower right", fontsize=8)
    figure.suptitle(title)
    keep(figure, path)


def win_matrix(names: Sequence[str], total: NDArray[Any], settings: int, path: Path, title: str) -> None:
    """The win matrix, best strategies first."""
    order = np.argsort(total.sum(0) - total.sum(1), kind="stable")
    side = 0.26 * len(names) + 2.6
    figure, axes = canvas(1, 1, size=(side + 0.6, side))
    axis = axes[0][0]
    shown = axis.imshow(total[np.ix_(order, order)], cmap="viridis", vmin=0, vmax=settings)
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            if total[a, b]:
                axis.text(j, i, str(total[a, b]), ha="center", va="center", fontsize=6,
                          color="black" if total[a, b] > 0.6 * settings else "white")  # fmt: skip
    axis.set_xticks(range(len(names)), [names[i] for i in order], rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), [names[i] for i in order], fontsize=7)
    figure.colorbar(shown, shrink=0.6, label=f"settings (of {settings}) in which the row beats the column")
    axis.set_title(title, fontsize=10)
    keep(figure, path)


def rule_shares(panels: Mapping[str, Panel], rules: Sequence[str], path: Path) -> None:
    """Which rules a selector follows along its runs."""
    wide = min(len(panels), 5)
    high = -(-len(panels) // wide)
    figure, axes = canvas(high, wide, size=(2.7 * wide + 1.6, 2.4 * high + 0.4), sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    drawn: list[Any] = []
    for axis, (title, (labels, shares)) in zip(axes.flat, panels.items(), strict=False):
        step = labels[0]
        low = np.zeros(len(labels))
        drawn = []
        for share in shares.T:
            drawn.append(axis.bar(labels - step / 2, share, width=step, bottom=low))
            low = low + share
        axis.set_title(title, fontsize=8)
        axis.set_xlim(0, labels[-1])
        axis.set_ylim(0, 1)
    for axis in axes[-1]:
        axis.set_xlabel("labels bought", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the runs", fontsize=8)
    figure.legend(drawn, rules, loc="center right", frameon=False, fontsize=8)
    keep(figure, path, rect=(0, 0, 1 - 1.4 / (2.7 * wide + 1.6), 1))
