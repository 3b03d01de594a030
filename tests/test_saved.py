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


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: type(network).__name__)
def test_saved_and_loaded_to_the_bit(network, key, tmp_path):
    params = policies.learned(network, k=1).init(key)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape) / 3, params)
    policies.save(tmp_path / "deep" / "policy.json", network, params, {"way": "by hand"}, rules=("margin", "random"),
                  plan=4)  # fmt: skip
    saved = policies.load(tmp_path / "deep" / "policy.json")
    assert saved.network == network
    assert saved.about == {"way": "by hand"}
    assert saved.rules == ("margin", "random")
    assert saved.plan == 4
    assert jax.tree.structure(saved.params) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(params), strict=True))


def test_what_ships_runs_and_is_small(key):
    assert policies.shipped()
    folder = importlib.resources.files("metaal_jax.policies") / "shipped"
    assert sum(len(file.read_bytes()) for file in folder.iterdir() if file.name.endswith(".json")) < 1_000_000
    for name in policies.shipped():
        saved = policies.load(name)
        assert saved.about["command"].startswith("python experiments/learn_policy.py")
        if saved.rules:
            rules = [acquisition.top_k(acquisition.random, k=3) for _ in saved.rules]
            policy = policies.selector(rules, saved.network, k=3)
        else:
            policy = policies.learned(saved.network, k=3)
        trained = policy._replace(init=lambda key, params=saved.params: params)
        check_policy(trained, key, make_view(0, 30, labelled=(1, 2), queried=(5,), padding=4), k=3)
        fresh = policy.init(key)
        assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (fresh, saved.params)), strict=True))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no policy 'nobody': give one of .*cifar10"):
        policies.load("nobody")
    (tmp_path / "torn.json").write_text('{"about": ')
    with pytest.raises(ValueError, match=r"torn\.json holds no policy"):
        policies.load(tmp_path / "torn.json")
    network = NETWORKS[0]
    policies.save(tmp_path / "old.json", network, policies.learned(network, k=1).init(jax.random.key(0)), {})
    held = json.loads((tmp_path / "old.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps({**held, "rows": held["rows"][1:]}))
    with pytest.raises(ValueError, match="was trained on other features"):
        policies.load(tmp_path / "old.json")
    with pytest.raises(ValueError, match="got MLP"):
        policies.save(tmp_path / "other.json", models.MLP(2), {"w": jnp.zeros(1)}, {})
