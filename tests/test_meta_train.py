"""Meta-training on a person's own tasks: what it learns, what it reports, what it refuses; the page about it."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import metaal_jax as ml
from metaal_jax import learners, models
from metaal_jax.studies import results

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own_tasks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def family(seed=0, count=24, rows=40, columns=8):
    """Tasks of two classes or three whose centres differ in two directions that all share, under louder noise."""
    draw = np.random.default_rng(seed)
    mixing, made = draw.normal(size=(columns, columns)), []
    for _ in range(count):
        kinds = draw.integers(2, 4)
        y = draw.integers(0, kinds, rows)
        z = draw.normal(size=(rows, columns)) * np.asarray([0.5, 0.5] + [3.0] * (columns - 2))
        z[:, :2] += 2.0 * draw.normal(size=(kinds, 2))[y]
        made.append((100.0 + z @ mixing, [f"kind {kind}" for kind in y]))
    return made


@pytest.fixture(scope="module")
def trained():
    steps = []
    found = ml.meta_train(
        family(), shots=(3, 1), steps=200, held_out=0.5, draws=4, hidden=(32,), rate=5e-3,
        progress=lambda step, metrics: steps.append((step, metrics)),
    )  # fmt: skip
    return found, steps


def test_it_learns_what_tasks_share_and_says_so(trained):
    found, _ = trained
    held = found.about["held_out"]
    assert [one["shots"] for one in held] == [1, 3]
    for one in held:
        assert one["tasks"] == 12
        assert one["difference"]["low"] > 0.02  # above logistic regression, its whole interval
        difference = one["learner"]["mean"] - one["linear"]["mean"]
        np.testing.assert_allclose(difference, one["difference"]["mean"], atol=1e-6)
        paired = one["difference"]["high"] - one["difference"]["low"]
        assert paired < sum(one[arm]["high"] - one[arm]["low"] for arm in ("learner", "linear"))
    assert held[1]["learner"]["mean"] > held[0]["learner"]["mean"]
    assert f"{100 * held[0]['linear']['mean']:.1f}" in str(found)


def test_the_reported_accuracies_are_those_of_new_tasks(trained):
    """Of the same family, by hand: the report neither flatters the learner nor slights logistic regression."""
    found, _ = trained
    learner, cold, right = found.learner(3), learners.linear(3), []
    adapt = {name: jax.jit(one.adapt) for name, one in (("learner", learner), ("linear", cold))}
    for number, (x, y) in enumerate(family(seed=0, count=24)):
        if str(number) not in found.about["held_out_tasks"]:
            continue
        y = np.unique(y, return_inverse=True)[1]
        few = np.concatenate([np.flatnonzero(y == kind)[:3] for kind in np.unique(y)])
        weight = np.zeros(len(y), np.float32)
        weight[few] = 1
        rows = found.prepare(x)
        for name, made, meta in (
            ("learner", learner, found.start(3)),
            ("linear", cold, cold.init(jax.random.key(0), rows)),
        ):
            params = adapt[name](jax.random.key(0), meta, ml.Batch(rows, y.astype(np.int32), weight))
            right.append((name, (made.predict(params, rows).logits[0].argmax(-1) == y)[weight == 0].mean()))
    for name in ("learner", "linear"):
        mean = np.mean([value for arm, value in right if arm == name])
        assert abs(mean - found.about["held_out"][1][name]["mean"]) < 0.08


def test_progress_is_told_in_pieces(trained):
    _, steps = trained
    assert [step for step, _ in steps] == list(range(10, 201, 10))
    assert steps[-1][1]["loss"] < steps[0][1]["loss"]


SMALL = {"steps": 2, "shots": (1,), "draws": 1, "hidden": (4,), "batch": 2}


def test_a_column_of_groups_is_a_list_of_tasks():
    given = family(count=6, rows=12)
    listed = ml.meta_train(given, **SMALL, held_out=0.4)
    x, y = np.concatenate([x for x, _ in given]), [label for _, labels in given for label in labels]
    grouped = ml.meta_train((x, y), groups=[f"no {i // 12}" for i in range(72)], **SMALL, held_out=0.4)
    for a, b in zip(jax.tree.leaves(listed.meta), jax.tree.leaves(grouped.meta), strict=True):
        np.testing.assert_array_equal(a, b)
    assert listed.about["held_out"] == grouped.about["held_out"]
    assert [f"no {name}" for name in listed.about["held_out_tasks"]] == grouped.about["held_out_tasks"]


def test_nothing_of_held_out_tasks_is_used_in_training():
    given = family(count=6, rows=12)
    first = ml.meta_train(given, **SMALL, held_out=0.4)
    for number in first.about["held_out_tasks"]:
        given[int(number)] = (-7.0 * given[int(number)][0] + 3.0, given[int(number)][1])
    second = ml.meta_train(given, **SMALL, held_out=0.4)
    for a, b in zip(jax.tree.leaves(first[3:7]), jax.tree.leaves(second[3:7]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.about["held_out"] != second.about["held_out"]


def test_images_and_what_is_left_out():
    draw = np.random.default_rng(0)
    given = [(draw.integers(0, 256, (9, 8, 8)).astype(np.uint8), [1, 2, 1, 2, 1, 2, 3, 2, 1]) for _ in range(3)]
    given.append((given[0][0], [5] * 9))
    found = ml.meta_train(given, learner="protonet", steps=1, shots=(1,), held_out=0, batch=1)
    assert found.network == models.Conv4(2, blocks=2)
    assert found.row == (8, 8)
    assert found.about["held_out"] == []
    assert found.about["left_out"][0] == "task 0: class 3 has 1 row of the 2 that a class needs"
    assert found.about["left_out"][-1] == "task 3: left out, 1 class of the 2 that a task needs"
    assert found.learner(4).predict(found.start(4), found.prepare(given[0][0])).logits.shape == (1, 9, 4)


GIVEN = family(count=5, rows=12)
REFUSED = {
    "no list": ({"tasks": 3}, "give a list of tasks"),
    "a NaN": ({"tasks": [*GIVEN, (np.full((2, 8), np.nan), "ab")]}, r"meta_train: task 5, x\[0, 0\] is nan"),
    "few rows": ({"shots": (40,)}, "no task has two classes of at least 41 rows .*ask for fewer rows of a class"),
    "few tasks": ({}, "held_out=0.2 of 5 tasks is 1, and an interval needs 2 of them"),
    "all held out": ({"held_out": 0.95}, "held_out=0.95 of 5 tasks is 5"),
    "a share of 3": ({"held_out": 3}, "held_out must be a share of the tasks, .*, got 3"),
    "a share NaN": ({"held_out": float("nan")}, "held_out must be a share"),
    "an unknown learner": ({"learner": "protonets"}, "unknown learner 'protonets'; did you mean protonet"),
    "an unknown setting": ({"settings": {"ridge": 1.0}}, "maml has no setting 'ridge'; its settings are rate"),
    "half an inner step": ({"settings": {"steps": 2.5}}, "meta_train: the setting 'steps' must be an integer from 1"),
    "many ways": ({"ways": 4}, "ways=4, and no task has more than 3 classes; give ways=3"),
    "one way": ({"ways": 1}, "ways must be an integer of at least 2, got 1"),
    "many queries": ({"queries": 40}, "queries=40, and beside 1 shots no class has more than"),
    "no shots": ({"shots": ()}, "shots must be a list of numbers"),
    "a shot": ({"shots": 5}, "shots must be a list of numbers .*, got 5"),
    "0 shots": ({"shots": (0, 1)}, "shots must be a positive integer, got 0"),
    "no steps": ({"steps": 0}, "steps must be a positive integer, got 0"),
    "no rate": ({"rate": float("nan")}, "rate must be a finite number above 0, got nan"),
    "a long seed": ({"seed": 10**20}, r"seed must be below 2\*\*32"),
    "a negative seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "no width": ({"hidden": (4, 0)}, "hidden must be a positive integer, got 0"),
    "two networks": ({"network": models.MLP(2), "hidden": (4,)}, "give hidden or network, not both"),
    "another network": ({"network": models.SetNetwork()}, "network must be one of MLP, .*, got SetNetwork"),
    "convolutions of columns": ({"network": models.Conv4(2)}, r"Conv4 takes images, and rows have the shape \[8\]"),
    "widths for images": (
        {"tasks": [(np.zeros((4, 5, 5)), [0, 1] * 2)] * 5, "hidden": (4,)}, "give network=models.Conv4"),
    "films": ({"tasks": [(np.zeros((4, 1, 2, 3, 4)), [0, 1] * 2)] * 5}, r"rows of shape \[1, 2, 3, 4\]; give"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_give(name):
    changes, said = REFUSED[name]
    options = {"tasks": GIVEN, "shots": (1,), **({} if name == "few tasks" else {"held_out": 0.4}), **changes}
    with pytest.raises(ValueError, match=said) as error:
        ml.meta_train(options.pop("tasks"), **options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("meta_train: ")


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    """What is saved there is loaded in another process, which gives the same predictions."""
    monkeypatch.chdir(tmp_path)
    tasks, training, use = BLOCKS
    assert "ml.meta_train(tasks)" in training
    names = {}
    exec(compile(tasks, "tasks", "exec"), names)
    exec(compile(training.replace("(tasks)", "(tasks, steps=100, hidden=(16,), draws=2)"), "training", "exec"), names)
    said = capsys.readouterr().out
    assert "accuracy in % on 10 held-out tasks" in said
    printed = re.search(r"```text\n(.*?)```", PAGE, re.S)[1]
    assert [line[:15] for line in said.splitlines()[2:4]] == [line[:15] for line in printed.splitlines()[2:4]]
    (tmp_path / "use.py").write_text(tasks + use)
    done = subprocess.run([sys.executable, "use.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exec(compile(tasks, "tasks", "exec"), names)  # the same random numbers as in the other process
    exec(compile(use, "use", "exec"), names)
    assert capsys.readouterr().out == done.stdout
    assert float(done.stdout) > 0.5  # of three classes
    assert len(set(names["asked"].tolist()) - set(names["first"].tolist())) == 5


def test_the_experiment_that_chose_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import own_tasks

    for family in own_tasks.FAMILIES.values():
        made = list(family(0))
        assert len(made) == 50
        assert all(len(x) == len(y) and 2 <= len(np.unique(y)) <= 4 for x, y in made)
    path = tmp_path / "found.json"
    own_tasks.job(own_tasks.Config(learners="protonet", families="digits", steps=1, save_results=str(path)))
    found = results.read_results(path)["rows"]
    assert [row["labels"] for row in found] == [1] * 3 + [5] * 3 + [20] * 3
    assert "digits: protonet on rows of shape [64]" in capsys.readouterr().out
