"""Trainings of policies beside each other, as a user meets them: what a comparison leaves."""

import itertools
import json
import types

import numpy as np
import pytest

from metaal_jax.studies import policy_training
from metaal_jax.studies.options import with_options


@pytest.mark.parametrize("what", ["ways", "joint"])
def test_trainings_compared(scripts, meta_run, tmp_path, what, monkeypatch):
    """Every policy with every learner on the same problems; differences are those of the curves."""
    script, ticks = scripts["compare_trainings"], itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: 0.15 * next(ticks))
    monkeypatch.setattr(policy_training, "time", clock)
    arms = "evolution,pathwise" if what == "ways" else "policy,both"
    script.job(with_options(
        script.Config(), what=what, trainings=arms, kinds="2:40:2:4", parts=1, test=20, held_out=10, minutes=1e-4,
        pieces=1, piece_steps=1, piece_seconds=0.2, runs=2, validation_problems=2, report_problems=3, source="digits",
        target="digits", meta_run=meta_run, out=str(tmp_path / "run"),
    ))  # fmt: skip
    for arm in arms.split(","):
        lines = (tmp_path / "run" / f"{arm}-0" / "metrics.jsonl").read_text().splitlines()
        first, last = (line for line in map(json.loads, lines) if line["series"] == "train")
        # One piece, whose only step is repeated until the time is over.
        assert (first["at"], first["seconds"]) == (0, 0.0)
        assert (last["at"], last["seconds"]) == (2, 0.3)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    learners = ("start",) if what == "ways" else ("start", "both")
    names = {(policy, learner) for policy in ("max_herding", "start", *arms.split(",")) for learner in learners}
    area = {(r["series"], r["learner"], r["run"], r["problem"]): np.mean(r["accuracy"]) for r in records}
    assert set(area) == {(*name, run, i) for name in names for run in (0, 1) for i in range(3)}
    mean = {name: np.mean([area[*name, run, i] for run in (0, 1) for i in range(3)]) for name in names}
    who = lambda row: (row["strategy"], row["learner"])  # noqa: E731
    rows = {who(row): row for row in result["rows"] if row["metric"] == "area"}
    np.testing.assert_allclose([rows[name]["mean"] for name in names], [mean[name] for name in names], atol=2e-5)
    assert len(result["paired"]) == len(names) * (len(names) - 1)
    for pair in result["paired"]:
        np.testing.assert_allclose(pair["difference"], mean[who(pair["a"])] - mean[who(pair["b"])], atol=4e-5)
    times = {(row["strategy"], row["run"]) for row in result["rows"] if row["metric"] == "seconds_of_training"}
    assert times == {(arm, run) for arm in arms.split(",") for run in (0, 1)}
