"""Active learning as a Markov decision process: the same loop, with the agent outside."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import Batch, Decision, Policy, active_learner, learners, models, tasks
from metaal_jax.loop import evaluate
from metaal_jax.policies.environment import EnvParams, environment

POOL, BUDGET, INITIAL, K = 14, 9, 2, 3
STEPS = 3  # 7 rows to buy: 3, 3 and 1
LEARNER = learners.protonet(models.MLP(3, hidden=()))


def sampler(key, data):
    """Consecutive rows of a mixed set from a random one on: a sampler that compiles in no time."""
    shift = jax.random.randint(key, (), 0, len(data[1]))
    x, y = (jnp.roll(leaf, shift, 0) for leaf in data)
    rest = slice(POOL, POOL + 20)
    validation = Batch(x=x[rest], y=y[rest], weight=jnp.ones(20))
    problem = tasks.problem(x[:POOL], y[:POOL], x[40:51], y[40:51], validation=validation)
    return problem._replace(initial=jnp.arange(INITIAL, dtype=jnp.int32))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(90) % 3).astype(np.int32)
    x = jnp.asarray(rng.normal(size=(90, 4)) + 1.5 * np.eye(3, 4)[y], jnp.float32)
    return EnvParams(meta=LEARNER.init(jax.random.key(0), x), data=(x, jnp.asarray(y)))


def random_action(key, mask, k):
    """Allowed actions while there are any; the first that come to hand after them."""
    noise = jax.random.uniform(key, mask.shape) + mask
    action = jax.lax.top_k(noise, k)[1].astype(jnp.int32)
    return action[0] if k == 1 else action


def episode(env, key, params, steps, k):
    """A random agent's `steps` steps as one scan: `(final state, state at the start, trace)`."""
    reset_key, loop_key = jax.random.split(key)
    observation, start = env.reset(reset_key, params)

    def body(carry, key):
        observation, state = carry
        act_key, step_key = jax.random.split(key)
        action = random_action(act_key, observation.mask, k)
        after, state, reward, done, info = env.step(step_key, state, action, params)
        trace = {"observation": observation, "action": action, "reward": reward, "done": done, **info}
        return (after, state), trace

    (_, state), trace = jax.lax.scan(body, (observation, start), jax.random.split(loop_key, steps))
    return state, start, trace


def playing(steps, *, sample=sampler, k=1, **options):
    env = environment(LEARNER, sample, k=k, **options)
    return jax.jit(lambda key, params: episode(env, key, params, steps, k))


def changed(**fields):
    """A sampler of the same problems with other fields: values, or functions of the problem."""

    def sample(key, data):
        problem = sampler(key, data)
        return problem._replace(**{name: f(problem) if callable(f) else f for name, f in fields.items()})

    return sample


def curve(problem, meta, rows, k, budget):
    """The learning curve of given rows `[steps, k]`, -1 for none, by the active-learning loop itself."""

    def act(key, wanted, position, view):
        n = view.row.shape[0]
        return Decision(jnp.maximum(wanted, 0), wanted >= 0, jnp.zeros(()), jnp.zeros(n)), position

    active = active_learner(LEARNER, Policy(lambda key: (), lambda *_: (), act), capacity=budget)
    start = active.init(jax.random.key(5), meta, (), problem)
    body = lambda state, wanted: active.step(jax.random.key(6), meta, wanted, state, problem)  # noqa: E731
    return start, *jax.lax.scan(body, start, rows)


@pytest.mark.parametrize(("reward", "candidates"), [("area", 8), ("gain", None)])
def test_an_episode_is_a_run_of_the_active_learner_and_its_return_the_area(key, params, reward, candidates):
    play = playing(STEPS, budget=BUDGET, k=K, reward=reward, candidates=candidates, auto_reset=False)
    for number in range(3):
        final, first, trace = play(jax.random.fold_in(key, number), params)
        assert trace["done"].tolist() == [False, False, True]
        assert trace["count"].tolist() == trace["spent"].tolist() == [5, 8, 9]
        assert (trace["row"] >= 0).sum(-1).tolist() == [3, 3, 1]
        start, state, wanted = jax.jit(curve, static_argnums=(3, 4))(
            first.problem, params.meta, trace["row"], K, BUDGET
        )
        np.testing.assert_array_equal(final.active.labelled_index, state.labelled_index)
        np.testing.assert_array_equal(final.active.labelled.y, state.labelled.y)
        np.testing.assert_allclose(trace["accuracy"], wanted.validation.accuracy, atol=1e-6)
        before = evaluate(LEARNER, start.params, first.problem.validation).accuracy
        np.testing.assert_allclose([first.accuracy, first.start], before, atol=1e-6)
        area = np.asarray(wanted.validation.accuracy, np.float64).mean() - (float(before) if reward == "gain" else 0.0)
        np.testing.assert_allclose(trace["reward"].sum(), area, atol=1e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trace["observation"]))
    assert len(np.unique(trace["accuracy"])) > 1  # a flat curve would agree with anything


def test_actions_are_places_among_the_rows_on_offer(key, params):
    """Candidates are drawn afresh among the rows that may be asked for; what `observe` is shown belongs to them."""
    env = environment(
        LEARNER, sampler, budget=12, k=2, candidates=4, observe=lambda view, position: (view.row[position], view.spent)
    )
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    observation, state = reset(key, params)
    free, offers = set(range(INITIAL, POOL)), []
    for number in range(5):
        rows = observation.seen[0].tolist()
        assert observation.seen[1] == state.active.count
        offers.append(tuple(rows))
        allowed = np.asarray(observation.mask)
        assert allowed.sum() == min(4, len(free))
        assert {row for row, may in zip(rows, allowed, strict=True) if may} <= free
        assert len(set(rows)) == 4
        if number == 4:
            break
        action = [3, 1]
        observation, state, _, _, info = step(jax.random.fold_in(key, number), state, jnp.asarray(action), params)
        assert info["row"].tolist() == [rows[i] for i in action]  # in the order of the action
        free -= set(info["row"].tolist())
    assert len(set(offers)) == 5


def test_labels_are_paid_for_until_the_target_is_reached(key, params):
    """The accuracies do not depend on the reward, so those of another reward tell where each episode must end."""
    steps, options = 7, {"budget": BUDGET, "auto_reset": False}
    target = 0.75  # fifteen of the twenty validation rows
    keys = jax.random.split(key, 40)
    to_target = jax.vmap(playing(steps, reward="labels", target=target, **options), in_axes=(0, None))
    final, _, trace = to_target(keys, params)
    counts, taken, trace = jax.tree.map(np.asarray, (final.active.count, final.step, trace))
    whole = jax.vmap(playing(steps, **options), in_axes=(0, None))(keys, params)[2]["accuracy"]
    whole, ends = np.asarray(whole), []
    for i in range(40):
        reached = np.flatnonzero(np.round(20 * whole[i]) >= 15)
        end = reached[0] if reached.size else steps - 1
        ends.append((end, reached.size > 0))
        assert trace["done"][i].tolist() == [t >= end for t in range(steps)]
        assert trace["reward"][i].tolist() == [-1.0 if t <= end else 0.0 for t in range(steps)]
        np.testing.assert_allclose(trace["accuracy"][i, : end + 1], whole[i, : end + 1], atol=1e-6)
        # After the end nothing moves.
        assert (trace["accuracy"][i, end:] == trace["accuracy"][i, end]).all()
        assert (trace["row"][i, end + 1 :] == -1).all()
        assert counts[i] == INITIAL + end + 1 == taken[i] + INITIAL
    assert {reached for _, reached in ends} == {True, False}
    assert len({end for end, reached in ends if reached}) >= 3


def test_what_is_not_allowed_buys_nothing_and_takes_a_step(key, params):
    padded = changed(weight=lambda problem: problem.weight.at[7].set(0.0))
    env = environment(LEARNER, padded, budget=BUDGET, k=K, auto_reset=False)
    step = jax.jit(env.step)
    observation, state = jax.jit(env.reset)(key, params)
    assert np.flatnonzero(~observation.mask).tolist() == [0, 1, 7]  # the initial set and padding
    after, state, reward, done, info = step(key, state, jnp.asarray([1, 7, -1]), params)
    assert info["row"].tolist() == [-1, -1, -1]
    assert (info["count"], info["spent"], state.step, done) == (INITIAL, INITIAL, 1, False)
    np.testing.assert_allclose(info["accuracy"], state.start, atol=1e-6)
    np.testing.assert_allclose(reward, info["accuracy"] / STEPS, rtol=1e-6)
    np.testing.assert_array_equal(after.mask, observation.mask)
    _, state, _, done, info = step(key, state, jnp.asarray([POOL, 5, 5]), params)
    assert info["row"].tolist() == [-1, 5, -1]
    assert (info["count"], done) == (INITIAL + 1, False)
    _, state, _, done, info = step(key, state, jnp.asarray([5, 6, 0]), params)
    assert info["row"].tolist() == [-1, 6, -1]
    assert done  # out of steps, though not of budget
    assert info["count"] == INITIAL + 2


def test_a_new_problem_begins_where_an_episode_ends(key, params):
    """Seven steps are two whole episodes and one step; the next problem and its labels are fresh."""
    env = environment(LEARNER, sampler, budget=BUDGET, k=K)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    observation, state = reset(key, params)
    counts, problems = [], []
    for number in range(7):
        problems.append(state.problem)
        action = random_action(jax.random.fold_in(key, number), observation.mask, K)
        observation, state, _, done, info = step(jax.random.fold_in(key, 50 + number), state, action, params)
        counts.append(int(info["count"]))  # of the episode that the step belongs to
        assert bool(done) == (number in (2, 5))
        if done:
            assert (state.step, state.active.count, state.done) == (0, INITIAL, False)
            assert np.flatnonzero(~observation.mask).tolist() == [0, 1]
            np.testing.assert_array_equal(state.active.labelled.x[:INITIAL], state.problem.x[:INITIAL])
            wanted = evaluate(LEARNER, state.active.params, state.problem.validation).accuracy
            np.testing.assert_allclose(state.accuracy, wanted, atol=1e-6)
    assert counts == [5, 8, 9, 5, 8, 9, 5]
    same = [bool((a.x == b.x).all()) for a, b in itertools.pairwise(problems)]
    assert same == [True, True, False, True, True, False]


def test_environments_under_vmap_are_each_alone(key, params):
    """Nine steps: every environment resets on its own, one by `lax.cond` and all by a select."""
    play = playing(9, budget=BUDGET, reward="labels", target=0.7)
    keys = jax.random.split(key, 5)
    many = jax.jit(jax.vmap(play, in_axes=(0, None)))(keys, params)[2]
    assert len({tuple(row) for row in many["done"].tolist()}) > 1
    for i in range(5):
        one = play(keys[i], params)[2]
        for name in ("action", "row", "done", "reward", "count"):
            np.testing.assert_array_equal(many[name][i], one[name])
        np.testing.assert_array_equal(many["observation"].mask[i], one["observation"].mask)
        np.testing.assert_allclose(many["accuracy"][i], one["accuracy"], atol=1e-6)
        np.testing.assert_allclose(many["observation"].seen[i], one["observation"].seen, atol=1e-4)


@pytest.mark.parametrize("reward", ["area", "labels"])
def test_an_exhausted_pool_ends_the_episode_and_the_rest_is_paid_at_once(key, params, reward):
    """Seven real rows, two of them given: five can be bought with a budget of nine."""
    few = changed(weight=(jnp.arange(POOL) < 7).astype(jnp.float32))
    target = 1.0 if reward == "labels" else None
    options = {"sample": few, "k": 2, "reward": reward, "target": target, "budget": BUDGET, "auto_reset": False}
    final, _, trace = playing(4, **options)(key, params)
    assert trace["count"].tolist() == [4, 6, 7, 7]
    assert trace["done"].tolist() == [False, False, True, True]
    mask = np.asarray(trace["observation"].mask)
    free = set(range(2, 7))
    for number in range(4):
        assert set(np.flatnonzero(mask[number]).tolist()) == free
        free -= set(trace["row"][number].tolist())
    assert (final.step, free) == (3, set())
    assert trace["accuracy"].max() < 1  # or the target would have ended it
    if reward == "area":  # the curve stays flat over the fourth step
        np.testing.assert_allclose(trace["reward"].sum(), trace["accuracy"].mean(), atol=1e-6)
    else:
        assert trace["reward"].tolist() == [-2, -2, -4, 0]


def test_the_mask_knows_costs(key, params):
    dear = changed(cost=jnp.where(jnp.arange(POOL) % 2 == 0, 1.0, 3.0))
    env = environment(LEARNER, dear, budget=7, auto_reset=False)
    step = jax.jit(env.step)
    observation, state = jax.jit(env.reset)(key, params)  # 1 + 3 are spent
    assert observation.mask.tolist() == [False] * 2 + [True] * 12
    observation, state, *_ = step(key, state, jnp.int32(2), params)
    assert np.flatnonzero(observation.mask).tolist() == [4, 6, 8, 10, 12]
    _, state, _, _, info = step(key, state, jnp.int32(3), params)
    assert (info["row"].tolist(), info["spent"]) == ([-1], 5)


def test_judged_on_the_test_rows_where_there_is_no_validation(key, params):
    none = changed(validation=lambda problem: problem.validation._replace(weight=jnp.zeros(20)))
    final, _, trace = playing(2, sample=none, budget=BUDGET, auto_reset=False)(key, params)
    wanted = evaluate(LEARNER, final.active.params, final.problem.test).accuracy
    assert wanted > 0
    np.testing.assert_allclose([trace["accuracy"][-1], final.accuracy], wanted, atol=1e-6)


def test_facts_and_the_default_observation(key, params):
    """Static facts need no drawn problem; the default observation against plain NumPy."""
    env = environment(LEARNER, sampler, budget=BUDGET, k=K, candidates=5)
    assert (env.num_actions(params), env.num_steps(params)) == (5, STEPS)
    whole = environment(LEARNER, sampler, budget=BUDGET)
    assert (whole.num_actions(params), whole.num_steps(params)) == (POOL, 7)
    shape = jax.eval_shape(env.reset, key, params)[0]
    assert (shape.seen.shape, shape.mask.shape) == ((5, 7), (5,))
    assert (shape.seen.dtype, shape.mask.dtype) == (jnp.float32, bool)
    observation, state = jax.jit(whole.reset)(key, params)
    logits = np.asarray(LEARNER.predict(state.active.params, state.problem.x).logits[0], np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.sort(probs)[:, ::-1]
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(-1) / np.log(3)
    wanted = np.column_stack(
        [best, entropy, best[:, 0] - best[:, 1], np.arange(POOL) >= 2, np.full(POOL, INITIAL / BUDGET)]
    )
    np.testing.assert_allclose(observation.seen, wanted, atol=1e-5)


def test_what_cannot_be(key, params):
    for message, options in {
        "budget must be at least 1": {"budget": 0},
        r"k must lie in 1\.\.4": {"k": 5},
        "reward must be": {"reward": "accuracy"},
        "a target belongs to the reward 'labels', got None": {"reward": "labels"},
        "a target belongs to the reward 'labels', got 0.5": {"target": 0.5},
        "target must lie in": {"reward": "labels", "target": 90.0},
        "2 candidates are fewer than k = 3": {"k": 3, "candidates": 2},
    }.items():
        with pytest.raises(ValueError, match=message):
            environment(LEARNER, sampler, **{"budget": 4, **options})
    for message, options in {
        "an initial set of 2 rows leaves nothing of a budget of 2": {"budget": 2},
        "15 candidates wanted, the pool has 14 rows": {"budget": 4, "candidates": 15},
        "capacity 15 is larger than the pool of 14 rows": {"budget": 15},
    }.items():
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(environment(LEARNER, sampler, **options).reset, key, params)
    env = environment(LEARNER, sampler, budget=4, k=2)
    _, state = jax.jit(env.reset)(key, params)
    for action in (jnp.int32(1), jnp.asarray([1, 2, 3]), jnp.asarray([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"an action is int32 \[2\], got"):
            env.step(key, state, action, params)
