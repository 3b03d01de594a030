"""Active-learning problems: from a person's own arrays, or drawn from a labelled set on the device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import Batch, Problem, PyTree, empty_batch, require, rows_of, take
from metaal_jax.tasks.class_data import ClassData


class ProblemData(NamedTuple):
    """What problems are drawn from: pool (and validation) rows from one split, test rows from the other."""

    pool: ClassData
    test: ClassData


def problem(
    x: PyTree,
    y: Array | None,
    test_x: PyTree,
    test_y: Array,
    *,
    cost: Array | None = None,
    initial: Array | None = None,
    validation: Batch | None = None,
) -> Problem:
    """A `Problem` from plain arrays: unit costs, a cold start and no validation rows unless given.

    Raises:
      ValueError: for costs of another number than the rows, or that are negative or not finite.
    """
    n = rows_of(x)
    if cost is not None:
        cost = jnp.asarray(cost, jnp.float32)
        require(cost.shape == (n,), f"problem: {n} rows need as many costs, got shape {cost.shape}")
        require(
            (cost >= 0).all() & jnp.isfinite(cost).all(),
            f"problem: costs must be finite and not negative, got {cost.min()} to {cost.max()}",
        )
    test = Batch(x=test_x, y=jnp.asarray(test_y, jnp.int32), weight=jnp.ones(rows_of(test_x)))
    return Problem(
        x=x,
        y=None if y is None else jnp.asarray(y, jnp.int32),
        weight=jnp.ones(n),
        cost=jnp.ones(n) if cost is None else cost,
        test=test,
        validation=empty_batch(test_x, 1) if validation is None else validation,
        initial=jnp.zeros(0, jnp.int32) if initial is None else jnp.asarray(initial, jnp.int32),
    )


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
            cost=jnp.ones(pool),
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
