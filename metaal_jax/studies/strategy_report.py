"""The report of a comparison of query strategies: tables, result files, pictures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metaal_jax.metrics import Interval
from metaal_jax.names import Strategy
from metaal_jax.studies.cells import Cell, Place
from metaal_jax.studies.pictures import SHOWN, learning_curves, win_matrix
from metaal_jax.studies.ranking import Table, ranks, win_counts
from metaal_jax.studies.results import Record, write_results
from metaal_jax.studies.statistics import numbers
from metaal_jax.studies.study import Study
from metaal_jax.studies.text import plain, points


class About(NamedTuple):
    """What a report is of.

    Attributes:
      source: what the network was meta-trained on.
      target: the new task.
      few, most: labels up to which areas are taken: those of all strategies, and of those that cost little.
      seeds: of every cell.
    """

    source: str
    target: str
    few: int
    most: int
    seeds: int

    def points(self) -> list[int]:
        """Both numbers of labels, each once."""
        return sorted({self.few, self.most})


Ranking = dict[int, dict[str, dict[str, Interval]]]  # by labels, embedding or "all", and strategy


def rank(table: Table, about: About) -> Ranking:
    """Mean ranks on each embedding, and on all of them."""
    embeddings = tuple(dict.fromkeys(cell.embedding for cell in table.labels))
    found: Ranking = {}
    for labels in about.points():
        found[labels] = {e: ranks(table, labels, (e,)) for e in embeddings}
        found[labels]["all"] = ranks(table, labels, embeddings)
    return found


def best_of(ranking: Ranking, chosen: Mapping[str, Strategy], labels: int, most: int) -> list[str]:
    """The best strategies by their ranks on the meta-learned embedding, if there is one.

    Those that ask a single model, so that full adaptation judges all by one.
    """
    order = ranking[labels].get("meta", ranking[labels]["all"])
    fit = {name for name, one in chosen.items() if not one.committee and not one.costly and name != "random"}
    return [name for name in order if name in fit][:most]


def place_rows(table: Table, place: Place, about: About) -> tuple[list[Record], list[Record]]:
    """Areas, accuracies and calibration in one condition on one embedding, and differences to random, as results."""
    rows: list[Record] = []
    paired: list[Record] = []
    for cell, labels in table.labels.items():
        if cell[:2] != place:
            continue
        name = {"learner": cell.embedding, "strategy": cell.strategy}
        where = {"condition": cell.condition, "batch": cell.batch}
        common = {**name, "source": about.source, "target": about.target, **where}
        last = int(labels[-1])
        for most in sorted({n for n in (about.few, last) if n <= last}):
            area = table.area(cell, most)
            rows.append({**common, "metric": "area", "labels": most, **numbers(area, digits=4)})
            base = Cell(*cell[:3], "random")
            if base in table.labels and base != cell and table.labels[base][-1] >= most:
                less = numbers(area - table.area(base, most), "difference", digits=4)
                paired.append({"a": name, "b": {**name, "strategy": "random"}, **where, "metric": "area",
                               "labels": most, **less})  # fmt: skip
        wanted = [("accuracy", at) for at in SHOWN] + [("brier", last), ("ece", last)]
        for metric, at in wanted:
            values = table.at(cell, metric, at)
            if values is not None:
                rows.append({**common, "metric": metric, "labels": at, **numbers(values, digits=4)})
        balance = numbers(table.values[cell]["balance"], digits=4)
        rows.append({**common, "metric": "balance", "labels": last, **balance})
    return rows, paired


def place_table(table: Table, place: Place, most: int) -> str:
    """Area and accuracy in one condition on one embedding, best first."""
    batches = sorted({cell.batch for cell in table.labels if cell[:2] == place})
    held = {cell for cell, labels in table.labels.items() if cell[:2] == place and labels[-1] >= most}
    names = list(dict.fromkeys(cell.strategy for cell in table.labels if cell in held))
    first = next((b for b in batches if b > 1), batches[0])

    def cell(name: str, batch: int = first) -> Cell:
        return Cell(*place, batch, name)

    names.sort(key=lambda n: -table.area(cell(n), most).mean() if cell(n) in table.labels else 0.0)
    lines = []
    for name in names:
        line = [name, *(points(table.area(cell(name, b), most), 1) if cell(name, b) in held else "" for b in batches)]
        for at in (n for n in SHOWN if n <= most):
            values = table.at(cell(name), "accuracy", at) if cell(name) in table.labels else None
            line.append("" if values is None else f"{100 * values.mean():.1f}")
        lines.append(line)
    header = [*(f"area, batches of {b}" for b in batches), *(str(n) for n in SHOWN if n <= most)]
    return plain(lines, ["strategy", *header])


def tables(table: Table, ranking: Ranking, final: Study | None, about: About) -> str:
    """All tables of the report as text; `final` has the best strategies with full adaptation."""

    def parts() -> Iterator[str]:
        for labels, by in ranking.items():
            lines = [[name, *[f"{found[name].mean:.1f}" for found in by.values()]] for name in by["all"]]
            yield f"Mean rank by area up to {labels} labels\n\n{plain(lines, ['strategy', *by])}"
        if final is not None:
            at = [n for n in SHOWN if n in final.labels]
            lines = [[arm[1], points(final.area(arm), 1), *[points(final.at(arm, "accuracy", n), 1) for n in at]]
                     for arm in final.curves]  # fmt: skip
            yield f"The best with full adaptation\n\n{plain(lines, ['strategy', 'area', *map(str, at)])}"
        for place in dict.fromkeys(cell[:2] for cell in table.labels):
            for labels in about.points():
                yield (f"{place[0]} embedding, {place[1]}, up to {labels} labels\n\n"
                       f"{place_table(table, place, labels)}")  # fmt: skip

    return "\n\n".join(parts())


def summary_rows(
    table: Table, ranking: Ranking, final: Study | None, about: About
) -> tuple[list[Record], list[Record]]:
    """Mean ranks and full adaptation as rows, wins as pairs."""
    rows = [{"learner": embedding, "strategy": name, "source": about.source, "target": about.target,
             "metric": "mean_rank", "labels": labels, **numbers(low, digits=4)}
            for labels, by in ranking.items()
            for embedding, found in by.items() for name, low in found.items()]  # fmt: skip
    if final is not None:
        rows += [row for row in final.rows()
                 if row["metric"] == "area" or (row["metric"] == "accuracy" and row["labels"] in SHOWN)]  # fmt: skip
    paired = []
    for labels in about.points():
        names, total, settings = win_counts(table, labels)
        paired += [{"a": {"strategy": a}, "b": {"strategy": b}, "metric": "wins", "labels": labels,
                    "won": int(total[i, j]), "lost": int(total[j, i]), "settings": settings}
                   for i, a in enumerate(names) for j, b in enumerate(names)
                   if j > i and (total[i, j] or total[j, i])]  # fmt: skip
    return rows, paired


def write_report(
    out: Path, table: Table, ranking: Ranking, final: Study | None, about: About, head: Mapping[str, Any]
) -> None:
    """Result files and pictures in a folder, one file for each condition and embedding, and a summary.

    Args:
      out: the folder.
      table: the curves.
      ranking: of `rank`.
      final: the best with full adaptation, if they were run.
      about: what the report is of.
      head: what `write_results` takes beside rows: command, environment, seconds and config.
    """
    for place in dict.fromkeys(cell[:2] for cell in table.labels):
        rows, paired = place_rows(table, place, about)
        write_results(out / f"{place[0]}-{place[1]}.json", **head, rows=rows, paired=paired)
    rows, paired = summary_rows(table, ranking, final, about)
    write_results(out / "summary.json", **head, rows=rows, paired=paired)
    learning_curves(table, out / "curves.png", f"{about.source} to {about.target}, {about.seeds} seeds")
    for labels in about.points():
        names, total, settings = win_counts(table, labels)
        win_matrix(names, total, settings, out / f"wins_{labels}.png",
                   f"wins by area up to {labels} labels, 5 % after Holm's correction in each setting")  # fmt: skip
