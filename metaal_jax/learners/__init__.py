"""Base learners: how labels become parameters (`adapt`) and how the outer loop learns from it (`meta_grad`)."""

from metaal_jax.learners.adaptation import Adaptation, support_statistics
from metaal_jax.learners.bayesian import laplace, mc_dropout
from metaal_jax.learners.closed_form import closed_form, metaoptnet, protonet, r2d2
from metaal_jax.learners.committee import committee
from metaal_jax.learners.gradient import gradient_steps
from metaal_jax.learners.heads import prototype_head, ridge_head, svm_head
from metaal_jax.learners.inner_loop import inner_loop
from metaal_jax.learners.logistic import linear, logistic_head
from metaal_jax.learners.loss_prediction import loss_predictor
from metaal_jax.learners.maml import anil, fine_tune, implicit_maml, maml, maml_plus_plus, meta_sgd, reptile
from metaal_jax.learners.meta_gradient import annealed, implicit, reptile_difference, through
from metaal_jax.learners.saved import META_LEARNERS, MetaLearner, Trained, load, save
from metaal_jax.learners.seen_classes import seen_classes
from metaal_jax.learners.semi_supervised import label_propagation, pseudo_labels
from metaal_jax.learners.transfer import transfer, without_head

__all__ = [
    "META_LEARNERS",
    "Adaptation",
    "MetaLearner",
    "Trained",
    "anil",
    "annealed",
    "closed_form",
    "committee",
    "fine_tune",
    "gradient_steps",
    "implicit",
    "implicit_maml",
    "inner_loop",
    "label_propagation",
    "laplace",
    "linear",
    "load",
    "logistic_head",
    "loss_predictor",
    "maml",
    "maml_plus_plus",
    "mc_dropout",
    "meta_sgd",
    "metaoptnet",
    "protonet",
    "prototype_head",
    "pseudo_labels",
    "r2d2",
    "reptile",
    "reptile_difference",
    "ridge_head",
    "save",
    "seen_classes",
    "support_statistics",
    "svm_head",
    "through",
    "transfer",
    "without_head",
]
