"""The command `metaal`: the doors' own answers, mistakes in one line, and helps without JAX."""

import ast
import csv
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metaal_jax as ml
from campaigns import cli as campaign
from metaal_jax import cli, door_inputs, learners, names, policies
from metaal_jax.studies import main_job, usage

ROOT = Path(__file__).resolve().parent.parent
N = 40
RNG = np.random.default_rng(0)
TRUTH = np.arange(N) % 2
X = np.round(RNG.normal(size=(N, 3)) + 2 * np.eye(2, 3)[TRUTH], 6)
KIND = np.asarray(["ant", "bee"])[TRUTH]
LABELS = {row: str(KIND[row]) for row in (5, 2, 9, 0)}
IDS = [f"r{row}" for row in range(N)]


def sheet(header, rows, delimiter=","):
    return "".join(delimiter.join(map(str, row)) + "\n" for row in [*([header] if header else []), *rows])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The same rows and labels in all forms."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", X)
    label = [LABELS.get(row, "") for row in range(N)]
    np.savez("rows.npz", x=X, kind=label, name=IDS, y=TRUTH, group=np.arange(N) // 5)
    whole = [(IDS[row], *X[row], label[row]) for row in range(N)]
    Path("rows.csv").write_text(sheet(("name", "a", "b", "c", "kind"), whole))
    Path("semicolon.csv").write_text("\ufeff" + sheet(("name", "a", "b", "c", "kind"), whole, ";"))
    Path("bare.csv").write_text(sheet(None, X, "\t"))
    Path("labels.csv").write_text(sheet(("row", "label"), LABELS.items()))
    Path("by_id.csv").write_text(sheet(("name", "label"), [(IDS[row], kind) for row, kind in LABELS.items()]))
    return tmp_path


def said(capsys, words):
    cli.main(words.split())
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


FORMS = {
    "rows.npy --labels labels.csv": False,
    "rows.npz --label-column kind": False,
    "rows.npz --label-column kind --id name": True,
    "rows.csv --label-column kind --drop name": False,
    "semicolon.csv --label-column kind --id name": True,
    "rows.csv --labels by_id.csv --id name --drop kind": True,
    "bare.csv --labels labels.csv": False,
}


@pytest.mark.parametrize("form", FORMS)
def test_suggest_gives_the_rows_of_the_door(folder, capsys, form):
    wanted = ml.suggest(X, LABELS, k=4, seed=3).tolist()
    found = said(capsys, f"suggest {form} -k 4 --seed 3").split()
    assert found == ([IDS[row] for row in wanted] if FORMS[form] else [str(row) for row in wanted])


def test_options_reach_the_door(folder, capsys):
    given = {"strategy": "bald", "learner": "ridge", "scale": "common", "members": 5, "seed": 1}
    wanted = ml.suggest(X, LABELS, k=3, details=True, **given)
    text = said(capsys, "suggest rows.npy --labels labels.csv -k 3 --strategy bald --learner ridge --scale common "
                        "--members 5 --seed 1 --json --out found.json")  # fmt: skip
    assert Path("found.json").read_text() == text
    found = json.loads(text)
    assert (found["classes"], found["labels"], found["strategy"]) == (["ant", "bee"], 4, "bald")
    assert [one["row"] for one in found["suggested"]] == wanted.rows.tolist()
    for one in found["suggested"]:
        np.testing.assert_allclose(list(one["probabilities"].values()), wanted.probabilities[one["row"]], atol=1e-6)
        assert one["score"] == pytest.approx(float(wanted.scores[one["row"]]))


def test_nothing_labelled_and_all_labelled(folder, capsys):
    assert said(capsys, "suggest rows.npy -k 2").split() == [str(row) for row in ml.suggest(X, k=2)]
    Path("all.csv").write_text(sheet(("row", "label"), enumerate(KIND)))
    cli.main(["suggest", "rows.npy", "--labels", "all.csv"])
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    assert captured.err == "warning: every row is labelled; there is nothing to suggest\n"


def test_a_state_goes_on_as_the_doors_does(folder, capsys):
    given = {"k": 3, "strategy": "omniglot", "details": True}
    first = ml.suggest(X, LABELS, **given)
    more = LABELS | {int(row): str(KIND[row]) for row in first.rows}
    more = dict(sorted(more.items(), reverse=True))
    wanted = ml.suggest(X, more, state=first.state, **given).rows.tolist()
    assert wanted != ml.suggest(X, more, **given).rows.tolist()  # it is not the labels alone
    words = "suggest rows.npy -k 3 --strategy omniglot --state state.json --labels"
    assert said(capsys, f"{words} labels.csv").split() == [str(row) for row in first.rows]
    Path("more.csv").write_text(sheet(("row", "label"), more.items()))
    held = Path("state.json").read_text()
    assert said(capsys, f"{words} more.csv").split() == [str(row) for row in wanted]
    Path("state.json").write_text(held)
    with pytest.raises(SystemExit):
        cli.main(["suggest", "rows.npy", "--state", "state.json"])
    assert "of a run with strategy 'omniglot', and this has 'uncertain_herding'" in capsys.readouterr().err
    Path("state.json").write_text(held.replace('"ant"', '"asp"'))
    with pytest.raises(SystemExit):
        cli.main(f"{words} labels.csv".split())
    assert "it was changed after it was saved" in capsys.readouterr().err


def test_predict_gives_the_probabilities_of_the_door(folder, capsys):
    wanted = ml.suggest(X, LABELS, k=1, details=True).probabilities
    table = list(csv.reader(io.StringIO(said(capsys, "predict rows.csv --id name --label-column kind"))))
    assert table[0] == ["name", "class", "probability"]
    assert [row[0] for row in table[1:]] == IDS
    assert [row[1] for row in table[1:]] == np.asarray(["ant", "bee"])[wanted.argmax(1)].tolist()
    np.testing.assert_allclose([float(row[2]) for row in table[1:]], wanted.max(1), atol=1e-6)
    assert said(capsys, "predict rows.npy --labels labels.csv --out classes.csv") == ""
    assert Path("classes.csv").read_text().splitlines()[1] == f"0,{table[1][1]},{table[1][2]}"


def test_compare_prints_and_saves_what_the_door_gives(folder, capsys):
    full = [(*X[row], KIND[row]) for row in range(N)]
    Path("full.csv").write_text(sheet(("a", "b", "c", "kind"), full))
    given = {"budget": 8, "batch_size": 4, "seeds": 2}
    study = ml.compare((X, KIND), ["random", "margin"], **given)
    words = "compare full.csv {} --label-column {} --strategies random,margin --budget 8 --batch-size 4 --seeds 2 {}"
    text = said(capsys, words.format("", "kind", "--save-results r.json --picture r.png"))
    assert study.table() in text
    assert "margin against random: " in text
    held = json.loads(Path("r.json").read_text())
    assert held["rows"] == [{**row, "target": "full.csv"} for row in study.rows()]
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")


def test_compare_of_several_sets(folder, capsys):
    np.savez("one.npz", x=X, y=TRUTH)
    np.savez("two.npz", x=X + 1, y=TRUTH)
    text = said(capsys, "compare one.npz two.npz --strategies random --budget 4 --batch-size 4 --seeds 2 "
                        "--save-results found")  # fmt: skip
    assert {file.name for file in Path("found").iterdir()} == {"one.json", "two.json"}
    assert text.splitlines()[-3].split() == ["strategy", "one.npz", "two.npz", "mean"]


def test_train_writes_what_suggest_takes(folder, capsys):
    given = {"shots": [1], "queries": 1, "steps": 4, "held_out": 0.25, "draws": 2, "hidden": [8], "seed": 5}
    wanted = ml.meta_train((X, TRUTH.astype(str)), groups=[str(row // 5) for row in range(N)], **given)
    text = said(capsys, "train rows.npz --group-column group --label-column y --shots 1 --queries 1 --steps 4 "
                        "--held-out 0.25 --draws 2 --hidden 8 --seed 5 --out learner.json")  # fmt: skip
    assert text.startswith(str(wanted))
    assert learners.load("learner.json").about == wanted.about
    found = said(capsys, "suggest rows.npy --labels labels.csv -k 3 --learner learner.json").split()
    assert found == [str(row) for row in ml.suggest(X, LABELS, k=3, learner=wanted)]


def test_strategies_are_all_listed_with_their_doors(capsys):
    lines = said(capsys, "strategies").splitlines()
    listed = {*names.STRATEGIES, *names.ADAPTIVE, *names.REGRESSION, *policies.shipped()}
    assert sorted(line.partition(":")[0] for line in lines) == sorted(listed)
    assert "max_herding: largest gain in kernel coverage (needs embedding; suggest, pick, compare)" in lines
    assert [door_inputs.doors_of(name) for name in ("oracle", "igs", "glister")] == [
        ("compare",), (), ("suggest", "compare")
    ]  # fmt: skip
    assert "remembers earlier rounds" in said(capsys, "strategies omniglot")


def test_prepare_says_where_or_what_to_install(capsys, monkeypatch, tmp_path):
    from metaal_jax.data import prepare

    monkeypatch.setattr(prepare, "prepare", lambda name, data_dir: f"{data_dir}/{name}")
    assert said(capsys, f"prepare mnist cifar10 --data-dir {tmp_path}") == (
        f"mnist: {tmp_path}/mnist\ncifar10: {tmp_path}/cifar10\n"
    )


def test_a_missing_extra_is_named_before_anything_is_computed(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "iris"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: tabulate is not installed; install it with: pip install 'metaal_jax[experiments]'\n"
    )


def test_wrong_command_lines(tmp_path):
    campaign.prepare(tmp_path)
    assert len(campaign.MISTAKES) >= 60
    tried = campaign.MISTAKES[::2]
    assert list(filter(None, (campaign.command(mistake, tmp_path) for mistake in tried))) == []


HEADS = (
    (["a,b", "1,2"], True),
    (["1,2", "3,4"], False),
    (["0,1", "3,4"], False),
    (["u,0.5,2", "v,3,4"], False),
    (["0,1,2", "3,4,5"], None),
    ([",0,1,2", "0,3,4,5"], None),
    (["id,1,2", "u,3,4"], None),
    (["a,1.5", "2,3"], None),
)


@pytest.mark.parametrize(("lines", "wanted"), HEADS)
def test_headers_are_seen_or_asked_for(tmp_path, lines, wanted):
    from metaal_jax.cli.files import read_sheet
    from metaal_jax.studies.usage import UsageError

    path = tmp_path / "some.csv"
    path.write_text("\n".join(lines))
    if wanted is None:
        with pytest.raises(UsageError, match="--header yes or --header no"):
            read_sheet(str(path))
    for header in {None: ("yes", "no")}.get(wanted, (None,)):
        assert (read_sheet(str(path), header).names is not None) == (wanted if header is None else header == "yes")


def test_defaults_are_those_of_the_library():
    doors = {"suggest": ml.suggest, "compare": ml.compare, "train": ml.meta_train}
    for name, door in doors.items():
        required = ["--group-column", "g", "--label-column", "y", "--out", "o"] if name == "train" else []
        found = vars(importlib.import_module(f"metaal_jax.cli.{name}").parse(["x", *required]))
        for option, parameter in inspect.signature(door).parameters.items():
            if option in found and parameter.default is not inspect.Parameter.empty and option != "state":
                given = found[option]
                assert (tuple(given) if isinstance(given, list) else given) == parameter.default, (name, option)


HELPS = [name for name in cli.COMMANDS if name != "study"]  # its options are those of a config of the library


def test_study_runs_the_main_job(capsys, monkeypatch):
    monkeypatch.setattr(main_job, "job", lambda config: print(config.sizes.budget, config.transfer.source))
    assert said(capsys, "study --budget 30 --source own.npz") == "30 own.npz\n"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/metaal", "study", "--budget", "30", "--resume"])
    assert usage.command() == "metaal study --budget 30"


def test_helps_are_given_without_jax(tmp_path):
    """Each help in one process, in which JAX cannot be imported."""
    code = f"""if True:
        import sys
        sys.modules["jax"] = None
        from metaal_jax import cli
        for words in [["--help"], ["--version"], *([name, "--help"] for name in {HELPS})]:
            try:
                cli.main(words)
            except SystemExit as ended:
                assert ended.code == 0, words
        assert not {{"numpy", "scipy", "sklearn", "flax"}} & set(sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: metaal {name}" in done.stdout for name in HELPS)
    assert "(default: uncertain_herding)" in done.stdout
    assert "--seed SEED           of all that is random (default: 0)" in done.stdout


def test_names_of_the_package_are_what_they_were():
    """Each is found, and what type checkers are told is what is there."""
    (told,) = (node for node in ast.parse(Path(ml.__file__).read_text()).body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in told.body for alias in node.names}
    assert sorted(homes) == sorted(ml.__all__)
    for name, home in homes.items():
        module = importlib.import_module(f"metaal_jax.{name}" if home == "metaal_jax" else home)
        assert getattr(ml, name) is (module if home == "metaal_jax" else getattr(module, name))
    with pytest.raises(AttributeError, match="has no attribute 'suggst'"):
        ml.suggst  # noqa: B018
