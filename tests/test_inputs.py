"""What people hand in: each wrong input is refused with what was given, where, what is allowed and what to type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import (
    Answer,
    Batch,
    Decision,
    acquisition,
    active_learner,
    checkpoint,
    learners,
    metrics,
    models,
    tasks,
)
from test_loop import CENTROIDS, MARGIN, cloud

X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
Y = np.arange(30) % 3
HOLE = X.copy()
HOLE[7, 2] = np.nan
BATCH = Batch(X[:4], Y[:4], np.ones(4, np.float32))

REFUSED = {  # what is given -> what the message says
    "20 labels for 30 rows": (lambda: tasks.problem(X, Y[:20]), r"y has 20 labels for 30 rows"),
    "strings": (lambda: tasks.problem(X, ["cat", "dog"] * 15), r"strings such as 'cat'.*np\.unique"),
    "strings to come": (lambda: tasks.problem(X, known={3: "cat"}), r"known holds strings.*np\.unique"),
    "None among labels": (lambda: tasks.problem(X, [None, *Y[1:]]), r"known=\{row: label\}"),
    "a NaN label": (lambda: tasks.problem(X, np.where(Y == 1, np.nan, Y)), r"y\[1\] is nan"),
    "fractions as classes": (lambda: tasks.problem(X, Y + 0.9, classes=3), r"y\[0\] is 0\.9.*0 to 2"),
    "whole floats as classes": (lambda: tasks.problem(X, Y * 1.0, classes=3), r"integers from 0 to 2"),
    "a negative class": (lambda: tasks.problem(X, Y - 1), r"y\[0\] is -1.*0 upwards"),
    "a class too many": (lambda: tasks.problem(X, Y, classes=2), r"y\[2\] is 2.*0 to 1.*2 outputs"),
    "test labels from 1": (lambda: tasks.problem(X, Y, X, Y + 1, classes=3), r"test_y\[2\] is 3.*0 to 2"),
    "a known class too many": (lambda: tasks.problem(X, known={5: 9}, classes=3), r"known\[0\] is 9"),
    "known and initial": (lambda: tasks.problem(X, Y, known={1: 0}, initial=[2]), "not both"),
    "a row twice": (lambda: tasks.problem(X, Y, initial=[3, 3, 5]), "row 3 2 times"),
    "a row beyond the pool": (lambda: tasks.problem(X, Y, initial=[3, 30]), r"initial\[1\] is 30.*0 to 29"),
    "a known row beyond": (lambda: tasks.problem(X, known={-2: 0}), r"known\[0\] is -2"),
    "rows that are no numbers": (lambda: tasks.problem(X, Y, initial=[0.5]), "list of row numbers"),
    "initial without labels": (lambda: tasks.problem(X, initial=[1]), r"known=\{row: label\}"),
    "a NaN cell": (lambda: tasks.problem(HOLE, Y), r"x\[7, 2\] is nan"),
    "an infinite test cell": (lambda: tasks.problem(X, Y, X + np.inf, Y), r"test_x\[0, 0\] is inf"),
    "a NaN in a leaf": (lambda: tasks.problem({"a": X, "b": HOLE}, Y), r"x\['b'\]\[7, 2\] is nan"),
    "words for numbers": (lambda: tasks.problem(X.astype(str), Y), "x holds strings, not numbers"),
    "leaves of two lengths": (lambda: tasks.problem({"a": X, "b": X[:3]}, Y), "same number of rows"),
    "no rows": (lambda: tasks.problem(X[:0]), "x has no rows"),
    "test rows without labels": (lambda: tasks.problem(X, Y, X), "test_x and test_y"),
    "classes and targets": (lambda: tasks.problem(X, Y, X, Y * 0.5), "in one kind"),
    "validation of another kind": (
        lambda: tasks.problem(X, Y, validation=Batch(X[:2], np.zeros(2, np.float32), np.ones(2))), "in one kind"),
    "a negative cost": (lambda: tasks.problem(X, Y, cost=-np.ones(30)), "finite and not negative"),
    "a NaN cost": (lambda: tasks.problem(X, Y, cost=np.full(30, np.nan)), "finite and not negative"),
    "too little room": (lambda: tasks.problem(X, Y, rows=20), "room for 20 rows"),
    "too many new rows": (lambda: tasks.extend(tasks.problem(X, rows=31), X[:2]), "2 new rows, room for 1"),
    "new rows of another shape": (lambda: tasks.extend(tasks.problem(X, rows=33), X[:2, :3]), "rows of shape"),
    "new rows with NaN": (lambda: tasks.extend(tasks.problem(X, rows=60), HOLE), r"x\[7, 2\]"),
    "new labels for none": (lambda: tasks.extend(tasks.problem(X, rows=33), X[:2], [0, 1]), "has no y"),
    "a scorer for a policy": (
        lambda: active_learner(CENTROIDS, acquisition.margin, capacity=3), r"acquisition\.top_k\(margin"),
    "the name of a policy": (lambda: active_learner(CENTROIDS, "cifar10", capacity=3), r"policies\.load\('cifar10'\)"),
    "a model for a learner": (lambda: active_learner(models.MLP(3), MARGIN, capacity=3), "learner must be a Learner"),
    "targets scored as classes": (lambda: metrics.score(jnp.zeros((1, 2, 3)), jnp.zeros(2), jnp.ones(2)),
                                  "regression_score"),
    "classes scored as targets": (
        lambda: metrics.regression_score(jnp.zeros((1, 2, 1)), jnp.zeros(2, int), jnp.ones(2)), "float targets"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_labels_are_held_against_the_outputs_before_anything_runs(key):
    """A two-class learner; labels 0, 1, 2 in the pool, in the test rows, among the initial labels."""
    learner = learners.protonet(models.MLP(2, hidden=()))
    meta = learner.init(key, X)
    active = active_learner(learner, MARGIN, capacity=4)
    for problem, where in (
        (tasks.problem(X, Y), r"problem\.y\[2\] is 2.*2 outputs"),
        (tasks.problem(X, Y % 2, X, Y), r"problem\.test\.y\[2\] is 2"),
        (tasks.problem(X, known={9: 7}), r"problem\.initial_y\[0\] is 7"),
        (tasks.problem(X, Y % 2, validation=BATCH), r"problem\.validation\.y\[2\] is 2"),
    ):
        with pytest.raises(ValueError, match=where):
            active.init(key, meta, (), problem)
        with pytest.raises(ValueError, match=where):
            active.run(key, meta, (), problem, rounds=1)
    with pytest.raises(ValueError, match="of one kind"):
        active.init(key, meta, (), tasks.problem(X, Y)._replace(y=jnp.zeros(30)))


TOLD = {
    "a class too many": (lambda: Answer([7, 0]), r"y\[0\] is 7.*3 outputs"),
    "NaN": (lambda: Answer([0, np.nan]), r"y\[1\] is nan"),
    "floats": (lambda: Answer([0.0, 1.0]), "integers from 0 to 2"),
    "strings": (lambda: Answer(["cat", "dog"]), "number them"),
    "one for two": (lambda: Answer([1]), "1 labels for 2 rows"),
    "the labels alone": (lambda: jnp.asarray([1, 0]), r"ml\.Answer\(y=\.\.\.\)"),
    "a NaN weight": (lambda: Answer([1, 0], weight=[np.nan, 1.0]), "weight must be 2 finite numbers"),
    "a weight too few": (lambda: Answer([1, 0], weight=[1.0]), "weight must be 2 finite numbers"),
    "an infinite cost": (lambda: Answer([1, 0], cost=[np.inf, 1.0]), "cost must be 2 finite numbers"),
}


def test_wrong_answers_are_refused(key):
    problem = cloud(0)
    active = active_learner(CENTROIDS, MARGIN, capacity=4)
    meta = CENTROIDS.init(key, problem.x)
    state = active.init(key, meta, (), problem)
    decision, state = active.ask(key, meta, (), state, problem)
    for make, message in TOLD.values():
        with pytest.raises(ValueError, match=message):
            active.tell(key, meta, state, problem, decision, make())
    # What stands beside a missing answer means nothing; a list will do.
    for answer in (Answer([99, 1], weight=[0, 1]), Answer([-5, 1], later=[True, False])):
        told = active.tell(key, meta, state, problem, decision, answer)
        assert told.labelled_index[:2].tolist() == [int(decision.index[1]), -1]
    full = active.tell(key, meta, state, problem, decision, Answer([0, 1]))
    more = decision._replace(index=jnp.asarray([0, 1, 2]) + 3, valid=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"holds 4 answers.*loop\.grow"):
        active.tell(key, meta, full, problem, more, Answer([0, 1, 2]))


def test_what_cannot_be_right_counts_as_missing_inside_a_program(key):
    """Traced: a NaN row that is asked for, and a NaN target, train nothing."""
    problem = cloud(0)
    hole = problem._replace(x=problem.x.at[5, 1].set(jnp.nan))

    def act(key, params, state, view):  # the package's own rules take such a row last
        index = jnp.asarray([5, 7])
        return Decision(index, view.available[index], jnp.zeros(()), jnp.zeros(view.row.shape)), state

    stubborn = MARGIN._replace(begin=lambda key, params, view: (), act=act)
    active = active_learner(CENTROIDS, stubborn, capacity=4)
    meta = CENTROIDS.init(key, problem.x)
    state, trace = jax.jit(lambda problem: active.run(key, meta, (), problem, rounds=1))(hole)
    assert trace.weight.tolist() == [[0.0, 1.0]]
    assert state.count == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_prediction_that_is_not_a_number_is_wrong():
    score = metrics.score(jnp.full((1, 4, 3), jnp.nan), jnp.asarray([0, 0, 1, 2]), jnp.ones(4))
    assert score.accuracy == score.member_accuracy == score.balanced_accuracy == 0
    half = metrics.score(jnp.asarray([[[jnp.nan] * 3, [5.0, 0.0, 0.0]]]), jnp.zeros(2, int), jnp.ones(2))
    assert half.accuracy == half.balanced_accuracy == 0.5


def test_numpy_goes_through_without_jit(key):
    """The README's experiment on NumPy arrays, not compiled; and a state as a file gives it back."""
    problem = jax.tree.map(np.asarray, cloud(0))
    active = active_learner(CENTROIDS, MARGIN, capacity=6)
    meta = np.asarray(CENTROIDS.init(key, problem.x))
    state, trace = active.run(key, meta, (), problem, rounds=2)
    wanted = jax.jit(lambda problem: active.run(key, meta, (), problem, rounds=2))(problem)[1]
    np.testing.assert_array_equal(trace.index, wanted.index)
    frozen = jax.tree.map(np.asarray, state)
    decision, asked = active.ask(key, meta, (), frozen, problem)
    told = active.tell(key, meta, jax.tree.map(np.asarray, asked), problem, decision, Answer(problem.y[decision.index]))
    assert told.count == 6


def test_a_day_cut_in_two_asks_for_the_same_rows(key, tmp_path):
    problem = tasks.problem(X, classes=3)
    active = active_learner(CENTROIDS, acquisition.typical(k=2), capacity=8)
    meta = CENTROIDS.init(key, problem.x)

    def work(state, rounds):
        asked = []
        for _ in range(rounds):
            ask_key, tell_key = jax.random.split(jax.random.fold_in(key, state.round))
            decision, state = active.ask(ask_key, meta, (), state, problem)
            asked += decision.index.tolist()
            state = active.tell(tell_key, meta, state, problem, decision, Answer(Y[decision.index]))
        return state, asked

    start = active.init(key, meta, (), problem)
    whole, wanted = work(start, 4)
    tonight, first = work(start, 2)
    checkpoint.save(tmp_path / "tonight", tonight)
    shape = jax.eval_shape(active.init, key, meta, (), problem)
    tomorrow, second = work(checkpoint.restore(tmp_path / "tonight", shape), 2)
    assert first + second == wanted
    jax.tree.map(np.testing.assert_array_equal, tomorrow, whole)
