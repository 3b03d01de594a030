"""Ways to train a policy, on a toy whose best query is known: each finds it, alone, in turn, and with its learner."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import acquisition, policies
from metaal_jax.base import Decision, Policy
from metaal_jax.loop import active_learner
from metaal_jax.policies import episodes, policy_gradient
from toys import NETWORKS, TOY, toy_area, toy_problem, train


@pytest.mark.parametrize(
    "name", ["reinforce", "ppo", "evolution", "pathwise", "imitation", "regression", "classification"]
)
def test_every_way_of_training_solves_the_toy(name, key):
    """A random policy's area is about 0.66 and the best possible 0.875; all ways come to the best from a flat start."""
    network = NETWORKS["row"]
    policy = policies.learned(network, k=1, sample=True)
    options = {"optimizer": optax.adam(0.03), "budget": 4}
    if name == "reinforce":
        trainer = policies.reinforce(TOY, policy, toy_problem, problems=4, rollouts=8, **options)
    elif name == "ppo":
        trainer = policies.ppo(TOY, policy, toy_problem, episodes=16, minibatches=2, **options)
    elif name == "evolution":
        network = NETWORKS["linear"]
        trainer = policies.evolution(TOY, policies.learned(network, k=1), toy_problem, deviation=0.3, **options)
    elif name == "pathwise":
        trainer = policies.pathwise(TOY, policy, toy_problem, problems=8, **options)
    else:
        trainer = policies.supervised(
            TOY, policy, toy_problem, target=name, updates=8, batch=16, capacity=100, expert_steps=2,
            **options,
        )  # fmt: skip
    state, metrics = train(trainer, key, 40)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))
    greedy = policies.learned(network, k=1)
    before = toy_area(policy, policy.init(key), key, 1)
    assert before < 0.75
    assert toy_area(greedy, state.params, key, 1) == 0.875
    if name == "imitation":
        problem = toy_problem(key, ())
        oracle = toy_area(acquisition.greedy_oracle(TOY, k=1), (problem.y, problem.test), key, 1)
        assert toy_area(greedy, state.params, key, 1) >= oracle
        assert metrics["regret"][-1] < 0.05
    if name == "classification":
        view_problem = toy_problem(key, ())
        active = active_learner(TOY, greedy, capacity=4)
        start = jax.jit(active.init)(key, jnp.zeros(()), state.params, view_problem)
        ask = jax.jit(active.ask)
        probability = jax.nn.sigmoid(ask(key, jnp.zeros(()), state.params, start, view_problem)[0].scores)
        good = np.asarray(view_problem.x[:, 0] > 0)
        assert (np.asarray(probability)[good] > 0.5).all()
        assert (np.asarray(probability)[~good] < 0.5).all()


def test_evolution_follows_the_gradient_of_the_smoothed_return(key):
    """A policy asks for the good row if its parameter is positive, so the return under noise is a normal one's."""

    def act(key, params, state, view):
        good = view.x[:, 0] > 0.5
        index = jnp.where(params > 0, good.argmax(), (~good).argmax())[None].astype(jnp.int32)
        return Decision(index=index, valid=jnp.ones(1, bool), log_prob=jnp.zeros(()), scores=jnp.zeros(2)), state

    policy = Policy(init=lambda key: jnp.float32(0.2), begin=lambda key, params, view: (), act=act)
    trainer = policies.evolution(
        TOY, policy, functools.partial(toy_problem, n=2), optimizer=optax.sgd(1.0), budget=1, problems=1, pairs=1,
        deviation=0.5,
    )  # fmt: skip
    run = lambda key: trainer.run(key, trainer.init(key, jnp.zeros(()), ()), (), steps=1)[0].params - 0.2  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(key, 4000)))
    density = np.exp(-0.5 * (0.2 / 0.5) ** 2) / np.sqrt(2 * np.pi) / 0.5
    np.testing.assert_allclose(found.mean(), 0.5 * density, atol=4 * found.std() / np.sqrt(4000))


def test_kinds_of_problems_in_turn(key):
    """A step is one of each trainer, which hand on the policy and the optimiser's state and keep all else."""
    network = NETWORKS["linear"]
    options = {"optimizer": optax.adam(0.1), "budget": 2, "problems": 2, "pairs": 2}
    kinds = [
        policies.evolution(TOY, policies.learned(network, k=k), functools.partial(toy_problem, n=n), k=k, **options)
        for k, n in ((1, 8), (2, 6))
    ]
    both = policies.in_turn(kinds)
    metas = (jnp.float32(0.0), jnp.float32(0.3))
    start = both.init(key, metas, ((), ()))
    found, metrics = jax.jit(both.step)(key, start, ((), ()))
    state = kinds[0].init(key, metas[0], ())
    wanted = {}
    for number, (kind, meta) in enumerate(zip(kinds, metas, strict=True)):
        state, own = jax.jit(kind.step)(jax.random.fold_in(key, number), state._replace(meta=meta), ())
        wanted |= {f"{name}_{number}": value for name, value in own.items()}
    chex.assert_trees_all_close(found.params, state.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found.opt_state, state.opt_state, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(metrics, wanted, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(found.meta, metas)
    assert found.step == 1
    assert not np.allclose(start.params["params"]["factors"], found.params["params"]["factors"])
    run, steps = jax.jit(both.run, static_argnames="steps")(key, start, ((), ()), steps=2)
    assert run.step == 2
    assert steps["area_1"].shape == (2,)


def test_what_cannot_take_turns_is_refused(key):
    options = {"optimizer": optax.adam(0.1), "budget": 2}
    make = lambda name: policies.evolution(TOY, policies.learned(NETWORKS[name], k=1), toy_problem, **options)  # noqa: E731
    drawn = policies.learned(NETWORKS["row"], k=1, sample=True)
    with pytest.raises(ValueError, match="trainer 1 trains other parameters"):
        policies.in_turn([make("linear"), make("row")]).init(key, (jnp.float32(0.0),) * 2, ((), ()))
    with pytest.raises(ValueError, match="trains its learner as well"):
        policies.in_turn([policies.pathwise(TOY, drawn, toy_problem, joint=True, **options)])
    with pytest.raises(ValueError, match="no trainers"):
        policies.in_turn([])


def test_advantages_against_their_definition():
    reward, value = np.array([0.1, 0.5, -0.2]), np.array([0.3, 0.2, 0.6])
    found = policy_gradient.advantages(jnp.asarray(reward), jnp.asarray(value), discount=0.9, trace=0.8)
    delta = reward + 0.9 * np.append(value[1:], 0) - value
    wanted = [sum((0.9 * 0.8) ** i * delta[t + i] for i in range(3 - t)) for t in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_rewards_add_up_to_area_and_to_labels():
    run = episodes.Trajectory((), (), (), (), jnp.asarray([0.2, 0.6, 0.5, 0.9]), jnp.float32(0.1), ())
    np.testing.assert_allclose(episodes.rewards(run, reward="area").sum(), 0.55, rtol=1e-6)
    np.testing.assert_allclose(episodes.rewards(run, reward="labels", target=0.6), [-0.25, -0.25, 0, 0])
    np.testing.assert_allclose(episodes.rewards(run, reward="labels", target=0.1), [0, 0, 0, 0])


def test_another_learner_may_judge(key):
    """The toy is played by a learner through which no gradient comes, and judged by one through which it does."""
    network = NETWORKS["row"]
    deaf = TOY._replace(adapt=lambda *args, **options: jax.lax.stop_gradient(TOY.adapt(*args, **options)))
    policy = policies.learned(network, k=1, sample=True)
    options = {"optimizer": optax.adam(0.03), "budget": 4, "problems": 8}
    before = policy.init(key)
    still = train(policies.pathwise(deaf, policy, toy_problem, **options), key, 2)[0].params
    chex.assert_trees_all_equal(still, train(policies.pathwise(deaf, policy, toy_problem, **options), key, 1)[0].params)
    state, _ = train(policies.pathwise(deaf, policy, toy_problem, refit=TOY, **options), key, 40)
    assert toy_area(policies.learned(network, k=1), before, key, 1) < 0.75
    assert toy_area(policies.learned(network, k=1), state.params, key, 1) == 0.875


def test_pathwise_trains_learner_and_policy_together(key):
    """With `joint` the meta-parameter moves as well: starting with more than 0 raises the toy's accuracy."""
    network = NETWORKS["row"]
    policy = policies.learned(network, k=1, sample=True)
    trainer = policies.pathwise(TOY, policy, toy_problem, joint=True, problems=4,
                                optimizer=optax.adam(0.05), budget=4)  # fmt: skip
    state, metrics = train(trainer, key, 20)
    assert state.meta > 0.3
    assert metrics["area"][-1] > metrics["area"][0]


def test_jointly_each_follows_its_own_judge(key):
    """With `refit` and `joint` a step is the policy's alone under `refit` and the learner's own, both as without."""
    network = NETWORKS["row"]
    policy = policies.learned(network, k=1, sample=True)
    other = TOY._replace(adapt=lambda key, meta, *args, **options: TOY.adapt(key, meta - 0.5, *args, **options))
    options = {"problems": 4, "optimizer": optax.sgd(0.1), "budget": 4}
    step = lambda **more: train(policies.pathwise(TOY, policy, toy_problem, **options, **more), key, 1)[0]  # noqa: E731
    together, alone, plain = step(joint=True, refit=other), step(refit=other), step(joint=True)
    chex.assert_trees_all_close(together.params, alone.params, rtol=1e-5)
    chex.assert_trees_all_close(together.meta, plain.meta, rtol=1e-5)
    before = policy.init(key)
    moved = lambda state: optax.tree.norm(optax.tree.sub(state.params, plain.params))  # noqa: E731
    assert moved(alone) > 1e-4
    assert optax.tree.norm(optax.tree.sub(alone.params, before)) > 1e-4
