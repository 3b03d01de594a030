"""Scores of a model, summaries of a learning curve and intervals over seeds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax.losses import accuracy, consensus, weighted_mean


class Score(NamedTuple):
    """How good a prediction is; every field float32 `[]`.

    Attributes:
      accuracy: share of right rows, by the members' consensus.
      member_accuracy: mean accuracy of the single members; equals `accuracy` for a single model.
      nll: mean negative log-likelihood in nats.
      brier: mean squared distance of the probabilities from the one-hot truth, summed over classes.
      ece: expected calibration error over 15 equal bins of confidence.
    """

    accuracy: Array
    member_accuracy: Array
    nll: Array
    brier: Array
    ece: Array


def score(logits: Array, y: Array, weight: Array) -> Score:
    """`Score` of logits `[m, n, c]` against classes `[n]` under weights `[n]`; zeros where all weights are 0."""
    log_probs = consensus(logits)
    truth = jax.nn.one_hot(y, log_probs.shape[-1], dtype=log_probs.dtype)
    probs = jnp.exp(log_probs)
    return Score(
        accuracy=accuracy(log_probs, y, weight),
        member_accuracy=jax.vmap(accuracy, in_axes=(0, None, None))(logits, y, weight).mean(),
        nll=weighted_mean(-jnp.take_along_axis(log_probs, y[:, None], axis=-1)[:, 0], weight),
        brier=weighted_mean(((probs - truth) ** 2).sum(-1), weight),
        ece=expected_calibration_error(log_probs, y, weight),
    )


def expected_calibration_error(log_probs: Array, y: Array, weight: Array, *, bins: int = 15) -> Array:
    """Weighted mean over confidence bins of |accuracy - confidence|, for log-probabilities `[n, c]`.

    Reference: Guo et al.: On Calibration of Modern Neural Networks, 2017.
    """
    confidence = jnp.exp(log_probs.max(-1))
    right = (log_probs.argmax(-1) == y).astype(log_probs.dtype)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    gap = jnp.zeros(bins, log_probs.dtype).at[bin_of].add(weight * (right - confidence))
    total = weight.sum()
    return jnp.abs(gap).sum() / jnp.where(total > 0, total, 1.0)


def area_under_curve(accuracy: Array) -> Array:
    """Mean of a learning curve along its last axis `[..., rounds]`, the rounds being evenly spaced in labels."""
    return accuracy.mean(-1)


def labels_to_reach(labels: Array, accuracy: Array, target: float) -> Array:
    """The first number of labels at which a curve reaches `target`; infinity where it never does.

    Args:
      labels: `[rounds]`.
      accuracy: `[..., rounds]`.
      target: an accuracy, from 0 to 1.

    Returns:
      float32 `[...]`.
    """
    reached = accuracy >= target
    first = jnp.asarray(labels, jnp.float32)[reached.argmax(-1)]
    return jnp.where(reached.any(-1), first, jnp.inf)


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval."""

    mean: float
    low: float
    high: float
    seeds: int


def interval(values, *, confidence: float = 0.95) -> Interval:
    """Mean and Student-t confidence interval of one value per seed (host side).

    Paired comparisons are the interval of the differences seed by seed. With a single seed the interval is infinite.

    >>> low = interval([1.0, 2.0, 3.0])
    >>> round(low.mean, 2), round(low.low, 2), round(low.high, 2)
    (2.0, -0.48, 4.48)

    Raises:
      ValueError: without values.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"interval needs one value per seed, got an array of shape {values.shape}")
    mean, n = float(values.mean()), values.size
    if n == 1:
        return Interval(mean, -np.inf, np.inf, 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
