"""The main job: learners are meta-trained on a source and compared, with query strategies, on a new target.

Its options are those of `studies.main_job.Config`; reading them needs the extra `experiments`.
"""

from collections.abc import Sequence


def parse(words: Sequence[str]) -> Sequence[str]:
    """The options as they are: what they may be stands in the config, which needs the library."""
    return words


def run(words: Sequence[str]) -> None:
    """Runs the job in its folder and prints its table."""
    from metaal_jax.studies.main_job import Config, job
    from metaal_jax.studies.options import parse

    job(parse(Config, words=words, prog="metaal study"))
