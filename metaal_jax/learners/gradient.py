"""Learners that adapt by gradient steps: MAML and plain fine-tuning."""

from collections.abc import Callable
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import Batch, Learner, Metrics, Prediction, PyTree, Task, require, take
from metaal_jax.losses import accuracy, cross_entropy

ABSENT = -1e3  # logit of a class without a prototype


def inner_loop(
    loss: Callable[..., Array],
    params: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Array | None = None,
    first_order: bool = False,
    remat: bool = False,
    unroll: int | bool = 1,
) -> PyTree:
    """`steps` steps of `optimizer` down `loss` from `params`, differentiable with respect to `params`.

    Args:
      loss: scalar function of the parameters; what else it reads may be traced.
      params: where to start.
      optimizer: any Optax transformation; its state starts afresh.
      steps: number of steps, static.
      key: for a loss with noise, `loss(params, key)`, which gets a key of its own in each step; None for
        `loss(params)`.
      first_order: treats each step's gradient as a constant (FOMAML).
      remat: recomputes a step in the backward pass instead of storing it (`jax.checkpoint`).
      unroll: as in `lax.scan`; unrolled steps run faster under a gradient and compile more slowly.

    Returns:
      Parameters with the structure of `params`.
    """

    keys = None if key is None else jax.random.split(key, steps)

    def step(carry: tuple[PyTree, PyTree], key: Array | None) -> tuple[tuple[PyTree, PyTree], None]:
        params, state = carry
        grads = jax.grad(loss)(params) if key is None else jax.grad(loss)(params, key)
        if first_order:
            grads = lax.stop_gradient(grads)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    (params, _), _ = lax.scan(step, (params, optimizer.init(params)), keys, length=steps, unroll=unroll)
    return params


def prototype_head(
    embedding: Array, y: Array, weight: Array, classes: int, *, temperature: float | Array = 1.0
) -> PyTree:
    """A linear layer whose logits are minus half the squared distances to the class prototypes, times `temperature`.

    A prototype is the weighted mean of its class's embeddings. Logit `j` of row `z` is `z.c_j - |c_j|^2 / 2`, which
    equals `-|z - c_j|^2 / 2` up to a term shared by all classes. A class without a label has no prototype; its logit
    is `ABSENT`, below all others. Distances grow with the embedding's size, so a large embedding wants a small
    temperature.

    Reference: Snell, Swersky, Zemel: Prototypical Networks, 2017; Triantafillou et al.: Meta-Dataset
    (Proto-MAML), 2020.
    """
    member = jax.nn.one_hot(y, classes, dtype=embedding.dtype) * weight[:, None]
    count = member.sum(0)
    centres = (member.T @ embedding) / jnp.where(count > 0, count, 1.0)[:, None]
    bias = jnp.where(count > 0, -0.5 * temperature * (centres**2).sum(-1), ABSENT)
    return {"kernel": temperature * centres.T, "bias": bias}


def maml(
    model: nn.Module,
    *,
    inner: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    remat: bool = False,
    unroll: int | bool = 1,
) -> Learner:
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps fit a new task.

    `adapt` takes `steps` steps of `inner` on the labelled rows from the meta-parameters (or from `start`);
    `meta_grad` is the gradient of the query loss after them, through all steps, or first order. The derivative of
    Adam-like inner optimisers is NaN where a gradient is exactly 0 (a constant input, a task without labels) unless
    they are given `eps_root > 0`.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      inner: the inner optimiser, any Optax transformation.
      steps: inner steps; meta-training and later use may differ, the meta-parameters fit both.
      first_order: treats the inner gradients as constants (FOMAML).
      head: `"meta"` starts the last layer from the meta-parameters; `"prototypes"` from the class means of the
        labelled rows' embeddings (Proto-MAML), which suits any number of labels per class. The steps then see the
        embedding less its mean over the labelled rows, since features after a ReLU share a large mean that would make
        the head's gradients all but parallel; the result is folded back into the head. It needs a last layer named
        `head` with a bias, and a warm start keeps the head it is given.
      temperature: factor on the prototype head's logits, > 0.
      remat: recomputes inner steps in the backward pass.
      unroll: of the scan over inner steps.

    Returns:
      A `Learner` whose meta-parameters are the model's variables.

    Raises:
      ValueError: for `steps < 0`, `temperature <= 0` or an unknown `head`.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.

    >>> import jax, optax
    >>> from metaal_jax import learners, models
    >>> learner = learners.maml(models.MLP(classes=3), inner=optax.sgd(0.1), steps=5)
    >>> meta = learner.init(jax.random.key(0), jax.numpy.zeros((1, 8)))
    >>> learner.predict(meta, jax.numpy.zeros((4, 8))).logits.shape
    (1, 4, 3)
    """
    require(steps >= 0, f"maml: steps must be >= 0, got {steps}")
    require(temperature > 0, f"maml: temperature must be > 0, got {temperature}")
    if head not in ("meta", "prototypes"):
        raise ValueError(f"maml: head must be 'meta' or 'prototypes', got {head!r}")

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del key, unlabelled
        origin = meta if start is None else start
        begin, centre = origin, None
        if head == "prototypes" and start is None:
            _, embedding = _apply(model, meta, batch.x, batch.weight)
            total = batch.weight.sum()
            centre = (batch.weight @ embedding) / jnp.where(total > 0, total, 1.0)
            last = meta["params"]["head"]
            made = prototype_head(
                embedding - centre, batch.y, batch.weight, last["bias"].shape[0], temperature=temperature
            )
            begin = {**meta, "params": {**meta["params"], "head": made}}

        def uncentred(params: PyTree) -> PyTree:
            if centre is None:
                return params
            head = params["params"]["head"]
            head = {**head, "bias": head["bias"] - centre @ head["kernel"]}
            return {**params, "params": {**params["params"], "head": head}}

        def loss(params: PyTree) -> Array:
            logits, _ = _apply(model, uncentred(params), batch.x, batch.weight)
            return cross_entropy(logits, batch.y, batch.weight)

        params = inner_loop(
            loss, begin, optimizer=inner, steps=steps, first_order=first_order, remat=remat, unroll=unroll
        )
        params = uncentred(params)
        # Without a label there is nothing to adapt to, whatever weight decay would do.
        labelled = batch.weight.sum() > 0
        return jax.tree.map(lambda new, old: jnp.where(labelled, new, old), params, origin)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del step

        def query_loss(meta: PyTree) -> tuple[Array, Metrics]:
            return _judge(model, adapt(key, meta, task.support), task.query)

        return jax.grad(query_loss, has_aux=True)(meta)

    return Learner(init=_init(model), adapt=adapt, predict=_predict(model), meta_grad=meta_grad)


def fine_tune(
    model: nn.Module, *, optimizer: optax.GradientTransformation, steps: int, unroll: int | bool = 1
) -> Learner:
    """Plain supervised learning: the baseline without meta-learning.

    From a random initialisation `adapt` trains from scratch; from pre-trained parameters it is transfer by
    fine-tuning. `meta_grad` is that pre-training: the gradient of the loss on all of a task's rows, no inner loop.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: any Optax transformation.
      steps: full-batch steps on the labelled rows.
      unroll: of the scan over steps.

    Returns:
      A `Learner` whose meta-parameters are the model's variables.

    Raises:
      ValueError: for `steps < 0`.
    """
    base = maml(model, inner=optimizer, steps=steps, unroll=unroll)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del key, step
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.support, task.query)
        return jax.grad(lambda params: _judge(model, params, both), has_aux=True)(meta)

    return base._replace(meta_grad=meta_grad)


def _apply(model: nn.Module, params: PyTree, x: PyTree, weight: Array | None = None) -> tuple[Array, Array]:
    return cast(tuple[Array, Array], model.apply(params, x, weight))


def _judge(model: nn.Module, params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
    logits, _ = _apply(model, params, batch.x, batch.weight)
    loss = cross_entropy(logits, batch.y, batch.weight)
    return loss, {"loss": loss, "accuracy": accuracy(logits, batch.y, batch.weight)}


def _predict(model: nn.Module) -> Callable[[PyTree, PyTree], Prediction]:
    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        logits, embedding = _apply(model, params, x)
        return Prediction(logits=logits[None], embedding=embedding[None])

    return predict


def _init(model: nn.Module) -> Callable[[Array, PyTree], PyTree]:
    def init(key: Array, x: PyTree, /) -> PyTree:
        return model.init(key, take(x, jnp.zeros(1, jnp.int32)))

    return init
