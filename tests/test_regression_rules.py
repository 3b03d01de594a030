"""One table for the rules for regression, and their values against float64 NumPy forms written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import acquisition
from metaal_jax.names import REGRESSION, Given
from views import make_view, reorder

N, K = 24, 4
NEED = Given(k=K, rounds=3, classes=0, learner=None, refit=None, loss_learner=None)
RULES = {name: strategy.make(NEED) for name, strategy in REGRESSION.items()}
RULES["greedy_input, embedding"] = acquisition.greedy_input(k=K, space="embedding")
COMMITTEES = [name for name, strategy in REGRESSION.items() if strategy.committee]
ANYWHERE = ("random", "greedy_input", "greedy_input, embedding", "model_change")  # no matter what the labels are
TRUTH = np.random.default_rng(9).normal(size=(N, 2)).astype(np.float32)


def view_of(seed, *, members=3, labelled=(), targets=2, **options):
    """A pool whose members give `targets` numbers a row, with the labels of the labelled rows."""
    view = make_view(seed, N, members=members, classes=targets, labelled=labelled, **options)
    known = np.zeros(6, int)
    known[: len(labelled)] = labelled
    weight = jnp.asarray(np.arange(6) < len(labelled), jnp.float32)
    y = jnp.asarray(TRUTH[known][:, :targets] if targets > 1 else TRUTH[known][:, 0])
    batch = view.labelled._replace(x=view.x[known], y=y, weight=weight)
    return view._replace(labelled=batch, budget=jnp.float32(100))


def filled(view, rows):
    prediction = jax.tree.map(lambda leaf: jnp.where(rows[:, None], jnp.nan, leaf), view.prediction)
    return view._replace(x=jnp.where(rows[:, None], jnp.nan, view.x), prediction=prediction)


BASE = view_of(14, queried=(3, 5), labelled=(1, 8))
PADDED = view_of(2, queried=(3, 5), labelled=(1, 8), padding=4)
ORDER = np.random.default_rng(5).permutation(N)
SAME = view_of(2, labelled=(1, 8))
SAME = SAME._replace(
    x=jnp.ones_like(SAME.x), prediction=jax.tree.map(lambda leaf: leaf[:, :1] + jnp.zeros_like(leaf), SAME.prediction)
)
LEFT = jnp.asarray([0, 7, 20])
CASES = {
    "base": BASE,
    "permuted": reorder(BASE, ORDER),
    "padded": PADDED,
    "padded with NaN": filled(PADDED, jnp.arange(N) >= N - 4),
    "one row less": BASE._replace(weight=BASE.weight.at[7].set(0.0)),
    "one NaN row": filled(BASE, BASE.row == 7),
    "a NaN row and two others": filled(BASE, BASE.row == 7)._replace(queried=~jnp.isin(BASE.row, LEFT)),
    "cold": view_of(2),
    "none left": BASE._replace(queried=jnp.ones(N, bool)),
    "identical rows": SAME,
}  # fmt: skip
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *CASES.values())


def decide(rule):
    return lambda key, view: rule.act(key, (), rule.begin(key, (), view), view)[0]


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_contract(key, name):
    run = jax.jit(jax.vmap(jax.vmap(decide(RULES[name]), in_axes=(None, 0)), in_axes=(0, None)))
    decisions = run(jax.random.split(key, 4), STACKED)
    got = {case: jax.tree.map(lambda leaf, i=i: np.asarray(leaf[0, i]), decisions) for i, case in enumerate(CASES)}
    for case, decision in got.items():
        available = np.asarray(CASES[case].available)
        chosen = decision.index[decision.valid]
        assert len(set(chosen.tolist())) == len(chosen) == min(K, available.sum()), case
        assert available[chosen].all(), case
        assert not np.isnan(decision.scores[available]).any(), case
    np.testing.assert_array_equal(ORDER[got["permuted"].index], got["base"].index)
    np.testing.assert_array_equal(got["padded with NaN"].index, got["padded"].index)
    np.testing.assert_array_equal(got["one NaN row"].index, got["one row less"].index)
    last = got["a NaN row and two others"]
    assert last.index[last.valid][-1] == 7
    ties = np.asarray(decisions.index)[:, list(CASES).index("identical rows")]
    assert len({tuple(picks) for picks in ties.tolist()}) > 1  # broken by the key


@pytest.mark.parametrize("name", RULES)
def test_rules_for_targets_refuse_classes(key, name):
    view = view_of(0)
    classes = view._replace(labelled=view.labelled._replace(y=jnp.zeros(6, jnp.int32)))
    if name in ANYWHERE:
        jax.eval_shape(decide(RULES[name]), key, classes)
        return
    with pytest.raises(ValueError, match=f"{name}: needs targets, and labels of int32"):
        jax.eval_shape(decide(RULES[name]), key, classes)


def test_rules_for_classes_refuse_targets(key):
    rules = {
        "margin": acquisition.top_k(acquisition.margin, k=K),
        "bald": acquisition.top_k(acquisition.bald, k=K),
        "epig": acquisition.epig(k=K),
        "batch_bald": acquisition.batch_bald(k=K),
        "badge": acquisition.badge(k=K),
        "class_balanced": acquisition.class_balanced(acquisition.random, k=K),
        "uncertain_herding": acquisition.uncertain_herding(k=K),
    }
    for name, rule in rules.items():
        with pytest.raises(ValueError, match=f"{name}: needs class probabilities"):
            jax.eval_shape(decide(rule), key, view_of(0))


def test_arguments_are_checked(key):
    for wrong, message in (
        (lambda: acquisition.igs(k=0), "k must be at least 1"),
        (lambda: acquisition.greedy_input(k=1, space="pixels"), "space must be one of"),
        (lambda: acquisition.expected_variance_reduction(k=1, noise=-1.0), "noise must not be negative"),
        (lambda: decide(RULES["igs"])(key, view_of(0, targets=1)._replace(labelled=view_of(0).labelled)), "2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    for name in COMMITTEES:
        with pytest.raises(ValueError, match="committee"):
            jax.eval_shape(decide(RULES[name]), key, view_of(0, members=1))


def plain_greedy(view, by_input, by_output):
    """Greedy sampling from its definition: the first of a cold start is nearest to the mean, the others farthest."""
    x, real = np.asarray(view.x, np.float64), np.asarray(view.weight) > 0
    f = np.asarray(view.prediction.logits, np.float64).mean(0)
    covered = [
        (x[i], np.asarray(y).ravel()) for i, y in zip(view.labelled_index, view.labelled.y, strict=True) if i >= 0
    ]
    cold, picks, left = not covered, [], np.asarray(view.available).copy()
    for _ in range(K):
        if covered:
            dx = np.asarray([np.linalg.norm(x - a, axis=1) for a, _ in covered])
            dy = np.asarray([np.linalg.norm(f - b, axis=1) for _, b in covered])
            score = (dx if by_input or cold else 1.0) * (dy if by_output and not cold else 1.0)
            score = score.min(0)
        else:
            score = -np.linalg.norm(x - x[real].mean(0), axis=1)
        picks.append(int(np.where(left, score, -np.inf).argmax()))
        left[picks[-1]] = False
        covered.append((x[picks[-1]], f[picks[-1]]))
    return picks


@pytest.mark.parametrize("targets", [1, 2])
def test_greedy_sampling_against_the_paper(key, targets):
    kinds = {"greedy_input": (True, False), "greedy_output": (False, True), "igs": (True, True)}
    run = jax.jit(lambda key, view: {name: decide(RULES[name])(key, view).index for name in kinds})
    for seed, labelled in ((0, (2, 9, 11)), (1, (4,)), (3, ())):
        view = view_of(seed, labelled=labelled, targets=targets, padding=2)
        got = run(key, view)
        for name, kind in kinds.items():
            assert got[name].tolist() == plain_greedy(view, *kind), (name, seed)


def test_variances_against_their_definitions(key):
    view = view_of(3, labelled=(2, 9), members=4, padding=2)
    f, real = np.asarray(view.prediction.logits, np.float64), np.asarray(view.weight) > 0
    np.testing.assert_allclose(acquisition.committee_variance(key, view), f.var(0).sum(-1), rtol=1e-5)
    z = np.asarray(view.prediction.embedding, np.float64).mean(0)
    change = np.linalg.norm(f - f.mean(0), axis=-1).mean(0) * np.sqrt((z**2).sum(-1) + 1)
    np.testing.assert_allclose(acquisition.expected_model_change(key, view), change, rtol=1e-5)

    noise, away = 0.3, f - f.mean(0)
    rule = acquisition.expected_variance_reduction(k=K, noise=noise)
    decision = jax.jit(decide(rule))(key, view)
    covariance = [away[:, :, o].T @ away[:, :, o] / 4 for o in range(2)]
    left = np.asarray(view.available).copy()
    for turn, pick in enumerate(decision.index.tolist()):
        score = sum((c[:, real] ** 2).mean(1) / (np.diag(c) + noise) for c in covariance)
        if turn == 0:
            np.testing.assert_allclose(decision.scores[real], score[real], rtol=1e-4)
        assert pick == np.where(left, score, -np.inf).argmax()
        left[pick] = False
        covariance = [c - np.outer(c[:, pick], c[pick]) / (c[pick, pick] + noise) for c in covariance]
