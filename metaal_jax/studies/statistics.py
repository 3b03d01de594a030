"""Statistics that all reports share: intervals as result rows, corrected paired tests, ranks."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from metaal_jax.metrics import Interval, interval

_Name = TypeVar("_Name", bound=Hashable)


def numbers(
    values: NDArray[Any] | Interval, middle: str = "mean", of: str = "seeds", digits: int = 5
) -> dict[str, float | int]:
    """Mean, 95 % interval and number of values, as they stand in a result: `{middle, low, high, of}`."""
    low = values if isinstance(values, Interval) else interval(values)
    rounded = {name: round(float(v), digits) for name, v in ((middle, low.mean), ("low", low.low), ("high", low.high))}
    return {**rounded, of: low.seeds}


def shown(values: NDArray[Any]) -> str:
    """A paired difference in points, as tables show it."""
    both = interval(100 * values)
    return f"{both.mean:+.2f} [{both.low:+.2f}, {both.high:+.2f}]"


def shown_plain(values: NDArray[Any], digits: int = 3) -> str:
    """A mean with its interval in the values' own unit, as tables show it."""
    found = interval(values)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def finite(value: float) -> float | None:
    """A number as JSON holds it, None where it is infinite or NaN."""
    return float(value) if np.isfinite(value) else None


def paired_p(difference: NDArray[Any]) -> float:
    """Two-sided p-value of Student's t-test of paired values, by their differences `[seeds]`.

    The limits of the test where the differences do not vary: 0 where all are the same and not zero, which no chance
    explains, and 1 where all are zero. A single pair tells nothing: 1.

    >>> paired_p(np.asarray([0.1, 0.1, 0.1])), paired_p(np.zeros(3)), paired_p(np.asarray([0.1]))
    (0.0, 1.0, 1.0)

    Raises:
      ValueError: without differences, or for one that is NaN or infinite: a seed that failed is no evidence.
    """
    from scipy import stats

    difference = np.asarray(difference, np.float64)
    if difference.ndim != 1 or not difference.size:
        raise ValueError(f"paired_p: give one difference for each seed, got the shape {difference.shape}")
    bad = np.flatnonzero(~np.isfinite(difference))
    if len(bad):
        raise ValueError(
            f"paired_p: differences must be finite, got {difference[bad[0]]} in seed {bad[0]}; run that seed again, or "
            "leave it out on both sides"
        )
    n = len(difference)
    if n == 1 or not difference.any():
        return 1.0
    largest = abs(difference).max()
    scaled = difference / largest  # of any unit: neither squares nor means leave the range of numbers
    spread = scaled.std(ddof=1) / np.sqrt(n)
    if np.ptp(scaled) == 0 or spread == 0:
        return 0.0
    return float(2 * stats.t.sf(abs(scaled.mean()) / spread, n - 1))


def holm(p: Mapping[_Name, float]) -> dict[_Name, float]:
    """P-values corrected by Holm's method for their number: what is at most 0.05 holds with all others at 5 %.

    Raises:
      ValueError: for a value that is no probability.

    Reference: Holm: A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    for name, value in p.items():
        if not 0 <= value <= 1:
            raise ValueError(f"holm: p-values must lie in 0 to 1, got {value} of {name}")
    found, largest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        found[name] = largest
    return found


def ranked(values: NDArray[Any]) -> NDArray[Any]:
    """Ranks along the second axis of `[cases, arms, ...]`, 1 for the largest; equal ones share theirs, NaN is last."""
    from scipy.stats import rankdata

    ranks: NDArray[Any] = rankdata(-np.where(np.isnan(values), -np.inf, values), axis=1)
    return ranks
