"""Options, command lines and places under mistakes; interrupts, extras and helps."""

import dataclasses
import importlib
import io
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Annotated

import jax
import pytest

from campaigns import folders
from campaigns.folders import attempt, contents
from metaal_jax.studies import files, options, processes, usage

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "meta_active", "strategies", "evaluate_policy", "many_targets", "learn_policy", "compare_trainings", "few_shot",
    "active_regression", "sinusoids", "tune_scratch",
)  # fmt: skip


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module


@dataclasses.dataclass(frozen=True)
class Inner:
    decay: float = 0.5
    steps: int = 3


@dataclasses.dataclass
class Options:
    rate: float = 0.1
    tasks: int = 3
    data_seed: int = 0
    members: Annotated[int, options.at_least(2)] = 4
    share: Annotated[float, options.between(0, 1)] = 0.5
    scale: Annotated[float, options.above(0)] = 1.0
    shift: Annotated[float, options.Range()] = -1.0
    most: int | None = None
    rates: tuple[float, ...] = (0.1, 0.2)
    fast: bool = False
    inner: Inner = Inner()


WRONG = {
    "--rate nan must be a finite number, at least 0": {"rate": math.nan},
    "--rate inf must be a finite number, at least 0": {"rate": math.inf},
    "--rate -0.1 must be at least 0": {"rate": -0.1},
    "--rate -1 must be at least 0": {"rate": -1},
    "--rate 1e+39 must be a finite number, at least 0": {"rate": 1e39},
    "--tasks 0 must be at least 1": {"tasks": 0},
    "--tasks 2147483648 must be at most 2147483647": {"tasks": 2**31},
    "--data-seed -1 must be from 0 to 4294967295": {"data_seed": -1},
    "--data-seed 4294967296 must be from 0 to 4294967295": {"data_seed": 2**32},
    "--members 1 must be at least 2": {"members": 1},
    "--share 1.5 must be from 0 to 1": {"share": 1.5},
    "--share nan must be a finite number from 0 to 1": {"share": math.nan},
    "--scale 0.0 must be above 0": {"scale": 0.0},
    "--scale nan must be a finite number, above 0": {"scale": math.nan},
    "--shift -inf must be a finite number": {"shift": -math.inf},
    "--most 0 must be at least 1": {"most": 0},
    "--rates nan must be a finite number, at least 0": {"rates": (0.1, math.nan)},
    "--rates is empty; give something, or leave it out": {"rates": ()},
    "--steps 0 must be at least 1": {"inner": Inner(steps=0)},
}


def hints_of(config):
    """The types of all options, those in groups too."""
    found = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        inner = getattr(config, name)
        found |= hints_of(inner) if dataclasses.is_dataclass(inner) else {name: hint}
    return found


@pytest.mark.parametrize("said", WRONG)
def test_wrong_values(said):
    options.check_options(Options(data_seed=2**32 - 1, most=2**31 - 1, rate=0, shift=-3e38))
    with pytest.raises(usage.UsageError) as found:
        options.check_options(Options(**WRONG[said]))
    assert str(found.value) == said


def test_groups_lie_flat(monkeypatch):
    """On the command line, in files and where another value is given; a name in two groups is a mistake."""
    names = [field.name for field in dataclasses.fields(Options)]
    assert list(options.flat(Options())) == [*names[:-1], "decay", "steps"]
    monkeypatch.setattr(sys, "argv", ["script.py", "--steps", "5", "--rate", "0.3"])
    assert options.parse(Options) == options.with_options(Options(), steps=5, rate=0.3)
    assert options.with_options(Options(), steps=5).inner == Inner(steps=5)
    with pytest.raises(TypeError, match=r"no option step$"):
        options.with_options(Options(), step=5)
    twice = dataclasses.make_dataclass("Twice", [("steps", int, 1), ("inner", Inner, Inner())], frozen=True)
    with pytest.raises(TypeError, match="Twice has two options with the name steps"):
        options.flat(twice())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_of_every_script_is_checked(scripts, name):
    config = scripts(name).Config()
    options.check_options(config)
    for option, hint in hints_of(config).items():
        kinds = {*typing.get_args(hint), hint}
        several = typing.get_origin(hint) is tuple
        wrong = [math.nan, math.inf, -math.inf] if float in kinds else [-1, 10**20] if int in kinds else []
        for value in wrong:
            with pytest.raises(usage.UsageError, match=f"^--{option.replace('_', '-')} .* must be "):
                options.check_options(options.with_options(config, **{option: (value,) if several else value}))


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_command_lines(scripts, tmp_path, name):
    tried = [mistake for mistake in folders.mistakes(tmp_path) if mistake.script == name]
    assert len(tried) >= 6
    assert list(filter(None, map(folders.command, tried))) == []
    assert [file.name for file in tmp_path.rglob("*")] == ["file"]


def test_there_are_enough_mistakes(tmp_path):
    assert len(folders.mistakes(tmp_path)) >= 60
    assert len(folders.PLACES) * len(folders.WAYS) >= 40


def test_places_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "there.json").write_text("old")
    for path, is_folder in (("new/deep/r.json", False), ("there.json", False), (".", True), ("new/deep", True)):
        assert files.why_not_writable(tmp_path / path, folder=is_folder) is None
    assert contents(tmp_path) == {"there.json": b"old"}
    assert files.why_not_writable(tmp_path, folder=False) == f"{tmp_path} is a folder"
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "denied" in files.why_not_writable(tmp_path / "r.json", folder=False)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_one_line_on_every_terminal(monkeypatch, encoding):
    for words, said in {
        "--tusks 3": "Unrecognized options: --tusks, 3; did you mean --tasks? --help shows all options",
        "--tasks x": "Error parsing --tasks: invalid literal for int() with base 10: 'x'; --help shows all options",
    }.items():
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(usage.UsageError, match="^" + re.escape(said) + "$"):
            options.parse(Options, words=words.split())


def test_an_interrupt_has_a_line_of_its_own(monkeypatch, capsys):
    from tqdm import tqdm

    def job():
        for _ in tqdm(range(3), desc="bar"):
            raise KeyboardInterrupt

    monkeypatch.setattr(usage.os, "_exit", sys.exit)  # as it ends, but for this process
    with pytest.raises(SystemExit) as ended:
        usage.main(job)
    assert ended.value.code == 130
    assert capsys.readouterr().err.split("\n")[-2:] == [
        "error: interrupted; finished steps are kept: go on with --resume", "",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_too_little_memory_is_one_line(error):
    def job():
        raise error

    status, (line,), fault = attempt(job)
    assert (status, fault) == (2, "")
    assert "not enough memory" in line


def test_processes_start_without_notes(monkeypatch):
    for before, inside in (("1", "3"), ("0", "0")):
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before)
        with processes._quiet():
            assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == inside
        assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == before


def test_tables_alone_need_no_network(scripts, tmp_path, monkeypatch):
    script = scripts("many_targets")
    reached = []

    def stop(work, problems, folder, **_):
        reached.append(sorted(problems))
        raise usage.UsageError("far enough")

    monkeypatch.setattr(script, "run_cells", stop)
    config = options.with_options(
        script.Config(), targets="iris,wine", strategies="random,margin", seeds=2, source="nowhere",
        meta_run=str(tmp_path / "nothing"), out=str(tmp_path / "run"),
    )  # fmt: skip
    assert attempt(lambda: script.job(config))[1][-1] == "error: far enough"
    assert reached == [[("columns", "iris"), ("columns", "wine")]]


def test_help_of_tables_draws_none(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        scripts("tables").write_all()
    assert ended.value.code == 0
    assert "usage: " in (said := capsys.readouterr().out)
    assert "| " not in said


def test_studies_need_no_extra():
    """Importing them, or the package, takes nothing that belongs to one."""
    code = """if True:
        import sys
        extra = ("tqdm", "tyro", "tabulate", "matplotlib", "tensorboardX")
        from metaal_jax import *
        assert not set(extra) & set(sys.modules)
        sys.modules.update(dict.fromkeys(extra))
        from metaal_jax import studies
        for name in studies.__all__:
            getattr(studies, name)
        from metaal_jax.studies import options, usage
        try:
            options.parse(int)
        except usage.UsageError as error:
            assert str(error) == "tyro is not installed; install it with: pip install 'metaal_jax[experiments]'", error
        else:
            raise AssertionError("parsed without Tyro")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
