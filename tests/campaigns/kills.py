"""Kills a program again and again while it saves a checkpoint: there is always a whole one.

    python tests/campaigns/kills.py [--kills 100] [--seed 0]

Each child reads what the one before it left, checks that all of it was written by one save, and saves on until it is
killed by SIGKILL at a random moment. In every other child the moves take longer, so that kills fall between them, too.
The last line sums up; the exit status is 1 where a checkpoint was lost. `tests/test_checkpoint.py` dies at every single
step once; here it is the system that decides. About a minute.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import orbax.checkpoint  # noqa: F401  (children are forked and need not import it again)

from metaal_jax import checkpoint


def make_tree(number: int) -> dict:
    """A small tree all of whose leaves say which save wrote them."""
    return {"w": np.full((50, 40), number, np.float32), "b": {"x": np.full(7, number), "none": np.zeros((0, 3))}}


def state_of(path: Path) -> str:
    """Where the checkpoint that reading finds stands."""
    return "in place" if path.is_dir() else "taken back"


def child(path: Path, report: int, slow: bool) -> None:
    """Reads and reports what is there, then saves without end."""
    found = {"state": state_of(path), "number": -1}
    try:
        if checkpoint.exists(path):
            number = found["number"] = int(checkpoint.read_config(path))
            tree = checkpoint.restore(path, make_tree(0))
            whole = all((a == b).all() for a, b in zip(_leaves(tree), _leaves(make_tree(number)), strict=True))
            found["whole"] = bool(whole)
        else:
            found["whole"] = False
    except Exception as error:
        found |= {"whole": False, "error": str(error)}
    os.write(report, (json.dumps(found) + "\n").encode())
    if slow:
        replace = os.replace

        def late(*arguments: str) -> None:
            time.sleep(0.03)
            replace(*arguments)
            time.sleep(0.03)

        os.replace = late  # type: ignore[assignment]
    number = found["number"]
    while True:
        number += 1
        checkpoint.save(path, make_tree(number), config=number)
        os.write(report, b".")


def _leaves(tree: dict) -> list[np.ndarray]:
    return [tree["w"], tree["b"]["x"], tree["b"]["none"]]


def campaign(folder: Path, *, kills: int, seed: int) -> dict[str, int]:
    """Counts of what the children found after each kill: `in place`, `taken back` and `lost`."""
    draw = random.Random(seed)
    path = folder / "model"
    counts = {"in place": 0, "taken back": 0, "lost": 0}
    for number in range(kills + 1):
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of forks; nothing here has used it yet
            process = os.fork()
        if not process:
            os.close(read)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            child(path, write, slow=number % 2 == 1)
        os.close(write)
        with os.fdopen(read, "rb", buffering=0) as reports:
            found = json.loads(reports.readline())
            # The first child is killed once there is a checkpoint to lose; the others at a random moment.
            if number == 0:
                reports.read(1)
            time.sleep(draw.uniform(0.0, 0.25))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if number:
            counts[found["state"] if found["whole"] else "lost"] += 1
            if not found["whole"]:
                print(found, file=sys.stderr)
    return counts


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        counts = campaign(folder, kills=options.kills, seed=options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{options.kills} kills during checkpoint.save: {counts['in place'] + counts['taken back']} times a whole "
        f"checkpoint was found ({counts['in place']} in place, {counts['taken back']} taken back from a save that was "
        f"under way), {counts['lost']} lost"
    )
    return 1 if counts["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
