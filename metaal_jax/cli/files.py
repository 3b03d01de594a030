"""Files of rows, and of labels, as people have them; what is wrong is said with file, line and column."""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaal_jax.studies.usage import UsageError, warn

DELIMITERS = ",;\t|"


class Rows(NamedTuple):
    """Rows of numbers, and the columns of text beside them.

    Attributes:
      x: numbers `[n, ...]`.
      ids: the names of the rows, all different; None where they have none.
      columns: other columns by name, as text, `""` where there is nothing.
    """

    x: np.ndarray
    ids: list[str] | None
    columns: dict[str, list[str]]

    def name(self, row: int) -> str:
        """What a row is called."""
        return str(row) if self.ids is None else self.ids[row]


class Sheet(NamedTuple):
    """The cells of a `.csv`.

    Attributes:
      path: of the file.
      names: of the columns; None where the file has none.
      cells: text, a list a row.
      lines: the line of each row in the file.
    """

    path: str
    names: list[str] | None
    cells: list[list[str]]
    lines: list[int]

    def place(self, column: str, option: str) -> int:
        """The number of the column that an option names."""
        known = self.names or [str(number + 1) for number in range(len(self.cells[0]))]
        if known.count(column) == 1:
            return known.index(column)
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        wrong = "several columns" if column in known else "no column"
        raise UsageError(f"{self.path} has {wrong} {column!r}, which {option} asks for; its columns are {shown}"
                         + ("" if self.names else " (by number, as its first line holds no names)"))  # fmt: skip

    def where(self, row: int, place: int) -> str:
        """A cell in words."""
        return f"{self.path} line {self.lines[row]}, column {self.names[place] if self.names else place + 1}"


def read_rows(options: argparse.Namespace, path: str | None = None) -> Rows:
    """The rows of a file, by the options `drop`, `header` and, where there are any, `id`, `label_column` and so on.

    Raises:
      UsageError: naming file, line and column.
    """
    path = options.file if path is None else path
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    asked = {
        option: name
        for option in ("id", "label_column", "group_column")
        if (name := getattr(options, option, None)) is not None
    }
    if len(set(asked.values())) < len(asked):
        raise UsageError(f"{' and '.join(map(_option, asked))} must be different columns")
    kind = Path(path).suffix.lower()
    if kind == ".csv":
        found = _from_sheet(read_sheet(path, options.header), asked, options.drop)
    elif kind in (".npy", ".npz"):
        if options.drop or options.header:
            raise UsageError(f"{path}: {'--drop' if options.drop else '--header'} is for .csv files")
        found = _from_arrays(path, asked)
    else:
        raise UsageError(f"{path}: rows are read from .npy, .npz and .csv files; the name must end so")
    ids = found.columns.pop(asked["id"]) if "id" in asked else None
    if ids is not None:
        first: dict[str, int] = {}
        for row, name in enumerate(ids):
            if not name or first.setdefault(name, row) != row:
                wrong = f"is called {name!r} like row {first[name]}" if name else "has no name"
                raise UsageError(f"{path}: row {row} {wrong} in --id {asked['id']}; names must all be different")
    return Rows(found.x, ids, found.columns)


def known_labels(options: argparse.Namespace, rows: Rows) -> dict[int, str]:
    """Labels by row, from `--labels` or `--label-column`; none without."""
    if options.label_column is not None:
        return {row: label for row, label in enumerate(rows.columns[options.label_column]) if label}
    return {} if options.labels is None else _read_labels(options.labels, rows, options.id)


def labelled(rows: Rows, column: str, path: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rows that have a label, their labels, and which they are; says how many are left out."""
    keep = np.asarray([bool(label) for label in rows.columns[column]])
    if not keep.any():
        raise UsageError(f"{path}: column {column} holds no label")
    if not keep.all():
        warn(f"{path}: {int((~keep).sum())} rows without a label are left out")
    return rows.x[keep], [label for label in rows.columns[column] if label], np.flatnonzero(keep)


def read_sheet(path: str, header: str | None = None, *, names: Sequence[str] = ()) -> Sheet:
    """The cells of a `.csv`; delimiter and header are found.

    Args:
      path: of the file.
      header: `"yes"`, `"no"`, or None to see.
      names: a first line that begins with one of these is a header, and no other; for files whose cells are text.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=first.count), strict=True)
    cells: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                cells.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num}: {error}") from None
    if not cells:
        raise UsageError(f"{path} is empty")
    for row, line in zip(cells, lines, strict=True):
        if len(row) != len(cells[0]):
            raise UsageError(f"{path} line {line} has {len(row)} cells, line {lines[0]} has {len(cells[0])}")
    named = cells[0][0].lower() in names if names else _is_header(path, cells, lines[0], header)
    return Sheet(path, cells[0] if named else None, cells[named:], lines[named:])


def _is_header(path: str, cells: list[list[str]], line: int, header: str | None) -> bool:
    """Whether the first line holds names: it does if none of them is a number."""
    if header is not None:
        return header == "yes"
    numbers = [cell for cell in cells[0] if _is_number(cell)]
    if not numbers:
        return True
    mixed = len(numbers) < len(cells[0])
    counted = any(numbers == [str(start + i) for i in range(len(numbers))] for start in (0, 1))
    if counted and len(numbers) >= 3 - mixed:  # columns are often named so
        raise UsageError(f"{path} line {line} could be names or a row; say --header yes or --header no")
    if len(cells) > 1 and any(
        _is_number(below) and not _is_number(above) for above, below in zip(*cells[:2], strict=True)
    ):
        raise UsageError(f"{path} line {line} holds names and numbers; say --header yes or --header no")
    return False


def _from_sheet(sheet: Sheet, asked: dict[str, str], drop: Sequence[str]) -> Rows:
    if not sheet.cells:
        raise UsageError(f"{sheet.path} holds no rows, only names of columns")
    taken = {name: sheet.place(name, _option(option)) for option, name in asked.items()}
    dropped = {sheet.place(name, "--drop") for name in drop}
    if twice := next((name for name, place in taken.items() if place in dropped), None):
        raise UsageError(f"column {twice!r} is asked for and given to --drop")
    keep = [place for place in range(len(sheet.cells[0])) if place not in dropped | set(taken.values())]
    if not keep:
        raise UsageError(f"{sheet.path}: no column of numbers is left")
    x = np.empty((len(sheet.cells), len(keep)))
    for row, cells in enumerate(sheet.cells):
        try:
            x[row] = [float(cells[place]) for place in keep]
        except ValueError:
            raise _no_number(sheet, row, next(p for p in keep if not _is_number(cells[p]))) from None
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise UsageError(f"{sheet.where(row, keep[column])}: {sheet.cells[row][keep[column]]!r} is no finite number; "
                         "fill it in, or leave out the row, or the column with --drop")  # fmt: skip
    return Rows(x, None, {name: [cells[place] for cells in sheet.cells] for name, place in taken.items()})


def _no_number(sheet: Sheet, row: int, place: int) -> UsageError:
    cell, name = sheet.cells[row][place], sheet.names[place] if sheet.names else str(place + 1)
    where = sheet.where(row, place)
    if not cell:
        return UsageError(f"{where} is empty; fill it in, or leave out the row, or the column with --drop {name!r}")
    if not any(_is_number(cells[place]) for cells in sheet.cells):
        return UsageError(f"{where}: {cell[:40]!r} is text; leave the column out with --drop {name!r}, name the rows "
                          f"by it with --id {name!r}, or turn it into numbers")  # fmt: skip
    hint = "write decimals with a point" if _is_number(cell.replace(",", ".")) else "correct it"
    return UsageError(f"{where}: {cell[:40]!r} is no number; {hint}, or leave the column out with --drop {name!r}")


def _from_arrays(path: str, asked: dict[str, str]) -> Rows:
    try:
        with open(path, "rb") as raw:  # np.load leaves a damaged file open
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, np.ndarray):
                arrays, held = {"x": found}, "one array"
            else:
                with found as file:
                    held = ", ".join(file.files) or "nothing"
                    arrays = {name: file[name] for name in ("x", *asked.values()) if name in file.files}
    except Exception as error:  # a damaged archive raises nearly anything
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {reason}); write it with np.save or np.savez "
                         "from plain arrays of numbers") from None  # fmt: skip
    for option, name in {"": "x", **asked}.items():
        if name not in arrays:
            wanted = f"{_option(option)} {name}" if option else "rows as an array x"
            raise UsageError(f"{path} holds {held}, and no {wanted}")
    x = arrays.pop("x") if "x" not in asked.values() else arrays["x"]
    if x.ndim < 2 or not len(x):
        raise UsageError(f"{path}: x must be rows [n, d] or images [n, h, w(, c)], got shape {list(x.shape)}")
    for name, array in arrays.items():
        if array.shape != x.shape[:1]:
            raise UsageError(f"{path}: the array {name} must have one entry for each of the {len(x)} rows of x, got "
                             f"shape {list(array.shape)}")  # fmt: skip
    return Rows(x, None, {name: _as_text(array) for name, array in arrays.items()})


def _as_text(array: np.ndarray) -> list[str]:
    """Entries as text, NaN as none."""
    return ["" if value != value else str(value).strip() for value in array.tolist()]


def _read_labels(path: str, rows: Rows, id_column: str | None) -> dict[int, str]:
    """The labels of a file of lines `row,label`."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    sheet = read_sheet(path, names=("row", "id", *([] if id_column is None else [id_column.lower()])))
    if sheet.cells and len(sheet.cells[0]) != 2:
        raise UsageError(f"{path} line {sheet.lines[0]}: labels are lines of two cells, row,label, got "
                         f"{len(sheet.cells[0])}")  # fmt: skip
    number = {rows.name(row): row for row in range(len(rows.x))}
    known: dict[int, str] = {}
    seen: dict[int, int] = {}
    for (name, label), line in zip(sheet.cells, sheet.lines, strict=True):
        if name not in number:
            there = f"rows are 0 to {len(rows.x) - 1}" if rows.ids is None else f"--id {id_column} has no such name"
            raise UsageError(f"{path} line {line}, column row: no row {name!r}; {there}")
        row = number[name]
        if label and known.get(row, label) != label:
            raise UsageError(f"{path} line {line}, column label: row {name} is {label!r} here and {known[row]!r} in "
                             f"line {seen[row]}; keep one of them")  # fmt: skip
        if label:
            known[row], seen[row] = label, line
    return known


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
