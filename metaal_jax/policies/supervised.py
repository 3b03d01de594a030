"""What labels are worth, measured by refitting, and learned: as a regression, as a choice, or as a yes or no."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.acquisition.refit import value_of_label
from metaal_jax.base import Decision, Learner, Metrics, Policy, PoolView, Problem, PyTree, pad_batch, require, rows_of
from metaal_jax.policies.episodes import (
    PolicyTrainer,
    Sampler,
    TrainState,
    Trajectory,
    apply_gradients,
    check_budget,
    check_counts,
    episode,
    make_trainer,
    one_by_one,
    score_of,
)
from metaal_jax.policies.policy_gradient import told_apart

Target = Literal["regression", "imitation", "classification"]


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
      ValueError: for an unknown target, a policy that cannot be trained, a budget that is no multiple of `k`, numbers
        below 1, or a capacity below the rounds of one step.

    Reference: Konyushkova, Sznitman, Fua: Learning Active Learning from Data, 2017; Liu, Buntine, Haffari: Learning How
    to Actively Learn: A Deep Imitation Learning Approach, 2018; Ross, Gordon, Bagnell: A Reduction of Imitation
    Learning and Structured Prediction to No-Regret Online Learning, 2011.
    """
    check_counts("supervised", episodes=episodes, updates=updates, batch=batch, capacity=capacity)
    if target not in get_args(Target):
        raise ValueError(f"supervised: target must be one of {get_args(Target)}, got {target!r}")
    require(temperature > 0, f"supervised: temperature must be > 0, got {temperature}")
    score = score_of("supervised", policy)
    check_budget(budget, k)
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

    def play(key: Array, meta: PyTree, params: PyTree, problem: Problem, expert: Array) -> Trajectory:
        return run(key, meta, (params, (problem.y, problem.validation, expert)), problem)

    def standardised(value: Array, known: Array) -> Array:
        weight = known.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        value = jnp.where(known, value, 0.0)
        mean = value.sum() / total
        away = jnp.where(known, told_apart(value - mean, jnp.abs(value).max()), 0.0)
        scale = jnp.sqrt((away**2).sum() / total)
        return away / jnp.where(scale > 0, scale, 1.0)

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
            return play(key, meta, params, sampler(key, data), jnp.zeros((), bool))

        shapes = jax.eval_shape(sample)

        def ring(leaf: Array) -> Array:
            return jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype)

        return Collected(
            jax.tree.map(ring, shapes.observation), ring(shapes.notes.value), ring(shapes.notes.known), jnp.int32(0)
        )

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        play_key, draw_key = jax.random.split(key)

        def one(key: Array) -> Trajectory:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, state.meta, state.params, sampler(problem_key, data), state.step < expert_steps)

        runs = one_by_one(one, jax.random.split(play_key, episodes), chunk)
        kept = state.memory
        place = (kept.seen + jnp.arange(rounds)) % capacity

        def put(ring: Array, new: Array) -> Array:
            return ring.at[place].set(new.reshape(rounds, *new.shape[2:]))

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

        def update(state: TrainState, key: Array) -> tuple[TrainState, PyTree]:
            rows = jax.random.randint(key, (batch,), 0, jnp.minimum(kept.seen, capacity))
            (value, regret), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
            return apply_gradients(optimizer, grads, state), (value, regret)

        state, (losses, regret) = lax.scan(update, state, jax.random.split(draw_key, updates))
        metrics = {"loss": losses.mean(), "regret": regret.mean(), "area": runs.accuracy.mean()}
        return state._replace(memory=kept), metrics

    return make_trainer(policy, optimizer, learn, memory)
