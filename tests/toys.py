"""Networks, parameters and a toy problem that the tests of learned policies share."""

import functools

import jax
import jax.numpy as jnp

from metaal_jax import models
from metaal_jax.base import Batch, Learner, Prediction, Problem
from metaal_jax.loop import active_learner
from views import make_view

NETWORKS = {
    "linear": models.LinearNetwork(situation=(0, 5)),
    "row": models.RowNetwork(width=8),
    "set": models.SetNetwork(width=8, points=3),
}


@jax.jit
def bent(params, key, size=0.5):
    """Parameters with noise, so that no layer is at its start."""
    flat, back = jax.flatten_util.ravel_pytree(params)
    return back(flat + size * jax.random.normal(key, flat.shape))


def jitted(policy):
    """The policy, each function one program: called eagerly, every operation in it is compiled by itself."""

    def of(record, *names):
        parts = {name: getattr(record, name) for name in names}
        return record._replace(**{name: jax.jit(part) for name, part in parts.items() if part is not None})

    train = policy.train and of(policy.train, "observe", "evaluate")
    return of(policy, "init", "begin", "act")._replace(train=train)


def labelled_view(seed=0, n=20, classes=4, **options):
    view = make_view(seed, n, classes=classes, labelled=(3, 7, 8), **options)
    y = jnp.zeros(6, jnp.int32).at[:3].set(jnp.asarray([1, 1, 0]))
    weight = jnp.zeros(6).at[:3].set(1.0)
    return view._replace(labelled=view.labelled._replace(y=y, weight=weight))


# A toy whose optimal query is known. Rows are (good, confidence): the learner's parameter is the number of good rows
# with a label, and its accuracy the share of the test rows whose threshold that number exceeds. Good rows are those
# the model is unsure of.
def _toy_learner() -> Learner:
    def predict(params, x):
        sure = jnp.where(x[:, 1] > 0, x[:, 1], 4.0 * (params - x[:, 0]))
        logits = jnp.stack([jnp.zeros_like(sure), sure], -1)
        return Prediction(logits=logits[None], embedding=jnp.concatenate([x, jnp.ones_like(x[:, :1])], -1)[None])

    return Learner(
        init=lambda key, x: jnp.zeros(()),
        adapt=lambda key, meta, batch, **_: meta + (batch.weight * batch.x[:, 0]).sum(),
        predict=predict,
        meta_grad=None,
    )


@functools.partial(jax.jit, static_argnames="n")
def toy_problem(key, data, n=8):
    good = jax.random.permutation(key, jnp.arange(n) < n // 2).astype(jnp.float32)
    x = jnp.stack([good, 0.1 + 2.0 * (1.0 - good)], -1)
    test = Batch(x=jnp.asarray([[0.5, 0.0], [1.5, 0.0]]), y=jnp.ones(2, jnp.int32), weight=jnp.ones(2))
    return Problem(x=x, y=good.astype(jnp.int32), weight=jnp.ones(n), cost=jnp.ones(n), test=test, validation=test,
                   initial=jnp.zeros(0, jnp.int32))  # fmt: skip


TOY = _toy_learner()


def toy_area(policy, params, key, k):
    def one(key):
        problem = toy_problem(key, ())
        active = active_learner(TOY, policy, capacity=4)
        state = active.init(key, jnp.zeros(()), params, problem)
        body = lambda s, r: active.step(jax.random.fold_in(key, r), jnp.zeros(()), params, s, problem)  # noqa: E731
        return jax.lax.scan(body, state, jnp.arange(4 // k))[1].test.accuracy.mean()

    return float(jax.jit(jax.vmap(one))(jax.random.split(key, 64)).mean())


def train(trainer, key, steps):
    state = jax.jit(trainer.init)(key, jnp.zeros(()), ())
    return jax.jit(functools.partial(trainer.run, steps=steps))(key, state, ())
