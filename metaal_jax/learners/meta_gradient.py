"""The second half of a meta-learner: how the outer loop gets its gradient from an `Adaptation`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from metaal_jax.base import Learner, Metrics, PyTree, Task, require
from metaal_jax.learners.adaptation import Adaptation


def _learner(adaptation: Adaptation, meta_grad: Any) -> Learner:
    return Learner(init=adaptation.init, adapt=adaptation.adapt, predict=adaptation.predict, meta_grad=meta_grad)


def through(
    adaptation: Adaptation,
    *,
    first_order: bool = False,
    multi_step: Callable[[Array], Array] | None = None,
) -> Learner:
    """The gradient of the query loss through the whole adaptation.

    Args:
      adaptation: how labels become parameters.
      first_order: treats the inner gradients as constants (FOMAML).
      multi_step: `(outer step, int32 []) -> [steps]`, weights of the query losses after each inner step, such as
        `annealed`; None for the loss after the last step alone.

    Returns:
      A `Learner`. The metrics are those after the last step.

    Raises:
      ValueError: for `first_order` or `multi_step` where there are no inner steps, and for `first_order` where what is
        learned reaches the result through the inner gradients alone.

    Reference: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, 2017; Antoniou, Edwards, Storkey: How to Train Your
    MAML, 2019 (multi-step loss).
    """
    if adaptation.steps == 0 and (first_order or multi_step is not None):
        what = "first_order" if first_order else "multi_step"
        raise ValueError(f"through: {what} is about inner steps and this adaptation takes none; leave it out")
    if first_order and (lost := sorted({"decay", "proximal", "norm"} & set(adaptation.learns))):
        raise ValueError(f"through: first_order stops the gradients by which {lost[0]} would be learned; leave one out")

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        def last_loss(meta: PyTree) -> tuple[Array, Metrics]:
            problem = adaptation.begin(meta, task.support)
            free = adaptation.solve(key, problem, first_order=first_order)
            return adaptation.judge(adaptation.assemble(free, problem), task.query)

        def every_loss(meta: PyTree, weights: Array) -> tuple[Array, Metrics]:
            problem = adaptation.begin(meta, task.support)
            free = adaptation.solve(key, problem, first_order=first_order, path=True)

            def judge(after: tuple[PyTree, Array]) -> tuple[Array, Metrics]:
                params = adaptation.assemble(after[0], problem, step=after[1] + 1)
                return adaptation.judge(params, task.query)

            losses, metrics = lax.map(judge, (free, jnp.arange(adaptation.steps)))
            return weights @ losses, jax.tree.map(lambda leaf: leaf[-1], metrics)

        if multi_step is None:
            return jax.grad(last_loss, has_aux=True)(meta)
        return jax.grad(every_loss, has_aux=True)(meta, multi_step(step))

    return _learner(adaptation, meta_grad)


def annealed(steps: int, over: int) -> Callable[[Array], Array]:
    """Weights of the query losses after each inner step: equal at first, after `over` outer steps the last one's alone.

    Raises:
      ValueError: for numbers below 1.

    Reference: Antoniou, Edwards, Storkey: How to Train Your MAML, 2019.
    """
    require(steps >= 1, f"annealed: steps must be a positive integer, got {steps}")
    require(over >= 1, f"annealed: over must be a positive integer, got {over}")

    def weights(step: Array) -> Array:
        equal = jnp.maximum(1.0 - step / over, 0.0) / steps
        return jnp.full(steps, equal).at[-1].add(1.0 - steps * equal)

    return weights


def reptile_difference(adaptation: Adaptation) -> Learner:
    """Reptile: the outer loop descends `meta - adapted`, towards the parameters that the inner loop found.

    With plain SGD of rate `r` the outer step is `meta + r (adapted - meta)`. No derivative of the inner loop is taken,
    so it may be long; it should see different rows in its steps (`minibatch`), since what they have in common is what
    is learned. Adaptation looks at the support rows only: meta-train on tasks with more of them than later use has.

    Args:
      adaptation: gradient steps on all parameters, from the meta-parameters.

    Returns:
      A `Learner`. A task without labels has no direction: its gradient is 0.

    Raises:
      ValueError: where a parameter does not start from the meta-parameters and move, or hyperparameters are learned:
        the difference says nothing of them.

    Reference: Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018.
    """
    if adaptation.learns:
        raise ValueError(f"reptile: the difference says nothing of learned {', '.join(adaptation.learns)}; use through")
    if not adaptation.moves_all:
        raise ValueError(
            "reptile: all parameters must start from the meta-parameters and move in the inner loop; use through for "
            "closed forms, prototype heads and adaptation of the head or the body alone"
        )

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del step
        params = adaptation.adapt(key, meta, task.support)
        _, metrics = adaptation.judge(params, task.query)
        return jax.tree.map(jnp.subtract, meta, {name: params[name] for name in meta}), metrics

    return _learner(adaptation, meta_grad)


def implicit(adaptation: Adaptation, *, solver_steps: int, damping: float | Array = 0.0) -> Learner:
    """The gradient of the query loss at the minimum of the inner objective, by the implicit function theorem.

    Where the free parameters `p` minimise `objective(p, meta)`, `dp/dmeta = -H^-1 d/dmeta grad_p objective`, `H` being
    the objective's Hessian: the way to the minimum does not matter, and memory does not grow with its length. The
    solution of `H v = grad_p (query loss)` is found by conjugate gradients. The proximal term (or weight decay) must
    be strong enough to make `H` positive definite, and the inner loop long enough to come near the minimum: the
    gradient is as wrong as either is off.

    Args:
      adaptation: gradient steps with a proximal term or weight decay.
      solver_steps: conjugate gradient steps.
      damping: added to the Hessian, >= 0.

    Returns:
      A `Learner`. Its metrics also hold `residual`, the relative residual `|H v - g| / |g|` of the linear system, and
      `stationarity`, the norm of the inner objective's gradient where the inner loop ended.

    Raises:
      ValueError: for a closed form (its gradient is exact as it is), an objective without proximal term or weight
        decay (without a proximal term where all parameters move), learned step sizes, numbers of steps or norms (the
        minimum does not depend on them), or numbers out of range.

    Reference: Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, 2019.
    """
    require(solver_steps >= 1, f"implicit: solver_steps must be a positive integer, got {solver_steps}")
    require(damping >= 0, f"implicit: damping must be >= 0, got {damping}")
    objective = adaptation.objective
    if objective is None or adaptation.steps == 0:
        raise ValueError("implicit: this adaptation takes no inner steps, its gradient is exact; use through")
    if path := sorted({"rates", "steps", "norm"} & set(adaptation.learns)):
        raise ValueError(f"implicit: the minimum does not depend on learned {path[0]}; use through")
    if not adaptation.bent:
        raise ValueError("implicit: the inner objective needs proximal > 0 or decay > 0, both are 0")
    if adaptation.moves_all and not adaptation.anchored:
        raise ValueError("implicit: without proximal > 0 the minimum over all parameters does not depend on the meta-"
                         "parameters")  # fmt: skip

    def meta_grad(key: Array, meta: PyTree, task: Task, /, *, step: Array) -> tuple[PyTree, Metrics]:
        del step
        free = lax.stop_gradient(adaptation.solve(key, adaptation.begin(meta, task.support)))

        def query_loss(free: PyTree, meta: PyTree) -> tuple[Array, Metrics]:
            problem = adaptation.begin(meta, task.support)
            return adaptation.judge(adaptation.assemble(free, problem), task.query)

        (towards, direct), metrics = jax.grad(query_loss, argnums=(0, 1), has_aux=True)(free, meta)

        def slope(free: PyTree, meta: PyTree) -> PyTree:
            return jax.grad(objective)(free, adaptation.begin(meta, task.support))

        def hessian(v: PyTree) -> PyTree:
            product = jax.jvp(lambda free: slope(free, meta), (free,), (v,))[1]
            return jax.tree.map(lambda h, v: h + damping * v, product, v)

        tolerance = float(jnp.finfo(jax.tree.leaves(towards)[0].dtype).eps)
        v, _ = jax.scipy.sparse.linalg.cg(hessian, towards, maxiter=solver_steps, tol=tolerance)
        here, pull_back = jax.vjp(lambda meta: slope(free, meta), meta)
        (indirect,) = pull_back(v)
        size = optax.tree.norm(towards)
        off = optax.tree.norm(jax.tree.map(jnp.subtract, hessian(v), towards))
        metrics = {
            **metrics,
            "residual": off / jnp.where(size > 0, size, 1.0),
            "stationarity": optax.tree.norm(here),
        }
        return jax.tree.map(jnp.subtract, direct, indirect), metrics

    return _learner(adaptation, meta_grad)
