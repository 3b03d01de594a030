"""Learners whose head is solved for in closed form on a meta-learned embedding: prototypes, ridge regression, SVM."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from metaal_jax import losses
from metaal_jax.base import Batch, Learner, LossFn, PyTree, is_classes, require
from metaal_jax.learners.adaptation import (
    HYPER,
    Adaptation,
    apply,
    cleared,
    head_of,
    init_of,
    judge_of,
    labelled_or,
    predict_of,
    support_statistics,
    without,
)
from metaal_jax.learners.heads import check_class_loss, prototype_head, ridge_head, svm_head
from metaal_jax.learners.meta_gradient import through


class Embedded(NamedTuple):
    """The inner problem of a closed form: cleared labelled rows, the parameters around the head, the embedding."""

    batch: Batch
    variables: PyTree
    hyper: PyTree
    embedding: Array


def closed_form(
    model: nn.Module,
    head: Callable[..., PyTree],
    *,
    settings: Mapping[str, float | Array],
    learn: Sequence[str] = (),
    statistics: Literal["batch", "support"] = "batch",
    warm: bool = False,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Adaptation:
    """Adaptation that solves for the last layer and leaves the body as it is.

    Args:
      model: a Flax module whose last layer is a linear one named `head` with a bias.
      head: `(embedding [n, d], y [n], weight [n], classes, **settings) -> {"kernel": [d, c], "bias": [c]}`, see
        `metaal_jax.learners.heads`.
      settings: its hyperparameters, all above 0 (`ridge` may be 0 where it is not learned).
      learn: which of them the outer loop trains, as logarithms, from the values given.
      statistics: of `models.BatchNorm` layers in prediction, see `gradient_steps`.
      warm: whether the head takes `start`, the last layer of `adapt(..., start=params)`.
      loss: of query rows, which the outer loop descends; the head itself minimises what it minimises.
      score: of query rows, reported beside the loss.

    Returns:
      An `Adaptation`. Without a label the meta-parameters' own head predicts; with labels that head is not read.

    Raises:
      ValueError: for unknown settings to learn, or settings out of range.
    """
    for name in learn:
        if name not in settings:
            raise ValueError(f"learn: {name!r} is no setting of this head; choose from {sorted(settings)}")
    for name, value in settings.items():
        lowest = "at least 0" if name == "ridge" and name not in learn else "above 0"  # an SVM needs no ridge
        require(value >= 0 if lowest == "at least 0" else value > 0, f"{name} must be {lowest}, got {value}")
    if statistics not in ("batch", "support"):
        raise ValueError(f"statistics must be 'batch' or 'support', got {statistics!r}")

    def init(key: Array, x: PyTree, /) -> PyTree:
        variables = init_of(model)(key, x)
        dtype = head_of(variables)["kernel"].dtype
        hyper = {f"log_{name}": jnp.log(jnp.asarray(settings[name], dtype)) for name in sorted(learn)}
        return {**variables, HYPER: hyper} if hyper else variables

    def begin(meta: PyTree, batch: Batch) -> Embedded:
        variables, batch = without((HYPER,), meta), cleared(batch)
        _, embedding = apply(model, variables, batch.x, batch.weight)
        return Embedded(batch, variables, meta.get(HYPER, {}), embedding)

    def solve(
        key: Array, problem: Embedded, *, first_order: bool = False, path: bool = False, **start: PyTree
    ) -> PyTree:
        del key, first_order, path  # there are no steps
        batch = problem.batch
        now = {
            name: jnp.exp(problem.hyper[f"log_{name}"]) if name in learn else value for name, value in settings.items()
        }
        classes = problem.variables["params"]["head"]["bias"].shape[0]
        return head(problem.embedding, batch.y, batch.weight, classes, **now, **start)

    def assemble(free: PyTree, problem: Embedded, *, step: Any = None) -> PyTree:
        del step
        variables = problem.variables
        made = labelled_or(problem.batch, free, variables["params"]["head"])
        params = {**variables, "params": {**variables["params"], "head": made}}
        return support_statistics(model, params, problem.batch) if statistics == "support" else params

    def adapt(key: Array, meta: PyTree, batch: Batch, /, *, unlabelled: PyTree = None, start: PyTree = None) -> PyTree:
        del unlabelled
        problem = begin(meta, batch)
        given = {"start": head_of(start)} if warm and start is not None else {}
        return assemble(solve(key, problem, **given), problem)

    return Adaptation(
        init=init,
        adapt=adapt,
        predict=predict_of(model),
        judge=judge_of(model, loss, score),
        begin=begin,
        solve=solve,
        assemble=assemble,
        objective=None,
        steps=0,
        bent=False,
        anchored=False,
        moves_all=False,
        learns=tuple(sorted(learn)),
    )


def protonet(
    model: nn.Module,
    *,
    temperature: float | Array = 1.0,
    learn: Sequence[str] = (),
    statistics: Literal["batch", "support"] = "batch",
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Prototypical networks: a row belongs to the class whose mean embedding is nearest.

    Args:
      model: a Flax module with a last layer named `head`.
      temperature: factor on the logits, minus half the squared distances (2 gives the paper's squared distances).
      learn: `("temperature",)` to learn it.
      statistics, loss, score: see `closed_form`.

    Raises:
      ValueError: see `closed_form`; for a loss of targets or of several labels at once, which have no class means.

    Reference: Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017.
    """
    check_class_loss("protonet", loss)
    settings = {"temperature": temperature}
    return through(
        closed_form(
            model, prototype_head, settings=settings, learn=learn, statistics=statistics, loss=loss, score=score
        )
    )


def r2d2(
    model: nn.Module,
    *,
    ridge: float | Array = 1.0,
    scale: float | Array = 1.0,
    intercept: bool = False,
    absent: float | None = -jnp.inf,
    learn: Sequence[str] = ("ridge", "scale"),
    statistics: Literal["batch", "support"] = "batch",
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """R2-D2: ridge regression on the embedding, with learned regularisation and scale (MetaOptNet-RR without them).

    With `loss=losses.squared_error` it is plain ridge regression onto float targets.

    Args:
      model: a Flax module with a last layer named `head`.
      ridge: strength of the regularisation, > 0.
      scale: factor on the regression's outputs to make logits of them, > 0.
      intercept: fits an unpenalised intercept too, which suits unbalanced labelled sets and targets; not in the paper.
      absent: logit of a class without a label, see `ridge_head`. Float labels have such classes under
        `losses.cross_entropy` alone.
      learn: which of `"ridge"`, `"scale"` to learn.
      statistics, loss, score: see `closed_form`.

    Raises:
      ValueError: see `closed_form`.

    Reference: Bertinetto, Henriques, Torr, Vedaldi: Meta-learning with Differentiable Closed-form Solvers, 2019.
    """

    def head(embedding: Array, y: Array, weight: Array, classes: int, **settings: Any) -> PyTree:
        out = absent if is_classes(y) or loss is losses.cross_entropy else None
        return ridge_head(embedding, y, weight, classes, intercept=intercept, absent=out, **settings)

    settings = {"ridge": ridge, "scale": scale}
    return through(
        closed_form(model, head, settings=settings, learn=learn, statistics=statistics, loss=loss, score=score)
    )


def metaoptnet(
    model: nn.Module,
    *,
    penalty: float | Array = 0.1,
    ridge: float | Array = 1.0,
    scale: float | Array = 1.0,
    iterations: int | None = None,
    learn: Sequence[str] = ("scale",),
    statistics: Literal["batch", "support"] = "batch",
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """MetaOptNet: a multi-class support vector machine on the embedding, through whose dual problem one differentiates.

    Args:
      model: a Flax module with a last layer named `head`.
      penalty: the SVM's C, > 0.
      ridge: added to the kernel's diagonal, >= 0, as in the authors' code.
      scale: factor on the SVM's scores to make logits of them, > 0.
      iterations: of the solver, see `svm_head`; None for its default.
      learn: which of `"penalty"`, `"ridge"`, `"scale"` to learn.
      statistics, loss, score: see `closed_form`.

    Raises:
      ValueError: see `closed_form`; for a loss of targets or of several labels at once, which have no margin to one
        right class.

    Reference: Lee, Maji, Ravichandran, Soatto: Meta-Learning with Differentiable Convex Optimization, 2019.
    """
    check_class_loss("metaoptnet", loss)
    more = {} if iterations is None else {"iterations": iterations}

    def head(embedding: Array, y: Array, weight: Array, classes: int, **settings: Any) -> PyTree:
        return svm_head(embedding, y, weight, classes, **settings, **more)

    settings = {"penalty": penalty, "ridge": ridge, "scale": scale}
    return through(
        closed_form(model, head, settings=settings, learn=learn, statistics=statistics, loss=loss, score=score)
    )
