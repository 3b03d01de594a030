"""Trained policies among the strategies of a comparison: their names, and what they were when their cells ran."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from metaal_jax.names import LEARNED
from metaal_jax.policies import Saved
from metaal_jax.studies import groups
from metaal_jax.studies.cells import Cell
from metaal_jax.studies.files import write
from metaal_jax.studies.folder import RunFolder, read_object
from metaal_jax.studies.pictures import Panel, rule_shares
from metaal_jax.studies.ranking import Table
from metaal_jax.studies.results import Record

# What a run was of may grow and shrink: a cell depends on its own strategy alone.
FREE = groups.FREE | {"policies", "strategies", "without", "importance", "batches"}


def short(name: str) -> str:
    """A strategy's name for pictures: of a policy's path the folder's name."""
    path = Path(name.removeprefix(LEARNED))
    return f"{LEARNED}{path.parent.name}" if name.startswith(LEARNED) and path.suffix else name


def forget_changed(folder: RunFolder, trained: Mapping[str, Saved], cells: Iterable[Cell]) -> None:
    """Forgets the cells of policies that are not what they were when these ran; those of rules stay."""
    cells = list(cells)
    file = folder.path / "policies.json"
    held = read_object(file, "its policies are then taken to be what they were") if file.exists() else {}
    for name, saved in trained.items():
        leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(saved.params))
        mark = hashlib.sha256(repr((saved.network, saved.rules, saved.plan)).encode() + leaves).hexdigest()
        if held.get(name, mark) != mark:
            for cell in cells:
                if cell.strategy.rpartition("~")[0] == name or cell.strategy == name:
                    folder.forget(cell.step())
        held[name] = mark
    write(file, json.dumps(held, indent=1) + "\n")


def followed(table: Table, name: str) -> dict[Cell, Panel]:
    """Which rules a selector followed, `(labels [rounds], shares [rounds, rules])` by cell; of others nothing."""
    return {cell: (table.labels[cell], table.values[cell]["shares"].mean(0))
            for cell in table.labels if cell.strategy == name and "shares" in table.values[cell]}  # fmt: skip


def target_shares(table: Table, trained: Mapping[str, Saved], source: str) -> list[Record]:
    """The share of each rule over a selector's runs on each target, as results."""
    return [{"strategy": name, "source": source, "target": cell.condition, "metric": "share_of_rule", "rule": rule,
             "mean": round(float(share), 4)}
            for name, saved in trained.items() for cell, (_, shares) in followed(table, name).items()
            for rule, share in zip(saved.rules, shares.mean(0), strict=True)]  # fmt: skip


def draw_shares(table: Table, trained: Mapping[str, Saved], place: Path, *, by: str) -> None:
    """A picture for each selector beside a result file, with a panel for each target or batch size.

    Args:
      table: the curves.
      trained: the policies by name.
      place: the result file.
      by: the field of a cell that tells panels apart, `condition` or `batch`.
    """
    for name, saved in trained.items():
        panels = {f"batches of {cell.batch}" if by == "batch" else cell.condition: panel
                  for cell, panel in followed(table, name).items()}  # fmt: skip
        if panels:
            plain = short(name).removeprefix(LEARNED)
            rule_shares(panels, saved.rules, place.with_name(f"{place.stem}-{plain}-rules.png"))
