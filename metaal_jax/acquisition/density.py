"""How densely the pool lies around a row, and how far the labelled rows are from standing for the pool."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.diversity import centred, stand_ins, unit_rows
from metaal_jax.acquisition.lifts import Scorer, check_count, fixed_rule, require_scorer, select_top
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.rows import clean


def density(key: Array, view: PoolView) -> Array:
    """Mean cosine similarity to the real rows of the pool, `[n]` in [-1, 1].

    The mean of the cosines is one product with the mean of the unit vectors, `O(n d)`. A row's score depends on the
    whole pool, so pools must not be scored in chunks. Labels are not looked at: a cold start is like any other round.

    Args:
      key: not used.
      view: the pool; its embedding is that of the current model.

    Returns:
      float32 `[n]`; NaN for rows whose embedding is not finite.

    Reference: Settles, Craven: An Analysis of Active Learning Strategies for Sequence Labeling Tasks, 2008.
    """
    del key
    known = clean(view, embedding=True)
    rows, real = unit_rows(known.prediction.embedding.mean(0)), known.weight > 0
    similarity = rows @ (rows.sum(0) / jnp.maximum(real.sum(), 1))
    return jnp.where(real | ~view.available, similarity, jnp.nan)


def density_weighted(scorer: Scorer, *, beta: float | Array = 1.0) -> Scorer:
    """Information density: a score that is not negative, times `density ** beta`.

    It avoids outliers. Densities below 0 count as 0. Scores must not be negative: use `entropy`, `least_confident`,
    `ratio` or `bald`; with `margin`, which is at most 0, the rule would prefer outliers.

    Args:
      scorer: what is weighed.
      beta: how much the density counts; may be traced.

    Returns:
      A scorer.

    Raises:
      ValueError: for negative `beta`.

    Reference: Settles, Craven: An Analysis of Active Learning Strategies for Sequence Labeling Tasks, 2008.
    """
    require_scorer("density_weighted", scorer)
    require(beta >= 0, f"density_weighted: beta must be at least 0, got {beta}")

    def weighted(key: Array, view: PoolView) -> Array:
        return scorer(key, view) * jnp.maximum(density(key, view), 0.0) ** beta

    return weighted


def discriminative(
    *, k: int, sub_batches: int = 10, steps: int = 10, ridge: float | Array = 0.01, considered: int = 4096
) -> Policy:
    """The rows that a classifier of labelled against unlabelled rows most confidently calls unlabelled.

    A logistic regression on the embedding of the current model tells the labelled from the unlabelled rows; both
    classes weigh the same in all. The batch is chosen in parts: after each, the classifier is fitted again with the
    chosen rows among the labelled. It is fitted by Newton's steps, each the best of its lengths 1, 1/2, 1/4, 1/8. From
    a cold start there is nothing to tell apart, and the first part is random.

    Args:
      k: rows a round.
      sub_batches: into how many parts of equal size the batch is cut; `k` fits the classifier for each row.
      steps: Newton's steps for each fit.
      ridge: factor of half the squared weights; features are scaled to mean square 1. May be traced.
      considered: of a larger pool, so many random rows stand for the unlabelled ones when the classifier is fitted, as
        in the authors' code; it then judges all rows.

    Returns:
      A `Policy`; the decision's scores are the log-odds of being unlabelled before the first pick.

    Raises:
      ValueError: for `k`, `sub_batches`, `steps` or `considered` below 1, or a `ridge` that is not positive.

    Reference: Gissin, Shalev-Shwartz: Discriminative Active Learning, 2019.
    """
    for name, value in (("k", k), ("sub_batches", sub_batches), ("steps", steps), ("considered", considered)):
        require(value >= 1, f"discriminative: {name} must be at least 1, got {value}")
    require(ridge > 0, f"discriminative: ridge must be positive, got {ridge}")
    size = -(-k // sub_batches)

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding, real = centred(view), view.weight > 0
        n = embedding.shape[0]
        check_count(k, n)
        # Its mean, and not any point amid it: the ridge holds the intercept, too.
        embedding = jnp.where(real[:, None], embedding - (embedding.sum(0) / jnp.maximum(real.sum(), 1))[None], 0.0)
        scale = (embedding**2).sum() / jnp.maximum(real.sum() * embedding.shape[1], 1)
        features = embedding * jnp.where(scale > 0, lax.rsqrt(scale), 0.0)
        features = jnp.concatenate([features, jnp.ones((n, 1))], axis=1)
        sample_key, key = jax.random.split(key)
        sample, found = stand_ins(sample_key, view, considered)

        def fit(weights: Array, labelled: Array, picked: Array) -> Array:
            """Newton's steps from `weights`; `picked` are positions of rows chosen so far, n for none."""
            if sample.shape[0] == n:
                rows, positive, present = features, labelled, real
            else:
                place = jnp.concatenate([jnp.where(view.labelled_index >= 0, view.labelled_index, n), picked])
                rows = features[jnp.concatenate([sample, jnp.minimum(place, n - 1)])]
                positive = jnp.arange(rows.shape[0]) >= sample.shape[0]
                present = jnp.concatenate([found & ~labelled[sample], place < n])
            sign = jnp.where(positive, -1.0, 1.0)
            ones, others = (present & positive).sum(), (present & ~positive).sum()
            mass = present * 0.5 / jnp.maximum(jnp.where(positive, ones, others), 1)

            def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                turn, weights, _ = state
                odds = rows @ weights
                probs = jax.nn.sigmoid(odds)
                gradient = -rows.T @ (mass * sign * jax.nn.sigmoid(-sign * odds)) + ridge * weights
                hessian = (rows * (mass * probs * (1.0 - probs))[:, None]).T @ rows + ridge * jnp.eye(rows.shape[1])
                move = -jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
                length = jnp.asarray([1.0, 0.5, 0.25, 0.125])
                margins = sign[None] * (odds[None] + length[:, None] * (rows @ move)[None])
                loss = (mass[None] * jax.nn.softplus(-margins)).sum(-1)
                loss += 0.5 * ridge * ((weights[None] + length[:, None] * move[None]) ** 2).sum(-1)
                change = length[loss.argmin()] * move
                return turn + 1, weights + change, jnp.abs(change).max() > 1e-4 * jnp.abs(weights + change).max()

            def unfinished(state: tuple[Array, Array, Array]) -> Array:
                return (state[0] < steps) & state[2]

            return lax.while_loop(unfinished, newton, (jnp.int32(0), weights, jnp.bool_(True)))[1]

        def score(weights: Array, labelled: Array, picked: Array) -> tuple[Array, Array]:
            # Without a labelled row there is nothing to fit: all weights and log-odds stay 0.
            weights = jnp.where((real & labelled).any(), fit(weights, labelled, picked), weights)
            return weights, features @ weights

        def part(state: tuple[Array, Array, Array, Array], turn: tuple[Array, Array]) -> tuple[PyTree, PyTree]:
            weights, labelled, available, picked = state
            number, key = turn
            weights, odds = score(weights, labelled, picked.reshape(-1))
            index, valid = select_top(key, odds, available, view.row, size)
            own = jnp.where(valid, index, n)
            mine = jnp.zeros(n, bool).at[own].set(True, mode="drop")
            new = (weights, labelled | mine, available & ~mine, picked.at[number].set(own))
            return new, (index, valid, odds)

        labelled = (
            jnp.zeros(n, bool).at[jnp.where(view.labelled_index >= 0, view.labelled_index, n)].set(True, mode="drop")
        )
        parts = -(-k // size)
        state = (jnp.zeros(features.shape[1]), labelled, view.available, jnp.full((parts, size), n, jnp.int32))
        _, (index, valid, odds) = lax.scan(part, state, (jnp.arange(parts), jax.random.split(key, parts)))
        return Decision(
            index=index.reshape(-1)[:k], valid=valid.reshape(-1)[:k], log_prob=jnp.zeros(()), scores=odds[0]
        )

    return fixed_rule(act, embedding=True)
