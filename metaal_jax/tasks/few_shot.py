"""Samplers of few-shot tasks, `(key, data) -> Task`, that draw from arrays on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metaal_jax.base import Batch, Task, empty_batch, require
from metaal_jax.tasks.class_data import ClassData, check_count, check_rotations, draw_classes, draw_rows, gather


def few_shot(
    *, ways: int, shots: int, queries: int, smallest: int | None = None, rotations: bool = False
) -> Callable[[Array, ClassData], Task]:
    """Tasks of `ways` classes with `shots` support and `queries` query rows each; labels are a random permutation.

    Args:
      ways, shots, queries: per task, per class, per class.
      smallest: draws the number of support rows of a class evenly from `smallest` to `shots`, once a task; the others
        have weight 0. None for `shots` in every task.
      rotations: counts each class rotated by 90, 180 and 270 degrees as three more classes (square images).

    Returns:
      A sampler `(key, data) -> Task`. Rows that a class does not have get weight 0, support before query.

    Raises:
      ValueError: for numbers that are no positive integers or `smallest > shots`; in the sampler for more ways than
        classes, or for rotations of rows that are no square images.

    Reference: Vinyals et al.: Matching Networks for One Shot Learning, 2016.
    """
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        check_count("few_shot", name, value)
    if smallest is not None:
        check_count("few_shot", "smallest", smallest)
        require(smallest <= shots, f"few_shot: smallest must be at most the {shots} shots, got {smallest}")

    def sample(key: Array, data: ClassData) -> Task:
        if rotations:
            check_rotations("few_shot", data.x)
        if smallest is not None:
            size_key, key = jax.random.split(key)
        class_key, row_key = jax.random.split(key)
        label, turn = draw_classes(class_key, data, ways, rotations)
        row, real = draw_rows(row_key, data, label, shots + queries)
        if smallest is not None:
            place = jnp.arange(shots + queries)
            real &= ((place < jax.random.randint(size_key, (), smallest, shots + 1)) | (place >= shots))[None]
        x = gather(data, row, turn[:, None] if rotations else None)
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
      ValueError: for numbers out of range or `smallest > labels`; in the sampler for more ways than classes, or for
        rotations of rows that are no square images.
    """
    for name, value in (("ways", ways), ("labels", labels), ("queries", queries)):
        check_count("growing", name, value)
    check_count("growing", "smallest", smallest, 0)
    require(smallest <= labels, f"growing: smallest must lie in 0..{labels}, got {smallest}")
    require(concentration > 0, f"growing: concentration must be positive, got {concentration}")
    require(concentration < np.inf, f"growing: concentration must be finite, got {concentration}")

    def sample(key: Array, data: ClassData) -> Task:
        if rotations:
            check_rotations("growing", data.x)
        class_key, row_key, size_key, share_key, spread_key = jax.random.split(key, 5)
        label, turn = draw_classes(class_key, data, ways, rotations)
        row, real = draw_rows(row_key, data, label, min(queries + labels, data.rows.shape[1]))
        width = row.shape[1]
        share = jax.random.dirichlet(share_key, jnp.full(ways, concentration))
        share = jnp.where(real[:, 0], share, 0.0)  # a set of fewer classes has none of the last ones
        y = jax.random.categorical(spread_key, jnp.log(share), shape=(labels,)).astype(jnp.int32)
        # The j-th support row of a class takes the j-th of its drawn rows that is not a query row.
        place = queries + (jnp.cumsum(jax.nn.one_hot(y, ways, dtype=jnp.int32), 0) - 1)[jnp.arange(labels), y]
        size = jax.random.randint(size_key, (), smallest, labels + 1)
        exists = (place < width) & real[y, jnp.minimum(place, width - 1)] & (jnp.arange(labels) < size)
        x = gather(data, row[y, jnp.minimum(place, width - 1)], turn[y] if rotations else None)
        support = Batch(x=x, y=y, weight=exists.astype(jnp.float32))
        asked = min(queries, width)
        present = jnp.zeros(ways).at[y].add(support.weight) > 0
        judged = real[:, :asked] if unseen else real[:, :asked] & present[:, None]
        x = gather(data, row[:, :asked], turn[:, None] if rotations else None)
        query = Batch(
            x=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x),
            y=jnp.repeat(jnp.arange(ways, dtype=jnp.int32), asked),
            weight=judged.reshape(-1).astype(jnp.float32),
        )
        return Task(support=support, query=query)

    return sample


def minibatches(*, rows: int, rotations: bool = False) -> Callable[[Array, ClassData], Task]:
    """Mini-batches of a whole set with its own class numbers, in the form of tasks: for plain supervised training.

    Args:
      rows: of a mini-batch, drawn evenly and with replacement.
      rotations: as in `few_shot`; class `j` turned by `i` quarter turns is class `i * classes + j`.

    Returns:
      A sampler `(key, data) -> Task` whose support is empty (one row of weight 0) and whose query is the mini-batch.

    Raises:
      ValueError: for `rows` that is no positive integer; in the sampler for rotations of rows that are no square
        images.
    """
    check_count("minibatches", "rows", rows)

    def sample(key: Array, data: ClassData) -> Task:
        if rotations:
            check_rotations("minibatches", data.x)
        row_key, turn_key = jax.random.split(key)
        row = jax.random.randint(row_key, (rows,), 0, data.y.shape[0])
        turn = jax.random.randint(turn_key, (rows,), 0, 4) if rotations else None
        x = gather(data, row, turn)
        y = data.y[row] if turn is None else turn * data.count.shape[0] + data.y[row]
        return Task(support=empty_batch(x, 1), query=Batch(x=x, y=y, weight=jnp.ones(rows, jnp.float32)))

    return sample


def mixture(samplers: list[Callable], weights: list[float]) -> Callable[[Array, tuple], Task]:
    """A sampler that draws each task from one of several samplers, given a tuple of their data.

    All samplers must give tasks of the same shapes. Under `vmap` every sampler runs.

    Raises:
      ValueError: without samplers, where samplers and weights differ in number, or where weights are not positive and
        finite; in the sampler for another number of data sets than of samplers.
    """
    if not samplers:
        raise ValueError("mixture: give at least one sampler")
    if len(samplers) != len(weights) or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"mixture: {len(samplers)} samplers need as many positive weights, got {weights}")
    log_weights = np.log(np.asarray(weights, np.float32))

    def sample(key: Array, data: tuple) -> Task:
        if len(data) != len(samplers):
            raise ValueError(f"mixture: {len(samplers)} samplers need as many data sets, got {len(data)}")
        if len(samplers) == 1:
            return samplers[0](key, data[0])
        which_key, task_key = jax.random.split(key)
        which = jax.random.categorical(which_key, log_weights)
        branches = [lambda key, i=i: samplers[i](key, data[i]) for i in range(len(samplers))]
        return lax.switch(which, branches, task_key)

    return sample
