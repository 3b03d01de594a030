"""Rules that look at how far the members of a committee disagree.

The members are those of `learners.committee`, or draws from a posterior: `learners.mc_dropout`, `learners.laplace`. A
single model has nobody to disagree with: every rule here raises `ValueError` for it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import per_row
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import PoolView, require, require_classes
from metaal_jax.losses import consensus


def require_committee(name: str, logits: Array) -> None:
    """Raises `ValueError` where logits `[m, n, c]` come from a single model, `m = 1`; `name` is that of the rule."""
    require(
        logits.shape[0] > 1,
        f"{name}: a single model has no disagreement; "
        "make several members with learners.committee, learners.mc_dropout or learners.laplace",
    )


def _votes(logits: Array) -> Array:
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype).mean(0)
    return jnp.where(jnp.isnan(logits).any(), jnp.nan, votes)  # the argmax of NaN is a class like another


def _vote_entropy(logits: Array) -> Array:
    votes = _votes(logits)
    return -jax.scipy.special.xlogy(votes, votes).sum()


def _variation_ratio(logits: Array) -> Array:
    return 1.0 - _votes(logits).max()


def _bald(logits: Array) -> Array:
    # Rounding can take the difference of two equal entropies below zero.
    return jnp.maximum(entropy_of(consensus(logits)) - entropy_of(jax.nn.log_softmax(logits)).mean(), 0.0)


def _mean_kl(logits: Array) -> Array:
    log_probs, centre = jax.nn.log_softmax(logits), consensus(logits)
    probs = jnp.exp(log_probs)
    return jnp.maximum(jnp.where(probs > 0, probs * (log_probs - centre[None]), 0.0).sum(-1).mean(), 0.0)


def _mean_std(logits: Array) -> Array:
    return jax.nn.softmax(logits).std(0).mean()


def vote_entropy(key: Array, view: PoolView) -> Array:
    """Entropy of the members' votes (each member's most probable class), `[n]` in nats.

    Raises `ValueError` for a single model.
    Reference: Dagan, Engelson: Committee-Based Sampling for Training Probabilistic Classifiers, 1995.
    """
    require_classes("vote_entropy", view)
    require_committee("vote_entropy", view.prediction.logits)
    return per_row(_vote_entropy)(key, view)


def variation_ratio(key: Array, view: PoolView) -> Array:
    """Share of the members that do not vote for the class with the most votes, `[n]` in [0, 1 - 1/c].

    Raises `ValueError` for a single model.
    Reference: Freeman: Elementary Applied Statistics, 1965; Gal: Uncertainty in Deep Learning, 2016, section 3.3.1.
    """
    require_classes("variation_ratio", view)
    require_committee("variation_ratio", view.prediction.logits)
    return per_row(_variation_ratio)(key, view)


def consensus_entropy(key: Array, view: PoolView) -> Array:
    """Entropy of the members' mean distribution, `[n]` in nats: `entropy`, by its name in committees.

    Raises `ValueError` for a single model.
    Reference: Settles: Active Learning Literature Survey, 2009, section 3.2.
    """
    require_classes("consensus_entropy", view)
    require_committee("consensus_entropy", view.prediction.logits)
    return per_row(lambda logits: entropy_of(consensus(logits)))(key, view)


def mean_kl(key: Array, view: PoolView) -> Array:
    """Mean Kullback-Leibler divergence of the members from their mean distribution, `[n]` in nats.

    In exact arithmetic it equals `bald`; it is summed from differences of logarithms, so small values are exact.
    Raises `ValueError` for a single model.
    Reference: McCallum, Nigam: Employing EM and Pool-Based Active Learning for Text Classification, 1998.
    """
    require_classes("mean_kl", view)
    require_committee("mean_kl", view.prediction.logits)
    return per_row(_mean_kl)(key, view)


def mean_std(key: Array, view: PoolView) -> Array:
    """Standard deviation of a class's probability over the members, averaged over the classes, `[n]` in [0, 1/2].

    Raises `ValueError` for a single model.
    Reference: Kampffmeyer, Salberg, Jenssen: Semantic Segmentation of Small Objects and Modeling of Uncertainty in
    Urban Remote Sensing Images, 2016; Gal, Islam, Ghahramani: Deep Bayesian Active Learning with Image Data, 2017.
    """
    require_classes("mean_std", view)
    require_committee("mean_std", view.prediction.logits)
    return per_row(_mean_std)(key, view)


def bald(key: Array, view: PoolView) -> Array:
    """Mutual information of prediction and parameters: entropy of the mean minus mean entropy, `[n]` in nats.

    Raises `ValueError` for a single model.
    Reference: Houlsby et al.: Bayesian Active Learning for Classification and Preference Learning, 2011.
    """
    require_classes("bald", view)
    require_committee("bald", view.prediction.logits)
    return per_row(_bald)(key, view)
