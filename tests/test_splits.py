"""Splits: disjoint, of the sizes asked for, whole groups, even classes."""

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from metaal_jax import tasks


def check_parts(parts, rows):
    taken = np.concatenate(parts)
    assert len(set(taken.tolist())) == len(taken)
    assert taken.min() >= 0
    assert taken.max() < rows
    assert all((np.diff(part) > 0).all() for part in parts)


def test_split_classes():
    parts = tasks.split_classes(20, (10, 4, 3), seed=1)
    assert [len(part) for part in parts] == [10, 4, 3]
    check_parts(parts, 20)
    again, other = (np.concatenate(tasks.split_classes(20, (10, 4, 3), seed=seed)) for seed in (1, 2))
    np.testing.assert_array_equal(again, np.concatenate(parts))
    assert (other != again).any()


@pytest.mark.parametrize("y", [None, np.repeat([0, 1, 2], [50, 9, 1])], ids=["any", "by class"])
def test_sizes_are_exact_without_groups(y):
    for seed in range(20):
        parts = tasks.split(60, (30, 12, 6), y=y, seed=seed)
        assert [len(part) for part in parts] == [30, 12, 6]
        check_parts(parts, 60)
        if y is not None:
            counts = np.asarray([np.bincount(y[part], minlength=3) for part in parts])
            wanted = np.asarray([[30], [12], [6]]) * np.asarray([50, 9, 1]) / 60
            assert abs(counts - wanted).max() < 2
    assert [len(part) for part in tasks.split(7, (0.5, 0.5))] == [4, 3]
    assert [len(part) for part in tasks.split(100, (0.7, 0.2, 0.1))] == [70, 20, 10]
    firsts = {tuple(tasks.split(60, (30,), y=y, seed=seed)[0]) for seed in range(5)}
    assert len(firsts) == 5
    np.testing.assert_array_equal(*(tasks.split(60, (30,), y=y, seed=3)[0] for _ in range(2)))


@pytest.mark.parametrize("named", ["number", "text"])
def test_no_two_parts_share_a_patient(named):
    """Pool, validation and test rows of patients with very different numbers of images, classes rare and frequent."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 15, 60)
    patient = rng.permutation(np.repeat(np.arange(60) * 7, sizes))
    ill = rng.uniform(size=60 * 7) < 0.2
    y = np.where(ill[patient] & (rng.uniform(size=len(patient)) < 0.6), "ill", "well")
    groups = patient if named == "number" else patient.astype(str)
    rows, shares = len(patient), np.asarray([0.6, 0.15, 0.25])
    firsts = set()
    for seed in range(10):
        parts = tasks.split(rows, tuple(shares.tolist()), groups=groups, y=y, seed=seed)
        check_parts(parts, rows)
        owners = [set(patient[part].tolist()) for part in parts]
        assert len(set.union(*owners)) == sum(map(len, owners))
        assert sum(map(len, parts)) == rows  # the shares leave nothing over
        np.testing.assert_allclose([len(part) for part in parts], shares * rows, atol=2)
        frequency = [(y[part] == "ill").mean() for part in parts]
        np.testing.assert_allclose(frequency, (y == "ill").mean(), atol=0.03)
        firsts.add(tuple(sorted(owners[0])))
    assert len(firsts) == 10


def test_groups_beside_a_rest_that_nobody_asked_for():
    groups = np.repeat(np.arange(12), 5)
    pool, test = tasks.split(60, (20, 10), groups=groups)
    assert (len(pool), len(test)) == (20, 10)
    assert not set(groups[pool]) & set(groups[test])


def test_a_group_that_no_part_takes_can_be_left_over():
    groups = np.repeat(np.arange(8), [40, 5, 5, 5, 5, 5, 5, 5])
    for seed in range(5):
        parts = tasks.split(75, (20, 10), groups=groups, seed=seed)
        assert [len(part) for part in parts] == [20, 10]
        assert not (groups[np.concatenate(parts)] == 0).any()


def test_classes_are_spread_at_least_as_evenly_as_by_scikit_learn():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), rng.integers(1, 12, 60))
    y = rng.choice(4, len(groups), p=[0.4, 0.3, 0.2, 0.1])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, groups)

    def unevenness(parts):
        return max(abs(np.bincount(y[part], minlength=4) - np.bincount(y, minlength=4) / 5).max() for part in parts)

    parts = tasks.split(len(y), (0.2,) * 5, groups=groups, y=y)
    assert unevenness(parts) <= unevenness([test for _, test in folds])


def test_a_few_groups_of_very_different_sizes():
    """They fit in three ways; to find one is more than moves and changes of places promise, to be off by one is not."""
    groups = np.repeat(np.arange(6), [9, 7, 6, 4, 3, 1])
    for seed in range(20):
        parts = tasks.split(30, (15, 15), groups=groups, seed=seed)
        assert max(len(part) for part in parts) <= 16


GROUPS = np.repeat([4, 5, 9], [6, 2, 2])
WRONG = {
    "rows must be a positive integer, got 0": lambda: tasks.split(0, (1,)),
    "rows must be a positive integer, got 3.0": lambda: tasks.split(3.0, (1,)),
    "seed must be an integer from 0, got -1": lambda: tasks.split(3, (1,), seed=-1),
    "parts must be sizes or shares of at least one part": lambda: tasks.split(3, ()),
    "parts must be sizes or shares of at least one part, got 0.5": lambda: tasks.split(3, 0.5),
    "size of a part must be a positive integer, got -1": lambda: tasks.split(3, (2, -1)),
    "size of a part must be a positive integer, got 0": lambda: tasks.split(3, (2, 0)),
    r"parts of \[2, 2\] rows need 4, the set has 3": lambda: tasks.split(3, (2, 2)),
    "all sizes .* or all shares .* got 2": lambda: tasks.split(3, (0.5, 2)),
    "all shares .* got nan": lambda: tasks.split(3, (0.5, float("nan"))),
    "all shares .* got -0.5": lambda: tasks.split(3, (0.5, -0.5)),
    "all shares .* got True": lambda: tasks.split(3, (True,)),
    "shares must add up to 1 at most, got 1.1": lambda: tasks.split(3, (0.6, 0.5)),
    "a share of 0.1 of 3 rows is less than a row": lambda: tasks.split(3, (0.6, 0.1)),
    r"groups must be \[3\], one for each row, got the shape \[2\]": lambda: tasks.split(3, (1,), groups=[1, 2]),
    "groups must be integers or strings, got float64": lambda: tasks.split(2, (1,), groups=[1.0, np.nan]),
    r"y must be \[3\], one for each row": lambda: tasks.split(3, (1,), y=[[1], [2], [3]]),
    "y must be integers or strings, got float64": lambda: tasks.split(2, (1,), y=[0.5, 1.5]),
    "group 4 has 6 rows, and the largest part takes 3": lambda: tasks.split(10, (0.3, 0.3, 0.3), groups=GROUPS),
    "3 groups cannot make 4 parts": lambda: tasks.split(10, (6, 1, 1, 1), groups=GROUPS),
    "no group fits part 1 of 1 rows, the smallest group has 10": lambda: tasks.split(
        20, (19, 1), groups=np.repeat([0, 1], 10)
    ),
    "split_classes: classes must be a positive integer, got 0": lambda: tasks.split_classes(0, (1,)),
    "each of shares must be a positive integer, got -4": lambda: tasks.split_classes(20, (10, -4)),
    "each of shares must be a positive integer, got 0.5": lambda: tasks.split_classes(20, (0.5, 0.3)),
    "at least one group of classes": lambda: tasks.split_classes(20, ()),
    "need 21, the set has 20": lambda: tasks.split_classes(20, (20, 1)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
