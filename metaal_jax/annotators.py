"""Who answers in a simulated run: the truth, and wrappers that make it err, keep silent or cost.

An annotator answers for rows. What it draws belongs to a run and a row and not to the round or the strategy that asks:
asked again it says the same, and all strategies that start from one key meet the same errors.

>>> from metaal_jax import annotators
>>> annotator = annotators.silent(annotators.noisy(annotators.truth(), rate=0.1, classes=10), rate=0.05)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax import inputs
from metaal_jax.base import Annotator, Answer, Decision, Problem, PyTree, is_classes, require


def truth() -> Annotator:
    """Gives every row its label in `Problem.y`.

    Raises:
      ValueError: from `answer`, for a problem without labels.
    """

    def init(key: Array, problem: Problem) -> PyTree:
        del key, problem
        return ()

    def answer(key: Array, state: PyTree, problem: Problem, decision: Decision) -> tuple[Answer, PyTree]:
        del key
        if problem.y is None:
            raise ValueError("a simulated annotator needs problem.y; where a person answers, drive ask and tell")
        return Answer(y=problem.y[decision.index]), state

    return Annotator(init=init, answer=answer)


def noisy(annotator: Annotator, *, rate: float | Array, classes: int) -> Annotator:
    """Answers with another class, all others alike, with probability `rate`.

    Args:
      annotator: whose answers are changed.
      rate: from 0 to 1; one number, or one a pool row, `[n]`, where rows differ in difficulty. May be traced.
      classes: how many there are.

    Raises:
      ValueError: for a rate outside [0, 1] or fewer than two classes; from `answer`, for targets that are no classes,
        or another number of rates than rows.
    """
    _check_rate("noisy", rate)
    require(classes >= 2, f"noisy: classes must be at least 2, got {classes}")

    def mistake(key: Array, y: Array, rate: Array) -> Array:
        wrong_key, class_key = jax.random.split(key)
        other = jax.random.randint(class_key, (), 1, classes)
        return jnp.where(jax.random.uniform(wrong_key) < rate, (y + other) % classes, y)

    return _by_row("noisy", annotator, mistake, rate, classes=classes)


def confused(annotator: Annotator, *, matrix: np.ndarray | Array) -> Annotator:
    """Answers by a confusion matrix: class `i` is called `j` with probability `matrix[i, j]`.

    Args:
      annotator: whose answers are changed.
      matrix: float `[c, c]`, rows that add up to 1. May be traced.

    Raises:
      ValueError: for a matrix that is not square, or with rows that are no distributions; from `answer`, for targets
        that are no classes.

    Reference: Dawid, Skene: Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm, 1979.
    """
    chance = jnp.asarray(matrix, jnp.float32)
    require(chance.ndim == 2 and chance.shape[0] == chance.shape[1],
            f"confused: the matrix must be square, got shape {chance.shape}")  # fmt: skip
    require((chance >= 0).all() & (jnp.abs(chance.sum(1) - 1) < 1e-4).all(),
            "confused: every row of the matrix must hold probabilities that add up to 1")  # fmt: skip

    def mistake(key: Array, y: Array, _: Array) -> Array:
        return jax.random.categorical(key, jnp.log(chance[y])).astype(y.dtype)

    return _by_row("confused", annotator, mistake, 0.0, classes=chance.shape[0])


def jittered(annotator: Annotator, *, deviation: float | Array) -> Annotator:
    """Adds normal noise to the targets of a regression.

    Args:
      annotator: whose answers are changed.
      deviation: standard deviation of the noise, in units of the targets, at least 0; one number or one a pool row.

    Raises:
      ValueError: for a negative deviation; from `answer`, for classes.
    """
    require((jnp.asarray(deviation) >= 0).all(), f"jittered: deviation must not be negative, got {deviation}")

    def mistake(key: Array, y: Array, deviation: Array) -> Array:
        return y + deviation * jax.random.normal(key, y.shape, y.dtype)

    return _by_row("jittered", annotator, mistake, deviation, classes=None)


def silent(annotator: Annotator, *, rate: float | Array) -> Annotator:
    """Cannot tell, with probability `rate`: such a row costs nothing and is not asked for again.

    Args:
      annotator: who otherwise answers.
      rate: from 0 to 1; one number, or one a pool row, `[n]`. May be traced.

    Raises:
      ValueError: for a rate outside [0, 1].
    """
    _check_rate("silent", rate)

    def answer(key: Array, state: PyTree, problem: Problem, decision: Decision) -> tuple[Answer, PyTree]:
        run_key, inner = state
        given, inner = annotator.answer(key, inner, problem, decision)

        def draw(row: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(run_key, row))

        hit = jax.vmap(draw)(decision.index) < _of_rows("silent", rate, problem, decision)
        return given._replace(weight=_kept(given, ~hit)), (run_key, inner)

    return Annotator(init=_keyed(annotator), answer=answer)


def busy(annotator: Annotator, *, rate: float | Array) -> Annotator:
    """Puts off an answer with probability `rate`: the row costs nothing yet and may be asked for again.

    Whether an answer is put off is drawn anew whenever the row is asked for.

    Args:
      annotator: who otherwise answers.
      rate: from 0 to 1; one number, or one a pool row, `[n]`. May be traced.

    Raises:
      ValueError: for a rate outside [0, 1].
    """
    _check_rate("busy", rate)

    def answer(key: Array, state: PyTree, problem: Problem, decision: Decision) -> tuple[Answer, PyTree]:
        own_key, inner_key = jax.random.split(key)
        given, state = annotator.answer(inner_key, state, problem, decision)
        hit = jax.random.uniform(own_key, decision.index.shape) < _of_rows("busy", rate, problem, decision)
        return given._replace(later=hit if given.later is None else given.later | hit), state

    return Annotator(init=annotator.init, answer=answer)


def priced(annotator: Annotator, *, cost: float | Array) -> Annotator:
    """Asks a price of its own for every answer, instead of `Problem.cost`.

    The loop asks only for rows whose `Problem.cost` the budget covers; the price is charged once the answer is there.

    Args:
      annotator: who answers.
      cost: at least 0, in units of the budget; one number, or one a pool row, `[n]`. May be traced.

    Raises:
      ValueError: for a negative cost.
    """
    require((jnp.asarray(cost) >= 0).all(), f"priced: cost must not be negative, got {cost}")

    def answer(key: Array, state: PyTree, problem: Problem, decision: Decision) -> tuple[Answer, PyTree]:
        given, state = annotator.answer(key, state, problem, decision)
        price = _of_rows("priced", cost, problem, decision)
        return given._replace(cost=jnp.where(_kept(given, jnp.ones(price.shape, bool)) > 0, price, 0.0)), state

    return Annotator(init=annotator.init, answer=answer)


def _check_rate(name: str, rate: float | Array) -> None:
    value = jnp.asarray(rate)
    require(((value >= 0) & (value <= 1)).all(), f"{name}: rate must lie between 0 and 1, got {rate}")


def _of_rows(name: str, value: float | Array, problem: Problem, decision: Decision) -> Array:
    """A number for each row asked for, `[k]`, from one number or one a pool row."""
    value, n = jnp.asarray(value, jnp.float32), problem.weight.shape[0]
    if value.ndim == 0:
        return jnp.broadcast_to(value, decision.index.shape)
    if value.shape != (n,):
        raise ValueError(f"{name}: give one number or one for each of the {n} pool rows, got shape {value.shape}")
    return value[decision.index]


def _kept(answer: Answer, kept: Array) -> Array:
    weight = jnp.ones(kept.shape) if answer.weight is None else jnp.asarray(answer.weight, jnp.float32)
    return jnp.where(kept, weight, 0.0)


def _keyed(annotator: Annotator, name: str = "", classes: int | None = None) -> Callable[[Array, Problem], PyTree]:
    """The memory of a wrapper: the annotator's own, and a key that all its errors belong to."""

    def init(key: Array, problem: Problem) -> PyTree:
        if classes is not None:
            inputs.in_range(name, problem.y, problem.weight, what="problem.y", classes=classes)
        own_key, inner_key = jax.random.split(key)
        return own_key, annotator.init(inner_key, problem)

    return init


def _by_row(
    name: str,
    annotator: Annotator,
    mistake: Callable[[Array, Array, Array], Array],
    level: float | Array,
    *,
    classes: int | None,
) -> Annotator:
    """`annotator` with each answer passed through `mistake(key of the row, y, level of the row)`.

    `classes` is how many classes there are, None for targets.
    """

    def answer(key: Array, state: PyTree, problem: Problem, decision: Decision) -> tuple[Answer, PyTree]:
        run_key, inner = state
        given, inner = annotator.answer(key, inner, problem, decision)
        if is_classes(given.y) != (classes is not None):
            kind = "targets (floats)" if classes is None else "classes (integers)"
            raise ValueError(f"{name}: changes {kind}, the answers are {given.y.dtype} {list(given.y.shape)}")

        def one(row: Array, y: Array, level: Array) -> Array:
            return mistake(jax.random.fold_in(run_key, row), y, level)

        y = jax.vmap(one)(decision.index, given.y, _of_rows(name, level, problem, decision))
        return given._replace(y=y), (run_key, inner)

    return Annotator(init=_keyed(annotator, name, classes), answer=answer)
