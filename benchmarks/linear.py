"""Logistic regression against scikit-learn's: how far apart their probabilities are, and how many fits a second.

Claim: `learners.linear` equals `LogisticRegression` run to the end (`tol=1e-8`) within 0.001 in every probability, on
images, tables and text with more columns than rows; and 128 seeds in one program are fitted at least five times as fast
as in a loop of scikit-learn's.

    METAAL_TEXT=FOLDER python benchmarks/linear.py     # two minutes on two cores
    python benchmarks/linear.py --quick                # a smoke test, without text

FOLDER holds `banking77_train.csv.gz` (columns `text` and `category`) and `clinc150.csv.gz` (`text` and `intent`); of
each the ten first classes by name are taken, as TF-IDF of words. All sets have 100 labelled rows, drawn once, and are
compared on all rows without a label; tables and digits are standardised. The seeds draw 100 labelled rows of digits
each, pixels from 0 to 1; scikit-learn has its default solver and tolerance.

Expected on two cores: differences of 1e-6 and below, 327 fits a second, 22 times as many as the loop. All figures:
benchmarks/results/.
"""

import csv
import gzip
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import harness
from harness import Candidate
from metaal_jax import Batch, learners

LABELLED = 100
TABLES = {
    "digits": datasets.load_digits, "wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer,
    "iris": datasets.load_iris,
}  # fmt: skip
TEXTS = {"banking77": ("banking77_train.csv.gz", "category"), "clinc150": ("clinc150.csv.gz", "intent")}


@dataclass(frozen=True)
class Config:
    """What is compared and timed."""

    seeds: int = 128
    """Fits of one program."""
    repeats: int = 7
    """Times that every candidate is run, in turn."""
    quick: bool = False
    """A smoke test: few seeds and no text; nothing is written unless `out` says where."""
    out: str | None = None
    """Where to write the result; by default benchmarks/results/<device>/linear.json."""


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows, standardised, and their classes."""
    data = TABLES[name]()
    return (data.data - data.data.mean(0)) / np.maximum(data.data.std(0), 1e-6), data.target


def text(folder: Path, name: str, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """TF-IDF of the rows of the first classes by name."""
    file, column = TEXTS[name]
    with gzip.open(folder / file, "rt", newline="") as lines:
        rows = list(csv.DictReader(lines))
    kept = sorted({row[column] for row in rows})[:classes]
    rows = [row for row in rows if row[column] in kept]
    x = TfidfVectorizer().fit_transform([row["text"] for row in rows]).toarray()
    return x, np.asarray([kept.index(row[column]) for row in rows])


def apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of probabilities to scikit-learn's, of rows without a label."""
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order].astype(np.int32)
    solver = "lbfgs" if x.shape[1] > LABELLED else "newton-cholesky"
    wanted = LogisticRegression(solver=solver, tol=1e-8, max_iter=20000).fit(x[:LABELLED], y[:LABELLED])
    classes, x = int(y.max()) + 1, x.astype(np.float32)
    if len(wanted.classes_) < classes:
        raise ValueError(f"only {len(wanted.classes_)} of {classes} classes are among {LABELLED} rows")
    learner, key = learners.linear(classes), jax.random.key(0)
    batch = Batch(x[:LABELLED], y[:LABELLED], np.ones(LABELLED, np.float32))
    params = jax.jit(learner.adapt)(key, learner.init(key, batch.x), batch)
    got = jax.nn.softmax(learner.predict(params, x[LABELLED:]).logits[0])
    return float(np.abs(np.asarray(got) - wanted.predict_proba(x[LABELLED:].astype(np.float64))).max())


def fits(seeds: int) -> dict[str, Candidate]:
    """Every seed's 100 rows of digits, fitted in one program and in a loop."""
    data = datasets.load_digits()
    rng = np.random.default_rng(1)
    index = np.stack([rng.permutation(len(data.target))[:LABELLED] for _ in range(seeds)])
    x, y = (data.data / 16).astype(np.float32)[index], data.target[index].astype(np.int32)
    learner, key = learners.linear(10), jax.random.key(0)

    def adapt(x: jax.Array, y: jax.Array) -> object:
        return learner.adapt(key, learner.init(key, x), Batch(x, y, jnp.ones(LABELLED)))

    def loop() -> None:
        for rows, classes in zip(x, y, strict=True):
            LogisticRegression(max_iter=10000).fit(rows, classes)

    one = harness.compiled(jax.vmap(adapt), jnp.asarray(x), jnp.asarray(y), work=seeds)
    return {"linear": one, "linear, scikit-learn": Candidate(loop, seeds)}


def main() -> None:
    config = harness.options(Config, __doc__)
    if config.quick:
        config = Config(seeds=4, repeats=2, quick=True, out=config.out)
    folder = os.environ.get("METAAL_TEXT")
    if folder is None and not config.quick:
        raise SystemExit("error: METAAL_TEXT must name the folder with the sets of text; or give --quick")
    harness.start(cores_as_devices=False)
    warnings.simplefilter("error", ConvergenceWarning)
    begin = time.perf_counter()
    found = []
    sets = {name: table(name) for name in TABLES}
    if folder is not None and not config.quick:
        sets |= {name: text(Path(folder), name) for name in TEXTS}
    for name, (x, y) in sets.items():
        off = float(f"{apart(x, y):.3g}")
        found.append({"name": f"{name}, {LABELLED} x {x.shape[1]}", "metric": "largest_difference", "mean": off,
                      "low": off, "high": off})  # fmt: skip
    times = harness.compare(fits(config.seeds), repeats=config.repeats)
    found += harness.rows("fits", times, [("linear, scikit-learn", "linear")], {})
    harness.finish("linear", config, begin, found)


if __name__ == "__main__":
    main()
