"""MAML and its family by name: each is an inner loop and an outer gradient."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import optax
from jax import Array

from metaal_jax import losses
from metaal_jax.base import Learner, LossFn, Metrics, PyTree, Task
from metaal_jax.learners.adaptation import all_rows, judge_of
from metaal_jax.learners.gradient import gradient_steps
from metaal_jax.learners.meta_gradient import annealed, implicit, reptile_difference, through


def maml(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    rates: Literal["tensor", "parameter"] | None = None,
    per_step: bool = False,
    learn: Sequence[str] = (),
    per_step_norm: bool = False,
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps fit a new task.

    `adapt` takes `steps` steps of `optimizer` on the labelled rows from the meta-parameters (or from `start`);
    `meta_grad` is the gradient of the query loss after them, through all steps, or first order.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: of the inner loop, any Optax transformation of gradients alone.
      steps: inner steps.
      first_order: treats the inner gradients as constants (FOMAML).
      adapted, head, temperature, decay, proximal, rates, per_step, learn, per_step_norm, statistics, minibatch,
        microbatch, remat, unroll, loss, score: see `gradient_steps`.

    Returns:
      A `Learner` whose meta-parameters are the model's variables (and learned hyperparameters, if any).

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.

    >>> import jax, optax
    >>> from metaal_jax import learners, models
    >>> learner = learners.maml(models.MLP(classes=3), optimizer=optax.sgd(0.1), steps=5)
    >>> meta = learner.init(jax.random.key(0), jax.numpy.zeros((1, 8)))
    >>> learner.predict(meta, jax.numpy.zeros((4, 8))).logits.shape
    (1, 4, 3)
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted=adapted, head=head, temperature=temperature, decay=decay,
        proximal=proximal, rates=rates, per_step=per_step, learn=learn, per_step_norm=per_step_norm,
        statistics=statistics, minibatch=minibatch, microbatch=microbatch, remat=remat, unroll=unroll, loss=loss,
        score=score,
    )  # fmt: skip
    return through(adaptation, first_order=first_order)


def anil(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    rates: Literal["tensor", "parameter"] | None = None,
    per_step: bool = False,
    learn: Sequence[str] = (),
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Almost no inner loop: MAML whose inner steps move the last layer alone.

    The embedding of the labelled rows is computed once, so many steps cost little.

    Args:
      model: a Flax module with a last layer named `head`.
      optimizer: of the inner loop.
      steps: inner steps.
      first_order: treats the inner gradients as constants.
      head, temperature, decay, proximal, rates, per_step, learn, statistics, minibatch, microbatch, remat, unroll,
        loss, score: see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Raghu, Raghu, Bengio, Vinyals: Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness
    of MAML, 2020.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted="head", head=head, temperature=temperature, decay=decay,
        proximal=proximal, rates=rates, per_step=per_step, learn=learn, statistics=statistics, minibatch=minibatch,
        microbatch=microbatch, remat=remat, unroll=unroll, loss=loss, score=score,
    )  # fmt: skip
    return through(adaptation, first_order=first_order)


def meta_sgd(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int = 1,
    first_order: bool = False,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    per_step: bool = False,
    learn: Sequence[str] = (),
    per_step_norm: bool = False,
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Meta-SGD: MAML with a learned step size for every parameter.

    Args:
      model: a Flax module.
      optimizer: of the inner loop, `optax.sgd(rate)` in the paper; learned are factors on its updates, from 1.
      steps: inner steps, one in the paper.
      first_order: treats the inner gradients as constants; the step sizes are learned all the same.
      per_step: learns a step size for every step, too.
      adapted, head, temperature, decay, proximal, learn, per_step_norm, statistics, minibatch, microbatch, remat,
        unroll, loss, score: see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Li, Zhou, Chen, Li: Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted=adapted, head=head, temperature=temperature, decay=decay,
        proximal=proximal, rates="parameter", per_step=per_step, learn=learn, per_step_norm=per_step_norm,
        statistics=statistics, minibatch=minibatch, microbatch=microbatch, remat=remat, unroll=unroll, loss=loss,
        score=score,
    )  # fmt: skip
    return through(adaptation, first_order=first_order)


def maml_plus_plus(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    anneal_steps: int,
    per_step_norm: bool = True,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    learn: Sequence[str] = (),
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    remat: bool = False,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """MAML++: MAML with a multi-step loss, step sizes per layer and step, and norm parameters per step.

    Different from the paper: second order from the start, and the outer optimiser (its cosine schedule) is the
    caller's choice.

    Args:
      model: a Flax module, with norm layers unless `per_step_norm` is False.
      optimizer: of the inner loop, `optax.sgd(rate)` in the paper; learned are factors on its updates, from 1.
      steps: inner steps.
      anneal_steps: outer steps after which only the last inner step's loss counts, see `annealed`.
      per_step_norm: learns scale and bias of norm layers for every inner step, which normalises by the statistics of
        its own batch.
      adapted, head, temperature, decay, proximal, learn, statistics, minibatch, microbatch, remat, unroll, loss,
        score: see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps` and `annealed`.

    Reference: Antoniou, Edwards, Storkey: How to Train Your MAML, 2019.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted=adapted, head=head, temperature=temperature, decay=decay,
        proximal=proximal, rates="tensor", per_step=True, learn=learn, per_step_norm=per_step_norm,
        statistics=statistics, minibatch=minibatch, microbatch=microbatch, remat=remat, unroll=unroll, loss=loss,
        score=score,
    )  # fmt: skip
    return through(adaptation, multi_step=annealed(steps, anneal_steps))


def reptile(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    minibatch: int | None = None,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    statistics: Literal["batch", "support"] = "batch",
    microbatch: int | None = None,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Reptile: the outer loop moves the initialisation towards the parameters that the inner loop found.

    Args:
      model: a Flax module.
      optimizer: of the inner loop. The paper's is Adam without first moment whose second moments live on from task to
        task; here every task begins anew, for which plain gradient descent is better.
      steps: inner steps.
      minibatch: rows drawn for each of them; None for all.
      decay, proximal, statistics, microbatch, unroll, loss, score: see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, decay=decay, proximal=proximal, statistics=statistics,
        minibatch=minibatch, microbatch=microbatch, unroll=unroll, loss=loss, score=score,
    )  # fmt: skip
    return reptile_difference(adaptation)


def implicit_maml(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    proximal: float | Array,
    solver_steps: int = 5,
    damping: float | Array = 0.0,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    learn: Sequence[str] = (),
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """MAML with implicit gradients: the inner loop minimises the loss plus a pull towards the initialisation.

    Args:
      model: a Flax module, smooth enough for second derivatives to mean something.
      optimizer: of the inner loop.
      steps: inner steps, enough to come near the minimum.
      proximal: strength of the pull, > 0.
      solver_steps, damping: of the conjugate gradients, see `implicit`.
      adapted, head, temperature, decay, learn, statistics, minibatch, microbatch, unroll, loss, score: see
        `gradient_steps`.

    Raises:
      ValueError: see `implicit` and `gradient_steps`.

    Reference: Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, 2019.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted=adapted, head=head, temperature=temperature, decay=decay,
        proximal=proximal, learn=learn, statistics=statistics, minibatch=minibatch, microbatch=microbatch,
        unroll=unroll, loss=loss, score=score,
    )  # fmt: skip
    return implicit(adaptation, solver_steps=solver_steps, damping=damping)


def fine_tune(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    adapted: Literal["all", "head", "body"] = "all",
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    decay: float | Array = 0.0,
    proximal: float | Array = 0.0,
    statistics: Literal["batch", "support"] = "batch",
    minibatch: int | None = None,
    microbatch: int | None = None,
    unroll: int | bool = 1,
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Plain supervised learning: the baseline without meta-learning.

    From a random initialisation `adapt` trains from scratch; from pre-trained parameters it is transfer by
    fine-tuning. `meta_grad` is that pre-training: the gradient of the loss on all of a task's rows, no inner loop; with
    `tasks.minibatches` it is ordinary training on a whole set.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: any Optax transformation of gradients alone.
      steps: full-batch steps on the labelled rows.
      adapted, head, temperature, decay, proximal, statistics, minibatch, microbatch, unroll, loss, score: see
        `gradient_steps`.

    Returns:
      A `Learner` whose meta-parameters are the model's variables.

    Raises:
      ValueError: see `gradient_steps`.
    """
    adaptation = gradient_steps(
        model, optimizer=optimizer, steps=steps, adapted=adapted, head=head, temperature=temperature, decay=decay,
        proximal=proximal, statistics=statistics, minibatch=minibatch, microbatch=microbatch, unroll=unroll, loss=loss,
        score=score,
    )  # fmt: skip
    judge = judge_of(model, loss, score)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del key, step
        rows = all_rows(task)
        return jax.grad(lambda params: judge(params, rows), has_aux=True)(meta)

    return through(adaptation)._replace(meta_grad=meta_grad)
