"""The experiments about targets as a user meets them: a toy run of each, its result file, and a missing table."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from metaal_jax.studies.usage import UsageError

EXPERIMENTS = str(Path(__file__).resolve().parent.parent / "experiments")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.setattr(sys, "argv", ["experiments/toy.py"])
    return importlib.import_module


def test_sinusoids(script, tmp_path, capsys):
    module = script("sinusoids")
    config = module.Config(
        outer_steps=300, shots=(10,), steps=(1,), test_tasks=50, save_results=str(tmp_path / "r.json")
    )
    module.job(config)
    result = json.loads((tmp_path / "r.json").read_text())
    mean = {row["learner"]: row["mean"] for row in result["rows"]}
    assert set(mean) == set(module.LEARNERS)
    assert mean["maml"] < 0.8 * mean["scratch"]  # 300 steps of 70,000 have taught it something
    pair = next(pair for pair in result["paired"] if pair["a"]["learner"] == "scratch")
    np.testing.assert_allclose(pair["difference"], mean["scratch"] - mean["maml"], atol=1e-3)
    assert "over 50 tasks" in capsys.readouterr().out


def test_active_regression(script, tmp_path, monkeypatch, capsys):
    module = script("active_regression")
    monkeypatch.delenv("METAAL_TABLES", raising=False)
    config = module.Config(
        sets=("diabetes",), budget=6, pool=40, test=50, seeds=2, save_results=str(tmp_path / "r.json")
    )
    module.job(config)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    area = {row["strategy"]: row["mean"] for row in rows if row["metric"] == "rmse_area"}
    assert len(area) == 6
    assert len(set(area.values())) == 6  # every rule takes other rows
    assert all(0.3 < value < 3 for value in area.values())  # in standard deviations of the target
    with pytest.raises(UsageError, match=r"abalone: give --tables FOLDER"):
        module.job(module.Config(sets=("abalone",)))
    table = tmp_path / "abalone.csv"
    table.write_text("M,0.5,1,7\nF,0.25,2,9\nI,0.75,3,8\n")
    x, y = module.load("abalone", str(tmp_path))
    assert x.shape == (3, 5)  # a letter is a column for each of its values
    np.testing.assert_allclose([x.mean(), y.mean(), y.std()], [0, 0, 1], atol=1e-6)
