"""Scores and summaries against plain NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metaal_jax import losses, metrics
from views import HOLE


def plain_score(logits, y, weight):
    """Float64 NumPy forms of `Score`, row by row."""
    logits = np.asarray(logits, np.float64)
    each = np.exp(logits - logits.max(-1, keepdims=True))
    each /= each.sum(-1, keepdims=True)
    probs = each.mean(0)
    rows, total = range(len(y)), weight.sum()
    right = np.asarray([probs[i].argmax() == y[i] for i in rows], float)
    members = np.mean([[member[i].argmax() == y[i] for i in rows] @ weight / total for member in each])
    nll = sum(-weight[i] * np.log(probs[i, y[i]]) for i in rows) / total
    brier = sum(weight[i] * ((probs[i] - np.eye(probs.shape[1])[y[i]]) ** 2).sum() for i in rows) / total
    ece = 0.0
    for b in range(15):
        inside = [i for i in rows if b / 15 < probs[i].max() <= (b + 1) / 15 and weight[i] > 0]
        if inside:
            mass = weight[inside].sum()
            accuracy = (right[inside] * weight[inside]).sum() / mass
            confidence = (probs[inside].max(-1) * weight[inside]).sum() / mass
            ece += mass / total * abs(accuracy - confidence)
    recalls = [right[y == c] @ weight[y == c] / weight[y == c].sum() for c in np.unique(y[weight > 0])]
    return metrics.Score(
        accuracy=right @ weight / total,
        member_accuracy=members,
        balanced_accuracy=np.mean(recalls),
        nll=nll,
        brier=brier,
        ece=ece,
    )


@pytest.mark.parametrize("members", [1, 3])
def test_score_against_numpy(key, members):
    logit_key, y_key, weight_key = jax.random.split(key, 3)
    logits = 2 * jax.random.normal(logit_key, (members, 200, 4))
    y = np.asarray(jax.random.randint(y_key, (200,), 0, 4))
    weight = np.asarray(jax.random.uniform(weight_key, (200,))) * (np.arange(200) % 3 > 0)
    got = jax.jit(metrics.score)(logits, y, weight)
    wanted = plain_score(logits, y, weight.astype(np.float64))
    for name, value in wanted._asdict().items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-4, err_msg=name)
    assert (members == 1) == bool(got.accuracy == got.member_accuracy)


def test_score_of_extremes():
    score = jax.jit(metrics.score)
    logits = jnp.asarray([[[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]])
    right = score(logits, jnp.asarray([0, 0]), jnp.ones(2))
    assert right == (1, 1, 1, 0, 0, 0)
    wrong = score(logits, jnp.asarray([1, 1]), jnp.ones(2))
    assert wrong == (0, 0, 0, 2e4, 2, 1)
    assert score(logits, jnp.asarray([1, 1]), jnp.zeros(2)) == (0, 0, 0, 0, 0, 0)  # no row of weight


def test_regression_score_against_scikit_learn():
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    rng = np.random.default_rng(0)
    outputs, y = rng.normal(size=(3, 50, 2)), rng.normal(size=(50, 2))
    weight = rng.uniform(size=50) * (np.arange(50) % 4 > 0)
    hole = np.where(weight[:, None] > 0, outputs, HOLE)  # padding may hold anything
    got = jax.jit(metrics.regression_score)(*map(jnp.float32, (hole, y, weight)))
    options = {"y_true": y, "y_pred": outputs.mean(0), "sample_weight": weight}
    wanted = (mean_squared_error(**options) ** 0.5, mean_absolute_error(**options), r2_score(**options))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    one = metrics.regression_score(*map(jnp.float32, (outputs[..., :1], y[:, 0], weight)))
    assert one.rmse == metrics.regression_score(*map(jnp.float32, (outputs[..., :1], y[:, :1], weight))).rmse
    assert metrics.regression_score(*map(jnp.float32, (outputs, y, 0 * weight))) == (0, 0, 0)


def test_multi_label_score_against_numpy():
    rng = np.random.default_rng(1)
    outputs, y, weight = rng.normal(size=(2, 40, 3)), rng.integers(0, 2, (40, 3)), np.arange(40) % 3 > 0
    probs = (1 / (1 + np.exp(-outputs))).mean(0)
    right = (probs > 0.5) == (y > 0)
    nll = -np.log(np.where(y > 0, probs, 1 - probs)).sum(1)
    wanted = (right[weight].mean(), right[weight].all(1).mean(), nll[weight].mean())
    hole = np.where(weight[:, None], outputs, HOLE)
    got = metrics.multi_label_score(jnp.float32(hole), jnp.asarray(y), jnp.float32(weight))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_a_loss_ignores_padding_even_if_it_is_not_finite():
    logits = jnp.asarray([[2.0, 0.0], [jnp.nan, jnp.inf]])
    y, weight = jnp.asarray([0, 1]), jnp.asarray([1.0, 0.0])
    wanted = np.log(1 + np.exp(-2.0))
    np.testing.assert_allclose(losses.cross_entropy(logits, y, weight), wanted, rtol=1e-6)
    value, gradient = jax.value_and_grad(losses.cross_entropy)(logits[:1], y[:1], jnp.zeros(1))
    assert value == 0
    assert (gradient == 0).all()


def test_area_and_labels_to_reach():
    accuracy = jnp.asarray([[0.1, 0.5, 0.9, 0.8], [0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.1, 0.1]])
    labels = jnp.asarray([5, 10, 15, 20])
    np.testing.assert_allclose(metrics.area_under_curve(accuracy), [0.575, 0.25, 0.3], rtol=1e-6)
    assert metrics.labels_to_reach(labels, accuracy, 0.5).tolist() == [10, np.inf, 5]
    assert metrics.labels_to_reach(labels, accuracy[0], 0.9) == 15  # reaching is enough
    assert jax.jit(lambda a: metrics.labels_to_reach(labels, a, 0.5))(accuracy[:, None]).tolist() == [
        [10],
        [np.inf],
        [5],
    ]
    holes = np.asarray([[0.1, np.nan, 0.6, 0.0], [np.nan] * 4, [0.5, 0.0, 0.0, 0.0]])
    assert metrics.labels_to_reach(labels, holes, 0.5).tolist() == [15, np.inf, 5]
    for wrong in ((labels[:2], accuracy, 0.5), (labels, accuracy[:0], 0.5), (labels[:0], accuracy[:, :0], 0.5)):
        with pytest.raises(ValueError, match=r"accuracy must be \[..., rounds\]"):
            metrics.labels_to_reach(*wrong)
    for target in (np.nan, 90, -0.1):
        with pytest.raises(ValueError, match="an accuracy from 0 to 1"):
            metrics.labels_to_reach(labels, accuracy, target)


def test_interval_against_scipy():
    values = np.asarray([0.3, 0.5, 0.45, 0.7, 0.62])
    for confidence in (0.8, 0.95):
        got = metrics.interval(values, confidence=confidence)
        low, high = stats.t.interval(confidence, 4, loc=values.mean(), scale=stats.sem(values))
        np.testing.assert_allclose([got.mean, got.low, got.high], [values.mean(), low, high], rtol=1e-12)
        assert got.seeds == 5
    assert metrics.interval([0.5]) == (0.5, -np.inf, np.inf, 1)
    assert metrics.interval([0.5, np.inf, 1.0]) == (np.inf, -np.inf, np.inf, 3)
    with pytest.raises(ValueError, match="seed 1 is NaN"):
        metrics.interval([0.5, np.nan])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        metrics.interval(values, confidence=95)
    for wrong in ([], np.ones((2, 2))):
        with pytest.raises(ValueError, match="one value per seed"):
            metrics.interval(wrong)
