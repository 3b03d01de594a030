"""The active-learning loop: one program, any number of rounds, seeds and problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from metaal_jax import (
    Answer,
    Batch,
    Learner,
    Prediction,
    acquisition,
    active_learner,
    annotators,
    learners,
    loop,
    metrics,
    models,
    tasks,
)
from metaal_jax.losses import accuracy, cross_entropy

CLASSES, ROWS, WIDTH = 3, 24, 4
MARGIN, RANDOM = (acquisition.top_k(scorer, k=2) for scorer in (acquisition.margin, acquisition.random))


def centroids(calls=None, blind=None):
    """Nearest class mean with a prior at `meta`: a learner that compiles in no time and counts its own adaptations.

    Args:
      calls: a dictionary that counts how often Python runs `adapt` and `predict`.
      blind: a number of rows whose prediction is left out (zeros).
    """
    calls = {} if calls is None else calls

    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        calls["adapt"] = calls.get("adapt", 0) + 1
        member = jax.nn.one_hot(batch.y, CLASSES) * batch.weight[:, None]
        centre = (member.T @ batch.x + meta) / (member.sum(0) + 1)[:, None]
        times = 1 if start is None else 1 + start["times"]
        return {"kernel": centre.T, "bias": -0.5 * (centre**2).sum(-1), "times": jnp.float32(times)}

    def predict(params, x):
        calls["predict"] = calls.get("predict", 0) + 1
        logits = x @ params["kernel"] + params["bias"][None]
        return Prediction(logits=(jnp.zeros_like(logits) if x.shape[0] == blind else logits)[None], embedding=x[None])

    def init(key, x):
        return 0.3 * jax.random.normal(key, (CLASSES, x.shape[-1]))

    return Learner(init=init, adapt=adapt, predict=predict, meta_grad=None)


CENTROIDS = centroids()


def cloud(seed, rows=ROWS, **options):
    rng = np.random.default_rng(seed)
    means, y = 2 * rng.normal(size=(CLASSES, WIDTH)), rng.integers(0, CLASSES, rows)
    test_y = np.arange(15) % CLASSES
    x, test_x = ((means[label] + rng.normal(size=(len(label), WIDTH))).astype(np.float32) for label in (y, test_y))
    test = Batch(jnp.asarray(test_x), jnp.asarray(test_y, jnp.int32), jnp.ones(15))
    options = {"validation": jax.tree.map(lambda leaf: leaf[:5], test), **options}
    return tasks.problem(jnp.asarray(x), y, jnp.asarray(test_x), test_y, **options)


@pytest.fixture(scope="module")
def problem():
    return cloud(0)


def run(active, key, problem, rounds, learner=CENTROIDS):
    """One run; `(final state, trace, state at the start)`."""
    meta_key, init_key, loop_key = jax.random.split(key, 3)
    meta = learner.init(meta_key, problem.x)
    start = active.init(init_key, meta, (), problem)
    return *active.run(loop_key, meta, (), problem, rounds=rounds, state=start), start


def plain(tree):
    """The same tree with keys as their numbers, which NumPy can compare."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


def near(a, b):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6), plain(a), plain(b))


def compiled(policy, rounds, *, learner=CENTROIDS, **options):
    active = active_learner(learner, policy, **options)
    return jax.jit(lambda key, problem: run(active, key, problem, rounds, learner))


@pytest.fixture(scope="module")
def usual():
    """Margin for four rounds of two; compiled once for all tests that look at an ordinary run."""
    return compiled(MARGIN, 4, capacity=8)


def test_a_run_and_its_trace(key, usual, problem):
    state, trace, start = usual(key, problem)
    assert trace.index.shape == (4, 2)
    assert trace.valid.all()
    assert trace.count.tolist() == trace.spent.tolist() == [2, 4, 6, 8]
    asked = trace.index.ravel()
    assert len(set(asked.tolist())) == 8
    np.testing.assert_array_equal(trace.y, problem.y[trace.index])
    np.testing.assert_array_equal(state.labelled_index, asked)
    np.testing.assert_array_equal(state.labelled.x, problem.x[asked])
    np.testing.assert_array_equal(state.labelled.y, problem.y[asked])
    assert state.labelled.weight.tolist() == [1.0] * 8
    assert np.flatnonzero(state.queried).tolist() == sorted(asked.tolist())
    assert (state.round, state.count, state.spent) == (4, 8, 8)
    # A cold start: nothing labelled, the meta-parameters' own predictor.
    assert (start.count, start.spent, start.queried.sum(), start.labelled.weight.sum()) == (0, 0, 0, 0)
    assert (start.labelled_index == -1).all()
    # The recorded score is that of the model after the last answer, on the rows that it names.
    for batch, score in ((problem.test, trace.test), (problem.validation, trace.validation)):
        logits = CENTROIDS.predict(state.params, batch.x).logits[0]
        np.testing.assert_allclose(score.accuracy[-1], accuracy(logits, batch.y, batch.weight), rtol=1e-6)
        np.testing.assert_allclose(score.nll[-1], cross_entropy(logits, batch.y, batch.weight), rtol=1e-4)


def test_the_same_key_the_same_bits_and_other_keys_other_picks(key, problem):
    go = compiled(RANDOM, 4, capacity=8)
    same_bits(go(key, problem), go(key, problem))
    picks = {tuple(go(k, problem)[1].index.ravel().tolist()) for k in jax.random.split(key, 5)}
    assert len(picks) == 5


def test_seeds_and_problems_under_vmap(key, usual, problem):
    keys, others = jax.random.split(key, 3), [problem, cloud(1), cloud(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
    for axes, pick in (((0, None), lambda i: problem), ((None, 0), lambda i: others[i])):
        arguments = (keys, problem) if axes[0] == 0 else (key, stacked)
        together = jax.jit(jax.vmap(usual, in_axes=axes))(*arguments)[1]
        for i in range(3):
            alone = usual(keys[i] if axes[0] == 0 else key, pick(i))[1]
            np.testing.assert_array_equal(together.index[i], alone.index)
            np.testing.assert_allclose(together.test.nll[i], alone.test.nll, rtol=1e-4)


def test_how_often_callers_functions_are_traced(key, problem):
    """Neither rounds nor seeds nor calls add a trace, of the learner, the policy, the annotator or the score."""

    def traces(rounds, seeds):
        calls = {}

        def counted(name, function):
            def count(*arguments):
                calls[name] = calls.get(name, 0) + 1
                return function(*arguments)

            return count

        learner, truth = centroids(calls), annotators.truth()
        policy = MARGIN._replace(begin=counted("begin", MARGIN.begin), act=counted("act", MARGIN.act))
        who = truth._replace(answer=counted("answer", truth.answer))
        score = counted("score", metrics.score)
        active = active_learner(learner, policy, capacity=12, annotator=who, score=score)

        def one(key, problem):
            return active.run(key, learner.init(key, problem.x), (), problem, rounds=rounds)[1]

        go = jax.jit(jax.vmap(one, in_axes=(0, None)))
        for call in range(3):
            go(jax.random.split(jax.random.fold_in(key, call), seeds), problem)
        return calls

    few, many = traces(2, 1), traces(6, 3)
    assert few == many
    assert few["adapt"] <= 3  # nothing labelled (init), the body of the scan, at most once more
    assert few["predict"] <= 6
    assert few["begin"] == 1
    assert few["act"] <= 2
    assert few["answer"] <= 2
    assert few["score"] <= 4


def test_a_labelling_day_compiles_each_function_once(key, problem):
    calls = {}
    learner = centroids(calls)
    active = active_learner(learner, MARGIN, capacity=8)
    ask, tell, untell = jax.jit(active.ask), jax.jit(active.tell), jax.jit(active.untell)
    meta = learner.init(key, problem.x)
    state = active.init(key, meta, (), problem)
    seen = []
    for number in range(3):
        decision, state = ask(jax.random.fold_in(key, number), meta, (), state, problem)
        state = tell(key, meta, state, problem, decision, Answer(problem.y[decision.index]))
        state = untell(key, meta, state, problem, decision.index[:1])
        seen.append(dict(calls))
    assert seen[0] == seen[1] == seen[2]
    assert state.count == 3


def test_asking_and_telling_from_python_picks_the_rows_of_the_scan(key, usual, problem):
    """A person's problem has no labels; the keys are split as `step` splits them."""
    wanted_state, wanted, _ = usual(key, problem)
    active = active_learner(CENTROIDS, MARGIN, capacity=8)
    ask, tell = jax.jit(active.ask), jax.jit(active.tell)
    meta_key, init_key, loop_key = jax.random.split(key, 3)
    person = problem._replace(y=None)
    meta = CENTROIDS.init(meta_key, person.x)
    state = jax.jit(active.init)(init_key, meta, (), person)
    for number in range(4):
        ask_key, tell_key = jax.random.split(jax.random.fold_in(loop_key, number))
        decision, state = ask(ask_key, meta, (), state, person)
        np.testing.assert_array_equal(decision.index, wanted.index[number])
        state = tell(tell_key, meta, state, person, decision, Answer(problem.y[decision.index]))
    near(state, wanted_state)


def test_skipped_answers_are_not_asked_again_take_no_room_and_cost_nothing(key):
    problem = cloud(3, rows=7)
    active = active_learner(CENTROIDS, MARGIN, capacity=4)
    ask, tell = jax.jit(active.ask), jax.jit(active.tell)
    meta = CENTROIDS.init(key, problem.x)
    state = jax.jit(active.init)(key, meta, (), problem)
    seen = []
    for number in range(3):
        decision, state = ask(jax.random.fold_in(key, number), meta, (), state, problem)
        assert decision.valid.all()
        seen += decision.index.tolist()
        weight = jnp.asarray([0.0, 1.0])  # the first is always skipped
        state = tell(key, meta, state, problem, decision, Answer(problem.y[decision.index], weight))
        assert state.count == state.spent == number + 1
        assert state.labelled_index[: number + 1].tolist() == seen[1::2]
        assert state.labelled.weight.tolist() == [1.0] * (number + 1) + [0.0] * (3 - number)
    assert len(set(seen)) == 6
    decision, _ = ask(key, meta, (), state, problem)
    assert decision.valid.sum() == 1  # room for one, and one row left
    assert set(decision.index[decision.valid].tolist()) == set(range(7)) - set(seen)


def test_an_exhausted_pool(key):
    problem = cloud(4, rows=9)
    problem = problem._replace(weight=problem.weight.at[jnp.asarray([2, 6])].set(0.0))
    state, trace, _ = compiled(MARGIN, 6, capacity=9)(key, problem)
    assert trace.count.tolist() == [2, 4, 6, 7, 7, 7]
    assert trace.valid.sum(-1).tolist() == [2, 2, 2, 1, 0, 0]
    assert sorted(trace.index[trace.valid].tolist()) == [0, 1, 3, 4, 5, 7, 8]
    assert state.queried.sum() == 7
    assert (state.labelled_index[7:] == -1).all()
    assert (trace.test.nll[4:] == trace.test.nll[3]).all()


def test_a_full_buffer_asks_for_nothing(key, problem):
    _, trace, _ = compiled(acquisition.top_k(acquisition.random, k=3), 3, capacity=5)(key, problem)
    assert trace.count.tolist() == [3, 5, 5]
    assert trace.valid.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert (trace.weight == trace.valid).all()


def test_a_budget_in_costs(key):
    """Rows are paid for in the order of the batch; none that would exceed the budget is asked for."""
    cost = np.random.default_rng(5).integers(1, 5, ROWS).astype(np.float32)
    problem = cloud(5, cost=cost)
    go = jax.jit(jax.vmap(compiled(RANDOM, 6, capacity=12, budget=9.0), in_axes=(0, None)))
    state, trace, _ = go(jax.random.split(key, 6), problem)
    for seed in range(6):
        spent = 0.0
        for number in range(6):
            hypothetical = spent + np.cumsum(cost[trace.index[seed, number]])
            np.testing.assert_array_equal(trace.valid[seed, number], hypothetical <= 9)
            spent += cost[trace.index[seed, number]][hypothetical <= 9].sum()
            assert trace.spent[seed, number] == spent <= 9
    assert (state.spent > 5).all()
    assert len(set(state.count.tolist())) > 1  # how many labels the budget buys depends on the rows


def test_a_favourite_that_is_too_dear_does_not_stop_the_run(key):
    """A rule that always prefers the same rows goes on with the cheaper ones."""
    cost = np.ones(ROWS, np.float32)
    cost[[0, 3]] = 50.0
    fixed = acquisition.top_k(lambda key, view: -view.row.astype(jnp.float32), k=2)
    _, trace, _ = compiled(fixed, 4, capacity=8, budget=7.0)(key, cloud(5, cost=cost))
    assert trace.index[trace.valid].tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert trace.spent.tolist() == [2, 4, 6, 7]
    assert trace.valid[-1].tolist() == [True, False]


def test_an_initial_set(key):
    cost = jnp.arange(1.0, ROWS + 1)
    problem = cloud(6, initial=[5, -1, 17, 3], cost=cost)
    _, trace, start = compiled(MARGIN, 3, capacity=8, budget=1000.0)(key, problem)
    assert start.labelled_index.tolist() == [5, 17, 3, -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(start.labelled.y[:3], problem.y[jnp.asarray([5, 17, 3])])
    assert start.count == 3
    assert start.spent == 6 + 18 + 4
    assert not {5, 17, 3} & set(trace.index.ravel().tolist())
    assert trace.count.tolist() == [5, 7, 8]
    batch = Batch(problem.x[start.labelled_index], problem.y[start.labelled_index], start.labelled.weight)
    wanted = CENTROIDS.adapt(key, CENTROIDS.init(jax.random.split(key, 3)[0], problem.x), batch)
    np.testing.assert_allclose(start.params["kernel"], wanted["kernel"], atol=1e-5)  # adapted before the first query


def test_warm_start_goes_on_from_the_last_parameters(key, problem):
    cold, warm = (compiled(MARGIN, 3, capacity=6, warm_start=flag)(key, problem)[0] for flag in (False, True))
    assert cold.params["times"] == 1
    assert warm.params["times"] == 4  # init and three rounds


@pytest.fixture(scope="module")
def noisy():
    """Random queries with annotators of several error rates: the rates are mapped axes, not constants."""

    def one(key, wrong, silent, problem):
        policy = acquisition.top_k(acquisition.random, k=6)
        who = annotators.silent(annotators.noisy(annotators.truth(), rate=wrong, classes=CLASSES), rate=silent)
        return run(active_learner(CENTROIDS, policy, capacity=12, annotator=who), key, problem, 2)

    seeds = jax.vmap(one, in_axes=(0, None, None, None))
    rates = (jnp.asarray([0.0, 0.3, 1.0, 0.0]), jnp.asarray([0.0, 0.0, 0.0, 1.0]))
    go = jax.jit(jax.vmap(seeds, in_axes=(None, 0, 0, None)))
    problem = cloud(0)
    return problem, *go(jax.random.split(jax.random.key(9), 60), *rates, problem)


def test_a_noisy_annotator_errs_as_often_as_told(noisy):
    problem, state, trace, _ = noisy
    truth = problem.y[trace.index]
    wrong = np.asarray(trace.y != truth)
    assert not wrong[0].any()
    assert wrong[2].all()
    assert trace.y.min() >= 0
    assert trace.y.max() < CLASSES
    draws = wrong[1].size  # 60 seeds of 12 answers
    assert abs(wrong[1].sum() - 0.3 * draws) < 4 * np.sqrt(0.3 * 0.7 * draws)
    shift = np.asarray((trace.y - truth) % CLASSES)[2]  # the other classes are equally likely
    assert abs((shift == 1).sum() - draws / 2) < 4 * np.sqrt(draws / 4)
    np.testing.assert_array_equal(state.labelled.y[:3].reshape(3, 60, 2, 6), trace.y[:3])  # errors reach the learner


def test_a_silent_annotator_labels_nothing(noisy):
    _, state, trace, _ = noisy
    assert (trace.weight[3] == 0).all()
    assert (state.count[3] == 0).all()
    assert (state.spent[3] == 0).all()
    assert (state.queried[3].sum(-1) == 12).all()  # and yet they are not asked again
    assert (state.labelled.weight[3] == 0).all()
    assert (trace.weight[:3] == 1).all()


def test_arms_with_one_key_share_start_and_errors(key, problem):
    """Common random numbers: whatever the policy and the round, the same start and the same answer for a row."""
    wrong = annotators.noisy(annotators.truth(), rate=0.5, classes=CLASSES)
    arms = [
        compiled(acquisition.top_k(scorer, k=4), 4, capacity=16, annotator=annotators.silent(wrong, rate=0.2))(
            key, problem
        )
        for scorer in (acquisition.random, acquisition.entropy)
    ]
    same_bits(*(start for _, _, start in arms))
    given = [
        {row: (number, y, weight) for number in range(4) for row, y, weight in zip(
            *(getattr(trace, field)[number].tolist() for field in ("index", "y", "weight")), strict=True)}
        for _, trace, _ in arms
    ]  # fmt: skip
    both = given[0].keys() & given[1].keys()
    assert len(both) >= 8
    assert all(given[0][row][1:] == given[1][row][1:] for row in both)
    assert sum(given[0][row][0] != given[1][row][0] for row in both) >= 4  # asked for in other rounds
    assert any(given[0][row][1] != problem.y[row] for row in both)
    assert {given[0][row][2] for row in both} == {0.0, 1.0}
    other = compiled(acquisition.top_k(acquisition.random, k=4), 4, capacity=16, annotator=wrong)(
        jax.random.fold_in(key, 1), problem
    )[1]
    assert any(given[0][row][1] != y for row, y in zip(other.index.ravel().tolist(), other.y.ravel().tolist(),
                                                       strict=True) if row in given[0])  # fmt: skip


def test_chunks_of_the_pool_change_nothing(key, usual, problem):
    got = compiled(MARGIN, 4, capacity=8, chunk=7)(key, problem)[1]
    wanted = usual(key, problem)[1]
    np.testing.assert_array_equal(got.index, wanted.index)
    np.testing.assert_allclose(got.test.nll, wanted.test.nll, rtol=1e-4)


def test_a_grown_buffer_goes_on_as_a_larger_one_would(key, usual, problem):
    """Four rounds at a capacity of 8 are two at a capacity of 4 and two more after `grow`."""
    wanted_state, wanted, _ = usual(key, problem)
    meta_key, init_key, loop_key = jax.random.split(key, 3)

    @jax.jit
    def segments(problem):
        meta = CENTROIDS.init(meta_key, problem.x)
        small, large = (active_learner(CENTROIDS, MARGIN, capacity=capacity) for capacity in (4, 8))
        state = small.init(init_key, meta, (), problem)
        picks = []
        for number in range(4):
            active = small if number < 2 else large
            state = loop.grow(state, 8) if number == 2 else state
            state, info = active.step(jax.random.fold_in(loop_key, number), meta, (), state, problem)
            picks.append(info.index)
        return state, jnp.stack(picks)

    state, picks = segments(problem)
    np.testing.assert_array_equal(picks, wanted.index)
    near(state, wanted_state)
    with pytest.raises(ValueError, match="cannot pad 8 rows down to 4"):
        loop.grow(state, 4)


def test_random_does_not_pay_for_predictions_that_it_does_not_read(key):
    """Inside the scan: random with the pool's prediction costs what it costs with that prediction left out."""
    big = cloud(7, rows=500)

    def flops(policy, learner):
        analysis = compiled(policy, 3, learner=learner, capacity=6).lower(key, big).compile().cost_analysis()
        return analysis["flops"]

    entropy, blind = acquisition.top_k(acquisition.entropy, k=2), centroids(blind=500)
    assert flops(RANDOM, CENTROIDS) == pytest.approx(flops(RANDOM, blind), rel=1e-3)
    assert flops(entropy, CENTROIDS) >= flops(entropy, blind) + 2 * 500 * WIDTH * CLASSES  # or the count sees nothing


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return tasks.problem(jnp.asarray(x[:200]), y[:200], jnp.asarray(x[1000:1300]), y[1000:1300])


GOLDEN = {  # mean over four seeds: accuracy, negative log-likelihood after each of five rounds of six
    "random": ([0.2917, 0.4725, 0.5600, 0.5950, 0.6517], [3.2043, 2.4338, 1.8392, 1.6003, 1.3175]),
    "margin": ([0.3283, 0.5567, 0.5792, 0.6817, 0.7200], [3.2756, 1.9834, 1.6261, 1.4386, 1.2647]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_learning_curve(digits, name):
    learner = learners.fine_tune(models.MLP(10, hidden=()), optimizer=optax.sgd(0.5), steps=30)
    policy = acquisition.top_k(getattr(acquisition, name), k=6)
    go = functools.partial(run, active_learner(learner, policy, capacity=30), rounds=5, learner=learner)
    trace = jax.jit(jax.vmap(lambda key, problem: go(key, problem)[1], in_axes=(0, None)))(
        jax.random.split(jax.random.key(7), 4), digits
    )
    wanted_accuracy, wanted_nll = GOLDEN[name]
    np.testing.assert_allclose(trace.test.nll.mean(0), wanted_nll, atol=1e-3)
    np.testing.assert_allclose(trace.test.accuracy.mean(0), wanted_accuracy, atol=2e-3)


def test_what_cannot_be(key, problem):
    def start(problem, **options):
        active = active_learner(CENTROIDS, MARGIN, **options)
        return active, active.init(key, CENTROIDS.init(key, problem.x), (), problem)

    with pytest.raises(ValueError, match="capacity 25 is larger than the pool of 24 rows"):
        start(problem, capacity=25)
    with pytest.raises(ValueError, match="an initial set of 3 rows does not fit a capacity of 2"):
        start(cloud(0, initial=[1, 2, 3]), capacity=2)
    with pytest.raises(ValueError, match="needs its labels"):
        start(cloud(0, initial=[1])._replace(y=None), capacity=2)
    active, state = start(problem._replace(y=None), capacity=2)
    with pytest.raises(ValueError, match=r"needs problem\.y"):
        active.step(key, None, (), state, problem._replace(y=None))
    for name, options in {
        "capacity must be at least 1": {"capacity": 0},
        "budget must not be negative": {"capacity": 2, "budget": -1.0},
    }.items():
        with pytest.raises(ValueError, match=name):
            active_learner(CENTROIDS, MARGIN, **options)
