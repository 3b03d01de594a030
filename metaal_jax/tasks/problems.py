"""Active-learning problems: from a person's own arrays, or drawn from a labelled set on the device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from metaal_jax import inputs
from metaal_jax.base import Batch, Problem, PyTree, empty_batch, require, rows_of, take
from metaal_jax.tasks.class_data import ClassData, require_one_set


class ProblemData(NamedTuple):
    """What problems are drawn from: pool (and validation) rows from one split, test rows from the other."""

    pool: ClassData
    test: ClassData


def problem(
    x: PyTree,
    y: ArrayLike | None = None,
    test_x: PyTree = None,
    test_y: ArrayLike | None = None,
    *,
    known: Mapping[int, Any] | None = None,
    initial: ArrayLike | None = None,
    validation: Batch | None = None,
    cost: ArrayLike | None = None,
    classes: int | None = None,
    example: ArrayLike | None = None,
    rows: int | None = None,
) -> Problem:
    """A `Problem` from plain arrays, checked: what cannot be right is refused with its first place.

    >>> import numpy as np
    >>> from metaal_jax import tasks
    >>> x = np.random.default_rng(0).normal(size=(6, 2))
    >>> problem = tasks.problem(x, known={4: 1, 0: 2}, classes=3)  # two rows have a label already
    >>> problem.initial, problem.initial_y
    (Array([4, 0], dtype=int32), Array([1, 2], dtype=int32))

    Args:
      x: the pool, leaves `[n, ...]`, finite.
      y: its labels, which simulated annotators give: integers for classes, floats `[n]` or `[n, t]` for targets.
        `None` where people answer.
      test_x, test_y: labelled rows on which a run is reported; none by default.
      known: labels that exist already, by row; the run starts from them.
      initial: rows whose labels in `y` the run starts from, -1 for none; none by default.
      validation: labelled rows for choices during a run; none by default.
      cost: the price of each row's label, `[n]`, finite and at least 0; 1 by default.
      classes: how many classes the model has outputs for. Without it labels are held against the outputs where the run
        begins, outside compiled programs.
      example: a label such as people will give, `np.float32(0)` or `np.zeros(3, np.float32)`, where nothing else tells;
        a class by default.
      rows: room for so many pool rows; those beyond `x` are padding, which `extend` fills.

    Returns:
      A `Problem` of JAX arrays.

    Raises:
      ValueError: for rows that hold NaN or no numbers; labels that are no numbers, of another number than the rows,
        negative, or beyond `classes`; labels of different kinds; rows given twice or outside of the pool; costs that
        are negative or not finite; test rows without labels or labels without rows.
    """
    x = inputs.rows("problem", x)
    n = rows_of(x)
    if rows is not None and rows < n:
        raise ValueError(f"problem: room for {rows} rows does not hold the {n} of x; raise rows")
    if known is not None and initial is not None:
        raise ValueError("problem: give known={row: label} or initial=[row, ...], whose labels stand in y, not both")
    label = functools.partial(inputs.labels, "problem", classes=classes)
    y = None if y is None else label(y, count=n)
    row, initial_y = inputs.row_numbers("problem", [] if initial is None else initial, count=n), None
    if row.size and y is None:
        raise ValueError("problem: the initial rows have no labels; give them as known={row: label}, or give y")
    if known is not None:
        row = inputs.row_numbers("problem", list(known), count=n, what="known")
        if row.size:
            initial_y = label(list(known.values()), count=row.size, what="known")
    if (test_x is None) != (test_y is None):
        raise ValueError("problem: give test_x and test_y, or neither")
    test = None
    if test_x is not None:
        test_x = inputs.rows("problem", test_x, what="test_x")
        test_y = label(test_y, count=rows_of(test_x), what="test_y")
        test = Batch(x=test_x, y=test_y, weight=jnp.ones(rows_of(test_x), jnp.float32))
    if validation is not None:
        held = inputs.rows("problem", validation.x, what="validation.x")
        validation = validation._replace(x=held, y=label(validation.y, count=rows_of(held), what="validation.y"))
    shapes = [(what, labels) for what, labels in (
        ("y", y), ("known", initial_y), ("test_y", None if test is None else test.y),
        ("validation.y", None if validation is None else validation.y),
        ("example", None if example is None else label(np.asarray(example)[None], count=1, what="example")),
    ) if labels is not None]  # fmt: skip
    for what, labels in shapes[1:]:
        if (labels.dtype, labels.shape[1:]) != (shapes[0][1].dtype, shapes[0][1].shape[1:]):
            raise ValueError(
                f"problem: {what} is {labels.dtype} {list(labels.shape)} and {shapes[0][0]} {shapes[0][1].dtype} "
                f"{list(shapes[0][1].shape)}; integers are classes and floats are targets, so give all in one kind"
            )
    made = Problem(
        x=x,
        y=y,
        weight=jnp.ones(n, jnp.float32),
        cost=_costs(cost, n),
        test=test,
        validation=empty_batch(x, 1, shapes[0][1] if shapes else None) if validation is None else validation,
        initial=row,
        initial_y=initial_y,
    )
    return made if rows is None else _padded(made, rows)


def extend(problem: Problem, x: PyTree, y: ArrayLike | None = None, *, cost: ArrayLike | None = None) -> Problem:
    """The problem with new rows in the place of padding, so that no shape changes and nothing compiles anew.

    Rows keep their numbers. Let the policy see the new pool: `state = active.begin(key, meta, policy_params, state,
    problem)`.

    Args:
      problem: made with room, `problem(..., rows=...)`.
      x: new rows, leaves `[j, ...]`, like those of the pool.
      y: their labels, where the problem has labels.
      cost: the price of each row's label, `[j]`; 1 by default.

    Raises:
      ValueError: for more rows than there is room for, rows of another shape, and what `problem` raises; for a problem
        that is traced.
    """
    if inputs.is_traced(problem, x):
        raise ValueError("extend: works on concrete arrays, outside compiled programs")
    x = inputs.rows("extend", x)
    n, free = rows_of(x), np.flatnonzero(np.asarray(problem.weight) == 0)
    if n > free.size:
        raise ValueError(f"extend: {n} new rows, room for {free.size}; make the problem with problem(..., rows=...)")
    if (y is None) != (problem.y is None):
        raise ValueError("extend: the problem has labels, give y too" if y is None else "extend: the problem has no y")
    for new, old in zip(jax.tree.leaves(x), jax.tree.leaves(problem.x), strict=True):
        if new.shape[1:] != old.shape[1:]:
            raise ValueError(f"extend: rows of shape {list(new.shape[1:])}, the pool's have {list(old.shape[1:])}")
    place = free[:n]
    put = lambda old, new: jnp.asarray(old).at[place].set(jnp.asarray(new).astype(old.dtype))  # noqa: E731
    labels = None if y is None else inputs.labels("extend", y, count=n)
    if labels is not None and problem.y is not None and labels.dtype != problem.y.dtype:
        raise ValueError(f"extend: y is {labels.dtype}, the problem's labels are {problem.y.dtype}")
    return problem._replace(
        x=jax.tree.map(put, problem.x, x),
        y=None if labels is None else put(problem.y, labels),
        weight=put(problem.weight, jnp.ones(n, jnp.float32)),
        cost=put(problem.cost, _costs(cost, n, "extend")),
    )


def _costs(cost: ArrayLike | None, n: int, name: str = "problem") -> Array:
    if cost is None:
        return jnp.ones(n, jnp.float32)
    cost = jnp.asarray(cost, jnp.float32)
    require(cost.shape == (n,), f"{name}: {n} rows need as many costs, got shape {cost.shape}")
    require(
        (cost >= 0).all() & jnp.isfinite(cost).all(),
        f"{name}: costs must be finite and not negative, got {cost.min()} to {cost.max()}",
    )
    return cost


def _padded(problem: Problem, rows: int) -> Problem:
    """The problem with padding up to `rows` pool rows."""

    def longer(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, rows - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1))

    x, y, weight, cost = jax.tree.map(longer, problem[:4])
    return problem._replace(x=x, y=y, weight=weight, cost=cost)


def problems(
    *,
    pool: int,
    test: int,
    validation: int = 0,
    ways: int | None = None,
    initial: int = 0,
    balanced_initial: bool = False,
    imbalance: float = 1.0,
    duplicates: int = 1,
    noise: float = 0.0,
) -> Callable[[Array, ProblemData], Problem]:
    """Active-learning problems drawn from a labelled set.

    Args:
      pool: rows of the pool.
      test: test rows, drawn from the test split.
      validation: validation rows, drawn beside the pool and disjoint from it.
      ways: draw that many classes and number them anew at random; None keeps all classes and their numbers.
      initial: labelled rows at the start, drawn at random; 0 for a cold start.
      balanced_initial: spread them evenly over the classes, `initial` must then be a multiple of their number.
      imbalance: how many times rarer the rarest class of the pool is than the most frequent one; frequencies fall
        geometrically over the classes in random order. The test rows keep their own frequencies.
      duplicates: every pool row stands that many times in the pool.
      noise: standard deviation of noise added to each pool row's values, in their own units (0..255 for uint8).

    Returns:
      A sampler `(key, data) -> Problem`. Rows that the set does not have get weight 0, at the end of the pool.

    Raises:
      ValueError: for numbers out of range, in the sampler for more rows or ways than the set has.
    """
    for name, value, least in (
        ("pool", pool, 1), ("test", test, 1), ("validation", validation, 0), ("initial", initial, 0),
        ("duplicates", duplicates, 1), ("imbalance", imbalance, 1.0), ("noise", noise, 0.0),
    ):  # fmt: skip
        require(value >= least, f"problems: {name} must be at least {least}, got {value}")
    require(initial <= pool, f"problems: {initial} initial rows are more than a pool of {pool}; ask for fewer")
    require(pool % duplicates == 0, f"problems: {duplicates} copies do not divide a pool of {pool}")

    def sample(key: Array, data: ProblemData) -> Problem:
        class_key, order_key, pool_key, test_key, mix_key, noise_key = jax.random.split(key, 6)
        require_one_set("problems", data.pool, data.test)
        classes, distinct = data.pool.count.shape[0], pool // duplicates
        for split, wanted in (("pool", distinct + validation), ("test", test)):
            have = getattr(data, split).y.shape[0]
            if wanted > have:
                raise ValueError(f"problems: {wanted} rows wanted, the {split} split has {have}; ask for fewer")
        if ways is not None and ways > classes:
            raise ValueError(f"problems: {ways} ways wanted, the set has {classes} classes; ask for fewer")
        if data.test.count.shape[0] != classes:
            raise ValueError(f"problems: the pool has {classes} classes, the test split {data.test.count.shape[0]}")
        number, frequency = jnp.arange(classes), jnp.ones(classes)
        count = classes if ways is None else ways
        if ways is not None:
            number = jax.random.permutation(class_key, classes)
        if imbalance > 1:
            place = jax.random.permutation(order_key, count)[jnp.minimum(number, count - 1)]
            frequency = imbalance ** -(place / max(count - 1.0, 1.0))
        log_share = jnp.where(number < count, jnp.log(frequency), -jnp.inf)

        def draw(key: Array, source: ClassData, log_share: Array, rows: int) -> Batch:
            noisy = log_share[source.y] + jax.random.gumbel(key, source.y.shape)
            value, row = lax.top_k(noisy, rows)
            real = jnp.isfinite(value)
            y = jnp.where(real, number[source.y[row]], 0).astype(jnp.int32)
            return Batch(x=take(source.x, row), y=y, weight=real.astype(jnp.float32))

        drawn = draw(pool_key, data.pool, log_share, distinct + validation)
        # Frequent classes tend to come first in a weighted draw, and the pool must not tell: mix the real rows.
        mixed = jnp.argsort(jnp.where(drawn.weight > 0, jax.random.uniform(mix_key, drawn.weight.shape), 2.0))
        drawn = take(drawn, mixed)
        body = take(drawn, jnp.tile(jnp.arange(validation, distinct + validation), duplicates))
        held = take(drawn, jnp.arange(validation)) if validation else empty_batch(drawn.x, 1)
        if noise > 0:
            body = body._replace(x=jax.tree.map(lambda leaf: _noisy(noise_key, leaf, noise), body.x))
        return Problem(
            x=body.x,
            y=body.y,
            weight=body.weight,
            cost=jnp.ones(pool, jnp.float32),
            test=draw(test_key, data.test, jnp.where(number < count, 0.0, -jnp.inf), test),
            validation=held,
            initial=_initial(body, count),
        )

    def _initial(body: Batch, classes: int) -> Array:
        if not balanced_initial:
            return jnp.where(body.weight[:initial] > 0, jnp.arange(initial), -1).astype(jnp.int32)
        if initial % classes:
            raise ValueError(f"problems: {initial} initial rows do not spread evenly over {classes} classes")
        member = jax.nn.one_hot(body.y, classes, dtype=jnp.int32) * (body.weight > 0)[:, None].astype(jnp.int32)
        rank = (jnp.cumsum(member, 0) * member).sum(-1)
        chosen = (rank >= 1) & (rank <= initial // classes)
        return jnp.nonzero(chosen, size=initial, fill_value=-1)[0].astype(jnp.int32)

    return sample


def _noisy(key: Array, x: Array, noise: float) -> Array:
    noisy = x + noise * jax.random.normal(key, x.shape)
    if jnp.issubdtype(x.dtype, jnp.integer):
        limits = jnp.iinfo(x.dtype)
        noisy = jnp.clip(jnp.round(noisy), limits.min, limits.max)
    return noisy.astype(x.dtype)
