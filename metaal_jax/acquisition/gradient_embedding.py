"""Rules that look at the gradient which a row's label would give."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.clustering import draw
from metaal_jax.acquisition.lifts import check_count, fixed_rule
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.losses import consensus
from metaal_jax.rows import row_noise


def badge(*, k: int, covered: bool = True) -> Policy:
    """k-means++ sampling of the gradients that the rows would give if their predicted classes were true.

    The gradient of the last layer's weights at row `i` is `g_i = a_i (x) z_i` with `a_i = p_i - e_{argmax p_i}` and
    `z_i` the embedding. Picks are drawn one after the other with probability proportional to the squared distance of
    `g_i` to the nearest centre. Distances come from the factors, so no `[n, c d]` array is made:
    `|g_i - g_j|^2 = |a_i|^2 |z_i|^2 + |a_j|^2 |z_j|^2 - 2 (a_i.a_j)(z_i.z_j)`. A committee's probabilities and
    embeddings are averaged.

    Where there are no centres yet, from a cold start or with `covered=False`, the first pick is the row with the
    largest gradient. When all distances are 0, picks are random. The draws use cumulative sums in an order that comes
    from noise belonging to rows, so they agree between orders of the pool except where rounding decides.

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
        n = view.row.shape[0]
        check_count(k, n)
        probs = jnp.nan_to_num(jnp.exp(consensus(view.prediction.logits)))
        error = probs - jax.nn.one_hot(probs.argmax(-1), probs.shape[-1])
        # A row that is not a number has no gradient and comes last.
        embedding = jnp.nan_to_num(view.prediction.embedding.mean(0), posinf=0.0, neginf=0.0)
        square = (error**2).sum(-1) * (embedding**2).sum(-1)
        noise_key, draw_key = jax.random.split(key)
        noise = row_noise(noise_key, view.row)
        order = jnp.lexsort((noise, ~view.available))

        def squared_distance(own: tuple[Array, Array, Array], others: tuple[Array, Array, Array]) -> Array:
            total = own[2] + others[2]
            between = total - 2.0 * (others[0] @ own[0]) * (others[1] @ own[1])
            # What is left of equal rows by rounding must not be drawn.
            return jnp.where(between > 2e-6 * total, between, 0.0)

        centre = (view.labelled_index >= 0) & covered

        known = (error[view.labelled_index], embedding[view.labelled_index], square[view.labelled_index])

        def nearest_labelled(own: tuple[Array, Array, Array]) -> Array:
            return jnp.where(centre, squared_distance(own, known), jnp.inf).min(initial=jnp.inf)

        start = jnp.full(n, jnp.inf)
        if covered:
            rows = (error, embedding, square)
            start = jax.vmap(nearest_labelled)(rows) if n <= 2048 else lax.map(nearest_labelled, rows, batch_size=2048)

        def pick(state: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], tuple]:
            distance, available, log_prob = state
            first = jnp.isinf(distance).any()
            chance = jnp.where(available, jnp.where(first, square, distance), 0.0)
            longest = jnp.where(available & (chance == chance.max()), noise, -1).argmax()
            chance = jnp.where(chance.max() > 0, chance, available.astype(chance.dtype))
            drawn = order[draw(key, chance[order])]
            position = jnp.where(first, longest, drawn).astype(jnp.int32)
            valid = available[position]
            share = jnp.where(first | ~valid, 0.0, jnp.log(chance[position] / chance.sum()))
            chosen = (error[position], embedding[position], square[position])
            distance = jnp.minimum(distance, squared_distance(chosen, (error, embedding, square)))
            return (distance, available.at[position].set(False), log_prob + share), (position, valid)

        state = (start, view.available, jnp.zeros(()))
        (_, _, log_prob), (index, valid) = lax.scan(pick, state, jax.random.split(draw_key, k))
        scores = jnp.where(jnp.isinf(start), square, start)
        return Decision(index=index, valid=valid, log_prob=log_prob, scores=scores)

    return fixed_rule(act)
