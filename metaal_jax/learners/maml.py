"""MAML and its family by name: each is an inner loop and an outer gradient."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from metaal_jax.base import Learner, Metrics, PyTree, Task
from metaal_jax.learners.adaptation import judge_of
from metaal_jax.learners.gradient import gradient_steps
from metaal_jax.learners.meta_gradient import annealed, implicit, reptile_difference, through


def maml(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    head: Literal["meta", "prototypes"] = "meta",
    temperature: float | Array = 1.0,
    remat: bool = False,
    unroll: int | bool = 1,
    **options: Any,
) -> Learner:
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps fit a new task.

    `adapt` takes `steps` steps of `optimizer` on the labelled rows from the meta-parameters (or from `start`);
    `meta_grad` is the gradient of the query loss after them, through all steps, or first order.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: of the inner loop, any Optax transformation.
      steps: inner steps.
      first_order: treats the inner gradients as constants (FOMAML).
      head, temperature, remat, unroll, options: of the inner loop, see `gradient_steps`.

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
    return through(
        gradient_steps(
            model,
            optimizer=optimizer,
            steps=steps,
            head=head,
            temperature=temperature,
            remat=remat,
            unroll=unroll,
            **options,
        ),
        first_order=first_order,
    )


def anil(
    model: nn.Module, *, optimizer: optax.GradientTransformation, steps: int, first_order: bool = False, **options: Any
) -> Learner:
    """Almost no inner loop: MAML whose inner steps move the last layer alone.

    The embedding of the labelled rows is computed once, so many steps cost little.

    Args:
      model: a Flax module with a last layer named `head`.
      optimizer: of the inner loop.
      steps: inner steps.
      first_order: treats the inner gradients as constants.
      options: of the inner loop, see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Raghu, Raghu, Bengio, Vinyals: Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness
    of MAML, 2020.
    """
    return through(
        gradient_steps(model, optimizer=optimizer, steps=steps, adapted="head", **options), first_order=first_order
    )


def meta_sgd(
    model: nn.Module, *, rate: float | Array, steps: int = 1, first_order: bool = False, **options: Any
) -> Learner:
    """Meta-SGD: MAML with a learned step size for every parameter.

    Args:
      model: a Flax module.
      rate: the step size that all parameters start from, > 0; learned are factors on it.
      steps: inner steps, one in the paper.
      first_order: treats the inner gradients as constants; the step sizes are learned all the same.
      options: of the inner loop, see `gradient_steps`; `per_step=True` learns a step size for every step.

    Raises:
      ValueError: see `gradient_steps`.

    Reference: Li, Zhou, Chen, Li: Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    adaptation = gradient_steps(model, optimizer=optax.sgd(rate), steps=steps, rates="parameter", **options)
    return through(adaptation, first_order=first_order)


def maml_plus_plus(
    model: nn.Module, *, rate: float | Array, steps: int, anneal_steps: int, per_step_norm: bool = True, **options: Any
) -> Learner:
    """MAML++: MAML with a multi-step loss, step sizes per layer and step, and norm parameters per step.

    Different from the paper: second order from the start, and the outer optimiser (its cosine schedule) is the
    caller's choice.

    Args:
      model: a Flax module, with norm layers unless `per_step_norm` is False.
      rate: the inner step size that all layers and steps start from.
      steps: inner steps.
      anneal_steps: outer steps after which only the last inner step's loss counts, see `annealed`.
      per_step_norm: learns scale and bias of norm layers for every inner step, which normalises by the statistics of
        its own batch.
      options: of the inner loop, see `gradient_steps`.

    Raises:
      ValueError: see `gradient_steps` and `annealed`.

    Reference: Antoniou, Edwards, Storkey: How to Train Your MAML, 2019.
    """
    adaptation = gradient_steps(
        model,
        optimizer=optax.sgd(rate),
        steps=steps,
        rates="tensor",
        per_step=True,
        per_step_norm=per_step_norm,
        **options,
    )
    return through(adaptation, multi_step=annealed(steps, anneal_steps))


def reptile(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    minibatch: int | None = None,
    **options: Any,
) -> Learner:
    """Reptile: the outer loop moves the initialisation towards the parameters that the inner loop found.

    Args:
      model: a Flax module.
      optimizer: of the inner loop. The paper's is Adam without first moment whose second moments live on from task to
        task; here every task begins anew, for which plain gradient descent is better.
      steps: inner steps.
      minibatch: rows drawn for each of them; None for all.
      options: of the inner loop, see `gradient_steps`.

    Raises:
      ValueError: see `reptile_difference` and `gradient_steps`.

    Reference: Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018.
    """
    return reptile_difference(gradient_steps(model, optimizer=optimizer, steps=steps, minibatch=minibatch, **options))


def implicit_maml(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    proximal: float | Array,
    solver_steps: int = 5,
    damping: float | Array = 0.0,
    **options: Any,
) -> Learner:
    """MAML with implicit gradients: the inner loop minimises the loss plus a pull towards the initialisation.

    Args:
      model: a Flax module, smooth enough for second derivatives to mean something.
      optimizer: of the inner loop.
      steps: inner steps, enough to come near the minimum.
      proximal: strength of the pull, > 0.
      solver_steps, damping: of the conjugate gradients, see `implicit`.
      options: of the inner loop, see `gradient_steps`.

    Raises:
      ValueError: see `implicit` and `gradient_steps`.

    Reference: Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, 2019.
    """
    adaptation = gradient_steps(model, optimizer=optimizer, steps=steps, proximal=proximal, **options)
    return implicit(adaptation, solver_steps=solver_steps, damping=damping)


def fine_tune(
    model: nn.Module, *, optimizer: optax.GradientTransformation, steps: int, unroll: int | bool = 1, **options: Any
) -> Learner:
    """Plain supervised learning: the baseline without meta-learning.

    From a random initialisation `adapt` trains from scratch; from pre-trained parameters it is transfer by
    fine-tuning. `meta_grad` is that pre-training: the gradient of the loss on all of a task's rows, no inner loop; with
    `tasks.minibatches` it is ordinary training on a whole set.

    Args:
      model: a Flax module, see `metaal_jax.models`.
      optimizer: any Optax transformation.
      steps: full-batch steps on the labelled rows.
      unroll, options: of the inner loop, see `gradient_steps`.

    Returns:
      A `Learner` whose meta-parameters are the model's variables.

    Raises:
      ValueError: see `gradient_steps`; for learned hyperparameters, which pre-training never sees.
    """
    adaptation = gradient_steps(model, optimizer=optimizer, steps=steps, unroll=unroll, **options)
    if adaptation.learns:
        raise ValueError(f"fine_tune: pre-training takes no inner step and cannot learn {adaptation.learns[0]}")
    base = through(adaptation)
    judge = judge_of(model)

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del key, step
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.support, task.query)
        return jax.grad(lambda params: judge(params, both), has_aux=True)(meta)

    return base._replace(meta_grad=meta_grad)
