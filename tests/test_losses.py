"""Losses and scores: against float64 NumPy, at the edges, and what each refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import losses

RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(size=(6, 3)) * 2
WEIGHT = np.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 0.0])
CLASSES = np.asarray([2, 0, 1, 1, 2, 0], np.int32)
PROBABILITIES = RNG.dirichlet(np.ones(3), size=6)
PROBABILITIES[0] = [0, 0, 1]
SEVERAL = np.asarray(RNG.uniform(size=(6, 3)) > 0.5, np.float64)
TARGETS = RNG.normal(size=(6, 3))


def mean(each):
    return (WEIGHT * each).sum() / WEIGHT.sum()


def log_softmax(outputs):
    return outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMS = {  # loss, y, its plain form of outputs [n, c], [n]
    "cross_entropy": (losses.cross_entropy, CLASSES, lambda o: -log_softmax(o)[np.arange(6), CLASSES]),
    "cross_entropy of probabilities": (
        losses.cross_entropy, PROBABILITIES, lambda o: -(PROBABILITIES * log_softmax(o)).sum(-1)
    ),
    "accuracy": (losses.accuracy, CLASSES, lambda o: o.argmax(-1) == CLASSES),
    "accuracy of probabilities": (losses.accuracy, PROBABILITIES, lambda o: PROBABILITIES[np.arange(6), o.argmax(-1)]),
    "squared_error": (losses.squared_error, TARGETS, lambda o: ((o - TARGETS) ** 2).mean(-1)),
    "squared_error of one target": (losses.squared_error, TARGETS[:, 0], lambda o: (o[:, 0] - TARGETS[:, 0]) ** 2),
    "root_mean_squared_error": (losses.root_mean_squared_error, TARGETS, lambda o: ((o - TARGETS) ** 2).mean(-1)),
    "sigmoid_cross_entropy": (
        losses.sigmoid_cross_entropy, SEVERAL,
        lambda o: -(SEVERAL * np.log(sigmoid(o)) + (1 - SEVERAL) * np.log(sigmoid(-o))).mean(-1),
    ),
    "multi_label_accuracy": (losses.multi_label_accuracy, SEVERAL, lambda o: ((o > 0) == SEVERAL).mean(-1)),
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", FORMS)


def arguments(name):
    loss, y, plain = FORMS[name]
    outputs = OUTPUTS[:, :1] if name.endswith("one target") else OUTPUTS
    y = y if y.dtype == np.int32 else y.astype(np.float32)
    return loss, jnp.asarray(outputs, jnp.float32), jnp.asarray(y), jnp.asarray(WEIGHT, jnp.float32), plain(outputs)


@each_loss
def test_values_are_the_plain_form(name):
    loss, outputs, y, weight, each = arguments(name)
    wanted = np.sqrt(mean(each)) if name.startswith("root") else mean(each)
    np.testing.assert_allclose(loss(outputs, y, weight), wanted, rtol=2e-6)


@each_loss
def test_padding_holds_anything_and_nothing_is_0(name):
    loss, outputs, y, weight, _ = arguments(name)
    grad = jax.value_and_grad(loss)
    padding = jnp.asarray(WEIGHT == 0)

    def spoil(leaf, bad):
        return jnp.where(padding.reshape((-1,) + (1,) * (leaf.ndim - 1)), bad, leaf)

    for bad in (jnp.nan, jnp.inf, 1e38):
        worse = spoil(y, 99) if y.dtype == jnp.int32 else spoil(y, bad)
        for got, wanted in zip(grad(spoil(outputs, bad), worse, weight), grad(outputs, y, weight), strict=True):
            np.testing.assert_array_equal(got, wanted)
        value, slope = grad(jnp.full_like(outputs, bad), worse, 0 * weight)
        assert value == 0
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy of probabilities", "squared_error",
                                  "root_mean_squared_error", "sigmoid_cross_entropy"])  # fmt: skip
def test_gradients_are_finite_differences(name):
    with jax.enable_x64(True):
        loss, y, _ = FORMS[name]
        outputs, y, weight = jnp.asarray(OUTPUTS), jnp.asarray(y), jnp.asarray(WEIGHT)
        steps = 1e-6 * jnp.eye(18).reshape(18, 6, 3)
        up, down = (jax.vmap(lambda d, s=s: loss(outputs + s * d, y, weight))(steps) for s in (1, -1))
        got = jax.grad(loss)(outputs, y, weight)
        np.testing.assert_allclose(got.ravel(), (up - down) / 2e-6, atol=1e-8)


def test_a_class_that_is_none_trains_nothing_and_is_wrong():
    outputs, weight = jnp.asarray(OUTPUTS, jnp.float32), jnp.ones(6)
    strange = jnp.asarray([2, 3, 1, -1, 2, 7], jnp.int32)
    kept = jnp.asarray([0, 2, 4])
    value, slope = jax.value_and_grad(losses.cross_entropy)(outputs, strange, weight)
    np.testing.assert_allclose(value, losses.cross_entropy(outputs[kept], strange[kept], jnp.ones(3)), rtol=1e-6)
    np.testing.assert_array_equal(slope[jnp.asarray([1, 3, 5])], 0.0)
    np.testing.assert_allclose(
        losses.accuracy(outputs, strange, weight), (outputs.argmax(-1) == strange).mean(), rtol=1e-6
    )


def test_nan_is_never_right():
    outputs = jnp.full((4, 3), jnp.nan)
    assert losses.accuracy(outputs, jnp.asarray([0, 0, 1, 2], jnp.int32), jnp.ones(4)) == 0
    assert losses.multi_label_accuracy(outputs, jnp.zeros((4, 3)), jnp.ones(4)) == 0
    assert losses.root_mean_squared_error(outputs, jnp.zeros((4, 3)), jnp.ones(4)) == np.inf
    assert losses.accuracy(jnp.asarray([[0.0, jnp.nan]]), jnp.ones(1, jnp.int32), jnp.ones(1)) == 0


def test_classes_that_are_ruled_out():
    """-inf of a class that no row has changes nothing; that of a row's own class is an infinite loss, not NaN."""
    outputs = jnp.asarray([[1.0, -jnp.inf, 0.5], [0.2, -jnp.inf, 1.0]])
    y = jnp.asarray([0, 2], jnp.int32)
    soft = jnp.asarray([[0.9, 0.0, 0.1], [0.0, 0.0, 1.0]])
    for labels, without in ((y, y // 2), (soft, soft[:, ::2])):
        value, slope = jax.value_and_grad(losses.cross_entropy)(outputs, labels, jnp.ones(2))
        wanted, slopes = jax.value_and_grad(losses.cross_entropy)(outputs[:, ::2], without, jnp.ones(2))
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        np.testing.assert_allclose(slope[:, ::2], slopes, rtol=1e-6)
        np.testing.assert_array_equal(slope[:, 1], 0.0)
    value, slope = jax.value_and_grad(losses.cross_entropy)(outputs, jnp.asarray([1, 2], jnp.int32), jnp.ones(2))
    assert value == np.inf
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("members", [1, 3])
def test_consensus_of_members_that_rule_classes_out(members):
    logits = RNG.normal(size=(members, 4, 3))
    logits[:, :2, 1] = -np.inf  # all of them
    logits[0, 2, 0] = -np.inf  # one of them
    each = np.exp(logits - logits.max(-1, keepdims=True))
    with np.errstate(divide="ignore"):
        wanted = np.log((each / each.sum(-1, keepdims=True)).mean(0))
    factor = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)

    def read(logits):
        log_probs = losses.consensus(logits)
        return (factor * jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)).sum(), log_probs

    (_, got), slope = jax.value_and_grad(read, has_aux=True)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[:, :2, 1], 0.0)
    assert (np.abs(slope[:, 3]) > 1e-4).all()


FLOATS, INTS, WIDE = jnp.zeros(2), jnp.zeros(2, jnp.int32), jnp.zeros((2, 4))
REFUSED = {
    "cross_entropy: y must be integer classes .* got float32 .n.; for targets use losses.squared_error": (
        losses.cross_entropy, FLOATS
    ),
    "cross_entropy: y must have a column for each of the model's 3 outputs, got float32 .n, 4.": (
        losses.cross_entropy, WIDE
    ),
    "cross_entropy: .* got int32 .n, 4.": (losses.cross_entropy, WIDE.astype(int)),
    "accuracy: .* got float32 .n.": (losses.accuracy, FLOATS),
    "squared_error: y must be float targets .* got int32 .n.; for classes use losses.cross_entropy": (
        losses.squared_error, INTS
    ),
    "squared_error: targets must be as many as the model's outputs, got y .n. and outputs .n, 3.": (
        losses.squared_error, FLOATS
    ),
    "root_mean_squared_error: y must be float targets": (losses.root_mean_squared_error, INTS),
    "sigmoid_cross_entropy: y must hold 0 or 1 for each label": (losses.sigmoid_cross_entropy, INTS),
    "multi_label_accuracy: y must": (losses.multi_label_accuracy, WIDE),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_labels_of_another_kind_are_refused_while_tracing(message):
    loss, y = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, jnp.zeros((2, 3)), y, jnp.ones(2))
