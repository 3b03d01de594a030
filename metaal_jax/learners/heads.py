"""Heads in closed form: labelled embeddings become the kernel and bias of a linear layer, differentiably."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaal_jax import losses
from metaal_jax.base import LossFn, PyTree, is_classes, require
from metaal_jax.losses import class_targets, clear_padding

FULL_PRECISION = jax.default_matmul_precision("highest")  # full float32, which graphics cards do not take by default


def check_class_loss(name: str, loss: LossFn) -> None:
    """Raises `ValueError` for losses under which a head that knows classes alone makes no sense."""
    if loss in (losses.squared_error, losses.sigmoid_cross_entropy):
        raise ValueError(
            f"{name} needs one class a row, which losses.{loss.__name__} does not have; use learners.r2d2 for "
            "targets, or gradient steps such as learners.maml"
        )


def prototype_head(
    embedding: Array, y: Array, weight: Array, classes: int, *, temperature: float | Array = 1.0
) -> PyTree:
    """A linear layer whose logits are minus half the squared distances to the class prototypes, times `temperature`.

    A prototype is the weighted mean of its class's embeddings. Logit `j` of row `z` is `z.c_j - |c_j|^2 / 2`, which
    equals `-|z - c_j|^2 / 2` up to a term shared by all classes. A class without a label has no prototype; its kernel
    is 0 and its bias -inf (0 where no class has a label). Distances grow with the embedding's size, so a large
    embedding wants a small temperature.

    Args:
      embedding: float `[n, d]`.
      y: int32 `[n]`, or class probabilities `[n, c]`: a row counts for a class as much as it probably is of it.
      weight: float32 `[n]`, 0 = padding.
      classes: number of classes `c`.
      temperature: factor on the logits, > 0.

    Returns:
      `{"kernel": [d, c], "bias": [c]}`.

    Raises:
      ValueError: for labels of another kind.

    Reference: Snell, Swersky, Zemel: Prototypical Networks, 2017; Triantafillou et al.: Meta-Dataset
    (Proto-MAML), 2020.
    """
    embedding = clear_padding(embedding, weight)
    target, weight = class_targets("prototype_head", y, weight, classes)
    member = target.astype(embedding.dtype) * weight[:, None]
    count = member.sum(0)
    centres = (member.T @ embedding) / jnp.where(count > 0, count, 1.0)[:, None]
    bias = _without_absent(-0.5 * temperature * (centres**2).sum(-1), count, -jnp.inf)
    return {"kernel": temperature * centres.T, "bias": bias}


def _without_absent(bias: Array, count: Array, absent: float) -> Array:
    """`absent` as the bias of classes without a label; without any label at all no class is ruled out."""
    return jnp.where((count > 0) | ~(count > 0).any(), bias, absent)


@FULL_PRECISION
def ridge_head(
    embedding: Array,
    y: Array,
    weight: Array,
    classes: int,
    *,
    ridge: float | Array = 1.0,
    scale: float | Array = 1.0,
    intercept: bool = True,
    absent: float | None = -jnp.inf,
) -> PyTree:
    """Weighted ridge regression onto one-hot classes or targets: `outputs = scale (z W + b)`.

    `W` and `b` minimise `sum_i w_i |z_i W + b - y_i|^2 + ridge |W|^2`, `y_i` the one-hot class or the target. The
    solution is found in whichever space is smaller, that of the features or that of the rows (Woodbury), at the price
    of one linear solve. It is differentiable in everything but integer `y`, also where weights are 0.

    Args:
      embedding: float `[n, d]`.
      y: int32 `[n]` classes, float `[n, c]` class probabilities, or float targets `[n, c]` or (`c = 1`) `[n]`.
      weight: float32 `[n]`, 0 = padding.
      classes: number of classes or targets `c`.
      ridge: strength of the regularisation, above 0, against a sum over rows: more rows count for more. Less than
        rounding leaves of it, a unit in the last place of the weighted sum of squares, counts as that much.
      scale: factor on the regression's outputs. For classes these lie about between 0 and 1, and the cross entropy
        wants them larger.
      intercept: fits `b`, which is not regularised; otherwise `b = 0`, as in R2D2.
      absent: bias of a class without a label; give None with targets `[n, c]`, which look like probabilities. None: 0,
        what the regression tends to as the weight of a class falls to 0, so that nothing jumps and a gradient in the
        weights tells what a first label of the class would change.

    Returns:
      `{"kernel": [d, c], "bias": [c]}`. A class without a label has a kernel of 0 and the bias `absent`
      (0 where no class has a label).

    Raises:
      ValueError: for `ridge <= 0`, or as many targets as there are not outputs.

    Reference: Bertinetto, Henriques, Torr, Vedaldi: Meta-learning with Differentiable Closed-form Solvers, 2019.
    """
    require(ridge > 0, f"ridge_head: ridge must be > 0, got {ridge}")
    rows, features = embedding.shape
    embedding = clear_padding(embedding, weight)
    if jnp.issubdtype(y.dtype, jnp.floating) and y.ndim == 1:
        y, absent = y[:, None], None
    target, weight = class_targets("ridge_head", y, weight, classes)
    target = target.astype(embedding.dtype)
    count = weight @ jnp.abs(target)
    share = weight / jnp.where(weight.sum() > 0, weight.sum(), 1.0)
    bias = jnp.zeros(classes, embedding.dtype)
    if intercept:
        centre, bias = share @ embedding, share @ target
        embedding, target = embedding - centre[None], target - bias[None]
    weighted = weight[:, None] * target
    # LU in both forms: for the rows because weights on one side only leave no square root to differentiate at 0, for
    # the features because a Cholesky factor is NaN where rounding makes the matrix indefinite.
    power = weight @ (embedding**2).sum(-1)
    ridge = jnp.maximum(ridge, jnp.finfo(embedding.dtype).eps * power)
    if rows < features:
        gram = weight[:, None] * (embedding @ embedding.T)
        kernel = embedding.T @ jnp.linalg.solve(gram + ridge * jnp.eye(rows, dtype=gram.dtype), weighted)
    else:
        gram = embedding.T @ (weight[:, None] * embedding)
        kernel = jnp.linalg.solve(gram + ridge * jnp.eye(features, dtype=gram.dtype), embedding.T @ weighted)
    if intercept:
        bias = bias - centre @ kernel
    bias = scale * bias
    return {"kernel": scale * kernel, "bias": bias if absent is None else _without_absent(bias, count, absent)}


@FULL_PRECISION
def svm_head(
    embedding: Array,
    y: Array,
    weight: Array,
    classes: int,
    *,
    penalty: float | Array = 0.1,
    ridge: float | Array = 1.0,
    scale: float | Array = 1.0,
    iterations: int = 100,
) -> PyTree:
    """The linear multi-class support vector machine of Crammer and Singer, without intercept: `logits = scale z W`.

    With `ridge = 0`, `W` minimises `1/2 |W|^2 + penalty sum_i w_i max_k (z_i W_k + [k != y_i] - z_i W_{y_i})`. It is
    `Z^T a` for the solution `a` of the dual problem, see `svm_dual`; `ridge` is added to the diagonal of its kernel
    `Z Z^T`, which makes `a` unique and a smoother function of the data. Differentiable in everything but `y`, also
    where weights are 0. For an intercept, subtract the mean of the labelled rows from the embedding.

    Args:
      embedding: float `[n, d]`.
      y: int32 `[n]`; a margin to one right class has no form for probabilities or targets.
      weight: float32 `[n]`, 0 = padding.
      classes: number of classes `c`.
      penalty: price of a unit of hinge loss (`C`), above 0. This and `ridge` are as in MetaOptNet's code.
      ridge: at least 0.
      scale: factor on the outputs, whose margin is 1; the cross entropy wants them larger.
      iterations: of the solver, at least 1; `svm_residual` says whether they are enough. 100 leave less than 0.001
        in float32, unless overlapping classes of more rows than features meet a `penalty |z|^2` far above 1.

    Returns:
      `{"kernel": [d, c], "bias": [c]}`. A class without a label is left out of the problem: its kernel is 0 and its
      bias -inf (0 where no class has a label).

    Raises:
      ValueError: for `penalty <= 0`, `ridge < 0`, `iterations < 1` or labels that are no integer classes.

    Reference: Crammer, Singer: On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines, 2001;
    Lee, Maji, Ravichandran, Soatto: Meta-Learning with Differentiable Convex Optimization, 2019.
    """
    embedding = clear_padding(embedding, weight)
    gram, target, size = _svm_problem(embedding, y, weight, classes, penalty, ridge)
    dual = svm_dual(gram, target, size, iterations=iterations)
    bias = _without_absent(jnp.zeros(classes, dual.dtype), size @ target, -jnp.inf)
    return {"kernel": scale * (embedding.T @ dual), "bias": bias}


@FULL_PRECISION
def svm_residual(
    embedding: Array,
    y: Array,
    weight: Array,
    classes: int,
    *,
    penalty: float | Array = 0.1,
    ridge: float | Array = 1.0,
    iterations: int = 100,
) -> Array:
    """How far `svm_head` with the same arguments is from its optimum, float `[]`: the largest residual of any row.

    A row's residual is its share in the duality gap, `max_k g_k - p.g`, where `g = (K + ridge I) a - onehot(y)` is the
    gradient of the dual objective and `a = penalty w (onehot(y) - p)`, `p` a distribution over classes. It is 0 where
    all conditions of optimality hold, and its unit is the margin: the primal objective is within
    `penalty sum_i w_i residual_i` of the best.

    Args and Raises: see `svm_head`.
    """
    embedding = clear_padding(embedding, weight)
    gram, target, size = _svm_problem(embedding, y, weight, classes, penalty, ridge)
    dual = svm_dual(gram, target, size, iterations=iterations)
    slope = gram @ dual - target
    worst = jnp.where((size @ target > 0)[None], slope, -jnp.inf).max(-1)
    known = (slope * (target - dual / jnp.where(size > 0, size, 1.0)[:, None])).sum(-1)
    return jnp.where(size > 0, worst - known, 0.0).max()


def _svm_problem(
    embedding: Array, y: Array, weight: Array, classes: int, penalty: float | Array, ridge: float | Array
) -> tuple[Array, Array, Array]:
    require(penalty > 0, f"penalty must be > 0, got {penalty}")
    require(ridge >= 0, f"ridge must be >= 0, got {ridge}")
    if not is_classes(y):
        raise ValueError(f"svm_head: y must be integer classes [n], got {y.dtype} {losses.shape_of(y)}")
    gram = embedding @ embedding.T + ridge * jnp.eye(len(embedding), dtype=embedding.dtype)
    target, weight = class_targets("svm_head", y, weight, classes)
    return gram, target.astype(embedding.dtype), penalty * weight


@FULL_PRECISION
def svm_dual(gram: Array, target: Array, size: Array, *, iterations: int) -> Array:
    """Minimises `1/2 tr(a^T gram a) - tr(a^T target)` subject to `a <= size target` and row sums of 0.

    Differentiable in all three, at any order: the solution is a fixed point of a projected gradient step, and near it
    the same entries stay strictly inside the box, so its derivative solves a linear system in those entries (by
    conjugate gradients). Differentiating through the iterations would give the same and have to store them all.
    A row of size 0 moves as the first bit of size would move it.

    Args:
      gram: float `[n, n]`, symmetric and positive semidefinite.
      target: float `[n, c]`, one-hot rows.
      size: float `[n]`, the box of each row; 0 makes the row 0.
      iterations: steps of the solver, and at most as many for a derivative.

    Returns:
      `a`, float `[n, c]`, which keeps the constraints. Columns of classes in which no row has a box are 0.
    """
    require(iterations >= 1, f"iterations must be >= 1, got {iterations}")
    labelled = size @ target > 0
    target = jnp.where(labelled[None], target, 0.0)
    upper = size[:, None] * target

    # The solver's step: twice the mean squared distance to the mean of the rows. The scale of the largest eigenvalue,
    # which belongs to the mean that ReLU features share, would make it many times slower.
    share = size / jnp.where(size.sum() > 0, size.sum(), 1.0)
    power = share @ jnp.diag(gram)
    step = lax.stop_gradient(jnp.maximum(2.0 * (power - share @ gram @ share), 0.01 * power))
    gram, target = (term / jnp.where(step > 0, step, 1.0) for term in (gram, target))

    a = _splitting(*lax.stop_gradient((gram, target, upper)), labelled, iterations)
    moved, inside = _project(a + target - gram @ a, upper, labelled)
    residual = moved - lax.stop_gradient(moved)  # 0, all but its derivative
    floor = 10.0 * jnp.finfo(gram.dtype).eps

    def along(v: Array) -> Array:
        """The part of `v` along which the solution can move: inside the box, with rows that sum to 0."""
        v = jnp.where(inside, v, 0.0)
        return jnp.where(inside, v - v.sum(-1, keepdims=True) / _count(inside), 0.0)

    def matrix(v: Array) -> Array:
        part = along(v)
        # The floor is for ridge = 0 and equal rows, when the problem is flat along their difference.
        return v - part + along(gram @ part) + floor * part

    right = residual - along(gram @ (residual - along(residual)))
    change, _ = jax.scipy.sparse.linalg.cg(matrix, right, tol=floor, atol=1e-15, maxiter=iterations)
    return a + change


def _splitting(gram: Array, target: Array, upper: Array, labelled: Array, iterations: int) -> Array:
    """Solves the problem of `svm_dual`, scaled, by Douglas-Rachford splitting (over-relaxed ADMM).

    It goes back and forth between the quadratic, whose matrix is inverted once, and the constraints. On embeddings
    after a ReLU it needs a tenth of the steps of accelerated projected gradients, at the same cost a step.
    """
    real = upper.sum(-1) > 0
    inverse = jnp.linalg.inv(jnp.eye(len(gram), dtype=gram.dtype) + jnp.where(real[:, None] & real[None], gram, 0.0))

    def step(v: Array, _: None) -> tuple[Array, None]:
        a, _inside = _project(v, upper, labelled)
        return v + 1.8 * (inverse @ (target + 2.0 * a - v) - a), None

    v, _ = lax.scan(step, jnp.zeros_like(upper), None, length=iterations)
    return jnp.where(real[:, None], _project(v, upper, labelled)[0], 0.0)


def _project(v: Array, upper: Array, labelled: Array) -> tuple[Array, Array]:
    """The nearest `a <= upper` whose rows sum to 0, all `[n, c]`, and which of its entries lie inside the box.

    Inside, all entries of a row are shifted alike. Entry `k` is inside if the shift that puts it on the box leaves a
    sum of at least 0. Comparing all pairs is several times faster than sorting.
    """
    above = v - upper
    total = upper.sum(-1, keepdims=True)
    lower = jnp.minimum(above[:, :, None] - above[:, None, :], 0.0)
    inside = labelled[None] & (total + jnp.where(labelled[None, :, None], lower, 0.0).sum(1) >= 0)
    shift = (total + jnp.where(inside, v - upper, 0.0).sum(-1, keepdims=True)) / _count(inside)
    return jnp.where(inside, v - shift, upper), inside


def _count(inside: Array) -> Array:
    """Entries of each row, `[n, 1]`, at least 1."""
    return jnp.maximum(inside.sum(-1, keepdims=True), 1)
