"""The table of query strategies: a new one is a function and one line here. `metaal_jax.names` looks them up."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from metaal_jax import acquisition, policies
from metaal_jax.base import Learner, Policy, Problem, PyTree

CANDIDATES = 200

NEEDS = {
    "logits": "the model's logits",
    "embedding": "an embedding of the rows",
    "committee": "the logits of several models, [m, n, c]",
    "x": "the rows themselves",
    "labels": "the labels bought so far",
    "learner": "the learner, whose gradients it takes",
    "refit": "a learner to refit with labels that are only tried",
    "loss_learner": "a learner of learners.loss_predictor",
    "classes": "the number of classes",
    "rounds": "the number of rounds",
    "truth": "the pool's hidden labels and held-out rows, which simulated runs alone have",
}


class Given(NamedTuple):
    """What strategies are made from; None for what there is not, which `Strategy.needs` are checked against.

    Attributes:
      k: rows a round.
      rounds: of a run.
      classes: of the target.
      learner: the single base learner, for rules that take its gradients.
      refit: what rules refit by the thousand: the base learner, or a quicker form of it.
      loss_learner: a learner of `learners.loss_predictor` for the same rows.
    """

    k: int
    rounds: int = None  # type: ignore[assignment]
    classes: int = None  # type: ignore[assignment]
    learner: Learner = None  # type: ignore[assignment]
    refit: Learner = None  # type: ignore[assignment]
    loss_learner: Learner = None  # type: ignore[assignment]


class Strategy(NamedTuple):
    """A query strategy.

    Attributes:
      line: what it does, for `--help`.
      make: `(given) -> policy`.
      needs: names of `NEEDS`.
      costly: its definition refits or compares so much that it looks at `CANDIDATES` random rows a round.
      memory: it remembers earlier rounds: what it asks for depends on more than the labels.
      labels: what kind of labels it is for.
      params: `(problem) -> policy_params`, trained or, of an oracle, what only it may see.
    """

    line: str
    make: Callable[[Given], Policy]
    needs: tuple[str, ...] = ("logits",)
    costly: bool = False
    memory: bool = False
    labels: Literal["classes", "targets", "both"] = "classes"
    params: Callable[[Problem], PyTree] = lambda problem: ()

    @property
    def committee(self) -> bool:
        """Whether it asks a committee, or another posterior of several members."""
        return "committee" in self.needs

    @property
    def held_out(self) -> bool:
        """Whether it needs validation rows in the problem."""
        return "truth" in self.needs

    def build(self, given: Given, posterior: Learner | None = None) -> Policy:
        """The policy, from what is given and checked; see `strategy`, which checks."""
        made = self.make(given)
        if self.committee and posterior is not None:
            made = acquisition.with_learner(made, posterior)
        return acquisition.subsampled(made, rows=CANDIDATES) if self.costly else made


def _top(scorer: Callable[..., Array]) -> Callable[[Given], Policy]:
    return lambda given: acquisition.top_k(scorer, k=given.k)


def _joint(rule: Callable[..., Policy], **options: Any) -> Callable[[Given], Policy]:
    return lambda given: rule(k=given.k, **options)


def _truth(problem: Problem) -> PyTree:
    """The pool's labels, and held-out rows in which each class counts alike, as it does among balanced test rows."""
    held = problem.validation
    members = jnp.zeros(held.y.shape[0]).at[held.y].add(held.weight)[held.y]
    return problem.y, held._replace(weight=held.weight / jnp.maximum(members, 1.0))


def _rule(line: str, make: Callable[[Given], Policy], needs: str = "logits", **more: Any) -> Strategy:
    return Strategy(line, make, tuple(needs.split()), **more)


STRATEGIES: dict[str, Strategy] = {
    "random": _rule("rows at random", _top(acquisition.random), "", labels="both"),
    # Uncertainty.
    "least_confident": _rule("smallest probability of the most probable class", _top(acquisition.least_confident)),
    "margin": _rule("smallest margin between the two most probable classes", _top(acquisition.margin)),
    "entropy": _rule("largest predictive entropy", _top(acquisition.entropy)),
    "ratio": _rule("largest ratio of the second probability to the first", _top(acquisition.ratio)),
    "tempered_entropy": _rule(
        "entropy at temperature 3", _top(acquisition.tempered(acquisition.entropy, temperature=3.0))
    ),
    "balanced_margin": _rule(
        "margin, the predicted classes filled up evenly",
        lambda given: acquisition.class_balanced(acquisition.margin, k=given.k),
        "logits labels",
    ),
    # Disagreement.
    "vote_entropy": _rule("largest entropy of a committee's votes", _top(acquisition.vote_entropy), "committee"),
    "consensus_entropy": _rule(
        "largest entropy of a committee's mean distribution", _top(acquisition.consensus_entropy), "committee"
    ),
    "mean_kl": _rule("largest mean divergence of members from their mean", _top(acquisition.mean_kl), "committee"),
    "variation_ratio": _rule("most votes against the majority", _top(acquisition.variation_ratio), "committee"),
    "mean_std": _rule("largest mean standard deviation over members", _top(acquisition.mean_std), "committee"),
    "bald": _rule("largest disagreement (BALD) of a committee, top k", _top(acquisition.bald), "committee"),
    "power_bald": _rule(
        "rows drawn in proportion to BALD",
        lambda given: acquisition.stochastic_top_k(acquisition.bald, k=given.k),
        "committee",
    ),
    "sampled_bald": _rule(
        "largest BALD, top k of the rows that batch_bald sees", _top(acquisition.bald), "committee", costly=True
    ),
    "batch_bald": _rule("BALD of the batch as a whole", _joint(acquisition.batch_bald), "committee", costly=True),
    "epig": _rule(
        "largest expected gain about other rows' predictions", _joint(acquisition.epig), "committee", costly=True
    ),
    # Influence.
    "gradient_length": _rule(
        "expected gradient length over the whole network",
        lambda given: acquisition.top_k(acquisition.expected_gradient_length(given.learner), k=given.k),
        "x learner",
    ),
    "head_gradient_length": _rule(
        "expected gradient length of the last layer", _top(acquisition.head_gradient_length), "logits embedding"
    ),
    "model_change": _rule(
        "expected model change under a committee's labels",
        _top(acquisition.expected_model_change),
        "committee embedding",
        labels="both",
    ),
    "error_reduction": _rule(
        "expected log loss of the pool after a refit",
        lambda given: acquisition.top_k(acquisition.expected_error_reduction(given.refit), k=given.k),
        "logits x labels refit",
        costly=True,
    ),
    "error_reduction_01": _rule(
        "expected error rate of the pool after a refit",
        lambda given: acquisition.top_k(
            acquisition.expected_error_reduction(given.refit, loss="zero_one"), k=given.k
        ),
        "logits x labels refit",
        costly=True,
    ),
    "glister": _rule(
        "gain in the likelihood of the labelled rows by one step",
        lambda given: acquisition.glister(given.learner, k=given.k),
        "logits embedding labels learner",
    ),
    "predicted_loss": _rule(
        "largest loss foreseen by a head trained beside the network",
        lambda given: acquisition.with_learner(
            acquisition.top_k(acquisition.predicted_loss, k=given.k), given.loss_learner, own_start=True
        ),
        "x labels loss_learner",
    ),
    # Representation.
    "k_center": _rule(
        "farthest from the labelled rows, one after the other", _joint(acquisition.k_center), "embedding"
    ),
    "k_means": _rule("nearest to the centres of k-means", _joint(acquisition.k_means), "embedding"),
    "k_medoids": _rule("medoids beside the labelled rows", _joint(acquisition.k_medoids), "embedding"),
    "badge": _rule("k-means++ on hypothesised gradients", _joint(acquisition.badge), "logits embedding"),
    "typical": _rule("typical rows far from the labelled ones", _joint(acquisition.typical), "embedding"),
    "typiclust": _rule(
        "the most typical rows of clusters without a label", _joint(acquisition.typiclust), "embedding"
    ),
    "prob_cover": _rule(
        "balls of one radius that cover most rows",
        lambda given: acquisition.prob_cover(k=given.k, classes=given.classes),
        "embedding classes",
    ),
    "max_herding": _rule("largest gain in kernel coverage", _joint(acquisition.max_herding), "embedding"),
    "uncertain_herding": _rule(
        "largest gain in the kernel coverage of what is uncertain",
        _joint(acquisition.uncertain_herding),
        "logits embedding",
    ),
    "density": _rule("largest mean similarity to the pool", _top(acquisition.density), "embedding"),
    "density_entropy": _rule(
        "entropy times density", _top(acquisition.density_weighted(acquisition.entropy)), "logits embedding"
    ),
    "discriminative": _rule(
        "surest to be told from the labelled rows", _joint(acquisition.discriminative), "embedding"
    ),
    # Lifts.
    "softmax_entropy": _rule(
        "rows drawn in proportion to exp(4 entropy)",
        lambda given: acquisition.stochastic_top_k(acquisition.entropy, k=given.k, kind="softmax", beta=4.0),
    ),
    "diverse_margin": _rule(
        "margin and distance, ranked batch mode",
        lambda given: acquisition.diverse(acquisition.margin, k=given.k),
        "logits embedding",
    ),
    "cluster_margin": _rule(
        "smallest margin in each of k clusters in turn",
        lambda given: acquisition.cluster_balanced(acquisition.margin, k=given.k),
        "logits embedding",
    ),
    "rank_sum": _rule(
        "sum of the ranks by margin and by density",
        _top(acquisition.sum_of_ranks([acquisition.margin, acquisition.density])),
        "logits embedding",
    ),
    "rank_product": _rule(
        "product of the ranks by margin and by density",
        _top(acquisition.product_of_ranks([acquisition.margin, acquisition.density])),
        "logits embedding",
    ),
    "epsilon_margin": _rule(
        "margin, every fifth row at random",
        lambda given: acquisition.epsilon_mixture(
            _top(acquisition.margin)(given), _top(acquisition.random)(given), epsilon=0.2
        ),
    ),
    "typical_margin": _rule(
        "typical rows up to 50 labels, then margin",
        lambda given: acquisition.switch_at(
            [acquisition.typical(k=given.k), acquisition.top_k(acquisition.margin, k=given.k)], labels=[50]
        ),
        "logits embedding",
    ),
    # The upper reference.
    "oracle": _rule(
        "greedy oracle: it sees the labels, and the loss on rows of its own",
        lambda given: acquisition.greedy_oracle(given.refit, k=given.k),
        "x labels refit truth",
        costly=True,
        params=_truth,
    ),
}  # fmt: skip
ARMED = ("random", "margin", "typical", "max_herding")
# Known by name, and not among "all": they are made of other rules.
ADAPTIVE: dict[str, Strategy] = {
    "albl": _rule(
        f"active learning by learning, a bandit over rules: {', '.join(ARMED)}",
        lambda given: policies.albl([STRATEGIES[rule].make(given) for rule in ARMED], k=given.k, horizon=given.rounds),
        "logits embedding labels rounds",
        memory=True,
    ),
}
# For targets that are no classes; the others refuse these.
REGRESSION: dict[str, Strategy] = {
    "random": STRATEGIES["random"],
    "greedy_input": _rule("farthest in the inputs, GSx", _joint(acquisition.greedy_input), "x", labels="both"),
    "greedy_output": _rule(
        "prediction farthest from all labels, GSy", _joint(acquisition.greedy_output), "logits labels", labels="targets"
    ),
    "igs": _rule("farthest in inputs and outputs, iGS", _joint(acquisition.igs), "logits x labels", labels="targets"),
    "committee_variance": _rule(
        "largest variance of a committee's outputs",
        _top(acquisition.committee_variance),
        "committee",
        labels="targets",
    ),
    "variance_reduction": _rule(
        "largest fall of the pool's predictive variance",
        _joint(acquisition.expected_variance_reduction),
        "committee",
        labels="targets",
    ),
    "model_change": STRATEGIES["model_change"],
}
# Other spellings; `committee` is what the main job's first results call BALD.
ALIASES = {"committee": "bald", "coreset": "k_center"} | {
    name.replace("_", ""): name for name in STRATEGIES if "_" in name
}
KNOWN = {**REGRESSION, **STRATEGIES, **ADAPTIVE}
