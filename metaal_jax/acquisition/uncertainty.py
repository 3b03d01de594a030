"""Rules that look at one predictive distribution a row: the members' consensus where there are several."""

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import Scorer, per_row, require_scorer
from metaal_jax.base import PoolView, require, require_classes
from metaal_jax.losses import consensus
from metaal_jax.rows import row_noise


def random(key: Array, view: PoolView) -> Array:
    """Uniform noise in [0, 1), `[n]`: the baseline of all rules, without a look at the model."""
    return row_noise(key, view.row).astype(jnp.float32) / 2.0**30


def entropy_of(log_probs: Array) -> Array:
    """Entropy in nats of log-probabilities along the last axis; classes of probability 0 count 0."""
    probs = jnp.exp(log_probs)
    return -jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0.0), 0.0).sum(-1)


def _least_confident(logits: Array) -> Array:
    log_probs = consensus(logits)
    best = jnp.arange(log_probs.shape[-1]) == log_probs.argmax()
    # -log p = log(1 + (1 - p) / p), exact where p rounds to 1.
    return jax.nn.softplus(jax.nn.logsumexp(jnp.where(best, -jnp.inf, log_probs)) - log_probs.max())


def _margin(logits: Array) -> Array:
    log_probs = consensus(logits)
    first = jnp.arange(log_probs.shape[-1]) == log_probs.argmax()
    return jnp.exp(jnp.where(first, -jnp.inf, log_probs).max()) - jnp.exp(log_probs.max())


def _ratio(logits: Array) -> Array:
    log_probs = consensus(logits)
    first = jnp.arange(log_probs.shape[-1]) == log_probs.argmax()
    return jnp.exp(jnp.where(first, -jnp.inf, log_probs).max() - log_probs.max())


def _entropy(logits: Array) -> Array:
    return entropy_of(consensus(logits))


def least_confident(key: Array, view: PoolView) -> Array:
    """Minus the log-probability of the most probable class, `[n]`, in nats.

    It orders the rows as 1 - max p does and does not saturate where the model is sure.
    Reference: Lewis, Gale: A Sequential Algorithm for Training Text Classifiers, 1994.
    """
    require_classes("least_confident", view)
    return per_row(_least_confident)(key, view)


def margin(key: Array, view: PoolView) -> Array:
    """Minus the difference of the two largest probabilities, `[n]` in [-1, 0].

    Reference: Scheffer, Decomain, Wrobel: Active Hidden Markov Models for Information Extraction, 2001.
    """
    require_classes("margin", view)
    return per_row(_margin)(key, view)


def ratio(key: Array, view: PoolView) -> Array:
    """The second largest probability divided by the largest, `[n]` in [0, 1].

    Reference: Monarch: Human-in-the-Loop Machine Learning, 2021, section 3.2.
    """
    require_classes("ratio", view)
    return per_row(_ratio)(key, view)


def entropy(key: Array, view: PoolView) -> Array:
    """Entropy of the predictive distribution, `[n]` in nats.

    Reference: Settles: Active Learning Literature Survey, 2009, section 3.1.
    """
    require_classes("entropy", view)
    return per_row(_entropy)(key, view)


def tempered(scorer: Scorer, *, temperature: float | Array) -> Scorer:
    """`scorer` of logits divided by a temperature: above 1 for an overconfident model.

    Entropy and margin order the rows of several classes differently at other temperatures; with two classes no rule of
    a single model changes its order. Each member of a committee is tempered before they are averaged.

    Raises:
      ValueError: for `temperature <= 0`.

    Reference: Guo et al.: On Calibration of Modern Neural Networks, 2017.
    """
    require_scorer("tempered", scorer)
    require(temperature > 0, f"tempered: temperature must be > 0, got {temperature}")

    def tempered_scorer(key: Array, view: PoolView) -> Array:
        prediction = view.prediction._replace(logits=view.prediction.logits / temperature)
        return scorer(key, view._replace(prediction=prediction))

    return tempered_scorer
