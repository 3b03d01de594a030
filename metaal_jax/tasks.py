"""Samplers, `(key, data) -> Task | Problem`, that draw from arrays on the device; and what prepares those arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.base import Batch, Problem, PyTree, Task, empty_batch, require, rows_of, take


class ClassData(NamedTuple):
    """A labelled set with the rows of each class, made by `class_data`.

    Attributes:
      x: leaves `[n, ...]`.
      y: int32 `[n]`, classes 0..c-1.
      rows: int32 `[c, most]`, the rows of each class, padded with 0 beyond `count`.
      count: int32 `[c]`.
    """

    x: PyTree
    y: Array
    rows: Array
    count: Array  # type: ignore[assignment]


def class_data(x: PyTree, y: np.ndarray, *, classes: np.ndarray | None = None) -> ClassData:
    """Indexes a labelled set by class, on the host.

    Args:
      x: leaves `[n, ...]`.
      y: integers `[n]`.
      classes: keep only rows of these classes, numbered 0.. in this order; None for all that occur, in order.

    Returns:
      `ClassData`, NumPy arrays; put it on the device once with `jax.device_put`.

    Raises:
      ValueError: for an empty set, or a class that has no row.
    """
    y = np.asarray(y)
    if y.ndim != 1 or y.size == 0 or rows_of(x) != y.size:
        raise ValueError(f"class_data needs as many rows as labels and at least one, got y of shape {y.shape}")
    wanted = np.unique(y) if classes is None else np.asarray(classes)
    keep = np.isin(y, wanted)
    if keep.sum() < y.size:
        x, y = jax.tree.map(lambda leaf: leaf[keep], x), y[keep]
    number = {int(label): i for i, label in enumerate(wanted)}
    y = np.asarray([number[int(label)] for label in y], np.int32)
    count = np.bincount(y, minlength=len(wanted)).astype(np.int32)
    if (count == 0).any():
        raise ValueError(f"class {wanted[int(np.flatnonzero(count == 0)[0])]} has no row; leave it out of classes")
    rows = np.zeros((len(wanted), count.max()), np.int32)
    rows[np.arange(rows.shape[1]) < count[:, None]] = np.argsort(y, kind="stable")
    index: Any = (y, rows, count)  # NumPy arrays until the caller puts them on a device
    return ClassData(x, *index)


def split_classes(classes: int, shares: tuple[int, ...], *, seed: int = 0) -> list[np.ndarray]:
    """Disjoint random groups of class numbers of the given sizes, for meta-training, validation and test.

    Raises:
      ValueError: where the groups together need more classes than there are.
    """
    if sum(shares) > classes:
        raise ValueError(f"groups of {shares} classes need {sum(shares)}, the set has {classes}; ask for fewer")
    order = np.random.default_rng(seed).permutation(classes)
    return [np.sort(part) for part in np.split(order[: sum(shares)], np.cumsum(shares)[:-1])]


def few_shot(*, ways: int, shots: int, queries: int, rotations: bool = False) -> Callable[[Array, ClassData], Task]:
    """Tasks of `ways` classes with `shots` support and `queries` query rows each; labels are a random permutation.

    Args:
      ways, shots, queries: per task, per class, per class.
      rotations: counts each class rotated by 90, 180 and 270 degrees as three more classes (square images).

    Returns:
      A sampler `(key, data) -> Task`. Rows that a class does not have get weight 0, support before query.

    Raises:
      ValueError: for numbers below 1, in the sampler for more ways than classes.

    Reference: Vinyals et al.: Matching Networks for One Shot Learning, 2016.
    """
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        require(value >= 1, f"few_shot: {name} must be at least 1, got {value}")

    def sample(key: Array, data: ClassData) -> Task:
        class_key, row_key = jax.random.split(key)
        label, turn = _draw_classes(class_key, data, ways, rotations)
        row, real = _draw_rows(row_key, data, label, shots + queries)
        x = _gather(data, row, turn[:, None] if rotations else None)
        y = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32)[:, None], row.shape)

        def part(columns: slice) -> Batch:
            flat = jax.tree.map(lambda leaf: leaf[:, columns].reshape(-1, *leaf.shape[2:]), (x, y, real))
            return Batch(x=flat[0], y=flat[1], weight=flat[2].astype(jnp.float32))

        return Task(support=part(slice(0, shots)), query=part(slice(shots, None)))

    return sample


def growing(
    *,
    ways: int,
    labels: int,
    queries: int,
    smallest: int = 0,
    concentration: float = 2.0,
    unseen: bool = False,
    rotations: bool = False,
) -> Callable[[Array, ClassData], Task]:
    """Tasks as active learning meets them: `smallest` to `labels` support rows, unevenly spread over the classes.

    The number of support rows is uniform; each row's class is drawn from proportions that are themselves drawn from a
    symmetric Dirichlet distribution, so that small sets lack classes as they do in a run. Query rows of a class that
    the support lacks have weight 0, unless `unseen`: nothing in the task tells of them.

    Args:
      ways: classes of a task, their order random.
      labels: size of the support buffer; rows beyond the number drawn have weight 0.
      queries: query rows of each class.
      smallest: least number of support rows.
      concentration: of the Dirichlet distribution; small is uneven, large is even.
      unseen: judge on query rows of classes without a support row, too.
      rotations: as in `few_shot`.

    Returns:
      A sampler `(key, data) -> Task`. Where a class has too few rows, queries come first and the rest has weight 0.

    Raises:
      ValueError: for numbers below 1 or `smallest > labels`, in the sampler for more ways than classes.
    """
    for name, value in (("ways", ways), ("labels", labels), ("queries", queries)):
        require(value >= 1, f"growing: {name} must be at least 1, got {value}")
    require(0 <= smallest <= labels, f"growing: smallest must lie in 0..{labels}, got {smallest}")
    require(concentration > 0, f"growing: concentration must be > 0, got {concentration}")

    def sample(key: Array, data: ClassData) -> Task:
        class_key, row_key, size_key, share_key, spread_key = jax.random.split(key, 5)
        label, turn = _draw_classes(class_key, data, ways, rotations)
        row, real = _draw_rows(row_key, data, label, min(queries + labels, data.rows.shape[1]))
        width = row.shape[1]
        share = jax.random.dirichlet(share_key, jnp.full(ways, concentration))
        y = jax.random.categorical(spread_key, jnp.log(share), shape=(labels,)).astype(jnp.int32)
        # The j-th support row of a class takes the j-th of its drawn rows that is not a query row.
        place = queries + (jnp.cumsum(jax.nn.one_hot(y, ways, dtype=jnp.int32), 0) - 1)[jnp.arange(labels), y]
        size = jax.random.randint(size_key, (), smallest, labels + 1)
        exists = (place < width) & real[y, jnp.minimum(place, width - 1)] & (jnp.arange(labels) < size)
        x = _gather(data, row[y, jnp.minimum(place, width - 1)], turn[y] if rotations else None)
        support = Batch(x=x, y=y, weight=exists.astype(jnp.float32))
        asked = min(queries, width)
        present = jnp.zeros(ways).at[y].add(support.weight) > 0
        judged = real[:, :asked] if unseen else real[:, :asked] & present[:, None]
        x = _gather(data, row[:, :asked], turn[:, None] if rotations else None)
        query = Batch(
            x=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x),
            y=jnp.repeat(jnp.arange(ways, dtype=jnp.int32), asked),
            weight=judged.reshape(-1).astype(jnp.float32),
        )
        return Task(support=support, query=query)

    return sample


def supervised(*, rows: int, rotations: bool = False) -> Callable[[Array, ClassData], Task]:
    """Mini-batches of a whole set with its own class numbers, in the form of tasks: for plain supervised training.

    Args:
      rows: of a mini-batch, drawn evenly and with replacement.
      rotations: as in `few_shot`; class `j` turned by `i` quarter turns is class `i * classes + j`.

    Returns:
      A sampler `(key, data) -> Task` whose support is empty (one row of weight 0) and whose query is the mini-batch.

    Raises:
      ValueError: for `rows < 1`.
    """
    require(rows >= 1, f"supervised: rows must be at least 1, got {rows}")

    def sample(key: Array, data: ClassData) -> Task:
        row_key, turn_key = jax.random.split(key)
        row = jax.random.randint(row_key, (rows,), 0, data.y.shape[0])
        turn = jax.random.randint(turn_key, (rows,), 0, 4) if rotations else None
        x = _gather(data, row, turn)
        y = data.y[row] if turn is None else turn * data.count.shape[0] + data.y[row]
        return Task(support=empty_batch(x, 1), query=Batch(x=x, y=y, weight=jnp.ones(rows)))

    return sample


def mixture(samplers: list[Callable], weights: list[float]) -> Callable[[Array, tuple], Task]:
    """A sampler that draws each task from one of several samplers, given a tuple of their data.

    All samplers must give tasks of the same shapes. Under `vmap` every sampler runs.

    Raises:
      ValueError: where samplers and weights differ in number, or weights are not positive.
    """
    if len(samplers) != len(weights) or min(weights) <= 0:
        raise ValueError(f"mixture: {len(samplers)} samplers need as many positive weights, got {weights}")
    log_weights = np.log(np.asarray(weights, np.float32))

    def sample(key: Array, data: tuple) -> Task:
        if len(samplers) == 1:
            return samplers[0](key, data[0])
        which_key, task_key = jax.random.split(key)
        which = jax.random.categorical(which_key, log_weights)
        branches = [lambda key, i=i: samplers[i](key, data[i]) for i in range(len(samplers))]
        return lax.switch(which, branches, task_key)

    return sample


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


def composed_problems(
    *,
    ways: int,
    pool: int,
    test: int,
    validation: int = 0,
    parts: int = 3,
    imbalance: float = 1.0,
) -> Callable[[Array, ClassData], Problem]:
    """Active-learning problems whose classes are each composed of a few of the source's classes, in uneven shares.

    A class of the real world has common forms and rare ones: sevens with a bar, breeds of dogs. Policies that learn
    where labels are worth most have to meet both, and how many forms a class has differs from problem to problem: each
    has a number of its own in [0, 1], and every form beyond a class's first is there with that probability. The shares
    of a class's forms are drawn evenly from all that add up to one.

    Args:
      ways: classes of a problem.
      pool: rows of the pool.
      test: test rows, from the same forms with the same shares; classes are as frequent as each other.
      validation: validation rows, drawn like test rows.
      parts: the most forms of a class.
      imbalance: how many times rarer the pool's rarest class may be than its most frequent one; the factor of a
        problem is drawn log-evenly from 1 to that.

    Returns:
      A sampler `(key, data) -> Problem`; pool, test and validation rows are distinct. Rows are drawn without
      replacement, test and validation first: where a form is nearly used up, its share of the pool is smaller.

    Raises:
      ValueError: for numbers out of range, in the sampler for a source with fewer than `ways * parts` classes, or with
        too few rows where no class has more than one form. Rows that the drawn classes do not have get weight 0.
    """
    for name, value, least in (
        ("ways", ways, 2), ("pool", pool, 1), ("test", test, 1), ("validation", validation, 0), ("parts", parts, 1),
        ("imbalance", imbalance, 1.0),
    ):  # fmt: skip
        require(value >= least, f"composed_problems: {name} must be at least {least}, got {value}")

    def sample(key: Array, data: ClassData) -> Problem:
        keys = jax.random.split(key, 8)
        class_key, many_key, there_key, share_key, order_key, rare_key, held_key, pool_key = keys
        classes, most = data.rows.shape
        if classes < ways * parts:
            raise ValueError(
                f"composed_problems: {ways} ways of {parts} parts need {ways * parts} classes, the source has "
                f"{classes}; ask for fewer ways or parts"
            )
        if ways * most < pool + test + validation:
            raise ValueError(
                f"composed_problems: {pool + test + validation} rows wanted, {ways} classes of one form each have at "
                f"most {ways * most}; ask for fewer"
            )
        label = jax.random.permutation(class_key, classes)[: ways * parts].reshape(ways, parts)
        there = jax.random.uniform(there_key, (ways, parts)) < jax.random.uniform(many_key)
        there = there.at[:, 0].set(True)
        share = jnp.where(there, jax.random.dirichlet(share_key, jnp.ones(parts), (ways,)), 0.0)
        share = share / share.sum(1, keepdims=True)
        place = jax.random.permutation(order_key, ways) / (ways - 1.0)
        rare = -place * jax.random.uniform(rare_key) * jnp.log(imbalance)

        row = data.rows[label]
        real = (jnp.arange(most) < data.count[label][..., None]) & there[..., None]
        y = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32)[:, None, None], row.shape).reshape(-1)
        log_share = jnp.where(real, jnp.log(jnp.maximum(share, 1e-9))[..., None], -jnp.inf).reshape(-1)
        row = row.reshape(-1)

        def draw(key: Array, log_share: Array, rows: int) -> tuple[Batch, Array]:
            shuffle_key, key = jax.random.split(key)
            value, which = lax.top_k(log_share + jax.random.gumbel(key, log_share.shape), rows)
            # Frequent forms tend to come first in a weighted draw, and the order must not tell.
            order = jnp.argsort(jnp.where(jnp.isfinite(value), jax.random.uniform(shuffle_key, (rows,)), 2.0))
            which, exists = which[order], jnp.isfinite(value[order])
            batch = Batch(x=take(data.x, row[which]), y=y[which], weight=exists.astype(jnp.float32))
            return batch, log_share.at[which].set(-jnp.inf)

        # Held-out rows first: they have the classes' own frequencies.
        held, left = draw(held_key, log_share, test + validation)
        body, _ = draw(pool_key, left + rare[y], pool)
        return Problem(
            x=body.x,
            y=body.y,
            weight=body.weight,
            cost=jnp.ones(pool),
            test=take(held, jnp.arange(test)),
            validation=take(held, jnp.arange(test, test + validation)) if validation else empty_batch(held.x, 1),
            initial=jnp.zeros(0, jnp.int32),
        )

    return sample


def _draw_classes(key: Array, data: ClassData, ways: int, rotations: bool) -> tuple[Array, Array]:
    """`ways` distinct classes in random order and how many quarter turns each takes."""
    classes = data.count.shape[0] * (4 if rotations else 1)
    if ways > classes:
        raise ValueError(f"{ways} ways wanted, the set has {classes} classes; ask for fewer ways")
    drawn = jax.random.permutation(key, classes)[:ways]
    return drawn % data.count.shape[0], drawn // data.count.shape[0]


def _draw_rows(key: Array, data: ClassData, label: Array, k: int) -> tuple[Array, Array]:
    """`k` distinct rows of each class: `(row int32 [ways, k], real bool [ways, k])`, real rows first."""
    most = data.rows.shape[1]
    if k > most:
        raise ValueError(f"{k} rows of a class wanted, the largest class has {most}; ask for fewer shots or queries")
    noise = jax.random.uniform(key, (label.shape[0], most))
    noise = jnp.where(jnp.arange(most) < data.count[label][:, None], noise, -1.0)
    value, column = lax.top_k(noise, k)
    return jnp.take_along_axis(data.rows[label], column, axis=1), value >= 0


def _gather(data: ClassData, row: Array, turn: Array | None) -> PyTree:
    """Rows of the set, each turned by `turn` quarter turns (broadcast against `row`), or as they are for None."""
    if turn is None:
        return take(data.x, row)

    def turned(leaf: Array) -> Array:
        x = leaf[row]
        if leaf.ndim < 3:
            return x
        height = row.ndim
        turns = [x] + [jnp.rot90(x, i, axes=(height, height + 1)) for i in (1, 2, 3)]
        which = jnp.broadcast_to(turn, row.shape).reshape(row.shape + (1,) * (leaf.ndim - 1))
        return jnp.select([which == i for i in range(4)], turns)

    return jax.tree.map(turned, data.x)


def _noisy(key: Array, x: Array, noise: float) -> Array:
    noisy = x + noise * jax.random.normal(key, x.shape)
    if jnp.issubdtype(x.dtype, jnp.integer):
        limits = jnp.iinfo(x.dtype)
        noisy = jnp.clip(jnp.round(noisy), limits.min, limits.max)
    return noisy.astype(x.dtype)
