"""Meta-active learning in JAX: learn from many tasks how to adapt to a new one, and which of its examples to label."""

from metaal_jax import (
    acquisition,
    annotators,
    checkpoint,
    data,
    learners,
    loop,
    losses,
    metrics,
    models,
    names,
    parallel,
    policies,
    stopping,
    tasks,
)
from metaal_jax.active import ActiveLearner
from metaal_jax.base import (
    Annotator,
    Answer,
    Batch,
    Decision,
    Learner,
    Policy,
    PoolView,
    Prediction,
    Problem,
    Task,
    Trainable,
)
from metaal_jax.checks import check_learner, check_policy
from metaal_jax.doors import compare, pick, suggest
from metaal_jax.loop import active_learner
from metaal_jax.outer import outer_loop
from metaal_jax.training import meta_train

__version__ = "0.1.0"

__all__ = [
    "ActiveLearner",
    "Annotator",
    "Answer",
    "Batch",
    "Decision",
    "Learner",
    "Policy",
    "PoolView",
    "Prediction",
    "Problem",
    "Task",
    "Trainable",
    "acquisition",
    "active_learner",
    "annotators",
    "check_learner",
    "check_policy",
    "checkpoint",
    "compare",
    "data",
    "learners",
    "loop",
    "losses",
    "meta_train",
    "metrics",
    "models",
    "names",
    "outer_loop",
    "parallel",
    "pick",
    "policies",
    "stopping",
    "suggest",
    "tasks",
]
