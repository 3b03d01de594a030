"""Trained policies beside rules as a user meets them: what an evaluation leaves, what is run again, and mistakes."""

import json
import re

import jax
import numpy as np
import pytest

from metaal_jax import acquisition, models, policies
from metaal_jax.studies.options import with_options


def test_evaluation_beside_rules(scripts, meta_run, tmp_path):
    script = scripts["evaluate_policy"]
    network, place = models.LinearNetwork(prior=policies.prior(uncertain_cover=1.0)), str(tmp_path / "policy.json")
    params = policies.learned(network, k=1).init(jax.random.key(0))
    policies.save(place, network, params, {"way": "by hand"}, plan=2)
    config = with_options(
        script.Config(), policies=place, strategies="random,margin,oracle", importance=False, batches="1,2", budget=4,
        pool=40, test=30, held_out=10, seeds=9, source="digits", target="digits", meta_run=meta_run,
        out=str(tmp_path / "run"),
        save_results=str(tmp_path / "saved" / "result.json"),
    )  # fmt: skip
    script.job(config)
    assert (tmp_path / "saved" / "result.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "saved" / "result.json").read_text())
    name = f"learned:{place}"
    areas = {(r["strategy"], r["batch"]): r["mean"] for r in result["rows"] if r["metric"] == "area"}
    assert set(areas) == {(s, k) for s in (name, "random", "margin", "oracle") for k in (1, 2)}
    shares = {(r["strategy"], r["batch"]): r["mean"] for r in result["rows"] if r["metric"] == "share_of_oracle"}
    assert shares["oracle", 2] == 1
    assert shares["random", 1] == 0
    both = {(r["b"]["strategy"], r["batch"]): r["difference"] for r in result["paired"]}
    np.testing.assert_allclose(both["margin", 1], areas[name, 1] - areas["margin", 1], atol=3e-5)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 2 * 9  # more seeds than run at once, as in the reported runs

    # Another policy of this name is run again, and rules are not.
    saved = policies.load(place)
    policies.save(place, saved.network, jax.tree.map(lambda leaf: -leaf, saved.params), saved.about)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "steps").iterdir()}
    script.job(with_options(config, without="oracle", batches="2", resume=True))
    left = json.loads((tmp_path / "saved" / "result.json").read_text())["rows"]
    assert {row["strategy"] for row in left} == {name, "random", "margin"}
    again = {file for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert len(again) == 1
    assert "policy.json" in again.pop().name


def test_what_a_selector_follows(scripts, meta_run, tmp_path):
    """Shares of its rules in each round, in results and pictures; rules that propose the same rows share a round."""
    network = models.LinearNetwork(prior=policies.favoured(1, 5.0))
    rules = ("random", "margin", "typical")
    policy = policies.selector([acquisition.top_k(acquisition.random, k=1)] * 3, network, k=1)
    place = str(tmp_path / "chooser" / "policy.json")
    policies.save(place, network, policy.init(jax.random.key(0)), {"way": "by hand"}, rules=rules)
    small = {"policies": place, "seeds": 3, "source": "digits", "target": "digits", "meta_run": meta_run}
    script = scripts["evaluate_policy"]
    script.job(with_options(
        script.Config(), **small, strategies="random", importance=False, batches="1,2", budget=4, pool=40, test=30,
        held_out=10, out=str(tmp_path / "run"),
    ))  # fmt: skip
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    shares = {(r["batch"], r["rule"], r["labels"]): r["mean"] for r in result["rows"] if r["metric"] == "share_of_rule"}
    assert set(shares) == {(k, rule, n) for k in (1, 2) for rule in rules for n in range(k, 5, k)}
    for k, n in {(k, n) for k, _, n in shares}:
        assert sum(shares[k, rule, n] for rule in rules) == pytest.approx(1.0, abs=2e-4)
        assert shares[k, "margin", n] >= 0.5
    assert (tmp_path / "run" / "results-chooser-rules.png").read_bytes().startswith(b"\x89PNG")

    script = scripts["many_targets"]
    script.job(with_options(
        script.Config(), **small, targets="iris,digits", strategies="random,margin", out=str(tmp_path / "targets"),
    ))  # fmt: skip
    result = json.loads((tmp_path / "targets" / "results.json").read_text())
    shares = {(r["target"], r["rule"]): r["mean"] for r in result["rows"] if r["metric"] == "share_of_rule"}
    assert set(shares) == {(target, rule) for target in ("iris", "digits") for rule in rules}
    assert all(shares[target, "margin"] > 0.9 for target in ("iris", "digits"))
    assert (tmp_path / "targets" / "results-chooser-rules.png").is_file()


def test_many_targets(scripts, meta_run, tmp_path):
    """Images through the network, a table as its columns; ranks and differences are those of the curves."""
    script = scripts["many_targets"]
    script.job(with_options(
        script.Config(), targets="iris,digits", strategies="random,margin", seeds=2, source="digits", target="digits",
        meta_run=meta_run, out=str(tmp_path / "run"),
    ))  # fmt: skip
    assert (tmp_path / "run" / "results.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    area = {(r["condition"], r["strategy"], r["seed"]): np.mean(r["accuracy"]) for r in records}
    names = ("learned:cifar10", "random", "margin")
    assert set(area) == {(t, s, i) for t in ("iris", "digits") for s in names for i in (0, 1)}
    places = np.asarray([[[area[t, s, i] for i in (0, 1)] for s in names] for t in ("iris", "digits")])
    ranks = 1 + (places[:, :, None] < places[:, None]).sum(2) + ((places[:, :, None] == places[:, None]).sum(2) - 1) / 2
    found = {r["strategy"]: r["mean"] for r in result["rows"] if r["metric"] == "mean_rank"}
    np.testing.assert_allclose([found[name] for name in names], ranks.mean((0, 2)), atol=1e-4)
    both = {r["target"]: r["difference"] for r in result["paired"]
            if r["metric"] == "area" and r["b"]["strategy"] == "random"}  # fmt: skip
    gap = (places[:, 0] - places[:, 1]).mean(1)
    np.testing.assert_allclose([both[t] for t in ("iris", "digits", "all")], [*gap, gap.mean()], atol=2e-5)
    assert {r["target"]: (r["classes"], r["pool"], r["budget"], r["batch"]) for r in result["rows"]
            if r["metric"] == "problem"} == {"iris": (3, 90, 50, 5), "digits": (10, 1079, 100, 10)}  # fmt: skip


MISTAKES = {
    "policy": ("evaluate_policy", {"policies": "nobody"}, "no policy 'nobody': give one of .*cifar10"),
    "pool rows": ("evaluate_policy", {"policies": "cifar10", "pool": 10**6}, "rows wanted for --pool"),
    "groups": ("many_targets", {"targets": "digits:kind"}, "'digits:kind' must be SET or SET:LABEL=NUMBER"),
    "no rows of its own": ("many_targets", {"strategies": "random,oracle"}, "the oracle needs rows of its own"),
    "two targets": ("many_targets", {"targets": "iris,iris"}, "is empty or names one twice"),
    "one rule": ("many_targets", {"targets": "iris", "strategies": "margin"}, "must hold random and a rule"),
    "left out": ("evaluate_policy", {"policies": "cifar10", "without": "margn"}, "unknown rule to leave out .margn."),
    "batches": ("evaluate_policy", {"policies": "cifar10", "batches": "1,0"}, "--batches .1,0.: 0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(scripts, meta_run, tmp_path, capfd, name):
    which, options, said = MISTAKES[name]
    script = scripts[which]
    usual = {
        "evaluate_policy": {"source": "digits", "target": "digits", "strategies": "random", "budget": 10,
                            "importance": False},
        "many_targets": {"source": "digits", "target": "digits"},
    }[which]  # fmt: skip
    config = with_options(script.Config(), **{**usual, "meta_run": meta_run, "out": str(tmp_path / "run"), **options})
    with pytest.raises(SystemExit) as ended:
        script.main(lambda: script.job(config))
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert re.search(said, error), error
