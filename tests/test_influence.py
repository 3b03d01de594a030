"""Rules of influence and rules that refit, against plain float64 NumPy written from their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaal_jax import Batch, Learner, Prediction, acquisition, active_learner, check_learner, learners, models, tasks
from metaal_jax.learners.loss_prediction import predict_loss, ranking_loss
from views import make_view, probabilities


def predicted_view(learner, params, seed=0, n=20, **options):
    """`make_view` with the prediction of a learner and the labelled rows that belong to the index."""
    view = make_view(seed, n, **options)
    index = view.labelled_index
    labelled = Batch(
        x=jnp.where(index[:, None] >= 0, view.x[index], 7.0),
        y=jnp.where(index >= 0, (index * 5 + 1) % 4, 2),
        weight=(index >= 0).astype(jnp.float32),
    )
    return view._replace(
        prediction=learner.predict(params, view.x),
        params=params,
        meta=params,
        labelled=labelled,
        budget=jnp.float32(99),
    )


def extended(z):
    return np.concatenate([np.asarray(z, np.float64), np.ones((len(z), 1))], axis=1)


def plain_lengths(layers, x):
    """Expected gradient length of a ReLU network by backpropagation by hand; layers are (kernel, bias) pairs."""
    layers = [(np.asarray(kernel, np.float64), np.asarray(bias, np.float64)) for kernel, bias in layers]
    scores = []
    for row in np.asarray(x, np.float64):
        inputs = [row]
        for kernel, bias in layers[:-1]:
            inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
        p = probabilities(inputs[-1] @ layers[-1][0] + layers[-1][1])
        expected = 0.0
        for label in range(len(p)):
            delta, square = p - np.eye(len(p))[label], 0.0
            for depth in reversed(range(len(layers))):
                square += (np.outer(inputs[depth], delta) ** 2).sum() + (delta**2).sum()
                delta = (layers[depth][0] @ delta) * (inputs[depth] > 0)
            expected += p[label] * np.sqrt(square)
        scores.append(expected)
    return np.asarray(scores)


def layers_of(params):
    tree = params["params"]
    return [(tree[name]["kernel"], tree[name]["bias"]) for name in sorted(tree)]  # Dense_0, Dense_1, ..., head


@pytest.mark.parametrize("hidden", [(), (6, 5)])
def test_gradient_length_against_backpropagation(key, hidden):
    """With an integer among the parameters, which has no gradient; chunks do not matter."""
    base = learners.fine_tune(models.MLP(4, hidden=hidden), optimizer=optax.sgd(0.1), steps=1)
    learner = base._replace(predict=lambda params, x: base.predict(params["net"], x))
    view = make_view(0)
    params = {"net": base.init(key, view.x), "count": jnp.int32(3)}
    view = predicted_view(learner, params)
    got = jax.jit(acquisition.expected_gradient_length(learner, chunk=6))(key, view)
    np.testing.assert_allclose(got, plain_lengths(layers_of(params["net"]), view.x), rtol=1e-4)
    if not hidden:
        np.testing.assert_allclose(got, jax.jit(acquisition.head_gradient_length)(key, view), rtol=1e-5)


def test_gradient_length_of_a_committee(key):
    """The loss -log mean_m p_m has the gradient (share of m in the mean) (p_m - e_c) [x, 1]^T for each member."""
    base = learners.fine_tune(models.MLP(4, hidden=()), optimizer=optax.sgd(0.1), steps=1)
    learner = learners.committee(base, members=3, source="initialisation")
    params = learner.init(key, jnp.zeros((1, 3)))
    view = predicted_view(learner, params)
    got = jax.jit(acquisition.expected_gradient_length(learner))(key, view)
    members = probabilities(np.asarray(view.prediction.logits, np.float64))
    wanted = []
    for i, z in enumerate(extended(view.x)):
        p = members[:, i]
        total = 0.0
        for label in range(4):
            share = p[:, label] / p[:, label].sum()
            square = (share**2 * ((p - np.eye(4)[label]) ** 2).sum(-1)).sum() * (z @ z)
            total += p[:, label].mean() * np.sqrt(square)
        wanted.append(total)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_last_layer_rules_against_their_definitions(key):
    view = make_view(0)
    members = probabilities(np.asarray(view.prediction.logits, np.float64))
    p = members.mean(0)
    length = np.linalg.norm(extended(view.prediction.embedding[0]), axis=1)
    lengths = [sum(p[i, c] * np.linalg.norm(p[i] - np.eye(4)[c]) for c in range(4)) for i in range(20)]
    np.testing.assert_allclose(acquisition.head_gradient_length(key, view), lengths * length, rtol=1e-5)
    changes = [np.mean([np.linalg.norm(p[i] - member[i]) for member in members]) for i in range(20)]
    np.testing.assert_allclose(acquisition.expected_model_change(key, view), changes * length, rtol=1e-5)
    single = view._replace(prediction=view.prediction._replace(logits=view.prediction.logits[:1]))
    with pytest.raises(ValueError, match=r"expected_model_change.*committee"):
        acquisition.expected_model_change(key, single)


def test_head_gradient_length_does_not_saturate(key):
    """The largest probability is 1 in float32; the length of the other probabilities still counts."""
    gap = np.asarray([20.0, 30.0])
    logits = jnp.asarray([[[20.0, 0.0], [30.0, 0.0]]])
    view = make_view(0, n=2)._replace(prediction=Prediction(logits, jnp.zeros((1, 2, 3))))
    small = np.exp(-gap)
    np.testing.assert_allclose(acquisition.head_gradient_length(key, view), 2 * np.sqrt(2) * small, rtol=1e-5)


def ridge(batch_x, batch_y, weight, *, xp):
    x = xp.concatenate([batch_x, xp.ones((len(batch_x), 1))], axis=1) * weight[:, None]
    return xp.linalg.solve(x.T @ x + 0.5 * xp.eye(x.shape[1]), x.T @ (4 * xp.eye(4)[batch_y]))


def ridge_learner():
    """Logits by ridge regression on four times the one-hot classes: a learner in closed form."""

    def predict(params, x):
        return Prediction(logits=(x @ params[:-1] + params[-1:])[None], embedding=x[None])

    return Learner(
        init=lambda key, x: jnp.zeros((4, 4)),
        adapt=lambda key, meta, batch, **extra: ridge(batch.x, batch.y, batch.weight, xp=jnp),
        predict=predict,
        meta_grad=None,
    )


RIDGE = ridge_learner()


def plain_refit(view, rows, labels, x):
    """Probabilities at `x` after refitting with the labelled rows and `rows`."""
    known = np.asarray(view.labelled.weight) > 0
    train_x = np.concatenate([np.asarray(view.labelled.x, np.float64)[known], np.asarray(view.x, np.float64)[rows]])
    train_y = np.concatenate([np.asarray(view.labelled.y)[known], labels]).astype(int)
    params = ridge(train_x, train_y, np.ones(len(train_x)), xp=np)
    return probabilities(extended(x) @ params)


ERROR_REDUCTION = {
    loss: jax.jit(acquisition.expected_error_reduction(RIDGE, loss=loss, chunk=6)) for loss in ("log", "zero_one")
}


@pytest.mark.parametrize("labelled", [(), (7, 1, 12)])
def test_error_reduction_against_a_loop(key, labelled):
    view = predicted_view(RIDGE, RIDGE.init(key, None), queried=(4, 9), labelled=labelled, padding=3)
    view = view._replace(prediction=make_view(3, members=2).prediction, cost=view.cost.at[2].set(1000.0))
    left = [i for i in range(17) if i not in (4, 9, *labelled)]
    p = probabilities(np.asarray(view.prediction.logits, np.float64)).mean(0)
    wanted = {"log": [], "zero_one": []}
    now = {"log": -(p[left] * np.log(p[left])).sum(-1).mean(), "zero_one": (1 - p[left].max(-1)).mean()}
    for i in left:
        after = [plain_refit(view, [i], [label], np.asarray(view.x)[left]) for label in range(4)]
        wanted["log"].append(-sum(p[i, c] * -(q * np.log(q)).sum(-1).mean() for c, q in enumerate(after)))
        wanted["zero_one"].append(-sum(p[i, c] * (1 - q.max(-1)).mean() for c, q in enumerate(after)))
    affordable = np.asarray(left) != 2  # a row beyond the budget still belongs to the rest of the pool
    for loss, values in wanted.items():
        got = np.asarray(ERROR_REDUCTION[loss](key, view))
        wanted_scores = now[loss] + np.asarray(values)[affordable]
        np.testing.assert_allclose(got[left][affordable], wanted_scores, rtol=1e-4, atol=1e-5, err_msg=loss)
        others = np.setdiff1d(np.arange(20), np.asarray(left)[affordable])
        assert (got[others] == got[left].min()).all()


def test_refits_use_common_random_numbers(key):
    """A learner of nothing but noise is the same after every label."""
    noisy = RIDGE._replace(adapt=lambda key, meta, batch, **extra: jax.random.normal(key, (4, 4)))
    view = predicted_view(noisy, jnp.zeros((4, 4)))._replace(prediction=make_view(1).prediction)
    scores = jax.jit(acquisition.expected_error_reduction(noisy))(key, view)
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)
    oracle = acquisition.greedy_oracle(noisy, k=2)
    selection = Batch(view.x, jnp.zeros(20, jnp.int32), jnp.ones(20))
    scores = jax.jit(lambda key: oracle.act(key, (jnp.zeros(20, jnp.int32), selection), (), view)[0].scores)(key)
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)


def oracle_params(seed):
    rng = np.random.default_rng(seed)
    weight = (np.arange(15) < 12).astype(np.float32)  # the last rows of the selection set are padding
    selection = Batch(*map(jnp.asarray, (rng.normal(size=(15, 3)).astype(np.float32), rng.integers(0, 4, 15), weight)))
    return jnp.asarray(rng.integers(0, 4, 20), jnp.int32), selection


def run_oracle(policy):
    return jax.jit(lambda key, view, params: policy.act(key, params, policy.begin(key, params, view), view)[0])


ORACLE = run_oracle(acquisition.greedy_oracle(RIDGE, k=3, chunk=6))


@pytest.mark.parametrize("labelled", [(), (7, 1, 12)])
@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_against_a_loop(key, seed, labelled):
    view = predicted_view(RIDGE, RIDGE.init(key, None), seed, queried=(4, 9), labelled=labelled, padding=3)
    y, selection = oracle_params(seed)
    decision = ORACLE(key, view, (y, selection))
    left = [i for i in range(17) if i not in (4, 9, *labelled)]
    picks = []
    for turn in range(3):
        losses = {}
        for i in left:
            rows = [*picks, i]
            p = plain_refit(view, rows, np.asarray(y)[rows], np.asarray(selection.x)[:12])
            losses[i] = -np.log(p[np.arange(12), np.asarray(selection.y)[:12]]).mean()
        if turn == 0:
            np.testing.assert_allclose(np.asarray(decision.scores)[left], [-losses[i] for i in left], rtol=1e-4)
        picks.append(min(left, key=losses.get))
        left.remove(picks[-1])
    assert decision.index.tolist() == picks
    assert decision.valid.all()


def test_oracle_among_candidates(key):
    """It takes the best of the rows it tries; which these are is up to the key."""
    view = predicted_view(RIDGE, RIDGE.init(key, None), queried=(4,), labelled=(7, 1), padding=3)
    params = oracle_params(0)
    whole = np.asarray(ORACLE(key, view, params).scores)
    few = run_oracle(acquisition.greedy_oracle(RIDGE, k=1, candidates=3))
    seen = set()
    for one in jax.random.split(key, 6):
        decision = few(one, view, params)
        scores = np.asarray(decision.scores)
        best = int(decision.index[0])
        np.testing.assert_allclose(scores[best], whole[best], rtol=1e-4)
        assert len(np.unique(scores)) <= 3
        assert scores[best] == scores.max()
        seen.add(best)
    assert len(seen) > 1


@pytest.mark.parametrize("left", [(6, 11), ()])
def test_oracle_asks_for_what_is_left(key, left):
    view = predicted_view(RIDGE, RIDGE.init(key, None))
    view = view._replace(queried=~jnp.isin(view.row, jnp.asarray(left, jnp.int32)))
    for policy in (ORACLE, run_oracle(acquisition.greedy_oracle(RIDGE, k=3, candidates=4, loss="zero_one"))):
        decision = policy(key, view, oracle_params(0))
        assert set(decision.index[decision.valid].tolist()) == set(left)
        assert np.isfinite(decision.scores).all()


def test_oracle_is_above_and_random_below(key):
    """In the loop, on three overlapping classes; accuracy on test rows that the oracle never sees."""
    rng = np.random.default_rng(0)
    centres = 1.5 * rng.normal(size=(4, 3))
    y = rng.integers(0, 4, 500)
    x = (centres[y] + rng.normal(size=(500, 3))).astype(np.float32)
    problem = tasks.problem(x[:60], y[:60], x[160:], y[160:])
    selection = Batch(jnp.asarray(x[60:160]), jnp.asarray(y[60:160]), jnp.ones(100))
    oracle = acquisition.greedy_oracle(RIDGE, k=1, candidates=20)
    areas = {}
    for name, policy, params in (
        ("oracle", oracle, (problem.y, selection)),
        ("random", acquisition.top_k(acquisition.random, k=1), ()),
    ):
        active = active_learner(RIDGE, policy, capacity=10)

        def run(key, problem, params, active=active):
            init_key, loop_key = jax.random.split(key)
            meta = RIDGE.init(key, problem.x)
            state = active.init(init_key, meta, params, problem)
            body = lambda state, key: active.step(key, meta, params, state, problem)  # noqa: E731
            return jax.lax.scan(body, state, jax.random.split(loop_key, 10))[1].test.accuracy.mean()

        runs = jax.jit(jax.vmap(run, in_axes=(0, None, None)))
        areas[name] = np.asarray(runs(jax.random.split(key, 16), problem, params))
    gain = areas["oracle"] - areas["random"]
    assert gain.mean() - 3 * gain.std() / 4 > 0.05


LINEAR = learners.fine_tune(models.MLP(4, hidden=()), optimizer=optax.sgd(0.1), steps=1)
STEP = 0.3
GLISTER = acquisition.glister(LINEAR, k=4, step_size=STEP)


@jax.jit
def run_glister(key, view, params):
    return GLISTER.act(key, params, (), view)[0]


@pytest.mark.parametrize("labels", ["validation", "labelled"])
def test_glister_against_gradients_of_every_row(key, labels):
    """The gains of a small step by finite differences of the validation rows' log-likelihood."""
    view = predicted_view(LINEAR, LINEAR.init(key, jnp.zeros((1, 3))), queried=(4, 9), labelled=(7, 1), padding=3)
    if labels == "validation":
        rng = np.random.default_rng(5)
        x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 4, 8)
        params = judges = Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray([1.0] * 6 + [0.0] * 2))
    else:
        params, judges = (), view.labelled
    decision = run_glister(key, view, params)

    kernel, bias = layers_of(view.params)[0]
    head = np.concatenate([np.asarray(kernel, np.float64), np.asarray(bias, np.float64)[None]])
    z, real = extended(view.x), np.asarray(judges.weight) > 0
    z_judge, y_judge = extended(judges.x)[real], np.asarray(judges.y)[real]

    def likelihood(head):
        return np.log(probabilities(z_judge @ head)[np.arange(len(y_judge)), y_judge]).mean()

    p = probabilities(z @ head)
    steps = [np.outer(z[i], np.eye(4)[p[i].argmax()] - p[i]) for i in range(20)]
    left = [i for i in range(17) if i not in (4, 9, 7, 1)]
    picks = []
    for turn in range(4):
        gains = [(likelihood(head + 1e-6 * step) - likelihood(head - 1e-6 * step)) / 2e-6 for step in steps]
        if turn == 0:
            np.testing.assert_allclose(decision.scores[:17], gains[:17], rtol=1e-3, atol=1e-5)
        picks.append(max(left, key=lambda i: gains[i]))
        left.remove(picks[-1])
        head = head + STEP * steps[picks[-1]]
    assert decision.index.tolist() == picks


def test_glister_without_anything_to_judge_by(key):
    view = predicted_view(LINEAR, LINEAR.init(key, jnp.zeros((1, 3))))
    picks = {tuple(run_glister(one, view, ()).index.tolist()) for one in jax.random.split(key, 5)}
    assert len(picks) > 1


LOSS_LEARNER = learners.loss_predictor(models.MLP(3, hidden=(8,)), optimizer=optax.adam(0.02), steps=40, hidden=16)


def example(key, rows=12):
    return Batch(jax.random.normal(key, (rows, 4)), jnp.arange(rows, dtype=jnp.int32) % 3, jnp.ones(rows))


@pytest.mark.parametrize("detach", [True, False])
def test_loss_predictor_keeps_the_contract(key, detach):
    learner = learners.loss_predictor(
        models.MLP(3, hidden=(8,)), optimizer=optax.sgd(0.1), steps=2, hidden=4, detach=detach
    )
    check_learner(learner, key, example(key))
    assert {"params", "loss_head"} == set(learner.init(key, jnp.zeros((1, 4))))


def test_ranking_loss_against_a_loop():
    rng = np.random.default_rng(0)
    predicted, loss, weight = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.5, 2, size=8)
    loss[3], weight[5] = loss[2], 0.0
    total, pairs = 0.0, 0.0
    for i in range(8):
        for j in range(i):
            if loss[i] != loss[j]:
                larger, smaller = (i, j) if loss[i] > loss[j] else (j, i)
                total += weight[i] * weight[j] * max(0.0, 0.7 - (predicted[larger] - predicted[smaller]))
                pairs += weight[i] * weight[j]
    arrays = [jnp.asarray(values, jnp.float32) for values in (predicted, loss, weight)]
    np.testing.assert_allclose(ranking_loss(*arrays, margin=0.7), total / pairs, rtol=1e-5)
    grads = jax.grad(lambda loss: ranking_loss(arrays[0], loss, arrays[2]))(arrays[1])
    np.testing.assert_array_equal(grads, 0.0)
    assert ranking_loss(arrays[0], jnp.ones(8), arrays[2]) == 0


def test_loss_predictor_ranks_the_losses_it_was_trained_on(key):
    """Its classifier is that of plain fine-tuning; its predictions order the training rows by their loss."""
    batch = example(key)
    meta = LOSS_LEARNER.init(key, batch.x)
    params = jax.jit(LOSS_LEARNER.adapt)(key, meta, batch)
    plain = learners.fine_tune(models.MLP(3, hidden=(8,)), optimizer=optax.adam(0.02), steps=40)
    wanted = jax.jit(plain.adapt)(key, {"params": meta["params"]}, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params["params"], wanted["params"]
    )

    prediction = LOSS_LEARNER.predict(params, batch.x)
    p = probabilities(np.asarray(prediction.logits[0], np.float64))
    loss = -np.log(p[np.arange(12), np.asarray(batch.y)])
    view = make_view(0, n=12)._replace(prediction=prediction, params=params)
    scores = np.asarray(acquisition.predicted_loss(key, view))
    rank = lambda values: np.argsort(np.argsort(values))  # noqa: E731
    assert np.corrcoef(rank(scores), rank(loss))[0, 1] > 0.9


def test_predicted_loss_reads_the_loss_head(key):
    params = LOSS_LEARNER.init(key, jnp.zeros((1, 4)))
    view = make_view(0)._replace(params=params)
    view = view._replace(prediction=view.prediction._replace(embedding=jax.random.normal(key, (1, 20, 8))))
    first, last = (jax.tree.map(np.asarray, params["loss_head"][name]) for name in ("hidden", "out"))
    hidden = np.maximum(np.asarray(view.prediction.embedding[0]) @ first["kernel"] + first["bias"], 0)
    np.testing.assert_allclose(
        acquisition.predicted_loss(key, view), (hidden @ last["kernel"] + last["bias"])[:, 0], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"predicted_loss.*loss_predictor"):
        acquisition.predicted_loss(key, make_view(0))


def test_predicted_loss_of_a_committee_is_the_mean(key):
    committee = learners.committee(LOSS_LEARNER, members=3, source="initialisation")
    params = committee.init(key, jnp.zeros((1, 4)))
    prediction = committee.predict(params, jax.random.normal(key, (20, 4)))
    heads = [jax.tree.map(lambda leaf, m=m: leaf[m], params["loss_head"]) for m in range(3)]
    wanted = np.mean([predict_loss(head, prediction.embedding[m]) for m, head in enumerate(heads)], axis=0)
    view = make_view(0)._replace(prediction=prediction, params=params)
    np.testing.assert_allclose(acquisition.predicted_loss(key, view), wanted, rtol=1e-5)


def test_arguments_are_checked(key):
    view = make_view(0)
    model, adam = models.MLP(3), optax.adam(0.1)
    for message, wrong in {
        "expected_gradient_length: chunk": lambda: acquisition.expected_gradient_length(RIDGE, chunk=0),
        "expected_error_reduction: chunk": lambda: acquisition.expected_error_reduction(RIDGE, chunk=0),
        "expected_error_reduction: loss": lambda: acquisition.expected_error_reduction(RIDGE, loss="hinge"),
        "glister: k": lambda: acquisition.glister(RIDGE, k=0),
        "glister: step_size": lambda: acquisition.glister(RIDGE, k=1, step_size=0.0),
        "greedy_oracle: k": lambda: acquisition.greedy_oracle(RIDGE, k=0),
        "greedy_oracle: candidates": lambda: acquisition.greedy_oracle(RIDGE, k=1, candidates=0),
        "greedy_oracle: loss": lambda: acquisition.greedy_oracle(RIDGE, k=1, loss="hinge"),
        "greedy_oracle: the policy's parameters": lambda: acquisition.greedy_oracle(RIDGE, k=1).act(key, (), (), view),
        "cannot choose 21": lambda: acquisition.greedy_oracle(RIDGE, k=21).act(key, oracle_params(0), (), view),
        "loss_predictor: steps": lambda: learners.loss_predictor(model, optimizer=adam, steps=-1),
        "loss_predictor: hidden": lambda: learners.loss_predictor(model, optimizer=adam, steps=1, hidden=0),
        "loss_predictor: margin": lambda: learners.loss_predictor(model, optimizer=adam, steps=1, margin=0.0),
        "loss_predictor: strength": lambda: learners.loss_predictor(model, optimizer=adam, steps=1, strength=-1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
