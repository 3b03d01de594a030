"""Lifts: from the score of a row to a scorer, from a scorer to a policy."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.rows import row_noise

Scorer = Callable[[Array, PoolView], Array]


def per_row(score: Callable[[Array], Array]) -> Scorer:
    """Lifts the score of one row, `logits [m, c] -> []`, to a scorer by `vmap` over the pool."""

    def scorer(key: Array, view: PoolView) -> Array:
        del key
        return jax.vmap(score, in_axes=1)(view.prediction.logits)

    return scorer


def check_count(k: int, n: int) -> None:
    """Raises `ValueError` unless `k` rows can be chosen of a pool of `n`."""
    if not 1 <= k <= n:
        raise ValueError(f"cannot choose {k} rows of a pool of {n}; ask for 1 to {n}")


def select_top(key: Array, scores: Array, available: Array, row: Array, k: int) -> tuple[Array, Array]:
    """The `k` best available rows, ties broken by the key and never by position.

    Args:
      key: consumed by the tie break.
      scores: `[n]`; infinities count as the largest finite numbers, NaN as the lowest score.
      available: bool `[n]`.
      row: int32 `[n]`, row numbers that the tie-breaking noise belongs to.
      k: how many, static, at most `n`.

    Returns:
      `(index int32 [k], valid bool [k])`, best first; valid is False where fewer than `k` rows were available.

    Raises:
      ValueError: for `k` outside `1..n`.
    """
    check_count(k, scores.shape[0])
    scores = jnp.nan_to_num(scores, nan=-jnp.inf)
    scores = jnp.where(available, scores, -jnp.inf)
    # The k-th best score is a threshold: what lies above is in, noise decides among those on it.
    threshold = lax.top_k(scores, k)[0].min()
    noise = row_noise(key, row)
    rank = jnp.where(scores > threshold, jnp.int32(2**30), noise)
    # XLA's fast top-k on a CPU is for float32; read as floats, positive integers keep their order.
    rank = lax.bitcast_convert_type(rank + jnp.int32(2**23), jnp.float32)
    rank = jnp.where((scores >= threshold) & available, rank, -1.0)
    _, index = lax.top_k(rank, k)
    order = jnp.lexsort((-noise[index], -scores[index]))
    index = index[order]
    return index.astype(jnp.int32), available[index]


def descending_rank(scores: Array, available: Array) -> Array:
    """Rank of each score among the available rows, 1 for the highest, float32 `[n]`; ties share their mean rank.

    Rows that are not available get the rank behind all others.
    """
    count = available.sum()
    ordered = jnp.sort(jnp.where(available, -scores, jnp.inf))
    low = jnp.searchsorted(ordered, -scores, side="left")
    high = jnp.minimum(jnp.searchsorted(ordered, -scores, side="right"), count)
    return jnp.where(available, 0.5 * (low + 1 + high), count + 1.0).astype(jnp.float32)


def pick_in_turn(
    key: Array,
    view: PoolView,
    k: int,
    carry: PyTree,
    score: Callable[[PyTree], Array],
    update: Callable[[PyTree, Array], PyTree],
) -> Decision:
    """Chooses `k` rows greedily, one after the other: the loop of all joint rules.

    Args:
      key: consumed by the tie break.
      view: the pool.
      k: how many, static, at most `n`.
      carry: what the rule knows of the rows that are covered so far, such as distances to the nearest of them.
      score: `(carry) -> [n]`, higher = sooner; NaN counts as the lowest score.
      update: `(carry, position int32 []) -> carry` after a row was chosen.

    Returns:
      The `Decision`, in the order of choice, with the scores before the first choice.

    Raises:
      ValueError: for `k` outside `1..n`.
    """
    check_count(k, view.row.shape[0])
    noise = row_noise(key, view.row)

    def pick(state: tuple[PyTree, Array], _: None) -> tuple[tuple[PyTree, Array], tuple[Array, Array]]:
        carry, available = state
        scores = jnp.where(available, jnp.nan_to_num(score(carry), nan=-jnp.inf), -jnp.inf)
        best = jnp.where(available & (scores == scores.max()), noise, -1).argmax().astype(jnp.int32)
        return (update(carry, best), available.at[best].set(False)), (best, available[best])

    _, (index, valid) = lax.scan(pick, (carry, view.available), length=k)
    return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=score(carry))


def fixed_rule(act: Callable[[Array, PyTree, PoolView], Decision], begin: Callable | None = None) -> Policy:
    """A policy without parameters from `act(key, policy_state, view)` and `begin(key, view) -> policy_state`."""

    def begin_(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        del policy_params
        return () if begin is None else begin(key, view)

    def act_(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        del policy_params
        return act(key, policy_state, view), policy_state

    return Policy(init=lambda key: (), begin=begin_, act=act_)


def top_k(scorer: Scorer, *, k: int) -> Policy:
    """Queries the `k` rows with the highest scores; ties are broken by the key.

    >>> from metaal_jax import acquisition
    >>> policy = acquisition.top_k(acquisition.margin, k=10)
    """
    require(k >= 1, f"top_k: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        score_key, tie_key = jax.random.split(key)
        scores = scorer(score_key, view)
        index, valid = select_top(tie_key, scores, view.available, view.row, k)
        return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=scores)

    return fixed_rule(act)


def one_of(policies: Sequence[Policy]) -> Policy:
    """The rule whose number stands in the policy's parameters, so that one program serves several rules.

    `policy_params` is `(number int32 [], tuple of each rule's parameters)`; `init` sets the number to 0. The number may
    differ between runs without a new compilation. Only the chosen rule's `act` runs, unless the number is vmapped:
    then all do. What any of the rules reads is computed for all of them (see the design's rule on selectors).

    Raises:
      ValueError: without policies.
    """
    policies = tuple(policies)
    require(policies, "one_of: no policies given")

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, len(policies))
        return jnp.int32(0), tuple(policy.init(k) for policy, k in zip(policies, keys, strict=True))

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        _, params = policy_params
        return tuple(policy.begin(key, own, view) for policy, own in zip(policies, params, strict=True))

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        number, params = policy_params

        def branch(i: int, states: PyTree) -> tuple[Decision, PyTree]:
            decision, state = policies[i].act(key, params[i], states[i], view)
            return decision, (*states[:i], state, *states[i + 1 :])

        return lax.switch(number, [functools.partial(branch, i) for i in range(len(policies))], policy_state)

    return Policy(init=init, begin=begin, act=act)
