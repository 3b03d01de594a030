"""Training of policies on whole active-learning episodes, on the device: four ways with one shape.

An episode is one problem drawn from a source: start, ask and answer until the budget is spent. Every trainer runs
episodes with the loop that users run (`metaal_jax.loop.active_learner`), judges them on the problem's test rows (those
of the source: the new task's are never seen), and gives a `PolicyTrainer`:

    reinforce      the policy gradient; several episodes share a problem, the others' returns are the baseline
    ppo            clipped policy gradient with a learned value
    supervised     what labels are worth is measured by refitting, and learned: as a regression (LAL), as a choice
                   (imitation of the greedy oracle with data aggregation) or as a yes or no (needs a label)
    pathwise       gradients through a relaxed choice, the learner's adaptation and the loss, also to the learner
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.acquisition.refit import value_of_label
from metaal_jax.base import (
    Batch,
    Decision,
    Learner,
    Metrics,
    Policy,
    PoolView,
    Problem,
    PyTree,
    pad_batch,
    require,
    rows_of,
)
from metaal_jax.loop import active_learner, evaluate
from metaal_jax.losses import consensus, cross_entropy
from metaal_jax.policies import features
from metaal_jax.policies.learned import Score

Annotate = Callable[[Array, PoolView, PyTree, PyTree], PyTree]
Revise = Callable[[Decision, PyTree, PyTree, PyTree, PyTree], Decision]
Sampler = Callable[[Array, PyTree], Problem]
Reward = Literal["area", "labels"]
Target = Literal["regression", "imitation", "classification"]


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
    """

    init: Callable[[Array, PyTree, PyTree], TrainState]
    step: Callable[[Array, TrainState, PyTree], tuple[TrainState, Metrics]]
    run: Callable[..., tuple[TrainState, Metrics]]


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


class _Recorded(NamedTuple):
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

    def split(policy_params: PyTree) -> tuple[PyTree, PyTree]:
        return policy_params if annotate else (policy_params, ())

    def look(key: Array, inner: PyTree, view: PoolView, extra: PyTree) -> tuple[PyTree, PyTree]:
        observation = policy.observe(inner, key, view)
        return observation, annotate(jax.random.fold_in(key, 3), view, observation, extra) if annotate else ()

    def begin(policy_params: PyTree, key: Array, view: PoolView) -> _Recorded:
        params, extra = split(policy_params)
        inner = policy.begin(params, key, view)
        shapes = jax.eval_shape(look, key, inner, view, extra)
        return _Recorded(inner, *jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def act(policy_params: PyTree, policy_state: _Recorded, key: Array, view: PoolView) -> tuple[Decision, _Recorded]:
        params, extra = split(policy_params)
        observation, notes = look(key, policy_state.inner, view, extra)
        decision, inner = policy.act(params, policy_state.inner, key, view)
        if revise is not None:
            decision = revise(decision, observation, notes, params, extra)
        return decision, _Recorded(inner, observation, notes)

    return Policy(init=policy.init, begin=begin, act=act)


def episode(
    learner: Learner,
    policy: Policy,
    *,
    budget: int,
    k: int,
    annotate: Annotate | None = None,
    revise: Revise | None = None,
) -> Callable[[Array, PyTree, PyTree, Problem], Trajectory]:
    """`(key, policy_params, meta, problem) -> Trajectory`: one run of the loop, with what the policy saw.

    Args:
      learner: the base learner.
      policy: a policy with `observe`; it asks for `k` rows a round.
      budget: labels bought, beside the problem's initial set; a multiple of `k`. All labels cost 1, whatever the
        problem says, and every question is answered.
      k: rows a round.
      annotate, revise: see `recorded`.
    """
    _check_policy(policy, budget, k)

    def run(key: Array, policy_params: PyTree, meta: PyTree, problem: Problem) -> Trajectory:
        init_key, loop_key = jax.random.split(key)
        problem = problem._replace(cost=jnp.ones_like(problem.cost))
        active = active_learner(
            learner,
            recorded(policy, annotate, revise),
            capacity=budget + problem.initial.shape[0],
            budget=budget + (problem.initial >= 0).sum(),
        )
        state = active.init(init_key, meta, policy_params, problem)
        cold = evaluate(learner, state.params, problem.test).accuracy

        def body(state: Any, round: Array) -> tuple[Any, tuple]:
            state, info = active.step(jax.random.fold_in(loop_key, round), meta, policy_params, state, problem)
            seen = state.policy_state
            bought = info.weight > 0
            return state, (seen.observation, info.index, bought, info.log_prob, info.test.accuracy, seen.notes)

        _, out = lax.scan(body, state, jnp.arange(budget // k))
        observation, index, bought, log_prob, accuracy, notes = out
        if index.shape[1] != k:
            raise ValueError(
                f"this policy asks for {index.shape[1]} rows a round, the trainer for k={k}; give both one k"
            )
        return Trajectory(observation, index, bought, log_prob, accuracy, cold, notes)

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


def _check_policy(policy: Policy, budget: int, k: int) -> None:
    if policy.observe is None:
        raise ValueError("this policy cannot be trained: it has no observe; take policies.learned, policies.selector "
                         "or one of your own")  # fmt: skip
    require(budget >= 1 and k >= 1 and budget % k == 0, f"a budget of {budget} must be a positive multiple of k={k}")


def _check_counts(name: str, **counts: int) -> None:
    for what, value in counts.items():
        require(value >= 1, f"{name}: {what} must be at least 1, got {value}")


def _check_sampling(name: str, policy: Policy, reward: str) -> None:
    """What the policy gradients ask for beyond `_check_policy`."""
    if policy.observe is not None and policy.evaluate is None:
        raise ValueError(f"{name}: this policy has no evaluate; it must draw its batches, give it sample=True")
    if reward not in get_args(Reward):
        raise ValueError(f"{name}: reward must be one of {get_args(Reward)}, got {reward!r}")


def _trainer(
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

    def run(key: Array, state: TrainState, data: PyTree, *, steps: int) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            return step(jax.random.fold_in(key, state.step), state, data)

        return lax.scan(body, state, length=steps)

    return PolicyTrainer(init=init, step=step, run=run)


def _apply(
    optimizer: optax.GradientTransformation, grads: PyTree, state: TrainState, *, joint: bool = False
) -> TrainState:
    """The state after a step along the gradients: of the policy's parameters or, with `joint`, of both parameters."""
    trained = (state.params, state.meta) if joint else state.params
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    params, meta = trained if joint else (trained, state.meta)
    return state._replace(params=params, meta=meta, opt_state=opt_state)


def _one_by_one(f: Callable, arrays: PyTree, at_once: int | None) -> PyTree:
    """`f` mapped over the leading axis, `at_once` of them side by side."""
    n = rows_of(arrays)
    return jax.vmap(f)(arrays) if at_once is None or at_once >= n else lax.map(f, arrays, batch_size=at_once)


def reinforce(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    optimizer: optax.GradientTransformation,
    budget: int,
    k: int = 1,
    problems: int = 4,
    rollouts: int = 4,
    reward: Reward = "area",
    target: float | Array = 0.9,
    entropy: float | Array = 0.0,
    chunk: int | None = None,
) -> PolicyTrainer:
    """The policy gradient, `sum_t A_t grad log pi(a_t | o_t)`.

    `A_t` is the return from round `t` on less the mean of that of the other `rollouts` of the same problem at the
    same round: problems differ far more than choices do, and this baseline takes the problem out of the comparison.

    Args:
      learner: the base learner.
      policy: one that samples, with `observe` and `evaluate`.
      sampler: `(key, data) -> Problem`.
      optimizer: for the policy's parameters.
      budget: labels of an episode.
      k: rows a round.
      problems: fresh problems in each step.
      rollouts: episodes of each, at least 2.
      reward: see `rewards`.
      target: see `rewards`.
      entropy: factor of the policy's entropy, summed over the rounds, in the objective.
      chunk: problems side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `return`, `area`, `entropy`, `grad_norm`.

    Raises:
      ValueError: for a policy without `observe`, a budget that is no multiple of `k`, or numbers below 1.

    Reference: Williams: Simple Statistical Gradient-Following Algorithms, 1992; Kool, van Hoof, Welling: Buy 4
    REINFORCE Samples, Get a Baseline for Free!, 2019.
    """
    _check_counts("reinforce", problems=problems)
    require(rollouts >= 2, f"reinforce: the baseline needs at least 2 rollouts, got {rollouts}")
    play = episode(learner, policy, budget=budget, k=k)
    _check_sampling("reinforce", policy, reward)

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        def one(key: Array) -> tuple[PyTree, Metrics]:
            problem_key, play_key = jax.random.split(key)
            problem = sampler(problem_key, data)
            keys = jax.random.split(play_key, rollouts)
            runs = jax.vmap(lambda key: play(key, state.params, state.meta, problem))(keys)
            reward_of = jax.vmap(lambda run: rewards(run, reward=reward, target=target))(runs)
            to_go = jnp.cumsum(reward_of[:, ::-1], axis=1)[:, ::-1]
            advantage = (to_go - to_go.mean(0)) * rollouts / (rollouts - 1)

            def loss(params: PyTree) -> tuple[Array, Array]:
                judge = jax.vmap(jax.vmap(lambda o, i: policy.evaluate(params, o, i)[:2]))
                log_prob, spread = judge(runs.observation, runs.index)
                objective = (log_prob * advantage).sum(1).mean() + entropy * spread.sum(1).mean()
                return -objective, spread.mean()

            grads, spread = jax.grad(loss, has_aux=True)(state.params)
            return grads, {"return": to_go[:, 0].mean(), "area": runs.accuracy.mean(), "entropy": spread}

        keys = jax.random.split(key, problems)
        grads, metrics = jax.tree.map(lambda leaf: leaf.mean(0), _one_by_one(one, keys, chunk))
        metrics["grad_norm"] = optax.tree.norm(grads)
        return _apply(optimizer, grads, state), metrics

    return _trainer(policy, optimizer, learn)


def advantages(reward: Array, value: Array, *, discount: float | Array, trace: float | Array) -> Array:
    """Generalised advantage estimates `[rounds]` of an episode that ends after its last round.

    Args:
      reward: `[rounds]`.
      value: `[rounds]`, expected before each round.
      discount: of rewards, from 0 to 1.
      trace: lambda, 0 for one-step differences, 1 for whole returns.

    Reference: Schulman et al.: High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2016.
    """
    later = jnp.concatenate([value[1:], jnp.zeros(1)])
    surprise = reward + discount * later - value

    def back(carry: Array, delta: Array) -> tuple[Array, Array]:
        carry = delta + discount * trace * carry
        return carry, carry

    return lax.scan(back, jnp.zeros(()), surprise, reverse=True)[1]


def ppo(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    optimizer: optax.GradientTransformation,
    budget: int,
    k: int = 1,
    episodes: int = 16,
    epochs: int = 4,
    minibatches: int = 4,
    clip: float | Array = 0.2,
    discount: float | Array = 1.0,
    trace: float | Array = 0.95,
    value_weight: float | Array = 0.5,
    entropy: float | Array = 0.0,
    reward: Reward = "area",
    target: float | Array = 0.9,
    chunk: int | None = None,
) -> PolicyTrainer:
    """Proximal policy optimisation: several passes over the same episodes, the ratio of probabilities clipped.

    Args:
      learner: the base learner.
      policy: one that samples, with `observe` and `evaluate`; its `evaluate` also gives the value.
      sampler: `(key, data) -> Problem`.
      optimizer: for the policy's parameters.
      budget: labels of an episode.
      k: rows a round.
      episodes: in each step, every one of a problem of its own.
      epochs: passes over them.
      minibatches: updates of a pass; they divide the number of rounds in all episodes.
      clip: how far the ratio may go from 1.
      discount: of rewards.
      trace: lambda of the advantage estimates.
      value_weight: factor of the value's squared error.
      entropy: factor of the policy's entropy.
      reward: see `rewards`.
      target: see `rewards`.
      chunk: episodes side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `return`, `area`, `entropy`, `value_error`, `clipped`.

    Raises:
      ValueError: for a policy without `observe`, a budget that is no multiple of `k`, numbers below 1, or minibatches
        that do not divide the rounds.

    Reference: Schulman et al.: Proximal Policy Optimization Algorithms, 2017.
    """
    _check_counts("ppo", episodes=episodes, epochs=epochs, minibatches=minibatches)
    play = episode(learner, policy, budget=budget, k=k)
    _check_sampling("ppo", policy, reward)
    total = episodes * (budget // k)
    require(total % minibatches == 0, f"ppo: {minibatches} minibatches do not divide {total} rounds")

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        play_key, order_key = jax.random.split(key)

        def one(key: Array) -> Trajectory:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, state.params, state.meta, sampler(problem_key, data))

        runs = _one_by_one(one, jax.random.split(play_key, episodes), chunk)
        reward_of = jax.vmap(lambda run: rewards(run, reward=reward, target=target))(runs)
        value = jax.vmap(jax.vmap(lambda o, i: policy.evaluate(state.params, o, i)[2]))(runs.observation, runs.index)
        advantage = jax.vmap(lambda r, v: advantages(r, v, discount=discount, trace=trace))(reward_of, value)
        returns = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(total, *leaf.shape[2:]),
            (runs.observation, runs.index, runs.log_prob, advantage, returns),
        )

        def loss(params: PyTree, part: tuple) -> tuple[Array, tuple]:
            observation, index, before, advantage, returns = part
            log_prob, spread, value = jax.vmap(lambda o, i: policy.evaluate(params, o, i))(observation, index)
            ratio = jnp.exp(log_prob - before)
            held = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
            gain = jnp.minimum(ratio * advantage, held * advantage).mean()
            error = ((value - returns) ** 2).mean()
            outside = (jnp.abs(ratio - 1.0) > clip).mean()
            return value_weight * error - gain - entropy * spread.mean(), (spread.mean(), error, outside)

        def update(state: TrainState, part: tuple) -> tuple[TrainState, tuple]:
            grads, notes = jax.grad(loss, has_aux=True)(state.params, part)
            return _apply(optimizer, grads, state), notes

        def epoch(state: TrainState, key: Array) -> tuple[TrainState, tuple]:
            order = jax.random.permutation(key, total).reshape(minibatches, -1)
            return lax.scan(lambda s, rows: update(s, jax.tree.map(lambda leaf: leaf[rows], flat)), state, order)

        state, (spread, error, outside) = lax.scan(epoch, state, jax.random.split(order_key, epochs))
        metrics = {
            "return": reward_of.sum(1).mean(),
            "area": runs.accuracy.mean(),
            "entropy": spread.mean(),
            "value_error": error.mean(),
            "clipped": outside.mean(),
        }
        return state, metrics

    return _trainer(policy, optimizer, learn)


class _Notes(NamedTuple):
    """What the expert says of the candidates: values `[m]`, and whether they mean something."""

    value: Array
    known: Array


class Collected(NamedTuple):
    """The aggregated data of `supervised`: a ring of observations with the measured values of their candidates."""

    observation: PyTree
    value: Array
    known: Array
    seen: Array


def supervised(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    score: Score,
    optimizer: optax.GradientTransformation,
    budget: int,
    target: Target = "imitation",
    refit: Learner | None = None,
    k: int = 1,
    episodes: int = 4,
    updates: int = 16,
    batch: int = 64,
    capacity: int = 4096,
    expert_steps: int = 0,
    temperature: float | Array = 0.3,
    chunk: int | None = None,
) -> PolicyTrainer:
    """Learns what labels are worth, measured by refitting with each candidate's true label (the greedy oracle).

    In every round of an episode each candidate's label is tried: the learner adapts to the labelled rows and this one,
    and the loss on the problem's validation rows is its value. Values are standardised over the candidates. All rounds
    of all episodes so far are kept (data aggregation), and updates draw from them. Episodes follow the expert in the
    first `expert_steps` steps, then the policy itself: it is taught in the situations that it brings about.

    * `"regression"`: scores are fitted to the standardised values (learning active learning, LAL).
    * `"imitation"`: the policy's distribution over the candidates is drawn to `softmax(values / temperature)` (DAgger).
    * `"classification"`: `sigmoid(score)` is fitted to whether a label is worth more than the mean candidate's.

    Args:
      learner: the base learner.
      policy: of `policies.learned`, with `candidates`, which bound the cost: that many adaptations a round.
      sampler: `(key, data) -> Problem` with validation rows.
      score: `(params, observation) -> (scores [m], value)`: `policies.scores_of(network)` of the same network.
      optimizer: for the policy's parameters.
      budget: labels of an episode.
      target: what is learned.
      refit: what labels are tried with, a quicker form of the learner for the same meta-parameters; None for itself.
      k: rows that the policy buys in a round; values are those of single rows.
      episodes: fresh ones in each step.
      updates: gradient steps after them.
      batch: rounds in each of these.
      capacity: how many rounds are kept; the oldest go first.
      expert_steps: steps in which the expert chooses.
      temperature: of the imitated distribution, in standard deviations.
      chunk: episodes side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `loss`, `area`, `regret` (how much less the policy's favourite is worth than the best
      candidate, in standard deviations).

    Raises:
      ValueError: for an unknown target, a policy without `observe`, a budget that is no multiple of `k`, numbers below
        1, or a capacity below the rounds of one step.

    Reference: Konyushkova, Sznitman, Fua: Learning Active Learning from Data, 2017; Liu, Buntine, Haffari: Learning How
    to Actively Learn: A Deep Imitation Learning Approach, 2018; Ross, Gordon, Bagnell: A Reduction of Imitation
    Learning and Structured Prediction to No-Regret Online Learning, 2011.
    """
    _check_counts("supervised", episodes=episodes, updates=updates, batch=batch, capacity=capacity)
    if target not in get_args(Target):
        raise ValueError(f"supervised: target must be one of {get_args(Target)}, got {target!r}")
    require(temperature > 0, f"supervised: temperature must be > 0, got {temperature}")
    _check_policy(policy, budget, k)
    rounds = episodes * (budget // k)
    require(capacity >= rounds, f"supervised: a capacity of {capacity} does not hold the {rounds} rounds of a step")
    value_of = value_of_label(learner if refit is None else refit)

    def annotate(key: Array, view: PoolView, observation: PyTree, extra: PyTree) -> _Notes:
        y, selection, _ = extra
        room = pad_batch(view.labelled, rows_of(view.labelled) + 1)

        def value(place: Array) -> Array:
            return value_of(key, view, room, place, y[view.row[place]], selection)

        worth = jax.vmap(value)(observation.position)
        return _Notes(worth, observation.available & jnp.isfinite(worth))

    def follow(decision: Decision, observation: PyTree, notes: _Notes, params: PyTree, extra: PyTree) -> Decision:
        """In the expert's steps its best candidates, else what the policy decided."""
        worth, place = lax.top_k(jnp.where(notes.known, notes.value, -jnp.inf), k)
        _, _, expert = extra
        return decision._replace(
            index=jnp.where(expert, observation.position[place], decision.index),
            valid=jnp.where(expert, jnp.isfinite(worth), decision.valid),
        )

    run = episode(learner, policy, budget=budget, k=k, annotate=annotate, revise=follow)

    def play(key: Array, params: PyTree, meta: PyTree, problem: Problem, expert: Array) -> Trajectory:
        return run(key, (params, (problem.y, problem.validation, expert)), meta, problem)

    def standardised(value: Array, known: Array) -> Array:
        weight = known.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        value = jnp.where(known, value, 0.0)
        mean = value.sum() / total
        scale = jnp.sqrt((weight * (value - mean) ** 2).sum() / total)
        return jnp.where(known & (scale > 1e-8), (value - mean) / jnp.where(scale > 1e-8, scale, 1.0), 0.0)

    def one_loss(params: PyTree, observation: PyTree, value: Array, known: Array) -> tuple[Array, Array]:
        scores, _ = score(params, observation)
        weight = known.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        worth = standardised(value, known)
        best = jnp.where(known, scores, -jnp.inf).argmax()
        regret = jnp.where(known, worth, -jnp.inf).max() - worth[best]
        if target == "regression":
            loss = (weight * (scores - worth) ** 2).sum() / total
        elif target == "classification":
            loss = (weight * optax.sigmoid_binary_cross_entropy(scores, worth > 0)).sum() / total
        else:
            wanted = jax.nn.softmax(jnp.where(known, worth / temperature, -1e9))
            loss = -(wanted * jax.nn.log_softmax(jnp.where(known, scores, -1e9))).sum()
        return jnp.where(known.any(), loss, 0.0), jnp.where(known.any(), regret, 0.0)

    def memory(key: Array, params: PyTree, meta: PyTree, data: PyTree) -> Collected:
        def sample() -> Trajectory:
            return play(key, params, meta, sampler(key, data), jnp.zeros((), bool))

        shapes = jax.eval_shape(sample)
        ring = lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
        return Collected(
            jax.tree.map(ring, shapes.observation), ring(shapes.notes.value), ring(shapes.notes.known), jnp.int32(0)
        )

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        play_key, draw_key = jax.random.split(key)

        def one(key: Array) -> Trajectory:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, state.params, state.meta, sampler(problem_key, data), state.step < expert_steps)

        runs = _one_by_one(one, jax.random.split(play_key, episodes), chunk)
        kept = state.memory
        place = (kept.seen + jnp.arange(rounds)) % capacity
        put = lambda ring, new: ring.at[place].set(new.reshape(rounds, *new.shape[2:]))  # noqa: E731
        kept = Collected(
            jax.tree.map(put, kept.observation, runs.observation),
            put(kept.value, runs.notes.value),
            put(kept.known, runs.notes.known),
            kept.seen + rounds,
        )

        def loss(params: PyTree, rows: Array) -> tuple[Array, Array]:
            part = jax.tree.map(lambda leaf: leaf[rows], kept[:3])
            losses, regret = jax.vmap(lambda *each: one_loss(params, *each))(*part)
            return losses.mean(), regret.mean()

        def update(state: TrainState, key: Array) -> tuple[TrainState, tuple]:
            rows = jax.random.randint(key, (batch,), 0, jnp.minimum(kept.seen, capacity))
            (value, regret), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
            return _apply(optimizer, grads, state), (value, regret)

        state, (losses, regret) = lax.scan(update, state, jax.random.split(draw_key, updates))
        metrics = {"loss": losses.mean(), "regret": regret.mean(), "area": runs.accuracy.mean()}
        return state._replace(memory=kept), metrics

    return _trainer(policy, optimizer, learn, memory)


def relaxed_batch(
    score: Score, policy_params: PyTree, observation: PyTree, noise: Array, *, temperature: float | Array
) -> tuple[Array, Array, Array]:
    """A batch drawn without replacement, and the same choice made softly.

    Pick `j` is the candidate with the highest score plus noise; its soft form is the softmax of the same sums divided
    by the temperature, over what is left after the picks before it. Scores are taken anew after each pick, as
    `policies.learned` does. As the temperature falls the soft choice tends to the hard one.

    Args:
      score: `(params, observation) -> (scores [m], value)`.
      policy_params: its parameters; the soft choice is differentiable in them.
      observation: of the candidates.
      noise: `[k, m]`; Gumbel noise makes it a draw (Plackett-Luce).
      temperature: > 0; may be traced.

    Returns:
      `(place int32 [k], valid bool [k], soft [m])`; the soft choice adds up to the number of valid picks.

    Reference: Maddison, Mnih, Teh: The Concrete Distribution, 2017; Xie, Ermon: Reparameterizable Subset Sampling via
    Continuous Relaxations, 2019.
    """
    k = noise.shape[0]

    def pick(seen: PyTree, own: Array) -> tuple[PyTree, tuple[Array, Array, Array]]:
        worth = jnp.where(seen.available, score(policy_params, seen)[0] + own, -jnp.inf)
        place = worth.argmax().astype(jnp.int32)
        valid = seen.available[place]
        soft = jax.nn.softmax(jnp.where(seen.available, worth / temperature, -1e9))
        soft = jnp.where(seen.available & valid, soft, 0.0)
        return (features.picked(seen, place) if k > 1 else seen), (place, valid, soft)

    _, (place, valid, soft) = lax.scan(pick, observation, noise)
    return place, valid, soft.sum(0)


def pathwise(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    score: Score,
    optimizer: optax.GradientTransformation,
    budget: int,
    k: int = 1,
    problems: int = 4,
    temperature: float | Array | Callable[[Array], Array] = 1.0,
    straight_through: bool = True,
    joint: bool = False,
    chunk: int | None = None,
) -> PolicyTrainer:
    """Gradients through the whole thing: relaxed choice, the learner's adaptation, and the loss that follows.

    An episode is run with hard choices, drawn by Gumbel noise. Then every choice is made again with the same noise,
    softly (`relaxed_batch`). The learner adapts, in every round, to the whole pool weighed by all choices so far,
    and the mean over the rounds of its cross entropy on the judging rows is differentiated: a choice is credited with
    what it changes in all later rounds, except for what it changes in what later choices see.

    Args:
      learner: differentiable in the weights of its labelled rows. Optax's Adam is, where `eps_root` is not 0.
      policy: of `policies.learned`, with or without `candidates`.
      sampler: `(key, data) -> Problem`. Pools should be small: the learner adapts to all rows in every round.
      score: `(params, observation) -> (scores [m], value)`: `policies.scores_of(network)` of the same network.
      optimizer: for the policy's parameters; with `joint` for the pair of them and the meta-parameters.
      budget: labels of an episode.
      k: rows a round.
      problems: episodes of each step.
      temperature: of the relaxed choice, > 0, or a schedule `(step) -> temperature`.
      straight_through: adapt to the hard choices and differentiate the relaxed ones; else adapt to the relaxed ones.
      joint: train the learner's meta-parameters with the policy's.
      chunk: problems side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `loss`, `area`, `grad_norm`.

    Raises:
      ValueError: for a policy without `observe`, a budget that is no multiple of `k`, a temperature that is not
        positive, or numbers below 1.

    Reference: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation, 2013 (straight-through); Maddison, Mnih, Teh: The Concrete Distribution, 2017.
    """
    _check_counts("pathwise", problems=problems)
    if not callable(temperature):
        require(temperature > 0, f"pathwise: temperature must be > 0, got {temperature}")

    def annotate(key: Array, view: PoolView, observation: PyTree, extra: PyTree) -> Array:
        row = view.row[observation.position]
        return jax.vmap(lambda r: jax.random.gumbel(jax.random.fold_in(key, r), (k,)))(row).T

    def noisy(decision: Decision, observation: PyTree, noise: Array, params: PyTree, extra: PyTree) -> Decision:
        place, valid, _ = relaxed_batch(score, params, observation, noise, temperature=1.0)
        return decision._replace(index=observation.position[place], valid=valid)

    play = episode(learner, policy, budget=budget, k=k, annotate=annotate, revise=noisy)

    def episode_loss(key: Array, trained: PyTree, runs: Trajectory, problem: Problem, heat: Array) -> Array:
        params, meta = trained
        n, y = rows_of(problem.x), jnp.asarray(problem.y)
        hard = jnp.zeros((runs.index.shape[0], n))
        hard = jax.vmap(lambda row, index, bought: row.at[index].max(bought.astype(jnp.float32)))(
            hard, runs.index, runs.bought
        )

        def choice(observation: PyTree, noise: Array) -> Array:
            _, _, soft = relaxed_batch(score, params, observation, noise, temperature=heat)
            return jnp.zeros(n).at[observation.position].add(soft)

        soft = jax.vmap(choice)(runs.observation, runs.notes)
        given = jnp.zeros(n).at[jnp.where(problem.initial >= 0, problem.initial, n)].set(1.0, mode="drop")
        if straight_through:
            weights = given + jnp.cumsum(hard + soft - lax.stop_gradient(soft), axis=0)
        else:
            # A row is labelled unless no round chose it.
            weights = jnp.maximum(given, 1.0 - jnp.cumprod(1.0 - jnp.minimum(soft, 1.0), axis=0))

        @jax.checkpoint
        def judged(weight: Array) -> Array:
            batch = Batch(x=problem.x, y=y, weight=weight)
            adapted = learner.adapt(key, meta, batch, unlabelled=problem.x)
            log_probs = consensus(learner.predict(adapted, problem.test.x).logits)
            return cross_entropy(log_probs, problem.test.y, problem.test.weight)

        return lax.map(judged, weights).mean()

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        heat = temperature(state.step) if callable(temperature) else jnp.asarray(temperature, jnp.float32)

        def one(key: Array) -> tuple[PyTree, Metrics]:
            problem_key, play_key, adapt_key = jax.random.split(key, 3)
            problem = sampler(problem_key, data)
            runs = lax.stop_gradient(play(play_key, (state.params, ()), state.meta, problem))
            trained = (state.params, state.meta) if joint else state.params

            def loss_of(trained: PyTree) -> Array:
                both = trained if joint else (trained, state.meta)
                return episode_loss(adapt_key, both, runs, problem, heat)

            loss, grads = jax.value_and_grad(loss_of)(trained)
            return grads, {"loss": loss, "area": runs.accuracy.mean()}

        keys = jax.random.split(key, problems)
        grads, metrics = jax.tree.map(lambda leaf: leaf.mean(0), _one_by_one(one, keys, chunk))
        metrics["grad_norm"] = optax.tree.norm(grads)
        return _apply(optimizer, grads, state, joint=joint), metrics

    return _trainer(policy, optimizer, learn, joint=joint)
