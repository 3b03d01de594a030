"""The first half of a meta-learner: how labels become parameters. The second half is `meta_gradient`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import AdaptFn, Batch, InitFn, LossFn, Metrics, PredictFn, Prediction, PyTree, Task, take
from metaal_jax.losses import clear_padding

HYPER = "hyper"  # the entry of the meta-parameters that holds learned hyperparameters


class Adaptation(NamedTuple):
    """How labels become parameters, in the parts that the outer gradients need.

    `begin` reads the meta-parameters and the labels, `solve` finds the parameters that the inner loop moves, the `free`
    ones, and `assemble` puts all together: `adapt(key, meta, batch)` is `assemble(solve(key, problem), problem)` for
    `problem = begin(meta, batch)`.

    Attributes:
      init, adapt, predict: as in `Learner`.
      judge: `(params, batch) -> (loss, metrics)`, as the outer loop sees query rows.
      begin: `(meta, batch) -> problem`, the inner problem, differentiable in `meta`.
      solve: `(key, problem, *, first_order, path) -> free`; with `path` after every step, leaves `[steps, ...]`.
      assemble: `(free, problem, *, step=None) -> params`; `step` (int `[]`) where it is not after the last one.
      objective: `(free, problem) -> []`, what the inner loop descends; None for a closed form.
      steps: number of inner steps; 0 for a closed form.
      bent: whether a proximal term or weight decay adds curvature to the objective everywhere.
      anchored: whether there is a proximal term, which depends on the meta-parameters.
      moves_all: whether every parameter starts from the meta-parameters and may move, as Reptile needs.
      learns: names of learned hyperparameters.
    """

    init: InitFn
    adapt: AdaptFn
    predict: PredictFn
    judge: Callable[[PyTree, Batch], tuple[Array, Metrics]]
    begin: Callable[[PyTree, Batch], Any]
    solve: Callable[..., PyTree]
    assemble: Callable[..., PyTree]
    objective: Callable[[PyTree, Any], Array] | None
    steps: int
    bent: bool
    anchored: bool
    moves_all: bool
    learns: tuple[str, ...]


def without(names: tuple[str, ...], tree: PyTree) -> PyTree:
    """A dictionary less some of its entries."""
    return {name: leaf for name, leaf in tree.items() if name not in names}


def cleared(batch: Batch) -> Batch:
    """A batch whose padding is harmless whatever it held, see `losses.clear_padding`.

    A network's output for a row of NaN is NaN, and so is the derivative of all its parameters, whatever weighs them
    afterwards: rows are cleared before any model sees them.
    """
    x, y = clear_padding((batch.x, batch.y), batch.weight)
    return batch._replace(x=x, y=y)


def all_rows(task: Task) -> Batch:
    """Support and query rows of a task as one batch, cleared: what supervised training learns from."""
    return cleared(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.support, task.query))


def apply(model: nn.Module, variables: PyTree, x: PyTree, weight: Array | None = None) -> tuple[Array, Array]:
    """Logits `[n, c]` and embedding `[n, d]`; entries that are not the model's are left out."""
    return pair_of(model, model.apply(without((HYPER,), variables), x, weight))


def pair_of(model: nn.Module, out: Any) -> tuple[Array, Array]:
    """What a model returned as logits and embedding; raises `ValueError` where it is no such pair."""
    if not (isinstance(out, tuple) and len(out) == 2 and all(getattr(part, "ndim", 0) == 2 for part in out)):
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(out)]
        raise ValueError(
            f"{type(model).__name__} must return (logits [n, c], embedding [n, d]), the embedding being the input of "
            f"the last layer; it returned {type(out).__name__} of shapes {shapes}"
        )
    return out


def head_of(params: PyTree, who: str = "the model") -> PyTree:
    """The last layer's kernel and bias; raises `ValueError` where no layer is named `head` or it has no bias."""
    head = params.get("params", {}).get("head", {}) if isinstance(params, dict) else {}
    if not {"kernel", "bias"} <= set(head):
        raise ValueError(f"{who} needs a last layer named 'head' with a kernel and a bias")
    return head


def init_of(model: nn.Module) -> InitFn:
    """Fresh variables; shapes are taken from the first row.

    It raises `ValueError` for a module that is no model of this package, see `metaal_jax.models`.
    """

    def init(key: Array, x: PyTree, /) -> PyTree:
        _check_signature(model)
        with nn.intercept_methods(_refuse_foreign_layers):
            out, variables = model.init_with_output(key, take(x, jnp.zeros(1, jnp.int32)), None)
        pair_of(model, out)
        return variables

    return init


def _check_signature(model: nn.Module) -> None:
    taken = list(inspect.signature(type(model).__call__).parameters.values())[1:3]
    any_number = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in taken)
    if not any_number and (len(taken) < 2 or taken[1].name != "weight"):
        raise ValueError(
            f"{type(model).__name__} must take the rows' weights: write `def __call__(self, x, weight=None)`; only "
            "layers that look at the whole batch, such as models.BatchNorm, read them"
        )


def _refuse_foreign_layers(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Stops at Flax layers that need a random stream or a mutable collection, which no learner gives them."""
    layer = context.module
    if isinstance(layer, nn.BatchNorm):
        raise ValueError(
            "flax.linen.BatchNorm keeps running statistics, which no learner updates; use metaal_jax.models.BatchNorm"
            "(...)(x, weight)"
        )
    rate = layer.rate if isinstance(layer, nn.Dropout) else getattr(layer, "dropout_rate", 0.0)
    if isinstance(rate, int | float) and rate > 0:
        raise ValueError(
            f"{type(layer).__name__} of flax.linen would never drop anything here; use metaal_jax.models.Dropout(rate) "
            "and learners.mc_dropout"
        )
    return call(*args, **kwargs)


def predict_of(model: nn.Module) -> PredictFn:
    """`predict` of a single model."""

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        logits, embedding = apply(model, params, x)
        return Prediction(logits=logits[None], embedding=embedding[None])

    return predict


def metrics_of(loss: LossFn, score: LossFn, outputs: Array, batch: Batch) -> tuple[Array, Metrics]:
    """A batch's loss, and the metrics that every `meta_grad` gives: `loss` and `score`."""
    value = loss(outputs, batch.y, batch.weight)
    return value, {"loss": value, "score": score(outputs, batch.y, batch.weight)}


def judge_of(model: nn.Module, loss: LossFn, score: LossFn) -> Callable[[PyTree, Batch], tuple[Array, Metrics]]:
    """Loss and score of a model on labelled rows."""

    def judge(params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        batch = cleared(batch)
        logits, _ = apply(model, params, batch.x, batch.weight)
        return metrics_of(loss, score, logits, batch)

    return judge


def support_statistics(model: nn.Module, params: PyTree, batch: Batch) -> PyTree:
    """Parameters with which batch norm layers normalise by the statistics of `batch` instead of the rows at hand.

    Predictions are then not transductive: a row's does not depend on the rows beside it. Without any labelled row the
    layers do not normalise; without such layers nothing changes.

    Args:
      model: the network of `params`.
      params: adapted parameters, such as `maml(...)` gives.
      batch: the labelled rows; only `x` and `weight` are read.

    Returns:
      `params` with the collection `batch_stats`, which `models.BatchNorm` reads.

    Reference: Bronskill et al.: TaskNorm, 2020 (there MetaBN).
    """
    bare = without((HYPER, "batch_stats"), params)
    x = clear_padding(batch.x, batch.weight)
    _, statistics = model.apply(bare, x, batch.weight, mutable=["batch_stats"])
    return {**without(("batch_stats",), params), **statistics}


def labelled_or(batch: Batch, new: PyTree, old: PyTree) -> PyTree:
    """`new`, or `old` where the batch holds no label: then there is nothing to adapt to."""
    labelled = batch.weight.sum() > 0
    return jax.tree.map(lambda new, old: jnp.where(labelled, new, old), new, old)


def held_without_labels(batch: Batch, tree: PyTree) -> PyTree:
    """`tree`, through which no derivative passes where the batch holds no label.

    Without a label every gradient of the inner loop is 0, and the derivative of an optimiser's update there may be NaN
    (the root or the norm of 0), which no later product or `where` takes back.
    """
    labelled = batch.weight.sum() > 0

    def hold(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(labelled, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(hold, tree)
