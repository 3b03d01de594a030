"""The few-shot experiment: learners run by preset, cut runs end with the same bytes, mistakes are named."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from metaal_jax import checkpoint, data
from metaal_jax.studies import few_shot_data
from metaal_jax.studies import few_shot_presets as presets
from metaal_jax.studies.options import with_options

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
SMALL = {
    "train": "digits", "ways": 3, "train_ways": 4, "queries": 4, "test_tasks": 8, "validation_tasks": 4, "steps": 4,
    "tasks": 2, "filters": 8, "inner_steps": 2, "eval_steps": 2, "devices": 1,
}  # fmt: skip
CLOSED = {"inner_steps": None, "eval_steps": None}
GRADIENT = {"train_ways": None}  # learners whose head is meta-learned have as many classes in training as in the test


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("few_shot")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def attempt(script, tmp_path, capfd):
    """Runs the job in this process; gives the exit status and what was said on stderr."""

    def run(**options):
        config = with_options(script.Config(), **{**SMALL, "out": str(tmp_path / "run"), **options})
        status = 0
        try:
            script.main(lambda: script.job(config))
        except SystemExit as ended:
            status = ended.code
        return status, capfd.readouterr()

    return run


def prepared(*names):
    """Skips the test, with the reason, where a data set is not prepared."""
    for name in names:
        try:
            data.load(name, "test")
        except data.DataError as error:
            pytest.skip(str(error))


def options_of(learner):
    closed = learner in ("protonet", "r2d2", "metaoptnet", "supervised")
    own = {"eval_steps": None} if learner == "maml_plus_plus" else {}
    return {"learner": learner, **(CLOSED if closed else GRADIENT), **own}


@pytest.mark.parametrize("learner", ["maml", "maml_plus_plus", "reptile", "implicit_maml", "r2d2", "supervised"])
def test_learners_run_and_report_both_accuracies(attempt, tmp_path, learner):
    status, said = attempt(**options_of(learner), norm="batch")
    assert status == 0, said.err
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["metric"]: row for row in result["rows"]}
    assert set(rows) == {"accuracy_transductive", "accuracy_non_transductive"}
    for row in rows.values():
        assert (row["ways"], row["shots"], row["tasks"]) == (3, 1, 8)
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
    assert "non-transductive" in said.out
    assert (tmp_path / "run" / "results.png").stat().st_size > 10_000


def test_one_accuracy_where_rows_cannot_depend_on_each_other(attempt, tmp_path):
    status, said = attempt(**options_of("protonet"), norm="group")
    assert status == 0, said.err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["metric"] for row in rows] == ["accuracy_non_transductive"]


def test_validation_picks_the_checkpoint(attempt, tmp_path):
    """The step in the result is the one whose validation accuracy, in the way it was trained, is best."""
    status, said = attempt(**options_of("maml"), steps=6, rate=0.5)
    assert status == 0, said.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    judged = [line["validation_transductive"] for line in lines if line["series"] == "meta"]
    row = json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]
    assert len(judged) == 6
    assert len(set(judged)) > 1
    assert row["step"] == 1 + int(np.argmax(judged))


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(attempt, tmp_path):
    out = tmp_path / "run"
    assert attempt(**options_of("maml"))[0] == 0
    whole = (out / "metrics.jsonl").read_bytes()
    for name in ("meta-02", "meta-03", "test"):
        (out / "steps" / f"{name}.jsonl").unlink()
    shutil.rmtree(out / "checkpoints" / "piece_03")
    (out / "metrics.jsonl").unlink()
    assert attempt(**options_of("maml"), resume=True)[0] == 0
    assert (out / "metrics.jsonl").read_bytes() == whole


def test_another_learners_body_starts_a_run(attempt, tmp_path):
    body = str(tmp_path / "body")
    assert attempt(**options_of("supervised"), out=body)[0] == 0
    saved = checkpoint.read_config(Path(body) / "meta_parameters")
    assert saved["learner"] == "supervised"
    status, said = attempt(**options_of("r2d2"), init=body, rate=0.0)
    assert status == 0, said.err
    before, after = (checkpoint.load(Path(p) / "meta_parameters") for p in (body, tmp_path / "run"))
    np.testing.assert_array_equal(before["params"]["Conv_0"]["kernel"], after["params"]["Conv_0"]["kernel"])
    status, said = attempt(**options_of("r2d2"), init=body, filters=16, out=str(tmp_path / "other"))
    assert status == 2
    assert "same network" in said.err


@pytest.mark.real_data
def test_several_sources_and_a_target_that_is_none_of_them(attempt, tmp_path):
    prepared("omniglot", "mnist")
    status, said = attempt(
        **{**options_of("protonet"), "train": "omniglot,digits", "weights": "3,1", "test": "mnist", "steps": 2}
    )
    assert status == 0, said.err
    row = json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]
    assert (row["source"], row["target"]) == ("omniglot+digits", "mnist")


@pytest.mark.real_data
def test_benchmarks_have_their_classes():
    prepared("omniglot", "cifar100")
    for name, counts in (("omniglot", (1100, 100, 423)), ("cifar_fs", (64, 16, 20))):
        parts = few_shot_data.load_parts(name, few_shot_data.SHAPES[name], None)
        assert tuple(part.count.shape[0] for part in parts[:3]) == counts
        assert {int(n) for part in parts[:3] for n in part.count} == ({20} if name == "omniglot" else {600})
        images = [set(map(bytes, part.x[:200].reshape(200, -1))) for part in parts[:3]]
        assert not images[0] & images[2]


WRONG = {
    "unknown learner 'mamel'; did you mean maml": {"learner": "mamel"},
    "--ways 0 must be at least 1": {"ways": 0},
    "--steps 0 must be at least 1": {"steps": 0},
    "--train-ways 0 must be at least 1": {"learner": "protonet", **CLOSED, "train_ways": 0},
    "--train-ways 7: the head of maml is meta-learned": {"train_ways": 7},
    "give one name": {"learner": "maml,protonet"},
    "--eval-steps says nothing to protonet": {"learner": "protonet", "train_ways": 4, "inner_steps": None},
    "largest class of a set has": {"shots": 30, "queries": 30},
    "cifar_fs is cifar100": {"train": "cifar100", "test": "cifar_fs"},
    "is empty or repeats a set": {"train": "digits,digits"},
    "need as many weights above 0": {"weights": "1,2"},
    "must be numbers": {"weights": "much"},
    "give one in --train": {"learner": "supervised", **CLOSED, "train": "digits,mnist"},
    "give --train-ways 10 or less": {"learner": "protonet", **CLOSED, "train_ways": 11},
    "give --ways 10 or less": {"learner": "protonet", **CLOSED, "ways": 12, "train_ways": 5},
    "tasks must divide among them": {"devices": 3},
    "no checkpoint at": {"init": "/nowhere"},
}


@pytest.mark.parametrize("data_set", ["omniglot", "cifar_fs"])
@pytest.mark.parametrize("name", ["budget", "paper"])
def test_presets_make_their_learners(name, data_set):
    for learner in presets.LEARNERS:
        preset = presets.preset_of(name, learner, data_set)
        for testing in (False, True):
            model = presets.preset_model(preset, 5)
            assert presets.preset_learner(learner, model, preset, testing=testing).init is not None
        presets.preset_optimizer(preset)


def test_validation_rows_are_not_the_tests():
    parts = few_shot_data.load_parts("digits", None, None)
    rows = [set(map(bytes, part.x.reshape(len(part.x), -1))) for part in parts[:3]]
    assert not rows[1] & rows[2]
    assert not rows[1] & rows[0]


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(attempt, message):
    status, said = attempt(**{"learner": "maml", **GRADIENT, **WRONG[message]})
    assert status == 2
    assert message in said.err
    assert said.err.count("\n") == 1
