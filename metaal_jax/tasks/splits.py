"""Disjoint parts of a set on the host: of its classes, or of its rows with groups kept together."""

from collections.abc import Sequence

import numpy as np

# After the first assignment groups move or change places: passes over all of them, or over some where there are many.
_PASSES, _MOST = 20, 3000
_PARTNERS = 300  # groups that one is tried to change places with


def split_classes(classes: int, shares: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
    """Disjoint random groups of class numbers of the given sizes, for meta-training, validation and test.

    Args:
      classes: how many classes there are.
      shares: the number of classes of each group.
      seed: another one gives other groups.

    Returns:
      int64 `[shares[i]]` each, in rising order.

    Raises:
      ValueError: for numbers that are no positive integers, or where the groups together need more classes than there
        are.
    """
    _check_integer("split_classes: classes", classes, 1)
    _check_integer("split_classes: seed", seed, 0)
    if not len(shares):
        raise ValueError("split_classes: shares must name at least one group of classes, got none")
    for size in shares:
        _check_integer("split_classes: each of shares", size, 1)
    if sum(shares) > classes:
        raise ValueError(f"groups of {shares} classes need {sum(shares)}, the set has {classes}; ask for fewer")
    order = np.random.default_rng(seed).permutation(classes)
    return [np.sort(part) for part in np.split(order[: sum(shares)], np.cumsum(shares)[:-1])]


def split(
    rows: int,
    parts: Sequence[int] | Sequence[float],
    *,
    groups: Sequence | np.ndarray | None = None,
    y: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Disjoint random parts of the rows of a set: pool, validation and test rows, for example.

    Rows of one patient, speaker or page are alike, and a model that is tested on a patient that it has seen looks
    better than it is. Name the `groups`, and no two parts share one. Sizes are then met as closely as whole groups
    allow: groups go in random order where they are wanted most, though never into a part that is nearer its size
    without them, then move or change places as long as this brings the
    parts closer to their sizes and, with `y`, to the shares of the classes in the whole set.

    Without groups the sizes are exact, and with `y` every part has each class's share of rows but for rounding.

    Args:
      rows: how many rows there are.
      parts: the parts' sizes in rows (integers), or their shares of all rows (floats that add up to 1 at most). What
        they leave over is in no part.
      groups: `[rows]`, integers or strings: which rows belong together.
      y: `[rows]`, integers or strings: classes to be spread evenly.
      seed: another one gives other parts.

    Returns:
      Row numbers in rising order, int64 `[size]` for each part.

    Raises:
      ValueError: for sizes or shares out of range, as many groups or labels as there are not rows, a group that is at
        least twice as large as every part and as what they leave over, or fewer groups than parts.

    Reference: Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, 2011 (the idea of giving each
    example to the part that lacks most).

    >>> import numpy as np
    >>> patient = np.repeat(np.arange(6), 5)  # five images of each of six patients
    >>> pool, test = split(30, (0.7, 0.3), groups=patient)
    >>> len(pool), len(test), set(patient[pool]) & set(patient[test])
    (20, 10, set())
    """
    _check_integer("split: rows", rows, 1)
    _check_integer("split: seed", seed, 0)
    sizes = _sizes(rows, parts)
    classes = np.zeros(rows, np.int64) if y is None else _numbered("y", y, rows)
    rng = np.random.default_rng(seed)
    if groups is None:
        # Each class's rows stand at even distances along a line, which is then cut.
        place = np.empty(rows)
        for label in range(classes.max() + 1):
            own = rng.permutation(np.flatnonzero(classes == label))
            place[own] = (np.arange(len(own)) + rng.uniform()) / len(own)
        order = np.lexsort((rng.uniform(size=rows), place))
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[:-1]]
    group = _numbered("groups", groups, rows)
    counts = np.zeros((group.max() + 1, classes.max() + 1), np.int64)
    np.add.at(counts, (group, classes), 1)
    if len(counts) < len(sizes):
        raise ValueError(f"split: {len(counts)} groups cannot make {len(sizes)} parts; ask for fewer parts")
    rest = rows - sum(sizes)
    largest = int(counts.sum(1).argmax())
    if counts[largest].sum() >= 2 * max(*sizes, rest):
        raise ValueError(
            f"split: group {np.asarray(groups)[group == largest][0]!s} has {counts[largest].sum()} rows, and the "
            f"largest part takes {max(sizes)}; ask for larger parts, or divide the group"
        )
    part = _assigned(counts, np.asarray([*sizes, rest] if rest else sizes), rng)
    for number in range(len(sizes)):
        if not (part == number).any():
            raise ValueError(
                f"split: no group fits part {number} of {sizes[number]} rows, the smallest group has "
                f"{counts.sum(1).min()}; ask for a larger part, or divide the groups"
            )
    return [np.flatnonzero(part[group] == number) for number in range(len(sizes))]


def _assigned(counts: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The part of each group, by its rows of each class `[groups, classes]`.

    The aim is the smallest sum over parts and classes of the squared distance from what the part should have, each
    class weighed by the inverse of its rows so that rare ones count, and the size as much as all classes together.
    """
    rows = counts.sum()
    frequent = counts.sum(0)
    # The last column is the size.
    content = np.column_stack([counts, counts.sum(1)]).astype(float)
    wanted = sizes[:, None] * np.append(frequent, rows) / rows
    weight = np.append(1.0 / (frequent * len(frequent)), 1.0 / rows)
    # A part of half the size of a group, or smaller, is nearer its size when it is empty.
    fits = counts.sum(1)[:, None] < 2 * sizes
    has = np.zeros_like(wanted)
    part = np.full(len(counts), -1)

    def cost(held: np.ndarray) -> np.ndarray:
        return (weight * held**2).sum(-1)

    for one in rng.permutation(len(counts)):
        left = has - wanted
        part[one] = np.where(fits[one], cost(left + content[one]) - cost(left), np.inf).argmin()
        has[part[one]] += content[one]
    many = len(counts) > _PARTNERS
    for _ in range(1 if len(counts) > _MOST else _PASSES):
        moved = False
        for one in rng.permutation(len(counts))[:_MOST]:
            mine, left = part[one], has - wanted
            gain = cost(left + content[one]) - cost(left) + cost(left[mine] - content[one]) - cost(left[mine])
            gain = np.where(fits[one], gain, np.inf)
            gain[mine] = 0.0
            # Or it changes places with a group of another part.
            partner = rng.integers(0, len(counts), _PARTNERS) if many else np.arange(len(counts))
            step, there = content[partner] - content[one], part[partner]
            swap = cost(left[mine] + step) - cost(left[mine]) + cost(left[there] - step) - cost(left[there])
            swap[(there == mine) | ~fits[one, there] | ~fits[partner, mine]] = 0.0
            best = int(swap.argmin())
            if min(gain.min(), swap[best]) > -1e-9 * cost(wanted).max():
                continue
            moved = True
            if gain.min() <= swap[best]:
                has[mine] -= content[one]
                part[one] = int(gain.argmin())
                has[part[one]] += content[one]
            else:
                other = int(partner[best])
                has[mine] += step[best]
                has[part[other]] -= step[best]
                part[one], part[other] = part[other], mine
        if not moved:
            break
    return part


def _sizes(rows: int, parts: Sequence[int] | Sequence[float]) -> list[int]:
    """Sizes in rows; shares are rounded so that their sum is."""
    given = list(parts) if isinstance(parts, Sequence | np.ndarray) and not isinstance(parts, str) else []
    if not given:
        raise ValueError(f"split: parts must be sizes or shares of at least one part, got {parts!r}")
    if all(_is_integer(size) for size in given):
        if min(given) < 1:
            raise ValueError(f"split: the size of a part must be a positive integer, got {min(given)}")
        if sum(given) > rows:
            raise ValueError(f"split: parts of {given} rows need {sum(given)}, the set has {rows}; ask for fewer")
        return [int(size) for size in given]
    for share in given:
        if not isinstance(share, float | np.floating) or not 0 < share <= 1:
            raise ValueError(
                f"split: parts must be all sizes (integers) or all shares of the rows (floats up to 1), got {share!r}"
            )
    if sum(given) > 1 + 1e-9:
        raise ValueError(f"split: shares must add up to 1 at most, got {sum(given):.6g} from {given}")
    bounds = np.rint(rows * np.cumsum(np.asarray(given, np.float64))).astype(int)
    sizes = np.diff(bounds, prepend=0).tolist()
    if min(sizes) < 1:
        raise ValueError(
            f"split: a share of {given[sizes.index(min(sizes))]} of {rows} rows is less than a row; ask for more"
        )
    return sizes


def _numbered(name: str, values: Sequence | np.ndarray, rows: int) -> np.ndarray:
    """Integers or strings numbered from 0 in their order."""
    values = np.asarray(values)
    if values.shape != (rows,):
        raise ValueError(f"split: {name} must be [{rows}], one for each row, got the shape {list(values.shape)}")
    if values.dtype.kind not in "biuSU":
        raise ValueError(
            f"split: {name} must be integers or strings, got {values.dtype}; number them first, as in "
            "np.unique(values, return_inverse=True)[1]"
        )
    return np.unique(values, return_inverse=True)[1]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_integer(name: str, value: int, least: int) -> None:
    if not _is_integer(value) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer from {least}"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
