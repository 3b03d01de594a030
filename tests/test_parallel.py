"""Four forced host devices give what one gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import acquisition, active_learner, learners, models, parallel, tasks

LEARNER = learners.maml(models.MLP(3, hidden=()), optimizer=optax.sgd(0.1), steps=1)


def test_split_rows_gives_back_all_rows_in_order():
    assert jax.local_device_count() == 4
    split = parallel.split_rows(lambda shared, rows: (rows[0] * shared, rows[1].sum(-1)))
    for n in (1, 3, 8, 10):
        rows = (jnp.arange(1.0, n + 1), jnp.arange(2 * n).reshape(n, 2))
        first, second = split(jnp.float32(3.0), rows)
        np.testing.assert_array_equal(first, 3 * rows[0])
        np.testing.assert_array_equal(second, rows[1].sum(-1))


def test_split_rows_uses_the_devices_it_is_told():
    where = parallel.split_rows(lambda shared, rows: rows, devices=jax.local_devices()[:2])
    np.testing.assert_array_equal(where((), jnp.arange(5)), np.arange(5))
    rows = parallel.split_rows(lambda shared, rows: rows + 0 * rows.shape[0] + rows.shape[0])
    assert rows((), jnp.zeros(10)).tolist() == [3.0] * 10  # ten rows on four devices: three each


@pytest.mark.parametrize("n", [40, 37])
def test_pool_scores_are_those_of_one_device(key, n):
    x_key, init_key, score_key = jax.random.split(key, 3)
    x, row = jax.random.normal(x_key, (n, 4)), jax.random.permutation(x_key, jnp.arange(100, 100 + n))
    params = jax.jit(LEARNER.init)(init_key, x)

    def scorer(key, view):
        return acquisition.entropy(key, view) + acquisition.random(key, view)  # of the model and of the row's noise

    whole = jax.jit(lambda key: acquisition.score_pool(key, LEARNER, params, scorer, x, row))(score_key)
    for chunk in (None, 4):
        spread = parallel.pool_scorer(LEARNER, scorer, chunk=chunk)(score_key, params, x, row)
        np.testing.assert_allclose(spread, whole, rtol=1e-5)


def test_seeds_over_devices_are_seeds_under_vmap(key):
    x = jax.random.normal(key, (12, 4))
    problem = tasks.problem(x, jnp.arange(12) % 3, x, jnp.arange(12) % 3)
    active = active_learner(LEARNER, acquisition.top_k(acquisition.margin, k=2), capacity=6)

    def run(shared, keys):
        def one(key):
            meta_key, init_key, loop_key = jax.random.split(key, 3)
            meta = LEARNER.init(meta_key, shared.x)
            state = active.init(init_key, meta, (), shared)
            body = lambda state, key: active.step(key, meta, (), state, shared)  # noqa: E731
            return jax.lax.scan(body, state, jax.random.split(loop_key, 3))[1]

        return jax.vmap(one)(keys)

    keys = jax.random.split(key, 6)
    spread, whole = parallel.split_rows(run)(problem, keys), jax.jit(run)(problem, keys)
    np.testing.assert_array_equal(spread.index, whole.index)
    assert len({tuple(map(tuple, index)) for index in np.asarray(whole.index)}) > 1
    np.testing.assert_allclose(spread.test.nll, whole.test.nll, rtol=1e-4)
