"""The outer loop: however its tasks are spread, the same result; in pieces, the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Learner, Task, learners, models, outer_loop, parallel, tasks

LEARNER = learners.maml(models.MLP(3, hidden=(16,)), optimizer=optax.sgd(0.3), steps=1)
SAMPLER = tasks.few_shot(ways=3, shots=1, queries=3)
OPTIMIZER = optax.adam(0.01)
STEPS = 4


@pytest.fixture(scope="module")
def data():
    """Eight classes, each a cloud around its mean: an outer loop can learn the noise to look past."""
    rng = np.random.default_rng(0)
    means = np.concatenate([2 * rng.normal(size=(8, 3)), np.zeros((8, 5))], axis=1)
    y = np.repeat(np.arange(8), 10)
    return jax.device_put(tasks.class_data((means[y] + rng.normal(size=(80, 8))).astype(np.float32), y))


def make(**options):
    return outer_loop(LEARNER, SAMPLER, optimizer=OPTIMIZER, tasks=8, **options)


@pytest.fixture(scope="module")
def start(data):
    return jax.jit(make().init)(jax.random.key(1), data.x)


@pytest.fixture(scope="module")
def whole(data, start):
    return jax.jit(make().run, static_argnames="steps")(jax.random.key(2), start, data, steps=STEPS)


@pytest.mark.parametrize("how", ["chunk 1", "chunk 2", "four devices", "four devices, chunk 1"])
def test_the_same_however_the_tasks_are_spread(data, start, whole, how):
    chunk = int(how[-1]) if "chunk" in how else None
    if "devices" in how:
        assert jax.local_device_count() == 4
        run = parallel.outer_run(make(chunk=chunk, axis_name=parallel.AXIS), steps=STEPS)
    else:
        run = jax.jit(lambda *arguments: make(chunk=chunk).run(*arguments, steps=STEPS))
    state, metrics = run(jax.random.key(2), start, data)
    assert state.step == STEPS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), (state, metrics), whole)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0].meta, start.meta)
    assert all(value > 1e-2 for value in jax.tree.leaves(moved))  # far more than the tolerance


def test_in_two_pieces_the_bits_of_one(data, start, whole):
    run = jax.jit(make().run, static_argnames="steps")
    state, first = run(jax.random.key(2), start, data, steps=2)
    state, second = run(jax.random.key(2), state, data, steps=STEPS - 2)
    jax.tree.map(np.testing.assert_array_equal, state, whole[0])
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    jax.tree.map(np.testing.assert_array_equal, both, whole[1])


def test_a_step_is_the_mean_gradient_of_its_tasks_and_knows_its_number(data):
    """A learner whose gradient is its task's first row: the step must average over distinct tasks."""

    def meta_grad(key, meta, task, *, step):
        return task.support.x[0], {"loss": jnp.zeros(()), "score": jnp.zeros(()), "number": step.astype(float)}

    odd = Learner(init=lambda key, x: jnp.zeros(8), adapt=None, predict=None, meta_grad=meta_grad)

    def sampler(key, data):
        batch = SAMPLER(key, data).support
        return Task(batch, batch)

    outer = outer_loop(odd, sampler, optimizer=optax.sgd(1.0), tasks=4, chunk=2)
    state, metrics = jax.jit(lambda s: outer.run(jax.random.key(3), s, data, steps=3))(
        outer.init(jax.random.key(0), data.x)
    )
    assert metrics["number"].tolist() == [0, 1, 2]
    norms = metrics["grad_norm"]
    assert len(set(norms.tolist())) == 3  # fresh tasks every step
    rows = np.linalg.norm(np.asarray(data.x), axis=1)
    assert (norms < rows.max()).all()
    assert state.meta.shape == (8,)


def test_meta_training_lowers_the_loss_on_fresh_tasks(data, start):
    outer = make()
    state, metrics = jax.jit(lambda *a: outer.run(*a, steps=150))(jax.random.key(2), start, data)
    assert metrics["loss"].shape == metrics["grad_norm"].shape == (150,)
    assert metrics["loss"][-20:].mean() < 0.7 * metrics["loss"][:5].mean()
    evaluate = jax.jit(lambda key, meta: outer.evaluate(key, meta, data, tasks=40))
    before, after = (evaluate(jax.random.key(4), meta) for meta in (start.meta, state.meta))
    assert after["score"].shape == (40,)
    assert after["score"].mean() > before["score"].mean() + 0.1


def test_evaluation_does_not_depend_on_the_chunk(data, start):
    wanted, *others = (
        jax.jit(lambda key, outer=outer: outer.evaluate(key, start.meta, data, tasks=5))(jax.random.key(5))
        for outer in (make(), make(chunk=1), make(chunk=2))
    )
    assert wanted["loss"].shape == (5,)
    assert len(set(wanted["loss"].tolist())) == 5
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, wanted)


def test_numbers_that_do_not_fit(data, start):
    def loop(**options):
        return outer_loop(LEARNER, SAMPLER, **{"optimizer": OPTIMIZER, "tasks": 6, **options})

    with pytest.raises(ValueError, match="tasks must be a positive integer"):
        loop(tasks=0)
    with pytest.raises(ValueError, match="chunk must be a positive integer"):
        loop(chunk=0)
    with pytest.raises(ValueError, match="chunks of 4 do not divide the 6 tasks"):
        jax.eval_shape(loop(chunk=4).step, jax.random.key(0), start, data)
    with pytest.raises(ValueError, match="6 tasks do not divide among 4 devices"):
        parallel.outer_run(loop(axis_name=parallel.AXIS), steps=1)(jax.random.key(0), start, data)
