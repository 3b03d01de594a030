"""Rules for regression: greedy sampling in the space of inputs and outputs, and variances of a committee's outputs.

Targets are floats, `[n]` or `[n, t]`, and the view's logits are the members' outputs `[m, n, t]`. Rules for classes
refuse targets, and these refuse classes, except for `greedy_input`, which looks at no label. `expected_model_change`
serves both.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax.acquisition.disagreement import require_committee
from metaal_jax.acquisition.diversity import distance_to_labelled, spread_in_turn
from metaal_jax.acquisition.lifts import fixed_rule, per_row, pick_in_turn
from metaal_jax.base import Decision, Policy, PoolView, PyTree, is_classes, require
from metaal_jax.rows import middle, row_noise, squared_distances

Space = Literal["input", "embedding"]


def require_targets(name: str, view: PoolView) -> None:
    """Raises `ValueError` where a rule for regression meets classes, or outputs of another size than the targets."""
    y, outputs = view.labelled.y, view.prediction.logits.shape[-1]
    if is_classes(y):
        raise ValueError(
            f"{name}: needs targets, and labels of {y.dtype} {list(y.shape)} are classes; for these use a rule such as "
            "acquisition.margin or, for committees, acquisition.bald"
        )
    size = y.size // max(y.shape[0], 1) if y.ndim > 1 else 1
    if outputs != size:
        raise ValueError(f"{name}: targets of {size} numbers a row need as many outputs, the model has {outputs}")


def _check(name: str, k: int, space: str) -> None:
    require(k >= 1, f"{name}: k must be at least 1, got {k}")
    if space not in get_args(Space):
        raise ValueError(f"{name}: space must be one of {get_args(Space)}, got {space!r}")


def _positions(view: PoolView, space: Space) -> Array:
    """Where the rows lie, float32 `[n, d]`, seen from a point amid them."""
    if space == "embedding":
        rows = view.prediction.embedding.mean(0)
    else:
        n = view.row.shape[0]
        leaves = [leaf.reshape(n, -1).astype(jnp.float32) for leaf in jax.tree.leaves(view.x)]
        rows = jnp.concatenate(leaves, axis=-1)
    real = view.weight > 0
    return jnp.where(real[:, None], rows - middle(rows, real, view.row)[None], 0.0)


def _nearest_input(key: Array, view: PoolView, rows: Array) -> Array:
    """Squared distance to the nearest labelled row, finite `[n]`.

    Without a labelled row the row nearest to the mean of all comes first: the others have their distance to it, and it
    has a larger one than any.
    """
    real, square = view.weight > 0, (rows**2).sum(-1)
    mean = rows.sum(0) / jnp.maximum(real.sum(), 1)
    central = -((rows - mean[None]) ** 2).sum(-1)
    able = jnp.where(view.available.any(), view.available, real)
    best = jnp.where(able, central, -jnp.inf).max()
    first = jnp.where(able & (central >= best - 1e-6 * square.max()), row_noise(key, view.row), -1).argmax()
    cold = squared_distances(rows, rows[first][None])[:, 0].at[first].set(8.0 * square.max())
    known = (view.labelled_index >= 0).any()
    return jnp.where(known, jnp.minimum(distance_to_labelled(rows, view), 8.0 * square.max()), cold)


def greedy_input(*, k: int, space: Space = "input") -> Policy:
    """GSx, greedy sampling in the inputs: each pick is the row farthest from all that are labelled or picked.

    From a cold start the first pick is the row nearest to the mean of the pool. It is `k_center` with that start, among
    inputs, and looks neither at labels nor, there, at the model. Scale the columns of `x` beforehand.

    Args:
      k: rows a round.
      space: distances between inputs `x`, all leaves side by side, or between the current model's embeddings.

    Returns:
      A `Policy`; the decision's scores are squared distances before the first pick.

    Raises:
      ValueError: for `k` below 1 or an unknown space.

    Reference: Yu, Kim: Passive Sampling for Regression, 2010; Wu, Lin, Huang: Active Learning for Regression Using
    Greedy Sampling, 2019 (GSx).
    """
    _check("greedy_input", k, space)

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        start_key, pick_key = jax.random.split(key)
        rows = _positions(view, space)
        nearest = _nearest_input(start_key, view, rows)
        return spread_in_turn(pick_key, view, k, rows, nearest, lambda nearest: nearest)

    return fixed_rule(act, embedding=space == "embedding")


class _Nearest(NamedTuple):
    """Squared distances to the nearest labelled or picked row, by inputs, and by what the rule looks at."""

    inputs: Array
    own: Array


def _greedy(name: str, k: int, space: Space, with_input: bool) -> Policy:
    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        require_targets(name, view)
        start_key, pick_key = jax.random.split(key)
        rows, outputs = _positions(view, space), view.prediction.logits.mean(0)
        square = (rows**2).sum(-1)
        known = (view.labelled_index >= 0) & (view.labelled.weight > 0)
        y = jnp.where(known[:, None], view.labelled.y.reshape(known.shape[0], -1), 0.0)

        def apart(targets: Array, near: Array) -> Array:
            """Squared distances of the outputs to one row's target `[t]`, times those of the inputs."""
            output = ((outputs - targets[None]) ** 2).sum(-1)
            return near * output if with_input else output

        def to_row(position: Array) -> Array:
            between = square + square[position] - 2.0 * (rows @ rows[position])
            return jnp.maximum(between, 0.0)

        near = squared_distances(rows, rows[view.labelled_index])
        each = jax.vmap(apart, in_axes=(0, 1))(y, near)
        own = jnp.where(known[:, None], each, jnp.inf).min(0, initial=jnp.inf)
        cold = ~known.any()

        def score(carry: _Nearest) -> Array:
            return jnp.sqrt(jnp.where(cold, carry.inputs, carry.own))

        def cover(carry: _Nearest, position: Array) -> _Nearest:
            mine = to_row(position)
            own = apart(outputs[position], mine)
            return _Nearest(jnp.minimum(carry.inputs, mine), jnp.minimum(carry.own, own))

        start = _Nearest(_nearest_input(start_key, view, rows), own)
        return pick_in_turn(pick_key, view, k, start, score, cover)

    return fixed_rule(act, logits=True, embedding=space == "embedding")


def greedy_output(*, k: int, space: Space = "input") -> Policy:
    """GSy, greedy sampling in the outputs: each pick's prediction is farthest from all labels.

    The score is `min_j |f(x) - y_j|` over the labelled rows, `f` the members' mean output. Within a batch a picked row
    stands with its prediction. In a round without any label the batch is that of `greedy_input`, as in the paper.

    Args:
      k: rows a round.
      space: for `greedy_input`, in the first round.

    Returns:
      A `Policy`; the decision's scores are distances before the first pick.

    Raises:
      ValueError: for `k` below 1 or an unknown space; when acting, for classes.

    Reference: Wu, Lin, Huang: Active Learning for Regression Using Greedy Sampling, 2019 (GSy).
    """
    _check("greedy_output", k, space)
    return _greedy("greedy_output", k, space, with_input=False)


def igs(*, k: int, space: Space = "input") -> Policy:
    """iGS, improved greedy sampling: far from the labelled rows in the inputs and in the outputs at once.

    The score is `min_j |x - x_j| |f(x) - y_j|` over the labelled rows, `f` the members' mean output. Within a batch a
    picked row stands with its prediction. In a round without any label the batch is that of `greedy_input`.

    Args:
      k: rows a round.
      space: distances between inputs `x`, all leaves side by side, or between the current model's embeddings.

    Returns:
      A `Policy`; the decision's scores are products of distances before the first pick.

    Raises:
      ValueError: for `k` below 1 or an unknown space; when acting, for classes.

    Reference: Wu, Lin, Huang: Active Learning for Regression Using Greedy Sampling, 2019 (iGS).

    >>> from metaal_jax import acquisition
    >>> policy = acquisition.igs(k=5)
    """
    _check("igs", k, space)
    return _greedy("igs", k, space, with_input=True)


def committee_variance(key: Array, view: PoolView) -> Array:
    """Variance of the members' outputs, summed over the outputs, `[n]` in squared units of the targets.

    Raises `ValueError` for a single model and for classes.
    Reference: Burbidge, Rowland, King: Active Learning for Regression Based on Query by Committee, 2007.
    """
    require_targets("committee_variance", view)
    require_committee("committee_variance", view.prediction.logits)
    return per_row(lambda outputs: outputs.var(0).sum())(key, view)


def expected_variance_reduction(*, k: int, noise: float | Array | None = None) -> Policy:
    """The rows whose labels lower the predictive variance of the pool most.

    The members are draws of a posterior, and their outputs `f` have covariances over the rows. As for a Gaussian
    posterior, labelling row `i` lowers the variance of row `j` by `cov(i, j)^2 / (var(i) + noise)`; the score is the
    mean over the pool's rows, summed over the outputs, which count as independent. A pick changes the covariances
    accordingly, so that the next row brings what the first has not told. With `m` members that is a matrix `[m, m]`,
    and a pick costs `O(n m^2)`.

    Args:
      k: rows a round.
      noise: variance of a label around its mean, in squared units of the targets; may be traced. None for a hundredth
        of the members' mean variance, nearly none.

    Returns:
      A `Policy`; the decision's scores are the mean reductions before the first pick.

    Raises:
      ValueError: for `k` below 1 or negative noise; when acting, for a single model and for classes.

    Reference: Cohn, Ghahramani, Jordan: Active Learning with Statistical Models, 1996.
    """
    require(k >= 1, f"expected_variance_reduction: k must be at least 1, got {k}")
    require(noise is None or noise >= 0, f"expected_variance_reduction: noise must not be negative, got {noise}")

    def act(key: Array, policy_state: PyTree, view: PoolView) -> Decision:
        require_targets("expected_variance_reduction", view)
        outputs = view.prediction.logits
        require_committee("expected_variance_reduction", outputs)
        members, real = outputs.shape[0], view.weight > 0
        # Deviations whose inner products over the members are covariances, [t, n, m].
        away = jnp.where(real[:, None], outputs - outputs.mean(0, keepdims=True), 0.0).transpose(2, 1, 0) / members**0.5
        total = jnp.maximum(real.sum(), 1)
        mean = (away**2).sum() / (total * outputs.shape[-1])
        extra = 0.01 * mean if noise is None else jnp.asarray(noise, mean.dtype)
        among = jnp.einsum("tnm,tnl->tml", away, away) / total

        def seen(known: Array) -> tuple[Array, Array]:
            """The deviations in view of the picks, and the variances with noise."""
            moved = away @ known
            return moved, (moved * away).sum(-1) + extra

        def score(known: Array) -> Array:
            moved, variance = seen(known)
            lowered = ((moved @ among) * moved).sum(-1)
            # What rounding leaves of variances that are used up says nothing.
            told = variance > 1e-6 * mean
            return jnp.where(told, lowered / jnp.where(told, variance, 1.0), 0.0).sum(0)

        def update(known: Array, position: Array) -> Array:
            own = jnp.einsum("tml,tl->tm", known, away[:, position])
            variance = (own * away[:, position]).sum(-1) + extra
            told = variance > 1e-6 * mean
            share = jnp.where(told, 1.0 / jnp.where(told, variance, 1.0), 0.0)
            return known - share[:, None, None] * own[:, :, None] * own[:, None, :]

        start = jnp.broadcast_to(jnp.eye(members), (outputs.shape[-1], members, members))
        return pick_in_turn(key, view, k, start, score, update)

    return fixed_rule(act, logits=True)
