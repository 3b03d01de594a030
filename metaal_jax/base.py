"""The records that every algorithm of the package is made of. Their contracts are checked by `metaal_jax.checks`.

An algorithm is a factory that takes keyword-only hyperparameters and returns a record of pure functions: `Learner`,
`Policy`, `Annotator`, or `ActiveLearner` (see `metaal_jax.active`). The other records are data that travel between
those functions. All of them are pytrees, so whole problems, states and traces can be vmapped, scanned, sharded and
saved.

Letters in shapes: `n` pool rows, `c` classes, `d` features, `m` committee members, `k` rows asked for in one round.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any
Metrics = dict[str, Array]


class Batch(NamedTuple):
    """Labelled examples.

    Attributes:
      x: leaves `[n, ...]`; images may stay uint8 until the model reads them.
      y: int32 `[n]` classes; float32 targets `[n]` or `[n, t]`; or float32 `[n, c]` class probabilities. The dtype
        tells which: integers are classes, everything else is not.
      weight: float32 `[n]`, 0 marks padding, which changes no result.
    """

    x: PyTree
    y: Array
    weight: Array


class Task(NamedTuple):
    """One few-shot task (episode): adapt on `support`, judge on `query`."""

    support: Batch
    query: Batch


class Problem(NamedTuple):
    """One pool-based active-learning problem; `metaal_jax.tasks.problem` makes one and checks what it is given.

    Attributes:
      x: the pool, leaves `[n, ...]`.
      y: the hidden labels, int32 `[n]` classes or float32 targets `[n]` or `[n, t]`. Only simulated annotators read
        them; where a person answers, `None`.
      weight: float32 `[n]`, 0 marks padding rows, which are never asked for.
      cost: float32 `[n]`, the price of each row's label.
      test: the rows on which a run is reported; `None` for a run that nobody judges.
      validation: rows for choices made during a run, disjoint from `test`; may be all padding. Its `y` is the example
        that label buffers are shaped by.
      initial: int32 `[i]`, pool rows labelled before the first round, -1 for none. Shape `[0]` is a cold start.
      initial_y: `[i, ...]`, the labels of the initial rows where they are known otherwise than from `y`, else `None`.
    """

    x: PyTree
    y: Array | None
    weight: Array
    cost: Array
    test: Batch | None
    validation: Batch
    initial: Array
    initial_y: Array | None = None


class Prediction(NamedTuple):
    """What a learner says of `n` rows.

    Attributes:
      logits: float32 `[m, n, c]`, the outputs where the loss is no classification; one slice a committee member,
        `m = 1` for a single model.
      embedding: float32 `[m, n, d]` or `[1, n, d]`, the input of the last layer.
    """

    logits: Array
    embedding: Array


class LossFn(Protocol):
    """`(outputs, y, weight) -> []`: a weighted loss, or a score of the same form.

    `outputs` are float32 `[n, c]`, `y` what a `Batch` holds, `weight` float32 `[n]`. Rows of weight 0 count for nothing
    whatever they hold, and without any row of weight the value and its gradient are 0.
    """

    def __call__(self, outputs: Array, y: Array, weight: Array, /) -> Array: ...  # noqa: D102


class InitFn(Protocol):
    """`(key, x) -> meta`: fresh meta-parameters for inputs like `x` (leaves `[n, ...]`, only shapes matter)."""

    def __call__(self, key: Array, x: PyTree, /) -> PyTree: ...  # noqa: D102


class AdaptFn(Protocol):
    """`(key, meta, batch) -> params`: the inner loop.

    A batch whose weights are all 0 (no label yet) gives the meta-parameters' own predictor. `unlabelled` (rows like
    `batch.x`) and `start` (earlier params to go on from) are offers that a learner may ignore.
    """

    def __call__(  # noqa: D102
        self, key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None
    ) -> PyTree: ...


class PredictFn(Protocol):
    """`(params, x) -> Prediction` for rows `x`, leaves `[n, ...]`."""

    def __call__(self, params: PyTree, x: PyTree, /) -> Prediction: ...  # noqa: D102


class MetaGradFn(Protocol):
    """`(key, meta, task, *, step) -> (grads, metrics)`: the outer loop's descent direction for one task.

    `grads` has the structure of `meta`; `step` is the outer step's number (int32 `[]`), for annealed losses;
    `metrics` maps names to float32 `[]` and holds at least `loss` and `score` on the query rows.
    """

    def __call__(self, key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]: ...  # noqa: D102


class Learner(NamedTuple):
    """A base learner, possibly meta-trained. See the protocols for the four functions."""

    init: InitFn
    adapt: AdaptFn
    predict: PredictFn
    meta_grad: MetaGradFn


class PoolView(NamedTuple):
    """All that a query rule may look at. A field that a rule does not read costs nothing once compiled.

    Attributes:
      x: the pool, leaves `[n, ...]`.
      row: int32 `[n]`, global row numbers. Random numbers belong to rows: see `metaal_jax.acquisition.row_noise`.
      weight: float32 `[n]`, 0 for padding.
      queried: bool `[n]`, rows that have been asked for, answered or not.
      cost: float32 `[n]`.
      prediction: the current model's prediction for the pool.
      labelled: `[capacity]` rows in the order of labelling, weight 0 beyond the count.
      labelled_index: int32 `[capacity]`, their pool rows, -1 beyond the count.
      meta, params: meta-parameters and adapted parameters, for rules that refit or need gradients.
      budget, spent: float32 `[]`, in units of `cost`.
    """

    x: PyTree
    row: Array
    weight: Array
    queried: Array
    cost: Array
    prediction: Prediction
    labelled: Batch
    labelled_index: Array
    meta: PyTree
    params: PyTree
    budget: Array
    spent: Array

    @property
    def available(self) -> Array:
        """Bool `[n]`: rows that may still be asked for: real, never asked before, and within what is left to spend."""
        return (self.weight > 0) & ~self.queried & (self.spent + self.cost <= self.budget)


class Decision(NamedTuple):
    """The rows to ask for.

    Attributes:
      index: int32 `[k]`, distinct positions in the pool.
      valid: bool `[k]`, False where nothing was left to ask; such an entry of `index` means nothing.
      log_prob: float32 `[]`, 0 for deterministic rules.
      scores: float32 `[n]`, what the rule thought of each row, higher = sooner.
      annotator: int32 `[k]`, who is asked, where a rule chooses among several annotators; else `None`.
    """

    index: Array  # type: ignore[assignment]
    valid: Array
    log_prob: Array
    scores: Array
    annotator: Array | None = None


class PolicyInitFn(Protocol):
    """`(key) -> policy_params`, `()` for fixed rules."""

    def __call__(self, key: Array, /) -> PyTree: ...  # noqa: D102


class BeginFn(Protocol):
    """`(key, policy_params, view) -> policy_state`, once a run: neighbour graphs, densities, memory."""

    def __call__(self, key: Array, policy_params: PyTree, view: PoolView, /) -> PyTree: ...  # noqa: D102


class ActFn(Protocol):
    """`(key, policy_params, policy_state, view) -> (Decision, policy_state)`, once a round."""

    def __call__(  # noqa: D102
        self, key: Array, policy_params: PyTree, policy_state: PyTree, view: PoolView, /
    ) -> tuple[Decision, PyTree]: ...


class ObserveFn(Protocol):
    """`(key, policy_state, view) -> observation`: what `act` looks at when it is given the same key.

    It is small, so that the observations of whole runs can be kept.
    """

    def __call__(self, key: Array, policy_state: PyTree, view: PoolView, /) -> PyTree: ...  # noqa: D102


class EvaluateFn(Protocol):
    """`(policy_params, observation, index) -> (log_prob [], entropy [], value [])` of the batch `index` `[k]`.

    The log-probability of drawing the batch, the entropy of the policy's draws and the expected return.
    """

    def __call__(  # noqa: D102
        self, policy_params: PyTree, observation: PyTree, index: Array, /
    ) -> tuple[Array, Array, Array]: ...


class ScoreFn(Protocol):
    """`(policy_params, observation) -> (scores [m], value [])` of the observation's `m` candidates."""

    def __call__(self, policy_params: PyTree, observation: PyTree, /) -> tuple[Array, Array]: ...  # noqa: D102


class Trainable(NamedTuple):
    """What a trainer needs of a policy.

    Attributes:
      observe: see `ObserveFn`.
      evaluate: see `EvaluateFn`; None for a policy that does not draw its batches.
      score: see `ScoreFn`; None for a policy that does not choose by scores.
    """

    observe: ObserveFn
    evaluate: EvaluateFn | None = None
    score: ScoreFn | None = None


class Policy(NamedTuple):
    """Decides which rows to query.

    Attributes:
      init: see `PolicyInitFn`.
      begin: see `BeginFn`.
      act: see `ActFn`.
      train: what a trainer needs; None for a policy that cannot be trained.
    """

    init: PolicyInitFn
    begin: BeginFn
    act: ActFn
    train: Trainable | None = None


class Answer(NamedTuple):
    """What came back for the rows of a decision.

    Attributes:
      y: `[k, ...]`, the labels, shaped and typed like those of the problem.
      weight: `[k]`, 0 where nobody can tell: the row is not asked for again. `None` for an answer to every row.
      later: bool `[k]`, True for rows to ask for again another time; what `y` and `weight` say of them is ignored.
        `None` for none.
      cost: float32 `[k]`, what asking for each row cost. `None` for `Problem.cost` where there is an answer, else 0.
      annotator: int32 `[k]`, who answered. `None` for the one whom the decision asked, or annotator 0.
    """

    y: Array
    weight: Array | None = None
    later: Array | None = None
    cost: Array | None = None
    annotator: Array | None = None


class AnnotatorInitFn(Protocol):
    """`(key, problem) -> state`, once a run."""

    def __call__(self, key: Array, problem: Problem, /) -> PyTree: ...  # noqa: D102


class AnswerFn(Protocol):
    """`(key, state, problem, decision) -> (Answer, state)`."""

    def __call__(  # noqa: D102
        self, key: Array, state: PyTree, problem: Problem, decision: Decision, /
    ) -> tuple[Answer, PyTree]: ...


class Annotator(NamedTuple):
    """Who answers in a simulated run; see `metaal_jax.annotators`."""

    init: AnnotatorInitFn
    answer: AnswerFn


def require(condition: object, message: str) -> None:
    """Raises `ValueError(message)` if a concrete condition is false; lets traced values pass.

    Factories check their arguments with it, so that hyperparameters can be vmapped.
    """
    if not isinstance(condition, jax.core.Tracer) and not condition:
        raise ValueError(message)


def is_classes(y: Array) -> bool:
    """Whether labels are classes: integers, one a row. Everything else is a target or a probability."""
    return bool(jnp.issubdtype(y.dtype, jnp.integer)) and y.ndim == 1


def require_classes(name: str, view: PoolView) -> None:
    """Raises `ValueError` where a rule that needs class probabilities meets targets that are no classes."""
    y = view.labelled.y
    if not is_classes(y):
        raise ValueError(
            f"{name}: needs class probabilities, and labels of {y.dtype} {list(y.shape)} are no classes; for targets "
            "use a rule for regression, such as acquisition.igs"
        )


def rows_of(x: PyTree) -> int:
    """The number of rows shared by the leaves of `x`; raises `ValueError` where they differ."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1:
        raise ValueError(f"all leaves need the same number of rows, got {sorted(sizes)}")
    return int(sizes.pop())


def judging_rows(name: str, problem: Problem) -> Batch:
    """The rows that a run is reported on; raises `ValueError` for a problem without."""
    if problem.test is None:
        raise ValueError(f"{name}: judges runs on the problem's test rows, and there are none; give test_x and test_y")
    return problem.test


def take(x: PyTree, index: Array) -> PyTree:
    """Rows `index` of every leaf; NumPy leaves become JAX arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], x)


def on_device(tree: PyTree) -> PyTree:
    """NumPy leaves, such as those of a file, as JAX arrays: a tracer can index the one and not the other."""
    return jax.tree.map(jnp.asarray, tree)


def empty_batch(x: PyTree, rows: int, y: Array | None = None) -> Batch:
    """An all-padding batch of `rows` rows shaped like those of `x` and labels like those of `y`, classes by default."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), x)
    labels = jnp.zeros(rows, jnp.int32) if y is None else jnp.zeros((rows, *y.shape[1:]), y.dtype)
    return Batch(x=zeros, y=labels, weight=jnp.zeros(rows, jnp.float32))


def pad_batch(batch: Batch, rows: int) -> Batch:
    """`batch` followed by padding up to `rows` rows; raises `ValueError` if it is already longer."""
    extra = rows - rows_of(batch)
    if extra < 0:
        raise ValueError(f"cannot pad {rows - extra} rows down to {rows}; ask for at least {rows - extra}")
    padded: Batch = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1)), batch)
    return padded
