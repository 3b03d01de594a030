"""A wrapper that rules out classes which no label has shown yet."""

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import Batch, Learner, Prediction, PyTree
from metaal_jax.learners.adaptation import without
from metaal_jax.losses import class_targets

SEEN = "seen"  # the entry of the adapted parameters that tells which classes have a label


def seen_classes(learner: Learner) -> Learner:
    """Predicts no class before it has a label.

    So a model can have as many outputs as there may ever be classes, and a class that turns up midway takes a free one.
    The adapted parameters remember which classes have a label of positive weight; `predict` gives -inf to all others.
    Without any label, and for the meta-parameters themselves, nothing is ruled out. A warm start keeps the classes
    of the parameters that it starts from. Heads in closed form (`protonet`, `r2d2`, ...) do as much by themselves.

    Put it around other wrappers (`seen_classes(laplace(...))`): what draws heads of its own does not look at this
    entry.

    Args:
      learner: any learner of classes whose adapted parameters are a dictionary, as all of this package are.

    Returns:
      A `Learner` with the learner's `init` and `meta_grad`; the adapted parameters have `seen` (bool `[c]`) beside the
      learner's own.

    Raises:
      ValueError: from `adapt`, for labels that are no classes, or parameters that are no dictionary.
    """

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        inner = start if start is None else without((SEEN,), start)
        params = learner.adapt(key, meta, batch, unlabelled=unlabelled, start=inner)
        if not isinstance(params, dict):
            raise ValueError(
                f"seen_classes: the learner's adapted parameters must be a dictionary, got {type(params).__name__}"
            )
        classes = jax.eval_shape(learner.predict, params, batch.x).logits.shape[-1]
        target, weight = class_targets("seen_classes", batch.y, batch.weight, classes)
        seen = ((target > 0) & (weight > 0)[:, None]).any(0)
        if start is not None and SEEN in start:
            seen = seen | start[SEEN]
        return {**params, SEEN: seen}

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        prediction = learner.predict(without((SEEN,), params), x)
        if SEEN not in params:
            return prediction
        allowed = params[SEEN] | ~params[SEEN].any()
        return prediction._replace(logits=jnp.where(allowed[None, None], prediction.logits, -jnp.inf))

    return Learner(init=learner.init, adapt=adapt, predict=predict, meta_grad=learner.meta_grad)
