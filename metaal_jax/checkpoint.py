"""Checkpoints with Orbax: pytrees of arrays, saved atomically and restored into a known structure."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metaal_jax.base import PyTree


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another structure; the message is one line and says what to do."""


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Saves a pytree of arrays to the folder `path`, replacing what is there once the new one is whole.

    Typed keys are not arrays: save what they were made from.
    """
    import orbax.checkpoint as ocp

    target = Path(path).absolute()
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh, jax.tree.map(np.asarray, tree))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def restore(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Restores a pytree saved by `save`.

    Args:
      path: the folder.
      like: a pytree of the same structure, shapes and dtypes; only these are read, `jax.eval_shape` gives one.

    Returns:
      The saved tree with NumPy leaves in the structure of `like`.

    Raises:
      CheckpointError: for a missing, truncated or otherwise damaged checkpoint, or one of another structure.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}; give the folder that a run wrote, or train again")
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder, shapes)
    # Orbax and the storage below it raise a different type for every kind of damage.
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the checkpoint {folder} is damaged or of another model ({reason}); delete it to compute it again"
        ) from error
    for saved, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if saved.shape != wanted.shape:
            raise CheckpointError(
                f"the checkpoint {folder} holds shape {saved.shape} where {wanted.shape} is wanted; it is of another "
                "model: delete it or give another folder"
            )
    return tree
