"""Samplers: labels that fit their rows, no row twice, weight 0 for what does not exist."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import tasks

COUNTS = [6, 3, 8, 4]  # rows of each class


def numbered(counts=COUNTS, shift=0.0):
    """Rows whose values are their own number and class."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    x = np.stack([np.arange(len(y)) + shift, y], axis=1).astype(np.float32)
    return tasks.class_data(x, y)


def draw(sampler, data, seed=0, times=40):
    """Many draws in one program, as NumPy arrays."""
    keys = jax.random.split(jax.random.key(seed), times)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sampler, in_axes=(0, None)))(keys, data))


def check_task(task, *, ways):
    """One task: labels are a renumbering of the rows' classes, and no row stands twice."""
    x = np.concatenate([task.support.x, task.query.x])
    y = np.concatenate([task.support.y, task.query.y])
    real = np.concatenate([task.support.weight, task.query.weight]) > 0
    rows = x[real, 0]
    assert len(set(rows.tolist())) == len(rows)
    pairs = set(zip(y[real].tolist(), x[real, 1].tolist(), strict=True))
    assert len({label for label, _ in pairs}) == len({source for _, source in pairs}) == len(pairs) <= ways
    return dict(pairs)


def test_class_data_knows_the_rows_of_each_class():
    data = numbered()
    assert data.count.tolist() == COUNTS
    for label, count in enumerate(COUNTS):
        rows = data.rows[label, :count]
        assert (data.y[rows] == label).all()
        assert len(set(rows.tolist())) == count
    some = tasks.class_data(data.x, data.y * 10, classes=np.asarray([30, 0]))
    assert some.count.tolist() == [4, 6]
    np.testing.assert_array_equal(some.x[:, 1], np.where(some.y == 0, 3, 0))
    assert [some.x[some.rows[0, :4], 1].tolist(), some.x[some.rows[1], 1].tolist()] == [[3] * 4, [0] * 6]


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), None, "as many rows as labels"),
        (np.zeros((0, 2)), np.zeros(0, int), None, "as many rows as labels"),
        (np.zeros((2, 2)), np.zeros((2, 1), int), None, "as many rows as labels"),
        (np.zeros((2, 2)), np.asarray([0, 2]), np.asarray([0, 1, 2]), "class 1 has no row"),
        (
            np.zeros((2, 2)),
            np.asarray([0.9, 1.9]),
            None,
            r"labels must be integers, got float64, 0\.9 in row 0; number",
        ),
        (np.zeros((2, 2)), np.asarray([0.0, np.nan]), None, "labels must be integers, got float64, nan in row 1"),
        (np.zeros((2, 2)), np.asarray([0.0, 1.0]), None, "labels must be integers, got float64; number"),
        (np.zeros((2, 2)), ["cat", "dog"], None, r"got <U3, cat the first; number .* np\.unique\("),
        (np.zeros((2, 2)), [True, False], None, "labels must be integers, got bool"),
        (np.zeros((2, 2)), [3, -1], None, "label -1 in row 1 is negative"),
        (np.zeros((2, 2)), [0, 1], [0, 1, 1], "class 1 is named twice"),
        (np.zeros((2, 2)), [0, 1], [], "at least one class"),
        (np.zeros((2, 2)), [0, 1], [0.0, 1.0], "classes must be integers, got float64"),
        (np.asarray([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], None, r"x holds 1 NaN or infinite .* row 1 at \[0\]"),
        ({"a": np.zeros((2, 2)), "b": np.asarray([0.0, -np.inf])}, [0, 1], None, r"x\['b'\] holds 1 NaN .* row 1;"),
        ([[0.0, 1.0], [1.0, 0.0]], [0, 1], None, r"x\[0\]\[0\] must be an array \[n, \.\.\.\], got float"),
        (np.asarray([["a"], ["b"]]), [0, 1], None, "x must hold numbers, got <U1"),
        ({}, [0, 1], None, "x has no arrays"),
    ],
)
def test_class_data_refuses(x, y, classes, message):
    with pytest.raises(ValueError, match=message):
        tasks.class_data(x, y, classes=classes)


def test_unlabelled_rows_can_be_left_out():
    data = tasks.class_data(np.arange(4.0)[:, None], [1, -1, 0, 1], classes=[0, 1])
    assert data.x[:, 0].tolist() == [0, 2, 3]
    assert data.y.tolist() == [1, 0, 1]


def test_few_shot():
    drawn = draw(tasks.few_shot(ways=3, shots=2, queries=3), numbered(), times=300)
    assert drawn.support.x.shape == (300, 6, 2)
    assert drawn.query.x.shape == (300, 9, 2)
    assert drawn.support.y[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.query.y[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    firsts = []
    for i in range(300):
        task = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        source = check_task(task, ways=3)
        assert len(source) == 3
        firsts.append(source[0])
        # A class gives what it has, the support first.
        for label in range(3):
            have = COUNTS[int(source[label])]
            assert task.support.weight[task.support.y == label].sum() == min(have, 2)
            assert task.query.weight[task.query.y == label].sum() == min(have - 2, 3)
    assert (
        np.bincount(np.asarray(firsts, int), minlength=4) > 300 / 4 - 4 * 7.5
    ).all()  # every class takes every place


def pictures(height=3, width=3):
    """Two classes of 5 pictures; no two pixels of the set are equal."""
    x = np.arange(10 * height * width, dtype=np.float32).reshape(10, height, width, 1)
    return tasks.class_data(x, np.arange(10) % 2)


@pytest.mark.parametrize("sampler", [
    tasks.few_shot(ways=8, shots=2, queries=1, rotations=True),
    tasks.growing(ways=8, labels=6, queries=2, smallest=6, rotations=True, unseen=True),
])  # fmt: skip
def test_rotations_make_classes(sampler):
    data = pictures()
    drawn = draw(sampler, data, times=5)
    for i in range(5):
        origin = {}
        for batch in drawn:
            for x, y, weight in zip(batch.x[i], batch.y[i], batch.weight[i], strict=True):
                if weight:
                    row = int(x.min()) // 9
                    (turn,) = (t for t in range(4) if (np.rot90(data.x[row], t) == x).all())
                    origin.setdefault(int(y), set()).add((int(data.y[row]), turn))
        assert all(len(source) == 1 for source in origin.values())  # one class and one turn for a label
        assert len(set.union(*origin.values())) == 8  # two classes, four turns


ROTATING = {
    "few_shot": tasks.few_shot(ways=5, shots=1, queries=1, rotations=True),
    "growing": tasks.growing(ways=5, labels=2, queries=1, rotations=True),
    "minibatches": tasks.minibatches(rows=4, rotations=True),
}


@pytest.mark.parametrize("name", ROTATING)
def test_rotations_of_what_cannot_be_turned_are_refused(name):
    """A row that no turn changes would stand in a task under two labels."""
    y = np.arange(10) % 2
    for x, said in (
        (np.zeros((10, 2)), r"rotations turn images .* got rows of shape \[10, 2\]"),
        (np.zeros(10), r"got rows of shape \[10\]"),
        (np.zeros((10, 3, 4, 1)), "need square images .* got 3 x 4"),
        (np.zeros((10, 1, 1, 3)), "at least 2 x 2 pixels, got 1 x 1"),
        ({"input": np.zeros((10, 3)), "task": np.zeros(10)}, r"rows of shape \[10, 3\], \[10\]"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{said}"):
            ROTATING[name](jax.random.key(0), tasks.class_data(x, y))
    beside = tasks.class_data({"image": pictures().x, "age": np.zeros(10, np.float32)}, y)
    jax.eval_shape(ROTATING[name], jax.random.key(0), beside)


def test_pictures_that_are_not_square():
    """Nothing turns them unless rotations are asked for."""
    data = pictures(3, 4)
    for sampler in (
        tasks.few_shot(ways=2, shots=1, queries=1),
        tasks.growing(ways=2, labels=2, queries=1, unseen=True),
    ):
        task = jax.jit(sampler)(jax.random.key(0), data)
        for x, y in zip(task.query.x, task.query.y, strict=True):
            row = int(x.min()) // 12
            np.testing.assert_array_equal(x, data.x[row])
            assert 0 <= y < 2


def test_growing():
    drawn = draw(
        tasks.growing(ways=2, labels=6, queries=2, smallest=1, concentration=1.0), numbered([9, 9, 9]), times=400
    )
    sizes = drawn.support.weight.sum(1)
    assert np.bincount(sizes.astype(int), minlength=7)[1:].min() > 400 / 6 - 4 * 7.5
    assert sizes.min() == 1
    alone = 0
    for i in range(400):
        task = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        check_task(task, ways=2)
        assert (np.diff(task.support.weight) <= 0).all()  # the buffer is filled from its start
        labels = task.support.y[task.support.weight > 0]
        np.testing.assert_array_equal(task.query.weight, np.isin(task.query.y, labels))  # judged on classes it has seen
        alone += sizes[i] >= 4 and len(set(labels.tolist())) == 1
    # Even shares would leave a class out of four to six rows in 7 % of these tasks, uneven ones in a third.
    assert alone / (sizes >= 4).sum() > 0.2


def test_growing_from_classes_that_are_too_small():
    """Queries come first; support rows that a class does not have get weight 0."""
    drawn = draw(tasks.growing(ways=2, labels=8, queries=2, smallest=8, unseen=True), numbered([4, 4]), times=30)
    assert (drawn.query.weight == 1).all()
    for i in range(30):
        task = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        check_task(task, ways=2)
        for label in range(2):
            mine = task.support.y == label
            assert task.support.weight[mine].sum() == min(mine.sum(), 2)
    starved = draw(tasks.growing(ways=2, labels=3, queries=6, unseen=True), numbered([4, 4]), times=5)
    assert starved.query.x.shape == (5, 8, 2)
    assert (starved.query.weight == 1).all()
    assert starved.support.weight.sum() == 0


def test_mixture_draws_by_weight():
    samplers = [tasks.few_shot(ways=2, shots=1, queries=1)] * 2
    data = (numbered(), numbered(shift=1000.0))
    drawn = draw(tasks.mixture(samplers, [3.0, 1.0]), data, times=400)
    second = drawn.support.x[:, :, 0] >= 1000
    assert (second.all(1) | (~second).all(1)).all()
    assert (drawn.query.x[:, 0, 0] >= 1000).tolist() == second[:, 0].tolist()
    assert abs(second[:, 0].sum() - 100) < 4 * np.sqrt(400 * 0.25 * 0.75)
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [np.nan, 1.0], [1.0, np.inf]):
        with pytest.raises(ValueError, match="mixture"):
            tasks.mixture(samplers, weights)


POOL, TEST = numbered([20, 20, 20, 20]), numbered([10, 10, 10, 10], shift=1000.0)
DATA = tasks.ProblemData(POOL, TEST)


def test_problem_from_arrays():
    x = jnp.zeros((5, 2), jnp.uint8)
    problem = tasks.problem(x, [0, 1, 0, 1, 0], x[:3], [0, 1, 1])
    assert (problem.weight.tolist(), problem.cost.tolist()) == ([1] * 5, [1] * 5)
    assert problem.initial.shape == (0,)
    assert problem.validation.weight.sum() == 0
    assert problem.y.dtype == problem.test.y.dtype == jnp.int32
    assert tasks.problem(x, None, x, [0] * 5).y is None


def test_problems():
    drawn = draw(tasks.problems(pool=24, test=16, validation=10, initial=3), DATA)
    for i in range(40):
        problem = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        np.testing.assert_array_equal(problem.x[:, 1], problem.y)
        np.testing.assert_array_equal(problem.test.x[:, 1], problem.test.y)
        np.testing.assert_array_equal(problem.validation.x[:, 1], problem.validation.y)
        rows = np.concatenate([problem.x[:, 0], problem.validation.x[:, 0]])
        assert len(set(rows.tolist())) == 34  # a row stands in the pool or in the validation set, once
        assert rows.max() < 1000 <= problem.test.x[:, 0].min()
        assert len(set(problem.test.x[:, 0].tolist())) == 16
        assert problem.initial.tolist() == [0, 1, 2]
    assert (drawn.weight == 1).all()
    assert (drawn.cost == 1).all()
    # All rows are equally likely, in every place of the pool.
    first = np.bincount(drawn.y[:, 0], minlength=4)
    assert (first > 0).all()
    assert len(np.unique(drawn.x[:, :, 0])) == 80


def test_problems_of_some_classes():
    drawn = draw(tasks.problems(pool=50, test=25, ways=2), DATA)
    chosen = set()
    for i in range(40):
        problem = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        # Two classes have 40 rows; ten of the pool's fifty do not exist and stand at its end.
        assert problem.weight.tolist() == [1] * 40 + [0] * 10
        assert problem.test.weight.sum() == 20
        real, test_real = problem.weight > 0, problem.test.weight > 0
        source = dict(zip(problem.y[real].tolist(), problem.x[real, 1].tolist(), strict=True))
        assert sorted(source) == [0, 1]
        assert [source[y] for y in problem.y[real].tolist()] == problem.x[real, 1].tolist()
        assert [source[y] for y in problem.test.y[test_real].tolist()] == problem.test.x[test_real, 1].tolist()
        chosen.add((source[0], source[1]))
    assert len(chosen) > 6  # of the twelve ordered pairs


@pytest.mark.parametrize("ways", [None, 2])
def test_imbalance_is_the_ratio_of_the_rarest_class(ways):
    """A small pool from a large split: the drawn frequencies are those wanted, whichever classes are chosen."""
    data = tasks.ProblemData(numbered([500] * 4), TEST)
    drawn = draw(tasks.problems(pool=60, test=8, ways=ways, imbalance=8.0), data, times=200)
    counts = np.stack([np.bincount(y, minlength=ways or 4) for y in drawn.y])
    share = np.sort(counts, axis=1).sum(0) / counts.sum()
    wanted = np.asarray([1.0, 8.0] if ways else [1.0, 2.0, 4.0, 8.0])
    np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.025)
    assert len(set(counts.argmax(1).tolist())) == (ways or 4)  # any class can be the frequent one
    # The order of the pool tells nothing: its first half has the shares of the whole.
    rare = counts.argmin(1)[:, None] == drawn.y
    assert abs(rare[:, :30].sum() - rare[:, 30:].sum()) < 4 * np.sqrt(rare.sum())


def test_duplicates_and_noise():
    drawn = draw(tasks.problems(pool=24, test=4, validation=4, duplicates=3, noise=0.1), DATA)
    clean = np.round(drawn.x[:, :, 1]).astype(int)
    np.testing.assert_array_equal(clean, drawn.y)
    counts = [np.unique(np.round(x[:, 0]), return_counts=True)[1] for x in drawn.x]
    assert np.mean([(count == 3).mean() for count in counts]) > 0.98
    noise = drawn.x - np.round(drawn.x)
    assert abs(noise.std() - 0.1) < 0.01
    assert abs(noise.mean()) < 0.01
    assert len(np.unique(noise)) > 0.9 * noise.size  # copies differ
    assert (drawn.validation.x == np.round(drawn.validation.x)).all()
    assert (drawn.test.x == np.round(drawn.test.x)).all()


def test_noise_on_bytes_stays_in_range():
    y = np.arange(20) % 2
    data = tasks.class_data(np.where(y == 0, 0, 255).astype(np.uint8)[:, None].repeat(50, 1), y)
    drawn = draw(tasks.problems(pool=10, test=2, noise=20.0), tasks.ProblemData(data, data), times=4)
    assert drawn.x.dtype == np.uint8
    dark, bright = drawn.x[drawn.y == 0].astype(int), drawn.x[drawn.y == 1].astype(int)
    assert (dark.max() < 128) & (bright.min() > 128)  # clipped, not wrapped around
    # Half of the noise is clipped away; the other half has the mean of a half normal distribution.
    np.testing.assert_allclose([dark.mean(), 255 - bright.mean()], 20 / np.sqrt(2 * np.pi), rtol=0.15)


def test_a_balanced_initial_set():
    drawn = draw(tasks.problems(pool=40, test=4, initial=8, balanced_initial=True), DATA)
    for y, initial in zip(drawn.y, drawn.initial, strict=True):
        assert len(set(initial.tolist())) == 8
        assert np.bincount(y[initial], minlength=4).tolist() == [2] * 4
    few = draw(tasks.problems(pool=13, test=4, initial=8, balanced_initial=True),
               tasks.ProblemData(numbered([1, 20, 20, 20]), TEST))  # fmt: skip
    for y, initial in zip(few.y, few.initial, strict=True):
        have = np.minimum(np.bincount(y, minlength=4), 2)
        assert np.bincount(y[initial[initial >= 0]], minlength=4).tolist() == have.tolist()
        assert (initial >= 0).sum() == have.sum()


WRONG = {  # a call, what it says
    "few_shot: ways must be a positive integer, got 0": lambda: tasks.few_shot(ways=0, shots=1, queries=1),
    "few_shot: shots must be a positive integer, got 0": lambda: tasks.few_shot(ways=1, shots=0, queries=1),
    "5 ways wanted, the set has 4": lambda: draw(tasks.few_shot(ways=5, shots=1, queries=1), POOL),
    "the largest class has 20": lambda: draw(tasks.few_shot(ways=2, shots=10, queries=11), POOL),
    "growing: queries must be a positive integer, got 0": lambda: tasks.growing(ways=1, labels=1, queries=0),
    "growing: smallest must lie in 0..3": lambda: tasks.growing(ways=1, labels=3, queries=1, smallest=4),
    "growing: concentration must be positive": lambda: tasks.growing(ways=1, labels=3, queries=1, concentration=0.0),
    "growing: concentration must be positive, got nan": lambda: tasks.growing(
        ways=1, labels=1, queries=1, concentration=float("nan")
    ),
    "growing: concentration must be finite": lambda: tasks.growing(
        ways=1, labels=1, queries=1, concentration=float("inf")
    ),
    "growing: smallest must be an integer of at least 0, got -1": lambda: tasks.growing(
        ways=1, labels=3, queries=1, smallest=-1
    ),
    "few_shot: queries must be a positive integer, got 2.5": lambda: tasks.few_shot(ways=2, shots=1, queries=2.5),
    "few_shot: ways must be a positive integer, got True": lambda: tasks.few_shot(ways=True, shots=1, queries=2),
    "minibatches: rows must be a positive integer, got 0": lambda: tasks.minibatches(rows=0),
    "mixture: give at least one sampler": lambda: tasks.mixture([], []),
    "mixture: 1 samplers need as many data sets, got 2": lambda: tasks.mixture(
        [tasks.few_shot(ways=2, shots=1, queries=1)], [1.0]
    )(jax.random.key(0), (POOL, POOL)),
    "problems: pool must be at least 1": lambda: tasks.problems(pool=0, test=1),
    "problems: imbalance must be at least 1": lambda: tasks.problems(pool=4, test=1, imbalance=0.5),
    "5 initial rows are more than a pool of 4": lambda: tasks.problems(pool=4, test=1, initial=5),
    "3 copies do not divide a pool of 4": lambda: tasks.problems(pool=4, test=1, duplicates=3),
    "82 rows wanted, the pool split has 80": lambda: draw(tasks.problems(pool=80, test=1, validation=2), DATA),
    "41 rows wanted, the test split has 40": lambda: draw(tasks.problems(pool=8, test=41), DATA),
    "5 ways wanted, the set has 4 classes": lambda: draw(tasks.problems(pool=8, test=4, ways=5), DATA),
    "3 initial rows do not spread evenly over 4": lambda: draw(
        tasks.problems(pool=8, test=4, initial=3, balanced_initial=True), DATA
    ),
    "the pool has 4 classes, the test split 3": lambda: draw(
        tasks.problems(pool=8, test=4), tasks.ProblemData(POOL, numbered([9, 9, 9]))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


class TestComposedProblems:
    # 40 classes of 30 rows, each row its class and its number.
    x = np.stack([np.repeat(np.arange(40), 30), np.tile(np.arange(30), 40)], -1)
    data = jax.device_put(tasks.class_data(x, x[:, 0]))

    @classmethod
    def draw(cls, seed, **options):
        defaults = {"ways": 5, "pool": 60, "test": 40, "validation": 20, "parts": 3}
        return cls.compiled(**{**defaults, **options})(jax.random.key(seed), cls.data)

    @staticmethod
    @functools.cache
    def compiled(**options):
        return jax.jit(tasks.composed_problems(**options))

    def test_rows_are_distinct_and_forms_belong_to_one_class(self):
        for seed in range(5):
            problem = self.draw(seed)
            parts = [(problem.x, problem.y, problem.weight), problem.test, problem.validation]
            x, y, weight = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(3))
            x, y = x[weight > 0], y[weight > 0]
            assert len({tuple(row) for row in x}) == len(x)
            forms = {int(form): set(y[x[:, 0] == form].tolist()) for form in np.unique(x[:, 0])}
            assert all(len(classes) == 1 for classes in forms.values())
            assert 5 <= len(forms) <= 15
            assert set(y.tolist()) == set(range(5))

    def test_numbers_of_forms_differ_from_problem_to_problem(self):
        found = [len(np.unique(self.draw(seed, pool=30).x[:, 0])) for seed in range(12)]
        assert max(found) >= 9
        assert min(found) <= 6

    def test_imbalance_is_of_the_pool_alone(self):
        count = lambda batch_y: np.sort(np.bincount(np.asarray(batch_y), minlength=5))  # noqa: E731
        plain, rare = (sum(count(self.draw(seed, parts=1, imbalance=i).y) for seed in range(20)) for i in (1.0, 50.0))
        assert plain[-1] / plain[0] < 2.0
        assert rare[-1] / rare[0] > 1.5 * plain[-1] / plain[0]

    def test_rows_that_do_not_exist_have_no_weight(self):
        problem = self.draw(0, parts=1, pool=80, test=40, validation=20)
        weight = np.concatenate([problem.weight, problem.test.weight, problem.validation.weight])
        assert weight.sum() == 140
        # Classes of 30 rows, but for every other one, of 10: one form may be all that a class has.
        some = jax.tree.map(jnp.asarray, tasks.class_data(*(a[(self.x[:, 0] % 2 == 0) | (self.x[:, 1] < 10)]
                                                            for a in (self.x, self.x[:, 0]))))  # fmt: skip
        draw = self.compiled(ways=5, pool=80, test=40, validation=20, parts=2)
        short = [draw(jax.random.key(seed), some) for seed in range(12)]
        assert min(float(problem.weight.sum()) for problem in short) < 80
        assert all(problem.test.weight.all() for problem in short)
        assert all(len({tuple(row) for row in np.asarray(p.x)[np.asarray(p.weight) > 0]}) == p.weight.sum()
                   for p in short)  # fmt: skip

    def test_bad_input(self):
        with pytest.raises(ValueError, match="need 45 classes, the source has 40"):
            self.draw(0, ways=15)
        with pytest.raises(ValueError, match="560 rows wanted, 5 classes of one form each have at most 150"):
            self.draw(0, pool=500)
        for imbalance, said in ((0.5, "at least 1, got 0.5"), (np.nan, "at least 1, got nan"), (np.inf, "finite")):
            with pytest.raises(ValueError, match=f"imbalance must be {said}"):
                tasks.composed_problems(ways=2, pool=1, test=1, imbalance=imbalance)
        with pytest.raises(ValueError, match="ways must be an integer of at least 2, got 1"):
            tasks.composed_problems(ways=1, pool=1, test=1)
