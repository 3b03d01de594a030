"""Rules that choose a batch as a whole in plain NumPy, float32 and vectorised over the pool: `(pool) -> picks [k]`."""

from collections.abc import Callable

import numpy as np

from references.scores import Pool, margin, mean_probs, softmax, top, unit_rows

ANCHORS, NEIGHBOURS, ITERATIONS = 1000, 20, 10


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * a @ b.T, 0)


def greedily(pool: Pool, score: Callable[[], np.ndarray], update: Callable[[int], None]) -> np.ndarray:
    left, picks = pool.available.copy(), []
    for _ in range(pool.k):
        picks.append(int(np.where(left, score(), -np.inf).argmax()))
        left[picks[-1]] = False
        update(picks[-1])
    return np.asarray(picks)


def k_center(pool: Pool) -> np.ndarray:
    z = pool.embedding
    square = (z**2).sum(-1)
    distance = squared_distances(z, z[pool.labelled]).min(-1)

    def cover(pick: int) -> None:
        np.minimum(distance, np.maximum(square - 2 * (z @ z[pick]) + square[pick], 0), out=distance)

    return greedily(pool, lambda: distance, cover)


class Gradients:
    """Squared distances of the gradients of hypothesised labels, from their factors."""

    def __init__(self, pool: Pool):
        probs, self.z = mean_probs(pool), pool.embedding
        self.error = probs - np.eye(probs.shape[-1], dtype=np.float32)[probs.argmax(-1)]
        self.square = (self.error**2).sum(-1) * (self.z**2).sum(-1)

    def distance(self, pick: int) -> np.ndarray:
        """Of one row to all."""
        product = (self.error @ self.error[pick]) * (self.z @ self.z[pick])
        total = self.square + self.square[pick]
        between = total - 2 * product
        return np.where(between > 2e-6 * total, between, 0)

    def to_labelled(self, pool: Pool) -> np.ndarray:
        """Of all rows to the nearest labelled one."""
        return np.min([self.distance(i) for i in pool.labelled], axis=0)


def badge(pool: Pool) -> np.ndarray:
    gradients, rng = Gradients(pool), np.random.default_rng(0)
    distance, left, picks = gradients.to_labelled(pool), pool.available.copy(), []
    for _ in range(pool.k):
        mass = np.cumsum(np.where(left, distance, 0), dtype=np.float64)
        picks.append(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")))
        left[picks[-1]] = False
        np.minimum(distance, gradients.distance(picks[-1]), out=distance)
    return np.asarray(picks)


def log_prob_of_badge(pool: Pool, picks: np.ndarray) -> float:
    """Log-probability of drawing these rows in this order: what a sampled answer can be checked by."""
    gradients = Gradients(pool)
    distance, left, total = gradients.to_labelled(pool), pool.available.copy(), 0.0
    for pick in picks:
        chance = np.where(left, distance, 0).astype(np.float64)
        total += np.log(chance[pick] / chance.sum())
        left[pick] = False
        distance = np.minimum(distance, gradients.distance(pick))
    return total


def glister(pool: Pool) -> np.ndarray:
    probs, z = mean_probs(pool), pool.embedding
    one = np.eye(probs.shape[-1], dtype=np.float32)
    step, judges = one[probs.argmax(-1)] - probs, z[pool.labelled]
    logits = np.log(probs[pool.labelled])

    def score() -> np.ndarray:
        residual = (one[pool.y] - softmax(logits)) / len(judges)
        return (step * (z @ (residual.T @ judges).T + residual.sum(0))).sum(-1)

    def update(pick: int) -> None:
        logits[:] += 0.05 * (judges @ z[pick] + 1)[:, None] * step[pick]

    return greedily(pool, score, update)


def balanced_margin(pool: Pool) -> np.ndarray:
    scores, predicted, left = margin(pool), mean_probs(pool).argmax(-1), pool.available.copy()
    counts = np.bincount(pool.y, minlength=pool.logits.shape[-1])

    def score() -> np.ndarray:
        own = counts[predicted]
        return np.where(own == own[left].min(), scores, -np.inf)

    def update(pick: int) -> None:
        left[pick] = False
        counts[predicted[pick]] += 1

    return greedily(pool, score, update)


def diverse_margin(pool: Pool) -> np.ndarray:
    z, scores = pool.embedding, margin(pool)
    scores = (scores - scores[pool.available].min()) / np.ptp(scores[pool.available])
    taken = len(pool.labelled)
    nearest = np.sqrt(squared_distances(z, z[pool.labelled])).min(-1)

    def value() -> np.ndarray:
        share = 1 - taken / len(z)
        return share * (1 - 1 / (1 + nearest)) + (1 - share) * scores

    def cover(pick: int) -> None:
        nonlocal taken
        taken += 1
        np.minimum(nearest, np.sqrt(((z - z[pick]) ** 2).sum(-1)), out=nearest)

    return greedily(pool, value, cover)


def typicality(z: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The inverse of the mean distance to the nearest others; a row that is among them does not count."""
    found = np.empty(len(z), np.float32)
    for at in range(0, len(z), 5000):
        distance = squared_distances(z[at : at + 5000], others)
        distance[distance < 1e-5] = np.inf
        found[at : at + 5000] = np.sqrt(np.partition(distance, NEIGHBOURS, axis=-1)[:, :NEIGHBOURS]).mean(-1)
    return 1 / np.maximum(found, 1e-6)


def random_rows(z: np.ndarray) -> np.ndarray:
    return z[np.random.default_rng(1).permutation(len(z))[:ANCHORS]]


def typical(pool: Pool) -> np.ndarray:
    z = unit_rows(pool.embedding)
    worth = typicality(z, random_rows(z))
    novelty = np.sqrt(squared_distances(z, z[pool.labelled])).min(-1)

    def cover(pick: int) -> None:
        np.minimum(novelty, np.sqrt(np.maximum(2 - 2 * (z @ z[pick]), 0)), out=novelty)

    return greedily(pool, lambda: worth * novelty, cover)


def kmeans(z: np.ndarray, clusters: int, fixed: np.ndarray, iterations: int = ITERATIONS) -> tuple:
    """Centres, with the fixed ones behind them, and the nearest centre of each row."""
    rng = np.random.default_rng(0)
    rows = z[rng.permutation(len(z))[: max(4096, 16 * clusters)]]
    centres, distance = [], squared_distances(rows, fixed).min(-1) if len(fixed) else np.ones(len(rows), np.float32)
    for _ in range(clusters):
        mass = np.cumsum(distance, dtype=np.float64)
        centres.append(rows[np.searchsorted(mass, rng.random() * mass[-1], side="right")])
        mine = squared_distances(rows, centres[-1][None])[:, 0]
        distance = np.minimum(distance, mine) if len(centres) > 1 or len(fixed) else mine
    centres = np.concatenate([np.asarray(centres), fixed]) if len(fixed) else np.asarray(centres)
    for turn in range(iterations + 1):
        nearest = np.concatenate([
            (part @ centres.T - 0.5 * (centres**2).sum(-1)).argmax(-1) for part in np.array_split(z, len(z) // 5000 + 1)
        ])  # fmt: skip
        if turn < iterations:
            size = np.bincount(nearest, minlength=len(centres))
            total = np.stack([np.bincount(nearest, column, len(centres)) for column in z.T], axis=1)
            move = (size > 0) & (np.arange(len(centres)) < clusters)
            centres[move] = total[move] / size[move, None]
    return centres, nearest


def k_means(pool: Pool) -> np.ndarray:
    z = pool.embedding - pool.embedding.mean(0)
    centres, nearest = kmeans(z, pool.k, z[pool.labelled])
    order = np.argsort(-np.bincount(nearest, minlength=len(centres))[: pool.k])
    distance, turns = squared_distances(centres[order], z), iter(range(pool.k))
    return greedily(pool, lambda: -distance[next(turns)], lambda pick: None)


def typiclust(pool: Pool) -> np.ndarray:
    z = unit_rows(pool.embedding)
    clusters = len(pool.labelled) + pool.k
    _, nearest = kmeans(z, clusters, z[:0])
    size = np.bincount(nearest, minlength=clusters)
    known = np.bincount(nearest[pool.labelled], minlength=clusters)
    picks: list[int] = []
    left = pool.available.copy()
    for _ in range(pool.k):
        free = np.bincount(nearest[left], minlength=clusters) > 0
        cluster = np.where(free & (known == known[free].min()), size, -1).argmax()
        rows = np.flatnonzero(nearest == cluster)
        distance = squared_distances(z[rows], z[rows])
        np.fill_diagonal(distance, 0)
        near = min(NEIGHBOURS, len(rows) - 1)
        mean = np.sqrt(np.partition(distance, near, axis=-1)[:, : near + 1]).sum(-1) / max(near, 1)
        picks.append(int(rows[np.where(left[rows], -mean, -np.inf).argmax()]))
        left[picks[-1]] = False
        known[cluster] += 1
    return np.asarray(picks)


def cluster_margin(pool: Pool) -> np.ndarray:
    scores = margin(pool)
    _, nearest = kmeans(pool.embedding - pool.embedding.mean(0), pool.k, pool.embedding[:0])
    order = np.lexsort((-scores, nearest))
    order = order[pool.available[order]]
    size = np.bincount(nearest[order], minlength=pool.k)
    lap = np.arange(len(order)) - (np.cumsum(size) - size)[nearest[order]]
    return order[np.lexsort((size[nearest[order]], lap))[: pool.k]]


def cover_greedily(pool: Pool, similarity: np.ndarray) -> np.ndarray:
    """Facility location with similarities `[n, anchors]`."""
    covered = similarity[pool.labelled].max(0)

    def cover(pick: int) -> None:
        np.maximum(covered, similarity[pick], out=covered)

    return greedily(pool, lambda: np.maximum(similarity - covered, 0).sum(-1), cover)


def k_medoids(pool: Pool) -> np.ndarray:
    distance = np.sqrt(squared_distances(pool.embedding, random_rows(pool.embedding)))
    picks = cover_greedily(pool, -distance)
    for _ in range(2):
        nearest = distance[picks].argmin(0)
        own = distance[picks].min(0) < distance[pool.labelled].min(0)
        for turn in range(pool.k):
            free = pool.available.copy()
            free[np.delete(picks, turn)] = False
            cost = np.where(free, distance[:, own & (nearest == turn)].sum(-1), np.inf)
            if cost.min() < cost[picks[turn]]:
                picks[turn] = cost.argmin()
    return picks


def kernel(a: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    among = np.sort(squared_distances(anchors, anchors), axis=-1)
    return np.exp(-squared_distances(a, anchors) / np.median(among[:, 1 + (len(among) - 2) // 10]))


def max_herding(pool: Pool) -> np.ndarray:
    z = unit_rows(pool.embedding)
    return cover_greedily(pool, kernel(z, random_rows(z)))


def uncertain_herding(pool: Pool) -> np.ndarray:
    z = unit_rows(pool.embedding)
    return cover_greedily(pool, kernel(z, random_rows(z)) * random_rows(1 + margin(pool)))


def pure_radius(pool: Pool) -> float:
    """The largest radius at which 95 % of the anchors' balls hold rows of one cluster of k-means only."""
    z = unit_rows(pool.embedding)
    place = np.random.default_rng(1).permutation(len(z))[:ANCHORS]
    _, nearest = kmeans(z, pool.logits.shape[-1], z[:0], iterations=20)
    others = np.where(nearest[:, None] != nearest[place], squared_distances(z, z[place]), np.inf)
    return min(float(np.sort(np.sqrt(others.min(0)))[int(0.05 * len(place))]), 2.0)


def prob_cover(pool: Pool) -> np.ndarray:
    z = unit_rows(pool.embedding)
    inside = squared_distances(z, random_rows(z)) < pure_radius(pool) ** 2
    return cover_greedily(pool, inside.astype(np.float32))


def newton(features: np.ndarray, weights: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Ten of Newton's steps for a logistic regression of unlabelled against labelled rows of equal total weight."""
    sign = np.where(labelled, -1, 1).astype(np.float32)
    mass = np.where(labelled, 0.5 / labelled.sum(), 0.5 / (~labelled).sum()).astype(np.float32)
    for _ in range(10):
        odds = features @ weights
        probs = 1 / (1 + np.exp(-odds))
        gradient = -features.T @ (mass * sign / (1 + np.exp(sign * odds))) + 0.01 * weights
        curvature = (features * (mass * probs * (1 - probs))[:, None]).T @ features
        move = -np.linalg.solve(curvature + 0.01 * np.eye(len(weights), dtype=np.float32), gradient)
        along = features @ move
        trials = [(mass * np.logaddexp(0, -sign * (odds + s * along))).sum()
                  + 0.005 * ((weights + s * move) ** 2).sum() for s in (1, 0.5, 0.25, 0.125)]  # fmt: skip
        weights = weights + 0.5 ** np.argmin(trials) * move
    return weights


def standardised(embedding: np.ndarray) -> np.ndarray:
    z = embedding - embedding.mean(0)
    return z / np.sqrt((z**2).mean())


def discriminative(pool: Pool, parts: int = 10) -> np.ndarray:
    z = standardised(pool.embedding)
    features = np.concatenate([z, np.ones((len(z), 1), np.float32)], axis=1)
    weights, left, picks = np.zeros(features.shape[1], np.float32), pool.available.copy(), []
    for _ in range(parts):
        weights = newton(features, weights, ~left)
        picks += list(top(pool._replace(available=left, k=-(-pool.k // parts)), features @ weights))
        left[picks] = False
    return np.asarray(picks[: pool.k])


RULES: dict[str, Callable[[Pool], np.ndarray]] = {
    "balanced_margin": balanced_margin,
    "badge": badge,
    "cluster_margin": cluster_margin,
    "discriminative": discriminative,
    "diverse_margin": diverse_margin,
    "glister": glister,
    "k_center": k_center,
    "k_means": k_means,
    "k_medoids": k_medoids,
    "max_herding": max_herding,
    "prob_cover": prob_cover,
    "typical": typical,
    "typiclust": typiclust,
    "uncertain_herding": uncertain_herding,
}
