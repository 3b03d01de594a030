"""Small pools that the tests of query strategies share."""

import jax
import jax.numpy as jnp
import numpy as np

from metaal_jax import PoolView, Prediction
from metaal_jax.base import empty_batch

# What padding holds in tests: anything must do, NaN first of all. Where JAX looks for NaN it would stop at this one.
HOLE = float("inf") if jax.config.jax_debug_nans else float("nan")


def probabilities(logits):
    each = np.exp(logits - logits.max(-1, keepdims=True))
    return each / each.sum(-1, keepdims=True)


def make_view(seed, n=20, *, members=3, classes=4, queried=(), padding=0, labelled=(), capacity=6):
    """A pool of `n` rows with random predictions and embeddings; the last `padding` rows are padding."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)
    index = np.full(capacity, -1, np.int32)
    index[: len(labelled)] = labelled
    mask = np.zeros(n, bool)
    mask[[*queried, *labelled]] = True
    return PoolView(
        x=x,
        row=jnp.arange(n, dtype=jnp.int32),
        weight=jnp.asarray(np.arange(n) < n - padding, jnp.float32),
        queried=jnp.asarray(mask),
        cost=jnp.ones(n),
        prediction=Prediction(
            logits=jnp.asarray(2 * rng.normal(size=(members, n, classes)), jnp.float32),
            embedding=jnp.asarray(rng.normal(size=(1, n, 5)) + 1, jnp.float32),
        ),
        labelled=empty_batch(x, capacity),
        labelled_index=jnp.asarray(index),
        meta=(),
        params=(),
        budget=jnp.float32(capacity),
        spent=jnp.float32(len(labelled)),
    )


def reorder(view, order):
    """The same rows in another order; row numbers go with their rows."""
    place = np.argsort(order)
    index = np.asarray(view.labelled_index)
    prediction = jax.tree.map(lambda leaf: leaf[:, order], view.prediction)
    moved = {name: getattr(view, name)[order] for name in ("x", "row", "weight", "queried", "cost")}
    moved_index = jnp.asarray(np.where(index >= 0, place[index], -1))
    return view._replace(**moved, prediction=prediction, labelled_index=moved_index)


def run(rule):
    """The first decision of a rule without parameters: a compiled `(key, view) -> Decision`."""
    return jax.jit(lambda key, view: rule.act(key, (), rule.begin(key, (), view), view)[0])
