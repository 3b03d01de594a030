"""Rules that look at the gradient which a row's label would give."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.clustering import draw
from metaal_jax.acquisition.diversity import PENDING, PLAIN, nearest_in_blocks
from metaal_jax.acquisition.lifts import check_count, fixed_rule
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require, require_classes, take
from metaal_jax.losses import consensus
from metaal_jax.rows import middle, row_noise

ATTEMPTS = 32  # draws for a pick before all distances are taken instead


def badge(*, k: int, covered: bool = True) -> Policy:
    """k-means++ sampling of the gradients that the rows would give if their predicted classes were true.

    The gradient of the last layer's weights at row `i` is `g_i = a_i (x) z_i` with `a_i = p_i - e_{argmax p_i}` and
    `z_i` the embedding. Picks are drawn one after the other with probability proportional to the squared distance of
    `g_i` to the nearest centre. Distances come from the factors, so no `[n, c d]` array is made: with `z_i = m + u_i`
    for a point `m` amid the embeddings,

        |g_i - g_j|^2 = |a_i - a_j|^2 (|m|^2 + m.u_i + m.u_j) + (|a_i|^2 - |a_j|^2) (m.u_i - m.u_j)
                        + |a_i|^2 |u_i|^2 + |a_j|^2 |u_j|^2 - 2 (a_i.a_j) (u_i.u_j)

    which loses less to rounding the farther `m` lies from the origin. A committee's probabilities and embeddings are
    averaged.

    Where there are no centres yet, from a cold start or with `covered=False`, the first pick is the row with the
    largest gradient. When all distances are 0, picks are random. The draws use cumulative sums in an order that comes
    from noise belonging to rows, so they agree between orders of the pool except where rounding decides. On large pools
    a pick is drawn by the distances to earlier centres and accepted with the share that the latest leave of its own,
    which gives the same probabilities; the distances of the whole pool to many picks then are one matrix product.

    Args:
      k: rows a round.
      covered: whether the labelled rows' gradients are centres from the start; False is the paper's rule.

    Returns:
      A `Policy`; the decision's scores are the squared distances before the first pick (squared lengths where there
      are no centres) and `log_prob` is that of the drawn sequence.

    Raises:
      ValueError: for `k` below 1.

    Reference: Ash, Zhang, Krishnamurthy, Langford, Agarwal: Deep Batch Active Learning by Diverse, Uncertain Gradient
    Lower Bounds, 2020.
    """
    require(k >= 1, f"badge: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        require_classes("badge", view)
        n = view.row.shape[0]
        check_count(k, n)
        rows = _gradients(view)
        noise_key, draw_key = jax.random.split(key)
        noise = row_noise(noise_key, view.row)
        order = jnp.lexsort((noise, ~view.available))
        centre = (view.labelled_index >= 0) & covered
        known = take(rows, view.labelled_index)

        def nearest_labelled(own: _Gradient) -> Array:
            return jnp.where(centre, _squared_distance(own, known), jnp.inf).min(initial=jnp.inf)

        plain = n * view.prediction.embedding.shape[-1] <= PLAIN
        start = jnp.full(n, jnp.inf)
        if covered and not plain:

            def to_some(index: Array) -> Array:
                return jnp.where((index >= 0)[:, None], _to_all(take(rows, index), rows), jnp.inf).min(0)

            start = nearest_in_blocks(to_some, view.labelled_index, n)
        elif covered:
            start = jax.vmap(nearest_labelled)(rows) if n <= 2048 else lax.map(nearest_labelled, rows, batch_size=2048)

        def pick(
            state: tuple[Array, Array, Array], key: Array
        ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
            distance, available, log_prob = state
            first = jnp.isinf(distance).any()
            chance = jnp.where(available, jnp.where(first, rows.square, distance), 0.0)
            longest = jnp.where(available & (chance == chance.max()), noise, -1).argmax()
            chance = jnp.where(chance.max() > 0, chance, available.astype(chance.dtype))
            drawn = order[draw(key, chance[order])]
            position = jnp.where(first, longest, drawn).astype(jnp.int32)
            valid = available[position]
            share = jnp.where(first | ~valid, 0.0, jnp.log(chance[position] / chance.sum()))
            distance = jnp.minimum(distance, _squared_distance(take(rows, position), rows))
            return (distance, available.at[position].set(False), log_prob + share), (position, valid)

        state, keys = (start, view.available, jnp.zeros(())), jax.random.split(draw_key, k)
        if plain or k == 1:
            (_, _, log_prob), (index, valid) = lax.scan(pick, state, keys)
        else:
            # The first pick may be that of no centre; the others come in blocks.
            state, (index, valid) = pick(state, keys[0])
            blocks = -(-(k - 1) // PENDING)
            wanted = (jnp.arange(blocks * PENDING) < k - 1).reshape(blocks, PENDING)
            keys = jax.random.split(keys[1], (blocks, PENDING))
            step = functools.partial(_block, rows, order)
            (_, _, log_prob), (more, also) = lax.scan(step, state, (keys, wanted))
            index = jnp.concatenate([index[None], more.reshape(-1)[: k - 1]])
            valid = jnp.concatenate([valid[None], also.reshape(-1)[: k - 1]])
        scores = jnp.where(jnp.isinf(start), rows.square, start)
        return Decision(index=index, valid=valid, log_prob=log_prob, scores=scores)

    return fixed_rule(act, logits=True, embedding=True)


class _Gradient(NamedTuple):
    """Factors of the last layer's gradients `a (x) (m + u)`, of one row or of many.

    Attributes:
      error: `a`, and error_square: `|a|^2`.
      moved: `u`, and moved_square: `|u|^2`.
      along: `m.u + |m|^2 / 2`.
      square: `|a|^2 |m + u|^2`.
    """

    error: Array
    error_square: Array
    moved: Array
    moved_square: Array
    along: Array
    square: Array


def _gradients(view: PoolView) -> _Gradient:
    probs = jnp.exp(consensus(view.prediction.logits))
    error = probs - jax.nn.one_hot(probs.argmax(-1), probs.shape[-1])
    embedding, real = view.prediction.embedding.mean(0), view.weight > 0
    amid = middle(embedding, real, view.row)
    moved = jnp.where(real[:, None], embedding - amid[None], 0.0)
    error_square = jnp.where(real, (error**2).sum(-1), 0.0)
    return _Gradient(
        error=error,
        error_square=error_square,
        moved=moved,
        moved_square=(moved**2).sum(-1),
        along=moved @ amid + 0.5 * (amid**2).sum(),
        square=error_square * (embedding**2).sum(-1),
    )


def _combined(own: _Gradient, others: _Gradient, apart: Array, error: Array, moved: Array) -> Array:
    """Squared distances of gradients from those of the errors and the inner products of both factors."""
    length = own.error_square * own.moved_square + others.error_square * others.moved_square
    near = length - 2.0 * error * moved
    far = apart * (own.along + others.along)
    far += (own.error_square - others.error_square) * (own.along - others.along)
    # What is left of equal rows by rounding must not be drawn.
    return jnp.where(far + near > 2e-6 * length, jnp.maximum(far + near, 0.0), 0.0)


def _squared_distance(own: _Gradient, others: _Gradient) -> Array:
    """Of one row to each of the others, `[n]`."""
    apart = ((others.error - own.error[None]) ** 2).sum(-1)
    return _combined(own, others, apart, others.error @ own.error, others.moved @ own.moved)


def _to_all(chosen: _Gradient, rows: _Gradient) -> Array:
    """Of several rows to all, `[p, n]`."""
    own, others = jax.tree.map(lambda leaf: leaf[:, None], chosen), jax.tree.map(lambda leaf: leaf[None], rows)
    apart = lax.map(lambda error: ((rows.error - error[None]) ** 2).sum(-1), chosen.error)
    return _combined(own, others, apart, chosen.error @ rows.error.T, chosen.moved @ rows.moved.T)


def _block(
    rows: _Gradient, order: Array, state: tuple[Array, Array, Array], turns: tuple[Array, Array]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """`PENDING` picks of k-means++ by rejection from the distances before them, as exact as one after the other.

    Args:
      rows: of the pool.
      order: the order in which sums run over the pool.
      state: distance to the nearest centre `[n]`, available rows, log-probability so far.
      turns: a key for each pick, and whether it is wanted.
    """
    distance, free, log_prob = state
    chance = jnp.where(free, distance, 0.0)
    ordered = chance[order]

    def pick(carry: tuple[Array, Array, Array], turn: tuple[Array, Array]) -> tuple[PyTree, tuple[Array, Array]]:
        chosen, count, available = carry
        key, wanted = turn
        own, pending = take(rows, chosen), jnp.arange(PENDING) < count

        def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            number, _, _ = state
            draw_key, accept_key = jax.random.split(jax.random.fold_in(key, number))
            place = order[draw(draw_key, ordered)].astype(jnp.int32)
            now = jnp.where(pending, _squared_distance(take(rows, place), own), jnp.inf).min(initial=jnp.inf)
            taken = available[place] & (jax.random.uniform(accept_key) * chance[place] < now)
            return number + 1, place, taken

        def look(state: tuple[Array, Array]) -> tuple[Array, Array]:
            """Draws from the exact distances; by chance alone where all are 0."""
            now = jnp.where(pending[:, None], _to_all(own, rows), jnp.inf).min(0)
            now = jnp.where(available, jnp.minimum(distance, now), 0.0)
            now = jnp.where(now.max() > 0, now, available.astype(now.dtype))
            place = order[draw(jax.random.fold_in(key, ATTEMPTS), now[order])]
            return place.astype(jnp.int32), jnp.bool_(True)

        start = (jnp.int32(0), jnp.int32(0), ~wanted | (chance.max() <= 0))
        number, place, taken = lax.while_loop(lambda s: (s[0] < ATTEMPTS) & ~s[2], attempt, start)
        taken = taken & (number > 0) | ~wanted
        place, _ = lax.while_loop(lambda s: ~s[1], look, (place, taken))
        valid = available[place] & wanted
        carry = (chosen.at[count].set(place), count + wanted, available.at[place].set(available[place] & ~wanted))
        return carry, (place, valid)

    nothing = (jnp.zeros(PENDING, jnp.int32), jnp.int32(0), free)
    (_, _, _), (index, valid) = lax.scan(pick, nothing, turns)

    def add(
        state: tuple[Array, Array, Array], pick: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        distance, available, log_prob = state
        place, valid, mine = pick
        chance = jnp.where(available, distance, 0.0)
        chance = jnp.where(chance.max() > 0, chance, available.astype(chance.dtype))
        share = jnp.where(valid, jnp.log(jnp.where(valid, chance[place], 1.0) / chance.sum()), 0.0)
        distance = jnp.where(valid, jnp.minimum(distance, mine), distance)
        return (distance, available.at[place].set(available[place] & ~valid), log_prob + share), None

    mine = _to_all(take(rows, index), rows)
    state, _ = lax.scan(add, (distance, free, log_prob), (index, valid, mine))
    return state, (index, valid)
