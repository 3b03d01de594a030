"""Rules that look at how far the members of a committee disagree. A single model has no disagreement: all scores 0."""

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import per_row
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import PoolView
from metaal_jax.losses import consensus


def _vote_entropy(logits: Array) -> Array:
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype).mean(0)
    return -jax.scipy.special.xlogy(votes, votes).sum()


def _bald(logits: Array) -> Array:
    # Rounding can take the difference of two equal entropies below zero.
    return jnp.maximum(entropy_of(consensus(logits)) - entropy_of(jax.nn.log_softmax(logits)).mean(), 0.0)


def _mean_kl(logits: Array) -> Array:
    log_probs, centre = jax.nn.log_softmax(logits), consensus(logits)
    probs = jnp.exp(log_probs)
    return jnp.maximum(jnp.where(probs > 0, probs * (log_probs - centre), 0.0).sum(-1).mean(), 0.0)


def vote_entropy(key: Array, view: PoolView) -> Array:
    """Entropy of the members' votes (each member's most probable class), `[n]` in nats.

    Reference: Dagan, Engelson: Committee-Based Sampling for Training Probabilistic Classifiers, 1995.
    """
    return per_row(_vote_entropy)(key, view)


def consensus_entropy(key: Array, view: PoolView) -> Array:
    """Entropy of the members' mean distribution, `[n]` in nats: `entropy`, by its name in committees.

    Reference: Settles: Active Learning Literature Survey, 2009, section 3.2.
    """
    return per_row(lambda logits: entropy_of(consensus(logits)))(key, view)


def mean_kl(key: Array, view: PoolView) -> Array:
    """Mean Kullback-Leibler divergence of the members from their mean distribution, `[n]` in nats.

    In exact arithmetic it equals `bald`; it is summed from differences of logarithms, so small values are exact.
    Reference: McCallum, Nigam: Employing EM and Pool-Based Active Learning for Text Classification, 1998.
    """
    return per_row(_mean_kl)(key, view)


def bald(key: Array, view: PoolView) -> Array:
    """Mutual information of prediction and parameters: entropy of the mean minus mean entropy, `[n]` in nats.

    Reference: Houlsby et al.: Bayesian Active Learning for Classification and Preference Learning, 2011.
    """
    return per_row(_bald)(key, view)
