"""Checkpoints with Orbax: pytrees of arrays, saved atomically and restored into a known structure."""

import errno
import glob
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metaal_jax.base import PyTree

_CONTENTS = "contents.json"  # what the checkpoint holds and the checksums of its files
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)))


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another structure; the message is one line and says what to do."""


def save(path: str | os.PathLike[str], tree: PyTree, *, config: Any = None) -> None:
    """Saves a pytree of arrays to the folder `path`, replacing what is there once the new one is whole.

    Typed keys of the default generator are saved too, so that a whole `ActiveState` can be.

    Args:
      path: the folder.
      tree: what to save.
      config: what made it, anything that JSON can hold; `read_config` gives it back.

    Raises:
      CheckpointError: where it cannot be written, say because the disk is full; what was there before is kept.
      TypeError: for a config that JSON cannot hold; nothing is written.
    """
    import orbax.checkpoint as ocp

    given = json.loads(json.dumps(config))
    target = Path(path).absolute()
    fresh = target.with_name(target.name + ".new")
    arrays = jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf), tree)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + 2**18
    try:
        for left_over in target.parent.glob(glob.escape(fresh.name) + "*"):  # of a killed run
            shutil.rmtree(left_over, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Asked first, since threads below Orbax print tracebacks of their own when a write fails.
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(fresh, arrays)
        contents = {"config": given, "leaves": _leaves(arrays), "files": _checksums(fresh)}
        (fresh / _CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")
    # The storage below Orbax reports a full disk as a ValueError with the system's reason somewhere in it.
    except Exception as error:
        reason = next((text for text in _FULL if text in str(error)), _one_line(error))
        raise CheckpointError(
            f"the checkpoint {target} cannot be written ({reason}); make room or give another folder"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def restore(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Restores a pytree saved by `save`.

    Args:
      path: the folder.
      like: a pytree of the same structure, shapes and dtypes; only these are read, `jax.eval_shape` gives one.

    Returns:
      The saved tree in the structure of `like`, with NumPy leaves and typed keys.

    Raises:
      CheckpointError: for a missing, truncated or otherwise damaged checkpoint, or one of another structure.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}; give the folder that a run wrote, or train again")
    stored = jax.tree.map(lambda leaf: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf, like)
    _check(folder, stored)
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder, shapes)
        return jax.tree.map(lambda leaf, want: jax.random.wrap_key_data(leaf) if _is_key(want) else leaf, tree, like)
    # Orbax and the storage below it raise a different type for every kind of damage.
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged or of another model ({_one_line(error)}); delete it to compute it "
            "again, or give another folder"
        ) from error


def load(path: str | os.PathLike[str]) -> Any:
    """Restores a checkpoint of nested dictionaries, such as meta-parameters, whatever its shapes are.

    Raises:
      CheckpointError: as `restore`; or a checkpoint without its list of contents.
    """
    folder = Path(path).absolute()
    read_config(folder)
    if not (folder / _CONTENTS).exists():
        raise CheckpointError(f"the checkpoint {folder} has no {_CONTENTS}; restore it into a known structure")
    like: dict[str, Any] = {}
    leaves = json.loads((folder / _CONTENTS).read_text()).get("leaves")
    if not isinstance(leaves, dict):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({_CONTENTS} is torn); delete it to compute it again"
        )
    for name, form in leaves.items():
        *above, last = name.split("/")
        place = like
        for part in above:
            place = place.setdefault(part, {})
        dtype, shape = form.rstrip("]").split("[")
        place[last] = jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), np.dtype(dtype))
    return restore(folder, like)


def read_config(path: str | os.PathLike[str]) -> Any:
    """The config that a checkpoint was saved with, None where there was none.

    Raises:
      CheckpointError: for a missing checkpoint or a torn list of contents.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}; give the folder that a run wrote, or train again")
    try:
        return json.loads((folder / _CONTENTS).read_text()).get("config") if (folder / _CONTENTS).exists() else None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({_CONTENTS} is torn); delete it to compute it again"
        ) from error


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.dtype(np.float32)), jax.dtypes.prng_key)


def _check(folder: Path, like: PyTree) -> None:
    """Compares a checkpoint with its list of contents, if it has one: Orbax does not notice every kind of damage."""
    if not (folder / _CONTENTS).exists():
        return
    try:
        contents = json.loads((folder / _CONTENTS).read_text())
        held, files = dict(contents["leaves"]), dict(contents["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({_CONTENTS} is torn); delete it to compute it again"
        ) from error
    found = _checksums(folder)
    torn = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if torn:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({torn[0]} is not as it was written); delete it to compute it again"
        )
    wanted = _leaves(like)
    other = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    if other:
        name = other[0]
        raise CheckpointError(
            f"the checkpoint {folder} is of another model ({name}: it holds {held.get(name, 'nothing')}, wanted is "
            f"{wanted.get(name, 'nothing')}); delete it to compute it again, or give another folder"
        )


def _leaves(tree: PyTree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != _CONTENTS
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
