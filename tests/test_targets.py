"""Learners of targets, of several labels at once and of class probabilities; what refuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Batch, Task, check_learner, learners, losses, models, outer_loop, tasks
from metaal_jax.base import pad_batch

ONE, THREE, SGD = models.MLP(1, hidden=(5,)), models.MLP(3, hidden=(5,)), optax.sgd(0.05)
SQUARED = {"loss": losses.squared_error, "score": losses.root_mean_squared_error}
SEVERAL = {"loss": losses.sigmoid_cross_entropy, "score": losses.multi_label_accuracy}
TUNED = learners.fine_tune(ONE, optimizer=SGD, steps=2, **SQUARED)
SINUSOIDS = tasks.sinusoids(shots=5, queries=4)


def sinusoid():
    return SINUSOIDS(jax.random.key(1), ()).support


def rows(y):
    x = jax.random.normal(jax.random.key(2), (6, 4))
    return Batch(x=x, y=jnp.asarray(y, jnp.float32), weight=jnp.ones(6))


def two_targets():
    return rows(np.random.default_rng(0).normal(size=(6, 3)))


def several_labels():
    return rows(np.arange(18).reshape(6, 3) % 2)


def probabilities():
    """The second row may be of two classes, and nobody is of the third."""
    return rows([[1, 0, 0], [0.3, 0.7, 0], [0, 1, 0], [0.5, 0.5, 0], [1, 0, 0], [0, 1, 0]])


LEARNERS = {  # learner, its rows
    "sinusoids, maml": (learners.maml(ONE, optimizer=SGD, steps=2, **SQUARED), sinusoid),
    "sinusoids, fine_tune": (TUNED, sinusoid),
    "sinusoids, reptile": (learners.reptile(ONE, optimizer=SGD, steps=2, minibatch=3, **SQUARED), sinusoid),
    "sinusoids, implicit_maml": (
        learners.implicit_maml(ONE, optimizer=SGD, steps=2, proximal=1.0, **SQUARED), sinusoid,
    ),
    "sinusoids, r2d2": (learners.r2d2(ONE, intercept=True, **SQUARED), sinusoid),
    "sinusoids, committee": (learners.committee(TUNED, members=2, source="initialisation"), sinusoid),
    "sinusoids, committee of r2d2": (learners.committee(learners.r2d2(ONE, **SQUARED), members=2), sinusoid),
    "sinusoids, laplace": (learners.laplace(TUNED, members=2, loss=losses.squared_error), sinusoid),
    "sinusoids, mc_dropout": (
        learners.mc_dropout(models.MLP(1, hidden=(5,), dropout=0.3), optimizer=SGD, steps=2, members=2, **SQUARED),
        sinusoid,
    ),
    "sinusoids, loss_predictor": (
        learners.loss_predictor(ONE, optimizer=SGD, steps=2, hidden=3, **SQUARED), sinusoid,
    ),
    "targets, anil": (learners.anil(THREE, optimizer=SGD, steps=2, **SQUARED), two_targets),
    "targets, r2d2": (learners.r2d2(THREE, **SQUARED), two_targets),
    "several labels, maml": (learners.maml(THREE, optimizer=SGD, steps=2, **SEVERAL), several_labels),
    "several labels, laplace": (
        learners.laplace(
            learners.fine_tune(THREE, optimizer=SGD, steps=2, **SEVERAL), members=2, hessian="full",
            loss=losses.sigmoid_cross_entropy,
        ),
        several_labels,
    ),
    "probabilities, maml from prototypes": (
        learners.maml(THREE, optimizer=SGD, steps=2, head="prototypes"), probabilities,
    ),
    "probabilities, protonet": (learners.protonet(THREE), probabilities),
    "probabilities, r2d2": (learners.r2d2(THREE), probabilities),
    "probabilities, linear": (learners.linear(3), probabilities),
    "probabilities, linear with its ridge chosen": (learners.linear(3, ridge="leave_one_out"), probabilities),
    "probabilities, seen classes": (
        learners.seen_classes(learners.fine_tune(THREE, optimizer=SGD, steps=2)), probabilities,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_contract(key, name):
    learner, batch = LEARNERS[name]
    check_learner(learner, key, batch())


def test_sinusoids_are_those_of_the_paper(key):
    drawn = jax.jit(jax.vmap(lambda key: tasks.sinusoids(shots=50, queries=200)(key, ())))(jax.random.split(key, 300))
    assert drawn.support.x.shape == (300, 50, 1)
    assert drawn.query.y.shape == (300, 200)
    assert drawn.query.y.dtype == jnp.float32
    x, y = (
        np.concatenate([a, b], 1, dtype=np.float64) for a, b in zip(drawn.support[:2], drawn.query[:2], strict=True)
    )
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    found = []
    for one, target in zip(x[..., 0], y, strict=True):
        (a, b), *_ = np.linalg.lstsq(np.stack([np.sin(one), np.cos(one)], 1), target, rcond=None)
        np.testing.assert_allclose(a * np.sin(one) + b * np.cos(one), target, atol=1e-5)
        found.append((np.hypot(a, b), np.arctan2(-b, a)))
    amplitude, phase = np.asarray(found).T
    assert 0.1 <= amplitude.min() + 1e-4 < 0.3
    assert 4.8 < amplitude.max() <= 5 + 1e-4
    assert -1e-4 <= phase.min() < 0.1
    assert 3.04 < phase.max() <= np.pi + 1e-4


def test_meta_training_on_sinusoids_lowers_the_error(key):
    learner = learners.maml(models.MLP(1, hidden=(16,)), optimizer=optax.sgd(0.02), steps=1, **SQUARED)
    outer = outer_loop(learner, SINUSOIDS, optimizer=optax.adam(0.01), tasks=8)
    state = outer.init(key, jnp.zeros((1, 1)))
    _, metrics = jax.jit(lambda state: outer.run(key, state, (), steps=150))(state)
    assert metrics["loss"][-30:].mean() < 0.8 * metrics["loss"][:10].mean()
    assert (metrics["score"] < metrics["loss"] + 1).all()  # a root, averaged over tasks


def test_ridge_regression_fits_targets_in_closed_form(key):
    """On a linear model the adapted predictions are ridge regression's, of rows and of targets far from 0."""
    batch = two_targets()._replace(weight=jnp.asarray([1.0, 2.0, 1.0, 0.5, 1.0, 0.0]))
    batch = batch._replace(y=batch.y + 10.0)
    learner = learners.r2d2(models.MLP(3, hidden=()), ridge=0.3, intercept=True, **SQUARED)
    meta = learner.init(key, batch.x)
    got = learner.predict(learner.adapt(key, meta, batch), batch.x).logits[0]
    x, y, w = (np.asarray(leaf, np.float64) for leaf in batch)
    centre, middle = w @ x / w.sum(), w @ y / w.sum()
    x = x - centre
    kernel = np.linalg.solve(x.T @ (w[:, None] * x) + 0.3 * np.eye(4), x.T @ (w[:, None] * (y - middle)))
    np.testing.assert_allclose(got, x @ kernel + middle, atol=1e-4)


def test_one_probability_is_one_class(key):
    """Probabilities of 0 and 1 give the parameters of the classes; a class that nobody may be of is ruled out."""
    y = jnp.asarray([0, 1, 1, 0, 0, 1], jnp.int32)
    classes = rows(y)._replace(y=y)
    certain = classes._replace(y=jax.nn.one_hot(y, 3))
    for name in ("probabilities, maml from prototypes", "probabilities, protonet", "probabilities, r2d2",
                 "probabilities, seen classes"):  # fmt: skip
        learner = LEARNERS[name][0]
        meta = learner.init(key, classes.x)
        a, b = (learner.predict(learner.adapt(key, meta, batch), classes.x).logits for batch in (classes, certain))
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isneginf(a[..., 2]).all()
        assert np.isfinite(a[..., :2]).all()


def test_prototypes_are_weighed_by_probability():
    batch = probabilities()
    head = learners.prototype_head(batch.x, batch.y, batch.weight, 3)
    wanted = np.asarray(batch.y.T @ batch.x)[:2] / np.asarray(batch.y.sum(0))[:2, None]
    np.testing.assert_allclose(head["kernel"].T[:2], wanted, rtol=1e-5)
    np.testing.assert_array_equal(head["bias"][2], -np.inf)


def test_the_spread_of_targets_is_bayesian_linear_regressions(key):
    """Laplace's approximation is exact there: covariance `(Z^T Z / noise^2 + prior)^-1` for each target."""
    batch = two_targets()
    model = models.MLP(3, hidden=())
    for hessian in ("kron", "full"):
        learner = learners.laplace(
            learners.r2d2(model, **SQUARED), members=3000, hessian=hessian, prior_precision=2.0, noise=0.5,
            loss=losses.squared_error,
        )  # fmt: skip
        heads = learner.adapt(key, learner.init(key, batch.x), batch)["heads"]
        drawn = np.concatenate([heads["kernel"], heads["bias"][:, None]], axis=1)
        z = np.concatenate([batch.x, np.ones((6, 1))], axis=1).astype(np.float64)
        wanted = np.linalg.inv(z.T @ z / 0.25 + 2.0 * np.eye(5))
        for target in range(3):
            np.testing.assert_allclose(np.cov(drawn[:, :, target].T), wanted, atol=0.15 * wanted.max())


def test_labels_that_are_no_class_train_nothing(key):
    """An integer beyond the outputs is as good as no row, for all kinds of heads."""
    y = jnp.asarray([0, 1, 2, 0, 7, -1], jnp.int32)
    strange = rows(y)._replace(y=y)
    kept = strange._replace(weight=jnp.asarray([1.0, 1, 1, 1, 0, 0]))
    for learner in (
        learners.maml(THREE, optimizer=SGD, steps=2), learners.protonet(THREE), learners.r2d2(THREE, intercept=True),
        learners.metaoptnet(THREE),
    ):  # fmt: skip
        meta = learner.init(key, strange.x)
        a, b = (learner.predict(learner.adapt(key, meta, batch), strange.x).logits for batch in (strange, kept))
        np.testing.assert_allclose(a, b, atol=1e-5)


def adapted(make, batch):
    learner = make()
    meta = jax.eval_shape(learner.init, jax.random.key(0), batch.x)
    return jax.eval_shape(learner.adapt, jax.random.key(0), meta, batch)


REFUSED = {
    "protonet needs one class a row, which losses.squared_error": lambda: learners.protonet(ONE, **SQUARED),
    "metaoptnet needs one class a row": lambda: learners.metaoptnet(THREE, **SEVERAL),
    "head='prototypes' needs one class a row": lambda: learners.maml(
        ONE, optimizer=SGD, steps=1, head="prototypes", **SQUARED
    ),
    "cross_entropy: .*for targets use losses.squared_error": lambda: adapted(
        lambda: learners.maml(ONE, optimizer=SGD, steps=1), sinusoid()
    ),
    "squared_error: .*for classes use losses.cross_entropy": lambda: adapted(
        lambda: TUNED, sinusoid()._replace(y=jnp.zeros(5, jnp.int32))
    ),
    "prototype_head: y must be integer classes": lambda: adapted(lambda: learners.protonet(ONE), sinusoid()),
    "svm_head: y must be integer classes": lambda: adapted(lambda: learners.metaoptnet(THREE), probabilities()),
    "pseudo_labels: y must be integer classes": lambda: learners.pseudo_labels(TUNED, rows=2).adapt(
        jax.random.key(0), TUNED.init(jax.random.key(0), sinusoid().x), sinusoid(), unlabelled=jnp.ones((4, 1))
    ),
    "label_propagation: y must be integer classes": lambda: learners.label_propagation(TUNED, rows=2).adapt(
        jax.random.key(0), TUNED.init(jax.random.key(0), sinusoid().x), sinusoid(), unlabelled=jnp.ones((4, 1))
    ),
    "seen_classes: y must be integer classes": lambda: adapted(lambda: learners.seen_classes(TUNED), sinusoid()),
    "laplace: loss must be a likelihood": lambda: learners.laplace(TUNED, members=2, loss=losses.accuracy),
    "cross_entropy: y must be integer classes": lambda: adapted(lambda: learners.laplace(TUNED, members=2), sinusoid()),
    "laplace: noise must be > 0": lambda: learners.laplace(TUNED, members=2, noise=0.0),
    "sinusoids: shots must be a positive integer, got 0": lambda: tasks.sinusoids(shots=0, queries=1),
    "sinusoids: amplitude must be": lambda: tasks.sinusoids(shots=1, queries=1, amplitude=(2.0, 1.0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_learn_them_says_so(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_task_that_is_padded_with_nan_gives_the_gradient_of_one_padded_with_zeros(key):
    """With a mean over tasks: one NaN would spoil all of them."""
    task = SINUSOIDS(key, ())
    plain = Task(*(pad_batch(batch, 8) for batch in task))

    def spoil(leaf, batch):
        return jnp.where((batch.weight == 0).reshape((-1,) + (1,) * (leaf.ndim - 1)), jnp.nan, leaf)

    spoilt = Task(*(batch._replace(x=spoil(batch.x, batch), y=spoil(batch.y, batch)) for batch in plain))
    learner = LEARNERS["sinusoids, maml"][0]
    meta = learner.init(key, task.query.x)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), spoilt, plain)
    grads = jax.jit(jax.vmap(lambda task: learner.meta_grad(key, meta, task, step=jnp.int32(0))[0]))(both)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-6), grads)
