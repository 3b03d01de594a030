"""Learned policies and their trainers at the edges: rows of NaN, and rewards that say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Decision, Learner, Policy, Prediction, acquisition, models, policies, tasks
from metaal_jax.base import Trainable
from metaal_jax.policies.policy_gradient import told_apart
from views import make_view, reorder

K, N = 2, 16
NETWORK = models.LinearNetwork(prior=policies.prior(uncertain_cover=1.0, margin=-0.5))
MARGIN, TYPICAL = acquisition.top_k(acquisition.margin, k=K), acquisition.typical(k=K)
POLICIES = {
    "learned": policies.learned(NETWORK, k=K),
    "selector": policies.selector([MARGIN, TYPICAL], models.LinearNetwork(), k=K),
    "albl": policies.albl([MARGIN, TYPICAL], k=K, horizon=3),
    "planned": acquisition.planned(TYPICAL, rows=K),
}


def filled(view, rows):
    prediction = jax.tree.map(lambda leaf: jnp.where(rows[:, None], jnp.nan, leaf), view.prediction)
    return view._replace(x=jnp.where(rows[:, None], jnp.nan, view.x), prediction=prediction)


@pytest.mark.parametrize("name", POLICIES)
def test_rows_of_nan_change_nothing_and_come_last(key, name):
    policy = POLICIES[name]
    base = make_view(14, N, labelled=(1, 8), capacity=12)._replace(budget=jnp.float32(100))
    padded = make_view(2, N, labelled=(1, 8), capacity=12, padding=4)._replace(budget=jnp.float32(100))
    order = np.random.default_rng(0).permutation(N)
    few = base._replace(queried=~jnp.isin(base.row, jnp.asarray([7, 11])))
    views = [padded, filled(padded, jnp.arange(N) >= N - 4), base._replace(weight=base.weight.at[7].set(0.0)),
             filled(base, base.row == 7), filled(few, base.row == 7), base, reorder(base, order)]  # fmt: skip

    def two_rounds(view):
        params = policy.init(key)
        state = policy.begin(key, params, view)
        first, state = policy.act(key, params, state, view)
        again = view._replace(queried=view.queried.at[first.index].max(first.valid))
        second, _ = policy.act(jax.random.fold_in(key, 1), params, state, again)
        return first, second

    decisions = jax.jit(jax.vmap(two_rounds))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *views))
    for decision in decisions:
        index = np.asarray(decision.index)
        np.testing.assert_array_equal(index[0], index[1])
        np.testing.assert_array_equal(index[2], index[3])
        np.testing.assert_array_equal(index[5], order[index[6]])
    index = decisions[0].index[4].tolist()
    assert index == [11, 7][: len(index)]
    assert decisions[0].valid[4].all()


CONSTANT = Learner(
    init=lambda key, x: {},
    adapt=lambda key, meta, batch, unlabelled=None, start=None: (),
    predict=lambda params, x: Prediction(jnp.zeros((1, x.shape[0], 3)), x[None]),
    meta_grad=None,
)


def drawing(network_value):
    """A policy of one parameter that draws a row; its value is off by what rounding leaves."""

    def act(key, params, state, view):
        index, valid = acquisition.select_top(key, params["w"] * view.x[:, 0], view.available, view.row, 1)
        return Decision(index, valid, jnp.float32(-1.0), jnp.zeros(view.row.shape)), state

    return Policy(
        init=lambda key: {"w": jnp.float32(0.3)},
        begin=lambda key, params, view: (),
        act=act,
        train=Trainable(
            observe=lambda key, state, view: jax.random.uniform(key),
            evaluate=lambda params, seen, index: (
                params["w"] * (1 + seen) - 1.0,
                params["w"] * 0.0,
                network_value(seen),
            ),
        ),
    )


def sampler(key, data):
    x = jax.random.normal(key, (6, 2))
    y = jnp.arange(6) % 3
    return tasks.problem(x, y, test_x=x, test_y=y)


TRAINERS = {
    "ppo": lambda policy, adam: policies.ppo(
        CONSTANT, policy, sampler, optimizer=adam, budget=1, episodes=6, epochs=1, minibatches=1, value_weight=0.0
    ),
    "reinforce": lambda policy, adam: policies.reinforce(
        CONSTANT, policy, sampler, optimizer=adam, budget=1, problems=2, rollouts=3
    ),
    "evolution": lambda policy, adam: policies.evolution(
        CONSTANT, policy, sampler, optimizer=adam, budget=1, problems=2, pairs=2
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_equal_rewards_move_nothing(key, name):
    """Adam makes a whole step of any gradient, and so of rounding."""
    trainer = TRAINERS[name](drawing(lambda seen: 0.1 + 1e-8 * seen), optax.adam(0.04))
    state = trainer.init(key, {}, ())
    after, _ = jax.jit(trainer.step)(key, state, ())
    assert after.params["w"] == state.params["w"]


def test_differences_are_told_from_rounding():
    values = np.float32(0.7) + np.asarray([0, 6e-8, -6e-8, 1e-3], np.float32)
    np.testing.assert_allclose(told_apart(values - values[0], 0.7), [0, 0, 0, 1e-3], atol=1e-6)
