"""A policy and a learner in other modes of JAX; `campaigns/modes.py` takes a row of each table of tests there."""

import jax
import jax.numpy as jnp
import optax
import pytest

from metaal_jax import Batch, acquisition, learners, models
from views import make_view, run

MODES = {
    "x64": lambda: jax.enable_x64(True),
    "nans": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.mark.parametrize("mode", MODES)
def test_other_modes(mode, key):
    """Padding is finite, shapes are spelled out, no tracer is kept, and float32 stays what it is."""
    view = make_view(0, 12, labelled=(1, 2), padding=3)
    learner = learners.maml(models.MLP(2, hidden=(3,)), optimizer=optax.sgd(0.1), steps=1)
    batch = Batch(x=view.x[:4], y=jnp.asarray([0, 1, 1, 0], jnp.int32), weight=jnp.asarray([1.0, 1.0, 1.0, 0.0]))

    def adapted(key, batch):
        params = learner.adapt(key, learner.init(key, batch.x), batch)
        return learner.predict(params, batch.x).logits

    with MODES[mode]():
        decision = run(acquisition.top_k(acquisition.entropy, k=3))(key, view)
        logits = jax.jit(adapted)(key, batch)
    assert decision.valid.all()
    assert (decision.index < 9).all()
    assert (decision.index.dtype, decision.scores.dtype) == (jnp.int32, jnp.float32)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
