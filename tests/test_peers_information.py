"""Scores and picks against batchbald_redux, baal and scikit-activeml on the same probabilities."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import acquisition
from test_disagreement import joint_information, plain_batch_bald
from views import make_view, probabilities

torch = pytest.importorskip("torch")
skactiveml_pool = pytest.importorskip("skactiveml.pool")
heuristics = pytest.importorskip("baal.active.heuristics")
batchbald = pytest.importorskip("batchbald_redux.batchbald")
joint_entropy = pytest.importorskip("batchbald_redux.joint_entropy")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    """batchbald_redux collects garbage after every chunk, which takes most of its time in a process like this one."""
    gc.freeze()
    yield
    gc.unfreeze()


def pool(seed, **shape):
    """A view of one's own and the members' probabilities `[m, n, c]` in float64."""
    view = make_view(seed, **shape)
    return view, probabilities(np.asarray(view.prediction.logits, np.float64))


def for_torch(probs):
    return torch.log(torch.tensor(probs.transpose(1, 0, 2)))  # [n, m, c]


def test_joint_entropies_of_batchbald_redux():
    """The reference that our picks are tested with, and the peer's exact joint entropies."""
    _, probs = pool(0, n=6, classes=3, members=5)
    theirs = joint_entropy.ExactJointEntropy.empty(5, dtype=torch.double).add_variables(for_torch(probs[:, [4, 1]]))
    alone = batchbald.compute_conditional_entropy(for_torch(probs)).numpy()
    batch = theirs.compute_batch(for_torch(probs)).numpy()
    for i in range(6):
        wanted = joint_information(probs, [4, 1, i])
        np.testing.assert_allclose(batch[i] - alone[[4, 1, i]].sum(), wanted, atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_batches_of_batchbald_redux(key, seed):
    """All configurations summed on both sides: the same rows in the same order, with the same joint scores."""
    view, probs = pool(seed, n=40, classes=4, members=20)
    theirs = batchbald.get_batchbald_batch(for_torch(probs), 4, 10_000, dtype=torch.double)
    ours = jax.jit(lambda key, view: acquisition.batch_bald(k=4).act(key, (), (), view)[0])(key, view)
    assert ours.index.tolist() == theirs.indices
    np.testing.assert_allclose(plain_batch_bald(probs, view.available, 4)[1], theirs.scores, atol=1e-9)


def test_drawn_configurations_do_as_well_as_those_of_batchbald_redux(key):
    """With configurations drawn on both sides the batches may differ; neither tells less than the other."""
    gaps = []
    for seed in range(2):
        view, probs = pool(seed, n=40, classes=4, members=20)
        torch.manual_seed(seed)
        theirs = batchbald.get_batchbald_batch(for_torch(probs), 5, 200, dtype=torch.double).indices
        rule = acquisition.batch_bald(k=5, configurations=200)
        ours = jax.jit(lambda key, view, rule=rule: rule.act(key, (), (), view)[0])(key, view).index.tolist()
        assert ours[:4] == theirs[:4]  # 1, 4, 16 and 64 configurations
        gaps.append(joint_information(probs, ours) - joint_information(probs, theirs))
    assert min(gaps) > -0.02


def test_bald_of_baal(key):
    view, probs = pool(1, n=30)
    theirs = heuristics.BALD().compute_score(probs.transpose(1, 2, 0))
    np.testing.assert_allclose(acquisition.bald(key, view), theirs, rtol=1e-4, atol=1e-6)


def test_uncertainty_of_scikit_activeml(key):
    view, probs = pool(2, n=30, members=1)
    theirs = {method: skactiveml_pool.uncertainty_scores(probs[0], method=method)
              for method in ("least_confident", "margin_sampling", "entropy")}  # fmt: skip
    # Ours is -log p for their 1 - p (the same order, without saturation), and p2 - p1 for their 1 - (p1 - p2).
    np.testing.assert_allclose(
        1 - np.exp(-acquisition.least_confident(key, view)), theirs["least_confident"], atol=1e-6
    )
    np.testing.assert_allclose(1 + acquisition.margin(key, view), theirs["margin_sampling"], atol=1e-6)
    np.testing.assert_allclose(acquisition.entropy(key, view), theirs["entropy"], atol=1e-5)


def test_committees_of_scikit_activeml(key):
    view, probs = pool(3, n=30, members=5)
    votes = probs.argmax(-1).T
    np.testing.assert_allclose(
        acquisition.mean_kl(key, view), skactiveml_pool.average_kl_divergence(probs), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        acquisition.vote_entropy(key, view), skactiveml_pool.vote_entropy(votes, np.arange(4)), atol=1e-5
    )
    np.testing.assert_allclose(
        acquisition.variation_ratio(key, view), skactiveml_pool.variation_ratios(votes), atol=1e-6
    )
    assert jnp.isfinite(acquisition.mean_std(key, view)).all()
