"""Stopping rules: on traces by hand, inside the loop, and both the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import acquisition, active_learner, learners, models, stopping, tasks

ROUNDS = 8


def trace(**columns):
    """Signals of some rounds; what is not given is 0."""
    rounds = len(next(iter(columns.values())))
    empty = {name: np.zeros(rounds, np.float32) for name in stopping.Signals._fields}
    return stopping.Signals(**{**empty, **{name: np.asarray(values, np.float32) for name, values in columns.items()}})


def first(rule, signals):
    stopped = np.asarray(stopping.stops(rule, signals))
    assert (np.diff(stopped.astype(int)) >= 0).all()  # once stopped, stopped
    return int(stopped.argmax()) if stopped.any() else None


CHECKS = {
    "never": (stopping.never(), trace(count=[1, 2, 3]), None),
    "bought labels": (stopping.bought(labels=20), trace(count=[10, 19, 20, 30]), 2),
    "bought spent": (stopping.bought(spent=2.5), trace(spent=[0, 2, 2.5]), 2),
    "bought either": (stopping.bought(labels=20, spent=5), trace(count=[1, 2, 3], spent=[0, 6, 6]), 1),
    "stabilised": (stopping.stabilised(agreement=0.9, rounds=2), trace(agreement=[0.99, 0.5, 0.95, 0.88, 0.93]), 3),
    "stabilised, too short": (stopping.stabilised(agreement=0.9, rounds=3), trace(agreement=[1, 1]), None),
    "unchanged": (stopping.unchanged(share=0.1, rounds=2), trace(changed=[0.1, 0.2, 0.1, 0.05]), 3),
    "certain": (stopping.certain(uncertainty=0.3), trace(uncertainty=[1.0, 0.4, 0.3, 0.9]), 2),
    "not worth it": (stopping.not_worth_it(worth=10.0), trace(gain=[1.0, 0.2, 0.05, 0.3]), 2),
    "any of": (
        stopping.any_of([stopping.bought(labels=3), stopping.certain(uncertainty=0.3)]),
        trace(count=[0, 1, 2, 3], uncertainty=[1, 0.2, 1, 1]),
        1,
    ),
    "all of": (
        stopping.all_of([stopping.bought(labels=1), stopping.certain(uncertainty=0.3)]),
        trace(count=[0, 1, 2, 3], uncertainty=[0.1, 0.5, 0.2, 1]),
        2,
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_rules_on_traces_by_hand(name):
    rule, signals, wanted = CHECKS[name]
    assert first(rule, signals) == wanted


def plain_kappa(a, b, classes):
    table = np.zeros((classes, classes))
    for i, j in zip(a, b, strict=True):
        table[i, j] += 1 / len(a)
    chance = table.sum(0) @ table.sum(1)
    return (np.trace(table) - chance) / (1 - chance)


@pytest.fixture(scope="module")
def runs():
    """Scanned runs with and without a rule, vmapped over keys; the rule's threshold is an argument."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 4)) + 2 * np.eye(4)[y]
    cost = rng.integers(1, 4, 60).astype(np.float32)
    problem = tasks.problem(jnp.asarray(x, jnp.float32), y, jnp.asarray(x, jnp.float32), y, cost=cost)
    learner = learners.fine_tune(models.MLP(3, hidden=(), zero_head=True), optimizer=optax.adam(0.1), steps=20)
    policy = acquisition.top_k(acquisition.entropy, k=2)

    def run(key, threshold):
        rule = stopping.any_of([stopping.certain(uncertainty=threshold), stopping.bought(labels=12)])
        active = active_learner(learner, policy, capacity=16, budget=100.0, stop=rule)
        meta = learner.init(key, problem.x)
        state = active.init(key, meta, (), problem)

        def body(state, key):
            seen = learner.predict(state.params, problem.x).logits[0]
            state, info = active.step(key, meta, (), state, problem)
            return state, (info, seen, state.params)

        return jax.lax.scan(body, state, jax.random.split(key, ROUNDS))

    both = jax.jit(jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None)))
    thresholds = jnp.asarray([0.0, 0.2])
    return problem, both(jax.random.split(jax.random.key(3), 3), thresholds), thresholds


def test_the_loop_stops_and_stays_stopped(runs):
    _, (state, (info, _, params)), _ = runs
    stopped = np.asarray(info.stopped)
    assert stopped[:, 1].any(-1).all()  # the higher threshold stops every run
    valid, count = np.asarray(info.valid), np.asarray(info.count)
    assert not valid[stopped].any()
    assert valid[~stopped].any(-1).all()
    for seed in range(3):
        assert count[seed, 0, -1] == 12  # the other runs stop at their number of labels
        at = int(stopped[seed, 1].argmax())
        assert at > 1
        assert (count[seed, 1, at:] == count[seed, 1, at - 1]).all()
        kernel = np.asarray(params["params"]["head"]["kernel"])[seed, 1]
        assert (kernel[at:] == kernel[at - 1]).all()  # the model stays as it is
        assert (kernel[at - 1] != kernel[0]).any()
    assert (np.asarray(state.stopping.stopped) == stopped[..., -1]).all()


def test_stopping_in_the_loop_is_stopping_on_the_trace(runs):
    """A rule applied to the recorded signals says what it said in the loop."""
    _, (_, (info, _, _)), thresholds = runs
    for j, threshold in enumerate(thresholds):
        rule = stopping.any_of([stopping.certain(uncertainty=threshold), stopping.bought(labels=12)])
        for seed in range(3):
            signals = jax.tree.map(lambda leaf, s=seed, j=j: leaf[s, j], info.signals)
            np.testing.assert_array_equal(stopping.stops(rule, signals), info.stopped[seed, j])


def test_signals_against_numpy(runs):
    problem, (_, (info, seen, _)), _ = runs
    cost = np.asarray(problem.cost)
    for seed in range(3):
        signals = jax.tree.map(lambda leaf, s=seed: np.asarray(leaf[s, 0]), info.signals)
        logits = np.asarray(seen[seed, 0], np.float64)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(-1)
        classes, asked = logits.argmax(-1), []
        assert signals.agreement[0] == 0
        assert signals.changed[0] == 1
        for r in range(ROUNDS):
            left = np.setdiff1d(np.arange(60), asked)
            np.testing.assert_allclose(signals.uncertainty[r], entropy[r][left].mean(), rtol=1e-4)
            assert signals.count[r] == len(asked)
            np.testing.assert_allclose(signals.spent[r], cost[asked].sum())
            if r:
                np.testing.assert_allclose(signals.changed[r], (classes[r] != classes[r - 1]).mean(), atol=1e-6)
                wanted = plain_kappa(classes[r - 1], classes[r], 3)
                np.testing.assert_allclose(signals.agreement[r], wanted, atol=1e-5)
            chosen = np.asarray(info.index[seed, 0, r])[np.asarray(info.valid[seed, 0, r])]
            if len(chosen):
                np.testing.assert_allclose(signals.gain[r], (entropy[r] / cost)[chosen].max(), rtol=1e-3)
            asked += chosen.tolist()


def test_arguments_are_checked():
    for name, wrong in {
        "give labels": lambda: stopping.bought(),
        "labels must not be negative": lambda: stopping.bought(labels=-1),
        "rounds": lambda: stopping.stabilised(rounds=0),
        "agreement": lambda: stopping.stabilised(agreement=1.5),
        "share": lambda: stopping.unchanged(share=2.0),
        "uncertainty": lambda: stopping.certain(uncertainty=-0.1),
        "worth": lambda: stopping.not_worth_it(worth=0.0),
        "no rules": lambda: stopping.any_of([]),
    }.items():
        with pytest.raises(ValueError, match=name):
            wrong()
