"""Tunes the from-scratch baselines: the network and logistic regression on few random labels of MNIST.

Only training rows are used: labels from a pool of 5,000 and accuracy on 2,000 other rows, fresh ones for each seed, so
the test split stays unseen. Claim: a strided Conv4 without norm layers, AdamW at 1e-3 with weight decay 3, is as good
as the best logistic regression on pixels, and within a point of the sweep's best everywhere; group norm costs it
several points.

    python experiments/tune_scratch.py --out experiments/results/tune_scratch/mnist.json

About 6 minutes on 2 CPU cores.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from metaal_jax import data, learners, models, tasks
from metaal_jax.base import Batch
from metaal_jax.loop import evaluate
from metaal_jax.metrics import interval
from metaal_jax.studies.options import FILE, check_options, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.usage import UsageError, command, main, names


@dataclass(frozen=True)
class Config:
    """Sweeps learning rate, weight decay, steps and norm layers of training from scratch."""

    target: str = "mnist"
    """Data set; only its training split is read."""
    labels: tuple[int, ...] = (20, 50, 100)
    """Numbers of labels."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 3e-3)
    """Learning rates (AdamW)."""
    decays: tuple[float, ...] = (0.0, 1.0, 3.0)
    """Weight decays."""
    steps: tuple[int, ...] = (60,)
    """Numbers of steps."""
    norms: tuple[str, ...] = ("none", "group")
    """Norm layers."""
    seeds: int = 8
    """Draws of labels and initialisation."""
    seed: int = 1
    """Not the seed of the reported runs."""
    data_dir: str | None = None
    """Where TFDS sets are prepared."""
    out: Annotated[str | None, FILE] = None
    """Result file."""


def score(make_learner: Callable, config: Config):
    """`(key, rate, decay, data) -> accuracy [labels]` of one draw."""
    sampler = tasks.problems(pool=5000, test=1, validation=2000)

    def run(key, rate, decay, source):
        problem_key, init_key = jax.random.split(key)
        problem = sampler(problem_key, source)
        learner = make_learner(rate, decay)
        meta = learner.init(init_key, problem.x)
        most = max(config.labels)

        def at(count):
            batch = Batch(problem.x[:most], problem.y[:most], (jnp.arange(most) < count).astype(jnp.float32))
            params = learner.adapt(init_key, meta, batch)
            return evaluate(learner, params, problem.validation, chunk=1000).accuracy

        return jax.lax.map(at, jnp.asarray(config.labels))

    return run


def job(config: Config) -> None:
    """The whole sweep."""
    if config.out is None:
        raise UsageError("give --out, the result file to write")
    check_options(config)
    names(config.norms, ("none", "group", "batch"), "norm")
    start = time.perf_counter()
    train = data.load(config.target, "train", data_dir=config.data_dir)
    rows = jax.device_put(tasks.class_data(train.x, train.y))
    source = tasks.ProblemData(pool=rows, test=rows)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)

    def network(norm: str, steps: int) -> Callable:
        model = models.Conv4(train.classes, norm=norm)
        return lambda r, d: learners.fine_tune(model, optimizer=optax.adamw(r, weight_decay=d), steps=steps)

    def logistic(steps: int) -> Callable:
        model = models.MLP(train.classes, hidden=(), zero_head=True)
        return lambda r, d: learners.fine_tune(model, optimizer=optax.adamw(r, weight_decay=d), steps=steps)

    kinds = {f"scratch norm={n} steps={s}": network(n, s) for n, s in itertools.product(config.norms, config.steps)}
    kinds |= {f"logistic steps={s}": logistic(s) for s in (100, 300)}
    table = []
    grid = list(itertools.product(kinds, config.rates, config.decays))
    programs = {name: jax.jit(score(make, config)) for name, make in kinds.items()}
    for name, rate, decay in tqdm(grid, desc="sweep"):
        scale = 10 if name.startswith("logistic") else 1  # a zero-initialised linear layer wants larger steps
        found = np.stack([programs[name](key, scale * rate, decay / scale, source) for key in keys])
        for labels, values in zip(config.labels, found.T, strict=True):
            low = interval(values)
            table.append({
                "learner": f"{name} rate={scale * rate:g} decay={decay / scale:g}", "strategy": "random",
                "target": config.target, "metric": "accuracy", "labels": labels, "mean": round(low.mean, 5),
                "low": round(low.low, 5), "high": round(low.high, 5), "seeds": low.seeds,
            })  # fmt: skip
        mean = " / ".join(f"{100 * v:.1f}" for v in found.mean(0))
        tqdm.write(f"{table[-1]['learner']:58s} {mean}")
    write_results(
        Path(config.out), command=command(), environment=environment(), seconds=time.perf_counter() - start,
        config=dataclasses.asdict(config), rows=table, paired=[],
    )  # fmt: skip


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
