"""The active-learning loop: ask, answer, adapt, as pure functions that compile to one program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax import annotators, inputs, metrics, stopping
from metaal_jax.acquisition.lifts import require_policy
from metaal_jax.active import ActiveLearner, ActiveState, Info
from metaal_jax.base import (
    Annotator,
    Answer,
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    Problem,
    PyTree,
    empty_batch,
    on_device,
    require,
    rows_of,
)
from metaal_jax.buffer import asked_of, completed, grow, held, marked, take_in, taken_back
from metaal_jax.rows import predict_pool

__all__ = ["ActiveState", "Info", "active_learner", "evaluate", "grow"]

# (outputs [m, n, c], y [n, ...], weight [n]) -> a record of numbers, such as metrics.Score
RunScore = Callable[[Array, Array, Array], PyTree]


def active_learner(
    learner: Learner,
    policy: Policy,
    *,
    capacity: int,
    annotator: Annotator | None = None,
    budget: float | Array | None = None,
    warm_start: bool = False,
    again: bool = False,
    score: RunScore = metrics.score,
    record: Callable[[ActiveState], PyTree] | None = None,
    chunk: int | None = None,
    stop: stopping.StoppingRule | None = None,
) -> ActiveLearner:
    """Pool-based active learning of `learner` with the queries of `policy`.

    A round is `ask` (predict the pool, let the policy decide), an answer, and `tell` (take the answers into the
    labelled buffer, adapt again). `step` is a whole round with a simulated annotator, and `run` scans it:

    >>> import jax, jax.numpy as jnp
    >>> import metaal_jax as ml
    >>> x, y = jax.random.normal(jax.random.key(0), (50, 4)), jnp.arange(50) % 2
    >>> problem = ml.tasks.problem(x + 3 * y[:, None], y, x + 3 * y[:, None], y)
    >>> learner = ml.learners.linear(2)
    >>> active = ml.active_learner(learner, ml.acquisition.top_k(ml.acquisition.margin, k=2), capacity=10)
    >>> def experiment(key, problem):
    ...     meta_key, run_key = jax.random.split(key)
    ...     return active.run(run_key, learner.init(meta_key, problem.x), (), problem, rounds=5)[1]
    >>> many = jax.jit(jax.vmap(experiment, in_axes=(0, None)))
    >>> trace = many(jax.random.split(jax.random.key(1), 3), problem)
    >>> trace.test.accuracy.shape, trace.count[:, -1]
    ((3, 5), Array([10, 10, 10], dtype=int32))

    Args:
      learner: any `Learner`.
      policy: any `Policy`.
      capacity: answers that the labelled buffer holds, the initial set included, static. Adapting costs what it holds;
        `grow` enlarges it between segments of a long run.
      annotator: who answers in `step` and `run`; None for `annotators.truth()`.
      budget: what all questions together may cost, in units of `Problem.cost`; rows that would exceed it are not
        asked, cheaper ones further down the decision are. None for `capacity`, which unit costs cannot exceed. Sums are
        float32: prefer whole numbers.
      warm_start: adapt from the last round's parameters instead of from the meta-parameters.
      again: rows that have an answer may be asked for again: of other annotators, or of the same one, whose newer
        answer then replaces the older and is paid for too.
      score: how predictions are judged, `(outputs [m, n, c], y, weight) -> record`; `metrics.regression_score` for
        targets.
      record: `(state) -> pytree`, what else to record in every round, as `Info.record`.
      chunk: pool and test rows predicted at a time, None for all at once.
      stop: a rule of `metaal_jax.stopping`. Once it has stopped, nothing more is asked and the model stays as it is.

    Returns:
      An `ActiveLearner`. Outside compiled programs its functions raise `ValueError` for labels that the learner has no
      output for, answers that are NaN or of another shape, costs below 0, and a budget below the cheapest label or the
      cost of the initial set. Inside, such answers count as missing. `init` also raises for an initial set larger than
      `capacity`, and a capacity larger than the pool unless `again`.

    Raises:
      ValueError: for a learner or policy that is none, `capacity < 1` or a negative budget.
    """
    if not isinstance(learner, Learner):
        raise ValueError(f"active_learner: learner must be a Learner, such as learners.fine_tune(...), got "
                         f"{type(learner).__name__}")  # fmt: skip
    require_policy("active_learner", policy)
    require(capacity >= 1, f"active_learner: capacity must be at least 1, got {capacity}")
    require(budget is None or budget >= 0, f"active_learner: budget must not be negative, got {budget}")
    who = annotators.truth() if annotator is None else annotator
    limit = capacity if budget is None else budget

    def view_of(meta: PyTree, state: ActiveState, problem: Problem) -> PoolView:
        queried = state.queried
        if again:  # only rows that nobody can tell stay out
            queried &= ~marked(state.labelled_index, queried.shape[0])
        return PoolView(
            x=problem.x,
            row=jnp.arange(rows_of(problem.x), dtype=jnp.int32),
            weight=problem.weight,
            queried=queried,
            cost=problem.cost,
            prediction=predict_pool(learner, state.params, problem.x, chunk=chunk),
            labelled=state.labelled,
            labelled_index=state.labelled_index,
            meta=meta,
            params=state.params,
            budget=jnp.asarray(limit, jnp.float32),
            spent=state.spent,
        )

    def refit(key: Array, meta: PyTree, state: ActiveState, problem: Problem) -> ActiveState:
        start = state.params if warm_start else None
        return state._replace(params=learner.adapt(key, meta, state.labelled, unlabelled=problem.x, start=start))

    def outputs_of(params: PyTree, problem: Problem) -> int:
        return int(jax.eval_shape(learner.predict, params, problem.x).logits.shape[-1])

    def init(key: Array, meta: PyTree, policy_params: PyTree, problem: Problem) -> ActiveState:
        meta, policy_params, problem = on_device((meta, policy_params, problem))
        n, given = rows_of(problem.x), problem.initial.shape[0]
        if capacity > n and not again:
            raise ValueError(f"capacity {capacity} is larger than the pool of {n} rows; ask for at most {n} labels")
        if given > capacity:
            raise ValueError(f"an initial set of {given} rows does not fit a capacity of {capacity}; raise capacity")
        real = problem.weight > 0
        lowest = jnp.where(real, problem.cost, 0.0).min()
        require(lowest >= 0, f"active_learner: costs must not be negative, got {lowest}")
        cheapest = jnp.where(real, problem.cost, jnp.inf).min()
        require(cheapest <= limit, f"active_learner: a budget of {limit} buys nothing, the cheapest label costs "
                f"{cheapest}; raise the budget")  # fmt: skip
        adapt_key, again_key, begin_key, annotator_key = jax.random.split(key, 4)
        example = problem.validation.y
        nothing = empty_batch(problem.x, 1, example)
        state = ActiveState(
            labelled=empty_batch(problem.x, capacity, example),
            labelled_index=jnp.full(capacity, -1, jnp.int32),
            labelled_annotator=jnp.zeros(capacity, jnp.int32),
            labelled_cost=jnp.zeros(capacity, jnp.float32),
            count=jnp.zeros((), jnp.int32),
            queried=jnp.zeros(n, bool),
            spent=jnp.zeros((), jnp.float32),
            round=jnp.zeros((), jnp.int32),
            params=learner.adapt(adapt_key, meta, nothing, unlabelled=problem.x),
            policy_state=(),
            annotator=who.init(annotator_key, problem),
            stopping=() if stop is None else stopping.start(stop, n),
        )
        inputs.check_problem(problem, lambda: outputs_of(state.params, problem))
        if given:
            y = problem.initial_y
            if y is None:
                if problem.y is None:
                    raise ValueError("a problem with an initial set needs its labels: problem(..., known={row: label})")
                y = problem.y[problem.initial]
            decision = Decision(problem.initial, problem.initial >= 0, jnp.zeros(()), jnp.zeros(n))
            state = take_in(state, problem, decision, completed(Answer(y=y), problem, decision), again)
            require(state.spent <= limit, f"active_learner: the initial set costs {state.spent}, more than the budget "
                    f"of {limit}; raise the budget")  # fmt: skip
            state = refit(again_key, meta, state, problem)
        return state._replace(policy_state=policy.begin(begin_key, policy_params, view_of(meta, state, problem)))

    def begin(key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem) -> ActiveState:
        meta, policy_params, state, problem = on_device((meta, policy_params, state, problem))
        adapt_key, begin_key = jax.random.split(key)
        state = refit(adapt_key, meta, state, problem)
        return state._replace(policy_state=policy.begin(begin_key, policy_params, view_of(meta, state, problem)))

    def payable(state: ActiveState, problem: Problem, decision: Decision) -> Array:
        """Which rows of a decision, best first, the budget and the buffer have room for, bool `[k]`."""
        known = held(state, decision.index, asked_of(decision)) >= 0

        def buy(carry: tuple[Array, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
            spent, count = carry
            cost, valid, known = row
            bought = valid & (spent + cost <= limit) & (known | (count < state.labelled_index.shape[0]))
            return (jnp.where(bought, spent + cost, spent), count + (bought & ~known)), bought

        rows = (problem.cost[decision.index], decision.valid, known)
        return jax.lax.scan(buy, (state.spent, state.count), rows)[1]

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
        meta, policy_params, state, problem = on_device((meta, policy_params, state, problem))
        decision, state, _ = look(key, meta, policy_params, state, problem)
        return decision, state

    def unless_stopped(state: ActiveState, new: ActiveState) -> ActiveState:
        if stop is None:
            return new
        kept = jax.tree.map(lambda a, b: jnp.where(state.stopping.stopped, a, b), state.params, new.params)
        return new._replace(params=kept)

    def tell(
        key: Array, meta: PyTree, state: ActiveState, problem: Problem, decision: Decision, answer: Answer
    ) -> ActiveState:
        meta, state, problem = on_device((meta, state, problem))
        answer = inputs.check_answer(answer, state.labelled.y, decision, lambda: outputs_of(state.params, problem))
        decision = on_device(decision)
        told = take_in(state, problem, decision, completed(answer, problem, decision), again)
        told = unless_stopped(state, refit(key, meta, told, problem))
        return told._replace(round=state.round + 1)

    def untell(key: Array, meta: PyTree, state: ActiveState, problem: Problem, index: Array) -> ActiveState:
        meta, state, problem = on_device((meta, state, problem))
        index = inputs.row_numbers("untell", index, count=state.queried.shape[0], what="index")
        return unless_stopped(state, refit(key, meta, taken_back(state, index), problem))

    def step(
        key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem
    ) -> tuple[ActiveState, Info]:
        meta, policy_params, state, problem = on_device((meta, policy_params, state, problem))
        ask_key, tell_key, answer_key = jax.random.split(key, 3)
        decision, state, signals = look(ask_key, meta, policy_params, state, problem)
        answer, memory = who.answer(answer_key, state.annotator, problem, decision)
        said = completed(answer, problem, decision)
        told = take_in(state._replace(annotator=memory), problem, decision, said, again)
        told = unless_stopped(state, refit(tell_key, meta, told, problem))
        state = told._replace(round=state.round + 1)
        info = Info(
            index=decision.index,
            valid=decision.valid,
            y=said.y,
            weight=said.weight,
            log_prob=decision.log_prob,
            count=state.count,
            spent=state.spent,
            left=left(state, problem),
            test=None if problem.test is None else judge(state, problem.test),
            validation=judge(state, problem.validation),
            signals=signals,
            stopped=jnp.zeros((), bool) if stop is None else state.stopping.stopped,
            record=() if record is None else record(state),
        )
        return state, info

    def judge(state: ActiveState, batch: Batch) -> PyTree:
        return evaluate(learner, state.params, batch, chunk=chunk, score=score)

    def left(state: ActiveState, problem: Problem) -> Array:
        queried = state.queried & ~marked(state.labelled_index, state.queried.shape[0]) if again else state.queried
        possible = (problem.weight > 0) & ~queried & (state.spent + problem.cost <= limit)
        room = again | (state.count < state.labelled_index.shape[0])
        return jnp.where(room, possible.sum(dtype=jnp.int32), 0)

    def run(
        key: Array,
        meta: PyTree,
        policy_params: PyTree,
        problem: Problem,
        *,
        rounds: int,
        state: ActiveState | None = None,
    ) -> tuple[ActiveState, Info]:
        meta, policy_params, problem = on_device((meta, policy_params, problem))
        if state is None:
            # No round has this number.
            state = init(jax.random.fold_in(key, jnp.uint32(2**32 - 1)), meta, policy_params, problem)
        first = on_device(state)

        def body(state: ActiveState, _: None) -> tuple[ActiveState, Info]:
            return step(jax.random.fold_in(key, state.round), meta, policy_params, state, problem)

        return jax.lax.scan(body, first, length=rounds)

    return ActiveLearner(init=init, begin=begin, ask=ask, tell=tell, untell=untell, step=step, run=run)


def evaluate(
    learner: Learner, params: PyTree, batch: Batch, *, chunk: int | None = None, score: RunScore = metrics.score
) -> PyTree:
    """The `score` of adapted parameters on labelled rows, `chunk` rows at a time; zeros without any row of weight."""
    return score(predict_pool(learner, params, batch.x, chunk=chunk).logits, batch.y, batch.weight)
