"""A comparison as library code: run folders, cells over seeds, paired statistics, results in one form.

What belongs to the extra `experiments` is imported in the function that needs it.
"""

from metaal_jax.studies import comparison, files, folder, options, processes, results, statistics, study, usage
from metaal_jax.studies.study import Study

__all__ = [
    "Study",
    "comparison",
    "files",
    "folder",
    "options",
    "processes",
    "results",
    "statistics",
    "study",
    "usage",
]
