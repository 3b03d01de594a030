"""Scores of a model on classes, targets or several labels, summaries of a learning curve and intervals over seeds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from metaal_jax.base import is_classes
from metaal_jax.losses import accuracy, consensus, weighted_mean


class Score(NamedTuple):
    """How good predicted classes are; every field float32 `[]`.

    Attributes:
      accuracy: share of right rows, by the members' consensus. A row whose prediction is not a number is wrong.
      member_accuracy: mean accuracy of the single members; equals `accuracy` for a single model.
      balanced_accuracy: mean over the classes that occur of the share of their rows that are right.
      nll: mean negative log-likelihood in nats.
      brier: mean squared distance of the probabilities from the one-hot truth, summed over classes.
      ece: expected calibration error over 15 equal bins of confidence.
    """

    accuracy: Array
    member_accuracy: Array
    balanced_accuracy: Array
    nll: Array
    brier: Array
    ece: Array


class RegressionScore(NamedTuple):
    """How good predicted targets are; every field float32 `[]`, errors being means over rows and targets.

    Attributes:
      rmse: root of the mean squared error of the members' mean, in units of the targets.
      mae: mean absolute error of the members' mean.
      r2: share of the targets' variance that is explained; 0 for a constant prediction of the mean, also where all
        targets are equal.
    """

    rmse: Array
    mae: Array
    r2: Array


class MultiLabelScore(NamedTuple):
    """How good predictions of several labels at once are; every field float32 `[]`.

    Attributes:
      accuracy: share of right labels, by the members' mean probability.
      exact: share of rows whose labels are all right.
      nll: mean negative log-likelihood of a row's labels, in nats.
    """

    accuracy: Array
    exact: Array
    nll: Array


def score(logits: Array, y: Array, weight: Array) -> Score:
    """`Score` of logits `[m, n, c]` against classes `[n]` under weights `[n]`; zeros where all weights are 0.

    Raises:
      ValueError: for labels that are no classes.
    """
    if not is_classes(y):
        raise ValueError(
            f"metrics.score: y must be integer classes [n], got {y.dtype} {list(y.shape)}; for targets give "
            "score=metrics.regression_score, for several labels at once score=metrics.multi_label_score"
        )
    log_probs = consensus(logits)
    classes = log_probs.shape[-1]
    truth = jax.nn.one_hot(y, classes, dtype=log_probs.dtype)
    probs = jnp.exp(log_probs)
    right = (log_probs.argmax(-1) == y) & jnp.isfinite(log_probs.max(-1))
    mass = jnp.where(weight[:, None] > 0, weight[:, None] * truth, 0.0).sum(0)
    hits = jnp.where(right[:, None] & (weight[:, None] > 0), weight[:, None] * truth, 0.0).sum(0)
    there = mass > 0
    recall = jnp.where(there, hits / jnp.where(there, mass, 1.0), 0.0)
    return Score(
        accuracy=accuracy(log_probs, y, weight),
        member_accuracy=jax.vmap(accuracy, in_axes=(0, None, None))(logits, y, weight).mean(),
        balanced_accuracy=recall.sum() / jnp.maximum(there.sum(), 1),
        nll=weighted_mean(-jnp.take_along_axis(log_probs, y[:, None], axis=-1)[:, 0], weight),
        brier=weighted_mean(((probs - truth) ** 2).sum(-1), weight),
        ece=expected_calibration_error(log_probs, y, weight),
    )


def regression_score(outputs: Array, y: Array, weight: Array) -> RegressionScore:
    """`RegressionScore` of outputs `[m, n, t]` against float targets `[n]` or `[n, t]`; zeros where all weights are 0.

    Raises:
      ValueError: for classes, or targets of another shape.
    """
    predicted = outputs.mean(0)
    truth = y[:, None] if y.ndim == 1 else y
    if jnp.issubdtype(y.dtype, jnp.integer) or truth.shape != predicted.shape:
        raise ValueError(
            f"metrics.regression_score: y must be float targets like the outputs {list(predicted.shape)}, got "
            f"{y.dtype} {list(y.shape)}"
        )
    real = weight[:, None] > 0
    total = jnp.where(weight > 0, weight, 0.0).sum()
    share = jnp.where(weight > 0, weight, 0.0) / jnp.where(total > 0, total, 1.0)
    truth, error = jnp.where(real, truth, 0.0), jnp.where(real, predicted - truth, 0.0)
    squared = share @ error**2
    spread = share @ jnp.where(real, truth - (share @ truth)[None], 0.0) ** 2
    return RegressionScore(
        rmse=jnp.sqrt(squared.mean()),
        mae=(share @ jnp.abs(error)).mean(),
        r2=jnp.where(spread > 0, 1.0 - squared / jnp.where(spread > 0, spread, 1.0), 0.0).mean(),
    )


def multi_label_score(outputs: Array, y: Array, weight: Array) -> MultiLabelScore:
    """`MultiLabelScore` of outputs `[m, n, c]` against labels `[n, c]`, 0 or 1 each; zeros where all weights are 0.

    Raises:
      ValueError: for labels of another shape than the outputs.
    """
    if y.shape != outputs.shape[1:]:
        raise ValueError(
            f"metrics.multi_label_score: y must be labels [n, c] like the outputs {list(outputs.shape[1:])}, got "
            f"{list(y.shape)}"
        )
    yes = jax.nn.logsumexp(jax.nn.log_sigmoid(outputs), axis=0) - jnp.log(outputs.shape[0])
    no = jax.nn.logsumexp(jax.nn.log_sigmoid(-outputs), axis=0) - jnp.log(outputs.shape[0])
    right = ((yes > no) == (y > 0.5)) & jnp.isfinite(yes)
    nll = -(jnp.where(y > 0, y * yes, 0.0) + jnp.where(y < 1, (1 - y) * no, 0.0)).sum(-1)
    return MultiLabelScore(
        accuracy=weighted_mean(right.mean(-1, dtype=outputs.dtype), weight),
        exact=weighted_mean(right.all(-1).astype(outputs.dtype), weight),
        nll=weighted_mean(nll, weight),
    )


def expected_calibration_error(log_probs: Array, y: Array, weight: Array, *, bins: int = 15) -> Array:
    """Weighted mean over confidence bins of |accuracy - confidence|, for log-probabilities `[n, c]`.

    Reference: Guo et al.: On Calibration of Modern Neural Networks, 2017.
    """
    confidence = jnp.exp(log_probs.max(-1))
    known = (weight > 0) & jnp.isfinite(confidence)
    right = (log_probs.argmax(-1) == y).astype(log_probs.dtype)
    bin_of = jnp.clip(jnp.ceil(jnp.where(known, confidence, 0.0) * bins).astype(jnp.int32) - 1, 0, bins - 1)
    off = jnp.where(known, weight * (right - confidence), 0.0).astype(log_probs.dtype)
    gap = jnp.zeros(bins, log_probs.dtype).at[bin_of].add(off)
    total = jnp.where(weight > 0, weight, 0.0).sum()
    return jnp.abs(gap).sum() / jnp.where(total > 0, total, 1.0)


def area_under_curve(accuracy: Array) -> Array:
    """Mean of a learning curve along its last axis `[..., rounds]`, the rounds being evenly spaced in labels."""
    return accuracy.mean(-1)


def labels_to_reach(labels: ArrayLike, accuracy: ArrayLike, target: float) -> Array:
    """The first number of labels at which a curve reaches `target`; infinity where it never does.

    An accuracy that is NaN reaches nothing.

    Args:
      labels: `[rounds]`.
      accuracy: `[..., rounds]`.
      target: an accuracy, from 0 to 1.

    Returns:
      float32 `[...]`.

    Raises:
      ValueError: without curves or rounds, for curves of another length than `labels`, or a target that is no share.
    """
    labels, accuracy = jnp.asarray(labels, jnp.float32), jnp.asarray(accuracy)
    if not accuracy.size or labels.shape != accuracy.shape[-1:]:
        raise ValueError(
            f"labels_to_reach: accuracy must be [..., rounds] for labels [rounds], got the shapes {accuracy.shape} and "
            f"{labels.shape}"
        )
    if not 0 <= target <= 1:
        raise ValueError(f"labels_to_reach: target must be an accuracy from 0 to 1, got {target}")
    reached = accuracy >= target
    return jnp.where(reached.any(-1), labels[reached.argmax(-1)], jnp.inf)


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval."""

    mean: float
    low: float
    high: float
    seeds: int


def interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean and Student-t confidence interval of one value per seed (host side).

    Paired comparisons are the interval of the differences seed by seed. With a single seed the interval is infinite,
    and so it is where a value is: a negative log-likelihood is, once a class that was ruled out turns up.

    >>> low = interval([1.0, 2.0, 3.0])
    >>> round(low.mean, 2), round(low.low, 2), round(low.high, 2)
    (2.0, -0.48, 4.48)

    Raises:
      ValueError: without values, for NaN among them, or a confidence outside (0, 1).
    """
    from scipy import stats

    found = np.asarray(values, np.float64)
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"interval needs one value per seed, got an array of shape {found.shape}")
    if np.isnan(found).any():
        seed = int(np.argmax(np.isnan(found)))
        raise ValueError(f"interval: the value of seed {seed} is NaN; leave out failed runs knowingly")
    if not 0 < confidence < 1:
        raise ValueError(f"interval: confidence must lie between 0 and 1, got {confidence}")
    n = found.size
    if np.isinf(found).any():
        return Interval(float(found[np.isinf(found)][0]), -np.inf, np.inf, n)
    mean = float(found.mean())
    if n == 1:
        return Interval(mean, -np.inf, np.inf, 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * found.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
