"""Which learner `meta_train` takes by default, and when meta-learning on one's own tasks is worth it.

Claim: on four made-up families of 50 tasks that share what tells classes apart, MAML from prototypes is ahead of
logistic regression with one and with five labels a class, and not behind prototypes or ridge regression; on a family
that shares nothing all three are behind logistic regression, and the report of `meta_train` says so.

    python experiments/own_tasks.py --save-results experiments/results/own_tasks.json    # 10 minutes on two cores

Nothing here is data that the package reports on elsewhere.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from sklearn.datasets import load_digits, make_classification

import metaal_jax as ml
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.usage import arguments, command, main, names

TASKS, ROWS, COLUMNS = 50, 100, 20


@dataclass(frozen=True)
class Config:
    """Meta-trains learners on families of tasks."""

    learners: str = "maml,protonet,r2d2"
    """Comma-separated names of `learners.META_LEARNERS`."""
    families: str = "directions,curved,digits,columns,nothing"
    """Comma-separated families of tasks."""
    steps: int = 1000
    """Outer steps."""
    seed: int = 0
    """Of the families."""
    save_results: str | None = None
    """JSON file for the numbers."""


def directions(seed: int):
    """Classes are balls in four directions that all tasks share, among louder nuisance, all mixed."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(COLUMNS, COLUMNS))
    for _ in range(TASKS):
        classes = draw.integers(2, 5)
        centre = 1.5 * draw.normal(size=(classes, 4))
        y = draw.integers(0, classes, ROWS)
        z = draw.normal(size=(ROWS, COLUMNS)) * np.r_[np.ones(4), np.full(COLUMNS - 4, 2.0)]
        z[:, :4] += centre[y]
        yield z @ mix, y


def curved(seed: int):
    """Classes are the largest of three mixtures of curved features of four shared directions."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=(COLUMNS, 4)) / np.sqrt(COLUMNS)
    for _ in range(TASKS):
        x = draw.normal(size=(ROWS, COLUMNS))
        bent = np.tanh(2 * x @ shared)
        features = np.c_[bent, bent[:, :2] * bent[:, 2:4], np.cos(3 * x @ shared[:, :2])]
        score = features @ draw.normal(size=(features.shape[1], 3))
        yield x, ((score - score.mean(0)) / score.std(0)).argmax(1)


def digits(seed: int):
    """Two to four digits, 8 x 8 pixels, all turned by the task's number of quarter turns."""
    x, y = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    for _ in range(TASKS):
        classes = draw.choice(10, draw.integers(2, 5), replace=False)
        turns = draw.integers(4)
        row = draw.permutation(np.flatnonzero(np.isin(y, classes)))[:ROWS]
        yield np.rot90(x[row].reshape(-1, 8, 8), turns, axes=(1, 2)).reshape(-1, 64), y[row]


def columns(seed: int):
    """scikit-learn's `make_classification`, its informative columns in the same places."""
    for task in range(TASKS):
        yield make_classification(
            ROWS, COLUMNS, n_informative=5, n_redundant=2, n_classes=3, random_state=1000 * seed + task, shuffle=False
        )


def nothing(seed: int):
    """The same with columns shuffled by task: what is told of one is of no use to another."""
    for task, (x, y) in enumerate(columns(seed)):
        yield x[:, np.random.default_rng(77 * seed + task).permutation(COLUMNS)], y


FAMILIES = {family.__name__: family for family in (directions, curved, digits, columns, nothing)}


def job(config: Config) -> None:
    """Trains every learner on every family and prints what it reached on held-out tasks."""
    began, rows = time.monotonic(), []
    learners = names(config.learners, ml.learners.META_LEARNERS, "learner")
    for family in names(config.families, FAMILIES, "family"):
        given = [(x.astype(np.float32), y) for x, y in FAMILIES[family](config.seed)]
        for learner in learners:
            with arguments():
                trained = ml.meta_train(
                    given, learner=learner, steps=config.steps, held_out=0.4,
                    shots=(1, 5, 10 if family == "columns" else 20),
                )  # fmt: skip
            print(f"\n{family}: {trained}", flush=True)
            for found in trained.about["held_out"]:
                rows += [
                    {"family": family, "learner": learner, "metric": metric, "labels": found["shots"],
                     **{name: round(value, 5) for name, value in found[arm].items()}, "tasks": found["tasks"]}
                    for arm, metric in (("learner", "accuracy"), ("linear", "accuracy_linear"),
                                        ("difference", "accuracy_above_linear"))
                ]  # fmt: skip
    if config.save_results:
        write_results(
            Path(config.save_results), command=command(), environment=environment(),
            seconds=time.monotonic() - began, config=asdict(config), rows=rows, paired=[],
        )  # fmt: skip


if __name__ == "__main__":
    main(lambda: job(tyro.cli(Config)))
