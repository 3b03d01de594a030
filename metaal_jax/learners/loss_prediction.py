"""A learner that also learns to predict the loss of its own predictions."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import Batch, Learner, Metrics, Prediction, PyTree, Task, require, take
from metaal_jax.learners.gradient import inner_loop
from metaal_jax.losses import accuracy, cross_entropy, weighted_mean


def predict_loss(loss_head: PyTree, embedding: Array) -> Array:
    """The predicted loss of rows: embedding `[..., n, d]` -> `[..., n]`; only the order of the values has a meaning."""
    first, last = loss_head["hidden"], loss_head["out"]
    return (nn.relu(embedding @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"])[..., 0]


def ranking_loss(predicted: Array, loss: Array, weight: Array, *, margin: float | Array = 1.0) -> Array:
    """Mean over all pairs of rows of `max(0, margin - sign(l_i - l_j) (s_i - s_j))`; pairs of equal loss do not count.

    Args:
      predicted: `[n]`, the predicted losses `s`.
      loss: `[n]`, the true losses `l`, taken as constants.
      weight: float32 `[n]`; a pair weighs the product of its two rows.
      margin: how far apart two predictions are pushed.

    Returns:
      `[]`, 0 without a pair.
    """
    order = jnp.sign(lax.stop_gradient(loss[:, None] - loss))
    values = jnp.maximum(margin - order * (predicted[:, None] - predicted), 0.0)
    return weighted_mean(values.ravel(), (jnp.abs(order) * weight[:, None] * weight).ravel())


def loss_predictor(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    hidden: int = 64,
    margin: float | Array = 1.0,
    strength: float | Array = 1.0,
    detach: bool = True,
    unroll: int | bool = 1,
) -> Learner:
    """Fine-tuning together with a small network that reads the embedding and predicts each row's loss.

    `adapt` takes `steps` steps down `cross entropy + strength * ranking loss` on the labelled rows. The ranking loss
    (see `ranking_loss`) asks only that rows of larger loss get larger predictions, so the falling scale of the losses
    does not matter. `acquisition.predicted_loss` queries the rows with the largest prediction.

    Different from the paper: all pairs of labelled rows instead of the neighbours in a shuffled mini-batch; one
    embedding instead of features from several depths; and by default no gradient from the ranking loss into the body,
    so that the classifier is the one of `fine_tune` (unless the optimiser couples parameters, as clipping by the
    global norm does) and only the queries differ. `detach=False` lets it flow, as in the first 60 % of the paper's
    training; then `strength` also weighs the two losses against each other.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: any Optax transformation.
      steps: full-batch steps on the labelled rows.
      hidden: width of the loss predictor's hidden layer.
      margin: of the ranking loss, > 0.
      strength: factor on the ranking loss, >= 0.
      detach: keeps the ranking loss's gradient out of the body.
      unroll: of the scan over steps.

    Returns:
      A `Learner` whose meta-parameters are the model's variables and one more entry, `"loss_head"`. `meta_grad` is
      pre-training of both on all of a task's rows, as in `fine_tune`.

    Raises:
      ValueError: for `steps < 0`, `hidden < 1`, `margin <= 0` or `strength < 0`.

    Reference: Yoo, Kweon: Learning Loss for Active Learning, 2019.
    """
    require(steps >= 0, f"loss_predictor: steps must be >= 0, got {steps}")
    require(hidden >= 1, f"loss_predictor: hidden must be at least 1, got {hidden}")
    require(margin > 0, f"loss_predictor: margin must be > 0, got {margin}")
    require(strength >= 0, f"loss_predictor: strength must be >= 0, got {strength}")

    def apply(params: PyTree, x: PyTree, weight: Array | None = None) -> tuple[Array, Array]:
        variables = {name: value for name, value in params.items() if name != "loss_head"}
        return cast(tuple[Array, Array], model.apply(variables, x, weight))

    def init(key: Array, x: PyTree, /) -> PyTree:
        model_key, first_key, last_key = jax.random.split(key, 3)
        row = take(x, jnp.zeros(1, jnp.int32))
        variables = model.init(model_key, row)
        d = jax.eval_shape(model.apply, variables, row)[1].shape[-1]
        normal = nn.initializers.lecun_normal()
        loss_head = {
            "hidden": {"kernel": normal(first_key, (d, hidden)), "bias": jnp.zeros(hidden)},
            "out": {"kernel": normal(last_key, (hidden, 1)), "bias": jnp.zeros(1)},
        }
        return {**variables, "loss_head": loss_head}

    def objective(params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        logits, embedding = apply(params, batch.x, batch.weight)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        predicted = predict_loss(params["loss_head"], lax.stop_gradient(embedding) if detach else embedding)
        ranking = ranking_loss(predicted, each, batch.weight, margin=margin)
        loss = cross_entropy(logits, batch.y, batch.weight)
        metrics = {"loss": loss, "accuracy": accuracy(logits, batch.y, batch.weight), "ranking_loss": ranking}
        return loss + strength * ranking, metrics

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del key, unlabelled
        origin = meta if start is None else start
        params = inner_loop(
            lambda params: objective(params, batch)[0], origin, optimizer=optimizer, steps=steps, unroll=unroll
        )
        # Without a label there is nothing to adapt to, whatever weight decay would do.
        labelled = batch.weight.sum() > 0
        return jax.tree.map(lambda new, old: jnp.where(labelled, new, old), params, origin)

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        logits, embedding = apply(params, x)
        return Prediction(logits=logits[None], embedding=embedding[None])

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del key, step
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.support, task.query)
        return jax.grad(objective, has_aux=True)(meta, both)

    return Learner(init=init, adapt=adapt, predict=predict, meta_grad=meta_grad)
