"""What a strategy remembers from one `metaal suggest` to the next, as a file."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metaal_jax import files
from metaal_jax.door_inputs import Memory
from metaal_jax.files import Wrong, is_integer, need, short


def write(path: str, state: Memory, run: dict[str, Any]) -> None:
    """Writes a state with what it is of, whole or not at all; raises `ValueError` where it cannot be written."""
    held = {
        "run": run,
        "classes": list(state.classes),
        "rows": list(state.rows),
        "policy": [_packed(leaf) for leaf in jax.tree.leaves(state.policy)],
    }
    files.save(FORM, path, held)


def read(path: str, run: dict[str, Any]) -> Memory | None:
    """The state of a file, or None where there is no file.

    Raises:
      ValueError: for a file that is damaged, or of another run.
    """
    if not Path(path).exists():
        return None
    held: dict[str, Any] = files.load(FORM, os.fspath(path), Path(path))
    for name, value in run.items():
        if held["run"].get(name) != value:
            raise ValueError(f"{path} is of a run with {name} {held['run'].get(name)!r}, and this has {value!r}; give "
                             "another --state")  # fmt: skip
    return Memory(tuple(held["classes"]), tuple(held["rows"]), tuple(_unpacked(leaf) for leaf in held["policy"]))


def _parse(held: Any) -> dict[str, Any]:
    files.need_entries(held, run=dict, classes=list, rows=list, policy=list)
    classes, rows = held["classes"], held["rows"]
    need(all(isinstance(name, str) for name in classes), f"'classes' must be text, got {short(classes)}")
    need(all(is_integer(row) and row >= 0 for row in rows), f"'rows' must be row numbers, got {short(rows)}")
    need(len(set(classes)) == len(classes) and len(set(rows)) == len(rows), "'classes' or 'rows' repeats something")
    for leaf in held["policy"]:
        _unpacked(leaf)
    found: dict[str, Any] = held
    return found


FORM = files.Form("state", "metaal suggest --state", _parse)


def _packed(leaf: Any) -> str:
    content = io.BytesIO()
    np.save(content, np.asarray(leaf), allow_pickle=False)
    return base64.b64encode(content.getvalue()).decode()


def _unpacked(text: Any) -> np.ndarray:
    try:
        array: np.ndarray = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (TypeError, ValueError, EOFError) as error:
        raise Wrong(f"an array of 'policy' is damaged ({error})") from error
    return array
