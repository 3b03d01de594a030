"""Base learners: how labels become parameters (`adapt`) and how the outer loop learns from it (`meta_grad`)."""

from metaal_jax.learners.bayesian import laplace, mc_dropout
from metaal_jax.learners.committee import committee
from metaal_jax.learners.gradient import fine_tune, inner_loop, maml
from metaal_jax.learners.loss_prediction import loss_predictor

__all__ = ["committee", "fine_tune", "inner_loop", "laplace", "loss_predictor", "maml", "mc_dropout"]
