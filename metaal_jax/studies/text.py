"""How reports write tables and figures as text."""

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from metaal_jax.metrics import Interval, interval
from metaal_jax.studies.results import Record
from metaal_jax.studies.usage import need


def plain(lines: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """A table for the terminal and `table.txt`: names to the left, figures to the right."""
    return _tabulate(lines, header, stralign="right", colalign=("left",))


def markdown(lines: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """A table for a document."""
    return _tabulate(lines, header, tablefmt="github")


def _tabulate(lines: Iterable[Sequence[str]], header: Sequence[str], **options: Any) -> str:
    lines = list(lines)
    if not lines:
        options.pop("colalign", None)
    return str(need("tabulate", extra="experiments").tabulate(lines, header, disable_numparse=True, **options))


def points(values: NDArray[Any] | Interval, digits: int = 2) -> str:
    """Shares in percent with their interval: `89.41 ± 0.32`."""
    found = values if isinstance(values, Interval) else interval(values)
    return f"{100 * found.mean:.{digits}f} ± {100 * (found.high - found.mean):.{digits}f}"


def row_points(row: Record | None, digits: int = 2, absent: str = "") -> str:
    """The same of a result row."""
    return absent if row is None else f"{100 * row['mean']:.{digits}f} ± {50 * (row['high'] - row['low']):.{digits}f}"


def row_difference(pair: Record | None, digits: int = 2) -> str:
    """A paired difference of the results, in points: `+0.31 [+0.02, +0.60]`."""
    if pair is None:
        return ""
    return " ".join([f"{100 * pair['difference']:+.{digits}f}",
                     f"[{100 * pair['low']:+.{digits}f}, {100 * pair['high']:+.{digits}f}]"])  # fmt: skip
