"""Query strategies by name, for command lines. The library itself takes functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from metaal_jax import acquisition, policies
from metaal_jax.base import Learner, Policy, Problem, PyTree
from metaal_jax.studies.usage import UsageError, names

CANDIDATES = 200
LEARNED = "learned:"


class Need(NamedTuple):
    """What strategies are made from.

    Attributes:
      k: rows a round.
      rounds: of a run.
      classes: of the target.
      learner: the single base learner, for rules that take its gradients.
      refit: what rules refit by the thousand: the base learner, or a quicker form of it.
      loss_learner: a learner of `learners.loss_predictor` for the same rows.
    """

    k: int
    rounds: int
    classes: int
    learner: Learner
    refit: Learner
    loss_learner: Learner


class Strategy(NamedTuple):
    """A query strategy.

    Attributes:
      line: what it does, for `--help`.
      make: `(need) -> policy`.
      committee: it asks a committee, or another posterior of several members.
      costly: its definition refits or compares so much that it looks at `CANDIDATES` random rows a round.
      held_out: it needs validation rows in the problem.
      params: `(problem) -> policy_params`; what only an oracle may see comes in here.
    """

    line: str
    make: Callable[[Need], Policy]
    committee: bool = False
    costly: bool = False
    held_out: bool = False
    params: Callable[[Problem], PyTree] = lambda problem: ()


def _top(scorer: Callable) -> Callable[[Need], Policy]:
    return lambda need: acquisition.top_k(scorer, k=need.k)


def _truth(problem: Problem) -> PyTree:
    """The pool's labels, and held-out rows in which each class counts alike, as it does among balanced test rows."""
    held = problem.validation
    members = jnp.zeros(held.y.shape[0]).at[held.y].add(held.weight)[held.y]
    return problem.y, held._replace(weight=held.weight / jnp.maximum(members, 1.0))


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy("rows at random", _top(acquisition.random)),
    # Uncertainty.
    "least_confident": Strategy("smallest probability of the most probable class", _top(acquisition.least_confident)),
    "margin": Strategy("smallest margin between the two most probable classes", _top(acquisition.margin)),
    "entropy": Strategy("largest predictive entropy", _top(acquisition.entropy)),
    "ratio": Strategy("largest ratio of the second probability to the first", _top(acquisition.ratio)),
    "tempered_entropy": Strategy(
        "entropy at temperature 3", _top(acquisition.tempered(acquisition.entropy, temperature=3.0))
    ),
    "balanced_margin": Strategy(
        "margin, the predicted classes filled up evenly",
        lambda need: acquisition.class_balanced(acquisition.margin, k=need.k),
    ),
    # Disagreement.
    "vote_entropy": Strategy("largest entropy of a committee's votes", _top(acquisition.vote_entropy), True),
    "consensus_entropy": Strategy(
        "largest entropy of a committee's mean distribution", _top(acquisition.consensus_entropy), True
    ),
    "mean_kl": Strategy("largest mean divergence of members from their mean", _top(acquisition.mean_kl), True),
    "variation_ratio": Strategy("most votes against the majority", _top(acquisition.variation_ratio), True),
    "mean_std": Strategy("largest mean standard deviation over members", _top(acquisition.mean_std), True),
    "bald": Strategy("largest disagreement (BALD) of a committee, top k", _top(acquisition.bald), True),
    "power_bald": Strategy(
        "rows drawn in proportion to BALD", lambda need: acquisition.stochastic_top_k(acquisition.bald, k=need.k), True
    ),
    "sampled_bald": Strategy(
        "largest BALD, top k of the rows that batch_bald sees", _top(acquisition.bald), committee=True, costly=True
    ),
    "batch_bald": Strategy(
        "BALD of the batch as a whole", lambda need: acquisition.batch_bald(k=need.k), committee=True, costly=True
    ),
    "epig": Strategy(
        "largest expected gain about other rows' predictions",
        lambda need: acquisition.epig(k=need.k),
        committee=True,
        costly=True,
    ),
    # Influence.
    "gradient_length": Strategy(
        "expected gradient length over the whole network",
        lambda need: acquisition.top_k(acquisition.expected_gradient_length(need.learner), k=need.k),
    ),
    "head_gradient_length": Strategy(
        "expected gradient length of the last layer", _top(acquisition.head_gradient_length)
    ),
    "model_change": Strategy(
        "expected model change under a committee's labels", _top(acquisition.expected_model_change), True
    ),
    "error_reduction": Strategy(
        "expected log loss of the pool after a refit",
        lambda need: acquisition.top_k(acquisition.expected_error_reduction(need.refit), k=need.k),
        costly=True,
    ),
    "error_reduction_01": Strategy(
        "expected error rate of the pool after a refit",
        lambda need: acquisition.top_k(
            acquisition.expected_error_reduction(need.refit, loss="zero_one"), k=need.k
        ),
        costly=True,
    ),
    "glister": Strategy(
        "gain in the likelihood of the labelled rows by one step",
        lambda need: acquisition.glister(need.learner, k=need.k),
    ),
    "predicted_loss": Strategy(
        "largest loss foreseen by a head trained beside the network",
        lambda need: acquisition.with_learner(
            acquisition.top_k(acquisition.predicted_loss, k=need.k), need.loss_learner, own_start=True
        ),
    ),
    # Representation.
    "k_center": Strategy("farthest from the labelled rows, one after the other", lambda n: acquisition.k_center(k=n.k)),
    "k_means": Strategy("nearest to the centres of k-means", lambda need: acquisition.k_means(k=need.k)),
    "k_medoids": Strategy("medoids beside the labelled rows", lambda need: acquisition.k_medoids(k=need.k)),
    "badge": Strategy("k-means++ on hypothesised gradients", lambda need: acquisition.badge(k=need.k)),
    "typical": Strategy("typical rows far from the labelled ones", lambda need: acquisition.typical(k=need.k)),
    "typiclust": Strategy(
        "the most typical rows of clusters without a label", lambda need: acquisition.typiclust(k=need.k)
    ),
    "prob_cover": Strategy(
        "balls of one radius that cover most rows",
        lambda need: acquisition.prob_cover(k=need.k, classes=need.classes),
    ),
    "max_herding": Strategy("largest gain in kernel coverage", lambda need: acquisition.max_herding(k=need.k)),
    "uncertain_herding": Strategy(
        "largest gain in kernel coverage of what is uncertain", lambda need: acquisition.uncertain_herding(k=need.k)
    ),
    "density": Strategy("largest mean similarity to the pool", _top(acquisition.density)),
    "density_entropy": Strategy(
        "entropy times density", _top(acquisition.density_weighted(acquisition.entropy))
    ),
    "discriminative": Strategy(
        "surest to be told from the labelled rows", lambda need: acquisition.discriminative(k=need.k)
    ),
    # Lifts.
    "softmax_entropy": Strategy(
        "rows drawn in proportion to exp(4 entropy)",
        lambda need: acquisition.stochastic_top_k(acquisition.entropy, k=need.k, kind="softmax", beta=4.0),
    ),
    "diverse_margin": Strategy(
        "margin and distance, ranked batch mode", lambda need: acquisition.diverse(acquisition.margin, k=need.k)
    ),
    "cluster_margin": Strategy(
        "smallest margin in each of k clusters in turn",
        lambda need: acquisition.cluster_balanced(acquisition.margin, k=need.k),
    ),
    "rank_sum": Strategy(
        "sum of the ranks by margin and by density",
        _top(acquisition.sum_of_ranks([acquisition.margin, acquisition.density])),
    ),
    "rank_product": Strategy(
        "product of the ranks by margin and by density",
        _top(acquisition.product_of_ranks([acquisition.margin, acquisition.density])),
    ),
    "epsilon_margin": Strategy(
        "margin, every fifth row at random",
        lambda need: acquisition.epsilon_mixture(
            _top(acquisition.margin)(need), _top(acquisition.random)(need), epsilon=0.2
        ),
    ),
    "typical_margin": Strategy(
        "typical rows up to 50 labels, then margin",
        lambda need: acquisition.switch_at(
            [acquisition.typical(k=need.k), acquisition.top_k(acquisition.margin, k=need.k)], labels=[50]
        ),
    ),
    # The upper reference.
    "oracle": Strategy(
        "greedy oracle: it sees the labels, and the loss on rows of its own",
        lambda need: acquisition.greedy_oracle(need.refit, k=need.k),
        costly=True,
        held_out=True,
        params=_truth,
    ),
}  # fmt: skip
ARMED = ("random", "margin", "typical", "max_herding")
# Known by name, and not among "all": they are made of other rules.
ADAPTIVE: dict[str, Strategy] = {
    name: Strategy(
        f"{line}: {', '.join(ARMED)}",
        lambda need, bandit=bandit: bandit(
            [find(rule).make(need) for rule in ARMED], k=need.k, horizon=need.rounds
        ),
    )
    for name, bandit, line in (("albl", policies.albl, "active learning by learning, a bandit over rules"),)
}  # fmt: skip
# For targets that are no classes; the others refuse these, and these refuse classes (except for greedy_input).
REGRESSION: dict[str, Strategy] = {
    "random": STRATEGIES["random"],
    "greedy_input": Strategy("farthest in the inputs, GSx", lambda need: acquisition.greedy_input(k=need.k)),
    "greedy_output": Strategy(
        "prediction farthest from all labels, GSy", lambda need: acquisition.greedy_output(k=need.k)
    ),
    "igs": Strategy("farthest in inputs and outputs, iGS", lambda need: acquisition.igs(k=need.k)),
    "committee_variance": Strategy(
        "largest variance of a committee's outputs", _top(acquisition.committee_variance), True
    ),
    "variance_reduction": Strategy(
        "largest fall of the pool's predictive variance",
        lambda need: acquisition.expected_variance_reduction(k=need.k),
        True,
    ),
    "model_change": STRATEGIES["model_change"],
}
# Other spellings; `committee` is what the main job's first results call BALD.
ALIASES = {"committee": "bald", "coreset": "k_center"} | {
    name.replace("_", ""): name for name in STRATEGIES if "_" in name
}


def listing() -> str:
    """One line for each strategy, for `--help`."""
    lines = [f"{name}: {strategy.line}" + (", on a sample of the pool" if strategy.costly else "")
             for name, strategy in STRATEGIES.items()]  # fmt: skip
    return "\n".join(lines)


def find(name: str) -> Strategy:
    """The strategy of a name or an alias, or a trained policy, `learned:NAME` or `learned:PATH`.

    With `~FEATURE` behind it, a trained policy sees that feature in a random order: what it is worth without.

    Raises:
      ValueError: for a policy that cannot be loaded.
    """
    if not name.startswith(LEARNED):
        return {**REGRESSION, **STRATEGIES, **ADAPTIVE}[ALIASES.get(name, name)]
    place, _, feature = name.removeprefix(LEARNED).rpartition("~")
    if feature not in policies.features.ROWS:
        place, feature = name.removeprefix(LEARNED), ""
    saved = policies.load(place)
    network = Scrambled(saved.network, feature) if feature else saved.network
    line = f"trained by {saved.about.get('way')} on {saved.about.get('source')}"
    if saved.rules:
        make = lambda need: policies.selector([find(r).make(need) for r in saved.rules], network, k=need.k)  # noqa: E731
    else:
        make = lambda need: policies.learned(network, k=need.k, plan=saved.plan)  # noqa: E731
    return Strategy(line, make, params=lambda problem: saved.params)


class Scrambled:
    """A network that sees one of the rows' features in an order that has nothing to do with the rows."""

    def __init__(self, network: Any, feature: str):
        """`feature` is a name of `features.ROWS`."""
        self.network, self.place = network, policies.features.ROWS.index(feature)

    def init(self, *args: Any) -> PyTree:
        """As the network's."""
        return self.network.init(*args)

    def apply(self, params: PyTree, rows: Array, situation: Array, mask: Array) -> Any:
        """As the network's, with the feature's two columns from other rows."""
        columns = jnp.asarray([self.place, self.place + len(policies.features.ROWS)])
        # Rows that count swap with rows that count.
        order = jnp.argsort(jax.random.uniform(jax.random.key(0), mask.shape) + 2.0 * ~mask)
        place = jnp.argsort(~mask, stable=True)
        other = jnp.zeros_like(order).at[place].set(order)
        return self.network.apply(params, rows.at[:, columns].set(rows[other][:, columns]), situation, mask)


def strategy_names(text: str) -> tuple[str, ...]:
    """Comma-separated names of strategies, bandits and trained policies, checked; raises `UsageError`."""
    given = [part.strip() for part in text.split(",")]
    trained = [name for name in given if name.startswith(LEARNED)]
    found = names(text, STRATEGIES, "strategy", (*ALIASES, *ADAPTIVE, *trained))
    for name in trained:
        try:
            find(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return found


def make_policy(name: str, need: Need, posterior: Learner | None = None) -> Policy:
    """The policy of a name.

    Args:
      name: of a strategy, or an alias.
      need: what it is made from.
      posterior: shown to strategies that ask a committee; None where the view already holds a committee's predictions.
    """
    strategy = find(name)
    policy = strategy.make(need)
    if strategy.committee and posterior is not None:
        policy = acquisition.with_learner(policy, posterior)
    return acquisition.subsampled(policy, rows=CANDIDATES) if strategy.costly else policy
