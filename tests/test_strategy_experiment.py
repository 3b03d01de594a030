"""The comparison of strategies as a user meets it: what it leaves, a killed run, its statistics and its mistakes."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from metaal_jax.studies.cells import Cell
from metaal_jax.studies.options import with_options
from metaal_jax.studies.ranking import table_of, wins

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
SMALL = {
    "strategies": "random,margin,bald,oracle", "conditions": "plain,repeated", "embeddings": "untrained",
    "batches": "4", "one_by_one": "margin", "budget": 12, "costly_budget": 8, "pool": 40, "test": 30, "held_out": 10,
    "seeds": 3, "source": "digits", "target": "digits", "solver_steps": 3, "members": 3, "joint_members": 3, "best": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("strategies")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    run = tmp_path_factory.mktemp("strategies") / "whole"
    script.job(with_options(script.Config(), **SMALL, out=str(run), save_results=str(run.parent / "saved")))
    return run


@pytest.fixture
def attempt(script, tmp_path, capfd):
    """Runs the job in this process; gives the exit status and what was said on stderr."""

    def run(**options):
        config = with_options(script.Config(), **{**SMALL, "out": str(tmp_path / "run"), **options})
        with pytest.raises(SystemExit) as ended:
            script.main(lambda: script.job(config))
        return ended.value.code, capfd.readouterr().err

    return run


def test_what_a_run_leaves(whole):
    for folder in (whole / "results", whole.parent / "saved"):
        assert {path.name for path in folder.iterdir()} == {
            "untrained-plain.json", "untrained-repeated.json", "summary.json", "curves.png", "wins_8.png", "wins_12.png"
        }  # fmt: skip
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    result = json.loads((whole / "results" / "untrained-plain.json").read_text())
    assert {"command", "date", "device", "versions", "seconds", "config", "rows", "paired"} <= result.keys()
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3 * (4 + 1)  # conditions, seeds, cells
    curves = {r["seed"]: r for r in records if (r["condition"], r["batch"], r["strategy"]) == ("plain", 4, "margin")}
    assert [curves[0]["labels"], len(curves)] == [[4, 8, 12], 3]
    (row,) = [r for r in result["rows"]
              if (r["strategy"], r["batch"], r["metric"], r["labels"]) == ("margin", 4, "area", 12)]  # fmt: skip
    np.testing.assert_allclose(row["mean"], np.mean([curve["accuracy"] for curve in curves.values()]), atol=1e-4)
    assert {(r["strategy"], max(r["labels"])) for r in records if r["batch"] == 4} == {
        ("random", 12), ("margin", 12), ("bald", 12), ("oracle", 8)
    }  # fmt: skip
    # Each mean rank is rounded to four digits.
    ranks = [r for r in json.loads((whole / "results" / "summary.json").read_text())["rows"]
             if r["metric"] == "mean_rank" and r["learner"] == "all"]  # fmt: skip
    assert sum(r["mean"] for r in ranks if r["labels"] == 8) == pytest.approx(
        1 + 2 + 3 + 4, abs=2e-4
    )  # four digits each
    assert sum(r["mean"] for r in ranks if r["labels"] == 12) == pytest.approx(1 + 2 + 3, abs=2e-4)
    # Seeds share their problems: random rows are the same ones whatever the batch's strategy is compared with.
    assert (whole / "table.txt").read_text().count("untrained embedding, plain") == 2


def test_a_killed_run_ends_with_the_same_bytes(whole, tmp_path):
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(SCRIPTS / "strategies.py"), *words, "--out", str(tmp_path / "run")]
    # It may use what `whole` compiled; where it is killed it may leave half a program in its copy.
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], tmp_path / "cache")
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    steps, began = tmp_path / "run" / "steps", time.monotonic()
    while not (steps.is_dir() and len(list(steps.glob("cell-*.jsonl"))) >= 2) and time.monotonic() - began < 300:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in steps.glob("cell-*.jsonl")}
    assert 2 <= len(kept) < 10
    done = subprocess.run([*command, "--resume"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in steps.glob("cell-*.jsonl")}.items()
    for name in ("metrics.jsonl", "table.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


MISTAKES = {
    "unknown strategy": ({"strategies": "random,bagde"}, ["'bagde'", "did you mean badge or bald?"]),
    "unknown condition": ({"conditions": "plane"}, ["'plane'", "did you mean plain?"]),
    "unknown embedding": ({"embeddings": "maml"}, ["'maml'", "meta, untrained"]),
    "batches that are no numbers": ({"batches": "ten"}, ["'ten'", "whole numbers"]),
    "odd budget": ({"budget": 13}, ["batches of 4", "13 labels", "--batches"]),
    "no seeds": ({"seeds": 0}, ["--seeds 0", "at least 1"]),
    "one member": ({"members": 1}, ["--members 1", "at least 2"]),
    "budget beyond the pool": ({"budget": 80}, ["80 labels", "pool of 40"]),
    "odd pool": ({"pool": 42}, ["--pool 42", "multiple of 5"]),
    "pool beyond the set": ({"pool": 9000}, ["--pool", "9010", "'digits'"]),
    "pool too small to adapt": ({"best": 1}, ["100 labels", "40 rows", "--best 0"]),
    "no network there": ({"embeddings": "meta", "meta_run": "nowhere"}, ["nowhere", "meta_active.py", "--meta-run"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(attempt, name):
    options, said = MISTAKES[name]
    status, err = attempt(**options)
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in said), line


def test_wins_are_corrected_for_the_number_of_pairs():
    """Against Holm's method by hand on areas of known differences."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 8, 1)) * np.array([0.01, 0.01, 0.01, 0.05])[:, None, None]
    curves = np.array([0.5, 0.515, 0.6, 0.53])[:, None, None] + noise
    records = {
        Cell("meta", "plain", 10, name): [
            {"labels": [10], "accuracy": curve.tolist(), "brier": [0.0], "ece": [0.0], "balance": 1.0} for curve in of
        ]
        for name, of in zip("abcd", curves, strict=True)
    }
    names, won = wins(table_of(records), 10, ("meta", "plain", 10))
    assert names == list("abcd")
    pairs = [(i, j) for i in range(4) for j in range(i)]
    p = sorted((ttest_rel(curves[i, :, 0], curves[j, :, 0]).pvalue, i, j) for i, j in pairs)
    wanted = np.zeros((4, 4), bool)
    for number, (value, i, j) in enumerate(p):
        if value * (6 - number) > 0.05:
            break
        wanted[(i, j) if curves[i].mean() > curves[j].mean() else (j, i)] = True
    np.testing.assert_array_equal(won, wanted)
    assert won.any()
    assert not (won | won.T)[~np.eye(4, dtype=bool)].all()
