"""For somebody with rows and no labels: which rows to label next, without a key, a test set or Flax."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from metaal_jax import inputs, learners, losses, names, tasks
from metaal_jax.base import Batch, Decision, PoolView, Prediction, Problem, PyTree
from metaal_jax.door_inputs import (
    SUGGESTS,
    Labels,
    LearnerLike,
    Memory,
    array_of,
    check_count,
    classes_of,
    known_labels,
    learner_of,
    on_host,
    parts_of,
    scaled,
    strategy_of,
)
from metaal_jax.loop import active_learner
from metaal_jax.rows import predict_pool
from metaal_jax.studies.comparison import compare

__all__ = ["Pick", "Suggestion", "compare", "pick", "suggest"]

CHUNK = 5000  # rows predicted at a time


class Suggestion(NamedTuple):
    """Which rows to label next, and what is thought of all rows.

    Attributes:
      rows: int `[j]`, row numbers, best first; fewer than `k` where no more are left.
      classes: the labels that have been seen, `c` of them; sorted, where they can be, in the first call.
      probabilities: float32 `[n, c]`, of every row for each of them; uniform while one label or none is known.
      scores: float32 `[n]`, what the strategy thinks of each row, higher is sooner.
      state: for the next call, `suggest(..., state=...)`.
    """

    rows: np.ndarray
    classes: tuple[Hashable, ...]
    probabilities: np.ndarray
    scores: np.ndarray
    state: Memory


class Pick(NamedTuple):
    """Which rows to label next: `rows` int `[j]`, `scores` float32 `[n]` and `state`, as in `Suggestion`."""

    rows: np.ndarray
    scores: np.ndarray
    state: Memory


@overload
def suggest(
    x: ArrayLike, labels: Labels | None = ..., *, k: int, strategy: str = ..., learner: LearnerLike = ...,
    scale: Literal["columns", "common", "none"] = ..., members: int = ..., rounds: int | None = ..., seed: int = ...,
    state: Memory | None = ..., details: Literal[False] = ...,
) -> np.ndarray: ...  # fmt: skip
@overload
def suggest(
    x: ArrayLike, labels: Labels | None = ..., *, k: int, strategy: str = ..., learner: LearnerLike = ...,
    scale: Literal["columns", "common", "none"] = ..., members: int = ..., rounds: int | None = ..., seed: int = ...,
    state: Memory | None = ..., details: Literal[True],
) -> Suggestion: ...  # fmt: skip
def suggest(
    x: ArrayLike,
    labels: Labels | None = None,
    *,
    k: int,
    strategy: str = names.DEFAULT,
    learner: LearnerLike = "linear",
    scale: Literal["columns", "common", "none"] = "columns",
    members: int = 20,
    rounds: int | None = None,
    seed: int = 0,
    state: Memory | None = None,
    details: bool = False,
) -> np.ndarray | Suggestion:
    """The rows of a pool to label next.

    >>> import metaal_jax as ml
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> first = ml.suggest(x, k=5)  # nothing is labelled yet
    >>> labels = {int(row): "cat" if x[row, 0] > 0 else "dog" for row in first}
    >>> more = ml.suggest(x, labels, k=5, details=True)
    >>> more.rows.shape, more.classes, more.probabilities.shape
    ((5,), ('cat', 'dog'), (100, 2))

    It is what `active_learner` asks for that has these labels. The default strategy, `uncertain_herding`, covers what
    the model is unsure of: of the rules and trained policies that were run beside it on MNIST and on ten other targets
    it has the largest area under the learning curve (`experiments/results/policies/starts-*.json`, and the README).

    Args:
      x: rows of numbers `[n, d]`, or images `[n, h, w(, c)]`, finite.
      labels: what is labelled already: `{row: label}`, or one entry a row with None for no label. Labels are anything
        hashable; a row's newer label simply takes the place of the older.
      k: how many rows are wanted.
      strategy: a name of `names.STRATEGIES`, a trained policy's name or its file.
      learner: what predicts: a name of `names.LEARNERS`; a learner that `meta_train` gave, or its file; or a function
        `(classes) -> Learner`.
      scale: `"columns"` brings each column to mean 0 and variance 1, for tables; `"common"` subtracts the means and
        divides by one number, for embeddings and text, whose columns are of one kind; `"none"` leaves rows as they
        are. A meta-trained learner scales by its own rows.
      members: draws from the posterior that committee strategies see.
      rounds: how many such calls there will be, for strategies that need it.
      seed: decides ties and whatever is random.
      state: the state of the call before, for strategies that remember (`names.find(strategy).memory`); others give
        the same rows without.
      details: also give probabilities, scores and a state.

    Returns:
      Row numbers, int `[j]`, best first; or a `Suggestion`.

    Raises:
      ValueError: for rows that hold no finite numbers, labels of rows that there are not, labels that cannot be hashed,
        an unknown name, a strategy that needs what is not given, or a state of another run. It names the first of them.
    """
    found = strategy_of("suggest", strategy, SUGGESTS - ({"rounds"} if rounds is None else set()))
    learner = learner_of("suggest", learner)
    rows = learner.prepare(on_host(x)) if isinstance(learner, learners.Trained) else scaled("suggest", x, scale)
    n = rows.shape[0]
    check_count("suggest", k)
    known = known_labels("suggest", labels, n, state)
    seen = classes_of("suggest", known, state)
    outputs, left = max(len(seen), 2), n - len(known)
    asked = min(k, max(left, 1))
    numbers = {row: seen.index(label) for row, label in known.items()}
    problem = tasks.problem(rows, known=numbers or None, classes=outputs)
    capacity = min(n, _room(len(known) + asked))
    program, meta = _program(_Same(learner), strategy, asked, capacity, outputs, members, rounds)
    told = program(jax.random.key(seed), meta, () if state is None else state.policy, problem)
    picked = _rows(told.decision)[:left]
    if not details:
        return picked
    probabilities = np.asarray(told.probabilities)[:, : len(seen)]
    return Suggestion(
        rows=picked,
        classes=seen,
        probabilities=probabilities / np.maximum(probabilities.sum(1, keepdims=True), np.finfo(np.float32).tiny),
        scores=np.asarray(told.decision.scores),
        state=Memory(seen, tuple(known), told.policy if found.memory else ()),
    )


def pick(
    strategy: str = names.DEFAULT,
    *,
    logits: ArrayLike | None = None,
    embedding: ArrayLike | None = None,
    labelled: Mapping[int, Any] | Sequence[int] = (),
    k: int,
    classes: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    state: Memory | None = None,
    details: bool = False,
) -> np.ndarray | Pick:
    """The rows of a pool to label next, for people whose model is elsewhere.

    >>> import metaal_jax as ml
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> logits, embedding = rng.normal(size=(100, 3)), rng.normal(size=(100, 16))
    >>> ml.pick("badge", logits=logits, embedding=embedding, labelled=[4, 17], k=10).shape
    (10,)

    Args:
      strategy: a name of `names.STRATEGIES`, a trained policy's name or its file.
      logits: the model's logits of all rows `[n, c]`, or those of several models `[m, n, c]` for strategies that ask a
        committee; of probabilities give the logarithm. NumPy, JAX or PyTorch.
      embedding: `[n, d]`, usually the input of the last layer.
      labelled: rows that are labelled already, which are not asked for again; as `{row: class number}` for strategies
        that read the labels.
      k: how many rows are wanted.
      classes: their number, where there are no logits to tell and the strategy needs it.
      rounds: how many such calls there will be, for strategies that need it.
      seed: decides ties and whatever is random.
      state: the state of the call before, for strategies that remember (`names.find(strategy).memory`).
      details: also give scores and a state.

    Returns:
      Row numbers, int `[j]`, best first, fewer than `k` where no more are left; or a `Pick`.

    Raises:
      ValueError: for arrays that are not finite numbers of one shape, an unknown name, a strategy that needs what is
        not given or what only `suggest` or the loop has, and rows that there are not.
    """
    arrays = {"logits": array_of("logits", logits, (2, 3)), "embedding": array_of("embedding", embedding, (2,))}
    given = {name for name, array in arrays.items() if array is not None}
    outputs, vectors = arrays["logits"], arrays["embedding"]
    if outputs is not None:
        outputs = outputs[None] if outputs.ndim == 2 else outputs
        given |= {"committee"} if outputs.shape[0] > 1 else set()
        classes = outputs.shape[-1] if classes is None else classes
    given |= {name for name, value in (("classes", classes), ("rounds", rounds)) if value is not None}
    if isinstance(labelled, Mapping) or not len(labelled):
        given |= {"labels"}
    found = strategy_of("pick", strategy, given)
    if outputs is not None and vectors is not None and outputs.shape[1] != vectors.shape[0]:
        raise ValueError(f"pick: logits have {outputs.shape[1]} rows and the embedding {vectors.shape[0]}; give one "
                         "row of each for every row of the pool")  # fmt: skip
    if outputs is None and vectors is None:
        raise ValueError("pick: give logits, embedding or both, one row for each row of the pool")
    check_count("pick", k)
    n = outputs.shape[1] if outputs is not None else vectors.shape[0]  # type: ignore[union-attr]
    outputs = np.zeros((1, n, 1), np.float32) if outputs is None else outputs
    vectors = np.zeros((n, 1), np.float32) if vectors is None else vectors
    before = () if state is None else state.rows
    index = inputs.row_numbers("pick", list(labelled), count=n, what="labelled")
    order = [row for row in before if row in set(index.tolist())]
    order += [row for row in index.tolist() if row not in set(order)]
    targets = found.labels == "targets"
    y = np.zeros((len(order), outputs.shape[-1]), np.float32) if targets else np.zeros(len(order), np.int32)
    if isinstance(labelled, Mapping) and order:
        limit = outputs.shape[-1] if not targets and "logits" in given else None
        y = np.asarray(inputs.labels("pick", [labelled[row] for row in order], count=len(order), what="labelled",
                                     classes=limit))  # fmt: skip
    left = n - len(order)
    asked = min(k, max(left, 1))
    capacity = _room(len(order) + asked)
    spare = capacity - len(order)
    queried = np.zeros(n, bool)
    queried[order] = True
    view = PoolView(
        x=jnp.zeros((n, 1)),
        row=jnp.arange(n, dtype=jnp.int32),
        weight=jnp.ones(n),
        queried=jnp.zeros(n, bool).at[np.asarray(order, np.int32)].set(True),
        cost=jnp.ones(n),
        prediction=Prediction(jnp.asarray(outputs), jnp.asarray(vectors)[None]),
        labelled=Batch(
            x=jnp.zeros((capacity, 1)),
            y=jnp.concatenate([jnp.asarray(y), jnp.zeros((spare, *y.shape[1:]), y.dtype)]),
            weight=(jnp.arange(capacity) < len(order)).astype(jnp.float32),
        ),
        labelled_index=jnp.asarray([*order, *[-1] * spare], jnp.int32),
        meta=(),
        params=(),
        budget=jnp.float32(capacity),
        spent=jnp.float32(len(order)),
    )
    decision, policy = _chooser(strategy, asked, classes, rounds)(
        jax.random.key(seed), () if state is None else state.policy, view
    )
    picked = _rows(decision)[:left]
    if not details:
        return picked
    remembered = Memory((), tuple(order), policy if found.memory else ())
    return Pick(picked, np.asarray(decision.scores), remembered)


class _Told(NamedTuple):
    """What a program of `suggest` gives."""

    decision: Decision
    policy: PyTree
    probabilities: Array


class _Same:
    """A learner as the key of a cache: a name by its value, anything else by what it is."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value) if isinstance(self.value, str) else id(self.value)

    def __eq__(self, other: object) -> bool:
        mine, its = self.value, getattr(other, "value", None)
        return mine == its if isinstance(mine, str) and isinstance(its, str) else mine is its


@functools.lru_cache(maxsize=32)
def _program(
    learner: _Same, strategy: str, k: int, capacity: int, classes: int, members: int, rounds: int | None
) -> tuple[Callable[[Array, PyTree, PyTree, Problem], _Told], PyTree]:
    """A compiled call of `suggest`, and the meta-parameters to give it, None for a learner that was not trained."""
    parts = parts_of(learner.value, strategy, k=k, classes=classes, members=members, rounds=rounds)
    active = active_learner(parts.learner, parts.policy, capacity=capacity, chunk=CHUNK)

    @jax.jit
    def run(key: Array, meta: PyTree, memory: PyTree, problem: Problem) -> _Told:
        meta_key, init_key, ask_key = jax.random.split(key, 3)
        meta = parts.learner.init(meta_key, problem.x) if meta is None else meta
        params = parts.policy.init(meta_key)
        state = active.init(init_key, meta, params, problem)
        state = state._replace(policy_state=_remembered("suggest", state.policy_state, memory))
        decision, after = active.ask(jax.random.fold_in(ask_key, state.count), meta, params, state, problem)
        logits = predict_pool(parts.learner, state.params, problem.x, chunk=CHUNK).logits
        return _Told(decision, after.policy_state, jnp.exp(losses.consensus(logits)))

    return run, parts.meta


@functools.lru_cache(maxsize=32)
def _chooser(
    strategy: str, k: int, classes: int | None, rounds: int | None
) -> Callable[[Array, PyTree, PoolView], tuple[Decision, PyTree]]:
    """A compiled call of `pick`."""
    policy = names.strategy(strategy, k=k, classes=classes, rounds=rounds)

    @jax.jit
    def run(key: Array, memory: PyTree, view: PoolView) -> tuple[Decision, PyTree]:
        begin_key, act_key = jax.random.split(key)
        params = policy.init(begin_key)
        first = _remembered("pick", policy.begin(begin_key, params, view), memory)
        return policy.act(jax.random.fold_in(act_key, view.spent.astype(jnp.int32)), params, first, view)

    return run


def _remembered(name: str, fresh: PyTree, memory: PyTree) -> PyTree:
    """What a strategy remembers: `memory`, or `fresh` where there is none."""
    if not jax.tree.leaves(memory):
        return fresh
    leaves, structure = jax.tree.flatten(fresh)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in tree] for tree in (leaves, jax.tree.leaves(memory))]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: the state is that of another strategy, pool or k; leave it out to start anew")
    return jax.tree.unflatten(structure, jax.tree.leaves(memory))


def _room(count: int) -> int:
    """The least power of two that holds so many, so that few programs are compiled."""
    return max(16, 1 << (count - 1).bit_length())


def _rows(decision: Decision) -> np.ndarray:
    return np.asarray(decision.index)[np.asarray(decision.valid)].astype(np.int64)
