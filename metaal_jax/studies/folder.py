"""Run folders: what an experiment leaves on disk, and how a killed one goes on.

A run is a sequence of named steps. Each finished step is one small file, written whole or not at all, and the metrics
are those files strung together in the order of the steps: a run that was killed and resumed ends with the same bytes
as one that was not. Times are kept apart, in `times.jsonl`, because they never repeat (but for those of
`learn_policy.py`, whose length is a matter of time).
"""

import dataclasses
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaal_jax.studies.files import write
from metaal_jax.studies.results import environment
from metaal_jax.studies.usage import UsageError, need

Records = list[dict[str, Any]]


class RunFolder:
    """The folder of one run.

    Attributes:
      path: the folder. It holds `config.json`, `environment.json`, `steps/`, `metrics.jsonl`, `times.jsonl`,
        `tensorboard/` and what the experiment adds.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any, *, resume: bool, free: frozenset[str] = frozenset()):
        """Opens a new folder, or one of the same config to go on with.

        Args:
          path: the folder.
          config: a dataclass; `free` fields may differ between a run and its continuation.
          resume: go on with what is there.
          free: names of fields that do not decide the results.

        Raises:
          UsageError: where the folder holds a run and `resume` is not set, or a run of another config.
        """
        self.path = Path(path)
        wanted = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(config))).items() if k not in free}
        file = self.path / "config.json"
        if file.exists():
            try:
                held = json.loads(file.read_text())
            except ValueError:
                raise UsageError(f"{file} is damaged; delete the folder or give another --out") from None
            differ = [k for k in sorted({*held, *wanted}) if held.get(k) != wanted.get(k)]
            if differ:
                k = differ[0]
                raise UsageError(
                    f"{self.path} holds a run with {k}={held.get(k)!r}, asked for is {wanted.get(k)!r}; "
                    "give another --out or delete the folder"
                )
            if not resume:
                raise UsageError(f"{self.path} already holds this run; go on with --resume or give another --out")
        elif self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; give another --out")
        elif self.path.exists() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and holds no run; give another --out")
        (self.path / "steps").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        write(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
        write(file, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
        self._records: dict[str, Records] = {}
        self._board: Any = None

    def step(self, name: str, compute: Callable[[], Records], *, again: bool = False) -> Records:
        """The records of a step: read if it is finished (unless `again`), else computed and kept."""
        file = self._file(name)
        if file.exists() and not again:
            records = [json.loads(line) for line in file.read_text().splitlines()]
        else:
            start = time.perf_counter()
            records = compute()
            write(file, lines(records))
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

    def _file(self, name: str) -> Path:
        # A name may hold a path, that of a trained policy.
        plain = re.sub(r"[^A-Za-z0-9_.+~-]", "_", name)
        mark = "" if plain == name else f"-{zlib.crc32(name.encode()):08x}"
        return self.path / "steps" / f"{plain}{mark}.jsonl"

    def seconds(self) -> float:
        """Seconds that all finished steps took, over all continuations of the run."""
        file = self.path / "times.jsonl"
        if not file.exists():
            return 0.0
        return sum(float(value) for value in re.findall(r'"seconds": ([\d.]+)}', file.read_text()))

    def board(self, tag: str, value: float, at: int) -> None:
        """One point of a TensorBoard curve; a resumed run draws all of them again."""
        if self._board is None:
            self._board = need("tensorboardX", extra="experiments").SummaryWriter(str(self.path / "tensorboard"))
        self._board.add_scalar(tag, value, at)
        self._board.flush()

    def close(self) -> None:
        """Writes what the board still holds back, and closes it."""
        if self._board is not None:
            self._board.close()
            self._board = None


def round_to(value: Any) -> float:
    """A float with the digits that float32 has."""
    return float(f"{float(value):.7g}")


def lines(records: Records) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)
