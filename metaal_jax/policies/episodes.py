"""Whole active-learning episodes on the device, and the shape that all ways to train a policy on them share.

An episode is one problem drawn from a source: start, ask and answer until the budget is spent. Every trainer runs
episodes with the loop that users run (`metaal_jax.loop.active_learner`), judges them on the problem's test rows (those
of the source: the new task's are never seen), and gives a `PolicyTrainer`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import (
    Decision,
    EvaluateFn,
    Learner,
    Metrics,
    Policy,
    PoolView,
    Problem,
    PyTree,
    ScoreFn,
    Trainable,
    judging_rows,
    require,
    rows_of,
)
from metaal_jax.loop import active_learner, evaluate

Annotate = Callable[[Array, PoolView, PyTree, PyTree], PyTree]
Revise = Callable[[Decision, PyTree, PyTree, PyTree, PyTree], Decision]
Sampler = Callable[[Array, PyTree], Problem]
Reward = Literal["area", "labels"]


class TrainState(NamedTuple):
    """State of a trainer.

    Attributes:
      params: the policy's parameters.
      meta: the learner's meta-parameters; they change only where the learner is trained, too.
      opt_state: of the optimiser.
      memory: what a trainer keeps of earlier steps, `()` for none.
      step: int32 `[]`.
    """

    params: PyTree
    meta: PyTree
    opt_state: PyTree
    memory: PyTree
    step: Array


class PolicyTrainer(NamedTuple):
    """A way to train a policy.

    Attributes:
      init: `(key, meta, data) -> TrainState`.
      step: `(key, state, data) -> (state, metrics)`: fresh episodes and an update by them.
      run: `(key, state, data, *, steps) -> (state, metrics [steps])`. The key of a step is `fold_in(key, state.step)`.
      joint: the learner is trained, too.
    """

    init: Callable[[Array, PyTree, PyTree], TrainState]
    step: Callable[[Array, TrainState, PyTree], tuple[TrainState, Metrics]]
    run: Callable[..., tuple[TrainState, Metrics]]
    joint: bool = False


class Trajectory(NamedTuple):
    """One episode; leaves `[rounds, ...]`.

    Attributes:
      observation: what the policy saw.
      index: int32 `[rounds, k]`, the rows it asked for; `bought`, bool, those that were paid for.
      log_prob: float32, of the batch when it was drawn.
      accuracy: float32, on the judging rows after the labels.
      cold: float32 `[]`, the accuracy before the first round.
      notes: what `annotate` gave in each round.
    """

    observation: PyTree
    index: Array  # type: ignore[assignment]
    bought: Array
    log_prob: Array
    accuracy: Array
    cold: Array
    notes: PyTree


class Recorded(NamedTuple):
    """State of a policy that keeps what it saw."""

    inner: PyTree
    observation: PyTree
    notes: PyTree


def recorded(policy: Policy, annotate: Annotate | None = None, revise: Revise | None = None) -> Policy:
    """The same policy; its state also holds what it saw in the last round, and notes on it.

    Args:
      policy: a policy with `observe`.
      annotate: `(key, view, observation, extra) -> notes`. With it the policy's parameters are `(params, extra)`.
      revise: `(decision, observation, notes, params, extra) -> decision` may choose otherwise.
    """

    observe = trainable(policy).observe

    def split(policy_params: PyTree) -> tuple[PyTree, PyTree]:
        return policy_params if annotate else (policy_params, ())

    def look(key: Array, inner: PyTree, view: PoolView, extra: PyTree) -> tuple[PyTree, PyTree]:
        observation = observe(key, inner, view)
        return observation, annotate(jax.random.fold_in(key, 3), view, observation, extra) if annotate else ()

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> Recorded:
        params, extra = split(policy_params)
        inner = policy.begin(key, params, view)
        shapes = jax.eval_shape(look, key, inner, view, extra)
        return Recorded(inner, *jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def act(key: Array, policy_params: PyTree, policy_state: Recorded, view: PoolView) -> tuple[Decision, Recorded]:
        params, extra = split(policy_params)
        observation, notes = look(key, policy_state.inner, view, extra)
        decision, inner = policy.act(key, params, policy_state.inner, view)
        if revise is not None:
            decision = revise(decision, observation, notes, params, extra)
        return decision, Recorded(inner, observation, notes)

    return Policy(init=policy.init, begin=begin, act=act)


def episode(
    learner: Learner,
    policy: Policy,
    *,
    budget: int,
    k: int,
    record: bool = True,
    annotate: Annotate | None = None,
    revise: Revise | None = None,
) -> Callable[[Array, PyTree, PyTree, Problem], Trajectory]:
    """`(key, meta, policy_params, problem) -> Trajectory`: one run of the loop, with what the policy saw if asked.

    Args:
      learner: the base learner.
      policy: asks for `k` rows a round; with `observe`, unless nothing is recorded.
      budget: labels bought, beside the problem's initial set; a multiple of `k`. All labels cost 1, whatever the
        problem says, and every question is answered.
      k: rows a round.
      record: keep the observations; without, `observation` and `notes` are `()`.
      annotate, revise: see `recorded`.
    """
    check_budget(budget, k)
    if record:
        trainable(policy)
    seen_policy = recorded(policy, annotate, revise) if record else policy

    def run(key: Array, meta: PyTree, policy_params: PyTree, problem: Problem) -> Trajectory:
        init_key, loop_key = jax.random.split(key)
        problem = problem._replace(cost=jnp.ones_like(problem.cost))
        active = active_learner(
            learner,
            seen_policy,
            capacity=budget + problem.initial.shape[0],
            budget=budget + (problem.initial >= 0).sum(),
            record=lambda state: (state.policy_state.observation, state.policy_state.notes) if record else ((), ()),
        )
        state = active.init(init_key, meta, policy_params, problem)
        cold = evaluate(learner, state.params, judging_rows("episode", problem)).accuracy
        _, info = active.run(loop_key, meta, policy_params, problem, rounds=budget // k, state=state)
        index, (observation, notes) = info.index, info.record
        if index.shape[1] != k:
            raise ValueError(
                f"this policy asks for {index.shape[1]} rows a round, the trainer for k={k}; give both one k"
            )
        bought, accuracy = info.weight > 0, info.test.accuracy
        return Trajectory(observation, index, bought, info.log_prob, accuracy, cold, notes)

    return run


def rewards(trajectory: Trajectory, *, reward: Reward, target: float | Array = 0.9) -> Array:
    """The reward of each round, float32 `[rounds]`; their sum is the return.

    `"area"`: the accuracy after the round divided by the number of rounds, so that the return is the area under the
    learning curve. `"labels"`: minus 1 / rounds until the accuracy reaches `target` for the first time; the return is
    minus the share of the rounds that the target took.
    """
    rounds = trajectory.accuracy.shape[0]
    if reward == "area":
        return trajectory.accuracy / rounds
    before = jnp.concatenate([trajectory.cold[None], trajectory.accuracy[:-1]])
    reached = jnp.cumsum(before >= target) > 0
    return -jnp.where(reached, 0.0, 1.0 / rounds)


def check_budget(budget: int, k: int) -> None:
    """Whether the budget is whole rounds."""
    require(budget >= 1 and k >= 1 and budget % k == 0, f"a budget of {budget} must be a positive multiple of k={k}")


def trainable(policy: Policy) -> Trainable:
    """What a trainer needs of a policy; raises `ValueError` where it has none."""
    if policy.train is None:
        raise ValueError("this policy cannot be trained: it has no observe; take policies.learned, policies.selector "
                         "or one of your own")  # fmt: skip
    return policy.train


def score_of(name: str, policy: Policy) -> ScoreFn:
    """The scores that a policy chooses by; raises `ValueError` where it does not."""
    score = trainable(policy).score
    if score is None:
        raise ValueError(f"{name}: this policy has no score; take policies.learned")
    return score


def evaluate_of(name: str, policy: Policy) -> EvaluateFn:
    """The probabilities of a policy's batches; raises `ValueError` where it does not draw them."""
    evaluate = trainable(policy).evaluate
    if evaluate is None:
        raise ValueError(f"{name}: this policy has no evaluate; it must draw its batches, give it sample=True")
    return evaluate


def check_counts(name: str, **counts: int) -> None:
    """Whether all numbers are at least 1."""
    for what, value in counts.items():
        require(value >= 1, f"{name}: {what} must be at least 1, got {value}")


def check_reward(name: str, reward: str) -> None:
    """Whether there is such a reward."""
    if reward not in get_args(Reward):
        raise ValueError(f"{name}: reward must be one of {get_args(Reward)}, got {reward!r}")


def make_trainer(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    learn: Callable[[Array, TrainState, PyTree], tuple[TrainState, Metrics]],
    memory: Callable[[Array, PyTree, PyTree, PyTree], PyTree] = lambda *_: (),
    joint: bool = False,
) -> PolicyTrainer:
    """The shape that all trainers share, around `learn(key, state, data) -> (state, metrics)`."""

    def init(key: Array, meta: PyTree, data: PyTree) -> TrainState:
        own, other = jax.random.split(key)
        params = policy.init(own)
        trained = (params, meta) if joint else params
        return TrainState(params, meta, optimizer.init(trained), memory(other, params, meta, data), jnp.int32(0))

    def step(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        state, metrics = learn(key, state, data)
        return state._replace(step=state.step + 1), metrics

    return PolicyTrainer(init=init, step=step, run=repeated(step), joint=joint)


def repeated(
    step: Callable[[Array, TrainState, PyTree], tuple[TrainState, Metrics]],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A trainer's `run` by its `step`."""

    def run(key: Array, state: TrainState, data: PyTree, *, steps: int) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            return step(jax.random.fold_in(key, state.step), state, data)

        return lax.scan(body, state, length=steps)

    return run


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: PyTree, state: TrainState, *, joint: bool = False
) -> TrainState:
    """The state after a step along the gradients: of the policy's parameters or, with `joint`, of both parameters."""
    trained = (state.params, state.meta) if joint else state.params
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    params, meta = trained if joint else (trained, state.meta)
    return state._replace(params=params, meta=meta, opt_state=opt_state)


def one_by_one(f: Callable[[PyTree], PyTree], arrays: PyTree, at_once: int | None) -> PyTree:
    """`f` mapped over the leading axis, `at_once` of them side by side."""
    n = rows_of(arrays)
    return jax.vmap(f)(arrays) if at_once is None or at_once >= n else lax.map(f, arrays, batch_size=at_once)
