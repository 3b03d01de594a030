"""Policy gradients on whole episodes: REINFORCE with the other rollouts as baseline, and PPO with a learned value."""

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import Learner, Metrics, Policy, PyTree, require
from metaal_jax.policies.episodes import (
    PolicyTrainer,
    Reward,
    Sampler,
    TrainState,
    Trajectory,
    apply_gradients,
    check_counts,
    check_reward,
    episode,
    evaluate_of,
    make_trainer,
    one_by_one,
    rewards,
)


def told_apart(difference: Array, scale: Array) -> Array:
    """Differences of numbers of size `scale`, 0 where they are no larger than rounding.

    Equal rewards differ in their last bits, and an optimiser that divides by the gradient's length (Adam), or an
    advantage that is divided by its standard deviation, would take a whole step along that noise.
    """
    return jnp.where(jnp.abs(difference) > 1e-5 * scale, difference, 0.0)


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
      policy: one that samples, with `train.observe` and `train.evaluate`.
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
      ValueError: for a policy that cannot be trained, a budget that is no multiple of `k`, or numbers below 1.

    Reference: Williams: Simple Statistical Gradient-Following Algorithms, 1992; Kool, van Hoof, Welling: Buy 4
    REINFORCE Samples, Get a Baseline for Free!, 2019.
    """
    check_counts("reinforce", problems=problems)
    require(rollouts >= 2, f"reinforce: the baseline needs at least 2 rollouts, got {rollouts}")
    play = episode(learner, policy, budget=budget, k=k)
    evaluate = evaluate_of("reinforce", policy)
    check_reward("reinforce", reward)

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        def one(key: Array) -> tuple[PyTree, Metrics]:
            problem_key, play_key = jax.random.split(key)
            problem = sampler(problem_key, data)
            keys = jax.random.split(play_key, rollouts)
            runs = jax.vmap(lambda key: play(key, state.meta, state.params, problem))(keys)
            reward_of = jax.vmap(lambda run: rewards(run, reward=reward, target=target))(runs)
            to_go = jnp.cumsum(reward_of[:, ::-1], axis=1)[:, ::-1]
            advantage = told_apart(to_go - to_go.mean(0)[None], jnp.abs(to_go).max()) * rollouts / (rollouts - 1)

            def loss(params: PyTree) -> tuple[Array, Array]:
                def judge(observation: PyTree, index: Array) -> tuple[Array, Array]:
                    return evaluate(params, observation, index)[:2]

                log_prob, spread = jax.vmap(jax.vmap(judge))(runs.observation, runs.index)
                objective = (log_prob * advantage).sum(1).mean() + entropy * spread.sum(1).mean()
                return -objective, spread.mean()

            grads, spread = jax.grad(loss, has_aux=True)(state.params)
            return grads, {"return": to_go[:, 0].mean(), "area": runs.accuracy.mean(), "entropy": spread}

        keys = jax.random.split(key, problems)
        grads, metrics = jax.tree.map(lambda leaf: leaf.mean(0), one_by_one(one, keys, chunk))
        metrics["grad_norm"] = optax.tree.norm(grads)
        return apply_gradients(optimizer, grads, state), metrics

    return make_trainer(policy, optimizer, learn)


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
      policy: one that samples, with `train.observe` and `train.evaluate`; its `train.evaluate` also gives the value.
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
      ValueError: for a policy that cannot be trained, a budget that is no multiple of `k`, numbers below 1, or
        minibatches that do not divide the rounds.

    Reference: Schulman et al.: Proximal Policy Optimization Algorithms, 2017.
    """
    check_counts("ppo", episodes=episodes, epochs=epochs, minibatches=minibatches)
    play = episode(learner, policy, budget=budget, k=k)
    evaluate = evaluate_of("ppo", policy)
    check_reward("ppo", reward)
    total = episodes * (budget // k)
    require(total % minibatches == 0, f"ppo: {minibatches} minibatches do not divide {total} rounds")

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        play_key, order_key = jax.random.split(key)

        def one(key: Array) -> Trajectory:
            problem_key, run_key = jax.random.split(key)
            return play(run_key, state.meta, state.params, sampler(problem_key, data))

        runs = one_by_one(one, jax.random.split(play_key, episodes), chunk)
        reward_of = jax.vmap(lambda run: rewards(run, reward=reward, target=target))(runs)
        value = jax.vmap(jax.vmap(lambda o, i: evaluate(state.params, o, i)[2]))(runs.observation, runs.index)
        advantage = jax.vmap(lambda r, v: advantages(r, v, discount=discount, trace=trace))(reward_of, value)
        returns = advantage + value
        advantage = told_apart(advantage - advantage.mean(), jnp.abs(returns).max() + jnp.abs(value).max())
        spread = advantage.std()
        advantage = advantage / jnp.where(spread > 0, spread, 1.0)
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(total, *leaf.shape[2:]),
            (runs.observation, runs.index, runs.log_prob, advantage, returns),
        )

        def loss(params: PyTree, part: PyTree) -> tuple[Array, PyTree]:
            observation, index, before, advantage, returns = part
            log_prob, spread, value = jax.vmap(lambda o, i: evaluate(params, o, i))(observation, index)
            ratio = jnp.exp(log_prob - before)
            held = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
            gain = jnp.minimum(ratio * advantage, held * advantage).mean()
            error = ((value - returns) ** 2).mean()
            outside = (jnp.abs(ratio - 1.0) > clip).mean()
            return value_weight * error - gain - entropy * spread.mean(), (spread.mean(), error, outside)

        def update(state: TrainState, part: PyTree) -> tuple[TrainState, PyTree]:
            grads, notes = jax.grad(loss, has_aux=True)(state.params, part)
            return apply_gradients(optimizer, grads, state), notes

        def epoch(state: TrainState, key: Array) -> tuple[TrainState, PyTree]:
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

    return make_trainer(policy, optimizer, learn)
