"""The records of the active-learning loop: what it carries, what it records, and its functions.

`metaal_jax.loop.active_learner` makes an `ActiveLearner`.
"""

from typing import NamedTuple, Protocol

from jax import Array

from metaal_jax.base import Answer, Batch, Decision, Problem, PyTree


class ActiveState(NamedTuple):
    """What a run carries from round to round.

    The labelled buffer holds answers in the order in which they came. Several annotators' answers to one row stand
    beside each other; a newer answer of the same annotator takes the place of the older.

    Attributes:
      labelled: `[capacity]` labelled rows, weight 0 beyond `count`.
      labelled_index: int32 `[capacity]`, their pool rows, -1 beyond `count`.
      labelled_annotator: int32 `[capacity]`, who answered, 0 beyond `count`.
      labelled_cost: float32 `[capacity]`, what each answer cost, 0 beyond `count`.
      count: int32 `[]`, answers in the buffer.
      queried: bool `[n]`, rows that were asked for and are not to be asked for later, answered or not.
      spent: float32 `[]`, what all questions cost.
      round: int32 `[]`, rounds told so far.
      params: the adapted parameters.
      policy_state: the policy's memory.
      annotator: the simulated annotator's memory.
      stopping: the stopping rule's memory; `()` without a rule.
    """

    labelled: Batch
    labelled_index: Array
    labelled_annotator: Array
    labelled_cost: Array
    count: Array  # type: ignore[assignment]
    queried: Array
    spent: Array
    round: Array
    params: PyTree
    policy_state: PyTree
    annotator: PyTree
    stopping: PyTree


class Info(NamedTuple):
    """What a round records; `run` stacks it into the trace, leaves `[rounds, ...]`.

    Attributes:
      index: int32 `[k]`, rows asked for.
      valid: bool `[k]`, False where nothing was asked: the pool or the budget was used up.
      y: `[k, ...]`, the answers; weight: float32 `[k]`, 0 where there was none.
      log_prob: float32 `[]`, of the decision.
      count: int32 `[]`, labels after the round; spent: float32 `[]`, what all questions cost.
      left: int32 `[]`, rows that may still be asked for after the round; 0 once the pool or the budget is used up.
      test, validation: the adapted model's scores on the problem's rows; `test` is None where there are no test rows.
      signals: what stopping rules look at, see `metaal_jax.stopping`; `()` without a rule.
      stopped: bool `[]`, whether the rule has stopped the run.
      record: what `active_learner(..., record=...)` asks for, `()` without.
    """

    index: Array  # type: ignore[assignment]
    valid: Array
    y: Array
    weight: Array
    log_prob: Array
    count: Array  # type: ignore[assignment]
    spent: Array
    left: Array
    test: PyTree
    validation: PyTree
    signals: PyTree
    stopped: Array
    record: PyTree


class ActiveInitFn(Protocol):
    """`(key, meta, policy_params, problem) -> state`: adapts to the initial labels and begins the policy."""

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, policy_params: PyTree, problem: Problem, /
    ) -> ActiveState: ...


class ActiveBeginFn(Protocol):
    """`(key, meta, policy_params, state, problem) -> state`: adapts and begins the policy again on today's pool.

    For a pool that was filled up by `tasks.extend`: neighbour graphs, densities and plans are made anew.
    """

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem, /
    ) -> ActiveState: ...


class AskFn(Protocol):
    """`(key, meta, policy_params, state, problem) -> (Decision, state)`: which rows to label next."""

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem, /
    ) -> tuple[Decision, ActiveState]: ...


class TellFn(Protocol):
    """`(key, meta, state, problem, decision, answer) -> state`: takes the answers in and adapts.

    It never reads `problem.y`. An answer to a row that has one from the same annotator corrects it. The decision need
    not be one that was asked: labels that come from elsewhere go in the same way.
    """

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, state: ActiveState, problem: Problem, decision: Decision, answer: Answer, /
    ) -> ActiveState: ...


class UntellFn(Protocol):
    """`(key, meta, state, problem, index) -> state`: takes back all answers to rows `index`, int32 `[j]`, and adapts.

    The state is as if the rows had never been asked for: their cost is given back. Entries of -1 are none.
    """

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, state: ActiveState, problem: Problem, index: Array, /
    ) -> ActiveState: ...


class StepFn(Protocol):
    """`(key, meta, policy_params, state, problem) -> (state, info)`: ask, simulated answers, tell, evaluate."""

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, policy_params: PyTree, state: ActiveState, problem: Problem, /
    ) -> tuple[ActiveState, Info]: ...


class RunFn(Protocol):
    """`(key, meta, policy_params, problem, *, rounds, state=None) -> (state, trace)`: a whole run in one scan.

    `rounds` is static. With `state` the run goes on from there. The key of a round is `fold_in(key, state.round)`: a
    run in pieces, with the same key, gives the same bits.
    """

    def __call__(  # noqa: D102
        self,
        key: Array,
        meta: PyTree,
        policy_params: PyTree,
        problem: Problem,
        /,
        *,
        rounds: int,
        state: ActiveState | None = None,
    ) -> tuple[ActiveState, Info]: ...


class ActiveLearner(NamedTuple):
    """The active-learning loop around a learner and a policy. See the protocols for the functions."""

    init: ActiveInitFn
    begin: ActiveBeginFn
    ask: AskFn
    tell: TellFn
    untell: UntellFn
    step: StepFn
    run: RunFn
