"""Rules that cover the pool: each pick adds the most to what the labelled and picked rows stand for."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax.acquisition.clustering import lloyd
from metaal_jax.acquisition.diversity import ROUNDING, centred, directions, stand_ins
from metaal_jax.acquisition.lifts import fixed_rule, pick_in_turn
from metaal_jax.acquisition.uncertainty import entropy, margin, tempered
from metaal_jax.base import Decision, Policy, PoolView, PyTree, require, require_classes
from metaal_jax.rows import row_noise, squared_distances

Uncertainty = Literal["margin", "entropy"]


def cover_greedily(key: Array, view: PoolView, k: int, similarity: Array, covered: Array, found: Array) -> Decision:
    """Picks `argmax_i sum_j max(s_ji - covered_j, 0)` one after the other (facility location).

    A pick changes only the anchors that it covers better than all before it, about one in `t` at the `t`-th pick.
    Only their part of the sums is renewed, so `k` picks cost a few passes over `similarity` instead of `k`.

    Args:
      key: consumed by the tie break.
      view: the pool.
      k: how many, static.
      similarity: `[a, n]` of anchors and rows, or bool.
      covered: `[a]`, similarity of each anchor to the nearest labelled row.
      found: bool `[a]`, False for anchors that do not exist.

    Returns:
      The `Decision`; its scores are the sums before the first pick. Gains are equal that differ by less than a hundred
      thousandth of the largest of them.
    """
    anchors, block = similarity.shape[0], 8

    def replace(total: Array, changed: Array, before: Array, after: Array) -> Array:
        """Takes the changed anchors' gains over `before` out of `total` and puts those over `after` in."""
        (which,) = jnp.nonzero(changed, size=anchors + -anchors % block, fill_value=anchors)
        levels = jnp.stack([before, after], axis=-1)

        def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
            turn, total = state
            # Row by row: XLA sums rows of a matrix ten times slower on a CPU.
            for place in range(block):
                anchor = which[turn * block + place]
                row, level = similarity[anchor].astype(jnp.float32), levels[anchor]
                change = jnp.maximum(row - level[1], 0.0) - jnp.maximum(row - level[0], 0.0)
                total += jnp.where(anchor < anchors, change, 0.0)
            return turn + 1, total

        return lax.while_loop(lambda state: state[0] * block < changed.sum(), step, (jnp.int32(0), total))[1]

    def cover(carry: tuple[Array, Array], position: Array) -> tuple[Array, Array]:
        total, covered = carry
        renewed = jnp.maximum(covered, similarity[:, position].astype(jnp.float32))
        return replace(total, found & (renewed > covered), covered, renewed), renewed

    nothing = jnp.full(anchors, jnp.inf)
    total = replace(jnp.zeros(similarity.shape[1]), found, nothing, covered)
    # Two rows that only cover each other gain the same; rounding must not choose between them, nor between others.
    unit = 1e-5 * jnp.maximum(jnp.where(view.weight > 0, total, 0.0).max(), 1e-30)
    return pick_in_turn(key, view, k, (total, covered), lambda carry: jnp.round(carry[0] / unit) * unit, cover)


def k_medoids(*, k: int, anchors: int = 1000, iterations: int = 2) -> Policy:
    """Rows that, with the labelled ones, are nearest to all others: labelled rows are medoids that stay.

    The picks make `sum_j min_{i in labelled and picked} |z_i - z_j|` over the anchors `j` small: first greedily (the
    BUILD step of PAM), then by Voronoi iterations, in which each pick gives way to the row with the smallest sum of
    distances to the anchors nearest to it. Distances are Euclidean, in the embedding of the current model. From a cold
    start the first pick is the medoid of the anchors.

    Args:
      k: rows a round.
      anchors: how many random real rows stand for the pool, which keeps the cost linear in its size.
      iterations: of exchanging picks; 0 for the greedy picks alone.

    Returns:
      A `Policy`; the decision's scores are what each row alone would take off the sum. It holds `[anchors, n]`.

    Raises:
      ValueError: for `k` or `anchors` below 1 or negative `iterations`.

    Reference: Kaufman, Rousseeuw: Finding Groups in Data, 1990; Park, Jun: A Simple and Fast Algorithm for K-medoids
    Clustering, 2009.
    """
    for name, value in (("k", k), ("anchors", anchors)):
        require(value >= 1, f"k_medoids: {name} must be at least 1, got {value}")
    require(iterations >= 0, f"k_medoids: iterations must be at least 0, got {iterations}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        anchor_key, pick_key, noise_key = jax.random.split(key, 3)
        embedding, noise = centred(view), row_noise(noise_key, view.row)
        anchor, found = stand_ins(anchor_key, view, anchors)
        itself = anchor[:, None] == jnp.arange(embedding.shape[0])[None]
        distance = jnp.where(itself, 0.0, jnp.sqrt(squared_distances(embedding[anchor], embedding)))
        known = jnp.where(view.labelled_index[None] >= 0, distance[:, view.labelled_index], jnp.inf)
        # Before any label the distance to a medoid is the largest there is, and BUILD begins with the smallest sum.
        known = known.min(-1, initial=jnp.where(found[:, None] & (view.weight[None] > 0), distance, 0.0).max())
        decision = cover_greedily(pick_key, view, k, -distance, -known, found)

        def exchange(_: int, index: Array) -> Array:
            mine = jnp.where(decision.valid[None], distance[:, index], jnp.inf)
            cell = jnp.where(found & (mine.min(-1) <= known), mine.argmin(-1), k)

            def add(place: int, cost: Array) -> Array:
                return cost.at[cell[place]].add(distance[place], mode="drop")

            # An anchor belongs to one cell: to add rows costs less than a product with a matrix of zeros and ones.
            cost = lax.fori_loop(0, distance.shape[0], add, jnp.zeros((k, distance.shape[1])))

            def give_way(index: Array, turn: Array) -> tuple[Array, None]:
                free = view.available.at[index].set(False).at[index[turn]].set(True)
                least = jnp.where(free, cost[turn], jnp.inf).min()
                best = jnp.where(free & (cost[turn] == least), noise, -1).argmax().astype(jnp.int32)
                better = decision.valid[turn] & (cost[turn, best] < cost[turn, index[turn]])
                return index.at[turn].set(jnp.where(better, best, index[turn])), None

            return lax.scan(give_way, index, jnp.arange(k))[0]

        index = lax.fori_loop(0, iterations, exchange, decision.index)
        return Decision(index, decision.valid, decision.log_prob, decision.scores)

    return fixed_rule(act, embedding=True)


def pure_radius(
    key: Array, view: PoolView, embedding: Array, anchor: Array, found: Array, classes: int, purity: float | Array
) -> Array:
    """The largest radius at which a share `purity` of the anchors' balls hold rows of one cluster only, float32 `[]`.

    Clusters are those of k-means with `classes` centres. A ball is pure up to the distance of the nearest row of
    another cluster, so the radius is a quantile of that distance.
    """
    real = view.weight > 0
    _, cluster = lloyd(key, embedding, real.astype(jnp.float32), view.row, clusters=classes, iterations=20)
    other = (cluster[anchor][:, None] != cluster[None]) & real[None]
    distance = jnp.where(other, squared_distances(embedding[anchor], embedding), jnp.inf).min(-1)
    number = found.sum()
    impure = jnp.floor((1.0 - purity) * number + 1e-4).astype(jnp.int32)
    ordered = jnp.sort(jnp.where(found, jnp.sqrt(distance), jnp.inf))
    # 2 is the largest distance of unit vectors: with one cluster only all balls are pure. A little less than the
    # distance, or rounding would decide whether the row that sets the radius is inside.
    return 0.9999 * jnp.minimum(ordered[jnp.minimum(impure, number - 1)], 2.0)


def prob_cover(
    *,
    k: int,
    radius: float | Array | None = None,
    classes: int | None = None,
    purity: float | Array = 0.95,
    anchors: int = 1000,
) -> Policy:
    """Greedy maximum coverage: each pick's ball holds the most anchors that no labelled or picked row's ball holds.

    A ball holds the rows nearer than `radius` to its centre, in the embedding of the run's first model scaled to
    length 1, so that useful radii lie between 0 and 2. Without a `radius` it is chosen in `begin`: k-means into
    `classes` clusters gives pseudo-labels, and the radius is the largest at which a share `purity` of the balls hold
    rows of one pseudo-label only. A cold start covers nothing yet. When all anchors are covered, picks are random.
    Inside a compiled program a radius too small for any ball to hold a second row cannot be reported; picks are then
    anchors, at random.

    Args:
      k: rows a round.
      radius: of the balls; may be traced.
      classes: how many pseudo-labels; needed without a radius.
      purity: the share of pure balls, between 0 and 1; may be traced.
      anchors: how many random real rows stand for the pool, which keeps the cost linear in its size.

    Returns:
      A `Policy`; its state is `(embedding, anchors, whether they exist, radius)`. A decision's scores are the numbers
      of anchors covered. It holds `[anchors, n]`.

    Raises:
      ValueError: for `k`, `anchors` or `radius` that are not positive, `purity` outside (0, 1), or neither radius nor
        at least two classes; from `begin` outside a compiled program, where no ball holds a second row.

    Reference: Yehuda, Dekel, Hacohen, Weinshall: Active Learning Through a Covering Lens, 2022.
    """
    for name, value in (("k", k), ("anchors", anchors)):
        require(value >= 1, f"prob_cover: {name} must be at least 1, got {value}")
    require((purity > 0) & (purity < 1), f"prob_cover: purity must be between 0 and 1, got {purity}")
    pseudo_labels = 0 if classes is None else classes
    if radius is None:
        require(pseudo_labels >= 2, f"prob_cover: give a radius or at least 2 classes, got {classes}")
    else:
        require(radius > 0, f"prob_cover: radius must be positive, got {radius}")

    def begin(key: Array, view: PoolView) -> PyTree:
        anchor_key, cluster_key = jax.random.split(key)
        embedding = directions(view)
        anchor, found = stand_ins(anchor_key, view, anchors)
        size = (
            jnp.float32(radius)
            if radius is not None
            else pure_radius(cluster_key, view, embedding, anchor, found, pseudo_labels, purity)
        )
        inside = _inside(embedding, anchor, size) & found[:, None] & (view.weight[None] > 0)
        held = (inside & (anchor[:, None] != jnp.arange(embedding.shape[0])[None])).any()
        require(held, f"prob_cover: no ball of radius {size} holds a second row; give a larger one")
        return embedding, anchor, found, size

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        embedding, anchor, found, size = policy_state
        inside = _inside(embedding, anchor, size)
        covered = (inside[:, view.labelled_index] & (view.labelled_index[None] >= 0)).any(-1)
        return cover_greedily(key, view, k, inside, covered.astype(jnp.float32), found)

    return fixed_rule(act, begin, embedding=True)


def _inside(embedding: Array, anchor: Array, radius: Array) -> Array:
    # The anchor itself is inside, whatever rounding says.
    itself = anchor[:, None] == jnp.arange(embedding.shape[0])[None]
    return itself | (squared_distances(embedding[anchor], embedding) < radius**2)


def max_herding(*, k: int, anchors: int = 1000, bandwidth: float | Array | None = None) -> Policy:
    """Greedy generalised coverage: each pick raises the anchors' largest kernel value to a picked row the most.

    The next row is `argmax_i sum_j max(K_ij - covered_j, 0)` over the anchors `j`, with `K = exp(-|z_i - z_j|^2 / s^2)`
    and `covered_j` the largest `K` of `j` and a labelled or picked row. The embedding is that of the current model,
    scaled to length 1. From a cold start the first pick is where the kernel density is largest.

    Args:
      k: rows a round.
      anchors: how many random real rows stand for the pool, which keeps the cost linear in its size.
      bandwidth: `s`, in units of distance; may be traced. By default `s^2` is the median over the anchors of the 10 %
        quantile of their squared distances to the others, in each round.

    Returns:
      A `Policy`; a decision's scores are the gains. It holds `[anchors, n]`.

    Raises:
      ValueError: for arguments that are not positive.

    Reference: Bae, Noh, Sutherland: Generalized Coverage for More Robust Low-Budget Active Learning, 2024.
    """
    _check_herding("max_herding", k, anchors, bandwidth)

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        return _herd(key, view, k, anchors, bandwidth, jnp.ones(view.row.shape))

    return fixed_rule(act, embedding=True)


def uncertain_herding(
    *,
    k: int,
    anchors: int = 1000,
    bandwidth: float | Array | None = None,
    uncertainty: Uncertainty = "margin",
    temperature: float | Array = 1.0,
    shrink: bool = False,
) -> Policy:
    """Uncertainty herding: `max_herding` in which each anchor counts by how uncertain the model is of it.

    The next row is `argmax_i sum_j w_j max(K_ij - covered_j, 0)`, with anchors `j`, kernel and coverage as in
    `max_herding`. `w_j` is 1 less the difference of the two largest probabilities of the members' consensus, or its
    entropy; it stays the same while a batch is picked. Before any label all anchors count alike, and the rule is
    `max_herding`; where the model is sure of every anchor, picks are random.

    The paper chooses the temperature in every round, by calibration on labels set aside, and the bandwidth by the
    labelled rows; here the temperature is given, and the bandwidth is that of `max_herding` unless it should `shrink`.

    At the defaults this is `policies.learned(models.LinearNetwork(prior=policies.prior(uncertain_cover=1.0)), k=k)`
    without training, save that learned policies keep the anchors and the embedding with which the run began, weigh
    anchors before the first label too, and look at a shortlist of a large pool.

    Args:
      k: rows a round.
      anchors: how many random real rows stand for the pool, which keeps the cost linear in its size.
      bandwidth: `s` of the kernel, in units of distance; may be traced. None as in `max_herding`.
      uncertainty: what anchors count by, "margin" or "entropy".
      temperature: logits are divided by it before anchors are weighed: above 1 for an overconfident model, see
        `tempered`; may be traced.
      shrink: as soon as two labelled rows differ, take the smallest distance between two that do for `s`, in place of
        `bandwidth`. With many labels the kernel gets narrow, and the rule picks the most uncertain rows.

    Returns:
      A `Policy`; a decision's scores are the gains. It holds `[anchors, n]`.

    Raises:
      ValueError: for numbers that are not positive, or another `uncertainty`; in `act` for targets that are no classes.

    Reference: Bae, Oliveira, Sutherland: Uncertainty Herding: One Active Learning Method for All Label Budgets, 2025.
    """
    _check_herding("uncertain_herding", k, anchors, bandwidth)
    if uncertainty not in get_args(Uncertainty):
        raise ValueError(f"uncertain_herding: uncertainty must be one of {get_args(Uncertainty)}, got {uncertainty!r}")
    require(temperature > 0, f"uncertain_herding: temperature must be positive, got {temperature}")
    scorer = tempered(margin if uncertainty == "margin" else entropy, temperature=temperature)
    # What a row scores that the model is sure of: margins come with a minus sign.
    sure = -1.0 if uncertainty == "margin" else 0.0

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        require_classes("uncertain_herding", view)
        interest = jnp.where((view.labelled_index >= 0).any(), scorer(key, view) - sure, 1.0)
        return _herd(key, view, k, anchors, bandwidth, interest, shrink=shrink)

    return fixed_rule(act, logits=True, embedding=True)


def _check_herding(rule: str, k: int, anchors: int, bandwidth: float | Array | None) -> None:
    for name, value in (("k", k), ("anchors", anchors)):
        require(value >= 1, f"{rule}: {name} must be at least 1, got {value}")
    require(bandwidth is None or bandwidth > 0, f"{rule}: bandwidth must be positive, got {bandwidth}")


def _herd(
    key: Array,
    view: PoolView,
    k: int,
    anchors: int,
    bandwidth: float | Array | None,
    interest: Array,
    *,
    shrink: bool = False,
) -> Decision:
    """Max herding on anchors that count by their `interest` `[n]`, which is not negative."""
    anchor_key, pick_key = jax.random.split(key)
    embedding = directions(view)
    anchor, found = stand_ins(anchor_key, view, anchors)
    width = squared_width(embedding[anchor], found) if bandwidth is None else jnp.float32(bandwidth) ** 2
    if shrink:
        smallest = _smallest_distance(embedding[view.labelled_index], view.labelled_index >= 0)
        width = jnp.where(jnp.isfinite(smallest), smallest, width)
    # To weigh an anchor's similarities is to weigh its gains.
    kernel = interest[anchor][:, None] * jnp.exp(-squared_distances(embedding[anchor], embedding) / width)
    covered = jnp.where(view.labelled_index[None] >= 0, kernel[:, view.labelled_index], 0.0).max(-1, initial=0.0)
    return cover_greedily(pick_key, view, k, kernel, covered, found)


def _smallest_distance(rows: Array, present: Array) -> Array:
    """The smallest squared distance other than 0 between two of the present rows, `[]`; inf where there is none."""
    square, distance = (rows**2).sum(-1), squared_distances(rows, rows)
    apart = present[:, None] & present[None] & (distance > ROUNDING * (square[:, None] + square[None]))
    return jnp.where(apart, distance, jnp.inf).min(initial=jnp.inf)


def squared_width(rows: Array, found: Array) -> Array:
    """The median over `rows` of the 10 % quantile of their squared distances to each other, `[]`; 1 where all is 0."""
    number = found.sum()
    distance = jnp.where(found[None] & ~jnp.eye(rows.shape[0], dtype=bool), squared_distances(rows, rows), jnp.inf)
    smallest = -lax.top_k(-distance, max(rows.shape[0] - 2, 0) // 10 + 1)[0]
    tenth = jnp.arange(smallest.shape[1])[None] <= jnp.maximum(number - 2, 0) // 10
    quantile = jnp.where(tenth, smallest, -jnp.inf).max(-1)
    middle = jnp.sort(jnp.where(found, quantile, jnp.inf))[jnp.maximum(number - 1, 0) // 2]
    spread = jnp.where(found, (rows**2).sum(-1), 0.0).sum() / jnp.maximum(number, 1)
    width = jnp.maximum(middle, 1e-6 * spread)
    return jnp.where(jnp.isfinite(middle) & (width > 0), width, 1.0)
