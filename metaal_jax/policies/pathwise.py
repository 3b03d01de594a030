"""Gradients through the whole thing: a relaxed choice, the learner's adaptation, and the loss that follows."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import (
    Batch,
    Decision,
    Learner,
    Metrics,
    Policy,
    PoolView,
    Problem,
    PyTree,
    ScoreFn,
    judging_rows,
    require,
    rows_of,
)
from metaal_jax.losses import consensus, cross_entropy
from metaal_jax.policies import features
from metaal_jax.policies.episodes import (
    PolicyTrainer,
    Sampler,
    TrainState,
    Trajectory,
    apply_gradients,
    check_counts,
    episode,
    make_trainer,
    one_by_one,
    score_of,
)

Estimator = Literal["reinmax", "straight_through", "relaxed"]


def _reinmax(scores: Array, available: Array, place: Array, temperature: float | Array) -> Array:
    """The hard choice `[m]` with ReinMax's gradient in the scores; the place must be drawn by their softmax."""
    scores = jnp.where(available, scores, -1e9)
    drawn = jax.nn.one_hot(place, scores.shape[0])
    between = lax.stop_gradient(0.5 * (drawn + jax.nn.softmax(scores / temperature)))
    # A softmax with the value `between`, whose gradient reaches the scores.
    moved = jax.nn.softmax(jnp.log(jnp.maximum(between, 1e-30)) + scores - lax.stop_gradient(scores))
    path = 2.0 * moved - 0.5 * jax.nn.softmax(scores)
    return drawn + path - lax.stop_gradient(path)


def relaxed_batch(
    score: ScoreFn,
    policy_params: PyTree,
    observation: PyTree,
    noise: Array,
    *,
    temperature: float | Array,
    estimator: Estimator = "relaxed",
) -> tuple[Array, Array, Array]:
    """A batch drawn without replacement, and the same choice made softly.

    Pick `j` is the candidate with the highest score plus noise; its soft form is the softmax of the same sums divided
    by the temperature, over what is left after the picks before it. Scores are taken anew after each pick, as
    `policies.learned` does. As the temperature falls the soft choice tends to the hard one.

    A gradient that is taken at the hard choice (`"straight_through"`) follows a tangent to the other choices, and what
    a first label of its kind changes is no straight line. `"reinmax"` is a second-order rule for the way from one
    choice to another: it is exact, in the mean, where a single pick enters quadratically and the temperature is 1.

    Args:
      score: `(params, observation) -> (scores [m], value)`.
      policy_params: its parameters; the soft choice is differentiable in them.
      observation: of the candidates.
      noise: `[k, m]`; Gumbel noise makes it a draw (Plackett-Luce).
      temperature: > 0; may be traced.
      estimator: what the last value is: the soft choice (`"relaxed"`), or the hard one with the gradient of the soft
        one (`"straight_through"`) or with that of ReinMax, which needs Gumbel noise.

    Returns:
      `(place int32 [k], valid bool [k], choice [m])`; the choice adds up to the number of valid picks.

    Reference: Maddison, Mnih, Teh: The Concrete Distribution, 2017; Xie, Ermon: Reparameterizable Subset Sampling via
    Continuous Relaxations, 2019; Liu, Dong, Liu, Yu, Gao: Bridging Discrete and Backpropagation: Straight-Through and
    Beyond, 2023 (ReinMax).
    """
    k = noise.shape[0]

    def pick(seen: PyTree, own: Array) -> tuple[PyTree, tuple[Array, Array, Array]]:
        scores = score(policy_params, seen)[0]
        worth = jnp.where(seen.available, scores + own, -jnp.inf)
        place = worth.argmax().astype(jnp.int32)
        valid = seen.available[place]
        if estimator == "reinmax":
            choice = _reinmax(scores, seen.available, place, temperature)
        else:
            choice = jax.nn.softmax(jnp.where(seen.available, worth / temperature, -1e9))
            if estimator == "straight_through":
                choice += lax.stop_gradient(jax.nn.one_hot(place, scores.shape[0]) - choice)
        choice = jnp.where(seen.available & valid, choice, 0.0)
        return (features.picked(seen, place) if k > 1 else seen), (place, valid, choice)

    _, (place, valid, choice) = lax.scan(pick, observation, noise)
    return place, valid, choice.sum(0)


def pathwise(
    learner: Learner,
    policy: Policy,
    sampler: Sampler,
    *,
    optimizer: optax.GradientTransformation,
    budget: int,
    k: int = 1,
    problems: int = 4,
    temperature: float | Array | Callable[[Array], Array] = 1.0,
    estimator: Estimator = "reinmax",
    refit: Learner | None = None,
    joint: bool = False,
    chunk: int | None = None,
) -> PolicyTrainer:
    """Gradients through the whole thing: relaxed choice, the learner's adaptation, and the loss that follows.

    An episode is run with hard choices, drawn by Gumbel noise. Then every choice is made again with the same noise,
    differentiably (`relaxed_batch`). The learner adapts, in every round, to the whole pool weighed by all choices so
    far, and the mean over the rounds of its cross entropy on the judging rows is differentiated: a choice is credited
    with what it changes in all later rounds, except for what it changes in what later choices see.

    The effect of a row's weight must be a good proxy for the effect of its label. It is for closed forms such as
    `learners.r2d2(..., absent=None)`. It is not for Adam, whose first steps depend on signs only: a small weight on
    the first row of a class flips no sign, though its label would flip all of them, and training drifts away from
    coverage. Let such a learner play the episodes, and give a `refit` that judges them.

    Args:
      learner: the base learner, which plays the episodes.
      policy: of `policies.learned`, with or without `candidates`.
      sampler: `(key, data) -> Problem`. Pools should be small: the learner adapts to all rows in every round.
      optimizer: for the policy's parameters; with `joint` for the pair of them and the meta-parameters.
      budget: labels of an episode.
      k: rows a round.
      problems: episodes of each step.
      temperature: of the relaxed choice, > 0, or a schedule `(step) -> temperature`.
      estimator: `"relaxed"` adapts to soft choices, the others to the hard ones, see `relaxed_batch`.
      refit: the learner whose adaptation is differentiated in the policy's parameters, for the same meta-parameters,
        smooth in the weights of its rows; None for `learner` itself. (Of optax's Adam the derivative is NaN without
        `eps_root`.)
      joint: train the learner's meta-parameters with the policy's. With `refit` they follow the learner's own loss, and
        the policy that of `refit`: the learner's own derivative in the weights of its rows becomes a worse proxy
        for the value of a choice as training makes it more confident.
      chunk: problems side by side; None for all.

    Returns:
      A `PolicyTrainer`; metrics `loss` (with `refit` and `joint` the sum of both), `area`, `grad_norm`.

    Raises:
      ValueError: for a policy that cannot be trained, a budget that is no multiple of `k`, an unknown estimator, a
        temperature that is not positive, or numbers below 1.

    Reference: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation, 2013 (straight-through); Maddison, Mnih, Teh: The Concrete Distribution, 2017; Liu et al.:
    Bridging Discrete and Backpropagation: Straight-Through and Beyond, 2023 (ReinMax).
    """
    check_counts("pathwise", problems=problems)
    if estimator not in get_args(Estimator):
        raise ValueError(f"pathwise: estimator must be one of {get_args(Estimator)}, got {estimator!r}")
    score = score_of("pathwise", policy)
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
        n, y, test = rows_of(problem.x), jnp.asarray(problem.y), judging_rows("pathwise", problem)

        def choice(observation: PyTree, noise: Array) -> Array:
            _, _, chosen = relaxed_batch(score, params, observation, noise, temperature=heat, estimator=estimator)
            return jnp.zeros(n).at[observation.position].add(chosen)

        chosen = jax.vmap(choice)(runs.observation, runs.notes)
        given = jnp.zeros(n).at[jnp.where(problem.initial >= 0, problem.initial, n)].set(1.0, mode="drop")
        if estimator == "relaxed":
            # A row is labelled unless no round chose it.
            weights = jnp.maximum(given[None], 1.0 - jnp.cumprod(1.0 - jnp.minimum(chosen, 1.0), axis=0))
        else:
            # The rows that were bought: an oracle may have no label to give.
            bought = jnp.zeros_like(chosen)
            bought = jax.vmap(lambda row, index, real: row.at[index].max(real.astype(jnp.float32)))(
                bought, runs.index, runs.bought
            )
            weights = given[None] + jnp.cumsum(bought + chosen - lax.stop_gradient(chosen), axis=0)

        def judged(judge: Learner, meta: PyTree, weights: Array) -> Array:
            @jax.checkpoint
            def after(weight: Array) -> Array:
                batch = Batch(x=problem.x, y=y, weight=weight)
                adapted = judge.adapt(key, meta, batch, unlabelled=problem.x)
                log_probs = consensus(judge.predict(adapted, test.x).logits)
                return cross_entropy(log_probs, test.y, test.weight)

            losses: Array = lax.map(after, weights)
            return losses.mean()

        if refit is None:
            return judged(learner, meta, weights)
        loss = judged(refit, lax.stop_gradient(meta), weights)
        return loss + judged(learner, meta, lax.stop_gradient(weights)) if joint else loss

    def learn(key: Array, state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        heat = temperature(state.step) if callable(temperature) else jnp.asarray(temperature, jnp.float32)

        def one(key: Array) -> tuple[PyTree, Metrics]:
            problem_key, play_key, adapt_key = jax.random.split(key, 3)
            problem = sampler(problem_key, data)
            runs = lax.stop_gradient(play(play_key, state.meta, (state.params, ()), problem))
            trained = (state.params, state.meta) if joint else state.params

            def loss_of(trained: PyTree) -> Array:
                both = trained if joint else (trained, state.meta)
                return episode_loss(adapt_key, both, runs, problem, heat)

            loss, grads = jax.value_and_grad(loss_of)(trained)
            return grads, {"loss": loss, "area": runs.accuracy.mean()}

        keys = jax.random.split(key, problems)
        grads, metrics = jax.tree.map(lambda leaf: leaf.mean(0), one_by_one(one, keys, chunk))
        metrics["grad_norm"] = optax.tree.norm(grads)
        return apply_gradients(optimizer, grads, state, joint=joint), metrics

    return make_trainer(policy, optimizer, learn, joint=joint)
