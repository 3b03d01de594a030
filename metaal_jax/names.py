"""The one table of names: query strategies, trained policies and learners, each with one line and what it needs.

Names are for doors and command lines and are looked up once, there; the library's functions take objects. The table of
strategies is `metaal_jax.strategies`: a new one is a function and one line there. It is then known to `compare`,
`suggest`, `pick`, the command line and every experiment, or refused there by name with the reason.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax

from metaal_jax import learners, models, policies
from metaal_jax.base import Learner, Policy
from metaal_jax.strategies import (
    ADAPTIVE,
    ALIASES,
    CANDIDATES,
    KNOWN,
    NEEDS,
    REGRESSION,
    STRATEGIES,
    Given,
    Strategy,
)

__all__ = [
    "ADAPTIVE",
    "ALIASES",
    "CANDIDATES",
    "DEFAULT",
    "LEARNED",
    "LEARNERS",
    "NEEDS",
    "REGRESSION",
    "START",
    "STRATEGIES",
    "Entry",
    "Given",
    "Strategy",
    "find",
    "learner",
    "listing",
    "policy",
    "posterior",
    "strategy",
    "trained",
    "unknown",
]

LEARNED = "learned:"
START = "start"
DEFAULT = "uncertain_herding"


def find(name: str) -> Strategy:
    """The strategy of a name or an alias, or a trained policy: one that is shipped, or the path of its file.

    A trained policy may be written `learned:NAME`. With `~FEATURE` behind it, it sees that feature in a random order:
    what it is worth without. With `~start` it is what it was before its training.

    Raises:
      ValueError: for an unknown name, with those that are like it, and a policy that cannot be loaded.
    """
    plain = ALIASES.get(name, name)
    if plain in KNOWN:
        return KNOWN[plain]
    place, _, feature = name.removeprefix(LEARNED).rpartition("~")
    if feature not in (*policies.features.ROWS, START):
        place, feature = name.removeprefix(LEARNED), ""
    if not name.startswith(LEARNED) and place not in policies.shipped() and not place.endswith(".json"):
        raise ValueError(unknown("strategy", name, [*KNOWN, *policies.shipped()]))
    return trained(policies.load(place), feature)


def trained(saved: policies.Saved, feature: str = "") -> Strategy:
    """The strategy of a trained policy, or of what it was or would be otherwise.

    Args:
      saved: the policy.
      feature: one of the rows' features, seen in a random order; or `START`, for the policy before its training.
    """
    network: Any = policies.Scrambled(saved.network, feature) if feature and feature != START else saved.network
    if saved.rules:
        make = lambda given: policies.selector(  # noqa: E731
            [find(rule).make(given) for rule in saved.rules], network, k=given.k
        )
    else:
        make = lambda given: policies.learned(network, k=given.k, plan=saved.plan)  # noqa: E731
    params, line = saved.params, f"trained by {saved.about.get('way')} on {saved.about.get('source')}"
    if feature == START:
        params, line = make(Given(k=1)).init(jax.random.key(0)), f"the start of what was {line}"
    needs = dict.fromkeys(need for name in saved.rules for need in find(name).needs)
    return Strategy(
        line,
        lambda given: make(given)._replace(init=lambda key: params),
        tuple(dict.fromkeys(("logits", "embedding", "labels", *needs))),
        memory=True,
        params=lambda problem: params,
    )


def strategy(
    name: str,
    *,
    k: int,
    rounds: int | None = None,
    classes: int | None = None,
    learner: Learner | None = None,
    refit: Learner | None = None,
    loss_learner: Learner | None = None,
    posterior: Learner | None = None,
) -> Policy:
    """The policy of a name, ready for `active_learner`.

    >>> from metaal_jax import names
    >>> badge = names.strategy("badge", k=10)
    >>> names.strategy("glister", k=10)
    Traceback (most recent call last):
    ...
    ValueError: glister needs the learner, whose gradients it takes: give learner=

    Args:
      name: see `find`; `names.listing()` has one line for each.
      k: rows a round.
      rounds, classes, learner, refit, loss_learner: what some strategies need, see `Given`.
      posterior: a learner of several members, shown to strategies that ask a committee; None where the learner in the
        loop is one already. Costly strategies look at `CANDIDATES` random rows a round.

    Returns:
      A `Policy`. The `init` of a trained one gives its trained parameters.

    Raises:
      ValueError: for an unknown name, or one whose needs are not given.
    """
    found = find(name)
    given = Given(k, rounds, classes, learner, refit, loss_learner)  # type: ignore[arg-type]
    for need in found.needs:
        if need in Given._fields and getattr(given, need) is None:
            raise ValueError(f"{name} needs {NEEDS[need]}: give {need}=")
    return found.build(given, posterior)


def policy(name: str, *, k: int, **given: Any) -> Policy:
    """The trained policy of a name or a file; its `init` gives the trained parameters. See `strategy`.

    >>> from metaal_jax import names
    >>> omniglot = names.policy("omniglot", k=10)

    Raises:
      ValueError: for a name of a rule, an unknown one, or a file that holds no policy.
    """
    if name in KNOWN or name in ALIASES:
        raise ValueError(f"{name!r} is a rule, not a trained policy: give names.strategy({name!r}, k={k})")
    return strategy(name if name.startswith(LEARNED) else LEARNED + name, k=k, **given)


class Entry(NamedTuple):
    """A learner by name: one line, and `(classes) -> Learner` with the package's defaults for rows of numbers."""

    line: str
    make: Callable[[int], Learner]


def _network(classes: int) -> Learner:
    return learners.fine_tune(models.MLP(classes), optimizer=optax.adamw(1e-2, weight_decay=0.1), steps=60)


LEARNERS: dict[str, Entry] = {
    "linear": Entry("logistic regression, equal to scikit-learn's", learners.linear),
    "prototypes": Entry("nearest mean of a class", lambda classes: learners.protonet(models.MLP(classes, hidden=()))),
    "ridge": Entry(
        "ridge regression onto the classes",
        lambda classes: learners.r2d2(models.MLP(classes, hidden=()), scale=8.0, intercept=True),
    ),
    "network": Entry("a network of two hidden layers, trained from scratch", _network),
    "propagation": Entry(
        "labels propagated over the pool, then logistic regression",
        lambda classes: learners.label_propagation(learners.linear(classes), rows=None),
    ),
}


def learner(name: str, *, classes: int) -> Learner:
    """The learner of a name.

    >>> from metaal_jax import names
    >>> linear = names.learner("linear", classes=3)

    Raises:
      ValueError: for an unknown name.
    """
    if name not in LEARNERS:
        raise ValueError(unknown("learner", name, LEARNERS))
    return LEARNERS[name].make(classes)


def posterior(base: Learner, *, members: int = 20) -> Learner:
    """What strategies that ask a committee see of a single learner: draws from Laplace's posterior of its last layer.

    Args:
      base: a learner whose last layer is named `head`.
      members: draws.
    """
    return learners.laplace(base, members=members, prior_precision=20.0)


def listing() -> str:
    """One line for each strategy, for `--help`."""
    return "\n".join(
        f"{name}: {one.line}" + (", on a sample of the pool" if one.costly else "") for name, one in STRATEGIES.items()
    )


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {what} {name!r}; {hint}choose from {', '.join(known)}"
