"""The active-learning loop: ask, answer, adapt, as pure functions that compile to one program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax import stopping
from metaal_jax.base import (
    ActiveLearner,
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    Problem,
    PyTree,
    empty_batch,
    pad_batch,
    require,
    rows_of,
    take,
)
from metaal_jax.metrics import Score, score
from metaal_jax.rows import predict_pool


class ActiveState(NamedTuple):
    """What a run carries from round to round.

    Attributes:
      labelled: `[capacity]` labelled rows in the order of labelling, weight 0 beyond `count`.
      labelled_index: int32 `[capacity]`, their pool rows, -1 beyond `count`.
      count: int32 `[]`, labelled rows.
      queried: bool `[n]`, rows asked for, answered or not.
      spent: float32 `[]`, the cost of all answers.
      round: int32 `[]`, rounds told so far.
      oracle: the key of the simulated oracle's errors.
      params: the adapted parameters.
      policy_state: the policy's memory.
      stopping: the stopping rule's memory; `()` without a rule.
    """

    labelled: Batch
    labelled_index: Array
    count: Array  # type: ignore[assignment]
    queried: Array
    spent: Array
    round: Array
    oracle: Array
    params: PyTree
    policy_state: PyTree
    stopping: PyTree


class Info(NamedTuple):
    """What a round records; `lax.scan` stacks it into the trace of a run.

    Attributes:
      index: int32 `[k]`, rows asked for.
      valid: bool `[k]`, False where nothing was asked: the pool or the budget was used up.
      y: int32 `[k]`, the answers; weight: float32 `[k]`, 0 where there was none.
      log_prob: float32 `[]`, of the decision.
      count: int32 `[]`, labelled rows after the round; spent: float32 `[]`, their cost.
      test, validation: the adapted model's `Score` on the problem's rows.
      signals: what stopping rules look at, see `metaal_jax.stopping`; `()` without a rule.
      stopped: bool `[]`, whether the rule has stopped the run.
    """

    index: Array  # type: ignore[assignment]
    valid: Array
    y: Array
    weight: Array
    log_prob: Array
    count: Array  # type: ignore[assignment]
    spent: Array
    test: Score
    validation: Score
    signals: PyTree
    stopped: Array


def active_learner(
    learner: Learner,
    policy: Policy,
    *,
    capacity: int,
    budget: float | Array | None = None,
    warm_start: bool = False,
    wrong: float | Array = 0.0,
    silent: float | Array = 0.0,
    chunk: int | None = None,
    stop: stopping.StoppingRule | None = None,
) -> ActiveLearner:
    """Pool-based active learning of `learner` with the queries of `policy`.

    A round is `ask` (predict the pool, let the policy decide), an answer, and `tell` (append the answered rows, adapt
    again). `step` is a whole round with a simulated oracle, and scans:

    >>> import jax, jax.numpy as jnp, optax
    >>> import metaal_jax as ml
    >>> x, y = jax.random.normal(jax.random.key(0), (50, 4)), jnp.arange(50) % 2
    >>> problem = ml.tasks.problem(x + 3 * y[:, None], y, x + 3 * y[:, None], y)
    >>> learner = ml.learners.fine_tune(ml.models.MLP(2, hidden=()), optimizer=optax.adam(0.1), steps=20)
    >>> active = ml.active_learner(learner, ml.acquisition.top_k(ml.acquisition.margin, k=2), capacity=10)
    >>> def run(key):
    ...     init_key, meta_key, loop_key = jax.random.split(key, 3)
    ...     meta = learner.init(meta_key, x)
    ...     state = active.init(init_key, meta, (), problem)
    ...     def body(state, key):
    ...         return active.step(key, meta, (), state, problem)
    ...     return jax.lax.scan(body, state, jax.random.split(loop_key, 5))[1]
    >>> trace = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 3))
    >>> trace.test.accuracy.shape, trace.count[:, -1]
    ((3, 5), Array([10, 10, 10], dtype=int32))

    Args:
      learner: any `Learner`.
      policy: any `Policy`.
      capacity: rows of the labelled buffer, the initial set included, static. Adapting costs what it holds; `grow`
        enlarges it between segments of a long run.
      budget: what all answers together may cost, in units of `Problem.cost`; rows that would exceed it are not asked,
        cheaper ones further down the decision are.
        None for `capacity`, which unit costs cannot exceed. Sums are float32: prefer whole numbers.
      warm_start: adapt from the last round's parameters instead of from the meta-parameters.
      wrong: probability that the simulated oracle answers with another class, drawn evenly.
      silent: probability that it gives no answer; such a row costs nothing and is not asked again.
      chunk: pool and test rows predicted at a time, None for all at once.
      stop: a rule of `metaal_jax.stopping`. Once it has stopped, nothing more is asked and the model stays as it is.

    Returns:
      An `ActiveLearner`. What its `init` raises: `ValueError` for an initial set larger than `capacity`, a capacity
      larger than the pool, and, outside compiled programs, negative costs or a budget below the cheapest label or the
      cost of the initial set.

    Raises:
      ValueError: for `capacity < 1`, probabilities outside [0, 1] or a negative budget.
    """
    require(capacity >= 1, f"active_learner: capacity must be at least 1, got {capacity}")
    require(budget is None or budget >= 0, f"active_learner: budget must not be negative, got {budget}")
    for name, value in (("wrong", wrong), ("silent", silent)):
        require((value >= 0) & (value <= 1), f"active_learner: {name} must be a probability, got {value}")
    limit = capacity if budget is None else budget

    def view_of(meta: PyTree, state: ActiveState, problem: Problem) -> PoolView:
        return PoolView(
            x=problem.x,
            row=jnp.arange(rows_of(problem.x), dtype=jnp.int32),
            weight=problem.weight,
            queried=state.queried,
            cost=problem.cost,
            prediction=predict_pool(learner, state.params, problem.x, chunk=chunk),
            labelled=state.labelled,
            labelled_index=state.labelled_index,
            meta=meta,
            params=state.params,
            budget=jnp.asarray(limit, jnp.float32),
            spent=state.spent,
        )

    def record(state: ActiveState, problem: Problem, index: Array, y: Array, answered: Array) -> ActiveState:
        """Appends the answered rows and marks all of `index` (-1 for none) as queried."""
        n, room = rows_of(problem.x), state.labelled_index.shape[0]
        place = state.count + jnp.cumsum(answered) - 1
        answered = answered & (place < room)
        place = jnp.where(answered, place, room)
        labelled = Batch(
            x=jax.tree.map(lambda buffer, rows: buffer.at[place].set(rows, mode="drop"), state.labelled.x,
                           take(problem.x, index)),
            y=state.labelled.y.at[place].set(y, mode="drop"),
            weight=state.labelled.weight.at[place].set(1.0, mode="drop"),
        )  # fmt: skip
        return state._replace(
            labelled=labelled,
            labelled_index=state.labelled_index.at[place].set(index, mode="drop"),
            count=state.count + answered.sum(dtype=jnp.int32),
            queried=state.queried.at[jnp.where(index >= 0, index, n)].set(True, mode="drop"),
            spent=state.spent + jnp.where(answered, problem.cost[index], 0.0).sum(),
        )

    def refit(key: Array, meta: PyTree, state: ActiveState, problem: Problem) -> PyTree:
        start = state.params if warm_start else None
        return learner.adapt(key, meta, state.labelled, unlabelled=problem.x, start=start)

    def init(key: Array, meta: PyTree, policy_params: PyTree, problem: Problem) -> ActiveState:
        n, given = rows_of(problem.x), problem.initial.shape[0]
        if capacity > n:
            raise ValueError(f"capacity {capacity} is larger than the pool of {n} rows; ask for at most {n} labels")
        if given > capacity:
            raise ValueError(f"an initial set of {given} rows does not fit a capacity of {capacity}; raise capacity")
        real = problem.weight > 0
        lowest = jnp.where(real, problem.cost, 0.0).min()
        require(lowest >= 0, f"active_learner: costs must not be negative, got {lowest}")
        cheapest = jnp.where(real, problem.cost, jnp.inf).min()
        require(cheapest <= limit, f"active_learner: a budget of {limit} buys nothing, the cheapest label costs "
                f"{cheapest}; raise the budget")  # fmt: skip
        adapt_key, again_key, begin_key, oracle_key = jax.random.split(key, 4)
        nothing = empty_batch(problem.x, capacity)
        state = ActiveState(
            labelled=nothing,
            labelled_index=jnp.full(capacity, -1, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            queried=jnp.zeros(n, bool),
            spent=jnp.zeros(()),
            round=jnp.zeros((), jnp.int32),
            oracle=oracle_key,
            params=learner.adapt(adapt_key, meta, empty_batch(problem.x, 1), unlabelled=problem.x),
            policy_state=(),
            stopping=() if stop is None else stopping.start(stop, n),
        )
        if given:
            if problem.y is None:
                raise ValueError("a problem with an initial set needs its labels in y; or start cold and tell them")
            state = record(state, problem, problem.initial, problem.y[problem.initial], problem.initial >= 0)
            require(state.spent <= limit, f"active_learner: the initial set costs {state.spent}, more than the budget "
                    f"of {limit}; raise the budget")  # fmt: skip
            state = state._replace(params=refit(again_key, meta, state, problem))
        return state._replace(policy_state=policy.begin(begin_key, policy_params, view_of(meta, state, problem)))

    def payable(state: ActiveState, problem: Problem, decision: Decision) -> Array:
        """Which rows of a decision, best first, the budget and the buffer have room for, bool `[k]`."""

        def buy(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            spent, count = carry
            cost, valid = row
            bought = valid & (spent + cost <= limit) & (count < state.labelled_index.shape[0])
            return (jnp.where(bought, spent + cost, spent), count + bought), bought

        return jax.lax.scan(buy, (state.spent, state.count), (problem.cost[decision.index], decision.valid))[1]

    def look(
        key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem
    ) -> tuple[Decision, ActiveState, PyTree]:
        """What `ask` does, with the signals for the trace."""
        view = view_of(meta, state, problem)
        decision, policy_state = policy.act(key, policy_params, state.policy_state, view)
        decision = decision._replace(valid=payable(state, problem, decision))
        state = state._replace(policy_state=policy_state)
        if stop is None:
            return decision, state, ()
        memory, signals = stopping.advance(stop, state.stopping, view, decision)
        decision = decision._replace(valid=decision.valid & ~memory.stopped)
        return decision, state._replace(stopping=memory), signals

    def ask(
        key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem
    ) -> tuple[Decision, ActiveState]:
        decision, state, _ = look(key, meta, policy_params, state, problem)
        return decision, state

    def tell(
        key: Array, meta: PyTree, state: ActiveState, problem: Problem, decision: Decision, y: Array, weight: Array
    ) -> ActiveState:
        index = jnp.where(decision.valid, decision.index, -1)
        state = record(state, problem, index, jnp.asarray(y, jnp.int32), decision.valid & (jnp.asarray(weight) > 0))
        params = refit(key, meta, state, problem)
        if stop is not None:
            stopped = state.stopping.stopped
            params = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), state.params, params)
        return state._replace(params=params, round=state.round + 1)

    def answer(key: Array, truth: Array, decision: Decision, classes: int) -> tuple[Array, Array]:
        """The simulated oracle; its noise belongs to a run's rows, so all strategies meet the same errors."""

        def one(row: Array) -> tuple[Array, Array]:
            wrong_key, class_key, silent_key = jax.random.split(jax.random.fold_in(key, row), 3)
            other = jax.random.randint(class_key, (), 1, max(classes, 2))
            mistaken = jax.random.uniform(wrong_key) < wrong
            y = jnp.where(mistaken, (truth[row] + other) % classes, truth[row])
            return y.astype(jnp.int32), (jax.random.uniform(silent_key) >= silent).astype(jnp.float32)

        return jax.vmap(one)(decision.index)

    def step(
        key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem
    ) -> tuple[ActiveState, Info]:
        if problem.y is None:
            raise ValueError("step simulates the oracle and needs problem.y; without labels drive ask and tell")
        ask_key, tell_key = jax.random.split(key)
        decision, state, signals = look(ask_key, meta, policy_params, state, problem)
        classes = jax.eval_shape(learner.predict, state.params, problem.x).logits.shape[-1]
        y, weight = answer(state.oracle, problem.y, decision, classes)
        weight = weight * decision.valid
        state = tell(tell_key, meta, state, problem, decision, y, weight)
        info = Info(
            index=decision.index,
            valid=decision.valid,
            y=y,
            weight=weight,
            log_prob=decision.log_prob,
            count=state.count,
            spent=state.spent,
            test=evaluate(learner, state.params, problem.test, chunk=chunk),
            validation=evaluate(learner, state.params, problem.validation, chunk=chunk),
            signals=signals,
            stopped=jnp.zeros((), bool) if stop is None else state.stopping.stopped,
        )
        return state, info

    return ActiveLearner(init=init, ask=ask, tell=tell, step=step)


def evaluate(learner: Learner, params: PyTree, batch: Batch, *, chunk: int | None = None) -> Score:
    """The `Score` of adapted parameters on labelled rows, `chunk` rows at a time; zeros without any row of weight."""
    return score(predict_pool(learner, params, batch.x, chunk=chunk).logits, batch.y, batch.weight)


def grow(state: ActiveState, capacity: int) -> ActiveState:
    """The same state with room for `capacity` labels, for an `active_learner` of that capacity.

    Raises:
      ValueError: for a capacity below the present one.
    """
    room = state.labelled_index.shape[0]
    labelled = pad_batch(state.labelled, capacity)
    index = jnp.pad(state.labelled_index, (0, capacity - room), constant_values=-1)
    return state._replace(labelled=labelled, labelled_index=index)
