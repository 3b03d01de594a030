"""A comparison as library code: run folders, cells over seeds, paired statistics, results in one form.

What belongs to the extra `experiments` is imported in the function that needs it.
"""

from metaal_jax.studies import (
    arms,
    comparison,
    curves,
    few_shot,
    few_shot_data,
    few_shot_presets,
    files,
    folder,
    groups,
    main_job,
    meta_learners,
    meta_training,
    options,
    processes,
    results,
    setting,
    statistics,
    study,
    usage,
)
from metaal_jax.studies.study import Study

__all__ = [
    "Study",
    "arms",
    "comparison",
    "curves",
    "few_shot",
    "few_shot_data",
    "few_shot_presets",
    "files",
    "folder",
    "groups",
    "main_job",
    "meta_learners",
    "meta_training",
    "options",
    "processes",
    "results",
    "setting",
    "statistics",
    "study",
    "usage",
]
