"""One learner's parameters as another's initialisation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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


def without_head(model: nn.Module, meta: PyTree, x: PyTree) -> PyTree:
    """Meta-parameters for `model` with the body of `meta` and a head of zeros, whatever its number of classes was.

    What a learner that finds its last layer from the labels starts a new task from: without a label all classes are as
    probable as each other. Learned hyperparameters are kept.

    Args:
      model: a network whose last layer is named `head`, with as many classes as the new task.
      meta: meta-parameters of a learner with this network, of any number of classes.
      x: rows of the new task, leaves `[n, ...]`; only shapes matter.
    """
    fresh = jax.eval_shape(model.init, jax.random.key(0), jax.tree.map(lambda leaf: leaf[:1], x))
    head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh["params"]["head"])
    return {**meta, "params": {**meta["params"], "head": head}}
