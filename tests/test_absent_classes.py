"""Classes without a label: ruled out by -inf, learned once they have one, and never a NaN on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Batch, Task, check_learner, learners, losses, models
from metaal_jax.base import empty_batch
from metaal_jax.learners import gradient_steps, through

FOUR = models.MLP(4, hidden=(6,))
SGD = optax.sgd(0.3)
TUNED = learners.fine_tune(FOUR, optimizer=SGD, steps=3)
PROTOTYPES = {"optimizer": SGD, "steps": 2, "head": "prototypes"}


def example(key, rows=7, classes=3):
    return Batch(
        x=jax.random.normal(key, (rows, 4)), y=jnp.arange(rows, dtype=jnp.int32) % classes, weight=jnp.ones(rows)
    )


def adapt(learner, key, batch, start=None):
    meta = jax.jit(learner.init)(key, batch.x)
    return meta, jax.jit(learner.adapt)(key, meta, batch, start=start)


WRAPPED = {
    "seen_classes": learners.seen_classes(TUNED),
    "seen_classes of a committee": learners.seen_classes(learners.committee(TUNED, members=2)),
    "committee of seen_classes": learners.committee(learners.seen_classes(TUNED), members=2),
    "seen_classes of laplace": learners.seen_classes(learners.laplace(TUNED, members=2)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_only_classes_with_a_label_are_predicted(key, name):
    learner, batch = WRAPPED[name], example(key)
    check_learner(learner, key, batch)
    batch = batch._replace(weight=batch.weight * (batch.y != 1))  # the labels of class 1 are padding
    meta, params = adapt(learner, key, batch)
    logits = jax.jit(learner.predict)(params, batch.x).logits
    np.testing.assert_array_equal(np.isneginf(logits), np.broadcast_to([False, True, False, True], logits.shape))
    assert np.isfinite(logits[..., ::2]).all()
    nothing = jax.jit(learner.adapt)(key, meta, empty_batch(batch.x, 7))
    assert np.isfinite(learner.predict(nothing, batch.x).logits).all()
    if name == "seen_classes":  # the meta-parameters themselves rule nothing out
        assert np.isfinite(learner.predict(meta, batch.x).logits).all()


def test_masking_changes_what_is_predicted_and_nothing_that_is_learned(key):
    batch = example(key)
    learner = WRAPPED["seen_classes"]
    _, params = adapt(learner, key, batch)
    _, plain = adapt(TUNED, key, batch)
    np.testing.assert_array_equal(params["seen"], [True, True, True, False])
    jax.tree.map(np.testing.assert_array_equal, params["params"], plain["params"])
    shown = learner.predict(params, batch.x).logits[..., :3]
    np.testing.assert_array_equal(shown, TUNED.predict(plain, batch.x).logits[..., :3])


def test_a_warm_start_remembers_classes(key):
    batch, learner = example(key), WRAPPED["seen_classes"]
    meta, params = adapt(learner, key, batch)
    later = batch._replace(y=jnp.full(7, 3, jnp.int32))
    warm = jax.jit(learner.adapt)(key, meta, later, start=params)
    assert warm["seen"].all()
    none = jax.jit(learner.adapt)(key, meta, empty_batch(batch.x, 7), start=params)
    np.testing.assert_array_equal(none["seen"], params["seen"])


def test_a_first_label_midway_makes_a_prototype_of_a_warm_start(key):
    """Columns that exist are gone on with; one that was ruled out starts from its class mean."""
    batch = example(key)
    for adapted in ("all", "head"):
        learner = learners.fine_tune(FOUR, adapted=adapted, **PROTOTYPES)
        meta, params = adapt(learner, key, batch)
        assert np.isneginf(params["params"]["head"]["bias"][3])
        more = batch._replace(y=batch.y.at[6].set(3))
        warm = jax.jit(learner.adapt)(key, meta, more, start=params)
        assert np.isfinite(warm["params"]["head"]["bias"]).all()
        assert learner.predict(warm, more.x).logits[0, 6].argmax() == 3
        still = jax.jit(learner.adapt)(key, meta, batch, start=params)
        assert np.isneginf(still["params"]["head"]["bias"][3])
        assert np.isfinite(still["params"]["head"]["bias"][:3]).all()
        assert losses.cross_entropy(learner.predict(still, batch.x).logits[0], batch.y, batch.weight) < (
            losses.cross_entropy(learner.predict(params, batch.x).logits[0], batch.y, batch.weight)
        )


NORMS = {
    "weight decay of the optimiser": {"optimizer": optax.adamw(0.05, weight_decay=0.3, eps_root=1e-8)},
    "decay and proximal": {"decay": 0.3, "proximal": 0.5},
    "clipped": {"optimizer": optax.chain(optax.clip_by_global_norm(0.1), SGD)},
    "learned rates": {"rates": "parameter", "learn": ("temperature",)},
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_optimisers_do_not_meet_an_infinite_bias(key, name):
    """A class more that has no label changes nothing for the others, in parameters and in the meta-gradient."""
    batch, query = example(key), example(jax.random.fold_in(key, 1))
    options = {**PROTOTYPES, **NORMS[name]}
    found = []
    for classes in (3, 4):
        learner = learners.maml(models.MLP(classes, hidden=(6,)), **options)
        meta, params = adapt(learner, jax.random.key(0), batch)
        logits = learner.predict(params, batch.x).logits[..., :3]
        grads, _ = jax.jit(learner.meta_grad)(key, meta, Task(batch, query), step=jnp.int32(0))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        found.append((logits, grads["params"]["Dense_0"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_the_implicit_gradient_with_a_class_without_a_label(key):
    batch = example(key)
    adaptation = gradient_steps(FOUR, proximal=1.0, adapted="all", **PROTOTYPES)
    for learner in (learners.implicit(adaptation, solver_steps=3), through(adaptation)):
        meta = jax.jit(learner.init)(key, batch.x)
        grads, metrics = jax.jit(learner.meta_grad)(key, meta, Task(batch, batch), step=jnp.int32(0))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, metrics)))


@pytest.mark.parametrize("hessian", ["kron", "full"])
def test_posteriors_of_heads_with_a_class_without_a_label(key, hessian):
    """Its probability is 0, so its column has the prior's spread and the others have that of a head without it."""
    batch = example(key)
    learner = learners.laplace(learners.maml(FOUR, **PROTOTYPES), members=2000, hessian=hessian)
    _, params = adapt(learner, key, batch)
    logits = learner.predict(params, batch.x).logits
    assert np.isneginf(logits[..., 3]).all()
    assert np.isfinite(logits[..., :3]).all()
    assert not np.isnan(losses.consensus(logits)).any()
    np.testing.assert_allclose(params["heads"]["kernel"][..., 3].std(0), 1.0, atol=0.1)


def test_many_tasks_with_absent_classes_are_finite_under_vmap(key):
    batch = example(key)
    weights = jnp.stack([batch.weight * (batch.y != c) for c in range(4)] + [0 * batch.weight])
    for learner in (learners.maml(FOUR, **PROTOTYPES), learners.protonet(FOUR), learners.r2d2(FOUR),
                    learners.linear(4, learn=("ridge",)), learners.linear(4, unseen=0.0)):  # fmt: skip
        meta = jax.jit(learner.init)(key, batch.x)

        def gradient(weight, learner=learner, meta=meta):
            task = Task(batch._replace(weight=weight), batch._replace(weight=weight))
            return learner.meta_grad(key, meta, task, step=jnp.int32(0))

        grads, metrics = jax.jit(jax.vmap(gradient))(weights)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, metrics)))
        assert all((leaf[-1] == 0).all() for leaf in jax.tree.leaves(grads))  # no label anywhere: no direction
