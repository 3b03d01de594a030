"""When an answer counts as that of the reference: equal scores, equal picks, or picks that are worth as much."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from references.rules import kernel, log_prob_of_badge, pure_radius, squared_distances, typicality
from references.scores import Pool, margin, unit_rows


class Found(NamedTuple):
    """An answer: scores `[n]`, None where there are none to compare, and the rows picked."""

    scores: np.ndarray | None
    picks: np.ndarray


Check = Callable[[Found, Found], str]


def same_scores(pool: Pool, tolerance: float = 1e-3) -> Check:
    """Scores agree, and the picks are worth the same: which of equal rows are picked is chance."""

    def check(found: Found, reference: Found) -> str:
        assert found.scores is not None
        assert reference.scores is not None
        a, b = (np.asarray(each.scores, np.float64)[pool.available] for each in (found, reference))
        worst = np.abs(a - b).max() / np.abs(b).max()
        worth = [np.sort(np.asarray(reference.scores)[each.picks]) for each in (found, reference)]
        apart = np.abs(worth[0] - worth[1]).max() / np.abs(b).max()
        assert max(worst, apart) < tolerance, f"scores differ by {worst:.1e}, those of the picks by {apart:.1e}"
        return f"scores agree to {worst:.0e} of the largest"

    return check


def same_picks(share: float = 0.97) -> Check:
    def check(found: Found, reference: Found) -> str:
        common = len(set(found.picks.tolist()) & set(reference.picks.tolist())) / len(found.picks)
        assert common >= share, f"only {100 * common:.0f} % of the picks agree"
        return f"{100 * common:.0f} % of the picks agree"

    return check


def as_good(value: Callable[[np.ndarray], float], share: float = 0.95) -> Check:
    def check(found: Found, reference: Found) -> str:
        mine, theirs = value(found.picks), value(reference.picks)
        assert mine >= share * theirs, f"the picks are worth {mine:.4g}, those of the reference {theirs:.4g}"
        return f"picks are worth {mine:.4g}, theirs {theirs:.4g}"

    return check


def drawn_rightly(pool: Pool, log_prob: Callable[[], float]) -> Check:
    """The probability that BADGE states for its draws is that of NumPy's replay."""

    def check(found: Found, reference: Found) -> str:
        stated, replayed = log_prob(), log_prob_of_badge(pool, found.picks)
        assert abs(stated - replayed) < 1e-3 * abs(replayed), f"log-probability {stated} is stated, {replayed} is right"
        return f"log-probability of the draws {stated:.2f}, replayed {replayed:.2f}"

    return check


def _to_nearest(pool: Pool, picks: np.ndarray, unit: bool = False) -> np.ndarray:
    """Distance of some rows of the pool to the nearest picked or labelled row."""
    z = unit_rows(pool.embedding) if unit else pool.embedding
    return np.sqrt(squared_distances(_some(z), z[np.concatenate([picks, pool.labelled])]).min(-1))


def _some(z: np.ndarray) -> np.ndarray:
    return z[np.random.default_rng(2).permutation(len(z))[:5000]]


def _mean_typicality(pool: Pool, picks: np.ndarray) -> float:
    z = unit_rows(pool.embedding)
    return float(typicality(z[picks], _some(z)).mean())


def _covered(pool: Pool, picks: np.ndarray) -> np.ndarray:
    z = unit_rows(pool.embedding)
    return kernel(z[np.concatenate([picks, pool.labelled])], _some(z)).max(0)


# What picks are worth where chance has a part in them, larger being better, never negative.
VALUES: dict[str, Callable[[Pool, np.ndarray], float]] = {
    "cluster_margin": lambda pool, picks: float(1 + margin(pool)[picks].mean()),
    "k_means": lambda pool, picks: float(1 / _to_nearest(pool, picks).mean()),
    "k_medoids": lambda pool, picks: float(1 / _to_nearest(pool, picks).mean()),
    "max_herding": lambda pool, picks: float(_covered(pool, picks).mean()),
    "prob_cover": lambda pool, picks: float((_to_nearest(pool, picks, unit=True) < pure_radius(pool)).mean()),
    "typical": _mean_typicality,
    "typiclust": _mean_typicality,
    "uncertain_herding": lambda pool, picks: float((_covered(pool, picks) * _some(1 + margin(pool))).mean()),
}
