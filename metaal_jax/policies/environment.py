"""The active-learning loop as a Markov decision process, for any JAX reinforcement-learning code.

    state         a problem, its labelled set, and the learner adapted to that set
    action        which of the rows on offer to label next: int32 `[]`, or `[k]` distinct ones, best first. On offer
                  are all rows of the pool, or `candidates` random ones of those that may be asked for, drawn afresh
                  after every step; an action is a place among them.
    observation   what `observe` sees of the rows on offer, and always a mask of the actions that are allowed
    transition    the rows' labels are bought and the learner adapts again, as in `metaal_jax.active_learner`
    episode       one problem, drawn afresh, from its initial set until the budget is spent: at most
                  `ceil((budget - initial rows) / k)` steps, fewer where nothing is left that may be asked for
    discount      1. An episode ends because nothing is left to do, so nothing is bootstrapped from its last state.

Rewards, by the accuracy `a_t` after step `t` of at most `T`, and `a_0` before the first step:

    "area"        a_t / T            the return is the area under the learning curve
    "gain"        (a_t - a_0) / T    the same, less what the learner knew without the agent: less noise between problems
    "labels"      -k                 until a_t reaches `target`, where the episode ends: the return is minus the labels
                                     that it took

Where nothing is left to ask for before step `T`, the last step also gets what the steps left out would have given with
the accuracy as it is. So returns are comparable whatever the problem, and no agent gains by wasting its budget.

Accuracy is measured on the problem's validation rows, or on its test rows where no validation row has weight; both
are predicted, so sample few of what is not wanted. An agent is trained on problems of the source, whose labels are all
known: nothing of a target problem leaks.

An action that is not allowed (a row asked for before, padding, a row that the budget cannot pay, a number out of
range, the second of two equal entries) buys nothing, but the step counts.

Reference: Lange: gymnax, A JAX-based Reinforcement Learning Environment Library, 2022, for the form of `reset` and
`step`; Fang, Li, Cohn: Learning how to Active Learn, 2017, for the process; Konyushkova, Sznitman, Fua: Discovering
General-Purpose Active Learning Strategies, 2018, for the reward by labels.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.lifts import select_top
from metaal_jax.acquisition.uncertainty import entropy_of
from metaal_jax.base import Decision, Learner, Policy, PoolView, Problem, PyTree, require, rows_of
from metaal_jax.loop import ActiveState, active_learner, evaluate
from metaal_jax.losses import consensus
from metaal_jax.metrics import Score

PROBABILITIES = 3


class EnvParams(NamedTuple):
    """The arrays that an environment reads.

    Attributes:
      meta: the learner's meta-parameters.
      data: what the sampler draws problems from.
    """

    meta: PyTree
    data: PyTree


class EnvState(NamedTuple):
    """What is carried from step to step.

    Attributes:
      problem: the episode's problem.
      active: the labelled set and the adapted learner; its `policy_state` is int32 `[m]`, the pool's rows on offer.
      step: int32 `[]`, steps taken.
      start, accuracy: float32 `[]`, before the first step and now.
      done: bool `[]`, whether the episode is over; never with `auto_reset`.
    """

    problem: Problem
    active: ActiveState
    step: Array
    start: Array
    accuracy: Array
    done: Array


class EnvObservation(NamedTuple):
    """What an agent sees.

    Attributes:
      seen: what `observe` gives; by default float32 `[m, 7]`, see `row_summary`.
      mask: bool `[m]`, the actions that are allowed.
    """

    seen: PyTree
    mask: Array


class ResetFn(Protocol):
    """`(key, params) -> (observation, state)`: a fresh problem."""

    def __call__(self, key: Array, params: EnvParams, /) -> tuple[EnvObservation, EnvState]: ...  # noqa: D102


class EnvStepFn(Protocol):
    """`(key, state, action, params) -> (observation, state, reward float32 [], done bool [], info)`.

    `info` is a dictionary of `accuracy` float32 `[]` after the step, `row` int32 `[k]` (the pool's rows bought, -1 for
    none), `count` int32 `[]` (labels) and `spent` float32 `[]` (their cost).
    """

    def __call__(  # noqa: D102
        self, key: Array, state: EnvState, action: Array, params: EnvParams, /
    ) -> tuple[EnvObservation, EnvState, Array, Array, dict[str, Array]]: ...


class CountFn(Protocol):
    """`(params) -> int`, a static number."""

    def __call__(self, params: EnvParams, /) -> int: ...  # noqa: D102


class Environment(NamedTuple):
    """A family of active-learning problems as pure functions; see `environment`.

    Attributes:
      reset: see `ResetFn`.
      step: see `EnvStepFn`.
      num_actions: the rows on offer.
      num_steps: the most steps of an episode.
    """

    reset: ResetFn
    step: EnvStepFn
    num_actions: CountFn
    num_steps: CountFn


def environment(
    learner: Learner,
    sampler: Callable[[Array, Any], Problem],
    *,
    budget: int,
    k: int = 1,
    observe: Callable[[PoolView, Array], PyTree] | None = None,
    reward: Literal["area", "gain", "labels"] = "area",
    target: float | Array | None = None,
    candidates: int | None = None,
    chunk: int | None = None,
    auto_reset: bool = True,
) -> Environment:
    """Active learning of `learner` as an environment whose agent chooses the rows to label.

    The process is described at the top of this module. A random agent in 16 environments at a time:

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> import metaal_jax as ml
    >>> from metaal_jax.policies.environment import EnvParams, environment
    >>> y = np.arange(90) % 3
    >>> x = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32) + 2 * np.eye(3, 4, dtype=np.float32)[y]
    >>> rows = ml.tasks.class_data(x, y)
    >>> learner = ml.learners.protonet(ml.models.MLP(3, hidden=()))
    >>> env = environment(learner, ml.tasks.problems(pool=40, test=1, validation=30), budget=8, candidates=10)
    >>> params = EnvParams(learner.init(jax.random.key(0), x), jax.device_put(ml.tasks.ProblemData(rows, rows)))
    >>> env.num_actions(params), env.num_steps(params)
    (10, 8)
    >>> def episode(key, params):
    ...     reset_key, loop_key = jax.random.split(key)
    ...     def body(carry, key):
    ...         observation, state = carry
    ...         act_key, step_key = jax.random.split(key)
    ...         action = jax.random.categorical(act_key, jnp.where(observation.mask, 0.0, -jnp.inf))
    ...         observation, state, reward, done, info = env.step(step_key, state, action, params)
    ...         return (observation, state), (reward, done)
    ...     keys = jax.random.split(loop_key, env.num_steps(params))
    ...     return jax.lax.scan(body, env.reset(reset_key, params), keys)[1]
    >>> many = jax.jit(jax.vmap(episode, in_axes=(0, None)))
    >>> reward, done = many(jax.random.split(jax.random.key(1), 16), params)
    >>> reward.shape, bool(done[:, -1].all()), bool(reward.sum(-1).mean() > 0.5)
    ((16, 8), True, True)

    Shapes and dtypes of an observation: `jax.eval_shape(env.reset, key, params)[0]`.

    Args:
      learner: any `Learner`.
      sampler: `(key, data) -> Problem`, such as `tasks.problems(...)`; where it gives no validation rows, episodes are
        judged on the test rows.
      budget: labels of an episode, the initial set included, and also what they may cost together in units of
        `Problem.cost`.
      k: rows labelled in a step.
      observe: `(view, position) -> pytree`, what the agent sees of the pool's rows `position`, int32 `[m]`, which are
        those on offer (all, in order, without `candidates`). None for `row_summary`.
      reward: "area", "gain" or "labels".
      target: the accuracy that ends an episode, for "labels" only. One that is reached without the agent counts only
        after its first step.
      candidates: rows on offer, None for the whole pool. Where fewer may be asked for, the mask leaves the rest out.
      chunk: pool and judged rows predicted at a time, None for all at once.
      auto_reset: `step` begins the next episode when one is done; it then gives the reward and info of the old
        episode with the observation of the new one. Under `vmap` that costs a reset in every step. Episodes that all
        take `num_steps` are cheaper without: reset them together. A step after the end then buys nothing, leaves the
        learner as it is and has reward 0.

    Returns:
      An `Environment`. What its functions raise: `ValueError` for actions of another shape or that are no integers;
      for a budget beyond the pool, no larger than the initial set, or below the cheapest label; for more candidates
      than pool rows.

    Raises:
      ValueError: for `budget < 1`, `k` outside 1..budget, an unknown reward, a target outside (0, 1], missing, or for
        another reward than "labels", and `candidates < k`.
    """
    require(budget >= 1, f"environment: budget must be at least 1, got {budget}")
    require(1 <= k <= budget, f"environment: k must lie in 1..{budget}, the budget, got {k}")
    if reward not in ("area", "gain", "labels"):
        raise ValueError(f"environment: reward must be 'area', 'gain' or 'labels', got {reward!r}")
    if (target is None) == (reward == "labels"):
        raise ValueError(f"environment: a target belongs to the reward 'labels', got {target} for {reward!r}")
    require(target is None or (target > 0) & (target <= 1), f"environment: target must lie in (0, 1], got {target}")
    require(candidates is None or candidates >= k, f"environment: {candidates} candidates are fewer than k = {k}")
    see = row_summary if observe is None else observe

    def offer(key: Array, view: PoolView) -> tuple[EnvObservation, Array]:
        """The next observation and the pool's rows that it is of."""
        if candidates is None:
            position = jnp.arange(view.row.shape[0], dtype=jnp.int32)
        else:
            position, _ = select_top(key, jnp.zeros(view.row.shape[0]), view.available, view.row, candidates)
        return EnvObservation(seen=see(view, position), mask=view.available[position]), position

    def begin(key: Array, action: PyTree, view: PoolView) -> PyTree:
        del action
        return offer(key, view)

    def take_action(key: Array, action: Array, position: Array, view: PoolView) -> tuple[Decision, Array]:
        del key
        place = jnp.clip(action, 0, position.shape[0] - 1)
        again = jnp.tril(action[:, None] == action[None], -1).any(-1)
        index = position[place]
        return _decision(index, (place == action) & ~again & view.available[index], view), position

    def look(key: Array, action: PyTree, position: Array, view: PoolView) -> tuple[Decision, PyTree]:
        del action
        return _decision(position[:k], jnp.zeros(k, bool), view), offer(key, view)

    # The policy of the loop is the agent outside: its parameters are the action, its memory is what was on offer.
    acting, looking = (
        active_learner(learner, Policy(init=lambda key: (), begin=begin, act=act), capacity=budget, chunk=chunk)
        for act in (take_action, look)
    )

    def steps_of(problem: Problem) -> int:
        given = problem.initial.shape[0]
        if given >= budget:
            raise ValueError(f"environment: an initial set of {given} rows leaves nothing of a budget of {budget}")
        return -(-(budget - given) // k)

    def actions_of(problem: Problem) -> int:
        n = rows_of(problem.x)
        if candidates is not None and candidates > n:
            raise ValueError(f"environment: {candidates} candidates wanted, the pool has {n} rows; ask for fewer")
        return n if candidates is None else candidates

    def judged(problem: Problem, validation: Score, test: Score | None) -> Array:
        if test is None:
            return validation.accuracy
        return jnp.where((problem.validation.weight > 0).any(), validation.accuracy, test.accuracy)

    def reset(key: Array, params: EnvParams) -> tuple[EnvObservation, EnvState]:
        sample_key, init_key = jax.random.split(key)
        problem = sampler(sample_key, params.data)
        steps_of(problem), actions_of(problem)  # both check
        active = acting.init(init_key, params.meta, (), problem)
        observation, position = active.policy_state
        validation = evaluate(learner, active.params, problem.validation, chunk=chunk)
        test = None if problem.test is None else evaluate(learner, active.params, problem.test, chunk=chunk)
        accuracy = judged(problem, validation, test)
        return observation, EnvState(
            problem=problem,
            active=active._replace(policy_state=position),
            step=jnp.zeros((), jnp.int32),
            start=accuracy,
            accuracy=accuracy,
            done=jnp.zeros((), bool),
        )

    def step(
        key: Array, state: EnvState, action: Array, params: EnvParams
    ) -> tuple[EnvObservation, EnvState, Array, Array, dict[str, Array]]:
        action = jnp.asarray(action)
        if action.shape != (() if k == 1 else (k,)) or not jnp.issubdtype(action.dtype, jnp.integer):
            wanted = "[]" if k == 1 else f"[{k}]"
            raise ValueError(f"environment: an action is int32 {wanted}, got {action.dtype} {list(action.shape)}")
        problem, total = state.problem, steps_of(state.problem)
        action = jnp.where(state.done, -1, action.reshape(k).astype(jnp.int32))
        act_key, offer_key, reset_key = jax.random.split(key, 3)
        active, record = acting.step(act_key, params.meta, action, state.active, problem)
        accuracy = judged(problem, record.validation, record.test)
        if not auto_reset:
            old, new = (state.active.params, state.accuracy), (active.params, accuracy)
            kept, accuracy = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), old, new)
            active = active._replace(params=kept)
        _, active = looking.ask(offer_key, params.meta, (), active, problem)
        observation, position = active.policy_state

        left = total - 1 - state.step
        exhausted = ~observation.mask.any()
        # A share of right rows may come out a rounding error below the target that it equals.
        reached = accuracy >= target - 1e-6 if target is not None else jnp.zeros((), bool)
        done = state.done | (left <= 0) | exhausted | reached
        each = {"area": accuracy / total, "gain": (accuracy - state.start) / total, "labels": jnp.float32(-k)}[reward]
        value = jnp.where(state.done, 0.0, each * jnp.where(exhausted & ~reached, 1 + left, 1))

        info = {
            "accuracy": accuracy,
            "row": jnp.where(record.valid, record.index, -1),
            "count": active.count,
            "spent": active.spent,
        }
        state = EnvState(
            problem=problem,
            active=active._replace(policy_state=position),
            step=state.step + ~state.done,
            start=state.start,
            accuracy=accuracy,
            done=done,
        )
        if auto_reset:
            observation, state = lax.cond(done, lambda: reset(reset_key, params), lambda: (observation, state))
        return observation, state, value, done, info

    def problem_of(params: EnvParams) -> Problem:
        shape: Problem = jax.eval_shape(lambda data: sampler(jax.random.key(0), data), params.data)
        return shape

    return Environment(
        reset=reset,
        step=step,
        num_actions=lambda params: actions_of(problem_of(params)),
        num_steps=lambda params: steps_of(problem_of(params)),
    )


def row_summary(view: PoolView, position: Array) -> Array:
    """The default observation: a few numbers for each row that know neither the data set nor its classes.

    Args:
      view: the pool.
      position: int32 `[m]`, the rows wanted.

    Returns:
      float32 `[m, 7]`: the three largest probabilities of the members' consensus (0 where there are fewer classes), its
      entropy divided by log c, its margin, whether the row may be asked for, and the share of the budget that is spent.
    """
    log_probs = consensus(view.prediction.logits[:, position])
    m, c = log_probs.shape
    best = lax.top_k(jnp.exp(log_probs), min(PROBABILITIES, c))[0]
    best = jnp.pad(best, ((0, 0), (0, PROBABILITIES - best.shape[1])))
    entropy = entropy_of(log_probs) / jnp.log(max(c, 2))
    spent = jnp.broadcast_to(view.spent / view.budget, m)
    rest = jnp.stack([entropy, best[:, 0] - best[:, 1], view.available[position], spent], -1)
    return jnp.concatenate([best, rest], -1)


def _decision(index: Array, valid: Array, view: PoolView) -> Decision:
    return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=jnp.zeros(view.row.shape[0]))
