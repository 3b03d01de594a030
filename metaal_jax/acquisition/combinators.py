"""Scorers made of scorers, and policies made of other policies."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.acquisition.lifts import (
    Scorer,
    check_count,
    descending_rank,
    one_of,
    require_policy,
    require_scorer,
    select_top,
)
from metaal_jax.base import Decision, Learner, Policy, PoolView, PyTree, require, take
from metaal_jax.rows import clean, predict_pool


def sum_of_ranks(scorers: Sequence[Scorer], *, weights: Sequence[float] | Array | None = None) -> Scorer:
    """Minus the weighted sum of the ranks that the scorers give a row: Borda's count. Equal weights by default.

    Ranks are those among the available rows, so scores of any scale can be combined.

    Raises:
      ValueError: without scorers, or for another number of weights.

    Reference: Dwork et al.: Rank Aggregation Methods for the Web, 2001.
    """
    return _of_ranks("sum_of_ranks", scorers, weights, lambda rank: rank)


def product_of_ranks(scorers: Sequence[Scorer], *, weights: Sequence[float] | Array | None = None) -> Scorer:
    """Minus the weighted sum of the logarithms of the ranks: a row that is first for one scorer is hard to beat.

    Raises:
      ValueError: without scorers, or for another number of weights.

    Reference: Breitling et al.: Rank Products, 2004.
    """
    return _of_ranks("product_of_ranks", scorers, weights, jnp.log)


def _of_ranks(
    name: str, scorers: Sequence[Scorer], weights: Sequence[float] | Array | None, of: Callable[[Array], Array]
) -> Scorer:
    scorers = tuple(scorers)
    require(scorers, f"{name}: no scorers given")
    for scorer in scorers:
        require_scorer(name, scorer)
    given = np.ones(len(scorers)) if weights is None else weights
    require(np.shape(given) == (len(scorers),), f"{name}: {len(scorers)} scorers need as many weights, got {weights}")

    def combined(key: Array, view: PoolView) -> Array:
        keys = jax.random.split(key, len(scorers))
        scores = jnp.stack([scorer(k, view) for scorer, k in zip(scorers, keys, strict=True)])
        # A row without a score by one of them has none, and takes part in no ranking.
        unknown = jnp.isnan(scores).any(0)
        ranks = jax.vmap(descending_rank, in_axes=(0, None))(scores, view.available & ~unknown)
        return jnp.where(unknown, jnp.nan, -(jnp.asarray(given, jnp.float32) @ of(ranks)))

    return combined


def per_cost(scorer: Scorer) -> Scorer:
    """Gain per cost: a non-negative score divided by the row's cost. Rows that cost nothing come first.

    Use a score that is 0 where nothing is gained, such as `entropy` or `bald`; a `margin` is negative, so take
    `1 + margin` there. Costs are in the units of the budget. The values of rows that cost
    nothing, whatever their score, are as large as floats are; among them the larger score comes first.

    Raises:
      ValueError: in the scorer, outside compiled programs, for negative scores.

    Reference: Settles, Craven, Friedland: Active Learning with Real Annotation Costs, 2008.
    """
    require_scorer("per_cost", scorer)

    def ratios(key: Array, view: PoolView) -> Array:
        scores = scorer(key, view)
        lowest = jnp.where(view.available & ~jnp.isnan(scores), scores, 0.0).min()
        require(lowest >= 0, f"per_cost: scores must not be negative, got {lowest}; shift them so that 0 is no gain")
        free = view.cost <= 0
        largest = np.finfo(scores.dtype).max
        paid = jnp.minimum(scores / jnp.where(free, 1.0, view.cost), largest / 4)
        # Between half the largest number and all of it.
        return jnp.where(free, largest * (1.0 - 0.5 / (1.0 + scores)), paid)

    return ratios


def subsampled(policy: Policy, *, rows: int) -> Policy:
    """Shows a costly rule no more than `rows` random available rows, drawn afresh every round.

    The rule sees a small pool: first the labelled rows (`capacity` of them, padded), then the drawn ones. It begins
    anew on each, so a rule that remembers earlier rounds should not be lifted. The decision's scores are -inf for
    rows that were not drawn.

    Raises:
      ValueError: for `rows < 1`; when acting, for a rule that asks for more than `rows` rows.
    """
    require_policy("subsampled", policy)
    require(rows >= 1, f"subsampled: rows must be at least 1, got {rows}")

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        draw_key, begin_key, act_key = jax.random.split(key, 3)
        n, capacity = view.row.shape[0], view.labelled_index.shape[0]
        count = min(rows, n)
        # Rows that hold NaN are drawn last.
        worth = jnp.where(clean(view).available, 0.0, jnp.nan)
        drawn, found = select_top(draw_key, worth, view.available, view.row, count)
        known = view.labelled_index >= 0
        place = jnp.concatenate([jnp.maximum(view.labelled_index, 0), drawn])
        small = view._replace(
            x=take(view.x, place),
            row=view.row[place],
            weight=jnp.concatenate([known, found]).astype(view.weight.dtype),
            queried=jnp.concatenate([jnp.ones(capacity, bool), jnp.zeros(count, bool)]),
            cost=view.cost[place],
            prediction=jax.tree.map(lambda leaf: leaf[:, place], view.prediction),
            labelled_index=jnp.where(known, jnp.arange(capacity, dtype=jnp.int32), -1),
        )
        decision, _ = policy.act(act_key, policy_params, policy.begin(begin_key, policy_params, small), small)
        check_count(decision.index.shape[0], count)
        scores = jnp.full(n, -jnp.inf).at[drawn].set(jnp.where(found, decision.scores[capacity:], -jnp.inf))
        return decision._replace(index=place[decision.index].astype(jnp.int32), scores=scores), policy_state

    return Policy(init=policy.init, begin=lambda key, policy_params, view: (), act=act)


def with_learner(policy: Policy, learner: Learner, *, own_start: bool = False, chunk: int | None = None) -> Policy:
    """Shows a policy the predictions of another learner, adapted to the same labels in every round.

    A committee, a posterior or a loss predictor then chooses for a single model that predicts; strategies that need
    different learners can be compared by one and the same.

    Args:
      policy: any policy; it sees the learner's meta-parameters, parameters and predictions.
      learner: what it sees.
      own_start: draws the learner's meta-parameters by its `init` when the run begins; otherwise they are the view's.
      chunk: rows predicted at a time, None for all at once.

    Returns:
      A `Policy` with the parameters of `policy`.

    Reference: Lowell, Lipton, Wallace: Practical Obstacles to Deploying Active Learning, 2019, on choosing by one model
    and training another.
    """

    require_policy("with_learner", policy)

    def show(key: Array, meta: PyTree, view: PoolView) -> PoolView:
        known = clean(view)
        params = learner.adapt(key, meta, known.labelled, unlabelled=known.x)
        prediction = predict_pool(learner, params, view.x, chunk=chunk)
        return view._replace(meta=meta, params=params, prediction=prediction)

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        init_key, adapt_key, begin_key = jax.random.split(key, 3)
        own = learner.init(init_key, view.x) if own_start else ()
        shown = show(adapt_key, own if own_start else view.meta, view)
        return own, policy.begin(begin_key, policy_params, shown)

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        own, inner = policy_state
        adapt_key, act_key = jax.random.split(key)
        shown = show(adapt_key, own if own_start else view.meta, view)
        decision, inner = policy.act(act_key, policy_params, inner, shown)
        return decision, (own, inner)

    return Policy(init=policy.init, begin=begin, act=act)


def epsilon_mixture(policy: Policy, other: Policy, *, epsilon: float | Array) -> Policy:
    """Takes each row of a batch from `other` with probability `epsilon`, the others from `policy`, best first.

    Args:
      policy: any policy.
      other: a policy of as many rows, often a random one; it sees those taken from `policy` as queried.
      epsilon: probability, for each of the batch's rows.

    Returns:
      A `Policy` with parameters `(those of policy, those of other)`, or `()` where neither has any; `log_prob` is 0.

    Raises:
      ValueError: for an epsilon outside [0, 1]; when acting, for policies of different batch sizes.
    """
    require((epsilon >= 0) & (epsilon <= 1), f"epsilon_mixture: epsilon must be a probability, got {epsilon}")
    both = (policy, other)
    for each in both:
        require_policy("epsilon_mixture", each)

    def init(key: Array) -> PyTree:
        return tuple(p.init(k) for p, k in zip(both, jax.random.split(key), strict=True))

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        keys = jax.random.split(key)
        return tuple(p.begin(k, own, view) for p, own, k in zip(both, policy_params or ((), ()), keys, strict=True))

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        params = policy_params or ((), ())
        draw_key, own_key, other_key = jax.random.split(key, 3)
        first, first_state = policy.act(own_key, params[0], policy_state[0], view)
        k = first.index.shape[0]
        own = k - (jax.random.uniform(draw_key, (k,)) < epsilon).sum()
        kept = first.valid & (jnp.arange(k) < own)
        rest = view._replace(queried=view.queried.at[first.index].max(kept))
        second, second_state = other.act(other_key, params[1], policy_state[1], rest)
        if second.index.shape != (k,):
            raise ValueError(f"epsilon_mixture: batches of {k} and of {second.index.shape[0]} rows; give one size")
        place = jnp.arange(k) - own
        late = jnp.maximum(place, 0)
        decision = Decision(
            index=jnp.where(place < 0, first.index, second.index[late]),
            valid=jnp.where(place < 0, first.valid, second.valid[late]),
            log_prob=jnp.zeros(()),
            scores=first.scores,
        )
        return decision, (first_state, second_state)

    return Policy(init=init, begin=begin, act=act)


def switch_at(policies: Sequence[Policy], *, labels: Sequence[int] | Array) -> Policy:
    """Goes from one rule to the next as labels are bought: `policies[i + 1]` from `labels[i]` labelled rows on.

    Typical rows are worth most while labels are few, uncertain ones later.

    Args:
      policies: rules without parameters, all of one batch size.
      labels: ascending numbers of labelled rows, one fewer than policies.

    Raises:
      ValueError: for another number of switching points, or points that do not ascend.

    Reference: Hacohen, Dekel, Weinshall: Active Learning on a Budget, 2022; Donmez, Carbonell, Bennett: Dual Strategy
    Active Learning, 2007.

    >>> from metaal_jax import acquisition
    >>> early, late = acquisition.typical(k=10), acquisition.top_k(acquisition.margin, k=10)
    >>> policy = acquisition.switch_at([early, late], labels=[50])
    """
    chosen = one_of(policies)
    points = labels if isinstance(labels, Array) else np.asarray(labels)
    count = len(tuple(policies))
    require(points.shape == (count - 1,), f"switch_at: {count} policies need {count - 1} points, got {labels}")
    require((points[1:] > points[:-1]).all(), f"switch_at: the points must ascend, got {labels}")

    def numbered(view: PoolView) -> PyTree:
        bought = (view.labelled_index >= 0).sum()
        return (bought >= jnp.asarray(points)).sum(dtype=jnp.int32), ((),) * count

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        return chosen.begin(key, numbered(view), view)

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        return chosen.act(key, numbered(view), policy_state, view)

    return Policy(init=lambda key: (), begin=begin, act=act)


class Plan(NamedTuple):
    """Rows that are to be asked for, in this order.

    Attributes:
      inner: state of the policy that plans.
      index: int32 `[rows]`.
      valid: bool `[rows]`.
    """

    inner: PyTree
    index: Array  # type: ignore[assignment]
    valid: Array


def planned(policy: Policy, *, rows: int, k: int = 1) -> Policy:
    """Asks for the batches of another policy `k` rows at a time; it chooses again when all of them were asked for.

    With few labels, a model's predictions change with each of them, and rules that rely on these predictions are
    misled; a batch chosen as a whole covers the pool evenly. Most rounds then cost nothing, except under `vmap`, where
    every round computes a plan.

    Args:
      policy: asks for `rows` rows a round.
      rows: of a plan, a multiple of `k`.
      k: rows a round.

    Returns:
      A `Policy` with the parameters of `policy`. Its decision's scores order the plan, -inf for rows outside of it.

    Raises:
      ValueError: for `rows` that are no multiple of `k`; in `act` for a policy of another batch size.

    >>> from metaal_jax import acquisition
    >>> policy = acquisition.planned(acquisition.max_herding(k=10), rows=10)  # asks for single rows
    """
    require_policy("planned", policy)
    require(k >= 1 and rows >= k and rows % k == 0, f"planned: a plan of {rows} rows must be a multiple of k={k}")

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> Plan:
        return Plan(policy.begin(key, policy_params, view), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def act(key: Array, policy_params: PyTree, policy_state: Plan, view: PoolView) -> tuple[Decision, Plan]:
        def left(plan: Plan) -> Array:
            return plan.valid & view.available[plan.index]

        def again(plan: Plan) -> Plan:
            decision, inner = policy.act(key, policy_params, plan.inner, view)
            if decision.index.shape[0] != rows:
                raise ValueError(f"planned: the policy asks for {decision.index.shape[0]} rows, the plan is of {rows}")
            return Plan(inner, decision.index, decision.valid)

        plan = lax.cond(left(policy_state).any(), lambda plan: plan, again, policy_state)
        place = jnp.argsort(~left(plan), stable=True)[:k]
        order = jnp.where(left(plan), -jnp.arange(rows, dtype=jnp.float32), -jnp.inf)
        decision = Decision(
            index=plan.index[place],
            valid=left(plan)[place],
            log_prob=jnp.zeros(()),
            scores=jnp.full(view.row.shape, -jnp.inf).at[plan.index].max(order),
        )
        return decision, plan

    return Policy(init=policy.init, begin=begin, act=act)
