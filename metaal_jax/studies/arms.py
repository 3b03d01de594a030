"""What the main job compares: learners and strategies by name, and one compiled program for each pair."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from metaal_jax import acquisition, learners, models
from metaal_jax.acquisition import predict_pool
from metaal_jax.base import Batch, Learner, Policy, Problem, PyTree
from metaal_jax.learners import without_head
from metaal_jax.loop import active_learner, evaluate, grow
from metaal_jax.metrics import Score
from metaal_jax.names import Given, find
from metaal_jax.studies.groups import Learning, Network, Sizes
from metaal_jax.studies.meta_learners import (
    META_LEARNERS,
    OWN_HEAD,
    SEMI_SUPERVISED,
    make_meta_learner,
    semi_supervised,
)

PLAIN = {
    "scratch": "the network trained from a random initialisation on the labels bought so far",
    "frozen": "maml's body kept as it is, logistic regression on its standardised embedding",
    "logistic": "logistic regression on the pixels",
}
# With "+pseudo" or "+propagation" a learner also learns from the pool's unlabelled rows.
LEARNERS = {
    f"{name}{suffix}": text
    for suffix in ("", *(f"+{kind}" for kind in SEMI_SUPERVISED))
    for name, text in {**PLAIN, **META_LEARNERS}.items()
}


Start = Callable[[Array, PyTree, PyTree], PyTree]
Prepare = Callable[[PyTree, Problem, Batch], tuple[Problem, Batch]]


class Arm(NamedTuple):
    """One learner, single or as a committee, with the strategies that share its program.

    Attributes:
      single: the base learner; it chooses the first batch, so that a learner's strategies can share it.
      start: `(key, meta, x) -> meta` of the base learner: for scratch a fresh initialisation.
      learner: the learner that runs in the loop, `single` or a committee of it.
      begin: `(key, meta, x) -> meta` of `learner`, given the same arguments as `start`.
      prepare: `(meta, problem, test) -> (problem, test)`: a frozen body embeds all rows once.
      strategies: names, in the order of the rules in `policy`.
      first, policy: what chooses the first batch and the others, both `acquisition.one_of` over the strategies.
      segments: numbers of labels at which the labelled buffer grows; adapting costs what the buffer holds.
    """

    single: Learner
    start: Start
    learner: Learner
    begin: Start
    prepare: Prepare
    strategies: tuple[str, ...]
    first: Policy
    policy: Policy
    segments: tuple[int, ...]


class Curves(NamedTuple):
    """What one run gives: scores after every batch, `[rounds]`, without labels, and on all test rows at the end."""

    test: Score
    cold: Score
    final: Score
    y: Array
    bought: Array


def make_model(classes: int, shape: tuple[int, ...], network: Network = Network()) -> nn.Module:
    """The network for rows of this shape: convolutional for images, an MLP for vectors."""
    if len(shape) == 1:
        return models.MLP(classes, hidden=(64, 64))
    blocks = network.blocks or (4 if min(shape[:2]) >= 16 else 2)
    return models.Conv4(classes, filters=network.filters, blocks=blocks, norm=network.norm)


def make_embed(model: nn.Module, chunk: int) -> Callable[[PyTree, PyTree], Array]:
    """`(meta, x) -> embedding [n, d]` by a network's body, `chunk` rows at a time."""
    body = learners.maml(model, optimizer=optax.identity(), steps=0)
    return lambda meta, x: predict_pool(body, meta, x, chunk=chunk).embedding[0]


def standardised(
    embed: Callable[[PyTree], Array], problem: Problem, test: Batch | None = None
) -> tuple[Problem, Batch]:
    """The problem, and other test rows, embedded: the pool's mean is 0 and its common standard deviation 1."""
    pool = embed(problem.x)
    mean, scale = pool.mean(0), pool.std() + 1e-6

    def scaled(batch: Batch) -> Batch:
        return batch._replace(x=(embed(batch.x) - mean[None]) / scale)

    own = scaled(test_of(problem))
    problem = problem._replace(x=(pool - mean[None]) / scale, test=own, validation=scaled(problem.validation))
    return problem, own if test is None else scaled(test)


def test_of(problem: Problem) -> Batch:
    """The test rows of a problem that was drawn for an experiment."""
    if problem.test is None:
        raise ValueError("the problem has no test rows, and an experiment is judged on them")
    return problem.test


def make_arms(
    learner: str,
    strategies: tuple[str, ...],
    *,
    classes: int,
    shape: tuple[int, ...],
    sizes: Sizes,
    learning: Learning = Learning(),
) -> list[Arm]:
    """The arms of a learner: one for the strategies that ask a single model, one for those that ask a committee."""
    single, start, prepare, source = _learner(learner, classes, shape, learning, sizes.chunk)
    k, budget = sizes.batch_size, sizes.budget
    # Long training, or many labels: then a smaller buffer pays for compiling the round twice.
    half = -(-budget // 2 // k) * k
    segments = (half, budget) if budget > (50 if learner == "scratch" else 100) and half < budget else (budget,)
    need = Given(
        k=k, rounds=budget // k, classes=classes, learner=single, refit=single,
        loss_learner=_loss_learner(learner, classes, shape, learning),
    )  # fmt: skip
    # Strategies of one cost share a program; one that costs much more than the others would hold them up.
    groups: dict[tuple[bool, str], list[str]] = {}
    for name in strategies:
        strategy = find(name)
        groups.setdefault((strategy.committee, name if strategy.costly else ""), []).append(name)
    arms = []
    for (asks_committee, _), mine in groups.items():
        members = sizes.members if asks_committee else 1
        both = members > 1 and source == "both"
        many = single if members == 1 else learners.committee(single, members=members, source=source)
        arms.append(
            Arm(
                single=single,
                start=start,
                learner=many,
                begin=many_starts(start, members) if both else start,
                prepare=prepare,
                strategies=tuple(mine),
                first=acquisition.one_of([_first_rule(name, sizes) for name in mine]),
                policy=acquisition.one_of([find(name).build(need) for name in mine]),
                segments=segments,
            )
        )
    return arms


def many_starts(start: Start, members: int) -> Start:
    """Every member's own start; the first member's is that of the single model."""

    def begin(key: Array, meta: PyTree, x: PyTree) -> PyTree:
        keys = [key, *jax.random.split(jax.random.fold_in(key, 1), members - 1)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[start(k, meta, x) for k in keys])

    return begin


def _first_rule(strategy: str, sizes: Sizes) -> Policy:
    kind: str = sizes.initial
    if kind == "strategy":
        kind = "random" if strategy == "random" else "typical"
    k = sizes.batch_size
    return acquisition.typical(k=k) if kind == "typical" else acquisition.top_k(acquisition.random, k=k)


def linear_loss_learner(classes: int) -> Learner:
    """A linear layer with a head that foresees each row's loss; gradient steps train both, since they are one model."""
    model = models.MLP(classes, hidden=(), zero_head=True)
    return learners.loss_predictor(model, optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=50)


def _loss_learner(learner: str, classes: int, shape: tuple[int, ...], learning: Learning) -> Learner:
    if learner.partition("+")[0] in ("logistic", "frozen"):
        return linear_loss_learner(classes)
    scratch = learning.baselines
    optimizer = optax.adamw(scratch.scratch_rate, weight_decay=scratch.scratch_decay)
    model = make_model(classes, shape, learning.network)
    return learners.loss_predictor(model, optimizer=optimizer, steps=scratch.scratch_steps)


def _learner(
    learner: str, classes: int, shape: tuple[int, ...], learning: Learning, chunk: int
) -> tuple[Learner, Start, Prepare, Literal["both", "bootstrap"]]:
    """The base learner of this name: `(learner, start, prepare, source of a committee's difference)`."""
    learner, _, kind = learner.partition("+")
    if kind:
        base, start, prepare, source = _learner(learner, classes, shape, learning, chunk)
        return semi_supervised(base, kind, rows=learning.adaptation.pool_rows, chunk=chunk), start, prepare, source
    model, own = make_model(classes, shape, learning.network), learning.baselines

    def keep(meta: PyTree, problem: Problem, test: Batch) -> tuple[Problem, Batch]:
        return problem, test

    def fresh(key: Array, meta: PyTree, x: PyTree) -> PyTree:
        return base.init(key, x)

    if learner == "scratch":
        optimizer = optax.adamw(own.scratch_rate, weight_decay=own.scratch_decay)
        base = learners.fine_tune(model, optimizer=optimizer, steps=own.scratch_steps)
        return base, fresh, keep, "both"
    if learner == "logistic":
        base = learners.linear(classes, ridge=own.logistic_ridge, steps=own.solver_steps)
        return base, fresh, keep, "bootstrap"
    if learner in META_LEARNERS:
        base = make_meta_learner(learner, model, learning.adaptation, training=None)
        if learner in OWN_HEAD:
            return base, lambda key, meta, x: meta, keep, "bootstrap"
        return base, lambda key, meta, x: without_head(model, meta, x), keep, "bootstrap"
    if learner != "frozen":
        raise ValueError(f"unknown learner {learner!r}; choose from {list(LEARNERS)}")
    embed = make_embed(model, chunk)
    base = learners.linear(classes, ridge=own.frozen_ridge, steps=own.solver_steps)

    def embedded(meta: PyTree, problem: Problem, test: Batch) -> tuple[Problem, Batch]:
        meta = without_head(model, meta, problem.x)
        return standardised(lambda x: embed(meta, x), problem, test)

    return base, fresh, embedded, "bootstrap"


def make_run(
    arm: Arm, sampler: Callable[[Array, Any], Problem], *, k: int, chunk: int
) -> Callable[[Array, Array, PyTree, Any, Batch], Curves]:
    """`(key, number, meta, data, test) -> Curves`: one whole experiment, from drawing the problem to its curve.

    `number` chooses the strategy among those of the arm. All arms given the same key get the same problem, the same
    keys and, where `--initial` says so, the same first batch.
    """

    def run(key: Array, number: Array, meta: PyTree, data: Any, test: Batch) -> Curves:
        problem_key, start_key, first_key, loop_key = jax.random.split(key, 4)
        problem, test = arm.prepare(meta, sampler(problem_key, data), test)
        own_test = test_of(problem)
        start = arm.start(start_key, meta, problem.x)
        first_rules = (number, ((),) * len(arm.strategies))
        rules = (number, tuple(find(name).params(problem) for name in arm.strategies))
        # Adapted to no label, a learner is its own start: the first batch needs no inner loop.
        cold = arm.single._replace(adapt=lambda key, meta, batch, **_: meta)
        opening = active_learner(cold, arm.first, capacity=k, chunk=chunk)
        unlabelled = opening.init(first_key, start, first_rules, problem)
        decision, _ = opening.ask(first_key, start, first_rules, unlabelled, problem)
        problem = problem._replace(initial=jnp.where(decision.valid, decision.index, -1))
        meta = arm.begin(start_key, meta, problem.x)
        active = active_learner(arm.learner, arm.policy, capacity=arm.segments[0], chunk=chunk)
        state = active.init(loop_key, meta, rules, problem)
        scores = [jax.tree.map(lambda leaf: leaf[None], evaluate(arm.learner, state.params, own_test, chunk=chunk))]
        state, done = state._replace(round=jnp.int32(1)), k  # the first batch was a round
        for capacity in arm.segments:
            active = active_learner(arm.learner, arm.policy, capacity=capacity, chunk=chunk)
            state, trace = active.run(
                loop_key, meta, rules, problem, rounds=(capacity - done) // k, state=grow(state, capacity)
            )
            scores.append(trace.test)
            done = capacity
        return Curves(
            cold=evaluate(arm.single, unlabelled.params, own_test, chunk=chunk),
            test=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *scores),
            final=evaluate(arm.learner, state.params, test, chunk=chunk),
            y=state.labelled.y,
            bought=state.count,
        )

    return run
