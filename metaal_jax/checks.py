"""The contracts of the records as checks: what an algorithm of one's own must keep to work with all others."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaal_jax.base import (
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    Prediction,
    PyTree,
    Task,
    pad_batch,
    rows_of,
    take,
)

PADDING = 3  # rows of weight 0 behind the example


def check_learner(learner: Learner, key: Array, batch: Batch, *, atol: float = 1e-3) -> None:
    """Checks that a learner keeps the contract of `Learner` on an example batch.

    Checked: shapes and dtypes of predictions; finite predictions from no labels at all; padding rows change nothing,
    be they zeros, other rows or NaN, in parameters and meta-gradients; adapting is a function of its key; `adapt` and
    `predict` can be vmapped; `meta_grad` has the structure of `meta` and is finite, also without labels.

    Args:
      learner: the record to check.
      key: a typed key.
      batch: a few labelled rows, all of weight 1: classes (at least two of them), class probabilities or targets,
        whatever the learner's loss takes.
      atol: tolerance for results that should be equal up to rounding.

    Raises:
      AssertionError: naming the first promise that is broken.
    """
    init_key, adapt_key = jax.random.split(key)
    meta = jax.jit(learner.init)(init_key, batch.x)
    # One shape for all that is compared: each function compiles once.
    adapt, predict, meta_grad = jax.jit(learner.adapt), jax.jit(learner.predict), jax.jit(learner.meta_grad)
    padded = pad_batch(batch, rows_of(batch) + PADDING)
    params = adapt(adapt_key, meta, padded)
    prediction = predict(params, batch.x)
    _check_prediction(prediction, rows_of(batch))
    again = predict(adapt(adapt_key, meta, padded), batch.x)
    _assert(bool((again.logits == prediction.logits).all()), "the same key gave different parameters")
    paddings = {"rows of other classes": _behind(batch, _others(batch))}
    if not jax.config.jax_debug_nans:  # type: ignore[attr-defined]  # it stops at the first NaN, wanted or not
        paddings["NaN"] = _behind(batch, _nans(batch))
    for what, longer in paddings.items():
        same = _close(predict(adapt(adapt_key, meta, longer), batch.x).logits, prediction.logits, atol)
        _assert(same, f"padding rows (weight 0) of {what} changed the adapted parameters")
    nothing = list(paddings.values())[-1]._replace(weight=jnp.zeros_like(padded.weight))
    unadapted = predict(adapt(adapt_key, meta, nothing), batch.x)
    _assert(bool(jnp.isfinite(unadapted.logits).all()), "adapting without any label gave NaN or infinite logits")
    keys = jnp.stack([adapt_key, adapt_key])
    both = jax.jit(jax.vmap(lambda k: learner.predict(learner.adapt(k, meta, batch), batch.x)))(keys)
    _assert(_close(both.logits[1], prediction.logits, atol), "vmap over adapt, or padding of zeros, changed the result")

    grads, metrics = meta_grad(adapt_key, meta, Task(padded, padded), step=jnp.int32(0))
    same = str(jax.tree.structure(grads)) == str(jax.tree.structure(meta))
    _assert(same, "meta_grad's gradients must have the structure of meta")
    _assert({"loss", "score"} <= set(metrics), f"meta_grad's metrics need loss and score, got {sorted(metrics)}")
    _check_finite(grads, "a labelled task")
    _check_finite(meta_grad(adapt_key, meta, Task(nothing, padded), step=jnp.int32(0))[0], "a task without labels")
    for what, longer in paddings.items():
        other = meta_grad(adapt_key, meta, Task(longer, longer), step=jnp.int32(0))
        _assert(_close(other, (grads, metrics), atol), f"padding rows (weight 0) of {what} changed meta_grad")


def check_policy(policy: Policy, key: Array, view: PoolView, *, k: int) -> None:
    """Checks that a policy keeps the contract of `Policy` on an example view.

    Checked: shapes and dtypes of the decision; distinct rows, none queried before, none of padding; as many valid
    rows as are left, at most `k`; a function of its key; can be vmapped over keys.

    Raises:
      AssertionError: naming the first promise that is broken.
    """

    def decide(key: Array, view: PoolView) -> Decision:
        init_key, begin_key, act_key = jax.random.split(key, 3)
        params = policy.init(init_key)
        return policy.act(act_key, params, policy.begin(begin_key, params, view), view)[0]

    decision = jax.jit(decide)(key, view)
    n = view.row.shape[0]
    shapes = tuple(leaf.shape for leaf in decision[:4])
    _assert(shapes == ((k,), (k,), (), (n,)), f"decision shapes must be {((k,), (k,), (), (n,))}, got {shapes}")
    _assert(decision.index.dtype == jnp.int32, f"index must be int32, got {decision.index.dtype}")
    chosen = np.asarray(decision.index)[np.asarray(decision.valid)]
    _assert(len(set(chosen.tolist())) == len(chosen), f"the rows asked for must be distinct, got {chosen}")
    _assert(bool(np.asarray(view.available)[chosen].all()), "a padded or already queried row was asked for")
    left = min(k, int(view.available.sum()))
    _assert(len(chosen) == left, f"{left} rows can be asked for, the policy asked for {len(chosen)}")
    again = jax.jit(decide)(key, view)
    _assert(bool((again.index == decision.index).all()), "the same key gave different rows")
    both = jax.jit(jax.vmap(decide, in_axes=(0, None)))(jnp.stack([key, key]), view)
    _assert(bool((both.index[1] == decision.index).all()), "vmap over keys differs from a single call")


def _check_prediction(prediction: Prediction, n: int) -> None:
    _assert(isinstance(prediction, Prediction), f"predict must return a Prediction, got {type(prediction).__name__}")
    _assert(
        prediction.logits.ndim == 3 and prediction.logits.shape[1] == n,
        f"logits must be [m, {n}, c], got {prediction.logits.shape}",
    )
    _assert(prediction.logits.dtype == jnp.float32, f"logits must be float32, got {prediction.logits.dtype}")
    members = prediction.logits.shape[0]
    _assert(
        prediction.embedding.ndim == 3 and prediction.embedding.shape[:2] in {(1, n), (members, n)},
        f"embedding must be [1 or {members}, {n}, d], got {prediction.embedding.shape}",
    )
    _assert(not bool(jnp.isnan(prediction.logits).any()), "the logits of labelled rows must not be NaN")


def _behind(batch: Batch, padding: Batch) -> Batch:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, padding)


def _others(batch: Batch) -> Batch:
    """Padding that looks like rows of other classes: zeros would hide a sum that forgets the weights."""
    index = jnp.arange(PADDING) % rows_of(batch)
    return take(batch, index)._replace(y=batch.y[-1 - index], weight=jnp.zeros(PADDING))


def _nans(batch: Batch) -> Batch:
    """Padding of the worst kind: NaN wherever a leaf can hold it, and classes that there are not."""

    def spoilt(leaf: Array) -> Array:
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max
        return jnp.full((PADDING, *leaf.shape[1:]), bad, leaf.dtype)

    x, y = jax.tree.map(spoilt, (batch.x, batch.y))
    return Batch(x=x, y=y, weight=jnp.zeros(PADDING))


def _check_finite(grads: PyTree, what: str) -> None:
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    _assert(finite, f"meta_grad is not finite on {what}")


def _close(a: PyTree, b: PyTree, atol: float) -> bool:
    return all(
        np.allclose(p, q, atol=atol, rtol=1e-3) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _assert(condition: object, message: str) -> None:
    if not bool(condition):
        raise AssertionError(message)
