"""A comparison as library code: run folders, cells over seeds, paired statistics, results in one form.

Nothing here is imported by `import metaal_jax`, and what belongs to the extra `experiments` is imported in the function
that needs it.
"""

from metaal_jax.studies import files, folder, options, processes, results, statistics, usage

__all__ = ["files", "folder", "options", "processes", "results", "statistics", "usage"]
