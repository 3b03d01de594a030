"""Lifts that look at the batch as a whole: drawn by chance, even over classes, or spread out."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.acquisition.lifts import (
    Scorer,
    check_count,
    descending_rank,
    fill_up,
    fixed_rule,
    pick_in_turn,
    require_scorer,
    scored,
    select_top,
)
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require, require_classes
from metaal_jax.losses import consensus


def _finite(scores: Array) -> Array:
    """Infinities as the largest numbers that leave room for a sum."""
    largest = np.finfo(scores.dtype).max / 16
    return jnp.clip(scores, -largest, largest)


def stochastic_top_k(
    scorer: Scorer, *, k: int, kind: Literal["softmax", "power", "rank"] = "power", beta: float | Array = 1.0
) -> Policy:
    """A batch drawn without replacement, better rows with a higher probability: top-k of a score with Gumbel noise.

    The rows of a top-k are often alike; noise breaks that at no cost. A row is drawn in proportion to `exp(beta s)`
    (`"softmax"`), `s^beta` (`"power"`, for non-negative scores; no row's chance is quite 0) or `rank^-beta` (`"rank"`,
    1 for the best). `log_prob` is that of the rows in their order (Plackett-Luce); it has a gradient with respect to
    the scores and `beta`. Noise belongs to rows, so the draw does not depend on the order of the pool.

    Args:
      scorer: any scorer.
      k: rows a round.
      kind: what the noise is added to.
      beta: from 0, a random batch, to infinity, the top-k, whose `log_prob` is 0.

    Raises:
      ValueError: for `k < 1`, `beta < 0` or an unknown kind.

    Reference: Kirsch et al.: Stochastic Batch Acquisition, 2021.
    """
    require_scorer("stochastic_top_k", scorer)
    require(k >= 1, f"stochastic_top_k: k must be at least 1, got {k}")
    require(beta >= 0, f"stochastic_top_k: beta must not be negative, got {beta}")
    if kind not in ("softmax", "power", "rank"):
        raise ValueError(f"stochastic_top_k: kind must be 'softmax', 'power' or 'rank', got {kind!r}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        check_count(k, view.row.shape[0])
        score_key, noise_key, tie_key = jax.random.split(key, 3)
        scores, view, rest = scored(score_key, scorer, view)
        available = view.available
        logits = _finite(scores)
        if kind == "power":
            logits = jnp.log(jnp.maximum(logits, 1e-30))
        elif kind == "rank":
            logits = -jnp.log(descending_rank(logits, available))
        # Only differences count; none is above 0, and for a large factor none is infinite.
        logits = jnp.where(available, logits - lax.stop_gradient(jnp.where(available, logits, -jnp.inf).max()), 0.0)
        gumbel = jax.vmap(lambda row: jax.random.gumbel(jax.random.fold_in(noise_key, row)))(view.row)
        # The same order whether the noise is divided or the scores are multiplied: neither becomes infinite.
        factor = jnp.asarray(beta, logits.dtype)
        large = factor > 1.0
        worth = logits * jnp.where(large, 1.0, factor) + gumbel / jnp.where(large, factor, 1.0)
        index, valid = select_top(tie_key, worth, available, view.row, k)
        sure = jnp.isinf(factor)
        logits = jnp.maximum(jnp.where(sure, 1.0, factor) * logits, -np.finfo(logits.dtype).max / 16)
        log_prob = jnp.where(sure, 0.0, _sequence(logits, available, index, valid))
        return fill_up(Decision(index=index, valid=valid, log_prob=log_prob, scores=scores), rest, view.row)

    return fixed_rule(act)


def _sequence(logits: Array, available: Array, index: Array, valid: Array) -> Array:
    """Log-probability of drawing rows `index` in this order, without replacement, in proportion to `exp(logits)`."""
    chosen = jnp.zeros(logits.shape, bool).at[index].max(valid)
    # Finite, so that gradients are.
    others = jax.nn.logsumexp(jnp.where(available & ~chosen, logits, -1e35))
    own = jnp.where(valid, logits[index], -1e35)
    # What is left before each draw: all that is never drawn, and this and the later draws.
    later = lax.associative_scan(jnp.logaddexp, own[::-1])[::-1]
    return jnp.where(valid, own - jnp.logaddexp(others, later), 0.0).sum()


def class_balanced(scorer: Scorer, *, k: int) -> Policy:
    """Fills up the classes evenly: each pick is the best-scored row among those predicted as the rarest class so far.

    Classes are counted over the labelled rows, by their labels, and the picks of this batch, by their predictions;
    classes that nothing available is predicted as are passed over. From a cold start all counts are 0.

    Raises:
      ValueError: for `k < 1`.

    Reference: Bengar et al.: Class-Balanced Active Learning for Image Classification, 2022; there the balance is a
    penalty on the score, here it comes first.
    """
    require_scorer("class_balanced", scorer)
    require(k >= 1, f"class_balanced: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        require_classes("class_balanced", view)
        score_key, tie_key = jax.random.split(key)
        scores, view, rest = scored(score_key, scorer, view)
        # -inf is kept for rows of classes that are not due.
        scores = _finite(scores)
        predicted = consensus(view.prediction.logits).argmax(-1)
        classes = view.prediction.logits.shape[-1]
        counts = jnp.zeros(classes).at[view.labelled.y].add(view.labelled.weight > 0)

        def due(carry: tuple[Array, Array]) -> Array:
            counts, available = carry
            own = counts[predicted]
            return jnp.where(own == jnp.where(available, own, jnp.inf).min(), scores, -jnp.inf)

        def count(carry: tuple[Array, Array], position: Array) -> tuple[Array, Array]:
            counts, available = carry
            return counts.at[predicted[position]].add(1.0), available.at[position].set(False)

        decision = pick_in_turn(tie_key, view, k, (counts, view.available), due, count)
        return fill_up(
            Decision(index=decision.index, valid=decision.valid, log_prob=decision.log_prob, scores=scores),
            rest,
            view.row,
        )

    return fixed_rule(act, logits=True)


def diverse(
    scorer: Scorer,
    *,
    k: int,
    balance: float | Array | None = None,
    distance: Callable[[Array, Array], Array] | None = None,
) -> Policy:
    """A greedy diverse batch from any score and any distance: ranked batch-mode active learning.

    Each pick maximises `a * (1 - similarity) + (1 - a) * score`, where the score is scaled to 0..1 over the available
    rows and the similarity `1 / (1 + distance)` is that to the nearest row labelled or already chosen. From a cold
    start the score alone decides the first pick.

    Args:
      scorer: any scorer.
      k: rows a round.
      balance: `a`, from 0, the score alone, to 1, the distance alone. None for the share of rows that are neither
        labelled nor chosen, as in the paper: distance counts first, the score later.
      distance: `(embedding [n, d], one row [d]) -> [n]`, not negative; None for the Euclidean one.

    Raises:
      ValueError: for `k < 1` or a balance outside [0, 1].

    Reference: Cardoso et al.: Ranked Batch-Mode Active Learning, 2017.
    """
    require_scorer("diverse", scorer)
    require(k >= 1, f"diverse: k must be at least 1, got {k}")
    if balance is not None:
        require((balance >= 0) & (balance <= 1), f"diverse: balance must lie in [0, 1], got {balance}")
    distance = _euclidean if distance is None else distance

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        score_key, tie_key = jax.random.split(key)
        scores, view, rest = scored(score_key, scorer, view)
        scores, available = _finite(scores), view.available
        low = jnp.where(available, scores, jnp.inf).min()
        high = jnp.where(available, scores, -jnp.inf).max()
        scaled = jnp.where(high > low, (scores - low) / jnp.where(high > low, high - low, 1.0), 0.0)
        embedding = view.prediction.embedding.mean(0)
        known = view.labelled_index >= 0
        real = (view.weight > 0).sum()

        def cover(nearest: Array, position: Array) -> Array:
            return jnp.minimum(nearest, distance(embedding, embedding[position]))

        def cover_known(nearest: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            position, is_known = entry
            return jnp.where(is_known, cover(nearest, position), nearest), None

        nothing = jnp.full(scores.shape, jnp.inf)
        nearest, _ = lax.scan(cover_known, nothing, (jnp.maximum(view.labelled_index, 0), known))

        def value(carry: tuple[Array, Array]) -> Array:
            nearest, taken = carry
            share = (real - taken) / jnp.maximum(real, 1) if balance is None else balance
            both = share * (1.0 - 1.0 / (1.0 + nearest)) + (1.0 - share) * scaled
            return jnp.where(jnp.isinf(nearest), scaled, both)

        decision = pick_in_turn(
            tie_key, view, k, (nearest, known.sum()), value, lambda c, position: (cover(c[0], position), c[1] + 1)
        )
        return fill_up(decision, rest, view.row)

    return fixed_rule(act, embedding=True)


def _euclidean(embedding: Array, row: Array) -> Array:
    return jnp.sqrt(((embedding - row[None]) ** 2).sum(-1))
