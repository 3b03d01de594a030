"""Evolution strategies: the policy's parameters are varied, whole episodes are compared, nothing is differentiated."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from metaal_jax.base import Learner, Metrics, Policy, PyTree, require
from metaal_jax.policies.episodes import (
    PolicyTrainer,
    Reward,
    Sampler,
    TrainState,
    apply_gradients,
    check_counts,
    check_reward,
    episode,
    make_trainer,
    one_by_one,
    rewards,
)
from metaal_jax.policies.policy_gradient import told_apart


def evolution(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    optimizer: optax.GradientTransformation,
    budget: int,
    k: int = 1,
    problems: int = 8,
    pairs: int = 8,
    deviation: float | Array = 0.1,
    reward: Reward = "area",
    target: float | Array = 0.9,
    chunk: int | None = None,
) -> PolicyTrainer:
    """Reinforcement learning by evolution strategies: the gradient of the return averaged over noisy parameters.

    A step draws `pairs` directions and runs the policy with its parameters moved to both sides along each, all on the
    same problems with the same keys. The mean over the directions of (difference of the returns) x direction /
    (2 deviation) estimates the gradient of the expected return under that noise. What is compared is the policy as it
    will be used, batches and ties included: it need not draw its batches, know their probabilities or be
    differentiable. Cost and noise grow with the number of parameters, so networks should be small
    (`models.LinearNetwork`).

    Args:
      learner: the base learner.
      policy: any policy with parameters; it asks for `k` rows a round.
      sampler: `(key, data) -> Problem`.
      optimizer: for the policy's parameters.
      budget: labels of an episode.
      k: rows a round.
      problems: fresh problems in each step.
      pairs: directions, each tried on both sides: a step has `2 * pairs * problems` episodes.
      deviation: of the noise on each parameter, > 0.
      reward: see `episodes.rewards`.
      target: see `episodes.rewards`.
      chunk: problems side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `return` and `area` (means over all episodes, so those of moved parameters) and
      `grad_norm`.

    Raises:
      ValueError: for a budget that is no multiple of `k`, numbers below 1, a deviation that is not positive, or a
        policy without parameters.

    Reference: Salimans et al.: Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017;
    Nesterov, Spokoiny: Random Gradient-Free Minimization of Convex Functions, 2017.
    """
    check_counts("evolution", problems=problems, pairs=pairs)
    check_reward("evolution", reward)
    require(deviation > 0, f"evolution: deviation must be > 0, got {deviation}")
    play = episode(learner, policy, budget=budget, k=k, record=False)

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        noise_key, key = jax.random.split(key)
        flat, back = ravel_pytree(state.params)
        if flat.size == 0:
            raise ValueError("evolution: this policy has no parameters to train")
        noise = jax.random.normal(noise_key, (pairs, flat.size), flat.dtype)
        moved = jax.vmap(back)(flat[None] + deviation * jnp.concatenate([noise, -noise]))

        def one(key: Array) -> tuple[Array, Array]:
            problem_key, run_key = jax.random.split(key)
            problem = sampler(problem_key, data)
            runs = jax.vmap(lambda params: play(run_key, state.meta, params, problem))(moved)
            reward_of = jax.vmap(lambda run: rewards(run, reward=reward, target=target))(runs)
            return reward_of.sum(1), runs.accuracy.mean(1)

        returns, area = one_by_one(one, jax.random.split(key, problems), chunk)
        ahead, behind = jnp.split(returns.mean(0), 2)
        change = told_apart(behind - ahead, jnp.abs(returns).max())
        grads = back(change @ noise / (2.0 * deviation * pairs))
        metrics = {"return": returns.mean(), "area": area.mean(), "grad_norm": optax.tree.norm(grads)}
        return apply_gradients(optimizer, grads, state), metrics

    return make_trainer(policy, optimizer, learn)
