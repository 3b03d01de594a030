"""A learner that also learns to predict the loss of its own predictions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax import losses
from metaal_jax.base import Batch, Learner, LossFn, Metrics, Prediction, PyTree, Task, is_classes, require, take
from metaal_jax.learners.adaptation import (
    all_rows,
    apply,
    cleared,
    held_without_labels,
    init_of,
    labelled_or,
    metrics_of,
    predict_of,
    without,
)
from metaal_jax.learners.inner_loop import check_optimizer, inner_loop
from metaal_jax.losses import class_targets, weighted_mean


def predict_loss(loss_head: PyTree, embedding: Array) -> Array:
    """The predicted loss of rows: embedding `[..., n, d]` -> `[..., n]`; only the order of the values has a meaning."""
    first, last = loss_head["hidden"], loss_head["out"]
    lead = (None,) * (embedding.ndim - 1)
    return (nn.relu(embedding @ first["kernel"] + first["bias"][lead]) @ last["kernel"])[..., 0] + last["bias"][0]


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
    order = jnp.sign(lax.stop_gradient(loss[:, None] - loss[None]))
    values = jnp.maximum(margin - order * (predicted[:, None] - predicted[None]), 0.0)
    return weighted_mean(values.ravel(), (jnp.abs(order) * weight[:, None] * weight[None]).ravel())


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
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Fine-tuning together with a small network that reads the embedding and predicts each row's loss.

    `adapt` takes `steps` steps down `loss + strength * ranking loss` on the labelled rows. The ranking loss
    (see `ranking_loss`) asks only that rows of larger loss get larger predictions, so the falling scale of the losses
    does not matter. `acquisition.predicted_loss` queries the rows with the largest prediction.

    Different from the paper: all pairs of labelled rows instead of the neighbours in a shuffled mini-batch; one
    embedding instead of features from several depths; and by default no gradient from the ranking loss into the body,
    so that the predictions are those of `fine_tune` (unless the optimiser couples parameters, as clipping by the
    global norm does) and only the queries differ. `detach=False` lets it flow, as in the first 60 % of the paper's
    training; then `strength` also weighs the two losses against each other.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: any Optax transformation of gradients alone.
      steps: full-batch steps on the labelled rows.
      hidden: width of the loss predictor's hidden layer.
      margin: of the ranking loss, > 0.
      strength: factor on the ranking loss, >= 0.
      detach: keeps the ranking loss's gradient out of the body.
      unroll: of the scan over steps.
      loss, score: see `gradient_steps`.

    Returns:
      A `Learner` whose meta-parameters are the model's variables and one more entry, `"loss_head"`. `meta_grad` is
      pre-training of both on all of a task's rows, as in `fine_tune`.

    Raises:
      ValueError: for `steps < 0`, `hidden < 1`, `margin <= 0` or `strength < 0`.

    Reference: Yoo, Kweon: Learning Loss for Active Learning, 2019.
    """
    check_optimizer(optimizer)
    require(steps >= 0, f"loss_predictor: steps must not be negative, got {steps}")
    require(hidden >= 1, f"loss_predictor: hidden must be a positive integer, got {hidden}")
    require(margin > 0, f"loss_predictor: margin must be > 0, got {margin}")
    require(strength >= 0, f"loss_predictor: strength must be >= 0, got {strength}")

    def init(key: Array, x: PyTree, /) -> PyTree:
        model_key, first_key, last_key = jax.random.split(key, 3)
        variables = init_of(model)(model_key, x)
        row = take(x, jnp.zeros(1, jnp.int32))
        d = jax.eval_shape(lambda: apply(model, variables, row))[1].shape[-1]
        normal = nn.initializers.lecun_normal()
        loss_head = {
            "hidden": {"kernel": normal(first_key, (d, hidden)), "bias": jnp.zeros(hidden)},
            "out": {"kernel": normal(last_key, (hidden, 1)), "bias": jnp.zeros(1)},
        }
        return {**variables, "loss_head": loss_head}

    def each_loss(logits: Array, y: Array) -> Array:
        """The loss of each row by itself, `[n]`."""
        return jax.vmap(lambda logits, y: loss(logits[None], y[None], jnp.ones(1)))(logits, y)

    def objective(params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        logits, embedding = apply(model, without(("loss_head",), params), batch.x, batch.weight)
        predicted = predict_loss(params["loss_head"], lax.stop_gradient(embedding) if detach else embedding)
        # A class that is none has no loss to predict.
        weight = batch.weight
        if is_classes(batch.y):
            _, weight = class_targets("loss_predictor", batch.y, weight, logits.shape[1])
        ranking = ranking_loss(predicted, each_loss(logits, batch.y), weight, margin=margin)
        value, metrics = metrics_of(loss, score, logits, batch)
        return value + strength * ranking, {**metrics, "ranking_loss": ranking}

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del key, unlabelled
        origin, batch = meta if start is None else start, cleared(batch)
        params = inner_loop(
            lambda params: objective(params, batch)[0],
            held_without_labels(batch, origin),
            optimizer=optimizer,
            steps=steps,
            unroll=unroll,
        )
        return labelled_or(batch, params, origin)

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        return predict_of(model)(without(("loss_head",), params), x)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del key, step
        return jax.grad(objective, has_aux=True)(meta, all_rows(task))

    return Learner(init=init, adapt=adapt, predict=predict, meta_grad=meta_grad)
