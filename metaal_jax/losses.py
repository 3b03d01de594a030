"""Weighted losses. A weight of 0 takes a row out; a batch without any weight has loss 0 and gradient 0, never NaN."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def weighted_mean(values: Array, weight: Array) -> Array:
    """Mean of `values` `[n]` under `weight` `[n]`; 0 where all weights are 0."""
    total = weight.sum()
    return jnp.where(weight != 0, values * weight, 0.0).sum() / jnp.where(total > 0, total, 1.0)


def cross_entropy(logits: Array, y: Array, weight: Array) -> Array:
    """Weighted mean cross entropy in nats of logits `[n, c]` and classes `[n]`."""
    return weighted_mean(optax.softmax_cross_entropy_with_integer_labels(logits, y), weight)


def accuracy(logits: Array, y: Array, weight: Array) -> Array:
    """Weighted share of rows whose largest logit is the class `y`."""
    return weighted_mean((logits.argmax(-1) == y).astype(logits.dtype), weight)


def consensus(logits: Array) -> Array:
    """Log of the members' mean probability: logits `[m, ..., c]` -> log-probabilities `[..., c]`."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(logits.shape[0])
