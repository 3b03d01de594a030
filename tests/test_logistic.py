"""Logistic regression against scikit-learn's, converged; what it adds, against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression

from metaal_jax import Batch, learners, losses
from metaal_jax.learners import logistic
from metaal_jax.learners.logistic import RIDGES, logistic_head

LOADERS = {"digits": load_digits, "wine": load_wine, "breast_cancer": load_breast_cancer}
fit_head = jax.jit(logistic_head, static_argnums=3, static_argnames=("steps", "ridge", "temperature", "ridges"))


@functools.cache
def rows(name):
    """100 labelled rows and all others: `(x, y, other x, other y)`; "wide" has three times as many columns as rows."""
    base, _, form = name.partition(", ")
    data = LOADERS[base]()
    x, y = data.data.astype(np.float64), data.target.astype(np.int32)
    if form != "raw":
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    if form == "wide":
        x = np.tanh(x @ np.random.default_rng(0).normal(size=(x.shape[1], 300)) / 4)
    order = np.random.default_rng(1).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order]
    return x[:100], y[:100], x[100:], y[100:]


def reference(x, y, ridge, weight=None):
    """Probabilities by scikit-learn, as a function of rows."""
    solver = "newton-cholesky" if x.shape[1] < 100 else "lbfgs"
    model = LogisticRegression(C=1 / ridge, solver=solver, tol=1e-8, max_iter=20000)
    return model.fit(x.astype(np.float64), y, sample_weight=weight).predict_proba


def probabilities(head, x):
    return np.asarray(jax.nn.softmax(x @ head["kernel"] + head["bias"][None]))


SETS = [
    ("digits", 1.0), ("digits", 0.1), ("digits", 30.0), ("wine", 1.0), ("wine", 0.01), ("breast_cancer", 1.0),
    ("breast_cancer, raw", 1.0), ("wine, raw", 1.0), ("digits, raw", 1.0), ("digits, wide", 1.0), ("wine, wide", 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ridge"), SETS)
def test_probabilities_are_scikit_learns(name, ridge):
    x, y, others, _ = rows(name)
    head = fit_head(x, y, np.ones(100, np.float32), y.max() + 1, ridge=ridge)
    np.testing.assert_allclose(probabilities(head, others), reference(x, y, ridge)(others), atol=1e-3)


def test_weights_and_padding_are_scikit_learns():
    x, y, others, _ = rows("digits")
    weight = np.random.default_rng(0).uniform(0.1, 3.0, 100).astype(np.float32)
    weight[60:] = 0.0
    padded = np.where(weight[:, None] > 0, x, np.nan)
    head = fit_head(padded, y, weight, 10)
    wanted = reference(x[:60], y[:60], 1.0, weight[:60])(others)
    np.testing.assert_allclose(probabilities(head, others), wanted, atol=1e-3)


def test_class_probabilities_are_rows_of_every_class():
    x, _, others, _ = rows("wine")
    target = np.random.default_rng(0).dirichlet(np.ones(3), 100).astype(np.float32)
    head = fit_head(x, target, np.ones(100, np.float32), 3)
    wanted = reference(x.repeat(3, 0), np.tile(np.arange(3), 100), 1.0, target.ravel())(others)
    np.testing.assert_allclose(probabilities(head, others), wanted, atol=1e-3)


@pytest.mark.parametrize("present", [(2, 7), (1, 4, 9), (3,)])
def test_classes_without_a_label_are_improbable_or_left_out(present):
    """As scikit-learn, which does not know them; of two classes it penalises one vector of weights."""
    x, y, others, _ = rows("digits")
    weight, kept = np.isin(y, present).astype(np.float32), np.isin(y, present)
    wanted = reference(x[kept], y[kept], 1.0)(others) if len(present) > 1 else np.ones((len(others), 1))
    got = probabilities(fit_head(x, y, weight, 10, unseen=0.0), others)
    np.testing.assert_allclose(got[:, present], wanted, atol=1e-3)
    np.testing.assert_array_equal(np.delete(got, present, axis=1), 0.0)
    head = fit_head(x, y, weight, 10, unseen=0.5)
    np.testing.assert_array_equal(np.delete(head["kernel"], present, axis=1), 0.0)
    # At the mean of the labelled rows such a class has half a label of all there are.
    logits = x[kept].mean(0) @ head["kernel"] + head["bias"]
    shares = np.exp(np.delete(logits, present) - jax.nn.logsumexp(logits[np.asarray(present)]))
    np.testing.assert_allclose(shares, 0.5 / kept.sum(), rtol=1e-4)


def test_a_warm_start_stays_and_helps():
    x, y, others, _ = rows("digits")
    learner, quick = learners.linear(10, steps=200), learners.linear(10, steps=4)
    meta = learner.init(jax.random.key(0), x)
    batch = Batch(x, y, np.ones(100, np.float32))
    less = batch._replace(weight=batch.weight * (np.arange(100) < 95))
    few, end = (jax.jit(learner.adapt)(jax.random.key(0), meta, rows) for rows in (less, batch))
    again = jax.jit(quick.adapt)

    def off(params):
        shown = (jax.nn.softmax(learner.predict(p, others).logits[0]) for p in (params, end))
        return np.abs(np.subtract(*map(np.asarray, shown))).max()

    cold, warm, stays = (off(again(jax.random.key(0), meta, batch, start=start)) for start in (None, few, end))
    assert stays < 1e-4
    assert warm < 0.5 * cold


def left_out_loss(x, y, ridge):
    """The mean cross entropy of each row by scikit-learn's regression on all others."""
    kept = [np.arange(len(y)) != i for i in range(len(y))]
    return np.mean([-np.log(reference(x[k], y[k], ridge)(x[~k])[0, y[i]]) for i, k in enumerate(kept)])


def test_leaving_one_out_chooses_the_ridge_of_exact_refits():
    x, y, _, _ = rows("wine")
    x, y, ridges = x[:40], y[:40], (0.01, 1.0, 100.0)
    scores = [left_out_loss(x, y, ridge) for ridge in ridges]
    best = ridges[int(np.argmin(scores))]
    weight = np.ones(40, np.float32)
    chosen = fit_head(x, y, weight, 3, ridge="leave_one_out", ridges=ridges)
    wanted = fit_head(x, y, weight, 3, ridge=best)
    np.testing.assert_allclose(chosen["kernel"], wanted["kernel"], atol=1e-3)
    noise = np.random.default_rng(0).permutation(y)  # labels that have nothing to do with the rows
    chosen = fit_head(x, noise, weight, 3, ridge="leave_one_out")
    np.testing.assert_allclose(chosen["kernel"], fit_head(x, noise, weight, 3, ridge=RIDGES[-1])["kernel"], atol=1e-3)


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_rows_left_out_are_as_unlikely_as_by_refits(name):
    """The cross entropy of rows left out, against a fit for each row without it, over ridges."""
    x, y, _, _ = rows(name)
    x, y, classes = x[:60], y[:60], int(y.max()) + 1
    weight, target = jnp.ones(60), jax.nn.one_hot(y, classes)
    problem = logistic.Regression(jnp.asarray(x - x.mean(0)), target, weight, target.sum(0) > 0)

    @jax.jit
    def both(ridge):
        def refit(i):
            head = logistic_head(x, y, weight.at[i].set(0.0), classes, ridge=ridge)
            return jnp.asarray(x)[i] @ head["kernel"] + head["bias"]

        head, penalty = logistic_head(x, y, weight, classes, ridge=ridge), ridge * (2.0 if classes == 2 else 1.0)
        solution = logistic.Linear(head["kernel"], head["bias"] + x.mean(0) @ head["kernel"])
        near, exact = logistic.left_out(problem, penalty, solution), jax.lax.map(refit, jnp.arange(60))
        return tuple(losses.cross_entropy(logits, jnp.asarray(y), weight) for logits in (near, exact))

    for ridge in (0.1, 1.0, 10.0):
        near, exact = map(float, both(ridge))
        assert near == pytest.approx(exact, rel=0.15), ridge


def test_temperature_is_a_factor_on_logits():
    """By leaving rows out, the one that a search over exact refits finds, nearly."""
    x, y, _, _ = rows("wine")
    x, y, weight = x[:40], y[:40], np.ones(40, np.float32)
    plain = fit_head(x, y, weight, 3, ridge=30.0)
    double = fit_head(x, y, weight, 3, ridge=30.0, temperature=2.0)
    np.testing.assert_allclose(double["kernel"], 2.0 * plain["kernel"], atol=1e-5)
    chosen = fit_head(x, y, weight, 3, ridge=30.0, temperature="leave_one_out")
    factor = np.abs(chosen["kernel"]).sum() / np.abs(plain["kernel"]).sum()
    np.testing.assert_allclose(chosen["kernel"], factor * plain["kernel"], atol=1e-4)
    kept = [np.arange(40) != i for i in range(40)]
    logits = np.concatenate([np.log(reference(x[k], y[k], 30.0)(x[~k])) for k in kept])
    grid = np.geomspace(0.5, 20.0, 400)
    scores = [np.mean(jax.nn.logsumexp(t * logits, axis=1) - t * logits[np.arange(40), y]) for t in grid]
    assert factor == pytest.approx(grid[int(np.argmin(scores))], rel=0.1)


def test_degenerate_columns():
    """Constant and equal columns, rows of one kind, and one row alone; all finite, in float64 as well."""
    x, y, _, _ = rows("wine")
    x = np.concatenate([x[:20], np.zeros((20, 2)), np.full((20, 1), 7e4), x[:20, :1]], axis=1).astype(np.float32)
    for width, dtype in ((None, np.float32), (None, np.float64)):
        with jax.enable_x64(dtype == np.float64):
            arrays = jnp.asarray(x[:, :width], dtype), y[:20], jnp.ones(20, dtype)
            head = fit_head(*arrays, 3)
            assert head["kernel"].dtype == dtype
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(head))
            np.testing.assert_allclose(head["kernel"][13:16], 0.0, atol=1e-5)
            np.testing.assert_allclose(head["kernel"][0], head["kernel"][16], atol=1e-3)
    one = fit_head(x[:1], y[:1], np.ones(1, np.float32), 3)
    np.testing.assert_array_equal(one["kernel"], 0.0)
    assert probabilities(one, x[:1])[0, y[0]] > 0.99


def test_seeds_together_are_seeds_alone():
    x, y, others, _ = rows("digits")
    weights = np.random.default_rng(0).integers(0, 3, (3, 100)).astype(np.float32)
    together = jax.jit(jax.vmap(lambda w: logistic_head(x, y, w, 10)))(weights)
    for i, weight in enumerate(weights):
        alone, head = fit_head(x, y, weight, 10), jax.tree.map(lambda leaf, i=i: leaf[i], together)
        np.testing.assert_allclose(probabilities(head, others), probabilities(alone, others), atol=1e-4)


WRONG = {
    "ridge must be above 0": {"ridge": 0.0},
    "ridge must be a number above 0 or 'leave_one_out'": {"ridge": "evidence"},
    "temperature must be above 0, got nan": {"temperature": float("nan")},
    "ridges must be numbers above 0": {"ridges": (1.0, -1.0)},
    "unseen must be at least 0": {"unseen": -1.0},
    "steps must be at least 1": {"steps": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_named(message):
    x, y, _, _ = rows("wine")
    with pytest.raises(ValueError, match=message):
        logistic_head(x, y, np.ones(100, np.float32), 3, **WRONG[message])
    learner = lambda: learners.linear(3, **WRONG[message])  # noqa: E731
    if set(WRONG[message]) <= {"ridge", "temperature"}:  # the others are looked at where they are used
        with pytest.raises(ValueError, match=message):
            learner()
