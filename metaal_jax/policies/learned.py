"""Learned policies: a network scores the rows, and a batch is drawn one row after the other without replacement."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.combinators import planned
from metaal_jax.acquisition.lifts import check_count, contained, require_policy, select_top
from metaal_jax.base import Decision, Policy, PoolView, PyTree, ScoreFn, Trainable, require
from metaal_jax.policies import features
from metaal_jax.policies.features import Geometry, Memory, Observation
from metaal_jax.rows import row_noise


class LearnedState(NamedTuple):
    """The state of a learned policy: the pool's geometry and the memory of earlier rounds."""

    geometry: Geometry
    memory: Memory


def prior(**factors: float) -> tuple[float, ...]:
    """Factors for a network's `prior`, by name of the standardised row feature: where training begins.

    >>> from metaal_jax import models, policies
    >>> network = models.RowNetwork(prior=policies.prior(coverage=2.0))

    Raises:
      ValueError: for a name that is no row feature.
    """
    for name in factors:
        if name not in features.ROWS:
            raise ValueError(f"prior: no row feature is named {name!r}; choose from {features.ROWS}")
    return (0.0,) * len(features.ROWS) + tuple(float(factors.get(name, 0.0)) for name in features.ROWS)


def _scores_of(network: nn.Module) -> ScoreFn:
    """`(params, observation) -> (scores [m], value [])`: what a network thinks of the candidates it sees."""

    def score(policy_params: PyTree, observation: Observation) -> tuple[Array, Array]:
        rows = features.inputs(observation)
        output: tuple[Array, Array] = network.apply(  # type: ignore[assignment]
            policy_params, rows, observation.situation, observation.available
        )
        return output

    return score


def learned(
    network: nn.Module,
    *,
    k: int,
    plan: int = 1,
    sample: bool = False,
    candidates: int | None = None,
    anchors: int = 1000,
    shortlist: int = 2048,
) -> Policy:
    """A network scores the rows by features that know no data set; the batch is chosen row after row by the scores.

    The first row is drawn with probabilities `softmax(scores)` among the rows that may be asked for (`sample`) or is
    the best one. Then the features that tell what is covered already are those with the row among the labelled
    (`features.picked`), the network scores what is left again, and so on: Plackett-Luce with scores that know the
    batch. Parameters fit any number of classes and rows, any learner, with or without a committee.

    Trained as a classifier of rows whose label helps (`supervised`, "classification"), the sigmoid of a decision's
    scores is the probability that a row needs labelling.

    Args:
      network: `(inputs [m, 2 len(ROWS)], situation [len(SITUATION)], mask [m]) -> (scores [m], value [])`, such as
        `models.RowNetwork` or `models.SetNetwork`.
      k: rows a round.
      plan: rows chosen at a time, at most as many as there are classes, and asked for `k` at a time, see
        `acquisition.planned`: rows chosen one by one with a model of a few labels cover less. A policy with a plan has
        no `observe`, `evaluate` or `score`.
      sample: draw the batch, for training by reinforcement; else take the best rows, ties broken by the key.
      candidates: look at that many random rows a round only; None for all. Means of features are the whole pool's.
      anchors: rows that stand for the pool, see `features.pool_geometry`.
      shortlist: without `sample`, a batch of several rows is chosen among that many: a quarter have the best first
        scores, the others are random. A round of many picks on a large pool then costs little more than one. Where the
        batch is drawn, `candidates` bound the cost.

    Returns:
      A `Policy` that can be trained: `train.observe` gives an `Observation`, `train.score` the network's answer. With
      `sample` it has `train.evaluate`, where a batch that cannot be drawn has log-probability -inf. Its decision's
      scores are those before the first pick, -inf for rows not looked at; `log_prob` is 0 without `sample`. Its state
      holds kernels `[n, anchors]`. A loop on the device carries them without a copy; a step compiled by itself copies
      them every round unless the state is donated (`jax.jit(step, donate_argnums=...)`).

    Raises:
      ValueError: for numbers below 1, a shortlist or candidates fewer than `k`, or a plan that is drawn.

    Reference: Konyushkova, Sznitman, Fua: Learning Active Learning from Data, 2017 (features that transfer); Kool, van
    Hoof, Welling: Stochastic Beams and Where to Find Them, 2019 (sampling without replacement).
    """
    for name, value in (("k", k), ("plan", plan), ("anchors", anchors), ("shortlist", shortlist)):
        require(value >= 1, f"learned: {name} must be at least 1, got {value}")
    require(shortlist >= k, f"learned: a shortlist of {shortlist} rows is too short for batches of {k}")
    require(candidates is None or candidates >= k, f"learned: {candidates} candidates are too few for batches of {k}")
    if plan > k:
        require(not sample, "learned: a plan is not drawn, since it has no probability; leave out plan or sample")
        return _in_plans(network, k, plan, candidates=candidates, anchors=anchors, shortlist=shortlist)

    score = _scores_of(network)

    def init(key: Array) -> PyTree:
        rows = jnp.zeros((1, 2 * len(features.ROWS)))
        return network.init(key, rows, jnp.zeros(len(features.SITUATION)), jnp.ones(1, bool))

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> LearnedState:
        del policy_params
        geometry = features.pool_geometry(key, view, anchors=anchors)
        return LearnedState(geometry, features.fresh_memory(view))

    def observe(key: Array, policy_state: LearnedState, view: PoolView) -> Observation:
        check_count(k, view.row.shape[0])
        position = None
        if candidates is not None and candidates < view.row.shape[0]:
            drawn_key = jax.random.fold_in(key, 0)
            position, _ = select_top(drawn_key, jnp.zeros(view.row.shape), view.available, view.row, candidates)
        return features.observe(policy_state.geometry, policy_state.memory, view, k=k, position=position)

    def act(
        key: Array, policy_params: PyTree, policy_state: LearnedState, view: PoolView
    ) -> tuple[Decision, LearnedState]:
        observation = observe(key, policy_state, view)
        scores, _ = score(policy_params, observation)
        short, first = observation, scores
        if k > 1 and not sample and shortlist < scores.shape[0]:
            short, first = shortened(jax.random.fold_in(key, 1), observation, scores, view.row, shortlist)
        pick_key = jax.random.fold_in(key, 2)
        row = view.row[short.position]

        def choose(number: Array, scores: Array, available: Array) -> Array:
            own = jax.random.fold_in(pick_key, number)
            scores = jnp.nan_to_num(scores, nan=-jnp.inf)
            if sample:
                noise = jax.vmap(lambda r: jax.random.gumbel(jax.random.fold_in(own, r)))(row)
                return jnp.where(available, scores + noise, -jnp.inf).argmax()
            best = jnp.where(available, scores, -jnp.inf).max()
            return jnp.where(available & (scores == best), row_noise(own, row), -1).argmax()

        place, valid, log_prob, _ = in_sequence(score, policy_params, short, k, choose, first=first)
        decision = Decision(
            index=short.position[place],
            valid=valid,
            log_prob=log_prob if sample else jnp.zeros(()),
            scores=jnp.full(view.row.shape, -jnp.inf).at[observation.position].set(scores),
        )
        return decision, policy_state._replace(memory=features.remember(policy_state.memory, view))

    def evaluate(policy_params: PyTree, observation: Observation, index: Array) -> tuple[Array, Array, Array]:
        found = (observation.position[None] == index[:, None]) & observation.available[None]

        def choose(number: Array, scores: Array, available: Array) -> Array:
            return found[number].argmax()

        _, _, log_prob, entropy = in_sequence(score, policy_params, observation, k, choose)
        # Beyond the last row that was available, entries of a batch mean nothing.
        drawable = (found.any(-1) | (jnp.arange(k) >= observation.available.sum())).all()
        return jnp.where(drawable, log_prob, -jnp.inf), entropy, score(policy_params, observation)[1]

    train = Trainable(observe=observe, evaluate=evaluate if sample else None, score=score)
    return contained(Policy(init=init, begin=begin, act=act, train=train), logits=True, embedding=True)


def _in_plans(network: nn.Module, k: int, plan: int, **options: Any) -> Policy:
    """`learned` with plans, whose length is known with the number of classes."""

    def policy_of(view: PoolView) -> Policy:
        rows = k * math.ceil(min(plan, view.prediction.logits.shape[-1]) / k)
        whole = learned(network, k=rows, **options)
        return planned(whole, rows=rows, k=k) if rows > k else whole

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> PyTree:
        return policy_of(view).begin(key, policy_params, view)

    def act(key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        return policy_of(view).act(key, policy_params, policy_state, view)

    return Policy(init=learned(network, k=k, **options).init, begin=begin, act=act)


def fixed(policy: Policy, policy_params: PyTree) -> Policy:
    """A trained policy with its parameters, as a rule that has none: for selectors, bandits and combinators."""
    require_policy("fixed", policy)
    return Policy(
        init=lambda key: (),
        begin=lambda key, _, view: policy.begin(key, policy_params, view),
        act=lambda key, _, state, view: policy.act(key, policy_params, state, view),
    )


def shortened(key: Array, observation: Observation, scores: Array, row: Array, count: int) -> tuple[Observation, Array]:
    """`count` of the candidates, and their scores: a quarter with the best scores, the others at random.

    The rows with the best first scores are often alike: once one of them is picked, the others add little.
    """
    own, other = jax.random.split(key)
    number = row[observation.position]
    best, _ = select_top(own, scores, observation.available, number, max(count // 4, 1))
    rest = observation.available.at[best].set(False)
    drawn, found = select_top(other, jnp.zeros(scores.shape), rest, number, count - best.shape[0])
    place = jnp.concatenate([best, drawn])
    fields = ("position", "available", "rows", "kernel", "embedding")
    short = observation._replace(**{name: getattr(observation, name)[place] for name in fields})
    # Each of the best stands for itself, the drawn ones for all others.
    others = rest.sum() / jnp.maximum(found.sum(), 1)
    reference = jnp.concatenate([observation.available[best].astype(jnp.float32), found * others])
    # A row that was not found again is one of the others, or of the best, once more.
    available = jnp.concatenate([short.available[: best.shape[0]], found])
    return short._replace(available=available, reference=reference), scores[place]


def in_sequence(
    score: ScoreFn,
    policy_params: PyTree,
    observation: Observation,
    k: int,
    choose: Callable[[Array, Array, Array], Array],
    first: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Chooses `k` candidates one after the other, each scored in view of those before.

    Args:
      score: `(params, observation) -> (scores [m], value)`.
      policy_params: of the network.
      observation: of the candidates.
      k: how many.
      choose: `(number of the pick, scores [m], available [m]) -> place`.
      first: scores `[m]` for the first pick, where they are known already.

    Returns:
      `(place int32 [k], valid bool [k], log-probability of the sequence [], sum of the entropies of its draws [])`; an
      invalid pick, when nothing was available, counts 0.
    """

    def pick(carry: tuple[Observation, Array], number: Array) -> tuple[tuple[Observation, Array], PyTree]:
        seen, scores = carry
        place = choose(number, scores, seen.available).astype(jnp.int32)
        valid = seen.available.any() & seen.available[place]
        log_probs = jax.nn.log_softmax(jnp.where(seen.available, scores, -1e9))
        probs = jnp.where(seen.available, jnp.exp(log_probs), 0.0)
        entropy = -jnp.where(probs > 0, probs * log_probs, 0.0).sum()
        if k > 1:
            seen = features.picked(seen, place)
            scores, _ = score(policy_params, seen)
        out = (place, valid, jnp.where(valid, log_probs[place], 0.0), jnp.where(valid, entropy, 0.0))
        return (seen, scores), out

    scores = score(policy_params, observation)[0] if first is None else first
    if k == 1:
        _, out = pick((observation, scores), jnp.int32(0))
        place, valid, log_prob, entropy = jax.tree.map(lambda leaf: leaf[None], out)
    else:
        _, (place, valid, log_prob, entropy) = lax.scan(pick, (observation, scores), jnp.arange(k))
    return place, valid, log_prob.sum(), entropy.sum()
