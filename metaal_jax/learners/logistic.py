"""Multinomial logistic regression, minimised to convergence: the linear learner, and a head for any embedding."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax import losses
from metaal_jax.base import Learner, LossFn, PyTree, require
from metaal_jax.learners.closed_form import closed_form
from metaal_jax.learners.heads import FULL_PRECISION, check_class_loss
from metaal_jax.learners.meta_gradient import through
from metaal_jax.losses import class_targets, clear_padding
from metaal_jax.models import MLP

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
REFRESH = 16  # steps with one preconditioner
EARLY = (4, 8)  # and two more, since the first one knows nothing of the solution
LINE_STEPS = 3  # Newton steps of a line search
LEAVE_ONE_OUT = "leave_one_out"


class Regression(NamedTuple):
    """A weighted multinomial regression.

    Attributes:
      x: float `[n, d]`, centred; rows of weight 0 hold anything finite.
      target: float `[n, c]`, class probabilities.
      weight: float `[n]`.
      present: bool `[c]`, classes that have a label; the others are left out of the problem.
    """

    x: Array
    target: Array
    weight: Array
    present: Array


class Linear(NamedTuple):
    """A linear layer: `kernel` `[d, c]` and `bias` `[c]`."""

    kernel: Array
    bias: Array


class Search(NamedTuple):
    """Where the solver is: parameters, bias last, and their logits; what the last step went by; the preconditioner."""

    params: Array
    logits: Array
    direction: Array
    slope: Array
    steepest: Array
    inverse: Array


@FULL_PRECISION
def logistic_head(
    embedding: Array,
    y: Array,
    weight: Array,
    classes: int,
    *,
    ridge: float | Array | Literal["leave_one_out"] = 1.0,
    temperature: float | Array | Literal["leave_one_out"] = 1.0,
    ridges: Sequence[float] = RIDGES,
    unseen: float | Array = 1e-3,
    steps: int = 64,
    start: PyTree = None,
) -> PyTree:
    """Multinomial logistic regression with a ridge penalty: scikit-learn's `LogisticRegression(C=1 / ridge)`.

    The kernel and the bias minimise `sum_i w_i CE(z_i W + b, y_i) + ridge / 2 |W|^2` over the classes that have a
    label. As in scikit-learn the bias is free and, where only two classes have labels, one weight vector is penalised
    and not two. The solver takes a fixed number of conjugate-gradient steps, each as far as the loss falls along it,
    preconditioned by a bound of the Hessian that is renewed after 4, 8 and every 16 steps. It works in the space of
    the features or of the rows, whichever is smaller. The solution is differentiable in everything but integer `y`,
    implicitly and twice, also where weights are 0.

    Args:
      embedding: float `[n, d]`.
      y: int32 `[n]`, or class probabilities `[n, c]`.
      weight: float32 `[n]`, 0 = padding; an integer weight counts as so many equal rows.
      classes: number of classes `c`.
      ridge: strength of the penalty, above 0; or `"leave_one_out"`: the one of `ridges` with the least cross entropy
        of rows that are predicted without their own label (approximately, see `left_out`).
      temperature: factor on the logits, above 0; or `"leave_one_out"`: the one with the least such cross entropy.
      ridges: to choose from, all above 0.
      unseen: how many labels a class without any counts as, at the mean of the labelled rows; this makes its
        probability small and not 0. With 0 it is 0, as in scikit-learn, which does not know such classes.
      steps: of the solver. 64 leave the largest difference of probabilities well below 0.001 for a ridge of 1 on
        standardised columns; a ridge that is smaller by orders may need more.
      start: `{"kernel": [d, c], "bias": [c]}` to start from in place of zeros; it changes the result by less the more
        steps there are.

    Returns:
      `{"kernel": [d, c], "bias": [c]}`, all 0 without any label.

    Raises:
      ValueError: for arguments out of range, or labels that are neither classes nor their probabilities.

    References: Boehning: Multinomial Logistic Regression Algorithm, 1992, for the bound; Rad, Maleki: A Scalable
    Estimate of the Out-of-sample Prediction Error via Approximate Leave-one-out, 2020.
    """
    for name, value in (("ridge", ridge), ("temperature", temperature)):
        _check_setting(name, value)
    require(unseen >= 0, f"logistic_head: unseen must be at least 0, got {unseen}")
    require(steps >= 1, f"logistic_head: steps must be at least 1, got {steps}")
    if not ridges or not all(value > 0 for value in ridges):
        raise ValueError(f"logistic_head: ridges must be numbers above 0, got {tuple(ridges)}")
    embedding = clear_padding(embedding, weight)
    target, weight = class_targets("logistic_head", y, weight, classes)
    total = jnp.where(weight.sum() > 0, weight.sum(), 1.0)
    mean = (weight / total) @ embedding
    problem = Regression(embedding - mean[None], target.astype(embedding.dtype), weight, weight @ target > 0)
    fixed = lax.stop_gradient(problem)
    first = _first(fixed, lax.stop_gradient(mean), start)
    if isinstance(ridge, str):
        ridge, first = _chosen_ridge(fixed, first, sorted(ridges, reverse=True), steps)
    solution = _minimise(fixed, lax.stop_gradient(_penalty(fixed, ridge)), first, steps)
    if isinstance(temperature, str):
        logits = left_out(fixed, lax.stop_gradient(_penalty(fixed, ridge)), solution)
        temperature = _chosen_temperature(fixed, logits)
    solution = _differentiable(problem, _penalty(problem, ridge), solution, steps)
    kernel, bias = temperature * solution.kernel, temperature * solution.bias
    # Two logarithms, since that of 0 divided by the total has no derivative in the total.
    rare = jax.nn.logsumexp(_masked(problem.present, bias)) + jnp.log(unseen) - jnp.log(total)
    bias = jnp.where(problem.present, bias - mean @ kernel, rare)
    labelled = problem.present.any()
    return {"kernel": jnp.where(labelled, kernel, 0.0), "bias": jnp.where(labelled, bias, 0.0)}


def linear(
    classes: int,
    *,
    ridge: float | Array | Literal["leave_one_out"] = 1.0,
    temperature: float | Array | Literal["leave_one_out"] = 1.0,
    ridges: Sequence[float] = RIDGES,
    unseen: float | Array = 1e-3,
    steps: int = 64,
    learn: Sequence[str] = (),
    loss: LossFn = losses.cross_entropy,
    score: LossFn = losses.accuracy,
) -> Learner:
    """Logistic regression on the rows as they are, from a cold start: the baseline of every comparison.

    It equals scikit-learn's converged `LogisticRegression(C=1 / ridge)`. The penalty is on the weights in the rows'
    own units: standardise columns of different scales, or choose the ridge by leaving rows out. Nothing but `learn` is
    meta-learned; for logistic regression on a learned embedding give `logistic_head` to `closed_form`.

    >>> import jax, numpy as np
    >>> from metaal_jax import Batch, learners
    >>> x, y = np.asarray([[-2.0], [-1.0], [1.0], [2.0]], np.float32), np.asarray([0, 0, 1, 1], np.int32)
    >>> learner = learners.linear(2)
    >>> key = jax.random.key(0)
    >>> params = learner.adapt(key, learner.init(key, x), Batch(x, y, np.ones(4, np.float32)))
    >>> [f"{p:.2f}" for p in jax.nn.softmax(learner.predict(params, x).logits[0])[:, 1]]
    ['0.12', '0.27', '0.73', '0.88']

    Args:
      classes: number of classes; those without a label are improbable, see `unseen`.
      ridge, temperature, ridges, unseen, steps: see `logistic_head`. `adapt(..., start=params)` starts from earlier
        parameters.
      learn: which of `"ridge"`, `"temperature"` the outer loop trains, where they are numbers.
      loss, score: of query rows in meta-training, see `closed_form`.

    Raises:
      ValueError: see `logistic_head` and `closed_form`; for a loss of targets or of several labels at once.
    """
    check_class_loss("linear", loss)
    settings: dict[str, float | Array] = {}
    chosen: dict[str, str] = {}
    for name, value in (("ridge", ridge), ("temperature", temperature)):
        _check_setting(name, value)
        if isinstance(value, str):
            chosen[name] = value
        else:
            settings[name] = value

    def head(embedding: Array, y: Array, weight: Array, classes: int, **given: Any) -> PyTree:
        return logistic_head(
            embedding, y, weight, classes, ridges=ridges, unseen=unseen, steps=steps, **chosen, **given
        )

    model = MLP(classes, hidden=(), zero_head=True)
    return through(closed_form(model, head, settings=settings, learn=learn, warm=True, loss=loss, score=score))


def left_out(problem: Regression, penalty: Array, solution: Linear) -> Array:
    """Logits `[n, c]` of each labelled row by the regression without it, approximately: one step from the solution.

    The step is Newton's (Rad, Maleki, 2020), with the Hessian's blocks between different classes left out and those of
    one class enlarged by `c / (c - 1)`: exact for two classes, and as if the others shared what a class gives up.
    """
    z, _ = _reduced(problem)
    x = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)
    logits, p = _predicted(problem, problem.x, solution)
    classes = jnp.maximum(problem.present.sum(), 2)
    curvature = p * (1.0 - p) * (classes / (classes - 1)).astype(x.dtype)
    ridge = penalty * jnp.ones(x.shape[1], x.dtype).at[-1].set(0.0)

    def leverage(curvature: Array) -> Array:
        return ((x @ _inverse(x, problem.weight * curvature, ridge)) * x).sum(-1)

    lever = problem.weight[:, None] * lax.map(leverage, curvature.T).T
    # A row cannot weigh more than the whole of its own prediction.
    without = lever / jnp.maximum(1.0 - lever * curvature, 1e-3)
    return logits + without * (p - problem.target)


def _check_setting(name: str, value: object) -> None:
    if isinstance(value, str):
        require(value == LEAVE_ONE_OUT, f"{name} must be a number above 0 or {LEAVE_ONE_OUT!r}, got {value!r}")
    else:
        require(value > 0, f"{name} must be above 0, got {value}")  # type: ignore[operator]


def _penalty(problem: Regression, ridge: float | Array) -> Array:
    """Of two classes scikit-learn penalises the difference of their weights alone, which is twice either."""
    return ridge * jnp.where(problem.present.sum() == 2, 2.0, 1.0).astype(problem.x.dtype)


def _masked(present: Array, logits: Array) -> Array:
    """Logits `[..., c]` of the present classes, -inf for the others; all where there is none."""
    return jnp.where(present | ~present.any(), logits, -jnp.inf)


def _predicted(problem: Regression, x: Array, solution: Linear) -> tuple[Array, Array]:
    """Logits and probabilities of rows, both `[n, c]`."""
    logits = x @ solution.kernel + solution.bias[None]
    return logits, jax.nn.softmax(_masked(problem.present, logits))


def _first(problem: Regression, mean: Array, start: PyTree) -> Linear:
    """Where the solver starts: no weights and the classes' shares, or an earlier layer where it is finite."""
    count = problem.weight @ problem.target
    shares = jnp.log(jnp.where(problem.present, count, 1.0))
    kernel, bias = jnp.zeros((problem.x.shape[1], len(count)), problem.x.dtype), shares
    if start is not None:
        known = jnp.isfinite(start["bias"]) & jnp.isfinite(start["kernel"]).all(0)
        kernel = jnp.where(known, start["kernel"], 0.0)
        bias = jnp.where(known, start["bias"] + mean @ kernel, shares)
    kernel = jnp.where(problem.present, kernel, 0.0)
    return lax.stop_gradient(Linear(kernel, _centred(problem, bias)))


def _centred(problem: Regression, bias: Array) -> Array:
    """Biases whose mean over the present classes is 0: one number for all of them changes no prediction."""
    share = problem.present / jnp.maximum(problem.present.sum(), 1)
    return jnp.where(problem.present, bias - share @ jnp.where(problem.present, bias, 0.0), 0.0)


def _reduced(problem: Regression) -> tuple[Array, Array | None]:
    """Rows in coordinates of the space that those of weight span, where it is the smaller one, and its basis."""
    x = jnp.where((problem.weight > 0)[:, None], problem.x, 0.0)
    if x.shape[0] >= x.shape[1]:
        return x, None
    basis, _ = jnp.linalg.qr((jnp.sqrt(problem.weight)[:, None] * x).T)
    return x @ basis, basis


def _inverse(x: Array, weight: Array, ridge: Array) -> Array:
    """Inverse of `x^T diag(weight) x + diag(ridge)`, and of a little more where that is singular."""
    square = x.T @ (weight[:, None] * x) + jnp.diag(ridge)
    floor = jnp.finfo(x.dtype).eps * jnp.trace(square) + jnp.finfo(x.dtype).tiny
    return jnp.linalg.inv(square + floor * jnp.eye(len(square), dtype=x.dtype))


def _minimise(problem: Regression, penalty: Array, first: Linear, steps: int) -> Linear:
    """Preconditioned conjugate gradients (Polak-Ribiere, restarted) with a line search along every direction."""
    z, basis = _reduced(problem)
    x = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)
    weight, target = problem.weight, problem.target
    ridge = (penalty * jnp.ones(x.shape[1], x.dtype)).at[-1].set(0.0)
    kernel = first.kernel if basis is None else basis.T @ first.kernel

    def probabilities(logits: Array) -> Array:
        return jax.nn.softmax(_masked(problem.present, logits))

    def preconditioner(logits: Array) -> Array:
        # Half of a row's Gini impurity: a half where classes are many and open, as in Boehning's bound, 0 where sure.
        curvature = 0.5 * (1.0 - (probabilities(logits) ** 2).sum(-1))
        return _inverse(x, weight * curvature, ridge)

    def along(logits: Array, change: Array, params: Array, direction: Array) -> Array:
        """How far down the loss falls along a direction, by Newton's method between bounds."""
        slope = (ridge[:, None] * params * direction).sum() - (weight[:, None] * target * change).sum()
        bend = (ridge[:, None] * direction**2).sum()
        low, high, far = jnp.zeros((), x.dtype), jnp.full((), jnp.inf, x.dtype), jnp.zeros((), x.dtype)
        for turn in range(LINE_STEPS):
            p = probabilities(logits + far * change)
            mean = (p * change).sum(-1)
            first = weight @ mean + slope + far * bend
            second = weight @ ((p * change**2).sum(-1) - mean**2) + bend
            low = jnp.where(first < 0, far, low)
            high = jnp.where((first >= 0) & (turn > 0), far, high)
            newton = far - first / jnp.where(second > 0, second, 1.0)
            between = jnp.where(jnp.isinf(high), 2.0 * far + 1.0, 0.5 * (low + high))
            far = jnp.where((newton > low) & (newton < high), newton, between)
        return jnp.where(jnp.isfinite(far), far, 0.0)

    def step(search: Search, turn: Array) -> tuple[Search, None]:
        params, logits, direction, slope, steepest, inverse = search
        new = x.T @ (weight[:, None] * (probabilities(logits) - target)) + ridge[:, None] * params
        fresh = (turn % REFRESH == 0) | (turn == jnp.asarray(EARLY)).any()
        inverse = lax.cond(fresh, preconditioner, lambda _: inverse, logits)
        down = inverse @ new
        before = (slope * steepest).sum()
        kept = (down * (new - slope)).sum() / jnp.where(before > 0, before, 1.0)
        kept = jnp.where(fresh | (before <= 0), 0.0, jnp.maximum(kept, 0.0))
        direction = kept * direction - down
        direction = jnp.where((direction * new).sum() < 0, direction, -new)
        change = x @ direction
        far = along(logits, change, params, direction)
        return Search(params + far * direction, logits + far * change, direction, new, down, inverse), None

    params = jnp.concatenate([kernel, first.bias[None]])
    nothing = jnp.zeros_like(params)
    search = Search(params, x @ params, nothing, nothing, nothing, jnp.zeros((x.shape[1],) * 2, x.dtype))
    params = lax.scan(step, search, jnp.arange(steps))[0].params
    kernel = params[:-1] if basis is None else basis @ params[:-1]
    return Linear(kernel, _centred(problem, params[-1]))


def _differentiable(problem: Regression, penalty: Array, solution: Linear, steps: int) -> Linear:
    """The solution with its first and second derivatives, those of the root of the loss's gradient.

    A step of Newton's method changes nothing there but derivatives, and each one makes those of the next order right.
    """
    total = problem.weight.sum()

    def gradient(problem: Regression, penalty: Array, at: Linear) -> Linear:
        _, p = _predicted(problem, problem.x, at)
        missed = problem.weight[:, None] * (p - problem.target)
        # The mean of the biases changes no prediction; it stays where it is.
        held = total * (at.bias - _centred(problem, at.bias))
        return Linear(problem.x.T @ missed + penalty * at.kernel, missed.sum(0) + held)

    fixed = lax.stop_gradient(problem)
    hessian = jax.linearize(lambda at: gradient(fixed, lax.stop_gradient(penalty), at), lax.stop_gradient(solution))[1]
    _, p = _predicted(fixed, fixed.x, lax.stop_gradient(solution))
    curvature = fixed.weight * 0.5 * (1.0 - (p**2).sum(-1))
    scale = curvature @ fixed.x**2 + lax.stop_gradient(penalty)
    tiny, tolerance = jnp.finfo(scale.dtype).tiny, 10.0 * jnp.finfo(scale.dtype).eps

    def scaled(v: Linear) -> Linear:
        return Linear(v.kernel / scale[:, None], v.bias / jnp.maximum(curvature.sum(), tiny))

    for _ in range(2):
        now = gradient(problem, penalty, solution)
        right = jax.tree.map(lambda leaf: leaf - lax.stop_gradient(leaf), now)  # 0, all but its derivatives
        change, _ = jax.scipy.sparse.linalg.cg(hessian, right, tol=tolerance, atol=1e-15, maxiter=4 * steps, M=scaled)
        solution = jax.tree.map(lambda leaf, moved: leaf - moved, solution, change)
    return solution


def _chosen_ridge(problem: Regression, first: Linear, ridges: Sequence[float], steps: int) -> tuple[Array, Linear]:
    """The ridge with the least cross entropy of rows left out, and its solution; each starts from the one before."""

    def fit(start: Linear, ridge: Array) -> tuple[Linear, tuple[Array, Linear]]:
        penalty = _penalty(problem, ridge)
        solution = _minimise(problem, penalty, start, steps)
        logits = _masked(problem.present, left_out(problem, penalty, solution))
        return solution, (losses.cross_entropy(logits, problem.target, problem.weight), solution)

    values = jnp.asarray(ridges, problem.x.dtype)
    _, (loss, solutions) = lax.scan(fit, first, values)
    best = jnp.argmin(jnp.where(jnp.isnan(loss), jnp.inf, loss))
    return values[best], jax.tree.map(lambda leaf: leaf[best], solutions)


def _chosen_temperature(problem: Regression, logits: Array, most: float = 50.0) -> Array:
    """The factor on logits, from `1 / most` to `most`, of least cross entropy, which is convex in it: by bisection."""
    logits = jnp.where(problem.present, logits, 0.0)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        p = jax.nn.softmax(_masked(problem.present, jnp.exp(middle) * logits))
        falls = problem.weight @ ((p - problem.target) * logits).sum(-1) < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    end = jnp.log(jnp.asarray(most, logits.dtype))
    return jnp.exp(lax.fori_loop(0, 30, halve, (-end, end))[0])
