"""Damages files at random: what is read is what was written, or refused in one line; never something else.

    python tests/campaigns/damaged_files.py [--times 300] [--seed 0]

Checkpoints, saved policies and learners, the cache of decoded sets and local `.npz` files are cut short, changed in a
few bytes, overwritten in blocks, lengthened, emptied, or taken away, `--times` times each kind. A damaged cache must be
found out, since it is then made anew. The last line sums up; the exit status is 1 where something else came back or
another error was raised. Gate: `tests/test_damaged_files.py` does the same a few times. About half a minute.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from metaal_jax import checkpoint, data, learners, models, policies
from metaal_jax.data.cache import read_cache, write_cache


class Kind(NamedTuple):
    """Files of one kind.

    Attributes:
      write: makes them in a folder.
      read: reads them; what it gives is compared leaf by leaf with that of the sound files.
      refused: what reading may raise instead, in one line.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    refused: tuple[type[Exception], ...]


TREE = {
    "w": np.arange(60, dtype=np.float32).reshape(12, 5),
    "deep": {"b": np.ones(3, bool), "n": np.int32(7), "none": np.zeros((0, 2), np.float32)},
}
NETWORK = models.LinearNetwork(situation=(1, 5), prior=policies.prior(margin=-0.3))
BODY = models.MLP(2, hidden=(4,))
LEARNER = learners.META_LEARNERS["maml"].make(BODY, **learners.META_LEARNERS["maml"].settings)
X, Y = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1)).astype(np.uint8), np.arange(20, dtype=np.int32) % 3


def _write_policy(folder: Path) -> None:
    shapes = jax.eval_shape(policies.learned(NETWORK, k=1).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.123, np.float32), shapes)
    policies.save(folder / "policy.json", NETWORK, params, {"way": "by hand"}, plan=3)


def _read_policy(folder: Path) -> Any:
    saved = policies.load(folder / "policy.json")
    return saved.params, str(saved.network), saved.rules, saved.plan, str(saved.about)


def _write_learner(folder: Path) -> None:
    settings = learners.META_LEARNERS["maml"].settings
    meta = jax.eval_shape(LEARNER.init, jax.random.key(0), np.zeros((1, 3), np.float32))
    meta = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.123, np.float32), meta)
    row = {"row": (3,), "centre": np.full(3, 0.1, np.float32), "scale": np.full(3, 0.7, np.float32)}
    about = {"way": "by hand"}
    trained = learners.Trained(name="maml", network=BODY, settings=settings, meta=meta, about=about, **row)
    learners.save(folder / "learner.json", trained)


def _read_learner(folder: Path) -> Any:
    found = learners.load(folder / "learner.json")
    return found.meta, found.centre, found.scale, str((found[:3], found.row, found.about))


def _read_cached(folder: Path) -> Any:
    # As `data.load` does: where there is no sound copy, the set is decoded again.
    found = read_cache((folder,), "set", rows=20, shape=(4, 4, 1), classes=3)
    return (X, Y) if found is None else found


def _read_checkpoint(folder: Path) -> Any:
    return checkpoint.restore(folder / "model", TREE), str(checkpoint.read_config(folder / "model"))


KINDS = {
    "checkpoint": Kind(
        lambda folder: checkpoint.save(folder / "model", TREE, config={"steps": 3}),
        _read_checkpoint, (checkpoint.CheckpointError,)),
    "checkpoint of any shape": Kind(
        lambda folder: checkpoint.save(folder / "model", TREE),
        lambda folder: checkpoint.load(folder / "model"), (checkpoint.CheckpointError,)),
    "policy": Kind(_write_policy, _read_policy, (ValueError,)),
    "learner": Kind(_write_learner, _read_learner, (ValueError,)),
    "cache": Kind(lambda folder: write_cache((folder,), "set", X, Y, required=True), _read_cached, ()),
    "npz": Kind(
        lambda folder: np.savez(folder / "set.npz", x=X, y=Y),
        lambda folder: tuple(data.load(folder / "set.npz", "train")), (data.DataError,)),
    "compressed npz": Kind(
        lambda folder: np.savez_compressed(folder / "set.npz", x=X, y=Y, x_test=X[:4], y_test=Y[:4]),
        lambda folder: tuple(data.load(folder / "set.npz", "test")), (data.DataError,)),
}  # fmt: skip


def damage(draw: random.Random, content: bytes) -> bytes | None:
    """Another content; None for a file that is taken away."""
    way, size = draw.randrange(7), len(content)
    place = draw.randrange(size) if size else 0
    if way == 0:
        return content[:place]
    if way == 1:
        return None
    if way == 2:
        return content + draw.randbytes(draw.randint(1, 20))
    changed = bytearray(content)
    if way == 3:
        changed[place : place + draw.randint(1, 64)] = bytes(min(draw.randint(1, 64), size - place))
    elif way == 4:
        changed[place:place] = draw.randbytes(draw.randint(1, 8))
    else:
        for _ in range(draw.choice((1, 1, 2, 8))):
            if size:
                changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _same(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(p).dtype == np.asarray(q).dtype and np.array_equal(p, q) for p, q in pairs)


def campaign(folder: Path, name: str, *, times: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Damages files of one kind; gives how often they were `refused`, `the same`, `wrong`, and what was wrong."""
    kind, draw = KINDS[name], random.Random(f"{name} {seed}")
    sound = folder / "sound"
    sound.mkdir(parents=True)
    kind.write(sound)
    wanted = kind.read(sound)
    files = sorted(file.relative_to(sound) for file in sound.rglob("*") if file.is_file())
    counts, wrong = {"refused": 0, "the same": 0, "wrong": 0}, []
    for number in range(times):
        copy = folder / "copy"
        shutil.copytree(sound, copy)
        file = copy / draw.choice(files)
        content = damage(draw, file.read_bytes())
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = kind.read(copy)
            outcome = "the same" if _same(found, wanted) else "wrong"
            said = "something else was read"
        except kind.refused as error:
            said = str(error)
            outcome = "refused" if "\n" not in said and str(copy) in said else "wrong"
        except Exception as error:
            outcome, said = "wrong", f"{type(error).__name__}: {error}"
        counts[outcome] += 1
        if outcome == "wrong":
            wrong.append(f"{name}, number {number}, {file.relative_to(copy)}: {said}")
        shutil.rmtree(copy)
    return counts, wrong


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, total, failures = (
        Path(tempfile.mkdtemp(prefix="damaged-")),
        dict.fromkeys(("refused", "the same", "wrong"), 0),
        0,
    )
    try:
        for place, name in enumerate(KINDS):
            counts, wrong = campaign(folder / str(place), name, times=options.times, seed=options.seed)
            print(f"{name}: {counts}")
            for line in wrong:
                print(f"  {line}", file=sys.stderr)
            failures += len(wrong)
            total = {outcome: total[outcome] + counts[outcome] for outcome in total}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{sum(total.values())} damaged files: {total['refused']} refused in one line, {total['the same']} read as "
        f"they were written or made anew, {total['wrong']} wrong"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
