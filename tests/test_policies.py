"""Learned policies: features that know no data set, log-probabilities by enumeration, gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Answer, acquisition, check_policy, models, policies
from metaal_jax.loop import active_learner
from metaal_jax.policies import episodes, features
from metaal_jax.rows import squared_distances
from toys import NETWORKS, TOY, bent, jitted, labelled_view, toy_area, toy_problem, train
from views import make_view, probabilities, reorder

FEATURES = len(features.ROWS)


@functools.partial(jax.jit, static_argnames="k")
def look(view, memory=None, k=2):
    geometry = features.pool_geometry(jax.random.key(1), view, anchors=50)
    return features.observe(geometry, features.fresh_memory(view) if memory is None else memory, view, k=k)


class TestFeatures:
    def test_values_against_plain_forms(self):
        view = labelled_view()
        seen = look(view)
        value = lambda name: np.asarray(seen.rows[:, features.ROWS.index(name)])  # noqa: E731
        each = probabilities(np.asarray(view.prediction.logits, np.float64))
        p = each.mean(0)
        entropy = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
        top = np.sort(p, -1)
        np.testing.assert_allclose(value("confidence"), top[:, -1], rtol=1e-4)
        np.testing.assert_allclose(value("margin"), top[:, -1] - top[:, -2], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(value("entropy"), entropy(p) / np.log(4), rtol=1e-4)
        np.testing.assert_allclose(value("disagreement"), (entropy(p) - entropy(each).mean(0)) / np.log(4), rtol=1e-3)
        z = np.asarray(view.prediction.embedding[0], np.float64)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        square = ((z[:, None] - z[None]) ** 2).sum(-1)
        width = float(seen.width)
        kernel = np.exp(-square / width)
        known = np.array([3, 7, 8])
        np.testing.assert_allclose(value("nearness"), kernel[:, known].max(1), rtol=1e-3)
        np.testing.assert_allclose(value("density"), kernel.mean(1), rtol=1e-3)
        covered = kernel[known].max(0)
        gain = np.maximum(kernel - covered, 0)
        np.testing.assert_allclose(value("coverage"), gain.mean(1), rtol=1e-3, atol=1e-6)
        share = entropy(p) / np.log(4)
        doubt = 1 - top[:, -1] + top[:, -2]
        np.testing.assert_allclose(value("uncertain_cover"), (gain * doubt).mean(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(value("around"), (kernel * doubt).sum(1) / kernel.sum(1), rtol=1e-3)
        full = 4 * np.array([1, 2, 0, 0]) / 3
        np.testing.assert_allclose(value("filled"), p @ (full / (1 + full)), rtol=1e-4)
        truth = np.eye(4)[[1, 1, 0]]
        nearby = (kernel[:, known] @ truth + 0.01 / 4) / (kernel[:, known].sum(1) + 0.01)[:, None]
        np.testing.assert_allclose(value("dissent"), 1 - (p * nearby).sum(1), rtol=1e-3)
        situation = dict(zip(features.SITUATION, np.asarray(seen.situation), strict=True))
        assert situation["spent"] == 0.5
        assert situation["seen"] == 0.5
        np.testing.assert_allclose(situation["labels"], np.log1p(3 / 4) / 3, rtol=1e-5)
        np.testing.assert_allclose(situation["balance"], entropy(np.array([1, 2]) / 3) / np.log(4), rtol=1e-5)
        np.testing.assert_allclose(situation["covered"], covered.mean(), rtol=1e-3)
        shown = np.asarray(features.inputs(seen))
        free = np.asarray(view.available)
        z_entropy = (share - share[free].mean()) / share[free].std()
        column = FEATURES + features.ROWS.index("entropy")
        np.testing.assert_allclose(shown[:, column], np.arcsinh(z_entropy), rtol=1e-3, atol=1e-4)

    def test_memory_tells_what_changed_and_what_surprised(self):
        view = labelled_view()
        memory = jax.jit(features.remember)(features.fresh_memory(view), view)
        flipped = view.prediction._replace(logits=view.prediction.logits.at[:, 5].multiply(-1.0))
        index = view.labelled_index.at[3].set(5)
        labelled = view.labelled._replace(y=view.labelled.y.at[3].set((memory.predicted[5] + 1) % 4),
                                          weight=view.labelled.weight.at[3].set(1.0))  # fmt: skip
        seen = look(view._replace(prediction=flipped, labelled_index=index, labelled=labelled), memory)
        flip = np.asarray(seen.rows[:, features.ROWS.index("flip")])
        assert flip[5] == 1
        assert flip.sum() == 1
        surprise = seen.situation[features.SITUATION.index("surprise")]
        np.testing.assert_allclose(surprise, 0.8 * 0.75 + 0.2, rtol=1e-5)

    def test_rows_may_be_reordered_and_classes_renamed(self):
        view = labelled_view()
        seen = look(view)
        order = np.random.default_rng(1).permutation(20)
        moved = look(reorder(view, order))
        np.testing.assert_allclose(moved.rows, seen.rows[order], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moved.situation, seen.situation, rtol=1e-4, atol=1e-5)
        rename = jnp.asarray([2, 0, 3, 1])
        renamed = view._replace(
            prediction=view.prediction._replace(logits=view.prediction.logits[..., rename]),
            labelled=view.labelled._replace(y=jnp.argsort(rename)[view.labelled.y].astype(jnp.int32)),
        )
        other = look(renamed)
        np.testing.assert_allclose(other.rows, seen.rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.situation, seen.situation, rtol=1e-4, atol=1e-5)

    def test_padding_changes_nothing(self):
        view = labelled_view()
        grown = make_view(9, 26, classes=4)
        longer = lambda new, old: jnp.concatenate([old, new[20:]])  # noqa: E731
        rows = {name: longer(getattr(grown, name), getattr(view, name)) for name in ("x", "row", "queried", "cost")}
        prediction = jax.tree.map(
            lambda new, old: jnp.concatenate([old, new[:, 20:]], 1), grown.prediction, view.prediction
        )
        weight = jnp.concatenate([view.weight, jnp.zeros(6)])
        padded = look(view._replace(**rows, weight=weight, prediction=prediction))
        seen = look(view)
        np.testing.assert_allclose(padded.rows[:20], seen.rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(padded.situation, seen.situation, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("classes", [2, 10, 100])
    @pytest.mark.parametrize("members", [1, 3])
    def test_defined_from_the_cold_start_on_for_any_number_of_classes(self, classes, members):
        view = make_view(0, 30, classes=classes, members=members)
        uniform = view._replace(prediction=view.prediction._replace(logits=jnp.zeros((members, 30, classes))))
        first = uniform._replace(labelled_index=uniform.labelled_index.at[0].set(2))
        answers = [first._replace(labelled=first.labelled._replace(y=first.labelled.y.at[0].set(y),
                                                                   weight=first.labelled.weight.at[0].set(1.0)))
                   for y in (0, 1)]  # fmt: skip
        memory = features.remember(features.fresh_memory(uniform), uniform)
        one, other = (look(answer, memory) for answer in answers)
        np.testing.assert_allclose(one.situation, other.situation, rtol=1e-5)
        np.testing.assert_allclose(one.rows, other.rows, rtol=1e-5)
        for some in (view, uniform, view._replace(queried=jnp.ones(30, bool))):
            seen = look(some)
            assert np.isfinite(seen.rows).all()
            assert np.isfinite(features.inputs(seen)).all()
            assert np.isfinite(seen.situation).all()
        assert (np.abs(look(uniform).rows) <= 3.0).all()

    def test_a_picked_row_counts_as_labelled_for_what_is_covered(self):
        view = labelled_view()
        seen = look(view)
        after = jax.jit(features.picked)(seen, 11)
        index = view.labelled_index.at[3].set(11)
        queried = view.queried.at[11].set(True)
        truly = look(view._replace(labelled_index=index, queried=queried))
        for name in ("nearness", "coverage", "uncertain_cover"):
            column = features.ROWS.index(name)
            np.testing.assert_allclose(after.rows[:, column], truly.rows[:, column], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(after.mean[column], truly.mean[column], rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(after.scale[column], truly.scale[column], rtol=1e-3, atol=1e-6)
        assert not after.available[11]


@pytest.mark.parametrize("name", ["linear", "set"])
class TestLearned:
    @pytest.mark.parametrize(("k", "sample"), [(3, False), (1, True), (3, True)])
    def test_contract(self, name, k, sample, key):
        policy = policies.learned(NETWORKS[name], k=k, sample=sample, shortlist=12, anchors=10)
        check_policy(policy, key, make_view(0, 30, labelled=(1, 2), queried=(5,), padding=4), k=k)
        check_policy(policy, key, make_view(0, 8, labelled=(1, 2), queried=(3, 4, 5), padding=1), k=k)

    def test_a_plan_is_a_batch_of_one_row_a_class(self, name, key):
        view = make_view(0, 30, labelled=(1, 2), queried=(5,), classes=4)
        policy, batch = (jitted(policies.learned(NETWORKS[name], k=k, plan=10)) for k in (1, 4))
        check_policy(policy, key, view, k=1)
        params = bent(batch.init(key), key)
        wanted, _ = batch.act(key, params, batch.begin(key, params, view), view)
        state, asked = policy.begin(key, params, view), []
        for turn in range(5):
            seen = view._replace(queried=view.queried.at[jnp.asarray(asked, int)].set(True))
            decision, state = policy.act(key if turn == 0 else jax.random.fold_in(key, turn), params, state, seen)
            asked.append(int(decision.index[0]))
        assert asked[:4] == wanted.index.tolist()
        assert len(set(asked)) == 5
        assert batch.train is None  # how many classes there are is not known before it acts
        assert policies.learned(NETWORKS[name], k=10, plan=10).train is not None

    def test_log_probabilities_by_enumeration(self, name, key):
        """All ordered batches of a tiny pool: `evaluate` sums to 1, agrees with `act`, and with how often it draws."""
        policy = jitted(policies.learned(NETWORKS[name], k=2, sample=True))
        view = make_view(0, 5, labelled=(1,))
        params = bent(policy.init(key), key)
        state = policy.begin(key, params, view)
        batches = jnp.asarray(list(itertools.permutations([0, 2, 3, 4], 2)), jnp.int32)
        observation = policy.train.observe(key, state, view)
        log_prob = jax.jit(jax.vmap(lambda index: policy.train.evaluate(params, observation, index)[0]))(batches)
        np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-4)
        keys = jax.random.split(key, 4000)
        drawn = jax.jit(jax.vmap(lambda key: policy.act(key, params, state, view)[0]))(keys)
        which = (drawn.index[:, None] == batches).all(-1)
        assert which.any(1).all()
        np.testing.assert_allclose(drawn.log_prob, log_prob[which.argmax(1)], rtol=1e-3, atol=1e-4)
        share, prob = np.asarray(which.mean(0)), np.exp(np.asarray(log_prob))
        assert (np.abs(share - prob) < 4 * np.sqrt(prob * (1 - prob) / 4000) + 1e-3).all()

    def test_the_second_pick_knows_the_first(self, name, key):
        """With scores that are the gain in coverage, the batch is that of greedy coverage, step by step."""
        network = type(NETWORKS[name])(prior=policies.prior(coverage=1.0))
        policy = jitted(policies.learned(network, k=4))
        view = make_view(2, 25)
        params = policy.init(key)
        state = policy.begin(key, params, view)
        decision, _ = policy.act(key, params, state, view)
        kernel = np.asarray(jnp.exp(-squared_distances(*(2 * [state.geometry.embedding])) / state.geometry.width))
        covered, wanted = np.zeros(25), []
        for _ in range(4):
            gain = np.maximum(kernel - covered, 0).sum(1)
            gain[wanted] = -1
            wanted.append(int(gain.argmax()))
            covered = np.maximum(covered, kernel[wanted[-1]])
        assert decision.index.tolist() == wanted

    def test_order_of_rows_does_not_matter(self, name, key):
        policy = policies.learned(NETWORKS[name], k=3, sample=True)
        view = labelled_view()
        params = bent(policy.init(key), key)
        act = jax.jit(lambda view: policy.act(key, params, policy.begin(key, params, view), view)[0])
        order = np.random.default_rng(1).permutation(20)
        assert order[act(reorder(view, order)).index].tolist() == act(view).index.tolist()

    @pytest.mark.parametrize(("classes", "n", "members"), [(2, 50, 1), (10, 50, 3), (100, 50_000, 1)])
    def test_one_policy_for_all_sizes(self, name, classes, n, members, key):
        policy = policies.learned(NETWORKS[name], k=2, anchors=100)
        params = policy.init(key)
        view = make_view(0, n, classes=classes, members=members, labelled=(4,))
        decision, _ = jax.jit(lambda v: policy.act(key, params, policy.begin(key, params, v), v))(view)
        assert decision.valid.all()
        assert not view.queried[decision.index].any()


def test_bad_arguments_are_refused():
    network = NETWORKS["row"]
    with pytest.raises(ValueError, match="no row feature is named 'margins'"):
        policies.prior(margins=1.0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        policies.learned(network, k=0)
    with pytest.raises(ValueError, match="a plan is not drawn"):
        policies.learned(network, k=1, plan=10, sample=True)
    with pytest.raises(ValueError, match="3 candidates are too few for batches of 5"):
        policies.learned(network, k=5, candidates=3)
    with pytest.raises(ValueError, match="no rules given"):
        policies.selector([], network, k=1)
    with pytest.raises(ValueError, match="rule 0 has parameters"):
        policies.selector([policies.learned(network, k=1)], network, k=1)
    options = {"optimizer": optax.sgd(0.1), "budget": 4}
    fixed = acquisition.top_k(acquisition.margin, k=1)
    with pytest.raises(ValueError, match="cannot be trained"):
        policies.reinforce(TOY, fixed, toy_problem, **options)
    with pytest.raises(ValueError, match="a budget of 4 must be a positive multiple of k=3"):
        policies.ppo(TOY, policies.learned(network, k=3, sample=True), toy_problem, k=3, **options)
    with pytest.raises(ValueError, match="at least 2 rollouts, got 1"):
        policies.reinforce(TOY, policies.learned(network, k=1, sample=True), toy_problem, rollouts=1, **options)
    with pytest.raises(ValueError, match="reward must be one of"):
        policies.ppo(TOY, policies.learned(network, k=1, sample=True), toy_problem, reward="gold", **options)
    with pytest.raises(ValueError, match="has no score"):
        policies.pathwise(TOY, policies.selector([fixed], network, k=1), toy_problem, **options)
    with pytest.raises(ValueError, match="estimator must be one of"):
        policies.pathwise(TOY, policies.learned(network, k=1), toy_problem, estimator="gold", **options)
    with pytest.raises(ValueError, match="no parameters to train"):
        train(policies.evolution(TOY, fixed, toy_problem, **options), jax.random.key(0), 1)
    with pytest.raises(ValueError, match="deviation must be > 0"):
        policies.evolution(TOY, fixed, toy_problem, deviation=0.0, **options)
    with pytest.raises(ValueError, match="capacity of 2 does not hold the 16 rounds"):
        policies.supervised(TOY, policies.learned(network, k=1), toy_problem, capacity=2, **options)


def test_a_trained_policy_is_a_rule_like_any_other(key):
    network = NETWORKS["linear"]
    policy = policies.learned(network, k=2)
    params = bent(policy.init(key), key)
    rule = policies.fixed(policy, params)
    view = labelled_view()
    act = lambda policy, params: policy.act(key, params, policy.begin(key, params, view), view)[0]  # noqa: E731
    wanted, found = jax.jit(lambda: (act(policy, params), act(rule, ())))()
    assert found.index.tolist() == wanted.index.tolist()
    both = policies.selector([rule, acquisition.top_k(acquisition.random, k=2)], NETWORKS["row"], k=2)
    decision = jax.jit(lambda p: act(both, p))(both.init(key))
    assert decision.valid.all()


def test_a_trainer_wants_a_policy_that_draws_as_many_rows(key):
    network = NETWORKS["row"]
    options = {"optimizer": optax.sgd(0.1), "budget": 4}
    for train_by in (policies.reinforce, policies.ppo):
        with pytest.raises(ValueError, match="give it sample=True"):
            train_by(TOY, policies.learned(network, k=1), toy_problem, **options)
    trainer = policies.reinforce(TOY, policies.learned(network, k=2, sample=True), toy_problem, **options)
    with pytest.raises(ValueError, match="asks for 2 rows a round, the trainer for k=1"):
        train(trainer, key, 1)


def test_what_is_drawn_is_what_is_evaluated(key):
    """With candidates, and in a pool that is longer than the shortlist; the first minibatch of PPO is not clipped."""
    policy = jitted(policies.learned(NETWORKS["row"], k=3, sample=True, candidates=15, shortlist=8))
    view = make_view(0, 40, labelled=(1,))
    params = bent(policy.init(key), key)
    state = policy.begin(key, params, view)

    @jax.jit
    def both(key):
        decision = policy.act(key, params, state, view)[0]
        return decision.log_prob, policy.train.evaluate(params, policy.train.observe(key, state, view), decision.index)[
            0
        ]

    drawn, evaluated = jax.vmap(both)(jax.random.split(key, 8))
    np.testing.assert_allclose(drawn, evaluated, rtol=1e-3, atol=1e-4)
    seen = policy.train.observe(key, state, view)
    elsewhere = jnp.setdiff1d(jnp.arange(40), seen.position)[:3].astype(jnp.int32)
    assert policy.train.evaluate(params, seen, elsewhere)[0] == -jnp.inf
    trainer = policies.ppo(TOY, policies.learned(NETWORKS["row"], k=1, sample=True), toy_problem, budget=4,
                           optimizer=optax.sgd(0.0), episodes=4, minibatches=1)  # fmt: skip
    assert train(trainer, key, 1)[1]["clipped"] == 0


def test_padding_leaves_a_batch_alone(key):
    """Few rows left of a pool shorter than the shortlist, padded to be longer: greedy coverage in both."""
    policy = policies.learned(models.RowNetwork(prior=policies.prior(coverage=1.0)), k=2, shortlist=40, anchors=100)
    params = policy.init(key)
    view = make_view(0, 50, labelled=(1, 2), queried=(0, *range(3, 17)), padding=25)
    short = jax.tree.map(lambda leaf: leaf, view)._replace(
        **{name: getattr(view, name)[:25] for name in ("x", "row", "weight", "queried", "cost")},
        prediction=jax.tree.map(lambda leaf: leaf[:, :25], view.prediction),
    )
    act = jax.jit(lambda view: policy.act(key, params, policy.begin(key, params, view), view)[0])
    assert act(view).index.tolist() == act(short).index.tolist()


def test_the_policy_gradient_is_that_of_the_expected_return(key):
    """The mean of `reinforce`'s steps against finite differences of the return, enumerated over all episodes."""
    network = NETWORKS["row"]
    policy = policies.learned(network, k=1, sample=True)
    problem = toy_problem(key, (), n=4)
    sampler = lambda key, data: problem  # noqa: E731
    start = bent(policy.init(key), key, 0.3)
    flat, back = jax.flatten_util.ravel_pytree(start)
    active = active_learner(TOY, episodes.recorded(policy), capacity=2)
    meta = jnp.zeros(())

    def probability_and_return(params, order):
        state = active.init(key, meta, params, problem)
        log_prob, gained = 0.0, 0.0
        for row in order:
            decision, state = active.ask(key, meta, params, state, problem)
            log_prob += policy.train.evaluate(params, state.policy_state.observation, row[None])[0]
            decision = decision._replace(index=row[None], valid=jnp.ones(1, bool))
            state = active.tell(key, meta, state, problem, decision, Answer(problem.y[row[None]]))
            logits = TOY.predict(state.params, problem.test.x).logits[0]
            gained += (logits.argmax(-1) == problem.test.y).mean() / 2
        return log_prob, gained

    orders = jnp.asarray(list(itertools.permutations(range(4), 2)), jnp.int32)

    @jax.jit
    def expected(vector):
        log_prob, gained = jax.vmap(lambda order: probability_and_return(back(vector), order))(orders)
        return (jnp.exp(log_prob) * gained).sum(), jnp.exp(log_prob).sum()

    _, total = expected(flat)
    np.testing.assert_allclose(total, 1.0, rtol=1e-4)
    directions = jax.random.normal(jax.random.key(5), (4, flat.size)) / np.sqrt(flat.size)
    wanted = [float(expected(flat + 0.05 * d)[0] - expected(flat - 0.05 * d)[0]) / 0.1 for d in directions]
    trainer = policies.reinforce(TOY, policy, sampler, optimizer=optax.sgd(1.0), budget=2, problems=1, rollouts=2)

    @jax.jit
    @jax.vmap
    def gradient(key):
        state = trainer.init(key, meta, ())._replace(params=start)
        after, _ = trainer.step(key, state, ())
        return jax.flatten_util.ravel_pytree(after.params)[0] - flat

    found = np.asarray(gradient(jax.random.split(key, 4000)) @ directions.T)
    error = found.std(0) / np.sqrt(4000)
    assert (np.abs(found.mean(0) - wanted) < 4 * error + 2e-3).all(), (found.mean(0), wanted, error)
    assert np.abs(wanted).max() > 10 * error.max()


@pytest.mark.parametrize("k", [1, 3])
def test_relaxed_choice_tends_to_the_hard_one(k, key):
    policy = jitted(policies.learned(NETWORKS["row"], k=k))
    view = labelled_view()
    params = bent(policy.init(key), key)
    seen = policy.train.observe(key, policy.begin(key, params, view), view)
    noise = jax.random.gumbel(key, (k, 20))
    relax = jax.jit(functools.partial(policies.relaxed_batch, policy.train.score))
    hard = np.zeros(20)
    distance = []
    for temperature in (1.0, 0.3, 0.1, 0.001):
        place, valid, soft = relax(params, seen, noise, temperature=temperature)
        hard[np.asarray(place)] = 1
        np.testing.assert_allclose(soft.sum(), k, rtol=1e-4)
        assert valid.all()
        assert (np.asarray(soft)[np.asarray(view.queried)] == 0).all()
        distance.append(float(np.abs(soft - hard).sum()))
    assert hard.sum() == k
    assert distance[0] > distance[1] > distance[2]
    assert distance[-1] < 1e-3

    target = jax.random.normal(jax.random.key(4), (20,))
    flat, back = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def value(vector):
        return relax(back(vector), seen, noise, temperature=1.0)[2] @ target

    grad = jax.grad(value)(flat)
    direction = jax.random.normal(key, flat.shape)
    difference = (value(flat + 1e-2 * direction) - value(flat - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(grad @ direction, difference, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
def test_gradients_at_the_hard_choice(estimator, key):
    """One pick that enters a loss quadratically: ReinMax is exact in the mean over all picks, a tangent is not."""
    policy = jitted(policies.learned(NETWORKS["row"], k=1))
    view = make_view(0, 6)
    params = bent(policy.init(key), key)
    seen = policy.train.observe(key, policy.begin(key, params, view), view)
    scores = policy.train.score(params, seen)[0]
    linear, square = jax.random.normal(key, (6,)), jax.random.normal(jax.random.fold_in(key, 1), (6, 6))
    loss = lambda choice: linear @ choice + choice @ square @ choice  # noqa: E731
    each = jax.jit(jax.vmap(loss))(jnp.eye(6))
    exact = jax.jit(jax.grad(lambda scores: jax.nn.softmax(scores) @ each))(scores)

    @jax.jit
    def estimate(place):
        noise = 1e3 * jax.nn.one_hot(place, 6)[None]
        score = lambda scores, seen: (scores, jnp.zeros(()))  # noqa: E731

        def of(scores):
            chosen, _, choice = policies.relaxed_batch(score, scores, seen, noise, temperature=1.0, estimator=estimator)
            return loss(choice), (chosen, choice)

        grad, (chosen, choice) = jax.grad(of, has_aux=True)(scores)
        return grad, chosen[0], choice

    grads, chosen, choice = jax.lax.map(estimate, jnp.arange(6))
    assert chosen.tolist() == list(range(6))
    np.testing.assert_allclose(choice, jnp.eye(6), atol=1e-5)
    wrong = float(jnp.abs(jax.nn.softmax(scores) @ grads - exact).max())
    assert wrong < 1e-5 if estimator == "reinmax" else wrong > 1e-2


class TestSelector:
    rules = (acquisition.top_k(acquisition.entropy, k=2), acquisition.top_k(acquisition.least_confident, k=2),
             acquisition.top_k(acquisition.random, k=2))  # fmt: skip

    def test_contract_and_batches_of_equal_rules_add_up(self, key):
        policy = jitted(policies.selector(self.rules, NETWORKS["row"], k=2, sample=True))
        view = make_view(0, 20, labelled=(1, 2), padding=3, members=1, classes=2)
        check_policy(policy, key, view, k=2)
        params = bent(policy.init(key), key)
        state = policy.begin(key, params, view)
        seen = policy.train.observe(key, state, view)
        # With two classes entropy and confidence order alike, so the first two rules propose the same rows.
        assert set(seen.index[0].tolist()) == set(seen.index[1].tolist()) != set(seen.index[2].tolist())
        both = policy.train.evaluate(params, seen, seen.index[0])[0]
        third = policy.train.evaluate(params, seen, seen.index[2])[0]
        np.testing.assert_allclose(jnp.exp(both) + jnp.exp(third), 1.0, rtol=1e-4)

    def test_reinforcement_finds_the_better_rule(self, key):
        rules = [acquisition.top_k(scorer, k=1) for scorer in (lambda k, v: -acquisition.entropy(k, v),
                                                               acquisition.entropy)]  # fmt: skip
        policy = policies.selector(rules, NETWORKS["row"], k=1, sample=True)
        trainer = policies.reinforce(TOY, policy, toy_problem, optimizer=optax.adam(0.05), budget=4, rollouts=4)
        state, _ = train(trainer, key, 30)
        assert toy_area(policies.selector(rules, NETWORKS["row"], k=1), state.params, key, 1) == 0.875
