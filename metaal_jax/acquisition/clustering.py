"""k-means and the rules that cluster the pool."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.diversity import centred, directions, smallest_distance
from metaal_jax.acquisition.lifts import (
    Scorer,
    check_count,
    fill_up,
    fixed_rule,
    pick_in_turn,
    require_scorer,
    scored,
    select_top,
)
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require
from metaal_jax.rows import finite_rows, middle, place_in_group, row_noise, squared_distances


def draw(key: Array, weight: Array) -> Array:
    """One position, int32 `[]`, drawn with probability proportional to `weight` `[n]`; any of all where all are 0.

    By cumulative sums, first over blocks of rows and then within one: one random number a draw instead of one a row.
    """
    n, width = weight.shape[0], 256
    weight = jnp.where(weight.max() > 0, weight, 1.0)
    blocks = jnp.pad(weight, (0, -n % width)).reshape(-1, width)
    total = blocks.sum(-1).cumsum()
    point = jax.random.uniform(key) * total[-1]
    # Rounding must not lead into a block or to a row of weight 0: count only up to the last that has some.
    block = jnp.minimum((total <= point).sum(), (total < total[-1]).sum())
    within = blocks[block].cumsum()
    point = jnp.clip(point - jnp.where(block > 0, total[block - 1], 0.0), 0.0)
    place = jnp.minimum((within <= point).sum(), (within < within[-1]).sum())
    return (block * width + place).astype(jnp.int32)


def nearest(x: Array, centres: Array, used: Array) -> Array:
    """The nearest of `centres` `[c, d]` that are `used` (bool `[c]`) for each row of `x` `[n, d]`, int32 `[n]`."""
    number = jnp.arange(centres.shape[0], dtype=jnp.int32)
    half = jnp.where(used, 0.5 * (centres**2).sum(-1), jnp.inf)

    def one(row: Array) -> Array:
        closeness = centres @ row - half
        # The smallest number among the largest: argmax is three times slower on a CPU.
        return jnp.where(closeness == closeness.max(), number, number.size - 1).min()

    # Chunks stay in the cache, and no [n, c] array is made.
    return jax.vmap(one)(x) if x.shape[0] <= 2048 else lax.map(one, x, batch_size=2048)


def lloyd(
    key: Array,
    x: Array,
    weight: Array,
    row: Array,
    *,
    clusters: int,
    iterations: int,
    count: Array | None = None,
    fixed: Array | None = None,
    fixed_used: Array | None = None,
) -> tuple[Array, Array]:
    """Lloyd's algorithm from k-means++ starts, with centres that do not move beside those that do.

    Starts are drawn with probability proportional to `weight` times the squared distance to the nearest start or fixed
    centre, among at most `max(4096, 8 clusters)` random rows. A cluster that has become empty keeps its centre.
    Centres are moved by at most `max(8192, 8 clusters)` random rows; then all rows are assigned.

    Args:
      key: consumed.
      x: `[n, d]`.
      weight: `[n]`, not negative; 0 for rows that move no centre, as all rows do that are not finite.
      row: int32 `[n]`, row numbers that the random choices belong to.
      clusters: number of moving centres, static.
      iterations: of Lloyd's algorithm, static.
      count: int32 `[]`, how many moving centres are used; all by default.
      fixed: `[f, d]`, centres that do not move.
      fixed_used: bool `[f]`, False for those that do not exist.

    Returns:
      `(centres [clusters, d], assignment int32 [n])`; numbers from `clusters` on mean fixed centres.

    Reference: Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding, 2007.
    """
    n, d = x.shape
    sound = finite_rows(x)
    weight = jnp.where(sound, weight, 0.0)
    # Seen from amid the rows, distances lose less to rounding.
    centre = middle(jnp.where(sound[:, None], x, 0.0), weight > 0, row)
    x = jnp.where(sound[:, None], x - centre[None], 0.0)
    fixed = jnp.zeros((0, d)) if fixed is None else fixed - centre[None]
    fixed_used = jnp.ones(fixed.shape[0], bool) if fixed_used is None else fixed_used
    fixed = jnp.where(fixed_used[:, None], fixed, 0.0)
    used = jnp.ones(clusters, bool) if count is None else jnp.arange(clusters) < count
    used = jnp.concatenate([used, fixed_used])

    sample_key, start_key = jax.random.split(key)
    # The sample's order comes from noise that belongs to rows, so the draws do not depend on the order of the pool.
    begins, moves = min(n, max(4096, 8 * clusters)), min(n, max(8192, 8 * clusters))
    sample, found = select_top(sample_key, jnp.zeros(n), weight > 0, row, moves)
    rows, mass = x[sample[:begins]], jnp.where(found, weight[sample], 0.0)[:begins]
    square = (rows**2).sum(-1)
    distance = jnp.where(fixed_used[None], squared_distances(rows, fixed), jnp.inf).min(-1, initial=jnp.inf)

    def start(distance: Array, key: Array) -> tuple[Array, Array]:
        chance = mass * jnp.where(jnp.isinf(distance), 1.0, distance)
        place = draw(key, jnp.where(chance.max() > 0, chance, mass))
        mine = square - 2.0 * (rows @ rows[place]) + square[place]
        return jnp.minimum(distance, jnp.maximum(mine, 0.0)), rows[place]

    _, centres = lax.scan(start, distance, jax.random.split(start_key, clusters))
    moving, load = (x, weight) if moves == n else (x[sample], jnp.where(found, weight[sample], 0.0))

    def improve(_: int, centres: Array) -> Array:
        assignment = nearest(moving, jnp.concatenate([centres, fixed]), used)
        total = jax.ops.segment_sum(load[:, None] * moving, assignment, used.size)[:clusters]
        size = jax.ops.segment_sum(load, assignment, used.size)[:clusters, None]
        return jnp.where(size > 0, total / jnp.where(size > 0, size, 1.0), centres)

    centres = lax.fori_loop(0, iterations, improve, centres)
    return centres + centre[None], nearest(x, jnp.concatenate([centres, fixed]), used)


def k_means(*, k: int, iterations: int = 10, scorer: Scorer | None = None) -> Policy:
    """The rows nearest to the centres of `k` clusters; labelled rows are centres of clusters of their own.

    Lloyd's algorithm moves `k` centres over the embedding of the current model, beside the labelled rows, which are
    centres that do not move: what they cover attracts no new centre. Then each moving centre, that of the largest
    cluster first, takes the nearest row that is left. With a `scorer` rows weigh as much as their scores, negative
    ones nothing, so that the clusters lie where the model is unsure. From a cold start it is plain k-means.

    Args:
      k: rows a round.
      iterations: of Lloyd's algorithm.
      scorer: weights of the rows, such as `entropy`; equal by default.

    Returns:
      A `Policy`; the decision's scores are minus the squared distance to the nearest moving centre.

    Raises:
      ValueError: for arguments below 1.

    Reference: Bodó, Minier, Csató: Active Learning with Clustering, 2011; Zhdanov: Diverse Mini-Batch Active Learning,
    2019.
    """
    if scorer is not None:
        require_scorer("k_means", scorer)
    for name, value in (("k", k), ("iterations", iterations)):
        require(value >= 1, f"k_means: {name} must be at least 1, got {value}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        cluster_key, score_key, pick_key = jax.random.split(key, 3)
        embedding = centred(view)
        real = (view.weight > 0).astype(jnp.float32)
        weight = real
        if scorer is not None:
            scores = scorer(score_key, view)
            weight = jnp.where((real > 0) & (scores > 0), scores, 0.0)
            weight = jnp.where(weight.max() > 0, weight, real)
        centres, assignment = lloyd(
            cluster_key,
            embedding,
            weight,
            view.row,
            clusters=k,
            iterations=iterations,
            fixed=embedding[view.labelled_index],
            fixed_used=view.labelled_index >= 0,
        )
        size = jax.ops.segment_sum(weight, assignment, k + view.labelled_index.size)[:k]
        distance = squared_distances(centres[jnp.argsort(-size)], embedding)
        decision = pick_in_turn(
            pick_key, view, k, jnp.int32(0), lambda turn: -distance[turn], lambda turn, position: turn + 1
        )
        return Decision(decision.index, decision.valid, decision.log_prob, scores=-distance.min(0))

    return fixed_rule(act, embedding=True)


def typiclust(
    *, k: int, neighbours: int = 20, clusters: int = 500, smallest: int = 6, iterations: int = 10, considered: int = 500
) -> Policy:
    """The most typical row of each of the largest clusters that hold no labelled row.

    In each round k-means cuts the current model's embedding, scaled to length 1, into `min(labelled + k, clusters)`
    clusters. Picks come in turn from the cluster with the fewest labelled rows, among those the largest, leaving out
    clusters of fewer than `smallest` rows while there are others (the authors' code does), and are its most typical
    rows: typicality is the inverse of the mean distance to the nearest `neighbours` in the cluster. From
    a cold start the pool has `k` clusters, one for each pick.

    Args:
      k: rows a round.
      neighbours: for the typicality; fewer in smaller clusters.
      clusters: the largest number of clusters.
      smallest: rows of a cluster below which it holds but outliers; 1 to leave none out.
      iterations: of Lloyd's algorithm.
      considered: of a cluster that is larger than this and than `k`, so many random rows stand for it.

    Returns:
      A `Policy`; the decision's scores are the typicality in the first cluster, 0 elsewhere.

    Raises:
      ValueError: for arguments below 1.

    Reference: Hacohen, Dekel, Weinshall: Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets,
    2022.
    """
    given = {"k": k, "neighbours": neighbours, "clusters": clusters, "smallest": smallest, "iterations": iterations,
             "considered": considered}  # fmt: skip
    for name, value in given.items():
        require(value >= 1, f"typiclust: {name} must be at least 1, got {value}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        cluster_key, order_key, pick_key = jax.random.split(key, 3)
        embedding = directions(view)
        n, real, least = embedding.shape[0], view.weight > 0, smallest_distance(embedding, view)
        labelled = view.labelled_index >= 0
        most = min(labelled.size + k, clusters, n)
        _, assignment = lloyd(
            cluster_key,
            embedding,
            real.astype(jnp.float32),
            view.row,
            clusters=most,
            iterations=iterations,
            count=jnp.minimum(labelled.sum() + k, most),
        )
        assignment = jnp.where(real, assignment, most)  # padding lies beyond all clusters

        def per_cluster(what: Array, assignment: Array) -> Array:
            return jax.ops.segment_sum(what.astype(jnp.int32), assignment, most + 1)[:most]

        size, left = per_cluster(real, assignment), per_cluster(view.available, assignment)
        known = per_cluster(labelled, jnp.where(labelled, assignment[view.labelled_index], most))
        # Clusters lie one after the other, rows that may be asked for before the others, otherwise in random order.
        members = min(n, max(considered, k))
        order = jnp.lexsort((row_noise(order_key, view.row), ~view.available, assignment))
        order = jnp.pad(order, (0, members))
        first = jnp.cumsum(size) - size

        def typicality(carry: tuple[Array, Array]) -> Array:
            known, left = carry
            large = (left > 0) & (size >= smallest)
            eligible = jnp.where(large.any(), large, left > 0)
            fewest = jnp.where(eligible, known, n + 1).min()
            cluster = jnp.where(eligible & (known == fewest), size, -1).argmax()
            position = lax.dynamic_slice(order, (first[cluster],), (members,))
            inside = jnp.arange(members) < size[cluster]
            rows = embedding[position]
            distance = jnp.where(inside[None] & ~jnp.eye(members, dtype=bool), squared_distances(rows, rows), jnp.inf)
            close = -lax.top_k(-distance, min(neighbours, members))[0]
            there = jnp.isfinite(close)
            mean = jnp.sqrt(jnp.where(there, close, 0.0)).sum(-1) / jnp.maximum(there.sum(-1), 1)
            return jnp.zeros(n).at[jnp.where(inside, position, n)].set(1.0 / jnp.maximum(mean, least), mode="drop")

        def count(carry: tuple[Array, Array], position: Array) -> tuple[Array, Array]:
            known, left = carry
            return known.at[assignment[position]].add(1), left.at[assignment[position]].add(-1)

        return pick_in_turn(pick_key, view, k, (known, left), typicality, count)

    return fixed_rule(act, embedding=True)


def cluster_balanced(scorer: Scorer, *, k: int, clusters: int | None = None, iterations: int = 10) -> Policy:
    """The best-scored rows of all clusters in turn: a batch version of any scorer.

    k-means cuts the embedding of the run's first model into clusters, once, in `begin`. Each round goes round the
    clusters from the smallest up (by the rows that may still be asked for) and takes the best-scored row of each,
    until there are `k`. Clusters without rows are passed over. Labelled rows only count through the scorer: a cold
    start is like any other round. The paper's Cluster-Margin first keeps the rows of smallest margin and goes round the
    clusters of those alone; here all rows take part, and the score decides inside the cluster only.

    Args:
      scorer: higher = sooner.
      k: rows a round.
      clusters: how many; `k` by default.
      iterations: of Lloyd's algorithm.

    Returns:
      A `Policy`; its state holds the cluster of each row.

    Raises:
      ValueError: for arguments below 1.

    Reference: Citovsky, DeSalvo, Gentile, Karydas, Rajagopalan, Rostamizadeh, Kumar: Batch Active Learning at Scale,
    2021.
    """
    require_scorer("cluster_balanced", scorer)
    for name, value in (("k", k), ("clusters", k if clusters is None else clusters), ("iterations", iterations)):
        require(value >= 1, f"cluster_balanced: {name} must be at least 1, got {value}")

    def begin(key: Array, view: PoolView) -> PyTree:
        embedding, weight = centred(view), (view.weight > 0).astype(jnp.float32)
        number = min(k if clusters is None else clusters, embedding.shape[0])
        return lloyd(key, embedding, weight, view.row, clusters=number, iterations=iterations)[1]

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        n = view.row.shape[0]
        check_count(k, n)
        score_key, tie_key = jax.random.split(key)
        scores, view, rest = scored(score_key, scorer, view)
        assignment = jnp.where(view.available, policy_state, n)
        size = jax.ops.segment_sum(jnp.ones(n, jnp.int32), assignment, n + 1)
        noise = row_noise(tie_key, view.row)
        lap = place_in_group(assignment, scores, noise, groups=n + 1)
        index = jnp.lexsort((noise, size[assignment], lap, ~view.available))[:k].astype(jnp.int32)
        decision = Decision(index=index, valid=view.available[index], log_prob=jnp.zeros(()), scores=scores)
        return fill_up(decision, rest, view.row)

    return fixed_rule(act, begin, embedding=True)
