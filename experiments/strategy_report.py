"""Ranks, win matrices, tables and pictures of a comparison of query strategies."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaal_jax.metrics import Interval, interval
from metaal_jax.names import find
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.statistics import holm, numbers, paired_p, ranked
from metaal_jax.studies.study import Study
from metaal_jax.studies.usage import command

SHOWN = (10, 20, 50, 100, 200, 300)
# The same rule under another name where the learner is one linear layer; ranks and wins count it once.
TWINS = ("gradient_length", "mean_kl")
FOLLOWED = ("random", "margin", "bald", "batch_bald", "badge", "typical", "typiclust", "max_herding",
            "uncertain_herding", "oracle")  # fmt: skip


class Cell(NamedTuple):
    """One strategy with one batch size in one condition on one embedding."""

    embedding: str
    condition: str
    batch: int
    strategy: str

    def step(self) -> str:
        """The name of its step in the run folder."""
        return f"cell-{self.embedding}-{self.condition}-{self.batch:02d}-{self.strategy}"


class Table:
    """The learning curves of all cells."""

    def __init__(self, records: dict[Cell, list[dict]]):
        self.labels = {cell: np.asarray(found[0]["labels"]) for cell, found in records.items()}
        # `shares` are a selector's: who proposed each batch, `[seeds, rounds, rules]`.
        self.values = {
            cell: {name: np.asarray([r[name] for r in found])
                   for name in ("accuracy", "brier", "ece", "balance", "shares") if name in found[0]}
            for cell, found in records.items()
        }  # fmt: skip

    def settings(self) -> list[tuple[str, str, int]]:
        """Embedding, condition and batch size of the cells, each once."""
        return list(dict.fromkeys(cell[:3] for cell in self.labels))

    def strategies(self, setting: tuple[str, str, int], most: int) -> list[str]:
        """The strategies that were run in a setting up to `most` labels."""
        return [cell.strategy for cell, labels in self.labels.items() if cell[:3] == setting and labels[-1] >= most]

    def area(self, cell: Cell, most: int) -> np.ndarray:
        """Mean accuracy along the curve up to `most` labels, one value per seed."""
        return self.values[cell]["accuracy"][:, self.labels[cell] <= most].mean(1)

    def at(self, cell: Cell, metric: str, labels: int) -> np.ndarray | None:
        """One value per seed at a number of labels; None where the curve has no such point."""
        place = np.flatnonzero(self.labels[cell] == labels)
        return self.values[cell][metric][:, place[0]] if len(place) else None


def ranks(table: Table, most: int, embeddings: tuple[str, ...]) -> dict[str, Interval]:
    """Mean rank by area, 1 the best, of the strategies that all settings hold; its interval is over seeds."""
    settings = judged(table, embeddings)
    shared = shared_strategies(table, settings, most)
    areas = np.asarray([[table.area(Cell(*s, name), most) for name in shared] for s in settings])
    mean = ranked(areas).mean(0)
    found = {name: interval(values) for name, values in zip(shared, mean, strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def judged(table: Table, embeddings: tuple[str, ...] | None = None) -> list[tuple[str, str, int]]:
    """The settings that ranks and wins are counted in: those of several rows a round, or all where there is none."""
    settings = [s for s in table.settings() if embeddings is None or s[0] in embeddings]
    return [s for s in settings if s[2] > 1] or settings


def shared_strategies(table: Table, settings: list[tuple[str, str, int]], most: int) -> list[str]:
    """The strategies that all settings hold up to `most` labels, without the twins of others."""
    names = table.strategies(settings[0], most)
    return [n for n in names if n not in TWINS and all(n in table.strategies(s, most) for s in settings)]


def wins(table: Table, most: int, setting: tuple[str, str, int]) -> tuple[list[str], np.ndarray]:
    """Which strategies beat which in a setting: bool `[s, s]`, row over column.

    Paired t-tests of the areas over seeds, two-sided at 5 %, corrected by Holm's method for the number of pairs in the
    setting. With eight seeds and 40 strategies only differences of some nine standard errors pass.
    """
    shared = shared_strategies(table, [setting], most)
    areas = np.asarray([table.area(Cell(*setting, name), most) for name in shared])
    p = {(i, j): paired_p(areas[i] - areas[j]) for i in range(len(shared)) for j in range(i)}
    won = np.zeros((len(shared), len(shared)), bool)
    for (i, j), corrected in holm(p).items():
        if corrected <= 0.05:
            better = areas[i].mean() > areas[j].mean()
            won[(i, j) if better else (j, i)] = True
    return shared, won


def win_counts(table: Table, most: int) -> tuple[list[str], np.ndarray, int]:
    """In how many settings the row's strategy beats the column's: int `[s, s]`, and the number of settings."""
    settings = judged(table)
    shared = shared_strategies(table, settings, most)
    total = np.zeros((len(shared), len(shared)), int)
    for setting in settings:
        held, won = wins(table, most, setting)
        place = [held.index(name) for name in shared]
        total += won[np.ix_(place, place)]
    return shared, total, len(settings)


def rows_of(table: Table, place: tuple[str, str], few: int, source: str, target: str) -> tuple[list[dict], list[dict]]:
    """Areas, accuracies and calibration in one condition on one embedding, and differences to random, as results."""
    rows, paired = [], []
    for cell, labels in table.labels.items():
        if cell[:2] != place:
            continue
        name = {"learner": cell.embedding, "strategy": cell.strategy}
        where = {"condition": cell.condition, "batch": cell.batch}

        def add(metric: str, at: int, values: np.ndarray, name=name, where=where) -> None:
            rows.append({**name, "source": source, "target": target, **where, "metric": metric, "labels": at,
                         **numbers(values, digits=4)})  # fmt: skip

        last = int(labels[-1])
        for most in sorted({n for n in (few, last) if n <= last}):
            add("area", most, table.area(cell, most))
            base = Cell(*cell[:3], "random")
            if base in table.labels and base != cell and table.labels[base][-1] >= most:
                both = table.area(cell, most) - table.area(base, most)
                paired.append({"a": name, "b": {**name, "strategy": "random"}, **where, "metric": "area",
                               "labels": most, **numbers(both, "difference", digits=4)})  # fmt: skip
        for at in SHOWN:
            values = table.at(cell, "accuracy", at)
            if values is not None:
                add("accuracy", at, values)
        for metric in ("brier", "ece"):
            values = table.at(cell, metric, last)
            if values is not None:
                add(metric, last, values)
        add("balance", last, table.values[cell]["balance"])
    return rows, paired


def condition_table(table: Table, place: tuple[str, str], most: int) -> str:
    """Area and accuracy in one condition on one embedding, best first."""
    from tabulate import tabulate

    batches = sorted({cell.batch for cell in table.labels if cell[:2] == place})
    names = list(dict.fromkeys(c.strategy for c in table.labels if c[:2] == place and table.labels[c][-1] >= most))
    first = next((b for b in batches if b > 1), batches[0])
    names.sort(key=lambda n: -table.area(Cell(*place, first, n), most).mean() if Cell(*place, first, n) in table.labels
               else 0.0)  # fmt: skip
    lines = []
    for name in names:
        line = [name]
        for batch in batches:
            cell = Cell(*place, batch, name)
            held = cell in table.labels and table.labels[cell][-1] >= most
            low = interval(table.area(cell, most)) if held else None
            line.append(f"{100 * low.mean:.1f} ± {100 * (low.high - low.mean):.1f}" if low else "")
        cell = Cell(*place, first, name)
        for at in (n for n in SHOWN if n <= most):
            values = table.at(cell, "accuracy", at) if cell in table.labels else None
            line.append("" if values is None else f"{100 * values.mean():.1f}")
        lines.append(line)
    header = ["strategy", *[f"area, batches of {b}" for b in batches], *[str(n) for n in SHOWN if n <= most]]
    return tabulate(lines, header, stralign="right", colalign=("left",), disable_numparse=True)


def picture(table: Table, path: Path, title: str) -> None:
    """Learning curves of the strategies that texts speak of most, one panel for each condition and embedding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys(cell[:2] for cell in table.labels))
    batch = min((cell.batch for cell in table.labels if cell.batch > 1), default=1)
    embeddings, conditions = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    colours = dict(zip(FOLLOWED, plt.colormaps["tab10"].colors, strict=False))
    size = (3.6 * len(conditions), 3.4 * len(embeddings))
    figure, axes = plt.subplots(len(embeddings), len(conditions), figsize=size, sharex=True, sharey="row",
                                squeeze=False)  # fmt: skip
    for embedding, condition in places:
        axis = axes[embeddings.index(embedding)][conditions.index(condition)]
        for name in FOLLOWED:
            cell = Cell(embedding, condition, batch, name)
            if cell not in table.labels:
                continue
            found = [interval(column) for column in 100 * table.values[cell]["accuracy"].T]
            axis.plot(table.labels[cell], [f.mean for f in found], label=name, color=colours[name], linewidth=1.5)
            if found[0].seeds > 1:
                axis.fill_between(table.labels[cell], [f.low for f in found], [f.high for f in found],
                                  color=colours[name], alpha=0.12, linewidth=0)  # fmt: skip
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def win_picture(names: list[str], total: np.ndarray, settings: int, path: Path, title: str) -> None:
    """The win matrix, best strategies first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = np.argsort(total.sum(0) - total.sum(1), kind="stable")
    side = 0.26 * len(names) + 2.6
    figure, axis = plt.subplots(figsize=(side + 0.6, side))
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
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def share_picture(panels: dict[str, tuple[np.ndarray, np.ndarray]], rules: tuple[str, ...], path: Path) -> None:
    """Which rules a selector follows along its runs: by title the labels `[rounds]` and shares `[rounds, rules]`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(len(panels), 5)
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(2.7 * wide + 1.6, 2.4 * high + 0.4), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    drawn = []
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
    figure.tight_layout(rect=(0, 0, 1 - 1.4 / (2.7 * wide + 1.6), 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(
    config: Any, folder: RunFolder, records: dict[Cell, list[dict]], again: Callable[[list[str]], Study] | None
) -> str:
    """Writes results and pictures to the run folder, and to `config.save_results`; returns the tables as text."""
    from tabulate import tabulate

    table = Table(records)
    few, most = min(config.costly_budget, config.budget), config.budget
    embeddings = tuple(dict.fromkeys(cell.embedding for cell in records))
    parts, summary = [], []
    ranking: dict[int, dict[str, dict[str, Interval]]] = {}
    for labels in sorted({few, most}):
        ranking[labels] = {e: ranks(table, labels, (e,)) for e in embeddings}
        ranking[labels]["all"] = ranks(table, labels, embeddings)
        for embedding, found in ranking[labels].items():
            summary += [{"learner": embedding, "strategy": name, "source": config.source, "target": config.target,
                         "metric": "mean_rank", "labels": labels, **numbers(low, digits=4)}
                        for name, low in found.items()]  # fmt: skip
        lines = [[name, *[f"{ranking[labels][e][name].mean:.1f}" for e in (*embeddings, "all")]]
                 for name in ranking[labels]["all"]]  # fmt: skip
        parts.append(f"Mean rank by area up to {labels} labels\n\n"
                     + tabulate(lines, ["strategy", *embeddings, "all"], disable_numparse=True))  # fmt: skip
    counts = {labels: win_counts(table, labels) for labels in sorted({few, most})}
    for labels, (names, total, settings) in counts.items():
        for i, a in enumerate(names):
            summary += [{"a": {"strategy": a}, "b": {"strategy": b}, "metric": "wins", "labels": labels,
                         "won": int(total[i, j]), "lost": int(total[j, i]), "settings": settings}
                        for j, b in enumerate(names) if j > i and (total[i, j] or total[j, i])]  # fmt: skip
    final: list[dict] = []
    if again is not None:
        place = "meta" if "meta" in embeddings else "all"
        # Those that ask a single model, so that full adaptation judges all by one; by their ranks at the labels that it
        # buys.
        best = [name for name in ranking[few][place] if name != "random"
                and not find(name).committee and not find(name).costly][: config.best]  # fmt: skip
        study = again(best)
        final = [row for row in study.rows()
                 if row["metric"] == "area" or (row["metric"] == "accuracy" and row["labels"] in SHOWN)]  # fmt: skip
        lines = [[f"{strategy}", *[f"{100 * low.mean:.1f} ± {100 * (low.high - low.mean):.1f}" for low in
                                   [interval(study.area((learner, strategy))),
                                    *[interval(study.at((learner, strategy), "accuracy", n)) for n in SHOWN
                                      if n in study.labels]]]] for learner, strategy in study.curves]  # fmt: skip
        header = ["strategy", "area", *[str(n) for n in SHOWN if n in study.labels]]
        parts.append("The best with full adaptation\n\n" + tabulate(lines, header, disable_numparse=True))
    places = list(dict.fromkeys(cell[:2] for cell in records))
    for place in places:
        for labels in sorted({few, most}):
            parts.append(f"{place[0]} embedding, {place[1]}, up to {labels} labels\n\n"
                         + condition_table(table, place, labels))  # fmt: skip
    text = "\n\n".join(parts)
    (folder.path / "table.txt").write_text(text + "\n")
    common: dict[str, Any] = {"command": command(), "environment": environment(), "seconds": folder.seconds(),
                              "config": dataclasses.asdict(config)}  # fmt: skip
    for out in [folder.path / "results", *([Path(config.save_results)] if config.save_results else [])]:
        for place in places:
            rows, paired = rows_of(table, place, few, config.source, config.target)
            write_results(out / f"{place[0]}-{place[1]}.json", **common, rows=rows, paired=paired)
        won = [row for row in summary if row["metric"] == "wins"]
        write_results(out / "summary.json", **common, rows=[r for r in summary if r["metric"] != "wins"] + final,
                      paired=won)  # fmt: skip
        title = f"{config.source} to {config.target}, {config.seeds} seeds"
        picture(table, out / "curves.png", title)
        for labels, (names, total, settings) in counts.items():
            win_picture(names, total, settings, out / f"wins_{labels}.png",
                        f"wins by area up to {labels} labels, 5 % after Holm's correction in each setting")  # fmt: skip
    return text
