"""The statistics of the reports: paired tests, corrections, ranks and labels to a target, at their edges too."""

import json
import sys

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from metaal_jax.studies import ranking, results, statistics, usage
from metaal_jax.studies.cells import Cell
from metaal_jax.studies.processes import side_by_side
from metaal_jax.studies.study import Study


@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12, 1e-200, 1e200])
def test_paired_p_is_scipys(unit):
    rng = np.random.default_rng(0)
    for n in (2, 3, 16):
        difference = rng.normal(0.3, 1, n)
        wanted = ttest_1samp(difference, 0.0).pvalue
        assert statistics.paired_p(unit * difference) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("difference", "p"),
    [
        ([0.1, 0.1, 0.1], 0.0),
        ([-0.1] * 8, 0.0),
        ([1e-12] * 3, 0.0),
        ([0.3 - 0.2, 0.4 - 0.3, 0.2 - 0.1], 0.0),  # the same but for rounding
        ([0.0, 0.0, 0.0], 1.0),
        ([0.1], 1.0),
        ([0.0], 1.0),
        ([0.1, -0.1], 1.0),
        ([0.0, 0.0, 0.1], 0.42264973),
    ],
)
def test_paired_p_at_the_edges(difference, p):
    assert statistics.paired_p(difference) == pytest.approx(p, abs=1e-8)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ([0.1, np.nan, 0.2], "must be finite, got nan in seed 1"),
        ([np.inf, 0.2], "must be finite, got inf in seed 0"),
        ([], r"one difference for each seed, got the shape \(0,\)"),
        (0.5, "one difference for each seed"),
        ([[0.1, 0.2]], "one difference for each seed"),
    ],
)
def test_paired_p_refuses(difference, said):
    with pytest.raises(ValueError, match=said):
        statistics.paired_p(difference)


def test_holm():
    holm = statistics.holm
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({}) == {}
    assert holm({"a": 0.0, "b": 1.0}) == {"a": 0.0, "b": 1.0}
    # It is compared with 0.05, so nothing is rounded: 0.0500 would win.
    assert holm({"a": 0.025004, "b": 1.0})["a"] > 0.05
    for wrong in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"p-values must lie in 0 to 1, got .* of b"):
            holm({"a": 0.1, "b": wrong})


def test_ranks_put_nan_last():
    values = np.asarray([[[0.5], [np.nan], [0.7], [0.5]]])
    assert statistics.ranked(values)[0, :, 0].tolist() == [2.5, 4, 1, 2.5]


def test_results_are_json_that_everybody_reads(scripts, tmp_path):
    """With one seed intervals are infinite, and a loss may be: `null`, where Python would write words of its own."""
    rows = [
        statistics.numbers(np.asarray([0.5])),
        {"mean": float("nan"), "config": {"beta": float("inf")}, "of": [1, -np.inf]},
    ]
    results.write_results(tmp_path / "r.json", command="c", environment={}, seconds=1.0, config={"beta": float("inf")},
                         rows=rows, paired=[])  # fmt: skip
    text = (tmp_path / "r.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    held = json.loads(text, parse_constant=refuse)
    assert held["rows"][0] == {"mean": 0.5, "low": None, "high": None, "seeds": 1}
    assert held["rows"][1] == {"mean": None, "config": {"beta": None}, "of": [1, None]}
    study = Study([5, 10], {("maml", "random"): {"accuracy": np.ones((1, 2))}})
    assert study.at(("maml", "random"), "accuracy", 10).tolist() == [1]
    with pytest.raises(ValueError, match=r"no curve has a point at 7 labels, only at \[5, 10\]"):
        study.at(("maml", "random"), "accuracy", 7)


def test_a_report_of_single_rows_and_one_seed():
    """Ranks and wins where no setting asks for several rows a round, as `--batches 1 --seeds 1` gives."""
    records = {
        Cell("meta", "plain", 1, name): [{"labels": [1, 2], "accuracy": [level, level]}]
        for name, level in (("random", 0.5), ("margin", 0.7))
    }
    table = ranking.table_of(records)
    found = ranking.ranks(table, 2, ("meta",))
    assert [(name, low.mean) for name, low in found.items()] == [("margin", 1), ("random", 2)]
    names, total, settings = ranking.win_counts(table, 2)
    assert (names, total.tolist(), settings) == (["random", "margin"], [[0, 0], [0, 0]], 1)


def test_waiting_for_what_no_task_sends():
    with side_by_side(print, {}, []) as wait, pytest.raises(KeyError, match="no task sent 'curves'"):
        wait("curves")


ROW = {"metric": "accuracy", "mean": 0.5}
DAMAGED = {  # what is done to a result file; what the line must say
    "taken away": (lambda path: path.unlink(), "cannot be read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "empty": (lambda path: path.write_text(""), "no result file"),
    "torn": (lambda path: path.write_text(path.read_text()[:-10]), "no result file"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "no result file"),
    "a list": (lambda path: path.write_text("[]"), "it holds list"),
    "a word that is no JSON": (lambda path: path.write_text(path.read_text().replace("0.5", "NaN")), "NaN is no JSON"),
    "no device": (lambda path: path.write_text(path.read_text().replace('"device"', '"place"')), "lacks 'device'"),
    "seconds that are text": (
        lambda path: path.write_text(path.read_text().replace(": 9.5", ': "9"')),
        "'seconds' is str",
    ),
    "a row of nothing": (lambda path: path.write_text(path.read_text().replace('"metric"', '"x"')), r"rows\[0\] lacks"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_file_is_refused(tmp_path, damage):
    path = tmp_path / "r.json"
    results.write_results(path, command="c", environment=results.environment(), seconds=9.5, config={}, rows=[ROW],
                          paired=[])  # fmt: skip
    assert results.read_results(path)["rows"] == [ROW]
    change, said = DAMAGED[damage]
    change(path)
    with pytest.raises(usage.UsageError, match=said) as found:
        results.read_results(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(usage.UsageError, match=r"tabulate is not installed.*pip install 'metaal_jax\[experiments\]'"):
        usage.need("tabulate", extra="experiments")
