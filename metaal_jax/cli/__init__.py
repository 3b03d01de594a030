"""The command `metaal`: the library's doors for a terminal, one file a subcommand.

Modules here import JAX only once the arguments are known, so that `--help` and mistakes are answered at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from metaal_jax.cli.options import fail

COMMANDS = {
    "suggest": "the rows of a file to label next",
    "predict": "the class of every row of a file, from the labels of some",
    "study": "meta-train on a source, then compare learners and strategies on a target",
    "compare": "how many labels each strategy would have needed on labelled rows",
    "train": "meta-train a learner on your own labelled tasks",
    "prepare": "download and prepare sets of TensorFlow Datasets",
    "strategies": "the query strategies and trained policies by name",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake is one line on stderr and exit status 2.

    Args:
      arguments: words after `metaal`; None for those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        from metaal_jax import __version__

        print(f"metaal_jax {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        wrong = f"unknown subcommand {name!r}; {hint}choose from" if name else "give a subcommand:"
        fail(f"{wrong} {', '.join(COMMANDS)}; metaal --help says what they do")
    command = importlib.import_module(f"metaal_jax.cli.{name}")
    options = command.parse(given[1:])

    from metaal_jax.studies import usage

    try:
        usage.main(lambda: command.run(options), resumable=name == "study")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def overview() -> str:
    """What `metaal --help` prints."""
    lines = [f"  {name:<12}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: metaal SUBCOMMAND ...",
            "",
            "Active learning and meta-learning on files of rows.",
            "",
            *lines,
            "",
            "metaal SUBCOMMAND --help shows the options of each.",
        ]
    )
