"""Lifts: from the score of a row to a scorer, from a scorer to a policy."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.base import Decision, Policy, PoolView, PyTree, Trainable, require
from metaal_jax.rows import clean, row_noise

Scorer = Callable[[Array, PoolView], Array]


def require_policy(name: str, policy: object) -> None:
    """Raises `ValueError` unless `policy` is a `Policy`, and says what to type; `name` is what wants one."""
    if isinstance(policy, Policy):
        return
    if isinstance(policy, str):
        hint = f"load a trained one with policies.load({policy!r}), or take a rule such as acquisition.typical(k=10)"
    elif callable(policy):
        scorer = getattr(policy, "__name__", "scorer")
        hint = "this looks like a scorer, or like a factory that was not called; make a policy of a scorer with "
        hint += f"acquisition.top_k({scorer}, k=10)"
    elif isinstance(getattr(policy, "params", None), dict) and hasattr(policy, "network"):
        hint = "make a policy of what policies.load gives with policies.fixed(policies.learned(saved.network, k=10), "
        hint += "saved.params)"
    else:
        hint = "take a rule such as acquisition.typical(k=10)"
    raise ValueError(f"{name}: a Policy is wanted, got {_shown(policy)}; {hint}")


def require_scorer(name: str, scorer: object) -> None:
    """Raises `ValueError` unless `scorer` may be one: a function `(key, view) -> [n]`; `name` is what wants one."""
    if isinstance(scorer, Policy):
        raise ValueError(f"{name}: a scorer is wanted, such as acquisition.margin, got a Policy; give the scorer that "
                         "it was made from")  # fmt: skip
    if not callable(scorer):
        raise ValueError(f"{name}: a scorer is wanted, such as acquisition.margin, got {_shown(scorer)}")


def _shown(value: object) -> str:
    name = getattr(value, "__name__", None)
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}" + (f" ({name})" if name else "")


def per_row(score: Callable[[Array], Array]) -> Scorer:
    """Lifts the score of one row, `logits [m, c] -> []`, to a scorer by `vmap` over the pool.

    A row of NaN logits should score NaN, which ranks last, as it does by itself in nearly all arithmetic.
    """

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
    index = top_by_noise(scores, available, row_noise(key, row), k)
    return index, available[index]


def top_by_noise(scores: Array, available: Array, noise: Array, k: int) -> Array:
    """The positions, int32 `[k]`, of `select_top`, with the noise at hand that breaks ties."""
    scores = jnp.nan_to_num(scores, nan=-jnp.inf)
    scores = jnp.where(available, scores, -jnp.inf)
    # The k-th best score is a threshold: what lies above is in, noise decides among those on it. Comparisons are made
    # with the values that top-k returns, as a compiler may form the scores anew for each use, and round them otherwise.
    best, place = lax.top_k(scores, k)
    threshold = best.min()
    rank = jnp.where(scores == threshold, noise, -1)
    rank = rank.at[place].set(jnp.where(best > threshold, jnp.int32(2**30), noise[place]))
    # XLA's fast top-k on a CPU is for float32; read as floats, positive integers keep their order.
    as_float = lax.bitcast_convert_type(rank + jnp.int32(2**23), jnp.float32)
    _, index = lax.top_k(jnp.where((rank >= 0) & available, as_float, -1.0), k)
    order = jnp.lexsort((-noise[index], -scores[index]))
    return index[order].astype(jnp.int32)


def best_by_noise(scores: Array, available: Array, noise: Array) -> Array:
    """The position, int32 `[]`, of the best available row; where several are best, of that with the most noise."""
    value, place = lax.top_k(scores, 1)
    tied = (scores == value) | (jnp.arange(scores.shape[0]) == place)
    return jnp.where(available & tied, noise, -1).argmax().astype(jnp.int32)


def descending_rank(scores: Array, available: Array) -> Array:
    """Rank of each score among the available rows, 1 for the highest, float32 `[n]`; ties share their mean rank.

    Rows that are not available get the rank behind all others; NaN is the lowest score.
    """
    count = available.sum()
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
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
        best = best_by_noise(scores, available, noise)
        return (update(carry, best), available.at[best].set(False)), (best, available[best])

    _, (index, valid) = lax.scan(pick, (carry, view.available), length=k)
    scores = score(carry)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=scores)


def fill_up(decision: Decision, rest: Array, row: Array) -> Decision:
    """The decision with rows of `rest`, bool `[n]`, in the places that are not valid, in the order of their numbers.

    What was left out of a choice because it holds no number comes in here: last, but before nothing at all. Such rows
    have score -inf.
    """
    k = decision.index.shape[0]
    chosen = jnp.zeros(rest.shape, bool).at[decision.index].max(decision.valid)
    rest = rest & ~chosen
    # Positive integers read as floats keep their order, and the fast top-k is for floats.
    rank = lax.bitcast_convert_type(jnp.int32(0x7F000000) - row, jnp.float32)
    _, others = lax.top_k(jnp.where(rest, rank, -1.0), k)
    turn = jnp.where(decision.valid, k, jnp.cumsum(~decision.valid) - 1)
    new = others.astype(jnp.int32)[jnp.minimum(turn, k - 1)]
    use = ~decision.valid & (turn < rest.sum())
    return Decision(
        index=jnp.where(use, new, decision.index),
        valid=decision.valid | use,
        log_prob=decision.log_prob,
        scores=jnp.where(rest, -jnp.inf, decision.scores),
    )


def contained(policy: Policy, *, logits: bool = False, embedding: bool = False) -> Policy:
    """The policy, protected from rows that are not numbers: it sees a clean view, and they come last.

    Args:
      policy: one that looks at the pool by itself; those that only hand the view on need no protection.
      logits, embedding: which part of the prediction it reads, see `rows.clean`.
    """

    def shown(view: PoolView) -> PoolView:
        return clean(view, logits=logits, embedding=embedding)

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        return policy.begin(key, policy_params, shown(view))

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        known = shown(view)
        decision, policy_state = policy.act(key, policy_params, policy_state, known)
        return fill_up(decision, view.available & ~known.available, view.row), policy_state

    if policy.train is None:
        return Policy(init=policy.init, begin=begin, act=act)
    inner = policy.train

    def observe(key: Array, policy_state: PyTree, view: PoolView) -> PyTree:
        return inner.observe(key, policy_state, shown(view))

    train = Trainable(observe=observe, evaluate=inner.evaluate, score=inner.score)
    return Policy(init=policy.init, begin=begin, act=act, train=train)


def fixed_rule(
    act: Callable[[Array, PyTree, PoolView], Decision],
    begin: Callable[[Array, PoolView], PyTree] | None = None,
    *,
    logits: bool = False,
    embedding: bool = False,
) -> Policy:
    """A policy without parameters from `act(key, policy_state, view)` and `begin(key, view) -> policy_state`.

    Both see a clean view, see `contained`; `logits` and `embedding` say which part of the prediction they read.
    """

    def begin_(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        del policy_params
        return () if begin is None else begin(key, view)

    def act_(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        del policy_params
        return act(key, policy_state, view), policy_state

    return contained(Policy(init=lambda key: (), begin=begin_, act=act_), logits=logits, embedding=embedding)


def scored(key: Array, scorer: Scorer, view: PoolView) -> tuple[Array, PoolView, Array]:
    """A scorer's scores, for rules that compare them across the pool: `(scores [n], view, rest bool [n])`.

    Rows whose score is NaN are not available in the view returned; they are the `rest`, for `fill_up`. Their score is
    the lowest finite number.
    """
    scores = scorer(key, view)
    unknown = jnp.isnan(scores)
    left = view._replace(queried=view.queried | unknown)
    return jnp.where(unknown, np.finfo(scores.dtype).min, scores), left, view.available & unknown


def top_k(scorer: Scorer, *, k: int) -> Policy:
    """Queries the `k` rows with the highest scores; ties are broken by the key.

    >>> from metaal_jax import acquisition
    >>> policy = acquisition.top_k(acquisition.margin, k=10)
    """
    require_scorer("top_k", scorer)
    require(k >= 1, f"top_k: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        score_key, tie_key = jax.random.split(key)
        scores = scorer(score_key, view)
        index, valid = select_top(tie_key, scores, view.available, view.row, k)
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
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
    for policy in policies:
        require_policy("one_of", policy)

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

        branches = [functools.partial(branch, i) for i in range(len(policies))]
        acted: tuple[Decision, PyTree] = lax.switch(number, branches, policy_state)
        return acted

    return Policy(init=init, begin=begin, act=act)
