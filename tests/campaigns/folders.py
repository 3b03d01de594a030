"""Run folders under people: damaged files, wrong command lines, kills, two processes in one folder.

    python tests/campaigns/folders.py [--kills 30] [--seed 0] [damages | commands | kills | two | script ...]

A study of a few steps leaves a folder; each of its files is torn, emptied, swapped, taken away, made a folder and so
on, and the study goes on: it must end with the same bytes, or be refused in one line without a change to any file.
What the line says to delete is deleted, and the study must then end with the same bytes. Command lines with a mistake
are given to every script: status 2 and one line, with nothing computed. The study is killed by SIGKILL at random
moments, in every other child between the moves of its files as well, and resumed; a second process is refused; and
`meta_active.py` itself is killed and resumed once. One line a kind; the exit status is 1 if anything was wrong. Gate:
`tests/test_run_folders.py` and `tests/test_options.py` do a part of it. About two minutes.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")


from metaal_jax.studies.folder import RunFolder, round_to
from metaal_jax.studies.options import parse
from metaal_jax.studies.usage import main as as_script

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 6


@dataclass(frozen=True)
class Config:
    """A study that computes nothing of interest."""

    seed: int = 0
    rate: float = 0.1


def study(path: Path, *, resume: bool, seed: int = 0, pause: float = 0.0) -> None:
    """A few steps of a few records."""
    folder = RunFolder(path, Config(seed=seed), resume=resume)
    for number in range(STEPS):

        def compute(number: int = number) -> list[dict]:
            draw = random.Random(f"{seed} {number}")
            time.sleep(pause)
            return [{"series": "toy", "at": number, "row": row, "value": round_to(draw.random())} for row in range(4)]

        folder.step(f"part-{number}" if number else "part of/a name", compute)


def attempt(function: Callable[[], None]) -> tuple[int, list[str], str]:
    """Exit status, what was said on stderr, and an error that should have been a line there."""
    said, status, fault = io.StringIO(), 0, ""
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            as_script(function)
        except SystemExit as ended:
            status = int(ended.code or 0)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
    return status, said.getvalue().splitlines(), fault


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its lock, as far as they may be read."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != ".lock" and os.access(file, os.R_OK)}  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    """What a run must leave the same, whatever happened to it."""
    return {name: content for name, content in contents(folder).items()
            if name.startswith("steps/") or name in ("metrics.jsonl", "config.json")}  # fmt: skip


def _make_folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def _make_link(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def _make_loop(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _lines(file: Path, other: Path) -> None:
    content = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(content[:-1]))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "deleted": lambda file, other: file.unlink(),
    "emptied": lambda file, other: file.write_bytes(b""),
    "torn": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "without its last line": _lines,
    "with a changed digit": lambda file, other: file.write_bytes(file.read_bytes().replace(b"0.", b"1.", 1)),
    "no text": lambda file, other: file.write_bytes(b"\xff\xfe\x00garbage"),
    "another's": lambda file, other: file.write_bytes(other.read_bytes()),
    "a list": lambda file, other: file.write_bytes(b"[1, 2]\n"),
    "lengthened": lambda file, other: file.write_bytes(file.read_bytes() + b'{"more": 1}\n'),
    "a folder": _make_folder,
    "a link to nowhere": _make_link,
    "a link to itself": _make_loop,
    "not readable": lambda file, other: file.chmod(0),
}  # fmt: skip
STEP = "steps/part-2.jsonl"
PLACES = ("config.json", "environment.json", "metrics.jsonl", "times.jsonl", ".lock", STEP)
HARMLESS = ("metrics.jsonl", "times.jsonl", ".lock")  # they are written anew, or say nothing of results


def damage(folder: Path, sound: Path, other: Path, place: str, way: str) -> str:
    """Damages a file of a copy of a run and goes on; gives `refused`, `the same`, or what was wrong."""
    copy = folder / "copy"
    shutil.copytree(sound, copy)
    try:
        WAYS[way](copy / place, other / place)
        # A file of another step of the same run has the right run and the wrong name.
        before = contents(copy)
        status, said, fault = attempt(lambda: study(copy, resume=True))
        said = [line for line in said if not line.startswith("warning: ")]
        if fault:
            return fault
        if status == 0:
            return "the same" if results(copy) == results(sound) else "other results"
        if status != 2 or len(said) != 1 or not said[0].startswith("error: ") or str(copy) not in said[0]:
            return f"status {status}: {said}"
        if place not in HARMLESS and contents(copy) != before:
            return "refused, with changed files"
        if "delete it" in said[0]:
            named = copy / place
            shutil.rmtree(named) if named.is_dir() and not named.is_symlink() else named.unlink()
            status, said, fault = attempt(lambda: study(copy, resume=True))
            if status or fault or results(copy) != results(sound):
                return f"not mended by what was said: {said} {fault}"
        return "refused"
    finally:
        shutil.rmtree(copy)


def damages(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Every way at every place."""
    sound, other = folder / "sound", folder / "other"
    study(sound, resume=False)
    study(other, resume=False, seed=1)
    counts, wrong = {"refused": 0, "the same": 0}, []
    for place in PLACES:
        for way in WAYS:
            outcome = damage(folder, sound, other, place, way)
            if outcome in counts:
                counts[outcome] += 1
            else:
                wrong.append(f"{place} {way}: {outcome}")
    return counts, wrong


class Mistake(NamedTuple):
    """A command line and a word of what must be said."""

    script: str
    words: tuple[str, ...]
    said: str


def mistakes(folder: Path) -> list[Mistake]:
    """At least sixty command lines, each with one mistake that is seen before any data is read."""
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("")
    found: list[Mistake] = []
    scripts = {
        "meta_active": ("logistic-ridge", "budget"), "strategies": ("prior-precision", "members"),
        "evaluate_policy": (None, "pool"), "many_targets": (None, "seeds"), "learn_policy": ("deviation", "forms"),
        "compare_trainings": ("minutes", "runs"), "few_shot": ("inner-rate", "ways"),
        "active_regression": ("ridge", "budget"), "sinusoids": ("rate", "tasks"), "tune_scratch": (None, "seeds"),
    }  # fmt: skip
    for script, (real, whole) in scripts.items():
        save = "--out" if script == "tune_scratch" else "--save-results"
        also = ("--out", "x.json") if script == "tune_scratch" else ()
        found += [
            Mistake(script, ("--nothing", "1"), "--nothing"),
            Mistake(script, (f"--{whole}", "0", *also), f"--{whole} 0 must be at least"),
            Mistake(script, (f"--{whole}", "many", *also), f"--{whole}"),
            Mistake(script, ("--seed", "9" * 20, *also), "--seed"),
            Mistake(script, ("--seed", "-1", *also), "--seed -1 must be from 0"),
            Mistake(script, (save, "/proc/no/results"), "cannot be written"),
            Mistake(script, (save, str(folder / "file" / "results")), "is a file"),
        ]
        for value in ("nan", "inf", "-1", "1e300") if real else ():
            found.append(Mistake(script, (f"--{real}", value), f"--{real} "))
    found += [
        Mistake("few_shot", ("--weights", "nan"), "nan must be a finite number"),
        Mistake("learn_policy", ("--strengths", "0.5,inf"), "inf must be a finite number"),
        Mistake("learn_policy", ("--save-policy", "/proc/policy.json"), "--save-policy"),
        Mistake("strategies", ("--batches", "ten"), "whole numbers"),
        Mistake("strategies", ("--batches", "9" * 20), "at most"),
        Mistake("evaluate_policy", ("--batches", "0"), "at least 1"),
        Mistake("meta_active", ("--meta-steps", "0"), "--meta-steps 0 must be at least 1"),
        Mistake("meta_active", ("--filters", "0"), "--filters 0 must be at least 1"),
        Mistake("meta_active", ("--save-results", "curves.png"), "end it in .json"),
        Mistake("meta_active", ("--norm", "layer"), "--norm"),
        Mistake("sinusoids", ("--shots", "0"), "--shots 0 must be at least 1"),
        Mistake("active_regression", ("--sets", "iris"), "unknown table 'iris'"),
        Mistake("tune_scratch", ("--rates", "nan", "--out", "x.json"), "--rates nan"),
    ]
    return found


def command(mistake: Mistake) -> str:
    """What is wrong with what a script does with a command line; nothing if it is refused as it should be."""
    script = importlib.import_module(mistake.script)
    given, sys.argv = sys.argv, [f"experiments/{mistake.script}.py", *mistake.words]
    try:
        status, said, fault = attempt(lambda: script.job(parse(script.Config)))
    finally:
        sys.argv = given
    if fault or status != 2 or len(said) != 1 or not said[0].startswith("error: ") or mistake.said not in said[0]:
        return f"{mistake.script} {' '.join(mistake.words)}: status {status}, {said} {fault}"
    return ""


def commands(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Every mistake."""
    sys.path.insert(0, str(ROOT / "experiments"))
    tried = mistakes(folder)
    wrong = list(filter(None, map(command, tried)))
    return {"refused in one line": len(tried) - len(wrong)}, wrong


def _child(path: Path, *, slow: bool, pause: float) -> int:
    """Starts the study in a process of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks; nothing here has used it yet
        process = os.fork()
    if process:
        return process
    if slow:
        replace = os.replace

        def late(*places: str) -> None:
            time.sleep(0.01)
            replace(*places)
            time.sleep(0.01)

        os.replace = late  # type: ignore[assignment]
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    status = 1
    try:
        study(path, resume=True, pause=pause)
        status = 0
    finally:
        os._exit(status)


def kills(folder: Path, *, times: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Each run is killed up to four times, then resumed to its end."""
    draw, wrong, done, ran = random.Random(seed), [], 0, 0
    sound = folder / "sound"
    process = _child(sound, slow=False, pause=0)  # this process must not start JAX: children could not be forked
    if os.waitpid(process, 0)[1]:
        return {}, ["the study does not run"]
    while done < times:
        run, ran = folder / f"run-{ran}", ran + 1
        for number in range(draw.randint(1, 4)):
            process = _child(run, slow=number % 2 == 1, pause=0.05)
            time.sleep(draw.uniform(0, 0.5))
            os.kill(process, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            done += killed
            if not killed:  # it came to its end before
                break
        process = _child(run, slow=False, pause=0)
        if os.waitpid(process, 0)[1]:
            wrong.append(f"{run.name} did not go on: {sorted(contents(run))}")
        elif results(run) != results(sound):
            wrong.append(f"{run.name} ended with other bytes")
        shutil.rmtree(run)
    return {"kills": done, "runs ended with the same bytes": ran - len(wrong)}, wrong


def two(folder: Path) -> tuple[dict[str, int], list[str]]:
    """A second process is refused while one runs, and goes on once that was killed; with and without `flock`."""
    wrong, refused = [], 0
    code = ("import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import folders, time\n"
            "folders.study(Path(sys.argv[2]), resume=True, pause=float(sys.argv[3]))")  # fmt: skip
    own = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = folder / "run"
    first = subprocess.Popen([sys.executable, "-c", code, own, str(run), "5"], env=environment)
    deadline = time.monotonic() + 60
    while not (run / "environment.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    status, said, fault = attempt(lambda: study(run, resume=True))
    if status != 2 or len(said) != 1 or f"in use by process {first.pid}" not in said[0] or fault:
        wrong.append(f"not refused: {status} {said} {fault}")
    refused += not wrong
    first.kill()
    first.wait()
    status, said, fault = attempt(lambda: study(run, resume=True))
    if status or fault:
        wrong.append(f"not free after the kill: {said} {fault}")
    return {"refused": refused, "free after a kill": 1 - len(wrong)}, wrong


def script(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The main job, tiny, killed thrice and resumed."""
    words = ("--learners", "logistic", "--strategies", "random,margin", "--seeds", "4", "--seeds-at-once", "1",
             "--budget", "20", "--pool", "100", "--test", "50", "--solver-steps", "5")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(run: Path) -> subprocess.Popen:
        given = [sys.executable, str(ROOT / "experiments/meta_active.py"), *words, "--out", str(run), "--resume"]
        return subprocess.Popen(given, env=environment, cwd=folder, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)  # fmt: skip

    whole, run = folder / "whole", folder / "run"
    wrong = [] if start(whole).wait() == 0 else ["the main job does not run"]
    for wanted in (1, 3, 6):
        process, deadline = start(run), time.monotonic() + 120
        while len(list(run.glob("steps/*.jsonl"))) < wanted and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    if start(run).wait() or results(run) != results(whole):
        wrong.append("the killed main job ended otherwise")
    return {"kills": 3, "the same bytes": int(not wrong)}, wrong


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = ("kills", "two", "damages", "commands", "script")  # forks first: JAX is started by what follows
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(kinds)}; all by default")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(kinds):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(kinds)}")
    place, worst = Path(tempfile.mkdtemp(prefix="folders-")), 0
    try:
        for kind in [kind for kind in kinds if kind in (given.kinds or kinds)]:
            folder, options = place / kind, {"times": given.kills, "seed": given.seed} if kind == "kills" else {}
            folder.mkdir()
            counts, wrong = globals()[kind](folder, **options)
            print(f"{kind}: {', '.join(f'{count} {what}' for what, count in counts.items())}, {len(wrong)} wrong",
                  flush=True)  # fmt: skip
            for line in wrong:
                print(f"  {line}", file=sys.stderr)
            worst |= bool(wrong)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
