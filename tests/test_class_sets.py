"""A person's own tasks: checked, indexed, and drawn from one at a time."""

import jax
import numpy as np
import pytest

from metaal_jax import tasks

DRAW = np.random.default_rng(0)


def rows(count, columns=3):
    return DRAW.normal(size=(count, columns)).astype(np.float32)


def marked(sizes):
    """Sets of these numbers of rows a class; a row holds its set, its class there and its place."""
    made = []
    for number, counts in enumerate(sizes):
        y = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        x = np.stack([np.full(len(y), number), y, np.arange(len(y))], 1).astype(np.float32)
        made.append(tasks.LabelledSet(number, x, y))
    return jax.device_put(tasks.class_sets(made))


SIZES = [(6, 9), (7, 8, 6), (20, 6, 6, 6)]


def drawn(sampler, count=200):
    data = marked(SIZES)
    return jax.device_get(jax.jit(jax.vmap(lambda key: sampler(key, data)))(jax.random.split(jax.random.key(0), count)))


@pytest.mark.parametrize(
    "sampler",
    [tasks.few_shot(ways=3, shots=2, queries=3), tasks.growing(ways=3, labels=6, queries=3, smallest=3)],
    ids=["few_shot", "growing"],
)
def test_a_task_is_of_one_set(sampler):
    task = drawn(sampler)
    which, seen = [], {0: set(), 1: set(), 2: set()}
    for t in range(len(task.query.y)):
        parts = [jax.tree.map(lambda leaf: leaf[t], part) for part in task]  # noqa: B023
        real = np.concatenate([part.x[part.weight > 0] for part in parts])
        y = np.concatenate([part.y[part.weight > 0] for part in parts])
        assert len({tuple(row) for row in real.tolist()}) == len(real)  # no row twice
        (number,) = set(real[:, 0].astype(int))
        which.append(number)
        pairs = set(zip(y.tolist(), real[:, 1].astype(int).tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({own for _, own in pairs})  # one to one
        assert {label for label, _ in pairs} <= set(range(min(3, len(SIZES[number]))))
        seen[number] |= pairs
    assert min(np.bincount(which)) > 40  # evenly, not by size
    assert len(seen[2]) == 12  # every class of four as every label of three


def test_shots_are_drawn_once_a_task():
    task = drawn(tasks.few_shot(ways=2, shots=4, queries=2, smallest=2))
    shots = task.support.weight.reshape(-1, 2, 4)
    assert (np.sort(shots)[..., ::-1] == shots).all()  # the first ones
    assert (shots.sum(-1)[:, 0] == shots.sum(-1)[:, 1]).all()
    assert set(shots.sum(-1).ravel()) == {2.0, 3.0, 4.0}
    assert (task.query.weight == 1).all()  # the smallest class has six rows


@pytest.mark.parametrize(
    ("smallest", "said"), [(3, "at most the 2 shots, got 3"), (0, "positive integer, got 0"), (1.5, "got 1.5")]
)
def test_smallest_is_checked(smallest, said):
    with pytest.raises(ValueError, match=said):
        tasks.few_shot(ways=2, shots=2, queries=1, smallest=smallest)


def test_more_ways_than_any_set_has():
    with pytest.raises(ValueError, match="5 ways wanted, the set has 4 classes"):
        tasks.few_shot(ways=5, shots=1, queries=1)(jax.random.key(0), marked(SIZES))


def test_turned_classes_are_of_one_set_too():
    x = rows(24, 16).reshape(24, 4, 4)
    sets = [tasks.LabelledSet(0, x[:12], np.repeat(np.arange(2), 6)), tasks.LabelledSet(1, x[12:], np.arange(12) % 3)]
    data = jax.device_put(tasks.class_sets(sets))
    sampler = tasks.few_shot(ways=8, shots=1, queries=1, rotations=True)
    task = jax.jit(jax.vmap(lambda key: sampler(key, data)))(jax.random.split(jax.random.key(0), 50))
    assert set(task.support.weight.sum(-1).tolist()) == {8.0}  # two classes have eight turns, three have more


def test_problems_are_of_one_set():
    data = marked(SIZES)
    for sampler, given in (
        (tasks.problems(pool=4, test=2), tasks.ProblemData(data, data)),
        (tasks.composed_problems(ways=2, pool=4, test=2, parts=1), data),
    ):
        with pytest.raises(ValueError, match="the classes are of 3 sets, and a problem is of one"):
            sampler(jax.random.key(0), given)


LABELS = [["a", "b"], [3, -7], [True, False], [("x", 1), ("x", 2)], [1.5, 2.5], [frozenset("a"), frozenset("b")]]


@pytest.mark.parametrize("pair", LABELS, ids=str)
def test_labels_of_any_hashable_kind(pair):
    for y in (pair * 3, np.asarray(pair * 3) if isinstance(pair[0], str | int | float) else pair * 3):
        found = tasks.labelled_sets([(rows(6), y)])
        assert found.sets[0].y.tolist() == [0, 1] * 3
        assert not found.left_out


def test_groups_are_a_list_of_tasks():
    x, y = rows(12), ["a", "b"] * 6
    groups = ["p", "q", "q", "p"] * 3
    found = tasks.labelled_sets((x, y), groups)
    assert [one.name for one in found.sets] == ["p", "q"]
    for one in found.sets:
        mine = [row for row, group in enumerate(groups) if group == one.name]
        np.testing.assert_array_equal(one.x, x[mine])
        alike = tasks.labelled_sets([(x[mine], [y[row] for row in mine])]).sets[0]
        np.testing.assert_array_equal(one.y, alike.y)


def test_what_is_too_small_is_left_out_by_name():
    given = [
        (rows(7), ["a"] * 3 + ["b"] * 3 + ["c"]),
        (rows(4), ["a"] * 3 + ["b"]),
        (rows(3), ["a"] * 3),
    ]
    found = tasks.labelled_sets(given, rows=3)
    assert [(one.name, len(one.x), sorted(set(one.y.tolist()))) for one in found.sets] == [(0, 6, [0, 1])]
    assert found.left_out == (
        "task 0: class 'c' has 1 row of the 3 that a class needs",
        "task 1: class 'b' has 1 row of the 3 that a class needs",
        "task 1: left out, 1 class of the 2 that a task needs",
        "task 2: left out, 1 class of the 2 that a task needs",
    )


X, Y = rows(6), ["a", "b"] * 3
BROKEN = np.where(np.arange(18).reshape(6, 3) == 7, np.nan, X)
REFUSED = {
    "no list": ((3,), "give a list of tasks .*; got int"),
    "no task": (([],), "give a list of tasks"),
    "a single set": (((X, Y),), r"task 0 is ndarray, not a pair \(x, y\); .*groups="),
    "three parts": (([(X, Y, Y)],), "task 0 is a list of 3"),
    "NaN": (([(X, Y), (BROKEN, Y)],), r"task 1, x\[2, 1\] is nan"),
    "a huge number": (([(X.astype(np.float64) * 1e300, Y)],), r"task 0, x\[0, 0\] is .*beyond what float32 holds"),
    "a time in milliseconds": (
        ([(np.full((6, 2), 1_700_000_000_000), Y)],),
        r"x\[0, 0\] is 17.*beyond what int32 holds",
    ),
    "text": (([(np.full((6, 2), "a"), Y)],), "task 0, x holds strings, not numbers"),
    "ragged": (([([[1.0], [1.0, 2.0]], Y[:2])],), "task 0, x has rows of different lengths"),
    "a dictionary": (([({"a": X}, Y)],), "task 0, x is a dict"),
    "a vector": (([(X[:, 0], Y)],), "task 0, x is a list of 6 numbers"),
    "no rows": (([(X[:0], [])],), "task 0, x has no rows"),
    "other columns": (([(X, Y), (X[:, :2], Y)],), r"task 1 has rows of shape \[2\], task 0 of \[3\]"),
    "too few labels": (([(X, Y[:5])],), "task 0, y has 5 entries for 6 rows"),
    "text for labels": (([(X, "ababab")],), "task 0, y is str"),
    "no label": (([(X, [*Y[:5], None])],), r"task 0, y\[5\] is None"),
    "NaN for a label": (([(X, [1.0, np.nan] * 3)],), r"task 0, y\[1\] is nan"),
    "several labels": (([(X, np.zeros((6, 2)))],), r"task 0, y\[0\] is a list; give one"),
    "one class": (([(X, ["a"] * 6)],), r"no task has two classes of at least 2 rows \(task 0: left out, 1 class"),
    "groups of many": (([(X, Y)] * 3, Y), r"groups= divides one pair \(x, y\), got 3 tasks"),
    "too few groups": (((X, Y), [1, 2]), "groups has 2 entries for 6 rows"),
    "a missing group": (((X, Y), [1, 2, None, 1, 2, 1]), r"groups\[2\] is None"),
    "NaN among groups": (((BROKEN, Y), [1, 2] * 3), r"labelled_sets: x\[2, 1\] is nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_place(name):
    given, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as error:
        tasks.labelled_sets(*given)
    assert "\n" not in str(error.value)


def test_class_sets_needs_a_set():
    with pytest.raises(ValueError, match="give at least one set"):
        tasks.class_sets([])
