"""Training of policies as a user meets it: what it leaves, a run that goes on, and mistakes."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import policies, tasks
from metaal_jax.studies.options import with_options
from metaal_jax.studies.policy_training import parse_training
from metaal_jax.studies.policy_ways import WAYS, make_trainers

SMALL = {
    "source": "digits", "target": "digits", "kinds": "2:40:2:4,2:30:1:2", "parts": 1, "test": 20,
    "held_out": 10, "validation_problems": 4, "report_problems": 4, "problems": 1, "episodes": 2, "pieces": 2,
    "piece_steps": 1, "solver_steps": 3, "refit_steps": 2, "rules": "max_herding",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(scripts, meta_run):
    script, run = scripts["learn_policy"], Path(meta_run).parent / "evolution"
    options = {**SMALL, "meta_run": meta_run, "out": str(run), "save_policy": str(run.parent / "saved.json")}
    script.job(with_options(script.Config(), **options))
    return run


def test_what_training_leaves_and_how_it_goes_on(scripts, meta_run, trained, tmp_path):
    saved = policies.load(trained.parent / "saved.json")
    assert (trained / "policy.json").read_bytes() == (trained.parent / "saved.json").read_bytes()
    assert [row["b"] for row in saved.about["held_out"]] == [{"strategy": "max_herding"}] * 2
    assert (trained / "results.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((trained / "results.json").read_text())
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    areas = {
        (name, pool): np.mean([r["accuracy"] for r in records if r["series"] == name and r["kind"][1] == pool])
        for name in ("policy", "max_herding") for pool in (40, 30)
    }  # fmt: skip
    rows = {(row["strategy"], row["pool"]): row["mean"] for row in result["rows"] if row["metric"] == "area"}
    np.testing.assert_allclose([rows[name] for name in areas], list(areas.values()), atol=1e-4)
    for pool in (40, 30):
        paired = next(r for r in result["paired"] if r["b"] == {"strategy": "max_herding"} and r["pool"] == pool)
        np.testing.assert_allclose(paired["difference"], areas["policy", pool] - areas["max_herding", pool], atol=2e-5)
    validation = [r["validation"] for r in records if r["series"] == "train"]
    assert len(validation) == 3
    # Two classes asked for row by row, two at a time: planned, and beside it one by one.
    assert {r["kind"][1] for r in records if r["series"] == "one_by_one"} == {30}
    assert saved.plan == 10

    # A longer run goes on from a shorter one (in this test, so that one worker alone trains).
    script = scripts["learn_policy"]
    options = {**SMALL, "meta_run": meta_run, "out": str(tmp_path / "run")}
    script.job(with_options(script.Config(), **{**options, "pieces": 1}))
    short = (tmp_path / "run" / "steps" / "piece-01.jsonl").read_bytes()
    script.job(with_options(script.Config(), **options, resume=True))
    assert (tmp_path / "run" / "steps" / "piece-01.jsonl").read_bytes() == short
    last = [
        json.loads((run / "steps" / "piece-02.jsonl").read_text().splitlines()[1])
        for run in (tmp_path / "run", trained)
    ]
    assert last[0]["validation"] == last[1]["validation"]
    assert last[0]["grad_norm_1"] == last[1]["grad_norm_1"]


@pytest.mark.parametrize("policy", ["linear", "row", "set", "selector"])
def test_every_way_makes_a_step(scripts, policy):
    """Traced, not run: `tests/test_policies.py` trains by each of them, and `trained` on two kinds in turn."""
    script = scripts["learn_policy"]
    x, y = np.zeros((120, 7), np.float32), np.repeat([0, 1, 2], 40)
    forms = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tasks.class_data(x, y))
    for way in ("evolution", "reinforce", "ppo") if policy == "selector" else WAYS:
        config = with_options(script.Config(), **{
            **SMALL, "kinds": "2:40:2:4", "candidates": 6, "tried": 6, "way": way, "policy": policy,
            "arms": "random,max_herding",
        })  # fmt: skip
        course = parse_training(config.training)
        trainer = make_trainers(course.trainer, course.chooser, course.games, steps=1)
        state = jax.eval_shape(trainer.init, jax.random.key(0), course.first_metas(forms, seed=0), (forms,))
        after, metrics = jax.eval_shape(trainer.step, jax.random.key(0), state, (forms,))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert "area_0" in metrics


MISTAKES = {
    "a way": ("learn_policy", {"way": "gradients"}, "unknown way 'gradients'; .*choose from evolution"),
    "two ways": ("learn_policy", {"way": "ppo,reinforce"}, "give one"),
    "odd": ("learn_policy", {"episodes": 3}, "--episodes 3 must be an even number"),
    "rules": ("learn_policy", {"rules": "margin"}, "must hold max_herding"),
    "kinds": ("learn_policy", {"kinds": "2:40:2"}, "'2:40:2' must be four whole numbers"),
    "pool": ("learn_policy", {"kinds": "2:3:2:4"}, "the 4 labels of '2:3:2:4' must be .* no more than the pool's rows"),
    "situation": ("learn_policy", {"situation": "labels,margins"}, "unknown situation 'margins'; did you mean margin?"),
    "arms": ("learn_policy", {"policy": "selector", "arms": "max_herding,bald"}, "none that asks more than one plain"),
    "measured": ("learn_policy", {"policy": "selector", "way": "imitation"}, "which a selector does not give"),
    "joint": ("learn_policy", {"train": "both"}, "give --way pathwise and one of --kinds"),
    "one kind": ("learn_policy", {"train": "both", "way": "pathwise"}, "problems of one kind"),
    "linear": ("learn_policy", {"train": "learner", "way": "pathwise", "kinds": "2:40:2:4"}, "give --learner ridge"),
    "trainings": ("compare_trainings", {"trainings": "both"}, "unknown training 'both'; .*choose from evolution"),
    "kinds compared": ("compare_trainings", {"kinds": "2:40:2:4,2:30:1:2"}, "give one kind of problems"),
    "forms": ("learn_policy", {"parts": 3}, "need 6 classes, the source has 5"),
    "no main job": ("learn_policy", {"meta_run": "nowhere"}, "holds no finished meta-training"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(scripts, meta_run, tmp_path, capfd, name):
    which, options, said = MISTAKES[name]
    script = scripts[which]
    usual = {
        "learn_policy": SMALL,
        "compare_trainings": {"source": "digits", "target": "digits"},
    }[which]  # fmt: skip
    config = with_options(script.Config(), **{**usual, "meta_run": meta_run, "out": str(tmp_path / "run"), **options})
    with pytest.raises(SystemExit) as ended:
        script.main(lambda: script.job(config))
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert re.search(said, error), error
