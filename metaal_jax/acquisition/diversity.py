"""Where the rows lie in the embedding: distances, rows that stand for the pool, and rules that spread out."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.lifts import best_by_noise, check_count, fixed_rule, pick_in_turn, select_top, top_by_noise
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.rows import in_chunks, middle, row_noise, squared_distances


def unit_rows(embedding: Array) -> Array:
    """Rows divided by their length; rows of length 0 stay 0."""
    length = jnp.sqrt((embedding**2).sum(-1, keepdims=True))
    return embedding / jnp.where(length > 0, length, 1.0)


def centred(view: PoolView) -> Array:
    """The pool's embedding seen from a point amid it, `[n, d]`: the same distances, less rounding in float32."""
    embedding, real = view.prediction.embedding.mean(0), view.weight > 0
    return jnp.where(real[:, None], embedding - middle(embedding, real, view.row)[None], 0.0)


def directions(view: PoolView) -> Array:
    """The pool's embedding scaled to length 1, seen from a point amid the unit vectors, `[n, d]`.

    For distances between unit vectors. Where all rows point nearly the same way, as rows far from the origin do, the
    difference of two unit vectors is what rounding leaves of it; here it is formed from differences of the rows:
    `z / |z| - c / |c| = (z - c) / |z| - c (z - c).(z + c) / (|z| |c| (|z| + |c|))` for a point `c` amid the rows.
    Rows of length 0 stay at the origin.
    """
    embedding, real = view.prediction.embedding.mean(0), view.weight > 0
    centre = middle(embedding, real, view.row)
    moved, away = embedding - centre[None], jnp.sqrt((centre**2).sum())
    length = jnp.sqrt((embedding**2).sum(-1))
    safe, safe_away = jnp.where(length > 0, length, 1.0), jnp.where(away > 0, away, 1.0)
    shrunk = ((moved**2).sum(-1) + 2.0 * moved @ centre) / (safe * safe_away * (safe + safe_away))
    unit = moved / safe[:, None] - jnp.where(away > 0, shrunk, 0.0)[:, None] * centre[None]
    unit = jnp.where(length[:, None] > 0, unit, -centre[None] / safe_away)
    mean = jnp.where(real[:, None], unit, 0.0).sum(0) / jnp.maximum(real.sum(), 1)
    return jnp.where(real[:, None], unit - mean[None], 0.0)


def distance_to_labelled(embedding: Array, view: PoolView) -> Array:
    """Squared distance of the rows of `embedding` `[n, d]` to the nearest labelled row, `[n]`; inf where none is."""

    def to_some(index: Array) -> Array:
        distance = squared_distances(embedding, embedding[index])
        return jnp.where(index[None] >= 0, distance, jnp.inf).min(-1, initial=jnp.inf)

    if embedding.size <= PLAIN:
        return to_some(view.labelled_index)
    return nearest_in_blocks(to_some, view.labelled_index, embedding.shape[0])


def nearest_in_blocks(distance: Callable[[Array], Array], index: Array, n: int) -> Array:
    """The smallest of `distance(part of index)`, `[n]`, over as many parts as hold rows; empty places cost nothing."""
    blocks = jnp.pad(index, (0, -index.shape[0] % PENDING), constant_values=-1).reshape(-1, PENDING)
    used = jnp.where((blocks >= 0).any(-1), jnp.arange(blocks.shape[0]) + 1, 0).max(initial=0)

    def take_in(block: Array, nearest: Array) -> Array:
        return jnp.minimum(nearest, distance(blocks[block]))

    nearest: Array = lax.fori_loop(0, used, take_in, jnp.full(n, jnp.inf))
    return nearest


PLAIN = 2**21  # entries of an embedding that is read anew for every pick
PENDING = 32  # picks whose distances to a larger one are taken at a time
SHORTLIST = 2048


def spread_in_turn(
    key: Array, view: PoolView, k: int, rows: Array, nearest: Array, score: Callable[[Array], Array]
) -> Decision:
    """Picks rows by `score(nearest)`, `nearest` being the squared distance to the nearest row covered or picked.

    Distances to a new pick only lower `nearest`, so what is known of a row from before bounds its score from above. On
    large pools only a shortlist of the best rows is kept up to date; when the best bound of another row exceeds their
    best score, the distances of the whole pool to all picks since are taken by one matrix product, and a new shortlist
    is made. The picks are those of the plain loop.

    Args:
      key: consumed by the tie break.
      view: the pool.
      k: how many, static.
      rows: `[n, d]`, centred.
      nearest: `[n]`, squared distances to what is covered from the start, finite.
      score: elementwise, `[n] -> [n]`, never falling as the distance grows.

    Returns:
      The `Decision`, as of `pick_in_turn`.
    """
    n, d = rows.shape
    square = (rows**2).sum(-1)

    def distance(own: Array, own_square: Array, others: Array, other_square: Array) -> Array:
        """Between rows `[m, d]` and one row, or `[p, d]`; what rounding leaves of equal rows is 0."""
        total = own_square[:, None] + other_square[None]
        between = total - 2.0 * own @ others.T
        return jnp.where(between > ROUNDING * total, between, 0.0)

    def cover(nearest: Array, position: Array) -> Array:
        # A matrix-vector product reads the embedding at the speed of memory; differences are 30 times slower.
        total = square + square[position]
        between = total - 2.0 * (rows @ rows[position])
        return jnp.minimum(nearest, jnp.where(between > ROUNDING * total, between, 0.0))

    if n * d <= PLAIN or k == 1:
        return pick_in_turn(key, view, k, nearest, score, cover)
    check_count(k, n)
    noise, short = row_noise(key, view.row), min(SHORTLIST, n)

    def listing(nearest: Array, available: Array) -> _Spread:
        listed = top_by_noise(score(nearest), available, noise, short)
        exact = jnp.zeros(n, bool).at[listed].set(True)
        return _Spread(nearest, available, listed, rows[listed], exact, jnp.zeros(PENDING, jnp.int32), jnp.int32(0))

    def refresh(state: _Spread) -> _Spread:
        mine = distance(rows, square, rows[state.pending], square[state.pending])
        mine = jnp.where(jnp.arange(PENDING)[None] < state.count, mine, jnp.inf).min(-1)
        return listing(jnp.minimum(state.nearest, mine), state.available)

    def stale(state: _Spread) -> Array:
        worth = jnp.where(state.available, score(state.nearest), -jnp.inf)
        outside = jnp.where(state.exact, -jnp.inf, worth).max() > jnp.where(state.exact, worth, -jnp.inf).max()
        return (state.count == PENDING) | ((state.count > 0) & outside)

    def pick(state: _Spread, _: None) -> tuple[_Spread, tuple[Array, Array]]:
        state = lax.while_loop(stale, refresh, state)
        # With nothing pending all rows are up to date.
        able = state.available & (state.exact | (state.count == 0))
        worth = jnp.where(able, score(state.nearest), -jnp.inf)
        best = best_by_noise(worth, able, noise)
        mine = distance(state.rows, square[state.listed], rows[best][None], square[best][None])[:, 0]
        valid = state.available[best]
        new = _Spread(
            nearest=state.nearest.at[state.listed].min(mine),
            available=state.available.at[best].set(False),
            listed=state.listed,
            rows=state.rows,
            exact=state.exact,
            pending=state.pending.at[state.count].set(best),
            count=state.count + 1,
        )
        return new, (best, valid)

    _, (index, valid) = lax.scan(pick, listing(nearest, view.available), length=k)
    return Decision(index=index, valid=valid, log_prob=jnp.zeros(()), scores=score(nearest))


ROUNDING = 1e-6  # of the squared lengths: below it a squared distance by inner products is nothing but rounding


class _Spread(NamedTuple):
    """What `spread_in_turn` carries: `nearest` holds for rows that are `exact`, and bounds it for the others."""

    nearest: Array
    available: Array
    listed: Array
    rows: Array
    exact: Array
    pending: Array
    count: Array  # type: ignore[assignment]


def stand_ins(key: Array, view: PoolView, count: int) -> tuple[Array, Array]:
    """Random real rows that stand for the pool, in random order: `(index int32 [a], found bool [a])`.

    `a` is the smaller of `count` and the pool's size; `found` is False beyond the number of real rows.
    """
    n = view.row.shape[0]
    return select_top(key, jnp.zeros(n), view.weight > 0, view.row, min(count, n))


def typical(*, k: int, neighbours: int = 20, anchors: int = 1000) -> Policy:
    """Typical rows far from the labelled ones, chosen one after the other: TypiClust's idea without its clustering.

    A row's typicality is the inverse of its mean distance to its nearest `neighbours` among `anchors` random rows of
    the pool; its novelty is the distance to the nearest row that is labelled or already chosen in this batch. The rule
    picks the row with the largest product. From a cold start the first pick is the most typical row. Embeddings are
    those of the run's first model, scaled to length 1; typicality is computed once, in `begin`. Rows asked for
    without an answer are not asked again and cover nothing.

    Args:
      k: rows a round.
      neighbours: for the typicality; fewer where the pool has fewer rows.
      anchors: how many rows stand for the pool, which keeps the cost linear in its size.

    Returns:
      A `Policy`; its state holds the embedding and typicality of the pool.

    Raises:
      ValueError: for arguments below 1.

    Reference: Hacohen, Dekel, Weinshall: Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets,
    2022.
    """
    for name, value in (("k", k), ("neighbours", neighbours), ("anchors", anchors)):
        require(value >= 1, f"typical: {name} must be at least 1, got {value}")

    def begin(key: Array, view: PoolView) -> PyTree:
        embedding = directions(view)
        anchor, found = stand_ins(key, view, anchors)
        others = embedding[anchor]

        def mean_distance(part: tuple[Array, Array]) -> Array:
            rows, own = part
            distance = jnp.where(found[None], jnp.sqrt(squared_distances(rows, others)), jnp.inf)
            # A row that is itself an anchor must not count as its own neighbour.
            distance = jnp.where(anchor[None] == own[:, None], jnp.inf, distance)
            nearest = -lax.top_k(-distance, min(neighbours, anchor.shape[0]))[0]
            known = jnp.isfinite(nearest)
            return jnp.where(known, nearest, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1)

        mean = in_chunks(mean_distance, (embedding, jnp.arange(embedding.shape[0])), 4096)
        return embedding, 1.0 / jnp.maximum(mean, smallest_distance(embedding, view))

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding, typicality = policy_state
        # 2 is the largest distance of unit vectors: before any label all rows are equally new.
        nearest = jnp.minimum(distance_to_labelled(embedding, view), 4.0)
        return spread_in_turn(key, view, k, embedding, nearest, lambda nearest: typicality * jnp.sqrt(nearest))

    return fixed_rule(act, begin, embedding=True)


def smallest_distance(embedding: Array, view: PoolView) -> Array:
    """The distance, `[]`, below which rounding decides: a few ten-thousandths of the rows' spread around the origin."""
    square = jnp.where(view.weight > 0, (embedding**2).sum(-1), 0.0).sum() / jnp.maximum((view.weight > 0).sum(), 1)
    return jnp.where(square > 0, 3e-4 * jnp.sqrt(square), 1.0)


def k_center(*, k: int) -> Policy:
    """Greedy core-set: each pick is the row farthest from all that is labelled or picked.

    The next row is `argmax_i min_{j in labelled and picked} |z_i - z_j|`, so that the largest distance from a row to
    the labelled set is at most twice the smallest possible. Distances are Euclidean, in the embedding of the current
    model. From a cold start the first row is random. Rows asked for without an answer cover nothing.

    Args:
      k: rows a round.

    Returns:
      A `Policy`; the decision's scores are squared distances before the first pick.

    Raises:
      ValueError: for `k` below 1.

    Reference: Sener, Savarese: Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018.
    """
    require(k >= 1, f"k_center: k must be at least 1, got {k}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding = centred(view)
        # No distance is larger: before any label all rows are equally far.
        largest = 4.0 * (embedding**2).sum(-1).max()
        nearest = jnp.minimum(distance_to_labelled(embedding, view), largest)
        return spread_in_turn(key, view, k, embedding, nearest, lambda nearest: nearest)

    return fixed_rule(act, embedding=True)
