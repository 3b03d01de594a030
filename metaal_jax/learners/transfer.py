"""One learner's parameters as another's initialisation."""

from typing import Any

import jax

from metaal_jax.base import PyTree


def transfer(source: PyTree, fresh: PyTree) -> PyTree:
    """`fresh` meta-parameters with every leaf of `source` that has the same name and shape.

    A body that was trained with another learner, or for another number of classes, thus initialises a new one. A layer
    named `head` and learned hyperparameters stay fresh where they do not fit; all other parameters must fit.

    Args:
      source: parameters or meta-parameters of any learner.
      fresh: what the new learner's `init` gave.

    Returns:
      Meta-parameters with the structure of `fresh`.

    Raises:
      ValueError: where a parameter outside the head is missing in `source` or has another shape there.
    """
    have = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(source)}

    def one(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if name in have and have[name].shape == leaf.shape:
            return have[name]
        if "['params']" in name and "['head']" not in name:
            held = f"has shape {have[name].shape}" if name in have else "is missing"
            raise ValueError(f"transfer: {name} {held}, wanted is {leaf.shape}; is it the same network?")
        return leaf

    return jax.tree_util.tree_map_with_path(one, fresh)
