"""How densely the pool lies around a row, and how far the labelled rows are from standing for the pool."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.diversity import centred, unit_rows
from metaal_jax.acquisition.lifts import Scorer, check_count, fixed_rule, select_top
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require


def density(key: Array, view: PoolView) -> Array:
    """Mean cosine similarity to the real rows of the pool, `[n]` in [-1, 1].

    The mean of the cosines is one product with the mean of the unit vectors, `O(n d)`. A row's score depends on the
    whole pool, so pools must not be scored in chunks. Labels are not looked at: a cold start is like any other round.

    Args:
      key: not used.
      view: the pool; its embedding is that of the current model.

    Returns:
      float32 `[n]`.

    Reference: Settles, Craven: An Analysis of Active Learning Strategies for Sequence Labeling Tasks, 2008.
    """
    del key
    rows = unit_rows(view.prediction.embedding.mean(0))
    real = (view.weight > 0)[:, None]
    return rows @ (jnp.where(real, rows, 0.0).sum(0) / jnp.maximum(real.sum(), 1))


def density_weighted(scorer: Scorer, *, beta: float | Array = 1.0) -> Scorer:
    """Information density: a score that is not negative, times `density ** beta`.

    A sure way not to ask for outliers. Densities below 0 count as 0. Scores must not be negative: `entropy`,
    `least_confident`, `ratio` and `bald` are fit for it; that of `margin`, at most 0, would prefer outliers.

    Args:
      scorer: what is weighed.
      beta: how much the density counts; may be traced.

    Returns:
      A scorer.

    Raises:
      ValueError: for negative `beta`.

    Reference: Settles, Craven: An Analysis of Active Learning Strategies for Sequence Labeling Tasks, 2008.
    """
    require(beta >= 0, f"density_weighted: beta must be at least 0, got {beta}")

    def weighted(key: Array, view: PoolView) -> Array:
        return scorer(key, view) * jnp.maximum(density(key, view), 0.0) ** beta

    return weighted


def discriminative(*, k: int, sub_batches: int = 10, steps: int = 10, ridge: float | Array = 0.01) -> Policy:
    """The rows that a classifier of labelled against unlabelled rows is surest to be unlabelled.

    A logistic regression on the embedding of the current model tells the labelled from the unlabelled rows; both
    classes weigh the same in all. The batch is chosen in parts: after each, the classifier is fitted again with the
    chosen rows among the labelled. It is fitted by Newton's steps, each the best of its lengths 1, 1/2, 1/4, 1/8. From
    a cold start there is nothing to tell apart, and the first part is random.

    Args:
      k: rows a round.
      sub_batches: into how many parts of equal size the batch is cut; `k` fits the classifier for each row.
      steps: Newton's steps for each fit.
      ridge: factor of half the squared weights; features are scaled to mean square 1. May be traced.

    Returns:
      A `Policy`; the decision's scores are the log-odds of being unlabelled before the first pick.

    Raises:
      ValueError: for `k`, `sub_batches` or `steps` below 1, or a `ridge` that is not positive.

    Reference: Gissin, Shalev-Shwartz: Discriminative Active Learning, 2019.
    """
    for name, value in (("k", k), ("sub_batches", sub_batches), ("steps", steps)):
        require(value >= 1, f"discriminative: {name} must be at least 1, got {value}")
    require(ridge > 0, f"discriminative: ridge must be positive, got {ridge}")
    size = -(-k // sub_batches)

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding, real = centred(view), view.weight > 0
        n = embedding.shape[0]
        check_count(k, n)
        scale = jnp.where(real[:, None], embedding**2, 0.0).sum() / jnp.maximum(real.sum() * embedding.shape[1], 1)
        features = embedding * jnp.where(scale > 0, lax.rsqrt(scale), 0.0)
        features = jnp.concatenate([features, jnp.ones((n, 1))], axis=1)

        def fit(weights: Array, labelled: Array) -> Array:
            sign = jnp.where(labelled, -1.0, 1.0)
            ones, others = (real & labelled).sum(), (real & ~labelled).sum()
            mass = real * 0.5 / jnp.maximum(jnp.where(labelled, ones, others), 1)

            def newton(_: int, weights: Array) -> Array:
                odds = features @ weights
                probs = jax.nn.sigmoid(odds)
                gradient = -features.T @ (mass * sign * jax.nn.sigmoid(-sign * odds)) + ridge * weights
                hessian = (features * (mass * probs * (1.0 - probs))[:, None]).T @ features + ridge * jnp.eye(
                    features.shape[1]
                )
                move = -jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
                length = jnp.asarray([1.0, 0.5, 0.25, 0.125])
                margins = sign * (odds + length[:, None] * (features @ move))
                loss = (mass * jax.nn.softplus(-margins)).sum(-1)
                loss += 0.5 * ridge * ((weights + length[:, None] * move) ** 2).sum(-1)
                return weights + length[loss.argmin()] * move

            return lax.fori_loop(0, steps, newton, weights)

        def score(weights: Array, labelled: Array) -> tuple[Array, Array]:
            # Without a labelled row there is nothing to fit: all weights and log-odds stay 0.
            weights = jnp.where((real & labelled).any(), fit(weights, labelled), weights)
            return weights, features @ weights

        def part(state: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], tuple]:
            weights, labelled, available = state
            weights, odds = score(weights, labelled)
            index, valid = select_top(key, odds, available, view.row, size)
            mine = jnp.zeros(n, bool).at[jnp.where(valid, index, n)].set(True, mode="drop")
            return (weights, labelled | mine, available & ~mine), (index, valid, odds)

        labelled = (
            jnp.zeros(n, bool).at[jnp.where(view.labelled_index >= 0, view.labelled_index, n)].set(True, mode="drop")
        )
        state = (jnp.zeros(features.shape[1]), labelled, view.available)
        keys = jax.random.split(key, -(-k // size))
        _, (index, valid, odds) = lax.scan(part, state, keys)
        return Decision(
            index=index.reshape(-1)[:k], valid=valid.reshape(-1)[:k], log_prob=jnp.zeros(()), scores=odds[0]
        )

    return fixed_rule(act)
