"""The doors for people with rows: the same rows as the loop's, and one line for what cannot be right."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaal_jax as ml
from metaal_jax import Answer, Policy, learners, names, tasks
from metaal_jax.door_inputs import scaled
from metaal_jax.names import ADAPTIVE, REGRESSION, STRATEGIES

RNG = np.random.default_rng(0)
N, K, CLASSES = 60, 4, 3
TRUTH = np.arange(N) % CLASSES
X = (RNG.normal(size=(N, 5)) + 1.5 * np.eye(CLASSES, 5)[TRUTH]).astype(np.float32)
NAMES = np.asarray(["ant", "bee", "cat"])
FIRST = {int(row): NAMES[TRUTH[row]] for row in (3, 1, 14, 20)}  # all three classes, and an order that is not sorted
# One of each kind; tests/campaigns/doors.py asks all.
KINDS = ("balanced_margin", "uncertain_herding", "bald", "glister", "error_reduction", "predicted_loss")
PICKED = ("badge", "batch_bald", "prob_cover", "igs", "committee_variance")
POSSIBLE = [name for name, found in STRATEGIES.items() if not found.held_out]
TRAINED = ["cifar10", "cifar10_selector", "omniglot"]


def hand_written(strategy, labels, *, rounds=1):
    """What suggest promises to ask for, by init, ask and tell: rows of each round, and the labelled rows."""
    learner = learners.linear(CLASSES)
    policy = names.strategy(
        strategy, k=K, rounds=5, classes=CLASSES, learner=learner, refit=learners.linear(CLASSES, steps=16),
        loss_learner=ml.door_inputs.loss_learner(CLASSES), posterior=names.posterior(learner, members=5),
    )  # fmt: skip
    active = ml.active_learner(learner, policy, capacity=min(N, 32))
    number = {name: place for place, name in enumerate(NAMES)}
    problem = tasks.problem(
        scaled("test", X, "columns"), known={row: number[label] for row, label in labels.items()}, classes=CLASSES
    )
    meta_key, init_key, ask_key = jax.random.split(jax.random.key(7), 3)
    meta, params = learner.init(meta_key, problem.x), policy.init(meta_key)
    state, ask, tell = jax.jit(active.init)(init_key, meta, params, problem), jax.jit(active.ask), jax.jit(active.tell)
    asked = []
    for turn in range(rounds):
        decision, state = ask(jax.random.fold_in(ask_key, state.count), meta, params, state, problem)
        asked.append(np.asarray(decision.index).tolist())
        if turn + 1 < rounds:
            answer = Answer(y=jnp.asarray(TRUTH, jnp.int32)[decision.index])
            state = tell(ask_key, meta, state, problem, decision, answer)
    return asked


def suggested(strategy, labels, **more):
    return ml.suggest(X, labels, k=K, strategy=strategy, members=5, rounds=5, seed=7, **more)


@pytest.mark.parametrize("strategy", KINDS)
def test_suggest_asks_for_what_the_loop_asks_for(strategy):
    assert suggested(strategy, FIRST).tolist() == hand_written(strategy, FIRST)[0]


@pytest.mark.parametrize("strategy", ["uncertain_herding", "albl"])
def test_rounds_of_suggest_are_those_of_the_loop(strategy):
    """With its state a strategy goes on as in one run; one without memory does so without."""
    labels, state, asked = dict(FIRST), None, []
    for _ in range(3):
        found = suggested(strategy, labels, state=state, details=True)
        asked.append(found.rows.tolist())
        labels |= {int(row): NAMES[TRUTH[row]] for row in found.rows}
        state = found.state if names.find(strategy).memory else None
    assert asked == hand_written(strategy, FIRST, rounds=3)


def spied(policy):
    """The policy, and the views that it saw."""
    seen = []

    def act(key, params, state, view):
        jax.debug.callback(lambda view: seen.append(view), view)
        return policy.act(key, params, state, view)

    return Policy(policy.init, policy.begin, act), seen


WITHOUT_MODEL = [
    name for name, found in {**STRATEGIES, **REGRESSION, **ADAPTIVE}.items()
    if not set(found.needs) & {"x", "learner", "refit", "loss_learner", "truth"}
]  # fmt: skip


@pytest.mark.parametrize("strategy", [name for name in PICKED if name in (*WITHOUT_MODEL, *TRAINED)])
def test_pick_picks_what_the_loop_picks(strategy):
    """From the logits and the embedding that the strategy sees in a run, with the run's keys."""
    found = names.find(strategy)
    targets = found.labels == "targets"
    single = learners.r2d2(ml.models.MLP(CLASSES, hidden=()), **REGRESSED) if targets else learners.linear(CLASSES)
    learner = learners.committee(single, members=3) if found.committee else single
    policy = names.strategy(strategy, k=K, classes=CLASSES, rounds=5)
    spy, seen = spied(policy)
    active = ml.active_learner(learner, spy, capacity=16)
    y = RNG.normal(size=(N, CLASSES)).astype(np.float32) if targets else TRUTH
    problem = tasks.problem(X, known={row: y[row] for row in FIRST}, classes=None if targets else CLASSES)
    # The keys that pick uses, so that the strategy's own draws are the same.
    begin_key, act_key = jax.random.split(jax.random.key(5))
    meta, params = learner.init(begin_key, X), policy.init(begin_key)
    state = jax.jit(active.init)(begin_key, meta, params, problem)
    jax.block_until_ready(jax.jit(active.ask)(act_key, meta, params, state, problem))
    jax.effects_barrier()
    view = jax.tree.map(jnp.asarray, seen[0])

    @jax.jit
    def choose(view):
        state = policy.begin(begin_key, params, view)
        return policy.act(jax.random.fold_in(act_key, len(FIRST)), params, state, view)[0].index

    given = {"logits": view.prediction.logits if found.committee else view.prediction.logits[0],
             "embedding": view.prediction.embedding[0]}  # fmt: skip
    needed = {name: given[name] for name in given if name in found.needs or (name == "logits" and found.committee)}
    needed = needed or {"embedding": given["embedding"]}
    labelled = {row: y[row] for row in FIRST} if "labels" in found.needs else list(FIRST)
    picked = ml.pick(strategy, **needed, labelled=labelled, k=K, classes=CLASSES, rounds=5, seed=5)
    assert picked.tolist() == np.asarray(choose(view)).tolist()


REGRESSED = {"loss": ml.losses.squared_error, "score": ml.losses.root_mean_squared_error, "intercept": True}


def test_labels_of_any_kind_in_any_form():
    lists = [None] * N
    for row, label in FIRST.items():
        lists[row] = label
    by_row = ml.suggest(X, dict(sorted(FIRST.items())), k=K)
    assert ml.suggest(X, lists, k=K).tolist() == by_row.tolist()
    assert ml.suggest(X, np.asarray(lists, object), k=K).tolist() == by_row.tolist()
    assert ml.suggest(X, FIRST | {5: None}, k=K).tolist() == ml.suggest(X, FIRST, k=K).tolist()
    renamed = {row: ("species", str(label)) for row, label in FIRST.items()}
    found = ml.suggest(X, renamed, k=K, details=True)
    assert found.rows.tolist() == ml.suggest(X, FIRST, k=K).tolist()
    assert found.classes == (("species", "ant"), ("species", "bee"), ("species", "cat"))
    mixed = ml.suggest(X, {0: 1, 1: "one", 2: (1, 2)}, k=K, details=True)
    assert len(mixed.classes) == 3
    np.testing.assert_allclose(mixed.probabilities.sum(1), 1, atol=1e-5)
    assert mixed.scores.shape == (N,)


@pytest.mark.parametrize(("labels", "classes"), [(None, 0), ({}, 0), ({4: "ant"}, 1), (FIRST, 3)])
def test_probabilities_are_of_the_labels_seen(labels, classes):
    found = ml.suggest(X, labels, k=K, details=True)
    assert found.probabilities.shape == (N, classes)
    assert len(set(found.rows.tolist()) - set(labels or {})) == K
    if classes:
        np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)


def test_a_pool_with_little_or_nothing_left():
    labels = {row: NAMES[TRUTH[row]] for row in range(N - 2)}
    assert sorted(ml.suggest(X, labels, k=K).tolist()) == [N - 2, N - 1]
    assert ml.suggest(X, list(NAMES[TRUTH]), k=K).tolist() == []
    assert sorted(ml.pick("margin", logits=X, labelled=list(range(N - 2)), k=K).tolist()) == [N - 2, N - 1]
    assert len(ml.suggest(X[:3], k=10)) == 3


def test_a_newer_label_replaces_the_older_and_another_class_turns_up():
    first = ml.suggest(X, FIRST, k=K, strategy="omniglot", details=True)
    corrected = {**FIRST, 3: "bee", 30: "dog"}
    found = ml.suggest(X, corrected, k=K, strategy="omniglot", state=first.state, details=True)
    assert found.classes == ("ant", "bee", "cat", "dog")
    assert found.state.rows == (3, 1, 14, 20, 30)


def test_columns_are_scaled_whatever_their_unit():
    shifted = X * np.asarray([1, 10, 1e-3, 1e4, 1]) + np.asarray([0, 5, 0, 1e6, 3])
    still = np.concatenate([shifted, np.full((N, 1), 7.7)], axis=1)
    want = ml.suggest(X, FIRST, k=K).tolist()
    assert ml.suggest(shifted, FIRST, k=K).tolist() == want
    assert ml.suggest(still, FIRST, k=K).tolist() == want
    np.testing.assert_allclose(scaled("test", still, "columns")[:, :5].std(0), 1, rtol=1e-5)
    assert (scaled("test", still, "columns")[:, 5] == 0).all()
    np.testing.assert_allclose(scaled("test", X, "common").std(), 1, rtol=1e-5)
    np.testing.assert_array_equal(scaled("test", X, "none"), X)


def hole(array, value):
    array = np.array(array)
    array[2, 1] = value
    return array


SUGGEST = {
    "a cell that is NaN": (dict(x=hole(X, np.nan)), r"suggest: x\[2, 1\] is nan; fill in or leave out"),
    "strings": (dict(x=[["a"], ["b"]]), "suggest: .* holds strings, not numbers; encode it first"),
    "one column": (dict(x=X[:, 0]), r"suggest: x must be rows \[n, d\], got shape \[60\]; one column is x\[:, None\]"),
    "no rows": (dict(x=X[:0], labels=None), "suggest: x has no rows"),
    "a row that there is not": (dict(labels={60: "ant"}), "labels has row 60; the pool has rows 0 to 59"),
    "a row that is no number": (dict(labels={"3": "ant"}), "labels has row '3'; the pool has rows 0 to 59"),
    "too few entries": (dict(labels=["ant"] * 3), "labels has 3 entries for 60 rows; give one for each row, None"),
    "a label that is NaN": (dict(labels={4: float("nan")}), "the label of row 4 is nan; use None for no label"),
    "an array with NaN": (dict(labels=hole(X, np.nan)[:, 1]), "the label of row 2 is nan; use None for no label"),
    "a label that is a list": (dict(labels={4: ["ant"]}), "the label of row 4 is a list, which cannot be hashed"),
    "k of 0": (dict(k=0), "suggest: k must be a positive integer, got 0"),
    "k of 2.5": (dict(k=2.5), "suggest: k must be a positive integer, got 2.5"),
    "a strategy misspelt": (dict(strategy="bagde"), "unknown strategy 'bagde'; did you mean badge"),
    "an oracle": (dict(strategy="oracle"), "oracle needs the pool's hidden labels .*: run it with compare"),
    "a bandit": (dict(strategy="albl"), "suggest: albl needs the number of rounds: give rounds="),
    "a rule for targets": (dict(strategy="igs"), "igs is for targets that are numbers, and labels here are classes"),
    "a learner misspelt": (dict(learner="lineal"), "suggest: unknown learner 'lineal'; did you mean linear"),
    "a learner that is none": (dict(learner=3), "suggest: learner must be one of linear, .*, got a int"),
    "a scale misspelt": (dict(scale="column"), "scale must be 'columns', 'common' or 'none', got 'column'"),
    "members": (dict(strategy="bald", members=1), "members must be at least 2, got 1"),
}
PICK = {
    "no logits": (dict(strategy="badge", embedding=X), "pick: badge needs the model's logits: give logits="),
    "no embedding": (dict(strategy="badge", logits=X), "pick: badge needs an embedding of the rows: give embedding="),
    "nothing": (dict(strategy="random"), "pick: give logits, embedding or both"),
    "a single model": (dict(strategy="bald", logits=X), r"bald needs the logits of several models, \[m, n, c\]: give"),
    "no labels": (dict(strategy="omniglot", logits=X, embedding=X, labelled=[1]), "give labelled={row: class number}"),
    "gradients": (dict(strategy="glister", logits=X, embedding=X, labelled={1: 0}),
                  "pick: glister needs the learner, whose gradients it takes: use suggest"),
    "rows that differ": (dict(strategy="badge", logits=X, embedding=X[:9]), "logits have 60 rows and the embedding 9"),
    "four dimensions": (dict(strategy="margin", logits=X[None, None]), r"logits must be \[n, c\] or \[m, n, c\], got"),
    "infinite": (dict(strategy="margin", logits=hole(X, np.inf)), r"pick: logits\[2, 1\] is inf"),
    "a row twice": (dict(strategy="margin", logits=X, labelled=[3, 3]), "labelled has row 3 2 times; give each row"),
    "a row too far": (dict(strategy="margin", logits=X, labelled=[99]), r"labelled\[0\] is 99; the pool has rows 0"),
    "a class too many": (dict(strategy="omniglot", logits=X, embedding=X, labelled={1: 9}), r"labelled\[0\] is 9; cl"),
    "classes": (dict(strategy="prob_cover", embedding=X), "prob_cover needs the number of classes: give classes="),
}  # fmt: skip


@pytest.mark.parametrize("case", SUGGEST)
def test_suggest_refuses_in_one_line(case):
    given, message = SUGGEST[case]
    with pytest.raises(ValueError, match=message) as error:
        ml.suggest(**{"x": X, "labels": FIRST, "k": K, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", PICK)
def test_pick_refuses_in_one_line(case):
    given, message = PICK[case]
    with pytest.raises(ValueError, match=message) as error:
        ml.pick(**{"k": K, **given})
    assert "\n" not in str(error.value)


def test_a_state_of_another_run_is_refused():
    state = ml.suggest(X, FIRST, k=K, strategy="omniglot", details=True).state
    with pytest.raises(ValueError, match="the state is that of another strategy, pool or k"):
        ml.suggest(X, FIRST, k=K, strategy="cifar10_selector", state=state)


def test_a_function_makes_the_learner():
    made = ml.suggest(X, FIRST, k=K, learner=lambda classes: learners.linear(classes))
    assert made.tolist() == ml.suggest(X, FIRST, k=K).tolist()


class Tensor:
    """What a tensor of PyTorch looks like to those who do not import it."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.array


def test_tensors_and_sparse_rows():
    assert ml.suggest(Tensor(X), FIRST, k=K).tolist() == ml.suggest(X, FIRST, k=K).tolist()
    assert ml.pick("margin", logits=Tensor(X), k=K).tolist() == ml.pick("margin", logits=X, k=K).tolist()
    scipy = pytest.importorskip("scipy.sparse")
    with pytest.raises(ValueError, match=re.escape("give x.toarray(), or fewer columns")):
        ml.suggest(scipy.csr_matrix(X), k=K)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parent.parent / "docs" / "doors.md").read_text()
    scope = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.S)):
        exec(compile(block, f"docs/doors.md, block {number}", "exec"), scope)
    assert float(capsys.readouterr().out.split()[0]) > 0.9  # accuracy with 20 labels
    assert (tmp_path / "wine.png").is_file()
    assert len(scope["found"].rows) == 5
