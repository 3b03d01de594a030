"""Run folders under mistakes and damage, by a study of a few toy steps."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from campaigns import folders
from campaigns.folders import STEP, attempt, contents, results, study
from metaal_jax.studies import files, folder, groups

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sound run, and one of another config."""
    place = tmp_path_factory.mktemp("runs")
    study(place / "sound", resume=False)
    study(place / "other", resume=False, seed=1)
    return place / "sound", place / "other"


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the sound run."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


# What is refused; all else goes on to the same results.
REFUSED = {
    "config.json": set(folders.WAYS) - {"not readable"},
    STEP: set(folders.WAYS) - {"not readable", "deleted"},
    "environment.json": {"emptied", "torn", "without its last line", "no text", "a list", "lengthened", "a folder"},
    "metrics.jsonl": {"a folder"},
    "times.jsonl": {"a folder"},
    ".lock": {"a folder", "a link to itself"},
}


@pytest.mark.parametrize("place", folders.PLACES)
@pytest.mark.parametrize("way", folders.WAYS)
def test_a_damaged_file_is_refused_or_harmless(runs, tmp_path, place, way):
    if way == "not readable" and os.geteuid():
        wanted = {"refused"} if place not in folders.HARMLESS else {"refused", "the same"}
    else:
        wanted = {"refused" if way in REFUSED[place] else "the same"}
    assert folders.damage(tmp_path, *runs, place, way) in wanted


def test_the_campaign_can_tell(runs, tmp_path, monkeypatch):
    """A reader that does not check is caught."""
    plain = lambda self, file: [json.loads(line) for line in file.read_text().splitlines()[1:]]  # noqa: E731
    monkeypatch.setattr(folder.RunFolder, "_read", plain)
    for way in ("with a changed digit", "another's", "without its last line", "no text"):
        assert folders.damage(tmp_path, *runs, STEP, way) not in ("refused", "the same"), way


def swap(run, _):
    first, second = run / STEP, run / "steps/part-3.jsonl"
    first.rename(run / "aside")
    second.rename(first)
    (run / "aside").rename(second)


def file_for(name):
    def change(run, _):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).write_text("")

    return change


def only(*kept):
    def change(run, _):
        for file in run.iterdir():
            if file.name not in kept:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    return change


STATES = {  # what is done to a whole run; what the line must say, or None where it goes on
    "two steps swapped": (swap, ["part-2.jsonl", "is the step part-3 of this run", "delete it"]),
    "steps a file": (file_for("steps"), ["steps is a file, where a run keeps a folder"]),
    "tensorboard a file": (file_for("tensorboard"), ["tensorboard is a file"]),
    "config.json of another run": (lambda run, other: shutil.copy(other / "config.json", run), ["seed=1", "--out"]),
    "config.json without its mark": (
        lambda run, _: (run / "config.json").write_text('{"seed": 0, "rate": 0.1}'), None),
    "all steps of another run": (
        lambda run, other: shutil.copytree(other / "steps", run / "steps", dirs_exist_ok=True), ["of another run"]),
    "no config.json": (only("steps", "environment.json"), ["holds steps", "--out"]),
    "steps alone": (only("steps"), ["holds steps", "--out"]),
    "no steps": (only("config.json", "environment.json", "metrics.jsonl", "times.jsonl"), None),
    "config.json alone": (only("config.json"), None),
    "nothing": (only(), None),
    "leftovers of a write": (lambda run, _: (run / "config.json.new").write_text("{"), None),
    "a step that was not moved": (lambda run, _: (run / STEP).rename(run / f"{STEP}.new"), None),
    "a torn time": (lambda run, _: (run / "times.jsonl").write_text('{"step": "part-1", "seco'), None),
    "times that are no text": (lambda run, _: (run / "times.jsonl").write_bytes(b"\xff\x00"), None),
    "something beside it": (lambda run, _: (run / "notes.txt").write_text("mine"), None),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_folder_in_another_state(runs, run, state):
    change, said = STATES[state]
    change(run, runs[1])
    before = contents(run)
    status, err, fault = attempt(lambda: study(run, resume=True))
    assert not fault
    if said is None:
        assert (status, err) == (0, [])
        wanted = {name: content for name, content in results(run).items() if not name.endswith(".new")}
        assert wanted == results(runs[0])
    else:
        assert status == 2
        (line,) = err
        assert all(word in line for word in said), line
        assert contents(run) == before


def without_heads(run):
    """The run as it was before steps had a first line."""
    for file in (run / "steps").iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    held = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({k: v for k, v in held.items() if k != folder.MARK}))


def test_old_folders_go_on(runs, run):
    without_heads(run)
    (run / "steps" / "part-5.jsonl").unlink()
    assert attempt(lambda: study(run, resume=True)) == (0, [], "")
    assert results(run) == results(runs[0])


@pytest.mark.parametrize("way", ["emptied", "torn in a line", "no text", "a list", "a folder", "a link to nowhere"])
def test_old_folders_are_checked_as_far_as_they_can_be(runs, run, way):
    """A file that was cut at the end of a line cannot be told from a whole one; nor can another run's."""
    without_heads(run)
    if way == "torn in a line":
        (run / STEP).write_bytes((run / STEP).read_bytes()[:-3])
    else:
        folders.WAYS[way](run / STEP, runs[1] / STEP)
    status, (line,), fault = attempt(lambda: study(run, resume=True))
    assert (status, fault) == (2, "")
    assert "part-2.jsonl is damaged" in line
    assert "delete it" in line


STARTS = {  # what a kill may leave before the first step is there
    "nothing": (),
    "a lock": (".lock",),
    "steps, as it once was made first": ("steps/",),
    "a config under way": (".lock", "config.json.new"),
    "no environment": (".lock", "steps/", "config.json"),
    "an environment under way": (".lock", "config.json", "environment.json.new"),
    "no steps folder": (".lock", "config.json", "environment.json"),
    "a step under way": (".lock", "config.json", "environment.json", "steps/part-1.jsonl.new"),
}  # fmt: skip


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_came_to_nothing_claims_nothing(runs, tmp_path, start, seed, resume):
    place = tmp_path / "run"
    place.mkdir()
    for name in STARTS[start]:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).mkdir() if name.endswith("/") else (place / name).write_bytes(
            (runs[seed] / name).read_bytes() if name in ("config.json", "environment.json") else b"{"
        )
    assert attempt(lambda: study(place, resume=resume)) == (0, [], "")
    shutil.rmtree(place / "steps/part-1.jsonl.new", ignore_errors=True)
    assert results(place) == results(runs[0])


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name in ("config.json", "weights.bin"):
        (tmp_path / name).write_text('{"layers": 3}')
    before = contents(tmp_path)
    status, (line,), _ = attempt(lambda: study(tmp_path, resume=True))
    assert status == 2
    assert "is not empty and holds no run; give another --out" in line
    assert contents(tmp_path) == before
    assert not (tmp_path / ".lock").exists()


PLACES = {
    "/proc": (lambda path: Path("/proc/run"), "cannot be written"),
    "a file on the way": (lambda path: path / "file" / "run", "is a file"),
    "a name that is too long": (lambda path: path / ("a" * 300), "too long"),
    "a loop": (lambda path: path / "loop" / "run", "cannot be written"),
    "a link to nowhere": (lambda path: path / "link", "cannot be made"),
    "a file": (lambda path: path / "file", "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("/proc/nowhere/at-all")
    make, said = PLACES[place]
    status, (line,), fault = attempt(lambda: study(make(tmp_path), resume=False))
    assert (status, fault) == (2, "")
    assert said in line
    assert "--out" in line


@dataclasses.dataclass(frozen=True)
class Inner:
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Group:
    width: int = 7
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Nested:
    seed: int = 0
    rate: float = 0.1
    name: str | None = None
    group: Group = dataclasses.field(default_factory=lambda: Group(inner=Inner(steps=4)))


def test_new_options_do_not_break_old_folders(run):
    def open_as(config, **options):
        return attempt(lambda: folder.RunFolder(run, config, resume=True, **options))

    assert open_as(Nested()) == (0, [], "")
    held = json.loads((run / "config.json").read_text())
    assert {name: value for name, value in held.items() if name != folder.MARK} == {
        "seed": 0, "rate": 0.1, "name": None, "width": 7, "steps": 4,
    }  # fmt: skip
    for config, said in (
        (Nested(name="x"), "name=None, asked for is 'x'"),
        (Nested(group=Group()), "steps=4, asked for is 3"),
        (Nested(group=Group(width=5, inner=Inner(4))), "width=7, asked for is 5"),
        (Nested(rate=0.2), "rate=0.1, asked for is 0.2"),
    ):
        status, (line,), _ = open_as(config)
        assert status == 2
        assert said in line
    # An option of a group that is newer than the folder.
    del held["steps"]
    (run / "config.json").write_text(json.dumps(held))
    assert open_as(Nested()) == (0, [], "")
    assert open_as(Nested(rate=0.3), free=frozenset({"rate"})) == (0, [], "")
    # An option that there is no more: as if it had not been given, or refused.
    for value, status in ((None, 0), (3, 2)):
        (run / "config.json").write_text(json.dumps({**held, "gone": value}))
        found, err, _ = open_as(Nested())
        assert found == status
        assert [line for line in err if "gone=3, an option that there is no more" in line] == err


def test_what_does_not_decide_the_results_may_differ(tmp_path, monkeypatch):
    """Where data, folder and results are; without --out, the folder is the experiment's."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.make_dataclass("Config", [("run", groups.Run), ("save_results", str | None, None)])

    def open_as(run, **options):
        return attempt(lambda: groups.open_folder(config(run, **options), run, "runs/mine"))

    assert open_as(groups.Run()) == (0, [], "")
    folder.RunFolder("runs/mine", config(groups.Run()), resume=False, free=groups.FREE).step("a", list)
    status, (line,), _ = open_as(groups.Run())
    assert (status, "go on with --resume" in line) == (2, True)
    assert open_as(groups.Run(resume=True, data_dir="there"), save_results="r.json") == (0, [], "")
    assert "seed=0, asked for is 1" in open_as(groups.Run(resume=True, seed=1))[1][0]
    assert open_as(groups.Run(seed=1, out="other")) == (0, [], "")
    assert (tmp_path / "other" / "config.json").exists()


def test_another_environment_is_said_and_kept(runs, run, monkeypatch):
    now = json.loads((run / "environment.json").read_text())
    then = {**now, "device": "abacus", "versions": {**now["versions"], "jax": "0.9.0"}}
    monkeypatch.setattr(folder, "environment", lambda: then)
    status, (line,), _ = attempt(lambda: study(run, resume=True))
    assert status == 0
    assert line.startswith(f"warning: {run} goes on in another environment")
    assert f"device {now['device']} then, abacus now; jax {now['versions']['jax']} then, 0.9.0 now" in line
    assert json.loads((run / "environment.json").read_text()) == {**then, "earlier": [now]}
    assert attempt(lambda: study(run, resume=True)) == (0, [], "")
    assert json.loads((run / "environment.json").read_text()) == {**then, "earlier": [now]}
    assert results(run) == results(runs[0])


HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.write(handle, f"{os.getpid()}\\n".encode())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(runs, run):
    (run / ".lock").unlink()
    held = [sys.executable, "-S", "-c", HOLD, str(run / ".lock")]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        before = contents(run)
        status, (line,), _ = attempt(lambda: study(run, resume=True))
        assert status == 2
        assert f"{run} is in use by process {process.pid}; wait for its end or give another --out" in line
        assert contents(run) == before
        process.send_signal(signal.SIGKILL)
    assert attempt(lambda: study(run, resume=True)) == (0, [], "")


def test_a_lock_is_this_process_s_own(tmp_path):
    first = files.take_lock(tmp_path / ".lock")
    assert files.take_lock(tmp_path / ".lock") is first
    (tmp_path / ".lock").unlink()  # a folder that was deleted and made anew
    second = files.take_lock(tmp_path / ".lock")
    assert isinstance(second, files.Lock)
    assert second is not first


def test_locks_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    lock = files.take_lock(tmp_path / ".lock")
    monkeypatch.setattr(files, "_held", {})  # as another process sees it
    assert files.take_lock(tmp_path / ".lock") == f"process {os.getpid()}; if it has ended, delete {tmp_path}/.lock"
    del lock
    assert not (tmp_path / ".lock").exists()
    assert isinstance(files.take_lock(tmp_path / ".lock"), files.Lock)


def test_kills():
    """A small part of the campaign; its children are forked, so it has a process of its own."""
    words = [sys.executable, str(ROOT / "tests/campaigns/folders.py"), "kills", "--kills", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ", 0 wrong" in done.stdout
