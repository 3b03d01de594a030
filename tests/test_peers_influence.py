"""Rules of influence and rules that refit beside scikit-activeml, and gradient lengths beside PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pool = pytest.importorskip("skactiveml.pool")
torch = pytest.importorskip("torch")

from skactiveml.base import SkactivemlRegressor  # noqa: E402
from skactiveml.classifier import ParzenWindowClassifier  # noqa: E402

from metaal_jax import Batch, Learner, Prediction, acquisition, learners, models  # noqa: E402
from views import make_view  # noqa: E402

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:All labels are of `missing_label`"),  # a cold start
]

WIDTH, PRIOR = 0.7, 0.3


def parzen_learner():
    """scikit-activeml's Parzen window classifier: kernel sums of the labelled rows and a prior count per class."""

    def adapt(key, meta, batch, *, unlabelled=None, start=None):
        return batch.x, jax.nn.one_hot(batch.y, 3) * batch.weight[:, None]

    def predict(params, x):
        centres, votes = params
        kernel = jnp.exp(-WIDTH * ((x[:, None] - centres) ** 2).sum(-1))
        return Prediction(logits=jnp.log(kernel @ votes + PRIOR)[None], embedding=x[None])

    return Learner(init=lambda key, x: (), adapt=adapt, predict=predict, meta_grad=None)


@pytest.mark.parametrize(("loss", "method"), [("log", "log_loss"), ("zero_one", "misclassification_loss")])
@pytest.mark.parametrize("labelled", [(), (7, 1, 12, 3)])
def test_error_reduction_beside_scikit_activeml(key, loss, method, labelled):
    """Its risk is a sum, over all rows, labelled ones included, unless told otherwise; ours a mean over the unlabelled.

    So it is given these rows to evaluate on, and its utilities are divided by their number; ours is less the present
    risk. Both count the candidate itself. It adds 2e-16 to the probabilities inside the logarithm.
    """
    learner = parzen_learner()
    view = make_view(0, labelled=labelled)
    truth = np.asarray(view.labelled_index) * 5 % 3
    batch = Batch(view.x[view.labelled_index], jnp.asarray(truth), (view.labelled_index >= 0).astype(jnp.float32))
    prediction = learner.predict(learner.adapt(key, (), batch), view.x)
    view = view._replace(labelled=batch, prediction=prediction, budget=jnp.float32(99))
    scores = jax.jit(acquisition.expected_error_reduction(learner, loss=loss))(key, view)

    x = np.asarray(view.x, np.float64)
    y = np.full(20, np.nan)
    y[list(labelled)] = truth[: len(labelled)]
    left = np.setdiff1d(np.arange(20), labelled)
    classifier = ParzenWindowClassifier(classes=[0, 1, 2], class_prior=PRIOR, metric_dict={"gamma": WIDTH})
    query = pool.MonteCarloEER(method=method, random_state=0)
    _, utilities = query.query(x, y, classifier, X_eval=x[left], return_utilities=True)
    p = np.exp(np.asarray(prediction.logits[0], np.float64)[left])
    p /= p.sum(-1, keepdims=True)
    now = (-(p * np.log(p)).sum(-1) if loss == "log" else 1 - p.max(-1)).mean()
    np.testing.assert_allclose(np.asarray(scores)[left] - now, utilities[0][left] / len(left), rtol=1e-4, atol=1e-6)


class Told(SkactivemlRegressor):
    """A regressor that predicts what stands in a table: the mean at the first fit, then one member after the other."""

    def __init__(self, table=None, turn=None):
        super().__init__()
        self.table, self.turn = table, turn

    def fit(self, X, y, sample_weight=None):
        self.mine = self.table[next(self.turn)]
        return self

    def predict(self, X):
        return self.mine

    def __sklearn_clone__(self):
        return Told(self.table, self.turn)


def test_model_change_beside_scikit_activeml(key):
    """Its regression form on the probability of one of two classes; the bias is the constant in its feature map.

    The residuals of both classes are of equal size, so our vector is longer by the square root of 2.
    """
    view = make_view(0, members=4, classes=2)
    scores = jax.jit(acquisition.expected_model_change)(key, view)
    members = np.asarray(jax.nn.softmax(view.prediction.logits)[:, :, 0], np.float64)
    table = np.concatenate([members.mean(0, keepdims=True), members])
    z = np.asarray(view.prediction.embedding[0], np.float64)
    query = pool.ExpectedModelChangeMaximization(
        bootstrap_size=4, feature_map=lambda z: np.concatenate([z, np.ones((len(z), 1))], axis=1), random_state=0
    )
    y = np.where(np.arange(20) < 2, 0.0, np.nan)
    _, utilities = query.query(z, y, Told(table, itertools.count()), candidates=z, return_utilities=True)
    np.testing.assert_allclose(scores, np.sqrt(2) * utilities[0], rtol=1e-4)


def test_gradient_length_beside_autograd(key):
    """One backward pass of PyTorch for each row and label, in float64."""
    learner = learners.fine_tune(models.MLP(4, hidden=(6, 5)), optimizer=optax.sgd(0.1), steps=1)
    view = make_view(0, n=8)
    params = learner.init(key, view.x)
    view = view._replace(params=params)
    scores = jax.jit(acquisition.expected_gradient_length(learner))(key, view)

    layers = []
    for name in ("Dense_0", "Dense_1", "head"):
        kernel, bias = (np.asarray(params["params"][name][part], np.float64) for part in ("kernel", "bias"))
        layer = torch.nn.Linear(*kernel.shape, dtype=torch.float64)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.T), torch.tensor(bias)
        layers += [layer, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    wanted = []
    for row in np.asarray(view.x, np.float64):
        expected = 0.0
        for label in range(4):
            log_prob = network(torch.tensor(row)).log_softmax(-1)[label]
            grads = torch.autograd.grad(-log_prob, list(network.parameters()))
            expected += (log_prob.exp() * sum((grad**2).sum() for grad in grads).sqrt()).item()
        wanted.append(expected)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)
