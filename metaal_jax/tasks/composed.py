"""Active-learning problems whose classes are composed of several classes of a source."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.base import Batch, Problem, empty_batch, require, take
from metaal_jax.tasks.class_data import ClassData, check_count, require_one_set


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
    ):  # fmt: skip
        check_count("composed_problems", name, value, least)
    require(imbalance >= 1, f"composed_problems: imbalance must be at least 1, got {imbalance}")
    require(imbalance < jnp.inf, f"composed_problems: imbalance must be finite, got {imbalance}")

    def sample(key: Array, data: ClassData) -> Problem:
        keys = jax.random.split(key, 8)
        class_key, many_key, there_key, share_key, order_key, rare_key, held_key, pool_key = keys
        require_one_set("composed_problems", data)
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
        real = (jnp.arange(most)[None, None] < data.count[label][..., None]) & there[..., None]
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
            cost=jnp.ones(pool, jnp.float32),
            test=take(held, jnp.arange(test)),
            validation=take(held, jnp.arange(test, test + validation)) if validation else empty_batch(held.x, 1),
            initial=jnp.zeros(0, jnp.int32),
        )

    return sample
