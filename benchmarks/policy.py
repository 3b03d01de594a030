"""A learned policy at work: what a decision adds on 50,000 rows, and how many whole episodes a second training runs.

Claim: after a once-per-run `begin`, a decision of the shipped policy on 50,000 rows takes less than 100 ms, and less
than a tenth of the time in which a small convolutional network looks at the pool.

    python benchmarks/policy.py            # one minute on two cores
    python benchmarks/policy.py --quick    # a smoke test

`forward` is the strided Conv4 with 32 filters (chunks of 250) on random 28x28 images; the decisions' pool has random
embeddings of 128 features, ten classes and 90 labelled rows. `decision, 1` and `decision, 10` ask for that many rows,
`begin` prepares the pool's geometry, `max_herding` and `margin` are rules beside it. The scores of the first decision
are compared with a float64 form of the network on the same features. `evolution` and `reinforce` are a step of training
on pools of 600 rows with a linear layer: 100 labels in batches of ten.

Expected on two cores: a decision in 41 ms (batches of ten) and 50 ms (single rows), max_herding 230 ms, the network
735 ms; 58 episodes a second for evolution, 85 for reinforce. All figures: benchmarks/results/.
"""

import functools
import time
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import harness
import metaal_jax as ml
from harness import Candidate
from metaal_jax.base import Batch, Decision, Policy, PoolView, Prediction, Problem
from metaal_jax.policies import features
from metaal_jax.studies.options import FILE

CLASSES, WIDTH, LABELLED, CAPACITY = 10, 128, 90, 100
SHIPPED = "cifar10"


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    rows: int = 50_000
    """Rows of the pool."""
    pool: int = 600
    """Pool rows of a training episode."""
    problems: int = 4
    """Problems of a step of training."""
    episodes: int = 16
    """Episodes of each."""
    repeats: int = 7
    """Times that every candidate is run, in turn."""
    quick: bool = False
    """A smoke test: few rows and repeats; nothing is written unless `out` says where."""
    out: Annotated[str | None, FILE] = None
    """Where to write the result; by default benchmarks/results/<device>/policy.json."""


def make_view(rows: int) -> PoolView:
    """A pool as a linear layer on a frozen embedding sees it, clustered by class."""
    keys = jax.random.split(jax.random.key(0), 3)
    y = jax.random.randint(keys[0], (rows,), 0, CLASSES)
    centre = jax.random.normal(keys[1], (CLASSES, WIDTH))
    x = centre[y] + jax.random.normal(keys[2], (rows, WIDTH))
    index = jnp.where(jnp.arange(CAPACITY) < LABELLED, jnp.arange(CAPACITY), -1)
    logits = x @ centre.T / WIDTH
    return PoolView(
        x=x, row=jnp.arange(rows), weight=jnp.ones(rows), queried=jnp.arange(rows) < LABELLED, cost=jnp.ones(rows),
        prediction=Prediction(logits=logits[None], embedding=x[None]),
        labelled=Batch(x=x[:CAPACITY], y=y[:CAPACITY], weight=(index >= 0).astype(jnp.float32)),
        labelled_index=index.astype(jnp.int32), meta=(), params=(), budget=jnp.float32(CAPACITY),
        spent=jnp.float32(LABELLED),
    )  # fmt: skip


def decide(policy: Policy, params: Any, state: Any, key: Array, view: PoolView) -> tuple[Decision, Any]:
    """A decision and what changes of the state; the geometry, which does not, is passed on in a loop and not copied."""
    decision, state = policy.act(key, params, state, view)
    return decision, state.memory


def check_scores(saved: Any, policy: Any, state: Any, view: PoolView) -> None:
    """The decision's scores are the network's answer to the features, and its first row has the highest."""
    key = jax.random.key(1)
    seen = jax.device_get(jax.jit(policy.train.observe)(key, state, view))
    decision = jax.device_get(jax.jit(policy.act)(key, saved.params, state, view)[0])
    weights = saved.params["params"]
    factors = np.asarray(weights["factors"], np.float64)
    if "moves" in weights:
        factors = factors + seen.situation[list(saved.network.situation)].astype(np.float64) @ weights["moves"]
    rows, mean, scale = (np.asarray(value, np.float64) for value in (seen.rows, seen.mean, seen.scale))
    z = np.arcsinh(np.where(scale > 1e-5, (rows - mean) / np.where(scale > 1e-5, scale, 1.0), 0.0))
    wanted = np.concatenate([rows, z], 1) @ factors
    off = np.abs(wanted - decision.scores).max() / np.abs(wanted).max()
    best = np.where(seen.available, wanted, -np.inf)
    print(f"scores: off by {off:.1e}; the first row is {best.max() - best[decision.index[0]]:.1e} below the best")
    if off > 1e-3 or best.max() - best[decision.index[0]] > 1e-3:
        raise SystemExit("the decision is not that of the features; nothing was timed")


def decisions(config: Config) -> dict[str, Candidate]:
    """Decisions, what prepares them, rules beside them and the forward pass of a small network."""
    view = make_view(config.rows)
    saved = ml.policies.load(SHIPPED)
    key = jax.random.key(1)
    found: dict[str, Candidate] = {}
    for k in (1, 10):
        policy = ml.policies.learned(saved.network, k=k)
        state = jax.jit(policy.begin)(key, saved.params, view)
        state = state._replace(memory=features.remember(state.memory, view))
        if k == 1:
            check_scores(saved, policy, state, view)
            found["begin"] = harness.compiled(policy.begin, key, saved.params, view, work=config.rows)
        found[f"decision, {k}"] = harness.compiled(
            functools.partial(decide, policy), saved.params, state, key, view, work=config.rows
        )
    for name, rule in (("max_herding", ml.acquisition.max_herding(k=10)),
                       ("margin", ml.acquisition.top_k(ml.acquisition.margin, k=10))):  # fmt: skip
        state = jax.jit(rule.begin)(key, (), view)
        found[f"{name}, 10"] = harness.compiled(
            lambda s, k, v, rule=rule: rule.act(k, (), s, v), state, key, view, work=config.rows
        )
    model = ml.models.Conv4(CLASSES)
    learner = ml.learners.fine_tune(model, optimizer=optax.sgd(0.1), steps=0)
    images = jax.random.randint(key, (config.rows, 28, 28, 1), 0, 256).astype(jnp.uint8)
    weights = learner.init(key, images[:1])

    def forward(weights: Any, x: Array) -> Prediction:
        return ml.acquisition.predict_pool(learner, weights, x, chunk=250)

    found["forward"] = harness.compiled(forward, weights, images, work=config.rows)
    return found


def training(config: Config) -> dict[str, Candidate]:
    """A step of two ways to train; its work is the number of episodes."""
    model = ml.models.MLP(CLASSES, hidden=(), zero_head=True)
    learner = ml.learners.fine_tune(model, optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=50)

    def sampler(key: Array, data: Any) -> Problem:
        view = make_view(config.pool + 400)
        order = jax.random.permutation(key, config.pool + 400)
        y = jnp.argmax(view.prediction.logits[0], -1)
        pool, test = order[: config.pool], order[config.pool :]
        held = Batch(x=view.x[test], y=y[test], weight=jnp.ones(400))
        return Problem(x=view.x[pool], y=y[pool], weight=jnp.ones(config.pool), cost=jnp.ones(config.pool), test=held,
                       validation=held, initial=jnp.zeros(0, jnp.int32))  # fmt: skip

    network = ml.models.LinearNetwork(prior=ml.policies.prior(uncertain_cover=1.0))
    common: dict[str, Any] = {"optimizer": optax.adam(1e-2), "budget": CAPACITY, "k": 10, "problems": config.problems,
                              "chunk": 1 if jax.default_backend() == "cpu" else None}  # fmt: skip
    trainers = {
        "evolution": ml.policies.evolution(
            learner, ml.policies.learned(network, k=10, anchors=200), sampler, pairs=config.episodes // 2, **common
        ),
        "reinforce": ml.policies.reinforce(
            learner, ml.policies.learned(network, k=10, anchors=200, sample=True, candidates=48), sampler,
            rollouts=config.episodes, **common,
        ),
    }  # fmt: skip
    found = {}
    for name, trainer in trainers.items():
        meta = learner.init(jax.random.key(0), jnp.zeros((1, WIDTH)))
        state = jax.jit(trainer.init)(jax.random.key(0), meta, ())
        found[name] = harness.compiled(
            lambda key, state, trainer=trainer: trainer.step(key, state, ()), jax.random.key(1), state,
            work=config.problems * config.episodes,
        )  # fmt: skip
    return found


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(rows=4000, pool=100, problems=1, episodes=2, repeats=2, quick=True, out=config.out)
    harness.start(cores_as_devices=False)
    begin = time.perf_counter()
    times = harness.compare(decisions(config), repeats=config.repeats)
    pairs = [("forward", name) for name in times if name != "forward"]
    found = harness.rows("rows", times, pairs, {})
    found += harness.rows("episodes", harness.compare(training(config), repeats=max(config.repeats // 2, 1)), [], {})
    harness.finish("policy", config, begin, found)


if __name__ == "__main__":
    main()
