"""Meta-active learning in JAX: learn from many tasks how to adapt to a new one, and which of its examples to label."""

from metaal_jax import (
    acquisition,
    data,
    learners,
    loop,
    losses,
    metrics,
    models,
    parallel,
    policies,
    stopping,
    tasks,
)
from metaal_jax.base import (
    ActiveLearner,
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    Prediction,
    Problem,
    Task,
)
from metaal_jax.checks import check_learner, check_policy
from metaal_jax.loop import active_learner
from metaal_jax.outer import outer_loop

__version__ = "0.1.0"

__all__ = [
    "ActiveLearner",
    "Batch",
    "Decision",
    "Learner",
    "Policy",
    "PoolView",
    "Prediction",
    "Problem",
    "Task",
    "acquisition",
    "active_learner",
    "check_learner",
    "check_policy",
    "data",
    "learners",
    "loop",
    "losses",
    "metrics",
    "models",
    "outer_loop",
    "parallel",
    "policies",
    "stopping",
    "tasks",
]
