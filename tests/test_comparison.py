"""A comparison in one call: the same problems for all, numbers that the loop gives too, and what is refused."""

import jax
import numpy as np
import pytest

import metaal_jax as ml
from metaal_jax import learners, names, tasks
from metaal_jax.door_inputs import scaled
from metaal_jax.studies.results import read_results
from metaal_jax.studies.study import Study

RNG = np.random.default_rng(0)
N = 60
Y = np.asarray(["ant", "bee", "cat"])[np.arange(N) % 3]
X = (RNG.normal(size=(N, 4)) + 2 * np.eye(3, 4)[np.arange(N) % 3]).astype(np.float32)
SMALL = {"budget": 8, "batch_size": 4, "seeds": 3, "pool": 30, "test": 24, "seed": 5}


@pytest.fixture(scope="module")
def study():
    return ml.compare((X, Y), ["random", "margin"], **SMALL)


def test_curves_are_those_of_the_loop(study):
    """One seed by hand: the same problem and keys, asked, answered and judged by `active_learner`."""
    data = tasks.class_data(scaled("test", X, "columns"), np.unique(Y, return_inverse=True)[1].astype(np.int32))
    problem_key, run_key = jax.random.split(jax.random.split(jax.random.key(5), 3)[1])
    problem = tasks.composed_problems(ways=3, parts=1, pool=30, test=24)(problem_key, data)
    meta_key, loop_key = jax.random.split(run_key)
    learner = learners.linear(3)
    active = ml.active_learner(learner, names.strategy("margin", k=4), capacity=8)
    meta = learner.init(meta_key, problem.x)
    _, trace = jax.jit(lambda problem: active.run(loop_key, meta, (), problem, rounds=2))(problem)
    for metric, values in study.curves["linear", "margin"].items():
        assert values.shape == (3, 2), metric
        np.testing.assert_allclose(values[1], getattr(trace.test, metric), rtol=1e-5)
    assert "balanced_accuracy" in study.curves["linear", "margin"]


def test_a_strategy_has_the_same_curves_whoever_is_beside_it(study):
    alone = ml.compare((X, Y), {"margin": names.strategy("margin", k=4)}, **SMALL)
    np.testing.assert_array_equal(
        alone.curves["linear", "margin"]["accuracy"], study.curves["linear", "margin"]["accuracy"]
    )


def test_what_is_written_is_read_again(study, tmp_path):
    study.save(tmp_path / "study.json")
    held = read_results(tmp_path / "study.json")
    assert held["command"].startswith("metaal_jax.compare('rows', strategies=['random', 'margin'], learner='linear'")
    assert held["config"] == study.about["config"]
    area = [row for row in held["rows"] if row["metric"] == "area" and row["strategy"] == "margin"]
    assert area[0]["seeds"] == 3
    assert area[0]["mean"] == pytest.approx(study.area(("linear", "margin")).mean(), abs=1e-5)
    assert {row["a"]["strategy"] for row in held["paired"]} == {"margin"}
    assert study.table().splitlines()[2].split()[:2] == ["linear", "random"]
    figure = study.plot(tmp_path / "study.png", title="three insects")
    assert (tmp_path / "study.png").stat().st_size > 1000
    assert [line.get_label() for line in figure.axes[0].lines] == ["random", "margin"]


def test_pairs_are_over_the_same_problems_and_corrected():
    def levels(*values):
        return {"accuracy": np.asarray(values)[:, None] + np.zeros((1, 2))}

    made = Study(
        np.asarray([5, 10]),
        {
            ("linear", "random"): levels(0.2, 0.5, 0.8),
            ("linear", "margin"): levels(0.3, 0.61, 0.9),  # a tenth better everywhere, whatever the problem
            ("linear", "badge"): levels(0.9, 0.5, 0.1),
        },
    )
    rows = {row["a"]["strategy"]: row for row in made.paired() if row["metric"] == "area"}
    assert rows["margin"]["difference"] == pytest.approx(0.31 / 3, abs=1e-5)
    assert rows["margin"]["p_holm"] == pytest.approx(2 * rows["margin"]["p"])
    assert rows["margin"]["p_holm"] < 0.01 < 0.5 < rows["badge"]["p_holm"]
    assert {row["b"]["strategy"] for row in made.paired("margin")} == {"margin"}
    assert [(row["metric"], row["labels"]) for row in made.paired()][::2] == [
        ("area", 10), ("accuracy", 5), ("accuracy", 10)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no arm to compare with 'entropy'; the arms are"):
        made.paired("entropy")


REFUSED = {
    "not whole batches": ({"budget": 10}, "budget=10 must be a multiple of batch_size=4"),
    "more labels than rows": ({"budget": 40}, "a budget of 40 labels is more than the 30 rows of the pool"),
    "more rows than there are": ({"pool": 50}, "50 rows of pool and 24 of test are wanted, there are 60"),
    "no seeds": ({"seeds": 0}, "seeds must be a positive integer, got 0"),
    "a name twice": ({"strategies": ["margin", "margin"]}, "strategies must be different names"),
    "no names": ({"strategies": []}, r"strategies must be different names, got \[\]"),
    "misspelt": ({"strategies": ["margine"]}, "unknown strategy 'margine'; did you mean margin"),
    "for targets": ({"strategies": ["igs"]}, "compare: igs is for targets"),
    "one class": ({"data": (X, ["ant"] * N)}, "all rows have the label 'ant'; there is nothing to learn"),
    "a row without a label": ({"data": (X, [None, *Y[1:]])}, "row 0 has no label; leave out rows without one"),
    "fewer labels": ({"data": (X, Y[:9])}, "labels has 9 entries for 60 rows"),
    "a cell that is NaN": ({"data": (np.where(X[7, 1] == X, np.nan, X), Y)}, r"compare: x\[7, 1\] is nan"),
    "no data": ({"data": X}, r"data must be \(x, y\), a name or a path, got a ndarray"),
    "an unknown set": ({"data": "mnits"}, "mnits"),
    "a learner misspelt": ({"learner": "lineal"}, "compare: unknown learner 'lineal'; did you mean linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        ml.compare(**{"data": (X, Y), "strategies": ["margin"], **SMALL, **given})
    assert "\n" not in str(error.value)
