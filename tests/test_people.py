"""A loop that people can live with: labels corrected, taken back, known before, put off; a pool that grows."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Answer, acquisition, active_learner, annotators, metrics, tasks
from test_loop import CENTROIDS, CLASSES, MARGIN, ROWS, cloud, near

K = 2


@pytest.fixture(scope="module")
def begun():
    """`(problem, meta, active, state, decision)` after one `ask`."""
    key, problem = jax.random.key(3), cloud(0)
    active = active_learner(CENTROIDS, MARGIN, capacity=6)
    meta = CENTROIDS.init(key, problem.x)
    decision, state = active.ask(key, meta, (), active.init(key, meta, (), problem), problem)
    return problem, meta, active, state, decision


def test_a_corrected_label_is_as_if_it_had_been_right_from_the_start(key, begun):
    problem, meta, active, state, decision = begun
    truth = np.asarray(problem.y[decision.index])
    right = active.tell(key, meta, state, problem, decision, Answer(truth))
    wrong = active.tell(key, meta, state, problem, decision, Answer((truth + 1) % CLASSES))
    corrected = active.tell(key, meta, wrong, problem, decision, Answer(truth))
    near(corrected._replace(round=right.round), right)
    assert corrected.count == corrected.spent == 2  # a correction costs nothing


def test_a_label_taken_back_was_never_there(key, begun):
    problem, meta, active, state, decision = begun
    one, both = Answer(problem.y[decision.index], weight=[0, 1]), Answer(problem.y[decision.index])
    told = active.tell(key, meta, state, problem, decision, both)
    first = int(decision.index[0])
    back = active.untell(key, meta, told, problem, [first])
    wanted = active.tell(key, meta, state, problem, decision, one)
    near(back._replace(queried=wanted.queried), wanted)
    assert not back.queried[first]  # and may be asked for again
    assert wanted.queried[first]
    near(active.untell(key, meta, told, problem, decision.index).labelled, state.labelled)
    with pytest.raises(ValueError, match=r"index\[0\] is 99; the pool has rows 0 to 23"):
        active.untell(key, meta, told, problem, [99])
    traced = jax.jit(active.untell)(key, meta, told, problem, jnp.asarray([first, -1]))
    near(traced, back)


def test_later_is_not_cannot_tell(key, begun):
    problem, meta, active, state, decision = begun
    told = active.tell(key, meta, state, problem, decision, Answer([0, 0], weight=[0, 1], later=[False, True]))
    assert told.count == told.spent == 0
    assert told.queried[decision.index].tolist() == [True, False]


DAY = """
import sys
import jax, numpy as np
import metaal_jax as ml

folder, rounds = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 1)
problem = ml.tasks.problem(x, classes=3)
learner = ml.learners.protonet(ml.models.MLP(3, hidden=(8,)))
active = ml.active_learner(learner, ml.acquisition.typical(k=3), capacity=18)
meta_key, init_key, key = jax.random.split(jax.random.key(0), 3)
meta = learner.init(meta_key, problem.x)
if sys.argv[3] == "on":
    shape = jax.eval_shape(active.init, init_key, meta, (), problem)
    state = ml.checkpoint.restore(folder, shape)
else:
    state = active.init(init_key, meta, (), problem)
for _ in range(rounds):
    ask_key, tell_key = jax.random.split(jax.random.fold_in(key, state.round))
    decision, state = active.ask(ask_key, meta, (), state, problem)
    print(*decision.index.tolist())
    state = active.tell(tell_key, meta, state, problem, decision, ml.Answer(y[decision.index]))
ml.checkpoint.save(folder, state)
"""


def test_a_labelling_day_cut_in_two_processes(tmp_path, monkeypatch, capsys):
    """Saved by one process and gone on with in another, the same rows are asked for as without the break."""

    def here(*arguments):
        monkeypatch.setattr(sys, "argv", ["day", *arguments])
        exec(compile(DAY, "day", "exec"), {})
        return capsys.readouterr().out.split()

    whole = here(str(tmp_path / "whole"), "4", "new")
    first = here(str(tmp_path / "cut"), "2", "new")
    command = [sys.executable, "-c", DAY, str(tmp_path / "cut"), "2", "on"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first + done.stdout.split() == whole
    assert len(set(whole)) == 12


def test_labels_that_exist_already(key):
    """`known` without any hidden label runs as an initial set with its labels in `y` does."""
    full = cloud(6, initial=[5, 17, 3])
    known = {row: int(full.y[row]) for row in (5, 17, 3)}
    bare = tasks.problem(full.x, known=known, validation=full.validation, classes=CLASSES)
    active = active_learner(CENTROIDS, MARGIN, capacity=8)
    meta = CENTROIDS.init(key, full.x)
    wanted, got = (active.init(key, meta, (), problem) for problem in (full, bare))
    near(got, wanted)
    decision, _ = active.ask(key, meta, (), got, bare)
    np.testing.assert_array_equal(decision.index, active.ask(key, meta, (), wanted, full)[0].index)


def test_a_pool_that_grows(key):
    """New rows take the place of padding; the policy begins again and sees them, and nothing compiles anew."""
    x = np.random.default_rng(1).normal(size=(ROWS, 4)).astype(np.float32)
    rule = acquisition.typical(k=K)
    active = active_learner(CENTROIDS, rule, capacity=6)
    small = tasks.problem(x[:10], rows=ROWS, classes=CLASSES)
    meta = CENTROIDS.init(key, small.x)
    compiled = {"ask": 0}

    def ask(*arguments):
        compiled["ask"] += 1
        return active.ask(*arguments)

    ask = jax.jit(ask)
    state = active.init(key, meta, (), small)
    decision, state = ask(key, meta, (), state, small)
    assert (decision.index < 10).all()
    state = active.tell(key, meta, state, small, decision, Answer([0, 1]))
    grown = tasks.extend(small, x[10:])
    np.testing.assert_array_equal(grown.x, x)
    again = active.begin(key, meta, (), state, grown)
    decision, _ = ask(key, meta, (), again, grown)
    assert compiled["ask"] == 1
    # As a run that had all rows from the start and the same labels.
    whole = tasks.problem(x, classes=CLASSES)
    other = active.begin(key, meta, (), active.init(key, meta, (), whole)._replace(**{
        name: getattr(state, name)
        for name in ("labelled", "labelled_index", "labelled_cost", "count", "queried", "spent", "round")
    }), whole)  # fmt: skip
    np.testing.assert_array_equal(decision.index, ask(key, meta, (), other, whole)[0].index)


def test_no_test_rows_and_a_pool_with_nothing_left(key):
    problem = cloud(4, rows=5)._replace(test=None)
    active = active_learner(CENTROIDS, MARGIN, capacity=5)
    _, trace = active.run(key, CENTROIDS.init(key, problem.x), (), problem, rounds=4)
    assert trace.test is None
    assert trace.validation.accuracy.shape == (4,)
    assert trace.left.tolist() == [3, 1, 0, 0]
    assert trace.valid.sum(-1).tolist() == [2, 2, 1, 0]


def test_several_annotators_answers_stand_beside_each_other(key, begun):
    problem, meta, _, state, decision = begun
    active = active_learner(CENTROIDS, MARGIN, capacity=6, again=True)
    told = active.tell(key, meta, state, problem, decision, Answer([0, 0], annotator=[1, 1]))
    told = active.tell(key, meta, told, problem, decision, Answer([1, 2], annotator=[2, 1]))
    first, second = decision.index.tolist()
    assert told.labelled_index[:3].tolist() == [first, second, first]
    assert told.labelled_annotator[:3].tolist() == [1, 1, 2]
    assert told.labelled.y[:3].tolist() == [0, 2, 1]
    assert (told.count, told.spent) == (3, 4)  # asked again, paid again
    asked = active.ask(key, meta, (), told, problem)[0]
    assert asked.valid.all()
    # Only then may rows with an answer be asked for again.
    once = active_learner(CENTROIDS, acquisition.top_k(lambda key, view: -abs(view.row - first), k=1), capacity=6)
    assert int(once.ask(key, meta, (), told._replace(policy_state=()), problem)[0].index[0]) != first
    more = active_learner(
        CENTROIDS, acquisition.top_k(lambda key, view: -abs(view.row - first), k=1), capacity=6, again=True
    )
    assert int(more.ask(key, meta, (), told._replace(policy_state=()), problem)[0].index[0]) == first


def test_a_run_in_pieces_is_the_run_in_one_piece(key):
    problem = cloud(0)
    busy = annotators.busy(annotators.noisy(annotators.truth(), rate=0.3, classes=CLASSES), rate=0.4)
    active = active_learner(CENTROIDS, MARGIN, capacity=12, annotator=busy, record=lambda state: state.queried.sum())
    meta = CENTROIDS.init(key, problem.x)
    state, trace = active.run(key, meta, (), problem, rounds=6)
    half, first = active.run(key, meta, (), problem, rounds=3)
    whole, second = active.run(key, meta, (), problem, rounds=3, state=half)
    near(whole, state)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(np.concatenate([a, b]), c), first, second, trace)
    assert trace.record.tolist() == trace.count.tolist()  # rows put off may come again
    assert trace.count[-1] < 12


def test_targets_run_through_the_loop(key):
    """Float labels: the buffer is shaped by them, the score is one of regression, and rules for classes refuse."""
    x = np.random.default_rng(2).normal(size=(ROWS, 3)).astype(np.float32)
    y = np.stack([x @ [1.0, -2.0, 0.5], x[:, 0]], 1).astype(np.float32)
    problem = tasks.problem(x, y, x, y)

    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        rows = jnp.where(batch.weight[:, None] > 0, batch.x, 0.0)
        gram = rows.T @ rows + 1e-3 * jnp.eye(3)
        return jnp.linalg.solve(gram, rows.T @ jnp.where(batch.weight[:, None] > 0, batch.y, 0.0))

    learner = CENTROIDS._replace(
        adapt=adapt, predict=lambda params, x: CENTROIDS.predict({"kernel": params, "bias": jnp.zeros(2)}, x)
    )
    rule = acquisition.top_k(acquisition.random, k=2)
    active = active_learner(learner, rule, capacity=8, score=metrics.regression_score)
    state, trace = active.run(key, jnp.zeros(()), (), problem, rounds=4)
    assert state.labelled.y.shape == (8, 2)
    np.testing.assert_array_equal(state.labelled.y, y[state.labelled_index])
    assert trace.test.rmse[-1] < 0.01 < trace.test.rmse[0]
    assert trace.test.r2[-1] > 0.999
    with pytest.raises(ValueError, match="regression_score"):
        active_learner(learner, rule, capacity=8).run(key, jnp.zeros(()), (), problem, rounds=1)
