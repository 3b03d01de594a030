"""The learning curves of all cells of a comparison: areas, mean ranks, and who beats whom."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import Interval, interval
from metaal_jax.studies.cells import Cell
from metaal_jax.studies.folder import Records
from metaal_jax.studies.statistics import holm, paired_p, ranked

# The same rule under another name where the learner is one linear layer; ranks and wins count it once.
TWINS = ("gradient_length", "mean_kl")
METRICS = ("accuracy", "brier", "ece", "balance", "shares")
Where = tuple[str, str, int]  # embedding, condition and batch size


@dataclass(frozen=True)
class Table:
    """The learning curves of all cells.

    Attributes:
      labels: by cell, int `[rounds]`.
      values: by cell and metric, `[seeds, rounds]`; `balance` is `[seeds]`, and `shares`, a selector's, who proposed
        each batch, `[seeds, rounds, rules]`.
    """

    labels: Mapping[Cell, NDArray[Any]]
    values: Mapping[Cell, Mapping[str, NDArray[Any]]]

    def only(self, cells: Iterable[Cell]) -> "Table":
        """The table of some of the cells."""
        cells = list(cells)
        return Table({cell: self.labels[cell] for cell in cells}, {cell: self.values[cell] for cell in cells})

    def settings(self) -> list[Where]:
        """Embedding, condition and batch size of the cells, each once."""
        return list(dict.fromkeys(cell[:3] for cell in self.labels))

    def strategies(self, setting: Where, most: int) -> list[str]:
        """The strategies that were run in a setting up to `most` labels."""
        return [cell.strategy for cell, labels in self.labels.items() if cell[:3] == setting and labels[-1] >= most]

    def area(self, cell: Cell, most: int) -> NDArray[Any]:
        """Mean accuracy along the curve up to `most` labels, one value per seed."""
        values: NDArray[Any] = self.values[cell]["accuracy"][:, self.labels[cell] <= most].mean(1)
        return values

    def at(self, cell: Cell, metric: str, labels: int) -> NDArray[Any] | None:
        """One value per seed at a number of labels; None where the curve has no such point."""
        place = np.flatnonzero(self.labels[cell] == labels)
        return self.values[cell][metric][:, place[0]] if len(place) else None


def table_of(records: Mapping[Cell, Records]) -> Table:
    """The table of what `run_cells` gives."""
    return Table(
        {cell: np.asarray(found[0]["labels"]) for cell, found in records.items()},
        {cell: {name: np.asarray([r[name] for r in found]) for name in METRICS if name in found[0]}
         for cell, found in records.items()},
    )  # fmt: skip


def ranks(table: Table, most: int, embeddings: Sequence[str]) -> dict[str, Interval]:
    """Mean rank by area, 1 the best, of the strategies that all settings hold; its interval is over seeds."""
    settings = judged(table, embeddings)
    shared = shared_strategies(table, settings, most)
    areas = np.asarray([[table.area(Cell(*s, name), most) for name in shared] for s in settings])
    mean = ranked(areas).mean(0)
    found = {name: interval(values) for name, values in zip(shared, mean, strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def judged(table: Table, embeddings: Sequence[str] | None = None) -> list[Where]:
    """The settings that ranks and wins are counted in: those of several rows a round, or all where there is none."""
    settings = [s for s in table.settings() if embeddings is None or s[0] in embeddings]
    return [s for s in settings if s[2] > 1] or settings


def shared_strategies(table: Table, settings: Sequence[Where], most: int) -> list[str]:
    """The strategies that all settings hold up to `most` labels, without the twins of others."""
    names = table.strategies(settings[0], most)
    return [n for n in names if n not in TWINS and all(n in table.strategies(s, most) for s in settings)]


def wins(table: Table, most: int, setting: Where) -> tuple[list[str], NDArray[Any]]:
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


def win_counts(table: Table, most: int) -> tuple[list[str], NDArray[Any], int]:
    """In how many settings the row's strategy beats the column's: int `[s, s]`, and the number of settings."""
    settings = judged(table)
    shared = shared_strategies(table, settings, most)
    total = np.zeros((len(shared), len(shared)), int)
    for setting in settings:
        held, won = wins(table, most, setting)
        place = [held.index(name) for name in shared]
        total += won[np.ix_(place, place)]
    return shared, total, len(settings)
