"""Meta-active learning in JAX: learn from many tasks how to adapt to a new one, and which of its examples to label."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# What is no module of the package: the module that holds it. Nothing is imported before it is asked for.
_HOMES = {
    "ActiveLearner": "active",
    **dict.fromkeys(
        (
            "Annotator", "Answer", "Batch", "Decision", "Learner", "Policy", "PoolView", "Prediction", "Problem",
            "Task", "Trainable",
        ),
        "base",
    ),
    **dict.fromkeys(("check_learner", "check_policy"), "checks"),
    **dict.fromkeys(("compare", "pick", "suggest"), "doors"),
    "active_learner": "loop",
    "outer_loop": "outer",
    "meta_train": "training",
}  # fmt: skip

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    globals()[name] = found = getattr(home, name) if name in _HOMES else home
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
