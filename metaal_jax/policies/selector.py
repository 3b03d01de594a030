"""The strategy selector: a network that chooses, in every round, which query rule to follow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.lifts import require_policy
from metaal_jax.base import Decision, Policy, PoolView, PyTree, Trainable, require
from metaal_jax.policies import features
from metaal_jax.policies.learned import LearnedState
from metaal_jax.rows import clean

RULE = ("used", "yield", "tried")


def favoured(rule: int, by: float) -> tuple[float, ...]:
    """Factors for a network's `prior` with which a selector, `identity` included, begins with one rule, by its number.

    >>> from metaal_jax import models, policies
    >>> network = models.LinearNetwork(prior=policies.favoured(2, 1.0))
    """
    return (0.0,) * (2 * len(features.ROWS) + len(RULE) + rule) + (float(by),)


class SelectorState(NamedTuple):
    """The state of a selector.

    Attributes:
      rules: the states of the rules.
      own: geometry and memory, as of a learned policy.
      used: float32 `[r]`, rounds in which each rule was followed.
      gain: float32 `[r]`, running share of its rows that had been predicted wrong.
      last: float32 `[r]`, who proposed the batch of the last round: equal shares that add up to 1, or zeros before it.
    """

    rules: PyTree
    own: LearnedState
    used: Array
    gain: Array
    last: Array


class Proposals(NamedTuple):
    """What a selector sees: `rows [r, inputs]` and `situation` for the network; each rule's batch, `[r, k]`."""

    rows: Array
    situation: Array
    index: Array  # type: ignore[assignment]
    valid: Array


def selector(
    rules: Sequence[Policy], network: nn.Module, *, k: int, sample: bool = False, identity: bool = True,
    anchors: int = 1000,
) -> Policy:  # fmt: skip
    """Follows, in every round, one of several query rules: which one is learned, from the situation and the proposals.

    Every rule proposes its batch. A rule is described to the network by the mean features of its batch (see
    `policies.features`), how often it was followed in this run and how many of its rows had been predicted wrong, so
    that the choice adjusts to what the task at hand shows; and, with `identity`, by its number. Without, one network
    serves any set of rules.

    All rules act in every round, so they should cost alike.

    Args:
      rules: policies without parameters, of `k` rows a round.
      network: as of `policies.learned`, for `r` rows of `2 len(ROWS) + len(RULE)` inputs, and `r` more with `identity`.
      k: rows a round.
      sample: draw the rule, for training; else the one with the highest score.
      identity: tell the network which rule is which.
      anchors: see `features.pool_geometry`.

    Returns:
      A `Policy` that can be trained. `log_prob` is that of the batch, as a set: rules that propose the same one add up.

    Raises:
      ValueError: without rules, for a rule with parameters, or for numbers below 1.

    Reference: Hsu, Lin: Active Learning by Learning, 2015 (choosing among rules); Konyushkova, Sznitman, Fua:
    Discovering General-Purpose Active Learning Strategies, 2018 (learned by reinforcement).
    """
    rules = tuple(rules)
    require(rules, "selector: no rules given")
    for place, rule in enumerate(rules):
        require_policy("selector", rule)
        if jax.tree.leaves(jax.eval_shape(rule.init, jax.random.key(0))):
            raise ValueError(
                f"selector: rule {place} has parameters; give a trained policy as policies.fixed(it, params)"
            )
    require(k >= 1, f"selector: k must be at least 1, got {k}")
    require(anchors >= 1, f"selector: anchors must be at least 1, got {anchors}")
    number = len(rules)

    def init(key: Array) -> PyTree:
        width = 2 * len(features.ROWS) + len(RULE) + (number if identity else 0)
        return network.init(key, jnp.zeros((number, width)), jnp.zeros(len(features.SITUATION)), jnp.ones(number, bool))

    def begin(key: Array, policy_params: PyTree, view: PoolView) -> SelectorState:
        del policy_params
        own_key, rules_key = jax.random.split(key)
        keys = jax.random.split(rules_key, number)
        known = clean(view, logits=True, embedding=True)
        own = LearnedState(features.pool_geometry(own_key, known, anchors=anchors), features.fresh_memory(known))
        return SelectorState(
            rules=tuple(rule.begin(key, (), view) for rule, key in zip(rules, keys, strict=True)),
            own=own,
            used=jnp.zeros(number),
            gain=jnp.full(number, own.memory.surprise),
            last=jnp.zeros(number),
        )

    def updated(state: SelectorState, view: PoolView) -> Array:
        """The rules' running gains with what the last round's labels showed."""
        wrong, new = features.wrong_share(state.own.memory, clean(view, logits=True, embedding=True))
        followed = state.last > 0
        newer = features.REMEMBERED * state.gain + (1.0 - features.REMEMBERED) * wrong
        return jnp.where(followed & new, newer, state.gain)

    def propose(key: Array, state: SelectorState, view: PoolView) -> tuple[Proposals, PyTree]:
        keys = jax.random.split(jax.random.fold_in(key, 0), number)
        acted = [rule.act(key, (), own, view) for rule, own, key in zip(rules, state.rules, keys, strict=True)]
        index = jnp.stack([decision.index for decision, _ in acted])
        valid = jnp.stack([decision.valid for decision, _ in acted])
        if index.shape != (number, k):
            raise ValueError(f"selector: rules choose batches of shape {index.shape[1:]}, asked for are ({k},)")
        known = clean(view, logits=True, embedding=True)
        seen = features.observe(state.own.geometry, state.own.memory, known, k=k)
        weight = valid / jnp.maximum(valid.sum(-1, keepdims=True), 1)
        batches = (features.inputs(seen)[index] * weight[..., None]).sum(1)
        rounds = jnp.maximum(state.used.sum(), 1.0)
        parts = [batches, (state.used / rounds)[:, None], updated(state, view)[:, None],
                 (state.used > 0).astype(jnp.float32)[:, None]]  # fmt: skip
        if identity:
            parts.append(jnp.eye(number))
        rows = jnp.concatenate(parts, axis=-1)
        return Proposals(rows, seen.situation, index, valid), tuple(state for _, state in acted)

    def observe(key: Array, policy_state: SelectorState, view: PoolView) -> Proposals:
        return propose(key, policy_state, view)[0]

    def distribution(policy_params: PyTree, seen: Proposals) -> tuple[Array, Array]:
        everyone = jnp.ones(number, bool)
        output: Any = network.apply(policy_params, seen.rows, seen.situation, everyone)
        return jax.nn.log_softmax(output[0]), output[1]

    def proposers(seen: Proposals, index: Array) -> Array:
        """Which rules propose these rows, in whatever order; entries that are not valid mean nothing."""
        valid = seen.valid[(seen.index == index[None]).all(-1).argmax()]
        wanted = jnp.sort(jnp.where(valid, index, -1))
        return (jnp.sort(jnp.where(seen.valid, seen.index, -1), axis=-1) == wanted[None]).all(-1)

    def of_batch(log_probs: Array, seen: Proposals, index: Array) -> Array:
        return jax.nn.logsumexp(jnp.where(proposers(seen, index), log_probs, -jnp.inf))

    def act(
        key: Array, policy_params: PyTree, policy_state: SelectorState, view: PoolView
    ) -> tuple[Decision, SelectorState]:
        seen, states = propose(key, policy_state, view)
        log_probs, _ = distribution(policy_params, seen)
        choose_key = jax.random.fold_in(key, 1)
        if not sample:
            log_probs = jnp.where(log_probs == log_probs.max(), 0.0, -jnp.inf)  # ties are broken by the key
        chosen = jax.random.categorical(choose_key, log_probs).astype(jnp.int32)
        index, valid = seen.index[chosen], seen.valid[chosen]
        decision = Decision(
            index=index,
            valid=valid,
            log_prob=of_batch(log_probs, seen, index) if sample else jnp.zeros(()),
            scores=jnp.zeros(view.row.shape).at[index].max(valid.astype(jnp.float32)),
        )
        # Rules that proposed the same batch share its credit: what comes next depends on the batch alone.
        same = proposers(seen, index).astype(jnp.float32)
        state = SelectorState(
            rules=states,
            own=policy_state.own._replace(
                memory=features.remember(policy_state.own.memory, clean(view, logits=True, embedding=True))
            ),
            used=policy_state.used + same / same.sum(),
            gain=updated(policy_state, view),
            last=same / same.sum(),
        )
        return decision, state

    def evaluate(policy_params: PyTree, seen: Proposals, index: Array) -> tuple[Array, Array, Array]:
        log_probs, value = distribution(policy_params, seen)
        return of_batch(log_probs, seen, index), -(jnp.exp(log_probs) * log_probs).sum(), value

    train = Trainable(observe=observe, evaluate=evaluate if sample else None)
    return Policy(init=init, begin=begin, act=act, train=train)
