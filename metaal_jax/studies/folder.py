"""Run folders: what an experiment leaves on disk, and how a killed one goes on.

A run is a sequence of named steps. Each finished step is one small file, written whole or not at all, and the metrics
are those files strung together in the order of the steps: a run that was killed and resumed ends with the same bytes
as one that was not. Times are kept apart, in `times.jsonl`, because they never repeat (but for those of
`learn_policy.py`, whose length is a matter of time).

The first line of a step's file says which step of which run it is, how many records follow and their checksum. All
files are checked when a run goes on; what is torn or of another run is refused by name, and may be deleted. Steps of
folders from before there was such a line are taken as far as their lines are JSON, once, and given one.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metaal_jax.studies.files import Lock, take_lock, why_not_writable, write
from metaal_jax.studies.options import flat
from metaal_jax.studies.results import environment
from metaal_jax.studies.usage import UsageError, need, warn

Records = list[dict[str, Any]]
MARK = "$run"  # in config.json beside the options: what the run's steps are known by
FILES = ("config.json", "environment.json", "metrics.jsonl", "times.jsonl", ".lock")
FOLDERS = ("steps", "tensorboard")


class RunFolder:
    """The folder of one run.

    Attributes:
      path: the folder. It holds `config.json`, `environment.json`, `steps/`, `metrics.jsonl`, `times.jsonl`,
        `tensorboard/` and what the experiment adds.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any, *, resume: bool, free: frozenset[str] = frozenset()):
        """Opens a new folder, or one of the same config to go on with.

        An option that the held config lacks is newer than the run, and had its default. One that the config of today
        lacks may be there only as None, that is not given. A folder in which no step was finished is free for any
        config. A run that goes on with other versions or on another device says so on stderr; `environment.json` keeps
        the earlier ones.

        Args:
          path: the folder.
          config: a dataclass, see `options.flat`; `free` options may differ between a run and its continuation.
          resume: go on with what is there.
          free: names of options that do not decide the results.

        Raises:
          UsageError: where the folder cannot be made or is another process's, holds a run and `resume` is not set, a
            run of another config, something that is no run, or a damaged file; the message names it.
        """
        self.path = Path(path)
        self._records: dict[str, Records] = {}
        self._board: Any = None
        wanted = _json_of(config, free)
        self._look()
        self._lock = self._take()
        started = self._look()
        if started:
            held = self._held_config()
            differ = _differences(held, wanted, _defaults(config), free)
            if differ:
                raise UsageError(f"{self.path} holds a run with {differ}; give another --out or delete the folder")
            if not resume:
                raise UsageError(f"{self.path} already holds this run; go on with --resume or give another --out")
            self._mark = held.get(MARK) or _mark_of(wanted)
            self._check_steps(old=MARK not in held)
        else:
            self._mark = _mark_of(wanted)
            for name in ("times.jsonl", "metrics.jsonl", "environment.json"):
                (self.path / name).unlink(missing_ok=True)
        write(self.path / "config.json", json.dumps({**wanted, MARK: self._mark}, indent=1, sort_keys=True) + "\n")
        self._note_environment(started)
        (self.path / "steps").mkdir(exist_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def step(self, name: str, compute: Callable[[], Records], *, again: bool = False) -> Records:
        """The records of a step: read if it is finished (unless `again`), else computed and kept."""
        file = self._file(name)
        if file.exists() and not again:
            records = self._read(file)
        else:
            start = time.perf_counter()
            records = compute()
            self._write(file, lines(records))
            with open(self.path / "times.jsonl", "a") as times:
                times.write(json.dumps({"step": name, "seconds": round(time.perf_counter() - start, 3)}) + "\n")
        self._records[name] = records
        write(self.path / "metrics.jsonl", "".join(lines(part) for part in self._records.values()))
        return records

    def done(self, name: str) -> bool:
        """Whether a step is finished."""
        return self._file(name).exists()

    def forget(self, name: str) -> None:
        """Drops a step, so that it is computed again."""
        self._file(name).unlink(missing_ok=True)

    def seconds(self) -> float:
        """Seconds that all finished steps took, over all continuations of the run."""
        file = self.path / "times.jsonl"
        if not file.exists():
            return 0.0
        # A line may be torn, by a kill in the middle of it.
        found = re.findall(r'"seconds": (\d+(?:\.\d+)?)}', file.read_text(errors="replace"))
        return sum(float(value) for value in found)

    def board(self, tag: str, value: float, at: int) -> None:
        """One point of a TensorBoard curve; a resumed run draws all of them again."""
        if self._board is None:
            writer = need("tensorboardX", extra="experiments").SummaryWriter
            self._board = writer(str(self.path / "tensorboard"))
        self._board.add_scalar(tag, value, at)
        self._board.flush()

    def close(self) -> None:
        """Writes what the board still holds back, and closes it."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _file(self, name: str) -> Path:
        # A name may hold a path, that of a trained policy.
        plain = re.sub(r"[^A-Za-z0-9_.+~-]", "_", name)
        mark = "" if plain == name else f"-{zlib.crc32(name.encode()):08x}"
        return self.path / "steps" / f"{plain}{mark}.jsonl"

    def _write(self, file: Path, body: str) -> None:
        head = {"step": file.stem, "run": self._mark, "records": body.count("\n"), "crc32": _checksum(body.encode())}
        write(file, json.dumps(head) + "\n" + body)

    def _read(self, file: Path) -> Records:
        """The records of a step's file, checked."""
        with _damage(file):
            head, _, body = file.read_bytes().partition(b"\n")
            said = _object(head)
            if not said.keys() >= {"step", "run", "records", "crc32"}:
                raise ValueError("its first line is not that of a step")
            if (said["step"], said["run"]) != (file.stem, self._mark):
                whose = "this" if said["run"] == self._mark else "another"
                raise ValueError(f"it is the step {said['step']} of {whose} run")
            if said["records"] != body.count(b"\n") or said["crc32"] != _checksum(body):
                raise ValueError("its checksum is another")
            return [_object(line) for line in body.splitlines()]

    def _check_steps(self, *, old: bool) -> None:
        """Checks all steps; those of an `old` folder, which have no first line yet, get one."""
        for file in sorted((self.path / "steps").glob("*.jsonl")):
            with _damage(file):
                content = file.read_bytes()
                if old and not content.startswith(b'{"step": '):
                    if not content.endswith(b"\n"):
                        raise ValueError("it is empty" if not content else "its last line is torn")
                    for line in content.splitlines():
                        _object(line)
                    self._write(file, content.decode())
            self._read(file)

    def _look(self) -> bool:
        """Whether steps were finished in the folder; refuses what is no folder of a run, and touches nothing."""
        if why := why_not_writable(self.path, folder=True):
            raise UsageError(f"{why}; give another --out")
        for name in (*FILES, *FOLDERS):
            place = self.path / name
            if place.exists() and place.is_dir() != (name in FOLDERS):
                kinds = ("a file", "a folder") if name in FOLDERS else ("a folder", "a file")
                raise UsageError(f"{place} is {kinds[0]}, where a run keeps {kinds[1]}; move it away or give another "
                                 "--out")  # fmt: skip
        started = any((self.path / "steps").glob("*.jsonl"))
        if started and not (self.path / "config.json").exists():
            raise UsageError(f"{self.path} is not empty: it holds steps, and no config.json that says of what; give "
                             "another --out or delete the folder")  # fmt: skip
        if self.path.exists() and not started:
            known = {*FILES, *FOLDERS, "config.json.new", "environment.json.new"}
            if {file.name for file in self.path.iterdir()} - known and MARK not in self._held_config():
                raise UsageError(f"{self.path} is not empty and holds no run; give another --out")
        return started

    def _take(self) -> Lock | None:
        """Makes the folder where there is none, and keeps other processes out of it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.path / ".lock")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise UsageError(f"{error.filename or self.path} cannot be made: {error.strerror}; give another "
                                 "--out") from None  # fmt: skip
            warn(f"{self.path} cannot be locked ({error.strerror}): see to it that one process at a time runs there")
            return None
        if isinstance(lock, str):
            raise UsageError(f"{self.path} is in use by {lock}; wait for its end or give another --out")
        return lock

    def _held_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            return _object(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is damaged ({_reason(error)}); delete the folder or give another --out") from None

    def _note_environment(self, started: bool) -> None:
        """Keeps the versions and the device, and those from before; says where they are others."""
        file, now = self.path / "environment.json", environment()
        earlier: list[Any] = []
        if file.exists():
            with _damage(file, then="the run then goes on without its earlier versions"):
                held = _object(file.read_bytes())
                if not isinstance(held.get("versions"), dict) or not isinstance(held.get("earlier", []), list):
                    raise ValueError("it holds no versions")
            last = {"device": held.get("device"), "versions": held["versions"]}
            earlier = held.get("earlier", [])
            if last != now and started:
                before, after = ({**one["versions"], "device": one["device"]} for one in (last, now))
                changed = [f"{name} {before.get(name)} then, {after.get(name)} now"
                           for name in sorted({*before, *after}) if before.get(name) != after.get(name)]  # fmt: skip
                warn(f"{self.path} goes on in another environment, its last digits may differ: {'; '.join(changed)}")
                earlier = [one for one in [*earlier, last] if one != now]
        write(file, json.dumps({**now, **({"earlier": earlier} if earlier else {})}, indent=1) + "\n")


def _json_of(config: Any, free: frozenset[str]) -> dict[str, Any]:
    return {k: v for k, v in json.loads(json.dumps(flat(config))).items() if k not in free}


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of a config's options, as JSON holds them, of those that have one."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = dataclasses.MISSING
        if dataclasses.is_dataclass(inner := getattr(config, field.name)):
            found |= _defaults(inner) if value is dataclasses.MISSING else flat(value)
        elif value is not dataclasses.MISSING:
            found[field.name] = value
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _differences(
    held: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any], free: frozenset[str]
) -> str | None:
    """The first option that a held config and a wanted one differ in, in words."""
    for k in sorted({*held, *wanted} - free - {MARK}):
        if k not in wanted:
            if held[k] is not None:
                return f"{k}={held[k]!r}, an option that there is no more"
            continue
        was = held[k] if k in held else defaults.get(k)
        if was != wanted[k]:
            return f"{k}={was!r}, asked for is {wanted[k]!r}"
    return None


def _mark_of(wanted: Mapping[str, Any]) -> str:
    return _checksum(json.dumps(wanted, sort_keys=True).encode())


def _checksum(body: bytes) -> str:
    return f"{zlib.crc32(body):08x}"


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds something else than was written")
    return found


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@contextlib.contextmanager
def _damage(file: Path, then: str = "--resume computes it again") -> Iterator[None]:
    """What is wrong with a file in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{file} is damaged ({_reason(error)}); delete it, {then}") from None


def read_object(file: Path, then: str) -> dict[str, Any]:
    """The JSON object in a file; `then` says what follows once a damaged one is deleted.

    Raises:
      UsageError: for a file that cannot be read or holds something else.
    """
    with _damage(file, then):
        return _object(file.read_bytes())


def round_to(value: Any) -> float:
    """A float with the digits that float32 has."""
    return float(f"{float(value):.7g}")


def lines(records: Records) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)
