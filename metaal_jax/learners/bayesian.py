"""Learners whose committee members are draws from an approximate posterior: Monte Carlo dropout and Laplace's."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax import losses
from metaal_jax.base import Batch, Learner, LossFn, Metrics, Prediction, PyTree, Task, require
from metaal_jax.learners.adaptation import (
    all_rows,
    cleared,
    head_of,
    held_without_labels,
    labelled_or,
    metrics_of,
    pair_of,
    without,
)
from metaal_jax.learners.inner_loop import inner_loop
from metaal_jax.learners.maml import fine_tune

EXACT = lax.Precision.HIGHEST  # full float32, which graphics cards do not take by default


def mc_dropout(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    members: int,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Fine-tuning with dropout, and `members` dropout masks as draws from the posterior.

    `adapt` trains with a new mask for every row and step and draws the members' keys. `predict` gives each member one
    mask, the same for all rows and for every call, so that members are networks and their disagreement over a batch
    of rows means something (BatchBALD's consistent masks). The embedding is that of the network without dropout, whose
    features are the members' means up to the nonlinearities. `meta_grad` is supervised training on all of a task's
    rows, with dropout and without an inner loop.

    Args:
      model: a Flax module with an attribute `dropout` above 0 that applies `models.Dropout`, such as `MLP`, `Conv4`.
      optimizer: any Optax transformation of gradients alone.
      steps: full-batch steps on the labelled rows.
      members: masks, at least 2.
      unroll: of the scan over steps.
      loss, score: see `gradient_steps`.

    Returns:
      A `Learner` whose meta-parameters are the model's variables; the adapted ones have the members' keys as `masks`
      beside them.

    Raises:
      ValueError: for a model without dropout, `steps < 0` or fewer than two members.

    Reference: Gal, Ghahramani: Dropout as a Bayesian Approximation, 2016; Gal, Islam, Ghahramani: Deep Bayesian Active
    Learning with Image Data, 2017; Kirsch, van Amersfoort, Gal: BatchBALD, 2019.
    """
    rate = getattr(model, "dropout", 0.0)
    require(rate > 0, f"mc_dropout: the model needs an attribute dropout above 0, {type(model).__name__} has {rate}")
    require(steps >= 0, f"mc_dropout: steps must not be negative, got {steps}")
    require(members >= 2, f"mc_dropout: members must be at least 2, got {members}")
    plain = fine_tune(model, optimizer=optimizer, steps=steps, loss=loss, score=score)

    def dropped(variables: PyTree, key: Array, batch: Batch) -> tuple[Array, Metrics]:
        """Loss and metrics with a mask for each row."""
        out = model.apply(variables, batch.x, batch.weight, rngs={"dropout": key})
        return metrics_of(loss, score, pair_of(model, out)[0], batch)

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del unlabelled
        step_key, mask_key = jax.random.split(key)
        origin, batch = meta if start is None else without(("masks",), start), cleared(batch)
        new = inner_loop(
            lambda variables, key: dropped(variables, key, batch)[0],
            held_without_labels(batch, origin),
            optimizer=optimizer,
            steps=steps,
            each=jax.random.split(step_key, steps),
            unroll=unroll,
        )
        return {**labelled_or(batch, new, origin), "masks": jax.random.split(mask_key, members)}

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        variables = without(("masks",), params)

        def member(key: Array) -> Array:
            return model.apply(variables, x, rngs={"mask": key})[0]

        return Prediction(logits=jax.vmap(member)(params["masks"]), embedding=plain.predict(variables, x).embedding)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del step
        return jax.grad(dropped, has_aux=True)(meta, key, all_rows(task))

    return Learner(init=plain.init, adapt=adapt, predict=predict, meta_grad=meta_grad)


def laplace(
    learner: Learner,
    *,
    members: int,
    prior_precision: float | Array = 1.0,
    hessian: Literal["kron", "full"] = "kron",
    loss: LossFn = losses.cross_entropy,
    noise: float | Array = 1.0,
) -> Learner:
    """Laplace's approximation over the last layer of an adapted learner, and `members` heads drawn from it.

    `adapt` adapts the learner and takes its head as the mean of a normal distribution whose precision is that of the
    prior plus the Gauss-Newton matrix of the labelled rows' negative log-likelihood: the sum over rows of `H x z z^T`,
    `z` the embedding with a 1 for the bias and `H` the likelihood's curvature in the outputs. With the predicted
    probabilities `p` it is `diag p - p p^T` for classes and `diag p (1 - p)` for several labels at once; for targets
    with normal noise it is the identity divided by the noise's variance.

    * `"full"`: that matrix. Time grows with `(c (d + 1))^3`, memory with its square.
    * `"kron"`: the product of the two sums, divided by the number of rows; the prior is added exactly, through the
      factors' eigenvalues. Time grows with `d^3 + c^3`. As in laplace-torch, but for the bias, which is kept together
      with the weights here. Use it for wide embeddings.

    The draws are symmetric square roots or Cholesky factors applied to normal noise, so padding does not change them.
    Without a label they come from the prior around the meta-parameters' head. Gradients through `adapt` see the mean
    only; the spread counts as a constant. `meta_grad` is the learner's own. With `"full"` the prior precision is taken
    to be at least a millionth of the matrix's trace, which keeps its Cholesky factor finite in float32.

    Args:
      learner: a single model that adapts a linear layer named `head` with a bias: `maml`, `fine_tune`.
      members: heads, at least 2.
      prior_precision: inverse variance of the prior on each weight, above 0.
      hessian: `"kron"` or `"full"`.
      loss: the learner's; of those in `metaal_jax.losses`, since it must be a likelihood.
      noise: standard deviation of the targets around the outputs, > 0; read under `losses.squared_error` alone.

    Returns:
      A `Learner` with the learner's meta-parameters; the adapted ones have the drawn `heads` beside them.

    Raises:
      ValueError: for fewer than two members, `prior_precision <= 0`, `noise <= 0`, an unknown `hessian` or a loss that
        is no known likelihood; from `adapt` for a learner without such a head, or one with several members.

    Reference: Kristiadi, Hein, Hennig: Being Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks, 2020;
    Ritter, Botev, Barber: A Scalable Laplace Approximation for Neural Networks, 2018; Daxberger et al.: Laplace Redux,
    2021.
    """
    require(members >= 2, f"laplace: members must be at least 2, got {members}")
    require(prior_precision > 0, f"laplace: prior_precision must be > 0, got {prior_precision}")
    if hessian not in ("kron", "full"):
        raise ValueError(f"laplace: hessian must be 'kron' or 'full', got {hessian!r}")
    require(noise > 0, f"laplace: noise must be > 0, got {noise}")
    if loss not in CURVATURES:
        raise ValueError(
            "laplace: loss must be a likelihood whose curvature is known, one of "
            "losses.cross_entropy, losses.squared_error and losses.sigmoid_cross_entropy, got "
            f"{getattr(loss, '__name__', loss)}"
        )
    curvature = CURVATURES[loss]
    spread = kron_spread if hessian == "kron" else full_spread

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        adapt_key, head_key = jax.random.split(key)
        start = None if start is None else without(("heads",), start)
        params = learner.adapt(adapt_key, meta, batch, unlabelled=unlabelled, start=start)
        head, batch = head_of(params, "laplace: the learner"), cleared(batch)
        weight = batch.weight
        prediction = learner.predict(params, batch.x)
        require(prediction.logits.shape[0] == 1, "laplace: the learner must be a single model")
        outputs, z = lax.stop_gradient((prediction.logits[0], prediction.embedding[0]))
        z = jnp.concatenate([z, jnp.ones((z.shape[0], 1))], axis=1)
        draws = jax.random.normal(head_key, (members, z.shape[1], outputs.shape[1]))
        jax.eval_shape(loss, outputs, batch.y, weight)  # it refuses labels of another kind
        if loss is losses.cross_entropy:
            _, weight = losses.class_targets("laplace", batch.y, weight, outputs.shape[1])
        offset = spread(curvature(outputs, noise), z, lax.stop_gradient(weight), prior_precision, draws)
        return {
            **params,
            "heads": {"kernel": head["kernel"][None] + offset[:, :-1], "bias": head["bias"][None] + offset[:, -1]},
        }

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        embedding = learner.predict(without(("heads",), params), x).embedding
        heads = params["heads"]
        logits = jnp.einsum("nd,mdc->mnc", embedding[0], heads["kernel"]) + heads["bias"][:, None]
        return Prediction(logits=logits, embedding=embedding)

    return Learner(init=learner.init, adapt=adapt, predict=predict, meta_grad=learner.meta_grad)


def class_curvature(outputs: Array, noise: float | Array = 1.0) -> Array:
    """`diag p - p p^T` of each row, `[n, c, c]`: the second derivative of the cross entropy in the logits.

    The diagonal is the sum of the other entries of its row, not `p - p^2`: rounding must not make it indefinite.
    """
    del noise
    probs = jax.nn.softmax(outputs)
    same = jnp.eye(probs.shape[1])
    pairs = probs[:, :, None] * probs[:, None, :] * (1.0 - same)[None]
    return pairs.sum(-1, keepdims=True) * same[None] - pairs


def target_curvature(outputs: Array, noise: float | Array = 1.0) -> Array:
    """The identity divided by the variance of the noise, `[n, t, t]`: that of a normal likelihood."""
    rows, targets = outputs.shape
    return jnp.broadcast_to(jnp.eye(targets) / jnp.square(noise), (rows, targets, targets))


def label_curvature(outputs: Array, noise: float | Array = 1.0) -> Array:
    """`diag p (1 - p)` of each row, `[n, c, c]`: that of one sigmoid a label."""
    del noise
    return (jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs))[:, :, None] * jnp.eye(outputs.shape[1])[None]


CURVATURES: dict[LossFn, Callable[..., Array]] = {
    losses.cross_entropy: class_curvature,
    losses.squared_error: target_curvature,
    losses.sigmoid_cross_entropy: label_curvature,
}


def kron_spread(curvature: Array, z: Array, weight: Array, prior_precision: float | Array, noise: Array) -> Array:
    """Noise `[m, d + 1, c]` given the covariance of the Kronecker-factored posterior; `curvature` is `[n, c, c]`."""
    count = weight.sum()
    inputs = jnp.matmul((z * weight[:, None]).T, z, precision=EXACT) / jnp.where(count > 0, count, 1.0)
    outputs = (weight[:, None, None] * curvature).sum(0)
    input_values, inputs = jnp.linalg.eigh(inputs)
    output_values, outputs = jnp.linalg.eigh(outputs)
    precision = jnp.maximum(input_values, 0.0)[:, None] * jnp.maximum(output_values, 0.0)[None] + prior_precision
    # The symmetric root: it does not depend on the basis in which a repeated eigenvalue's vectors come.
    noise = inputs.T[None] @ noise @ outputs[None] / jnp.sqrt(precision)[None]
    return inputs[None] @ noise @ outputs.T[None]


def full_spread(curvature: Array, z: Array, weight: Array, prior_precision: float | Array, noise: Array) -> Array:
    """Noise `[m, d + 1, c]` given the covariance of the exact posterior; `curvature` is `[n, c, c]`."""
    members, width, classes = noise.shape
    outputs = weight[:, None, None] * curvature
    gauss_newton = jnp.einsum("nck,nd,ne->dcek", outputs, z, z, precision=EXACT).reshape(width * classes, -1)
    floor = 1e-6 * jnp.trace(gauss_newton)
    precision = gauss_newton + jnp.maximum(prior_precision, floor) * jnp.eye(width * classes)
    root = jnp.linalg.cholesky(precision)
    flat = jax.scipy.linalg.solve_triangular(root, noise.reshape(members, -1).T, lower=True, trans="T")
    return flat.T.reshape(noise.shape)
