"""The README keeps its word: its code runs, and every table is the one that the committed results give."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("numbers", [(0,), (1, 2)])
def test_code_runs(numbers, capsys, monkeypatch, tmp_path):
    """The third block saves and restores what the second one made."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for number in numbers:
        exec(compile(blocks("python")[number], f"README block {number}", "exec"), names)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert float(re.findall(r"[\d.]+", last)[-1]) > 0.75  # the last number printed is an accuracy


def test_there_are_as_many_blocks_as_are_tested():
    assert len(blocks("python")) == 3


def test_one_line_each_sets_up_and_runs():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert sum("pytest" in line and "pip install -e '.[test]'" in line for line in commands) == 1
    assert sum("meta_active.py" in line and "pip install" in line for line in commands) == 1


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    found = tables.tables()
    assert found
    for name, text in found.items():
        assert text in README, f"the README's table of {name} is not the one that experiments/tables.py prints"
    for path, text in tables.documents().items():
        assert path.read_text() == text, f"{path} is not what experiments/tables.py writes"


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file()
