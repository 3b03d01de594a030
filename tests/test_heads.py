"""Heads in closed form: against scikit-learn and SciPy, their derivatives against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC

from metaal_jax.learners.heads import prototype_head, ridge_head, svm_dual, svm_head, svm_residual
from metaal_jax.learners.logistic import logistic_head
from metaal_jax.losses import cross_entropy

FIRM = functools.partial(logistic_head, unseen=0.0)  # rules out classes without a label, as the other heads do

HEADS = {  # the head, its hyperparameters, features of 7 rows: more than rows for the dual form of ridge regression
    "ridge, primal": (ridge_head, {"ridge": 0.7, "scale": 3.0}, 4),
    "ridge, dual": (ridge_head, {"ridge": 0.7, "scale": 3.0}, 9),
    "svm": (svm_head, {"penalty": 0.2, "ridge": 0.5, "scale": 3.0}, 4),
    "svm, no ridge": (svm_head, {"penalty": 0.2, "ridge": 0.0, "scale": 3.0}, 9),
    "logistic": (FIRM, {"ridge": 0.7, "temperature": 1.5}, 4),
    "logistic, rows": (FIRM, {"ridge": 0.7, "temperature": 1.5}, 9),
}
each_head = pytest.mark.parametrize("name", HEADS)
fit_ridge = jax.jit(ridge_head, static_argnums=3, static_argnames="intercept")
fit_svm = jax.jit(svm_head, static_argnums=3, static_argnames="iterations")
residual_of_svm = jax.jit(svm_residual, static_argnums=3, static_argnames="iterations")


def features(rows, width, *, classes=3, seed=0, dtype=np.float32):
    """Rows like those after a ReLU, which share a large mean; their classes, which overlap; weights around 1."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows, dtype=np.int32) % classes
    centres = rng.normal(size=(classes, width))
    embedding = np.maximum(1.0 + 0.5 * centres[y] + 0.7 * rng.normal(size=(rows, width)), 0.0)
    return embedding.astype(dtype), y, rng.uniform(0.5, 1.5, rows).astype(dtype)


def query_loss(name, *, classes=3, **more):
    """`(embedding, weight, hyper, y, query, query_y) -> loss` of the head on rows that it has not seen."""
    head = HEADS[name][0]

    def loss(embedding, weight, hyper, y, query, query_y):
        made = head(embedding, y, weight, classes, **hyper, **more)
        return cross_entropy(query @ made["kernel"] + made["bias"][None], query_y, jnp.ones(len(query), query.dtype))

    return loss


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("width", [5, 30])
def test_ridge_is_scikit_learns(intercept, width):
    embedding, y, weight = features(12, width, dtype=np.float64)
    weight[3] = 0.0
    wanted = Ridge(alpha=0.3, fit_intercept=intercept).fit(embedding, np.eye(3)[y], sample_weight=weight)
    with jax.enable_x64(True):
        head = fit_ridge(jnp.asarray(embedding), y, jnp.asarray(weight), 3, ridge=0.3, scale=2.0, intercept=intercept)
    np.testing.assert_allclose(head["kernel"], 2.0 * wanted.coef_.T, atol=1e-10)
    np.testing.assert_allclose(head["bias"], 2.0 * wanted.intercept_ * np.ones(3), atol=1e-10)


@pytest.mark.parametrize("intercept", [True, False])
def test_both_forms_of_ridge_agree(intercept):
    """Padding decides which form is taken, and nothing else."""
    embedding, y, weight = features(12, 30)
    dual, primal = (
        fit_ridge(
            np.pad(embedding, ((0, extra), (0, 0)), constant_values=7.0),
            np.pad(y, (0, extra)),
            np.pad(weight, (0, extra)),
            3,
            intercept=intercept,
        )
        for extra in (0, 18)
    )
    np.testing.assert_allclose(dual["kernel"], primal["kernel"], atol=2e-5)
    np.testing.assert_allclose(dual["bias"], primal["bias"], atol=2e-5)


def test_ridge_below_rounding_is_finite():
    """Four equal rows of each class: their kernel is singular, and in float32 it stays so."""
    embedding, y, weight = features(3, 30)
    rows = 1e3 * embedding.repeat(4, 0), y.repeat(4), weight.repeat(4)
    value, slope = jax.jit(jax.value_and_grad(lambda z: ridge_head(z, *rows[1:], 3, ridge=1e-6)["kernel"].sum()))(
        rows[0]
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_svm_without_ridge_is_liblinears():
    embedding, y, weight = features(30, 6, dtype=np.float64)
    machine = LinearSVC(
        multi_class="crammer_singer", fit_intercept=False, C=0.3, tol=1e-10, max_iter=200_000, random_state=0
    )
    wanted = machine.fit(embedding, y, sample_weight=weight).coef_.T
    with jax.enable_x64(True):
        embedding, weight = jnp.asarray(embedding), jnp.asarray(weight)
        got = fit_svm(embedding, y, weight, 3, penalty=0.3, ridge=0.0, scale=2.0, iterations=1000)["kernel"]
    np.testing.assert_allclose(got, 2.0 * wanted, atol=1e-6)


def test_svm_dual_is_the_solution_of_its_problem():
    """Against a general solver of constrained problems, in float64."""
    embedding, y, weight = features(6, 4, dtype=np.float64)
    gram, target, size = embedding @ embedding.T + 0.3 * np.eye(6), np.eye(3)[y], 0.4 * weight
    size[2] = 0.0

    def objective(a):
        a = a.reshape(6, 3)
        return 0.5 * np.sum(a * (gram @ a)) - np.sum(a * target)

    wanted = scipy.optimize.minimize(
        objective,
        np.zeros(18),
        jac=lambda a: (gram @ a.reshape(6, 3) - target).ravel(),
        bounds=[(None, bound) for bound in (size[:, None] * target).ravel()],
        constraints={
            "type": "eq",
            "fun": lambda a: a.reshape(6, 3).sum(1),
            "jac": lambda a: np.kron(np.eye(6), np.ones(3)),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    with jax.enable_x64(True):
        got = np.asarray(svm_dual(*map(jnp.asarray, (gram, target, size)), iterations=1000))
    np.testing.assert_allclose(got.sum(1), 0.0, atol=1e-12)
    assert (got <= size[:, None] * target + 1e-12).all()
    assert 2 < (np.abs(got - size[:, None] * target) < 1e-9).sum() < 16  # some entries on the box, some inside
    np.testing.assert_allclose(got.ravel(), wanted.x, atol=1e-6)
    assert objective(got.ravel()) <= wanted.fun + 1e-10


@pytest.mark.parametrize(
    ("rows", "width", "classes", "ridge"), [(5, 64, 5, 0.0), (60, 128, 10, 0.0), (60, 128, 10, 1.0)]
)
def test_svm_converges_in_float32(rows, width, classes, ridge):
    embedding, y, weight = features(rows, width, classes=classes)
    few, default = (residual_of_svm(embedding, y, weight, classes, ridge=ridge, **n) for n in ({"iterations": 2}, {}))
    assert default.dtype == jnp.float32
    assert few > 1e-2
    assert abs(default) < 2e-4  # of a margin of 1


def test_svm_residual_bounds_the_primal_objective():
    embedding, y, weight = features(20, 6)
    weight[4] = 0.0

    def primal(kernel):
        scores = np.float64(embedding) @ np.float64(kernel)
        margin = scores + 1.0 - np.eye(3)[y] - scores[np.arange(20), y][:, None]
        return 0.5 * np.sum(np.float64(kernel) ** 2) + 0.3 * weight @ margin.max(1)

    def reach(iterations):
        settings = {"penalty": 0.3, "ridge": 0.0, "iterations": iterations}
        kernel = fit_svm(embedding, y, weight, 3, **settings)["kernel"]
        return primal(kernel), 0.3 * weight.sum() * residual_of_svm(embedding, y, weight, 3, **settings)

    best, bound = reach(1000)
    assert abs(bound) < 1e-4
    reached, bound = reach(3)
    assert 1e-3 < reached - best < bound


@each_head
def test_derivatives_equal_finite_differences(name):
    """First and second derivatives of a query loss with respect to embedding, weights and hyperparameters."""
    _, hyper, width = HEADS[name]
    more = {"iterations": 3000} if "svm" in name else {}
    embedding, y, weight = features(7, width, dtype=np.float64)
    query, query_y, _ = features(9, width, seed=1, dtype=np.float64)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree((embedding, weight, hyper))
        loss = query_loss(name, **more)

        def value(flat):
            return loss(*unravel(flat), y, jnp.asarray(query), query_y)

        @jax.jit
        def compare(flat, direction):
            def slope(flat):
                return jax.grad(value)(flat) @ direction

            steps = 1e-5 * jnp.eye(flat.size)
            up, down = (jax.lax.map(lambda step, s=s: value(flat + s * step), steps) for s in (1, -1))
            first = jax.grad(value)(flat), (up - down) / 2e-5
            bend = (slope(flat + 1e-5 * direction) - slope(flat - 1e-5 * direction)) / 2e-5
            return first, (jax.grad(slope)(flat) @ direction, bend)

        direction = jnp.asarray(np.random.default_rng(2).normal(size=flat.size))
        (gradient, differences), (second, bend) = compare(flat, direction)
    assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(gradient, differences, atol=1e-7)
    np.testing.assert_allclose(second, bend, rtol=1e-5, atol=1e-7)
    for part in (gradient[: 7 * width], gradient[7 * width : 7 * width + 7], gradient[7 * width + 7 :]):
        assert np.abs(part).max() > 1e-3  # or the comparison would be of zeros


@each_head
def test_a_weight_of_zero_has_the_derivative_of_a_first_bit_of_weight(name):
    _, hyper, width = HEADS[name]
    more = {"iterations": 3000} if "svm" in name else {}
    embedding, y, weight = features(7, width, dtype=np.float64)
    query, query_y, _ = features(9, width, seed=1, dtype=np.float64)
    weight[4:] = 0.0
    with jax.enable_x64(True):
        loss = query_loss(name, **more)

        @jax.jit
        def compare(weight):
            def value(weight):
                return loss(jnp.asarray(embedding), weight, hyper, y, jnp.asarray(query), query_y)

            base = value(weight)
            return jax.grad(value)(weight), jnp.stack(
                [(value(weight.at[i].add(1e-6)) - base) / 1e-6 for i in (4, 5, 6)]
            )

        gradient, differences = compare(jnp.asarray(weight))
    np.testing.assert_allclose(gradient[4:], differences, atol=1e-4)
    assert np.abs(differences).max() > 1e-2


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_svm_derivatives_in_float32(ridge):
    """On rows with a large shared mean, against float64 run to the end."""
    embedding, y, weight = features(40, 64, classes=5, dtype=np.float64)
    query, query_y, _ = features(20, 64, classes=5, seed=1, dtype=np.float64)

    def gradient(dtype, **more):
        with jax.enable_x64(dtype == np.float64):
            hyper = {"penalty": jnp.asarray(0.01, dtype), "ridge": jnp.asarray(ridge, dtype)}
            arguments = [jnp.asarray(leaf, dtype) for leaf in (embedding, weight)]
            loss = query_loss("svm", classes=5, scale=10.0, **more)
            grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments, hyper, y, jnp.asarray(query, dtype), query_y)
            return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]

    for got, wanted in zip(gradient(np.float32), gradient(np.float64, iterations=3000), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - wanted) < 2e-3 * np.linalg.norm(wanted)


@each_head
def test_padding_and_classes_without_a_label(name):
    head, hyper, width = HEADS[name]
    embedding, y, weight = features(7, width)
    fit = jax.jit(head, static_argnums=3)
    made = fit(embedding, y, weight, 3, **hyper)
    junk = 50.0 * np.random.default_rng(5).normal(size=(4, width)).astype(np.float32)
    for padding in (junk, np.full_like(junk, np.nan), np.full_like(junk, -1e30)):
        longer = np.concatenate([padding, embedding]), np.concatenate([np.asarray([4, 1, 3, 99], np.int32), y])
        padded = fit(*longer, np.concatenate([np.zeros(4, np.float32), weight]), 5, **hyper)
        np.testing.assert_allclose(padded["kernel"][:, :3], made["kernel"], atol=2e-5)
        np.testing.assert_allclose(padded["bias"][:3], made["bias"], atol=2e-5)
        np.testing.assert_array_equal(padded["kernel"][:, 3:], 0.0)
        np.testing.assert_array_equal(padded["bias"][3:], -np.inf)


def test_a_class_without_a_label_is_never_predicted_however_far_the_others_are():
    """-1000 was nearer than the classes of an embedding of this size."""
    rows = jnp.asarray([[0.0, 0.0], [10.0, 5.0], [5.0, 10.0]])
    head = prototype_head(60.0 * jnp.eye(2), jnp.asarray([0, 1]), jnp.ones(2), 3)
    logits = rows @ head["kernel"] + head["bias"][None]
    assert logits[0, 0] == logits[0, 1]
    np.testing.assert_array_equal(logits.argmax(-1)[1:], [0, 1])
    assert np.isneginf(logits[:, 2]).all()
    for make in (ridge_head, svm_head):
        head = make(1e4 * jnp.eye(2), jnp.asarray([0, 1]), jnp.ones(2), 3, scale=1e6)
        assert np.isneginf(1e4 * rows @ head["kernel"] + head["bias"][None])[:, 2].all()


@pytest.mark.parametrize("width", [4, 9])
def test_the_first_label_of_a_class_is_no_jump(width):
    """Without a logit for absent classes, the derivative at weight 0 is what a small weight changes."""
    with jax.enable_x64(True):
        embedding, y, weight = features(7, width, dtype=np.float64)
        absent = y == 2

        @jax.jit
        def logits(share):
            made = ridge_head(embedding, y, jnp.where(absent, share, weight), 3, ridge=0.7, absent=None)
            return embedding @ made["kernel"] + made["bias"][None]

        slope = jax.jacobian(logits)(0.0)
        np.testing.assert_allclose((logits(1e-6) - logits(0.0)) / 1e-6, slope, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(logits(0.0)[:, 2], 0.0)
        assert (slope[absent, 2] > 0.1).all()


DEGENERATE = {
    "no labels": lambda y, weight: (y, 0 * weight),
    "one label": lambda y, weight: (y, weight * (np.arange(7) == 2)),
    "one class": lambda y, weight: (0 * y + 1, weight),
    "some padding": lambda y, weight: (y, weight * (np.arange(7) < 4)),
}


@each_head
def test_degenerate_sets_give_finite_heads_and_derivatives(name):
    """Also for rows that are equal, with the same class and with different ones, and for rows of zeros."""
    _, hyper, width = HEADS[name]
    embedding, y, weight = features(7, width)
    query, query_y, _ = features(9, width, seed=1)
    equal = embedding[[0, 0, 0, 3, 3, 3, 3]]
    run = jax.jit(jax.value_and_grad(query_loss(name), argnums=(0, 1, 2)))
    for case, rows in [(case, rows) for case in DEGENERATE for rows in (embedding, equal, 0 * embedding)]:
        labels, weights = DEGENERATE[case](y, weight)
        value, grads = run(rows, weights.astype(np.float32), hyper, labels, query, query_y)
        # Of classes that are ruled out the loss is infinite; it teaches the other classes all the same.
        assert np.isfinite(value) if len(set(labels[weights > 0])) in (0, 3) else value == np.inf, case
        for leaf in jax.tree.leaves(grads):
            assert np.isfinite(leaf).all(), case
    made = jax.jit(HEADS[name][0], static_argnums=3)(embedding, y, 0 * weight, 3, **hyper)
    np.testing.assert_array_equal(made["kernel"], 0.0)
    np.testing.assert_array_equal(made["bias"], 0.0)


@each_head
def test_a_weight_of_two_is_two_rows(name):
    head, hyper, width = HEADS[name]
    if head is svm_head:
        hyper = {**hyper, "ridge": 0.0}  # it is added per row
    embedding, y, _ = features(7, width)
    twice = np.asarray([1, 2, 1, 1, 2, 1, 1])
    fit = jax.jit(head, static_argnums=3)
    one = fit(embedding, y, twice.astype(np.float32), 3, **hyper)
    two = fit(embedding.repeat(twice, 0), y.repeat(twice), np.ones(9, np.float32), 3, **hyper)
    np.testing.assert_allclose(one["kernel"], two["kernel"], atol=2e-4)
    np.testing.assert_allclose(one["bias"], two["bias"], atol=2e-4)


@each_head
def test_vmap_equals_loop(name):
    _, hyper, width = HEADS[name]
    tasks = [features(7, width, seed=seed) for seed in range(3)]
    query, query_y, _ = features(9, width, seed=5)
    loss = query_loss(name)

    def run(embedding, y, weight):
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(embedding, weight, hyper, y, query, query_y)

    together = jax.jit(jax.vmap(run))(*map(np.stack, zip(*tasks, strict=True)))
    one = jax.jit(run)
    for i, task in enumerate(tasks):
        for got, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(one(*task)), strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=1e-3, atol=1e-5)


WRONG = {
    "ridge_head: ridge": lambda *rows: ridge_head(*rows, ridge=0.0),
    "penalty": lambda *rows: svm_head(*rows, penalty=0.0),
    "ridge must be >= 0": lambda *rows: svm_residual(*rows, ridge=-1.0),
    "iterations": lambda *rows: svm_head(*rows, iterations=0),
    "logistic_head: steps": lambda *rows: logistic_head(*rows, steps=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](*features(4, 3), 3)
