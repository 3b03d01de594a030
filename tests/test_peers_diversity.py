"""The rules that spread out over the embedding, against scikit-activeml's on the same pool.

What cannot agree: the draws of random rules (their probabilities do), ties, and k-means' clusters, which come from
other starts (the pools here have clusters that both find).
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

pytest.importorskip("skactiveml")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from skactiveml.base import SkactivemlClassifier
    from skactiveml.classifier import SklearnClassifier
    from skactiveml.pool import Badge, CoreSet, DiscriminativeAL, MaxHerding, ProbCover, TypiClust

from metaal_jax import acquisition
from views import make_view, probabilities, run

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

N, K, LABELLED = 60, 6, (3, 17, 40, 41)


class Known(SkactivemlClassifier):
    """A classifier that was fitted before."""

    def __init__(self, probs=None, classes=None, missing_label=np.nan, cost_matrix=None, random_state=None):
        super().__init__(
            classes=classes, missing_label=missing_label, cost_matrix=cost_matrix, random_state=random_state
        )
        self.probs = probs

    def fit(self, X, y, sample_weight=None):
        return self

    def predict_proba(self, X):
        return self.probs


def pool(seed=0, *, labelled=LABELLED, embedding=None, unit=False):
    view = make_view(seed, N, members=1, labelled=labelled)._replace(budget=jnp.float32(100))
    z = np.asarray(view.prediction.embedding[0] if embedding is None else embedding, np.float64)
    if unit:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    view = view._replace(prediction=view.prediction._replace(embedding=jnp.asarray(z[None], jnp.float32)))
    y = np.full(N, np.nan)
    y[list(labelled)] = np.arange(len(labelled)) % 2
    return view, z, y


def test_k_center_is_core_set(key):
    rule = run(acquisition.k_center(k=K))
    for seed in range(3):
        view, z, y = pool(seed)
        assert rule(key, view).index.tolist() == CoreSet(random_state=0).query(z, y, batch_size=K).tolist()


def test_badge_has_the_same_probabilities(key):
    """`covered=False` is the paper's rule: first the longest gradient, then by squared distance to the picks.

    Theirs takes the smaller of this distance and the squared length, as if 0 were a pick; the paper's code does not.
    """
    view, z, y = pool(labelled=())
    p = probabilities(np.asarray(view.prediction.logits[0], np.float64))
    model = Known(p, classes=range(4)).fit(z, y)
    theirs, utilities = Badge(random_state=0).query(z, y, model, fit_clf=False, batch_size=2, return_utilities=True)
    gradient = ((p - np.eye(4)[p.argmax(1)])[:, :, None] * z[:, None]).reshape(N, -1)
    length = (gradient**2).sum(1)
    rule = run(acquisition.badge(k=2, covered=False))
    for one in jax.random.split(key, 5):
        decision = rule(one, view)
        first, second = decision.index.tolist()
        assert first == theirs[0]
        np.testing.assert_allclose(decision.scores / decision.scores.sum(), utilities[0], rtol=1e-4)
        distance = ((gradient - gradient[first]) ** 2).sum(1)
        np.testing.assert_allclose(np.exp(decision.log_prob), distance[second] / distance.sum(), rtol=1e-3)
        both = np.delete(np.minimum(distance, length), first)
        np.testing.assert_allclose(np.delete(utilities[1], first), both / both.sum(), rtol=1e-6)


def test_typiclust_on_certain_clusters(key):
    """Theirs takes distances in the embedding as it is, ours scales rows to length 1: they are given at length 1."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(5), (20, 15, 11, 8, 6))
    view, z, y = pool(labelled=(0, 25), embedding=np.eye(5)[group] + 0.03 * rng.normal(size=(N, 5)), unit=True)
    rule = run(acquisition.typiclust(k=3, neighbours=5))
    theirs = TypiClust(random_state=0, k=5, cluster_algo_dict={"n_init": 20}).query(z, y, batch_size=3)
    assert group[theirs].tolist() == [2, 3, 4]
    same = sum(rule(one, view).index.tolist() == theirs.tolist() for one in jax.random.split(key, 8))
    assert same >= 4  # ours starts k-means once


def test_prob_cover_with_the_same_radius(key):
    """Their ball is closed, ours open; ties are broken at random by both, so coverage is compared, not rows."""
    view, z, y = pool(unit=True)
    rule = ProbCover(n_classes=2, deltas=[0.5], random_state=0)
    _, utilities = rule.query(z, y, batch_size=K, return_utilities=True)
    decision = run(acquisition.prob_cover(k=K, radius=0.5))(key, view)
    left = np.asarray(view.available)
    np.testing.assert_allclose(decision.scores[left], utilities[0][left], atol=1e-2)
    assert utilities[0, int(decision.index[0])] == np.nanmax(utilities[0])


def test_prob_cover_finds_the_radius_of_a_fine_grid(key):
    """With two certain clusters: theirs is the last step of the grid before purity falls below the bound."""
    rng = np.random.default_rng(1)
    view, z, y = pool(embedding=np.eye(5)[np.arange(N) % 2] + 0.2 * rng.normal(size=(N, 5)), unit=True)
    theirs = ProbCover(n_classes=2, deltas=np.arange(0.1, 1.5, 0.001), alpha=0.9, random_state=0)
    theirs.query(z, y)
    state = jax.jit(acquisition.prob_cover(k=1, classes=2, purity=0.9).begin)(key, (), view)
    assert abs(float(state[-1]) - theirs.delta_max_) < 0.0025


def test_max_herding_with_the_same_kernel(key):
    rule = run(acquisition.max_herding(k=K, bandwidth=0.7))
    for labelled in (LABELLED, ()):
        view, z, y = pool(labelled=labelled)
        theirs, utilities = MaxHerding(metric_dict={"gamma": 0.7**-2}, random_state=0).query(
            z, y, batch_size=K, return_utilities=True
        )
        decision, left = rule(key, view), np.asarray(view.available)
        assert decision.index.tolist() == theirs.tolist()
        # Sums here, means over the unlabelled rows there.
        np.testing.assert_allclose(decision.scores[left], utilities[0][left] * left.sum(), rtol=1e-3)


def test_discriminative_with_the_same_classifier(key):
    """The same ridge and weights; their intercept is free, ours has the ridge too, which moves the odds a little."""
    view, z, y = pool()
    decision = run(acquisition.discriminative(k=1, ridge=0.1, steps=20))(key, view)
    scaled = (z - z.mean(0)) / np.sqrt(((z - z.mean(0)) ** 2).mean())
    model = SklearnClassifier(LogisticRegression(C=1 / (N * 0.1), class_weight="balanced", tol=1e-8), classes=[0, 1])
    theirs, utilities = DiscriminativeAL(random_state=0).query(scaled, y, model, batch_size=1, return_utilities=True)
    left = np.asarray(view.available)
    assert decision.index.tolist() == theirs.tolist()
    odds = np.log(utilities[0][left] / (1 - utilities[0][left]))
    assert np.corrcoef(decision.scores[left], odds)[0, 1] > 0.999
