"""128 active-learning experiments as one compiled program, beside the same experiments in PyTorch.

Claim: after compilation, one program that uses all cores runs the experiments more than 25 times as fast as a PyTorch
loop over seeds and more than three times as fast as PyTorch batched over seeds.

    python benchmarks/loop.py            # 80 s on two cores
    python benchmarks/loop.py --quick    # a smoke test

An experiment: digits, a pool of 1000, ten rounds of ten labels by margin sampling, a linear head on the 64 pixels that
starts at zero and is trained anew in every round by 100 full-batch steps of Adam, the test accuracy after every round.
The first batch is random (all margins tie) and handed to PyTorch, which therefore neither predicts nor sorts for it.
Before anything is timed, all versions must pick the same rows and reach the same accuracies. Adam's epsilon is 1e-4:
with 1e-8 it turns the rounding noise of gradients that ought to be zero into steps, and the versions part ways.

PyTorch: `per seed` is the loop as one writes it (`nn.Linear`, the fused `optim.Adam`), timed on a few of the seeds;
`batched` has parameters with a leading axis of seeds, `baddbmm` and one fused Adam for all of them, with one thread or
all cores, whichever is faster. Both adapt on the labelled rows alone, the compiled programs on a padded buffer: of 100
rows in `one vmap`, of 20, 40, ... 100 rows in `groups`, where the rounds run in segments of growing capacity and the
seeds in groups that fit the cache. `groups, all devices` spreads them over the cores, each forced to be a device.

Expected, on two cores: 359 experiments a second in groups on both, 192 in groups, 135 by one vmap, 96 by batched
PyTorch, 11.3 by the PyTorch loop; 32 times the loop and 3.7 times batched PyTorch. The loop uses one core: one process
a core would at best double it, and 17 times is the ratio of one core to one. All figures:
benchmarks/results/cpu-2/loop.json.
"""

import time
from collections.abc import Callable
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
from metaal_jax import data
from metaal_jax.base import Problem
from metaal_jax.loop import grow
from metaal_jax.studies.options import FILE

POOL, ROUNDS, K, CLASSES = 1000, 10, 10, 10
RATE, EPSILON = 0.05, 1e-4

Picks = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    seeds: int = 128
    """Experiments of one program."""
    steps: int = 100
    """Adam steps of a round."""
    group: int = 32
    """Seeds vmapped at a time in `groups`."""
    segments: int = 5
    """Segments of growing capacity in `groups`, a divisor of the ten rounds."""
    loop_seeds: int = 8
    """Seeds on which a call of the PyTorch loop is timed; its time is proportional to them."""
    repeats: int = 9
    """Times that every candidate is run, in turn."""
    checked: int = 128
    """Seeds whose picks and accuracies must agree."""
    quick: bool = False
    """A smoke test: few seeds, steps and repeats; nothing is written unless `out` says where."""
    out: Annotated[str | None, FILE] = None
    """Where to write the result; by default benchmarks/results/<device>/loop.json."""


def make_run(steps: int, segments: int) -> Callable[[Array, Problem], tuple[Array, Array]]:
    """One experiment: `(key, problem) -> (rows asked for [rounds, k], test accuracy [rounds])`."""
    optimizer = optax.adam(RATE, eps=EPSILON)
    learner = ml.learners.fine_tune(ml.models.MLP(CLASSES, hidden=(), zero_head=True), optimizer=optimizer, steps=steps)
    policy = ml.acquisition.top_k(ml.acquisition.margin, k=K)
    each = ROUNDS // segments
    capacities = [each * K * (segment + 1) for segment in range(segments)]
    actives = [ml.active_learner(learner, policy, capacity=capacity) for capacity in capacities]

    def run(key: Array, problem: Problem) -> tuple[Array, Array]:
        init_key, meta_key, loop_key = jax.random.split(key, 3)
        meta = learner.init(meta_key, problem.x)
        state = actives[0].init(init_key, meta, (), problem)
        traces = []
        for active, capacity in zip(actives, capacities, strict=True):
            state, trace = active.run(loop_key, meta, (), problem, rounds=each, state=grow(state, capacity))
            traces.append((trace.index, trace.test.accuracy))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)

    return run


def jax_candidates(config: Config, problem: Problem) -> dict[str, Candidate]:
    def keys(seeds: int) -> Array:
        return jax.vmap(jax.random.key)(jnp.arange(seeds))

    plain, segmented = make_run(config.steps, 1), make_run(config.steps, config.segments)

    def one_vmap(problem: Problem, keys: Array) -> Any:
        return jax.vmap(plain, in_axes=(0, None))(keys, problem)

    def groups(problem: Problem, keys: Array) -> Any:
        return jax.lax.map(lambda key: segmented(key, problem), keys, batch_size=config.group)

    found = {}
    for seeds in [config.seeds] if config.quick else sorted({1, 16, config.seeds}):
        if seeds <= config.seeds:
            name = "jax, one vmap" + (f", {seeds} seeds" if seeds < config.seeds else "")
            found[name] = harness.compiled(one_vmap, problem, keys(seeds), work=seeds)
    found["jax, groups"] = harness.compiled(groups, problem, keys(config.seeds), work=config.seeds)
    if jax.local_device_count() > 1 and not config.quick:
        split = ml.parallel.split_rows(groups)
        found["jax, groups, all devices"] = harness.called(split, problem, keys(config.seeds), work=config.seeds)
    return found


def torch_candidates(config: Config, problem: Problem, first: np.ndarray) -> dict[str, Candidate]:
    """The same experiments from the first batches `[seeds, k]` on; results as of the JAX programs."""
    import torch
    from torch.nn import functional

    device = harness.torch_device()

    def pixels(x: Any) -> Any:
        return torch.tensor(np.asarray(x).reshape(len(x), -1), device=device).float() / 255

    def classes(y: Any) -> Any:
        return torch.tensor(np.asarray(y), device=device).long()

    x, y = pixels(problem.x), classes(problem.y)
    test_x, test_y = pixels(problem.test.x), classes(problem.test.y)

    def experiment(picked: Any) -> tuple[Any, list[float]]:
        model, accuracies = torch.nn.Linear(x.shape[1], CLASSES).to(device), []
        for step in range(ROUNDS):
            if step:
                with torch.no_grad():
                    best = model(x).softmax(-1).topk(2).values
                    margin = best[:, 0] - best[:, 1]
                    margin[picked] = torch.inf
                    picked = torch.cat([picked, margin.topk(K, largest=False).indices])
            torch.nn.init.zeros_(model.weight)
            torch.nn.init.zeros_(model.bias)
            optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=EPSILON, fused=True)
            rows, labels = x[picked], y[picked]
            for _ in range(config.steps):
                optimizer.zero_grad()
                functional.cross_entropy(model(rows), labels).backward()
                optimizer.step()
            with torch.no_grad():
                accuracies.append((model(test_x).argmax(-1) == test_y).float().mean().item())
        return picked, accuracies

    def per_seed(first: Any) -> Picks:
        found = [experiment(one) for one in first]
        picked = torch.stack([rows for rows, _ in found]).cpu().numpy()
        return picked.reshape(-1, ROUNDS, K), np.asarray([accuracies for _, accuracies in found])

    def batched(first: Any) -> Picks:
        picked, seeds, accuracies = first, len(first), []
        weight = torch.zeros(seeds, x.shape[1], CLASSES, requires_grad=True, device=device)
        bias = torch.zeros(seeds, 1, CLASSES, requires_grad=True, device=device)
        for step in range(ROUNDS):
            with torch.no_grad():
                if step:
                    best = torch.baddbmm(bias, x.expand(seeds, -1, -1), weight).softmax(-1).topk(2).values
                    margin = (best[..., 0] - best[..., 1]).scatter(1, picked, torch.inf)
                    picked = torch.cat([picked, margin.topk(K, largest=False).indices], 1)
                weight.zero_()
                bias.zero_()
            optimizer = torch.optim.Adam([weight, bias], lr=RATE, eps=EPSILON, fused=True)
            rows, labels = x[picked], y[picked].reshape(-1)
            for _ in range(config.steps):
                optimizer.zero_grad()
                logits = torch.baddbmm(bias, rows, weight).reshape(-1, CLASSES)
                (functional.cross_entropy(logits, labels, reduction="sum") / picked.shape[1]).backward()
                optimizer.step()
            with torch.no_grad():
                right = torch.baddbmm(bias, test_x.expand(seeds, -1, -1), weight).argmax(-1) == test_y
                accuracies.append(right.float().mean(-1))
        return picked.cpu().numpy().reshape(-1, ROUNDS, K), torch.stack(accuracies, 1).cpu().numpy()

    def with_threads(threads: int, function: Callable[[Any], Picks]) -> Callable[[Any], Picks]:
        def call(first: Any) -> Picks:
            torch.set_num_threads(threads)
            return function(first)

        return call

    given = torch.tensor(first, device=device).long()
    threads = harness.fastest_threads(lambda: batched(given[: max(len(given) // 4, 1)]))
    # One thread for the loop: its products are too small to be split, and more threads only get in each other's way.
    few = given[: config.loop_seeds]
    return {
        "torch, per seed": harness.called(with_threads(1, per_seed), few, work=len(few)),
        "torch, batched": harness.called(with_threads(threads, batched), given, work=len(given)),
    }


def check(name: str, found: Picks, expected: Picks) -> None:
    """The same rows in every round and the same accuracies, up to 1 % of the rows and 0.005 of accuracy (rounding)."""
    seeds = min(len(found[0]), len(expected[0]))
    same = np.mean([
        len(set(a) & set(b)) / K
        for one, other in zip(found[0][:seeds], expected[0][:seeds], strict=True)
        for a, b in zip(one.tolist(), other.tolist(), strict=True)
    ])  # fmt: skip
    worst = np.abs(found[1][:seeds] - expected[1][:seeds]).mean(0).max()
    print(f"{name}: {100 * same:.2f} % of the rows picked by {seeds} seeds agree, accuracies to {worst:.4f}")
    if same < 0.99 or worst > 0.005:
        raise SystemExit(f"error: {name} does not run the same experiments")


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(8, 10, 4, 1, 1, 2, 4, quick=True, out=config.out)
    harness.start()
    begin = time.perf_counter()
    train, test = data.load("digits", "train"), data.load("digits", "test")
    problem = ml.tasks.problem(
        jnp.asarray(train.x[:POOL]), jnp.asarray(train.y[:POOL]), jnp.asarray(test.x), jnp.asarray(test.y)
    )
    candidates = jax_candidates(config, problem)
    peaks: dict[str, int | None] = {}
    result, peaks["jax, one vmap"] = harness.peak_bytes(candidates["jax, one vmap"].call)
    reference: Picks = jax.tree.map(np.asarray, result)
    print(f"accuracy with {ROUNDS * K} labels: {reference[1][:, -1].mean():.3f}")
    try:
        candidates |= torch_candidates(config, problem, reference[0][:, 0])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(harness.NO_TORCH)
    checked = tuple(part[: config.checked] for part in reference)
    for name, candidate in candidates.items():
        if name != "jax, one vmap":
            result, peaks[name] = harness.peak_bytes(candidate.call)
            check(name, jax.tree.map(np.asarray, result), checked)
    times = harness.compare(candidates, repeats=config.repeats, warm=True)
    ours = [name for name, candidate in candidates.items() if name.startswith("jax") and candidate.work == config.seeds]
    pairs = [(theirs, name) for theirs in ("torch, per seed", "torch, batched") for name in ours]
    harness.finish("loop", config, begin, harness.rows("experiments", times, pairs, peaks))


if __name__ == "__main__":
    main()
