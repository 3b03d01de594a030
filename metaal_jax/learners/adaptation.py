"""The first half of a meta-learner: how labels become parameters. The second half is `meta_gradient`."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.base import AdaptFn, Batch, InitFn, Metrics, PredictFn, Prediction, PyTree, take
from metaal_jax.losses import accuracy, cross_entropy

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
      bent: whether the objective has terms beside the labels' (a proximal term, weight decay) that bend it everywhere.
      anchored: whether one of them is the proximal term, which depends on the meta-parameters.
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


def apply(model: nn.Module, variables: PyTree, x: PyTree, weight: Array | None = None) -> tuple[Array, Array]:
    """Logits `[n, c]` and embedding `[n, d]`; entries that are not the model's are left out."""
    return cast(tuple[Array, Array], model.apply(without((HYPER,), variables), x, weight))


def head_of(variables: PyTree) -> PyTree:
    """The last layer's kernel and bias; raises `ValueError` where no layer is named `head` or it has no bias."""
    head = variables["params"].get("head", {})
    if not {"kernel", "bias"} <= set(head):
        raise ValueError("the model needs a last layer named 'head' with a kernel and a bias")
    return head


def init_of(model: nn.Module) -> InitFn:
    """Fresh variables; shapes are taken from the first row."""

    def init(key: Array, x: PyTree, /) -> PyTree:
        return model.init(key, take(x, jnp.zeros(1, jnp.int32)))

    return init


def predict_of(model: nn.Module) -> PredictFn:
    """`predict` of a single model."""

    def predict(params: PyTree, x: PyTree, /) -> Prediction:
        logits, embedding = apply(model, params, x)
        return Prediction(logits=logits[None], embedding=embedding[None])

    return predict


def judge_of(model: nn.Module) -> Callable[[PyTree, Batch], tuple[Array, Metrics]]:
    """Cross entropy and accuracy of a model on labelled rows."""

    def judge(params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        logits, _ = apply(model, params, batch.x, batch.weight)
        loss = cross_entropy(logits, batch.y, batch.weight)
        return loss, {"loss": loss, "accuracy": accuracy(logits, batch.y, batch.weight)}

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
    _, statistics = model.apply(bare, batch.x, batch.weight, mutable=["batch_stats"])
    return {**without(("batch_stats",), params), **statistics}


def labelled_or(batch: Batch, new: PyTree, old: PyTree) -> PyTree:
    """`new`, or `old` where the batch holds no label: then there is nothing to adapt to."""
    labelled = batch.weight.sum() > 0
    return jax.tree.map(lambda new, old: jnp.where(labelled, new, old), new, old)
