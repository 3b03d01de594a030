"""Result files: one small JSON file a run, all of one form, with one writer and one reader."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jax

from metaal_jax.studies.files import write
from metaal_jax.studies.statistics import finite
from metaal_jax.studies.usage import UsageError

Record = dict[str, Any]
HEAD: dict[str, type | tuple[type, ...]] = {
    "command": str, "date": str, "device": str, "versions": dict, "seconds": (int, float), "config": dict,
}  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and device, as they stand in every result."""
    packages = ("metaal_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    device = jax.devices()[0]
    kind = f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind
    return {"device": f"{kind} x {jax.device_count()}", "versions": versions}


def write_results(
    path: Path,
    *,
    command: str,
    environment: Mapping[str, Any],
    seconds: float,
    config: Mapping[str, Any],
    rows: Iterable[Record],
    paired: Iterable[Record],
) -> None:
    """One small JSON file in the form shared by all results, one line a row; `null` for what is not finite.

    The interval of a single seed is infinite, and JSON has no word for that.
    """
    head = {"command": command, "date": date.today().isoformat(), **environment, "seconds": round(seconds, 1),
            "config": config}  # fmt: skip
    parts = [f"{json.dumps(name)}: {json.dumps(_plain(value), allow_nan=False)}" for name, value in head.items()]
    for name, values in (("rows", rows), ("paired", paired)):
        body = ",\n  ".join(json.dumps(_plain(value), allow_nan=False) for value in values)
        parts.append(f"{json.dumps(name)}: [\n  {body}\n ]" if body else f"{json.dumps(name)}: []")
    write(path, "{" + ",\n ".join(parts) + "}\n")


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote, checked.

    Raises:
      UsageError: for a file that is not there, is no JSON, or has another form, saying where.
    """
    try:
        held: dict[str, Any] = json.loads(path.read_text(), parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is no result file: {error}; take it from git again, or run its script") from None

    def check(right: bool, what: str) -> None:
        if not right:
            raise UsageError(f"{path} is no result file: {what}; take it from git again, or run its script")

    check(isinstance(held, dict), f"it holds {type(held).__name__}, not an object")
    for name, kind in HEAD.items():
        check(name in held, f"it lacks {name!r}")
        check(isinstance(held[name], kind) and not isinstance(held[name], bool),
              f"its {name!r} is {type(held[name]).__name__}")  # fmt: skip
    for name, needed in (("rows", ("metric",)), ("paired", ("a", "b", "metric"))):
        check(isinstance(held.get(name), list), f"{name!r} is no list")
        for number, row in enumerate(held[name]):
            check(isinstance(row, dict) and row.keys() >= set(needed), f"{name}[{number}] lacks one of {needed}")
    return held


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _plain(value: Any) -> Any:
    """What JSON holds, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return finite(value) if isinstance(value, float) else value
