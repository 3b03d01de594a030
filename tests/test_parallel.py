"""Four forced host devices give what one gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import acquisition, active_learner, annotators, learners, models, parallel, stopping, tasks

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
    """A whole run, with errors and delays, a label taken back and a pool begun again."""
    x = jax.random.normal(key, (12, 4))
    problem = tasks.problem(x, jnp.arange(12) % 3, x, jnp.arange(12) % 3, classes=3)
    who = annotators.busy(annotators.noisy(annotators.truth(), rate=0.3, classes=3), rate=0.2)
    policy = acquisition.top_k(acquisition.margin, k=2)
    active = active_learner(LEARNER, policy, capacity=8, annotator=who, stop=stopping.never())

    def run(shared, keys):
        def one(key):
            meta_key, run_key, back_key, begin_key = jax.random.split(key, 4)
            meta = LEARNER.init(meta_key, shared.x)
            state, first = active.run(run_key, meta, (), shared, rounds=2)
            state = active.untell(back_key, meta, state, shared, first.index[0, :1])
            state = active.begin(begin_key, meta, (), state, shared)
            state, second = active.run(run_key, meta, (), shared, rounds=2, state=state)
            return state.labelled_index, state.count, first, second

        return jax.vmap(one)(keys)

    keys = jax.random.split(key, 6)
    spread, whole = parallel.split_rows(run)(problem, keys), jax.jit(run)(problem, keys)
    for got, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert len({tuple(map(tuple, index)) for index in np.asarray(whole[2].index)}) > 1
