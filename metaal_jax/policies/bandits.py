"""Bandits over query rules: which rule to listen to is learned during a single run, without meta-training."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import check_count, require_policy
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require, require_classes, take
from metaal_jax.losses import accuracy, consensus

RewardFn = Callable[[PoolView, Array], Array]


class BanditState(NamedTuple):
    """What a bandit over `N` rules carries from round to round.

    Attributes:
      log_weight: float32 `[N]`, logarithms of the rules' weights, shifted so that the largest is 0.
      rule_probability: float32 `[N]`, the probabilities with which the last round's rule was drawn, 1 / N before the
        first round.
      row_probability: float32 `[n]`, that with which each row was asked for; 1 for rows that never were, such as those
        labelled before the run.
      index: int32 `[k]`, the rows asked for in the last round.
      valid: bool `[k]`, False where nothing was asked for, such as before the first round.
      advice: float32 `[N, k]`, the weight of each of these rows in the advice of each rule: 1 over the size of its
        batch, or 0 where the batch does not hold the row.
      width: float32 `[N]`, the bound on the variance of each rule's estimated reward of the last round.
      rules: the states of the rules.
    """

    log_weight: Array
    rule_probability: Array
    row_probability: Array
    index: Array  # type: ignore[assignment]
    valid: Array
    advice: Array
    width: Array
    rules: PyTree


def importance_weighted_accuracy(view: PoolView, probability: Array) -> Array:
    """Accuracy on the labelled rows, each weighted by 1 over the probability with which it was asked for.

    `sum_t [f(x_t) = y_t] / q_t`, divided by `sum_t 1 / q_t`, where `f` is the model that was adapted to these rows. A
    row that was likely to be asked for counts less, so the favourite rule's rows do not drown those of the others: with
    the bandit's probabilities, this estimates the accuracy on all rows that any of the rules proposed. The paper
    divides by rows of the pool times rounds instead, which is what the weights sum to on average where every row may be
    drawn in every round, and far more where rules rank. The sum serves both, and keeps the reward in [0, 1].

    Args:
      view: the pool; labels must be classes.
      probability: float32 `[n]`, above 0; 1 for rows labelled before the run.

    Returns:
      float32 `[]`, 0 without labelled rows.

    Reference: Hsu, Lin: Active Learning by Learning, 2015.
    """
    require_classes("importance_weighted_accuracy", view)
    index = jnp.maximum(view.labelled_index, 0)
    weight = jnp.where(view.labelled_index >= 0, view.labelled.weight, 0.0) / probability[index]
    return accuracy(consensus(view.prediction.logits[:, index]), view.labelled.y, weight)


def exp4p(
    policies: Sequence[Policy],
    *,
    k: int,
    horizon: int | Array,
    reward: RewardFn,
    delta: float | Array = 0.1,
    exploration: float | Array | None = None,
) -> Policy:
    """EXP4.P over query rules: each round draws one of `N` rules by its weight, and asks for that rule's batch.

    With `m = exploration` and weights `w`, all 1 at first, rule `i` is drawn with probability

        p_i = (1 - N m) w_i / sum(w) + m

    so that row `j` is asked for with probability `q_j`, the sum of `p_i` over the rules whose batch `B_i` holds it. The
    next `act` reads the reward `r` of the batch, and each rule has its share for the rows that it had proposed, too:

        y_i = sum of r / q_j over the rows j of B_i that were asked for and answered, divided by |B_i|
        v_i = mean of 1 / q_j over the rows j of B_i
        w_i <- w_i exp(m / 2 (y_i + v_i sqrt(ln(N / delta) / (N horizon))))

    This is the paper's update for experts that advise to draw a row of their batch, with an arm for each rule: `y_i` is
    unbiased, `v_i` bounds its variance. Where batches do not overlap, both divide by `p_i`. A row without an answer
    earns nothing. A round in which nothing could be asked for changes no weight. What a rule draws by itself is taken
    as given: `p` and `q` are the probabilities of the bandit's own draw.

    Every rule's `act` runs in each round, and what any of them reads is computed.

    Args:
      policies: the rules, `k` rows a round each.
      k: rows a round.
      horizon: rounds of the run, for the default exploration and the confidence bound.
      reward: `(view, probability [n]) -> float32 []` in [0, 1], how well the run stands after the last batch; given
        the probability with which each labelled row was asked for.
      delta: how probably the paper's bound on the regret may fail; lower values favour rules that are seldom drawn.
      exploration: the least probability of each rule, twice the step size; None for the paper's
        `sqrt(ln(N) / (N horizon))`, or 1 / N if that is less.

    Returns:
      A `Policy` with the rules' parameters as a tuple, or `()` where no rule has any, and a `BanditState`. `log_prob`
      is that of the batch: rules that propose the same rows add up, each with the log-probability that it reports for
      its own draw. `scores` are those of the rule that was drawn.

    Raises:
      ValueError: without rules, for `k < 1`, `horizon < 1`, a delta outside (0, 1] or an exploration outside
        (0, 1 / N]; when the run begins, for a `k` beyond the pool; when acting, for a rule of another batch size.

    Reference: Beygelzimer, Langford, Li, Reyzin, Schapire: Contextual Bandit Algorithms with Supervised Learning
    Guarantees, 2011.

    >>> import jax
    >>> from metaal_jax import acquisition
    >>> from metaal_jax.policies import bandits
    >>> rules = [acquisition.top_k(scorer, k=10) for scorer in (acquisition.margin, acquisition.random)]
    >>> def classes_met(view, probability):
    ...     truth = jax.nn.one_hot(view.labelled.y, view.prediction.logits.shape[-1])
    ...     return (truth * view.labelled.weight[:, None]).max(0).mean()
    >>> policy = bandits.exp4p(rules, k=10, horizon=30, reward=classes_met)
    """
    policies = tuple(policies)
    count = len(policies)
    require(policies, "exp4p: no policies given")
    for policy in policies:
        require_policy("exp4p", policy)
    require(k >= 1, f"exp4p: k must be at least 1, got {k}")
    require(horizon >= 1, f"exp4p: horizon must be at least 1 round, got {horizon}")
    require((delta > 0) & (delta <= 1), f"exp4p: delta must be above 0 and at most 1, got {delta}")
    if exploration is not None:
        # 1 / N as a float32 may lie above 1 / N.
        allowed = (exploration > 0) & (exploration * count <= 1 + 1e-6)
        require(allowed, f"exp4p: exploration must be above 0 and at most 1 / {count}, got {exploration}")
    rounds = jnp.asarray(horizon, jnp.float32)
    default = jnp.sqrt(jnp.log(count) / (count * rounds))
    least = jnp.minimum(default if exploration is None else jnp.asarray(exploration, jnp.float32), 1 / count)
    bonus = jnp.sqrt((jnp.log(count) - jnp.log(jnp.asarray(delta, jnp.float32))) / (count * rounds))

    def init(key: Array) -> PyTree:
        return tuple(policy.init(own) for policy, own in zip(policies, jax.random.split(key, count), strict=True))

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> BanditState:
        n = view.row.shape[0]
        check_count(k, n)
        params, keys = policy_params or ((),) * count, jax.random.split(key, count)
        return BanditState(
            log_weight=jnp.zeros(count),
            rule_probability=jnp.full(count, 1 / count),
            row_probability=jnp.ones(n),
            index=jnp.zeros(k, jnp.int32),
            valid=jnp.zeros(k, bool),
            advice=jnp.zeros((count, k)),
            width=jnp.zeros(count),
            rules=tuple(policy.begin(own, p, view) for policy, p, own in zip(policies, params, keys, strict=True)),
        )

    def learn(state: BanditState, view: PoolView) -> Array:
        """The logarithms of the weights once the last round's reward is known."""
        n = view.row.shape[0]
        answered = (view.labelled_index >= 0) & (view.labelled.weight > 0)
        labelled = _holds(jnp.where(answered, view.labelled_index, n), n)[state.index]
        worth = reward(view, state.row_probability) / state.row_probability[state.index]
        estimate = (state.advice * jnp.where(state.valid & labelled, worth, 0.0)[None]).sum(-1)
        log_weight = state.log_weight + 0.5 * least * (estimate + bonus * state.width)
        return log_weight - log_weight.max()

    def act(
        key: Array, policy_params: PyTree, policy_state: BanditState, view: PoolView
    ) -> tuple[Decision, BanditState]:
        n, params = view.row.shape[0], policy_params or ((),) * count
        log_weight = learn(policy_state, view)
        p = jnp.maximum(1 - count * least, 0.0) * jax.nn.softmax(log_weight) + least
        draw_key, *keys = jax.random.split(key, count + 1)
        acted = [
            policy.act(rule_key, own, state, view)
            for policy, own, state, rule_key in zip(policies, params, policy_state.rules, keys, strict=True)
        ]
        for decision, _ in acted:
            if decision.index.shape != (k,):
                raise ValueError(f"exp4p: every rule must ask for {k} rows, one asks for {decision.index.shape[0]}")
        each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(decision for decision, _ in acted))
        place = jnp.where(each.valid, each.index, n)
        batch = jax.vmap(_holds, in_axes=(0, None))(place, n)
        q = jnp.where(batch, p[:, None], 0.0).sum(0)
        size = jnp.maximum(each.valid.sum(-1), 1)
        drawn = jax.random.categorical(draw_key, jnp.log(p))
        chosen = take(each, drawn)
        same = (batch == batch[drawn][None]).all(-1)
        decision = Decision(
            index=chosen.index,
            valid=chosen.valid,
            log_prob=jax.nn.logsumexp(jnp.log(p) + each.log_prob, where=same),
            scores=chosen.scores,
        )
        return decision, BanditState(
            log_weight=log_weight,
            rule_probability=p,
            row_probability=policy_state.row_probability.at[place[drawn]].set(q[chosen.index], mode="drop"),
            index=chosen.index,
            valid=chosen.valid,
            advice=(batch[:, chosen.index] & chosen.valid[None]) / size[:, None],
            width=(each.valid / jnp.where(each.valid, q[each.index], 1.0)).sum(-1) / size,
            rules=tuple(state for _, state in acted),
        )

    return Policy(init=init, begin=begin, act=act)


def albl(
    policies: Sequence[Policy],
    *,
    k: int,
    horizon: int | Array,
    delta: float | Array = 0.1,
    exploration: float | Array | None = None,
) -> Policy:
    """Active learning by learning: `exp4p` over query rules, paid by the accuracy on the rows asked for so far.

    The reward of a batch is `importance_weighted_accuracy` of the model that has learned from it, so no validation rows
    are needed. The authors have a random rule among the others: the accuracy then looks at rows from everywhere. It is
    an accuracy on training rows, and not its gain: rules are told apart as far as their last batch changes it.

    Args:
      policies: the rules, `k` rows a round each.
      k: rows a round.
      horizon: rounds of the run, for the default exploration and the confidence bound.
      delta: how probably the bound on the regret may fail; lower values favour rules that are seldom drawn.
      exploration: the least probability of each rule, twice the step size; None for `sqrt(ln(N) / (N horizon))`.

    Returns:
      A `Policy`, see `exp4p`.

    Raises:
      ValueError: as `exp4p` does.

    Reference: Hsu, Lin: Active Learning by Learning, 2015.

    >>> from metaal_jax import acquisition
    >>> from metaal_jax.policies import bandits
    >>> scorers = (acquisition.margin, acquisition.entropy, acquisition.random)
    >>> policy = bandits.albl([acquisition.top_k(scorer, k=10) for scorer in scorers], k=10, horizon=30)
    """
    return exp4p(
        policies, k=k, horizon=horizon, reward=importance_weighted_accuracy, delta=delta, exploration=exploration
    )


def _holds(index: Array, n: int) -> Array:
    """Bool `[n]`, which rows `index` holds; entries of `n` are none."""
    return jnp.zeros(n, bool).at[index].set(True, mode="drop")
