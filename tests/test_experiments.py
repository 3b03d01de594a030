"""The main job as a user meets it: what it leaves, killed runs that end with the same bytes, and what mistakes get."""

import contextlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import compiled
from metaal_jax import Batch
from metaal_jax.studies.arms import make_arms, make_model
from metaal_jax.studies.groups import Learning, MetaTraining, Sizes
from metaal_jax.studies.meta_learners import META_LEARNERS, OWN_HEAD, make_meta_learner
from metaal_jax.studies.options import parse, with_options

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
SMALL = {
    "learners": "scratch,maml", "strategies": "random,margin", "seeds": 2, "seeds_at_once": 1, "budget": 20,
    "pool": 100, "test": 50, "ways": 5, "meta_steps": 200, "meta_labels": 20, "meta_queries": 2, "filters": 8,
    "adapt_steps": 1, "scratch_steps": 5,
}  # fmt: skip


def words(**options):
    """The options as a command line."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def script():
    """The script as a module, for what need not have a process of its own."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("meta_active")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def typed(script):
    """Does in this process what the script does when it is started with these words."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *arguments])
            script.main(lambda: script.job(parse(script.Config)))

    return run


@pytest.fixture(scope="module")
def whole(typed, folder):
    """An uninterrupted run: its folder and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        typed(*words(**SMALL, out=folder / "whole", save_results=folder / "results" / "saved.json"))
    return folder / "whole", out.getvalue()


@pytest.fixture(scope="module")
def start(whole, folder):
    """Starts the script in a process of its own.

    Each has its own copy of what this process has compiled: where it is killed it may leave half a program there.
    """
    number = itertools.count()

    def run(*arguments):
        command = [sys.executable, str(SCRIPTS / "meta_active.py"), *arguments]
        cache = folder / f"cache-{next(number)}"
        cache.mkdir()
        compiled.borrow(cache, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)

    return run


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
        return status, capfd.readouterr().err

    return run


def points(run):
    """The points of all TensorBoard curves, `{(tag, step): value}`, read from the record files."""
    from tensorboardX.proto import event_pb2

    found = {}
    for file in (run / "tensorboard").iterdir():
        content, place = file.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_what_a_run_leaves(whole):
    run, out = whole
    for word in ("learner", "strategy", "10 labels", "20 labels", "area", "scratch", "maml", "random", "margin"):
        assert word in out
    assert str(run) in out
    assert (run / "table.txt").read_text().strip() in out
    config = json.loads((run / "config.json").read_text())
    assert config["budget"] == 20
    assert config["strategies"] == "random,margin"
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "metaal_jax", "jax", "jaxlib", "flax", "optax", "numpy"} <= environment["versions"].keys()
    assert "CPU" in environment["device"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["at"] for record in records if record["series"] == "meta"] == [50, 100, 150, 200]
    own = [record for record in records if record["series"] == "active/maml/margin"]
    assert [(record["seed"], record["at"]) for record in own if record.get("cold")] == [(0, 0), (1, 0)]
    curves = [record for record in own if not {"cold", "final"} & record.keys()]
    assert [(record["seed"], record["at"]) for record in curves] == [(0, 10), (0, 20), (1, 10), (1, 20)]
    assert all(0 <= record["accuracy"] <= 1 and 0 <= record["ece"] <= 1 for record in curves)
    times = [json.loads(line) for line in (run / "times.jsonl").read_text().splitlines()]
    assert len(times) == 4 + 2 * 2 * 2
    drawn = points(run)
    assert {(f"active/{arm}/accuracy", 20) for arm in ("maml/margin", "scratch/random")} <= drawn.keys()
    assert {("meta/validation_accuracy", at) for at in (50, 100, 150, 200)} <= drawn.keys()
    pictures = list(run.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_result_files_have_the_common_form(whole, folder):
    run, _ = whole
    result, saved = (json.loads(path.read_text()) for path in (run / "results.json", folder / "results" / "saved.json"))
    assert result == saved
    assert {"command", "date", "device", "versions", "seconds", "config", "rows", "paired"} <= result.keys()
    assert result["command"].startswith("python experiments/meta_active.py --learners scratch,maml")
    assert result["seconds"] > 0
    rows = [row for row in result["rows"] if row["metric"] == "accuracy"]
    assert len(rows) == 2 * 2 * 2
    keys = {"learner", "strategy", "source", "target", "metric", "labels", "mean", "low", "high", "seeds"}
    assert all(keys == row.keys() and row["low"] <= row["mean"] <= row["high"] and row["seeds"] == 2 for row in rows)
    assert {"area", "labels_to_90", "final_accuracy", "cold_accuracy"} <= {row["metric"] for row in result["rows"]}
    pair = next(pair for pair in result["paired"] if pair["metric"] == "accuracy" and pair["labels"] == 20)
    assert {"a", "b", "metric", "labels", "difference", "low", "high", "seeds"} == pair.keys()
    assert pair["a"]["learner"] == "maml"
    assert pair["b"]["learner"] == "scratch"
    mean = {(row["learner"], row["strategy"]): row["mean"] for row in rows if row["labels"] == 20}
    wanted = mean["maml", pair["a"]["strategy"]] - mean["scratch", pair["b"]["strategy"]]
    assert pair["difference"] == pytest.approx(wanted, abs=2e-5)


def test_a_run_killed_three_times_ends_with_the_same_bytes(start, whole, folder):
    """SIGKILL during meta-training, between the two halves, and during active learning; then to the end."""
    run, moment = folder / "killed", random.Random(0)
    steps = run / "steps"
    for number, last in enumerate(("meta-00", "meta-03", "active-scratch-random-0001")):
        process = start(*words(**SMALL, out=run), *(["--resume"] if number else []))
        deadline = time.monotonic() + 300
        while not (steps / f"{last}.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        assert (steps / f"{last}.jsonl").exists()
        assert not (run / "results.json").exists()
    process = start(*words(**SMALL, out=run), "--resume")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.replace(str(run), str(whole[0])) == whole[1]
    for name in ("metrics.jsonl", "config.json", "table.txt"):
        assert (run / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert points(run) == points(whole[0])
    assert not [path for path in run.rglob("*") if ".new" in path.name or "orbax-checkpoint-tmp" in path.name]


def test_other_meta_learners_have_a_training_of_their_own(attempt, tmp_path):
    """One whose head is meta-learned, one in closed form that also learns from the pool, and maml's body frozen."""
    learners = ("meta_sgd", "r2d2+propagation", "frozen")
    options = {"learners": ",".join(learners), "strategies": "random", "meta_steps": 2, "seeds": 1, "pool_rows": 20}
    status, said = attempt(**options)
    assert status == 0, said
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = {record["series"] for record in records if record["series"].startswith("meta")}
    assert trained == {"meta/meta_sgd", "meta/r2d2", "meta"}
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert {row["learner"] for row in rows} == set(learners)
    kept = {path.name for path in run.iterdir() if path.name.startswith("meta_parameters")}
    assert kept == {"meta_parameters", "meta_parameters_meta_sgd", "meta_parameters_r2d2"}


def test_every_meta_learner_adapts_to_the_target():
    """Trained on as many classes as it wants, each predicts the target's ten after its own kind of adaptation."""
    import jax

    for name in META_LEARNERS:
        arm = make_arms(name, ("random",), classes=10, shape=(8, 8, 1), sizes=Sizes())[0]
        model = make_model(10 if name in OWN_HEAD else 4, (8, 8, 1))
        trained = make_meta_learner(name, model, Learning().adaptation, training=MetaTraining())

        def run(key, arm=arm, trained=trained):
            x = jax.numpy.zeros((3, 8, 8, 1))
            meta = arm.start(key, trained.init(key, x), x)
            batch = Batch(x=x, y=jax.numpy.zeros(3, int), weight=jax.numpy.ones(3))
            return arm.learner.predict(arm.learner.adapt(key, meta, batch), x).logits

        assert jax.eval_shape(run, jax.random.key(0)).shape == (1, 3, 10), name


def test_mistakes_on_the_command_line(start, typed, capfd):
    process = start("--learners", "scratch,mamml")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines() == ["error: unknown learner 'mamml'; did you mean maml or fomaml? choose from "
                                "scratch, frozen, logistic, maml, fomaml, anil, meta_sgd, reptile, implicit_maml, "
                                "protonet, r2d2, metaoptnet"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        typed("--buget", "20")
    assert ended.value.code == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: Unrecognized options: --buget, 20; did you mean --budget? --help shows all options"
    ]  # fmt: skip


def npz(path, *, rows=60, classes=4, **arrays):
    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(rows, 5)), "y": np.arange(rows) % classes, **arrays}
    np.savez(path, **{name: value for name, value in given.items() if value is not None})
    return str(path)


MISTAKES = {  # options, or a function of a folder that makes them; what the line must say
    "unknown data set": ({"target": "mnits"}, ["'mnits'", "did you mean", "'mnist'"]),
    "unprepared data set": (lambda path: {"target": "mnist", "data_dir": str(path)},
                            ["'mnist' is not prepared", "python -m metaal_jax.data.prepare mnist"]),
    "no such file": ({"target": "nowhere/pool.npz"}, ["nowhere/pool.npz", "no such file"]),
    "unknown strategy": ({"strategies": "random,margn"}, ["'margn'", "did you mean margin?"]),
    "unknown learner": ({"learners": "skratch"}, ["'skratch'", "did you mean scratch?"]),
    "a name twice": ({"learners": "maml,maml"}, ["'maml,maml'", "repeats"]),
    "budget beyond the pool": ({"budget": 200}, ["200 labels", "pool of 100", "--budget 100"]),
    "pool beyond the set": ({"pool": 9000}, ["9000", "'digits'", "--pool 1 to"]),
    "no labels": ({"budget": 0}, ["--budget 0", "at least 1"]),
    "odd budget": ({"budget": 25}, ["--budget 25", "multiple", "--batch-size 10"]),
    "odd seeds": ({"seeds": 3, "seeds_at_once": 2}, ["--seeds 3", "multiple"]),
    "one member": ({"members": 1}, ["--members 1", "at least 2"]),
    "ways": ({"ways": 50}, ["--ways 50", "20 classes", "--ways 20"]),
    "filters": ({"norm": "group", "filters": 12}, ["12 filters", "8 groups"]),
    "steps": ({"scratch_steps": -1}, ["steps", "-1"]),
    "labels below 0": (lambda path: {"target": npz(path / "pool.npz", y=np.arange(60) - 1)},
                       ["pool.npz", "label -1", "renumber"]),
    "labels that are no integers": (lambda path: {"target": npz(path / "pool.npz", y=np.linspace(0, 1, 60))},
                                    ["pool.npz", "float64", "integers"]),
    "NaN": (lambda path: {"target": npz(path / "pool.npz", x=np.where(np.eye(60, 5) > 0, np.nan, 0.0))},
            ["pool.npz", "NaN", "row 0", "nan_to_num"]),
    "empty": (lambda path: {"target": npz(path / "pool.npz", x=np.zeros((0, 5)), y=np.zeros(0, int))},
              ["pool.npz", "empty"]),
    "no arrays": (lambda path: {"target": npz(path / "pool.npz", x=None)}, ["pool.npz", "holds y", "np.savez"]),
    "a class without test rows": (
        lambda path: {"target": npz(path / "pool.npz", x_test=np.zeros((8, 5)), y_test=np.arange(8) % 3),
                      "source": npz(path / "source.npz"), "pool": 40},
        ["pool.npz", "lack class 3", "--target"]),
    "another kind of rows": (lambda path: {"target": npz(path / "pool.npz")}, ["'digits'", "(5,)", "one kind"]),
    "too few classes to split": (
        lambda path: {"target": npz(path / "one.npz", classes=2), "source": npz(path / "one.npz", classes=2)},
        ["2 classes", "--source"]),
    "a file where the folder should be": (lambda path: {"out": npz(path / "file.npz")},
                                          ["file.npz is a file", "--out"]),
    "a folder of something else": (lambda path: {"out": str(Path(npz(path / "file.npz")).parent)},
                                   ["is not empty", "--out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(attempt, tmp_path, name):
    options, said = MISTAKES[name]
    (tmp_path / "data").mkdir()
    began = time.monotonic()
    status, err = attempt(**(options(tmp_path / "data") if callable(options) else options))
    assert status == 2
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in said), lines[0]
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()  # nothing is begun that cannot be done


def test_strategies_by_name(script, tmp_path, capfd):
    """Pointwise, joint, committee's and costly ones, an oracle that needs rows of its own, in other spellings too."""
    config = with_options(script.Config(), **{
        **SMALL, "learners": "logistic", "strategies": "random,badge,typiclust,batchbald,oracle", "seeds": 1,
        "solver_steps": 5, "out": str(tmp_path / "run"),
    })  # fmt: skip
    script.job(config)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    found = {row["strategy"] for row in rows if row["metric"] == "accuracy" and row["labels"] == 20}
    assert found == {"random", "badge", "typiclust", "batchbald", "oracle"}


def unfinished(whole, path):
    """A run folder that lacks its last piece of meta-training and all of active learning."""
    shutil.copytree(whole[0], path)
    for file in (path / "steps").glob("active-*"):
        file.unlink()
    (path / "steps" / "meta-03.jsonl").unlink()
    return path


def said(err):
    """The lines on stderr, without what the progress bars drew."""
    lines = [part for line in err.splitlines() for part in line.split("\r") if part.strip()]
    return [line for line in lines if "it/s]" not in line and "?it/s" not in line and "s/it]" not in line]


def test_a_run_that_is_there_already(attempt, whole):
    status, err = attempt(out=str(whole[0]))
    assert status == 2
    assert err.splitlines() == [
        f"error: {whole[0]} already holds this run; go on with --resume or give another --out"
    ]  # fmt: skip
    for resume in (False, True):
        status, err = attempt(out=str(whole[0]), scratch_steps=6, resume=resume)
        assert status == 2
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert all(word in line for word in ("scratch_steps=5", "asked for is 6", "--out"))


@pytest.mark.parametrize("damage", ["manifest", "data", "config"])
def test_a_damaged_run_folder(attempt, whole, tmp_path, damage):
    run = unfinished(whole, tmp_path / "run")
    last = run / "checkpoints" / "piece_02"
    torn = {
        "manifest": last / "manifest.ocdbt",
        "data": max((path for path in last.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size),
        "config": run / "config.json",
    }[damage]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    status, err = attempt(out=str(run), resume=True)
    assert status == 2
    (line,) = said(err)
    assert line.startswith("error: ")
    assert str(run) in line
    assert "damaged" in line
    assert "delete" in line


def test_a_full_disk_in_a_step(attempt, whole, tmp_path):
    """/dev/full refuses every byte, as a full disk does: the step's file is led there. With room, the run goes on."""
    run = unfinished(whole, tmp_path / "run")
    (run / "steps" / "meta-03.jsonl.new").symlink_to("/dev/full")
    for wanted in (2, 0):
        status, err = attempt(out=str(run), resume=True)
        assert status == wanted, err
        if wanted:
            (line,) = said(err)
            assert line.startswith("error: No space left on device")
            assert "--resume" in line
            (run / "steps" / "meta-03.jsonl.new").unlink()
    assert (run / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_in_earnest(start, whole, small_disk):
    process = start(*words(**SMALL, out=small_disk / "run"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = said(err)
    assert line.startswith("error: ")
    assert "No space left on device" in line
    assert "make room" in line


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EACCES", "EROFS"])
def test_errors_of_the_system_are_one_line(script, capsys, number):
    import errno

    def fail():
        code = getattr(errno, number)
        raise OSError(code, os.strerror(code), "somewhere/file")

    with pytest.raises(SystemExit) as ended:
        script.main(fail)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "somewhere/file" in line
    assert "--resume" in line


@pytest.mark.real_data
def test_from_cifar10_to_mnist(typed, tmp_path, capfd):
    from metaal_jax.data import DataError, load

    for name in ("cifar10", "mnist"):
        try:
            load(name, "test")
        except DataError as error:
            pytest.skip(str(error))
    options = {
        **SMALL, "source": "cifar10", "target": "mnist", "pool": 200, "strategies": "random", "seeds_at_once": 2,
        "meta_steps": 20, "shape_classes": 500, "ways": 5, "learners": "maml",
    }  # fmt: skip
    typed(*words(**options, out=tmp_path / "run"))
    assert "cifar10 to mnist" in capfd.readouterr().out
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    mean = {(row["metric"], row["labels"]): row["mean"] for row in rows if "mean" in row}
    assert mean["final_accuracy", 20] > 0.2  # twice chance
