"""One learner's parameters as another's initialisation."""

import jax

from metaal_jax.base import PyTree


def transfer(source: PyTree, fresh: PyTree) -> PyTree:
    """`fresh` meta-parameters with every leaf of `source` that has the same name and shape.

    So a body that was trained with another learner, or with another number of classes, starts a new one; what does not
    fit (a head for other classes, learned hyperparameters of one learner alone) stays fresh.

    Args:
      source: parameters or meta-parameters of any learner.
      fresh: what the new learner's `init` gave.

    Returns:
      Meta-parameters with the structure of `fresh`.

    Raises:
      ValueError: where not a single leaf fits.
    """
    have = dict(jax.tree_util.tree_leaves_with_path(source))
    fits = {
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
        if path in have and have[path].shape == leaf.shape
    }
    if not fits:
        raise ValueError("transfer: no parameter has the same name and shape in both; is it the same network?")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: have[path] if path in fits else leaf, fresh)
