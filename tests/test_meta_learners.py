"""The family of meta-learners: their gradients against finite differences, definitions and each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metaal_jax import Batch, Task, check_learner, learners, models, outer_loop, parallel, tasks
from metaal_jax.base import empty_batch, pad_batch
from metaal_jax.learners import gradient_steps, through
from metaal_jax.losses import accuracy, cross_entropy

MLP = models.MLP(3, hidden=(8,))
CONV = models.Conv4(3, filters=4, blocks=1, norm="batch")
SGD = optax.sgd(0.3)
CURVED = {"optimizer": optax.sgd(0.5), "steps": 3}


class Smooth(nn.Module):
    """A float64 network without kinks, for finite differences."""

    norm: str = "none"

    @nn.compact
    def __call__(self, x, weight=None):
        x = nn.Dense(5, param_dtype=jnp.float64)(x)
        if self.norm == "batch":
            x = models.BatchNorm(param_dtype=jnp.float64)(x, weight)
        x = nn.tanh(x)
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(x), x


class Headless(nn.Module):
    """A network whose last layer has another name."""

    @nn.compact
    def __call__(self, x, weight=None):
        return nn.Dense(3, name="last")(x), x


FAMILY = {  # made for a model: name of a learner that gets its gradient through the adaptation
    "maml": lambda model: learners.maml(model, **CURVED),
    "maml, body": lambda model: learners.maml(model, **CURVED, adapted="body"),
    "maml, Adam": lambda model: learners.maml(model, optimizer=optax.adam(0.1, eps_root=1e-2), steps=2),
    "maml, minibatch": lambda model: learners.maml(model, **CURVED, minibatch=4),
    "maml, microbatch": lambda model: learners.maml(model, **CURVED, microbatch=4),
    "anil": lambda model: learners.anil(model, **CURVED),
    "anil, prototypes": lambda model: learners.anil(model, **CURVED, head="prototypes", learn=("temperature",)),
    "meta_sgd": lambda model: learners.meta_sgd(model, optimizer=optax.sgd(0.5), steps=2),
    "everything learned": lambda model: learners.maml(
        model, **CURVED, head="prototypes", rates="parameter", per_step=True, decay=0.1, proximal=0.2,
        learn=("decay", "proximal", "temperature", "steps"),
    ),
    "protonet": lambda model: learners.protonet(model, learn=("temperature",)),
    "r2d2": lambda model: learners.r2d2(model, ridge=0.5, scale=2.0),
    "r2d2, intercept": lambda model: learners.r2d2(model, ridge=0.5, scale=2.0, intercept=True),
    "metaoptnet": lambda model: learners.metaoptnet(model, learn=("scale", "penalty", "ridge")),
    "logistic": lambda model: learners.through(
        learners.closed_form(model, learners.logistic_head, settings={"ridge": 0.5}, learn=("ridge",), warm=True)
    ),
}  # fmt: skip
NORMED = {
    "maml, support statistics": lambda model: learners.maml(model, **CURVED, statistics="support"),
    "per-step norm": lambda model: learners.maml(model, **CURVED, per_step_norm=True),
    "r2d2, support statistics": lambda model: learners.r2d2(model, statistics="support"),
}
OTHERS = {
    "maml_plus_plus": lambda model: learners.maml_plus_plus(model, optimizer=SGD, steps=2, anneal_steps=10),
    "reptile": lambda model: learners.reptile(model, optimizer=SGD, steps=3, minibatch=3),
    "implicit_maml": lambda model: learners.implicit_maml(model, optimizer=SGD, steps=5, proximal=1.0),
}


def example(key, shape=(4,), rows=7):
    return Batch(
        x=jax.random.normal(key, (rows, *shape), jnp.float32),
        y=jnp.arange(rows, dtype=jnp.int32) % 3,
        weight=jnp.ones(rows, jnp.float32),
    )


@pytest.mark.parametrize("name", [*FAMILY, *NORMED, *OTHERS])
def test_contract(key, name):
    model, shape = (MLP, (4,)) if name in FAMILY else (CONV, (4, 4, 1))
    check_learner({**FAMILY, **NORMED, **OTHERS}[name](model), key, example(key, shape))


def task_in_float64(rows=6):
    keys = jax.random.split(jax.random.key(3), 3)
    support, query = (example(k, rows=rows)._replace(x=jax.random.normal(k, (rows, 4), jnp.float64)) for k in keys[:2])
    return keys[2], Task(support=pad_batch(support, rows + 2), query=query)


def differences(loss, meta, h=1e-5):
    """The gradient of a loss by central finite differences."""
    flat, unravel = ravel_pytree(meta)
    steps = h * jnp.eye(flat.size)
    up, down = (jax.lax.map(lambda d, s=s: loss(unravel(flat + s * d)), steps) for s in (1, -1))
    return (up - down) / (2 * h)


@pytest.mark.parametrize("name", [*FAMILY, *NORMED])
def test_meta_gradient_equals_finite_differences(name):
    with jax.enable_x64(True):
        key, task = task_in_float64()
        learner = FAMILY[name](Smooth()) if name in FAMILY else NORMED[name](Smooth("batch"))

        def loss(meta):
            params = learner.adapt(key, meta, task.support)
            return cross_entropy(learner.predict(params, task.query.x).logits[0], task.query.y, task.query.weight)

        @jax.jit
        def compare(meta):
            grads, metrics = learner.meta_grad(key, meta, task, step=jnp.int32(0))
            return ravel_pytree(grads)[0], differences(loss, meta), metrics["loss"] - loss(meta)

        meta = jax.jit(learner.init)(key, task.query.x)
        gradient, wanted, gap = compare(meta)
        assert gradient.dtype == jnp.float64
        assert abs(gap) < 1e-10
        np.testing.assert_allclose(gradient, wanted, atol=2e-6 if name == "metaoptnet" else 2e-8)
        for learned, leaf in jax.tree_util.tree_leaves_with_path(ravel_pytree(meta)[1](gradient)):
            if learned[0].key == "hyper":
                assert np.abs(leaf).max() > 1e-6, f"{learned} is not learned"


def test_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step():
    with jax.enable_x64(True):
        key, task = task_in_float64()
        weights = learners.annealed(3, 10)(jnp.asarray(4))
        np.testing.assert_allclose(weights, [0.2, 0.2, 0.6])
        np.testing.assert_allclose(learners.annealed(3, 10)(jnp.asarray(25)), [0, 0, 1])
        learner = through(gradient_steps(Smooth(), **CURVED), multi_step=learners.annealed(3, 10))

        def loss(meta):
            total = 0.0
            for steps, share in zip((1, 2, 3), weights, strict=True):
                params = learners.maml(Smooth(), optimizer=CURVED["optimizer"], steps=steps).adapt(
                    key, meta, task.support
                )
                total += share * cross_entropy(Smooth().apply(params, task.query.x)[0], task.query.y, task.query.weight)
            return total

        @jax.jit
        def compare(meta):
            grads, metrics = learner.meta_grad(key, meta, task, step=jnp.asarray(4))
            last = through(gradient_steps(Smooth(), **CURVED)).meta_grad(key, meta, task, step=jnp.asarray(4))[1]
            return ravel_pytree(grads)[0], ravel_pytree(jax.grad(loss)(meta))[0], metrics["loss"] - last["loss"]

        got, wanted, gap = compare(learner.init(key, task.query.x))
        np.testing.assert_allclose(got, wanted, atol=1e-10)
        assert abs(gap) < 1e-12


@pytest.mark.parametrize("adapted", ["all", "head"])
def test_implicit_gradient_tends_to_the_exact_one_as_its_solvers_converge(adapted):
    with jax.enable_x64(True):
        key, task = task_in_float64()
        options = {"optimizer": optax.sgd(0.2), "proximal": 2.0, "learn": ("proximal",), "adapted": adapted}

        @jax.jit
        def compare(meta):
            adaptation = gradient_steps(Smooth(), steps=150, **options)
            exact = ravel_pytree(through(adaptation).meta_grad(key, meta, task, step=jnp.int32(0))[0])[0]
            found = []
            for steps, solver_steps in ((1, 1), (10, 2), (150, 30)):
                learner = learners.implicit(gradient_steps(Smooth(), steps=steps, **options), solver_steps=solver_steps)
                grads, metrics = learner.meta_grad(key, meta, task, step=jnp.int32(0))
                found.append((ravel_pytree(grads)[0], metrics))
            return exact, found

        exact, found = compare(gradient_steps(Smooth(), steps=1, **options).init(key, task.query.x))
        errors = [float(np.abs(gradient - exact).max()) for gradient, _ in found]
        assert errors[0] > 2 * errors[1] > 1e3 * errors[2], errors
        assert errors[2] < 1e-7
        residuals = [float(metrics["residual"]) for _, metrics in found]
        assert residuals[0] > residuals[1] > 1e-4
        assert residuals[2] < 1e-7
        assert float(found[2][1]["stationarity"]) < 1e-8 < float(found[0][1]["stationarity"])


def test_implicit_gradient_takes_the_memory_of_few_steps(key):
    task = Task(example(key, (64,), 40), example(key, (64,), 40))
    model = models.MLP(3, hidden=(128,))

    def temporary(make, steps):
        learner = make(gradient_steps(model, optimizer=SGD, steps=steps, proximal=1.0))
        meta = jax.eval_shape(learner.init, key, task.query.x)
        step = jax.jit(lambda meta, task: learner.meta_grad(key, meta, task, step=jnp.int32(0))[0])
        return step.lower(meta, task).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary(lambda a: learners.implicit(a, solver_steps=3), steps) for steps in (4, 40))
    assert many < 1.1 * few
    assert temporary(through, 40) > 3 * temporary(through, 4)  # what it is compared with


def test_reptile_is_the_way_to_the_adapted_parameters(key):
    task = Task(example(key), example(jax.random.fold_in(key, 1)))
    learner = learners.reptile(MLP, optimizer=SGD, steps=2)

    @jax.jit
    def run(meta):
        loss = lambda params: cross_entropy(MLP.apply(params, task.support.x)[0], task.support.y, task.support.weight)  # noqa: E731
        params = meta
        for _ in range(2):
            params = jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))
        wanted = jax.tree.map(jnp.subtract, meta, params)
        return learner.meta_grad(key, meta, task, step=jnp.int32(0))[0], wanted

    got, wanted = run(jax.jit(learner.init)(key, task.query.x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 1e-2


def test_anil_and_the_body_alone_move_what_their_names_say(key):
    batch = example(key)
    for adapted in ("head", "body"):
        learner = learners.maml(MLP, optimizer=SGD, steps=2, adapted=adapted)
        meta = jax.jit(learner.init)(key, batch.x)
        params = jax.jit(learner.adapt)(key, meta, batch)
        for name, layer in params["params"].items():
            same = (layer["kernel"] == meta["params"][name]["kernel"]).all()
            assert same == ((name == "head") != (adapted == "head"))


def test_anil_is_maml_with_a_body_that_stays(key):
    """The embedding computed once gives what zero steps for the body give."""
    batch = example(key)
    still = optax.partition(
        {"head": SGD, "body": optax.set_to_zero()},
        lambda params: {"params": {name: "head" if name == "head" else "body" for name in params["params"]}},
    )
    for head in ("meta", "prototypes"):
        a = learners.anil(MLP, optimizer=SGD, steps=3, head=head)
        b = learners.maml(MLP, optimizer=still, steps=3, head=head)
        meta = jax.jit(a.init)(key, batch.x)
        jax.tree.map(
            lambda p, q: np.testing.assert_allclose(p, q, atol=1e-5),
            jax.jit(a.adapt)(key, meta, batch),
            jax.jit(b.adapt)(key, meta, batch),
        )


def adapted(learner, key, batch):
    meta = jax.jit(learner.init)(key, batch.x)
    return meta, jax.jit(learner.adapt)(key, meta, batch)


def test_learned_rates_begin_as_plain_steps_and_scale_them(key):
    batch = example(key)
    _, plain = adapted(learners.maml(MLP, optimizer=SGD, steps=2), key, batch)
    for options in ({"rates": "tensor"}, {"rates": "parameter", "per_step": True}):
        learner = learners.maml(MLP, optimizer=SGD, steps=2, **options)
        meta, same = adapted(learner, key, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, plain)
        doubled = {**meta, "hyper": jax.tree.map(lambda leaf: 2 * leaf, meta["hyper"])}
        _, wanted = adapted(learners.maml(MLP, optimizer=optax.sgd(0.6), steps=2), key, batch)
        got = jax.jit(learner.adapt)(key, doubled, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)


def test_a_closed_gate_ends_the_inner_loop(key):
    batch = example(key)
    learner = learners.maml(MLP, optimizer=SGD, steps=4, learn=("steps",))
    meta = jax.jit(learner.init)(key, batch.x)
    gated = {**meta, "hyper": {"gates": jnp.asarray([50.0, 50.0, -50.0, 50.0])}}  # the fourth cannot open again
    _, two = adapted(learners.maml(MLP, optimizer=SGD, steps=2), key, batch)
    got = jax.jit(learner.adapt)(key, gated, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, two)


def test_micro_batches_change_nothing_but_memory(key):
    batch = pad_batch(example(key, (8, 8, 1), 7), 9)
    model = models.Conv4(3, filters=4, blocks=1, norm="group", groups=2)
    for head in ("meta", "prototypes"):
        _, whole = adapted(learners.maml(model, optimizer=SGD, steps=2, head=head), key, batch)
        _, parts = adapted(learners.maml(model, optimizer=SGD, steps=2, head=head, microbatch=2), key, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)

    def temporary(microbatch):
        learner = learners.maml(models.Conv4(3), optimizer=SGD, steps=2, first_order=True, microbatch=microbatch)
        many = jax.eval_shape(lambda: example(key, (28, 28, 1), 256))
        meta = jax.eval_shape(learner.init, key, many.x)
        return jax.jit(learner.adapt).lower(key, meta, many).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < 0.3 * temporary(None)


def test_minibatches_are_real_rows_and_change_from_step_to_step(key):
    """With a linear loss in the rows the path shows which rows were seen: each step moves by one row alone."""
    batch = Batch(x=jnp.eye(6), y=jnp.zeros(6, jnp.int32), weight=jnp.asarray([1.0, 1, 1, 1, 0, 0]))
    adaptation = gradient_steps(models.MLP(2, hidden=()), optimizer=SGD, steps=12, minibatch=1)

    @jax.jit
    def run(meta):
        return adaptation.solve(key, adaptation.begin(meta, batch), path=True)

    kernel = run(jax.jit(adaptation.init)(key, batch.x))["params"]["head"]["kernel"]
    moved = np.abs(np.diff(kernel, axis=0)).max(-1) > 1e-7  # [steps - 1, rows]
    assert (moved.sum(1) == 1).all()
    assert moved[:, 4:].sum() == 0
    assert (moved.sum(0)[:4] > 0).all()


def test_rematerialised_steps_hold_the_activations_of_one(key):
    """Memory of 15 steps at most 1.5 times that of 5, and far less than without."""
    model, task = models.Conv4(5, norm="none"), Task(example(key, (28, 28, 1), 20), example(key, (28, 28, 1), 20))

    def temporary(steps, remat=True):
        learner = learners.maml(model, optimizer=SGD, steps=steps, remat=remat)
        meta = jax.eval_shape(learner.init, key, task.query.x)
        step = jax.jit(lambda meta, task: learner.meta_grad(key, meta, task, step=jnp.int32(0))[0])
        return step.lower(meta, task).compile().memory_analysis().temp_size_in_bytes

    five, fifteen = temporary(5), temporary(15)
    assert fifteen < 1.5 * five
    assert temporary(15, remat=False) > 2 * fifteen


def test_statistics_of_the_support_make_predictions_independent_of_their_neighbours(key):
    batch, rows = example(key, (4, 4, 1)), jax.random.normal(key, (6, 4, 4, 1))
    plain = learners.maml(CONV, optimizer=SGD, steps=1)
    _, params = adapted(plain, key, batch)
    fixed = jax.jit(lambda params, batch: learners.support_statistics(CONV, params, batch))(params, batch)
    predict = jax.jit(plain.predict)
    together, alone = predict(params, rows).logits[0, :3], predict(params, rows[:3]).logits[0]
    assert np.abs(together - alone).max() > 1e-2  # transductive
    together, alone = predict(fixed, rows).logits[0, :3], predict(fixed, rows[:3]).logits[0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(predict(fixed, batch.x).logits, predict(params, batch.x).logits, atol=1e-5)
    _, same = adapted(learners.maml(CONV, optimizer=SGD, steps=1, statistics="support"), key, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, fixed)
    padded = jax.jit(lambda params, batch: learners.support_statistics(CONV, params, batch))(
        params, pad_batch(batch, 9)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), padded, fixed)


@pytest.mark.parametrize("name", ["anil", "r2d2", "reptile", "maml_plus_plus", "everything learned"])
def test_tasks_by_loop_chunks_vmap_and_devices_agree(key, name):
    learner = {**FAMILY, **OTHERS}[name](CONV if name == "maml_plus_plus" else MLP)
    x = jax.random.normal(key, (40, *((4, 4, 1) if name == "maml_plus_plus" else (4,))))
    data = jax.device_put(tasks.class_data(np.asarray(x), np.arange(40) % 5))
    sampler = tasks.few_shot(ways=3, shots=2, queries=2)
    metas = []
    for chunk in (1, 2, None):
        outer = outer_loop(learner, sampler, optimizer=optax.sgd(0.1), tasks=4, chunk=chunk)
        state = jax.jit(outer.init)(key, x)
        metas.append(jax.jit(outer.step)(jax.random.fold_in(key, 0), state, data)[0].meta)
    outer = outer_loop(learner, sampler, optimizer=optax.sgd(0.1), tasks=4, axis_name=parallel.AXIS)
    # A run's first step has the key fold_in(key, 0): give the single devices' step the same.
    metas.append(parallel.outer_run(outer, steps=1)(key, state, data)[0].meta)
    for other in metas[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), metas[0], other)


def test_closed_forms_fit_what_they_are_given(key):
    """Three clusters in the embedding's own space: all heads find them, from unbalanced weighted rows."""
    centres = 4 * jnp.eye(3)
    x = (centres[:, None] + 0.3 * jax.random.normal(key, (3, 20, 3))).reshape(-1, 3)
    y = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 20)
    few = jnp.asarray([0, 1, 2, 3, 20, 21, 40])
    support = Batch(x=x[few], y=y[few], weight=jnp.ones(7))
    model = models.MLP(3, hidden=())
    for make in (learners.protonet, learners.r2d2, learners.metaoptnet):
        learner = make(model)
        _, params = adapted(learner, key, support)
        assert accuracy(learner.predict(params, x).logits[0], y, jnp.ones(60)) > 0.95


def test_transfer_takes_what_fits(key):
    batch = example(key)
    pretrained = jax.jit(learners.fine_tune(models.MLP(7, hidden=(8,)), optimizer=SGD, steps=1).init)(key, batch.x)
    fresh = jax.jit(learners.r2d2(MLP).init)(jax.random.fold_in(key, 1), batch.x)
    moved = learners.transfer(pretrained, fresh)
    assert jax.tree.structure(moved) == jax.tree.structure(fresh)
    np.testing.assert_array_equal(moved["params"]["Dense_0"]["kernel"], pretrained["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(moved["params"]["head"]["kernel"], fresh["params"]["head"]["kernel"])  # other classes
    with pytest.raises(ValueError, match="same network"):
        learners.transfer({"other": jnp.zeros(3)}, fresh)
    wider = jax.jit(learners.r2d2(models.MLP(3, hidden=(16,))).init)(key, batch.x)  # its head's bias would fit
    with pytest.raises(ValueError, match=r"Dense_0.* has shape \(8,\), wanted is \(16,\)"):
        learners.transfer(fresh, wider)


def test_growing_supports_from_nothing_train_every_learner(key):
    """0 to 8 labels, uneven over the classes: gradients are finite on each of many draws."""
    x = np.asarray(jax.random.normal(key, (60, 4)))
    data = jax.device_put(tasks.class_data(x, np.arange(60) % 3))
    keys = jax.random.split(key, 24)
    sampler = tasks.growing(ways=3, labels=8, queries=2)
    drawn = jax.jit(jax.vmap(lambda key: sampler(key, data)))(keys)
    assert drawn.support.weight.sum(1).min() == 0, "no draw without a label"
    bodies = jax.jit(jax.vmap(lambda key: MLP.init(key, jnp.asarray(x[:1]))["params"]))(keys)
    for name, make in {**FAMILY, "reptile": OTHERS["reptile"], "implicit_maml": OTHERS["implicit_maml"]}.items():
        learner = make(MLP)
        meta = learner.init(key, x[:1])
        assert jax.tree.structure(meta["params"]) == jax.tree.structure(bodies), name

        def one(key, params, task, learner=learner, meta=meta):
            return learner.meta_grad(key, {**meta, "params": params}, task, step=jnp.int32(0))[0]

        grads = jax.jit(jax.vmap(one))(keys, bodies, drawn)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)), name


def test_no_labels_give_the_meta_parameters_own_predictor(key):
    batch = example(key)
    for name in ("anil", "everything learned", "r2d2", "metaoptnet", "protonet"):
        learner = FAMILY[name](MLP)
        meta = jax.jit(learner.init)(key, batch.x)
        params = jax.jit(learner.adapt)(key, meta, empty_batch(batch.x, 7))
        jax.tree.map(np.testing.assert_array_equal, params, {"params": meta["params"]})


SINGULAR = {  # their derivative at a gradient of 0 is NaN
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "adam": optax.adam(0.1),
    "normalize_by_update_norm": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_an_optimiser_that_is_singular_at_0_and_a_task_without_labels(key, name):
    """Without labels the meta-gradient is that of pre-training on the query rows; without those, too, it is 0."""
    batch = example(key)
    nothing = empty_batch(batch.x, 7)
    plain = learners.fine_tune(MLP, optimizer=SGD, steps=1)
    for options in ({}, {"rates": "parameter", "per_step": True}, {"adapted": "head"}):
        learner = learners.maml(MLP, optimizer=SINGULAR[name], steps=2, **options)
        meta = learner.init(key, batch.x)

        @jax.jit
        def gradient(task, learner=learner, meta=meta):
            return learner.meta_grad(key, meta, task, step=jnp.int32(0))[0]

        for leaf in jax.tree.leaves(gradient(Task(nothing, nothing))):
            np.testing.assert_array_equal(leaf, 0.0)
        wanted = plain.meta_grad(key, {"params": meta["params"]}, Task(nothing, batch), step=jnp.int32(0))[0]
        got = gradient(Task(nothing, batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got["params"], wanted["params"])
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(got.get("hyper", {})))


def test_supervised_rows_have_the_sets_own_classes(key):
    x = np.zeros((12, 4, 4, 1), np.uint8)
    x[:, 0, 0, 0] = np.arange(12)
    data = jax.device_put(tasks.class_data(x, np.arange(12) % 3))
    task = jax.jit(tasks.minibatches(rows=200, rotations=True))(key, data)
    assert task.support.weight.sum() == 0
    corner = np.asarray(task.query.x)[..., 0]
    places = np.stack(
        [corner[:, 0, 0], corner[:, -1, 0], corner[:, -1, -1], corner[:, 0, -1]], 1
    )  # turned 0 to 3 times
    row, turn = places.max(1), places.argmax(1)
    seen = row > 0  # row 0 is all zeros, whichever way it is turned
    np.testing.assert_array_equal(task.query.y[seen], (3 * turn + row % 3)[seen])
    assert set(np.asarray(task.query.y)) == set(range(12))
    plain = jax.jit(tasks.minibatches(rows=50))(key, data)
    np.testing.assert_array_equal(plain.query.y, np.asarray(plain.query.x)[:, 0, 0, 0] % 3)


STEPS = gradient_steps(MLP, optimizer=SGD, steps=2)
RIDGE = learners.closed_form(MLP, learners.ridge_head, settings={"ridge": 1.0})
WRONG = {
    "first_order is about inner steps": lambda: through(RIDGE, first_order=True),
    "takes none": lambda: through(RIDGE, multi_step=lambda s: s),
    "says nothing of learned rates": lambda: learners.reptile_difference(
        gradient_steps(MLP, optimizer=SGD, steps=1, rates="tensor")
    ),
    "all parameters must start": lambda: learners.reptile_difference(
        gradient_steps(MLP, optimizer=SGD, steps=1, adapted="head")
    ),
    "use through for closed forms": lambda: learners.reptile_difference(RIDGE),
    "needs proximal > 0 or decay > 0": lambda: learners.implicit(STEPS, solver_steps=3),
    "its gradient is exact": lambda: learners.implicit(RIDGE, solver_steps=3),
    "does not depend on learned rates": lambda: learners.implicit(
        gradient_steps(MLP, optimizer=SGD, steps=1, proximal=1.0, rates="tensor"), solver_steps=1
    ),
    "minimum over all parameters does not depend": lambda: learners.implicit(
        gradient_steps(MLP, optimizer=SGD, steps=2, decay=0.1), solver_steps=3
    ),
    "first_order stops the gradients by which decay": lambda: learners.maml(
        MLP, optimizer=SGD, steps=2, first_order=True, decay=0.1, learn=("decay",)
    ),
    "embedding is computed once": lambda: gradient_steps(
        CONV, optimizer=SGD, steps=2, adapted="head", per_step_norm=True
    ),
    "needs all rows at once": lambda: gradient_steps(
        models.ResNet12(3, filters=(4,)), optimizer=SGD, steps=1, microbatch=2
    ),
    "temperature must be above 0": lambda: learners.protonet(MLP, temperature=0.0),
    "needs a last layer named 'head'": lambda: learners.anil(Headless(), optimizer=SGD, steps=1).init(
        jax.random.key(0), jnp.zeros((1, 4))
    ),
    "solver_steps must be a positive integer": lambda: learners.implicit_maml(
        MLP, optimizer=SGD, steps=1, proximal=1.0, solver_steps=0
    ),
    "'rate' cannot be learned": lambda: gradient_steps(MLP, optimizer=SGD, steps=1, learn=("rate",)),
    "a learned decay starts": lambda: gradient_steps(MLP, optimizer=SGD, steps=1, learn=("decay",)),
    "learn it with head='prototypes'": lambda: gradient_steps(MLP, optimizer=SGD, steps=1, learn=("temperature",)),
    "remat needs the steps in a loop": lambda: gradient_steps(MLP, optimizer=SGD, steps=2, remat=True, unroll=True),
    "optimizer must work from gradients alone, and this one asks for 'value', 'grad', and 'value_fn'": lambda: (
        learners.maml(MLP, optimizer=optax.lbfgs(), steps=1)
    ),
    "asks for 'value'; use optax.sgd": lambda: learners.fine_tune(MLP, optimizer=optax.polyak_sgd(), steps=1),
    "optimizer must be an Optax transformation such as optax.sgd.0.1., got 0.1": lambda: learners.meta_sgd(
        MLP, optimizer=0.1
    ),
    "per_step needs rates": lambda: gradient_steps(MLP, optimizer=SGD, steps=1, per_step=True),
    "a batch norm layer needs all rows": lambda: gradient_steps(CONV, optimizer=SGD, steps=1, microbatch=2),
    "adapted must be one of": lambda: gradient_steps(MLP, optimizer=SGD, steps=1, adapted="tail"),
    "statistics must be": lambda: learners.r2d2(MLP, statistics="running"),
    "no setting of this head": lambda: learners.protonet(MLP, learn=("ridge",)),
    "over must be a positive integer": lambda: learners.annealed(3, 0),
    "rows must be a positive integer": lambda: tasks.minibatches(rows=0),
    "has no norm layer": lambda: learners.maml_plus_plus(MLP, optimizer=SGD, steps=1, anneal_steps=1).init(
        jax.random.key(0), jnp.zeros((1, 4))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_together_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
