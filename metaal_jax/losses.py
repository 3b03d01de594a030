"""Losses and scores of one form, `(outputs [n, c], y, weight [n]) -> []`: see `metaal_jax.base.LossFn`.

All are weighted means over rows. A weight of 0 takes a row out, whatever the row holds; a batch without any weight has
loss 0 and gradient 0, never NaN. What `y` may be is the loss's to say: integers are classes, floats are targets, and
a loss refuses labels of another kind by name instead of casting them. In scores a row with NaN among its outputs is
wrong.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import PyTree, is_classes


def clear_padding(x: PyTree, weight: Array) -> PyTree:
    """`x` with zeros in the rows of weight 0 that would spoil sums: those with NaN, infinities or huge values.

    A product of 0 and NaN is NaN, in a derivative too: what weighs rows clears them first. Finite rows stay, so that
    a derivative in a weight of 0 still tells what a first bit of weight would change.

    Args:
      x: leaves `[n, ...]`; a row is cleared in all of them.
      weight: `[n]`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not leaves:
        return x
    # The sum of squares must be finite, too: heads and losses form it.
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).reshape(leaf.shape[0], -1) for leaf in leaves]
    kept = (weight != 0) | jnp.stack([jnp.isfinite((leaf**2).sum(-1)) for leaf in wide]).all(0)

    def clear(leaf: Array) -> Array:
        return jnp.where(kept.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(clear, x)


def weighted_mean(values: Array, weight: Array) -> Array:
    """Mean of `values` `[n]` under `weight` `[n]`; 0 where all weights are 0."""
    total = weight.sum()
    return (jnp.where(weight != 0, values, 0.0) * weight).sum() / jnp.where(total > 0, total, 1.0)


def cross_entropy(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted mean cross entropy in nats.

    Args:
      outputs: `[n, c]`, logits; -inf for what is impossible.
      y: integer classes `[n]`, or class probabilities `[n, c]`. A row whose class is none of `0..c-1` trains nothing:
        it counts as a row of weight 0.
      weight: `[n]`.

    Raises:
      ValueError: for labels of another kind, or probabilities of another number of classes.
    """
    check_class_labels("cross_entropy", y, outputs.shape[-1])
    log_probs = jax.nn.log_softmax(_used(outputs, weight))
    if is_classes(y):
        known = _in_range(y, outputs.shape[-1])
        each = -jnp.take_along_axis(log_probs, jnp.where(known, y, 0)[:, None], axis=-1)[:, 0]
        return weighted_mean(each, jnp.where(known, weight, 0.0))
    y = _used(y, weight)
    # 0 log 0 is 0, in the gradient too.
    return weighted_mean(-(y * jnp.where(y == 0, 0.0, log_probs)).sum(-1), weight)


def accuracy(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted share of rows whose largest logit is that of their class; with probabilities the expected share.

    Args and Raises: as in `cross_entropy`. A row whose class is none of `0..c-1` is wrong.
    """
    check_class_labels("accuracy", y, outputs.shape[-1])
    predicted = outputs.argmax(-1)
    right = (
        (predicted == y).astype(outputs.dtype)
        if is_classes(y)
        else jnp.take_along_axis(y, predicted[:, None], axis=-1)[:, 0].astype(outputs.dtype)
    )
    return weighted_mean(jnp.where(jnp.isnan(outputs).any(-1), 0.0, right), weight)


def squared_error(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted mean over rows of the mean squared difference of outputs and targets.

    Args:
      outputs: `[n, t]`.
      y: float targets `[n, t]`, or `[n]` where `t = 1`.
      weight: `[n]`.

    Raises:
      ValueError: for integer labels, or another number of targets than outputs.
    """
    return weighted_mean(_squared_differences("squared_error", outputs, y, weight), weight)


def root_mean_squared_error(outputs: Array, y: Array, weight: Array) -> Array:
    """Square root of `squared_error`, in the unit of the targets: a score of which less is better.

    Args and Raises: as in `squared_error`. A row of weight with NaN among its outputs makes it infinite.
    """
    each = _squared_differences("root_mean_squared_error", outputs, y, weight)
    mean = weighted_mean(jnp.where(jnp.isnan(outputs).any(-1), jnp.inf, each), weight)
    return jnp.where(mean > 0, jnp.sqrt(jnp.where(mean > 0, mean, 1.0)), 0.0)


def sigmoid_cross_entropy(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted mean over rows of the mean binary cross entropy of several labels at once, in nats.

    Args:
      outputs: `[n, c]`, a logit for each label.
      y: `[n, c]`, 1 where the label holds and 0 where it does not, or the probability that it holds.
      weight: `[n]`.

    Raises:
      ValueError: for labels of another shape.
    """
    _check_multi_label("sigmoid_cross_entropy", outputs, y)
    logits, y = _used(outputs, weight), _used(y.astype(outputs.dtype), weight)
    # -y log s(o) - (1 - y) log s(-o) with s(-o) = 1 - s(o); an infinite logit costs nothing where it is right.
    positive = y * jnp.where(y == 0, 0.0, jax.nn.log_sigmoid(logits))
    negative = (1 - y) * jnp.where(y == 1, 0.0, jax.nn.log_sigmoid(-logits))
    return weighted_mean(-(positive + negative).mean(-1), weight)


def multi_label_accuracy(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted share of labels that are predicted right: a logit above 0 says that the label holds.

    Args and Raises: as in `sigmoid_cross_entropy`.
    """
    _check_multi_label("multi_label_accuracy", outputs, y)
    right = ((outputs > 0) == (y > 0.5)) & ~jnp.isnan(outputs)
    return weighted_mean(right.mean(-1, dtype=outputs.dtype), weight)


def consensus(logits: Array) -> Array:
    """Log of the members' mean probability: logits `[m, ..., c]` -> log-probabilities `[..., c]`.

    A class that all members rule out (-inf) stays at -inf, with a gradient of 0.
    """
    log_probs = jax.nn.log_softmax(logits)
    if logits.shape[0] == 1:
        return log_probs[0]
    top = lax.stop_gradient(log_probs.max(0))
    never = top == -jnp.inf
    top = jnp.where(never, 0.0, top)
    total = jnp.exp(log_probs - top[None]).sum(0)
    return jnp.where(never, -jnp.inf, jnp.log(jnp.where(never, 1.0, total)) + top - jnp.log(logits.shape[0]))


def check_class_labels(name: str, y: Array, classes: int) -> None:
    """Raises `ValueError`, in the name of who asks, for labels that are neither classes nor their probabilities."""
    if is_classes(y):
        return
    if not jnp.issubdtype(y.dtype, jnp.floating) or y.ndim != 2:
        raise ValueError(
            f"{name}: y must be integer classes [n] or class probabilities [n, c], got {y.dtype} {shape_of(y)}; for "
            "targets use losses.squared_error, for several labels at once losses.sigmoid_cross_entropy"
        )
    if y.shape[1] != classes:
        raise ValueError(
            f"{name}: y must have a column for each of the model's {classes} outputs, got {y.dtype} {shape_of(y)}"
        )


def class_targets(name: str, y: Array, weight: Array, classes: int) -> tuple[Array, Array]:
    """Labels of classes as `[n, c]` targets, and the weights `[n]` with 0 for rows whose class is none of `0..c-1`.

    Raises:
      ValueError: as in `cross_entropy`, in the name of who asks.
    """
    check_class_labels(name, y, classes)
    if is_classes(y):
        return jax.nn.one_hot(y, classes, dtype=weight.dtype), jnp.where(_in_range(y, classes), weight, 0.0)
    return clear_padding(y, weight), weight


def shape_of(y: Array) -> str:
    """A shape in an error message: `[n]` with letters for what is no number of outputs."""
    return "[n" + "".join(f", {size}" for size in y.shape[1:]) + "]"


def _used(values: Array, weight: Array) -> Array:
    """`values` with zeros in all rows of weight 0, so that nothing of theirs gets into a gradient."""
    return jnp.where((weight != 0).reshape((-1,) + (1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))


def _in_range(y: Array, classes: int) -> Array:
    return (y >= 0) & (y < classes)


def _squared_differences(name: str, outputs: Array, y: Array, weight: Array) -> Array:
    """Mean squared difference of each row, `[n]`."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"{name}: y must be float targets [n] or [n, t], got {y.dtype} {shape_of(y)}; for classes use "
            "losses.cross_entropy"
        )
    targets = y[:, None] if y.ndim == 1 else y
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{name}: targets must be as many as the model's outputs, got y {shape_of(y)} and outputs "
            f"{shape_of(outputs)}"
        )
    return ((_used(outputs, weight) - _used(targets, weight)) ** 2).mean(-1)


def _check_multi_label(name: str, outputs: Array, y: Array) -> None:
    if y.shape != outputs.shape:
        raise ValueError(
            f"{name}: y must hold 0 or 1 for each label, as many as the model's outputs, got {y.dtype} {shape_of(y)} "
            f"for outputs {shape_of(outputs)}; for one class a row use losses.cross_entropy"
        )
