"""Statistics that all reports share: intervals as result rows, labels to a target, corrected paired tests."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

from metaal_jax.metrics import Interval, interval

_Name = TypeVar("_Name", bound=Hashable)


def numbers(
    values: np.ndarray | Interval, middle: str = "mean", of: str = "seeds", digits: int = 5
) -> dict[str, float | int]:
    """Mean, 95 % interval and number of values, as they stand in a result: `{middle, low, high, of}`."""
    low = values if isinstance(values, Interval) else interval(values)
    rounded = {name: round(float(v), digits) for name, v in ((middle, low.mean), ("low", low.low), ("high", low.high))}
    return {**rounded, of: low.seeds}


def shown(values: np.ndarray) -> str:
    """A paired difference in points, as tables show it."""
    both = interval(100 * values)
    return f"{both.mean:+.2f} [{both.low:+.2f}, {both.high:+.2f}]"


def shown_plain(values: np.ndarray, digits: int = 3) -> str:
    """A mean with its interval in the values' own unit, as tables show it."""
    found = interval(values)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def labels_to(labels: np.ndarray, accuracy: np.ndarray, target: float) -> np.ndarray:
    """Labels `[rounds]` at which each curve `[seeds, rounds]` reaches a target first, infinity where it does not."""
    reached = accuracy >= target
    return np.where(reached.any(1), labels[reached.argmax(1)].astype(float), np.inf)


def finite(value: float) -> float | None:
    """A number as JSON holds it, None for infinity."""
    return float(value) if np.isfinite(value) else None


def paired_p(difference: np.ndarray) -> float:
    """Two-sided p-value of a paired t-test by its differences `[seeds]`; 1 where they are all alike."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(difference, 0.0).pvalue) if len(difference) > 1 and np.ptp(difference) > 1e-9 else 1.0


def holm(p: Mapping[_Name, float]) -> dict[_Name, float]:
    """P-values corrected by Holm's method for their number: what is below 0.05 holds with all others at 5 %.

    Reference: Holm: A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    found, largest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        found[name] = float(f"{largest:.3g}")
    return found
