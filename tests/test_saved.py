"""Trained policies as files: saved, loaded, shipped."""

import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaal_jax import acquisition, check_policy, models, policies
from views import make_view

NETWORKS = [
    models.LinearNetwork(situation=(1, 5), prior=policies.prior(margin=-0.3)),
    models.RowNetwork(width=4),
    models.SetNetwork(width=4, points=2),
]


RULES = ("margin", "random")


def random_params(network, rules=(), **options):
    """Parameters that no `init` gives, for a policy that scores rows or for a selector among rules."""
    if rules:
        fixed = [acquisition.top_k(acquisition.random, k=1) for _ in rules]
        policy = policies.selector(fixed, network, k=1, **options)
    else:
        policy = policies.learned(network, k=1)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("rules", [(), RULES], ids=["learned", "selector"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: type(network).__name__)
def test_saved_and_loaded_to_the_bit(network, rules, tmp_path):
    params = random_params(network, rules)
    policies.save(tmp_path / "deep" / "policy.json", network, params, {"way": "by hand"}, rules=rules, plan=4)
    saved = policies.load(tmp_path / "deep" / "policy.json")
    assert saved.network == network
    assert saved.about == {"way": "by hand"}
    assert saved.rules == rules
    assert saved.plan == 4
    assert jax.tree.structure(saved.params) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(params), strict=True))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["policy.json"]


def test_a_selector_that_does_not_know_its_rules_is_saved_too(tmp_path):
    params = random_params(NETWORKS[1], RULES, identity=False)
    policies.save(tmp_path / "policy.json", NETWORKS[1], params, {}, rules=RULES)
    assert jax.tree.structure(policies.load(tmp_path / "policy.json").params) == jax.tree.structure(params)


def test_what_ships_runs_and_is_small(key):
    assert policies.shipped()
    folder = importlib.resources.files("metaal_jax.policies") / "shipped"
    assert sum(len(file.read_bytes()) for file in folder.iterdir() if file.name.endswith(".json")) < 1_000_000
    checked = set()  # one of each form: to compile is what takes the time
    for name in policies.shipped():
        saved = policies.load(name)
        assert saved.about["command"].startswith("python experiments/learn_policy.py")
        if saved.rules:
            rules = [acquisition.top_k(acquisition.random, k=3) for _ in saved.rules]
            policy = policies.selector(rules, saved.network, k=3)
        else:
            policy = policies.learned(saved.network, k=3)
        fresh = policy.init(key)
        assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (fresh, saved.params)), strict=True))
        if (saved.network, saved.rules) in checked:
            continue
        checked.add((saved.network, saved.rules))
        trained = policy._replace(init=lambda key, params=saved.params: params)
        check_policy(trained, key, make_view(0, 30, labelled=(1, 2), queried=(5,), padding=4), k=3)


def change(*place, value):
    """Puts a value at a place of what a file holds."""

    def changed(held):
        inner = held
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
        return held

    return changed


def remove(*place):
    def changed(held):
        inner = held
        for part in place[:-1]:
            inner = inner[part]
        del inner[place[-1]]
        return held

    return changed


FACTORS = ("params", "params/factors", "values")
DAMAGED = {  # what was done to a file of a linear network, what the message says
    "NaN": (change(*FACTORS, 2, value=float("nan")), "factors' must hold finite float32 .*, got nan at place 2"),
    "1e308": (change(*FACTORS, 2, value=1e308), r"got 1e\+308 at place 2"),
    "1e999": (change(*FACTORS, 2, value=float("inf")), "got inf at place 2"),
    "a huge integer": (change(*FACTORS, 2, value=10**400), "got 1000.* at place 2"),
    "a string": (change(*FACTORS, 2, value="3"), "got '3' at place 2"),
    "true": (change(*FACTORS, 2, value=True), "got True at place 2"),
    "a nested list": (change(*FACTORS, 2, value=[1.0]), r"got \[1.0\] at place 2"),
    "a missing leaf": (remove("params", "params/factors"), "parameter 'params/factors' is missing"),
    "an extra leaf": (
        change("params", "params/more", value={"shape": [1], "values": [0]}), "no parameter 'params/more'"),
    "a leaf inside a leaf": (
        change("params", "params/factors/x", value={"shape": [1], "values": [0]}), "no parameter 'params/factors/x'"),
    "a value less": (remove(*FACTORS, 0), r"'params/factors' of shape \[30\] has 29 values"),
    "another shape": (change("params", "params/factors", value={"shape": [2], "values": [0, 0]}),
                      r"'params/factors' must have the shape \[30\], got \[2\]"),
    "a negative size": (change("params", "params/factors", "shape", value=[-1]), "must be a list of sizes"),
    "no shape": (remove("params", "params/factors", "shape"), "'params/factors' must hold 'shape' and 'values'"),
    "a leaf that is a number": (change("params", "params/factors", value=3), "must hold 'shape' and 'values'"),
    "values that are a number": (change(*FACTORS, value=3), "must be a list, got 3"),
    "no parameters": (change("params", value={}), "is missing"),
    "parameters as a list": (change("params", value=[]), r"'params' must be an object, got \[\]"),
    "an unknown feature": (change("network", "ignored", value=[30]), "features from 0 to 29, got 30"),
    "a negative feature": (change("network", "ignored", value=[-1]), "features from 0 to 29, got -1"),
    "an unknown situation": (change("network", "situation", value=[1, 12]), "features from 0 to 11, got 12"),
    "half a feature": (change("network", "situation", value=[1.5, 2]), "features from 0 to 11, got 1.5"),
    "too many factors": (change("network", "prior", value=[0.0] * 31), "31 factors for 30 inputs"),
    "a factor NaN": (change("network", "prior", value=[0.0, float("nan")]), "finite numbers, got nan at place 1"),
    "a prior of text": (change("network", "prior", value="abc"), "'prior' must be a list, got 'abc'"),
    "an unknown network": (change("network", "kind", value="MLP"), "'kind' must be one of LinearNetwork.*, got 'MLP'"),
    "a network without a kind": (remove("network", "kind"), "'kind' must be one of .*, got None"),
    "a kind that is a list": (change("network", "kind", value=[]), r"'kind' must be one of .*, got \[\]"),
    "an unknown option": (change("network", "parent", value=[]), "LinearNetwork has no option 'parent'"),
    "other features": (remove("rows", 0), "trained on other features"),
    "no features": (remove("rows"), "'rows' is missing"),
    "features as text": (change("situation", value="spent"), "'situation' must be a list"),
    "plan 1e999": (change("plan", value=float("inf")), "'plan' must be a positive integer, got inf"),
    "plan 0": (change("plan", value=0), "'plan' must be a positive integer, got 0"),
    "plan 2.5": (change("plan", value=2.5), "got 2.5"),
    "plan true": (change("plan", value=True), "got True"),
    "rules of another number": (change("rules", value=["margin"]), r"must have the shape \[34\], got \[30\]"),
    "rules as text": (change("rules", value="margin"), "'rules' must be a list of names"),
    "a rule without a name": (change("rules", value=[""]), "'rules' must be a list of names"),
    "about as text": (change("about", value="words"), "'about' must be an object, got 'words'"),
    "no about": (remove("about"), "'about' is missing"),
    "a list": (lambda held: [held], "must be an object"),
    "null": (lambda held: None, "must be an object, got None"),
    "another digit": (change(*FACTORS, 2, value=0.25), "was changed after it was saved"),
    "another checksum": (change("check", value=3), "was changed after it was saved"),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The file of a small policy."""
    path = tmp_path_factory.mktemp("saved") / "policy.json"
    policies.save(path, NETWORKS[0], random_params(NETWORKS[0]), {"way": "by hand"}, plan=2)
    return path.read_text()


def refused(path, match):
    with pytest.raises(ValueError, match=match) as error:
        policies.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, text, name):
    changed, said = DAMAGED[name]
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(changed(json.loads(text))))
    refused(path, said)


@pytest.mark.parametrize("name", ["width", "points"])
@pytest.mark.parametrize("value", [0, 3, 2.0, "4", None, 10**12])
def test_networks_of_other_sizes_are_refused(tmp_path, name, value):
    path = tmp_path / "policy.json"
    policies.save(path, NETWORKS[2], random_params(NETWORKS[2]), {})
    held = json.loads(path.read_text())
    held["network"][name] = value
    path.write_text(json.dumps(held))
    refused(
        path, "shape|cannot be made" if value in (3, 10**12) else f"{name}' must be a positive integer, got {value!r}"
    )


def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "policy.json"
    for content, said in (
        (b"", "holds no policy"),
        (text.encode()[:300], "holds no policy"),
        (b"\x00\xff\xfe policy", "not a text file"),
        (b"[" * 100_000, "holds no policy"),
    ):
        path.write_bytes(content)
        refused(path, said)
    refused(tmp_path, "cannot be read .*directory")
    for name in ("nobody", 7, None, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match=r"no policy .*: give one of .*cifar10"):
            policies.load(name)


def test_a_file_without_checksum_is_still_read(tmp_path, text):
    """As files of earlier versions are, and those that somebody changed by hand and meant it."""
    held = json.loads(text)
    del held["check"]
    held["params"]["params/factors"]["values"][2] = 0.25
    (tmp_path / "policy.json").write_text(json.dumps(held))
    assert policies.load(tmp_path / "policy.json").params["params"]["factors"][2] == 0.25


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"params": jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), random_params(NETWORKS[0]))},
         "save: .* must hold finite float32 numbers, got nan at place 0"),
        ({"params": random_params(NETWORKS[1])}, "save: .* parameter"),
        ({"params": {}}, "save: the parameter .* is missing"),
        ({"network": models.MLP(2)}, "got MLP"),
        ({"plan": 0}, "save: 'plan' must be a positive integer, got 0"),
        ({"plan": 1.5}, "got 1.5"),
        ({"rules": (3,)}, "save: 'rules' must be a list of names"),
        ({"rules": RULES}, "save: .* must have the shape"),
    ],
)  # fmt: skip
def test_save_refuses_what_load_would(tmp_path, changes, said):
    given = {"network": NETWORKS[0], "params": random_params(NETWORKS[0]), "about": {}, **changes}
    (tmp_path / "policy.json").write_text("what was there")
    with pytest.raises(ValueError, match=said):
        policies.save(tmp_path / "policy.json", **given)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("policy.json", "what was there")]


def test_save_says_where_it_cannot_write(tmp_path):
    params = random_params(NETWORKS[0])
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "policy.json"):
        with pytest.raises(ValueError, match=r"cannot be written \(.*\); give another path"):
            policies.save(path, NETWORKS[0], params, {})
    with pytest.raises(TypeError, match="what JSON can hold, got object"):
        policies.save(tmp_path / "policy.json", NETWORKS[0], params, {"way": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    policies.save(tmp_path / "large.json", NETWORKS[0],
                  jax.tree.map(lambda leaf: leaf + float(np.finfo(np.float32).max), params), {})  # fmt: skip
