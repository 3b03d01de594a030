"""Meta-trains a learner on your own labelled tasks, for new tasks with few labels and the same columns.

The file holds all tasks: a column says which task a row is of, another its label. The learner's file is for
metaal suggest --learner; what it reached on held-out tasks, beside logistic regression, is printed.
"""

import argparse
import sys
from collections.abc import Sequence

from metaal_jax.cli.options import Parser, add_columns, add_seed, number, several, whole


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="metaal train", description=__doc__)
    rows = parser.add_argument_group("tasks")
    rows.add_argument("file", metavar="FILE", help=".csv of numbers, or .npz with an array x; a line a row")
    rows.add_argument("--group-column", metavar="COLUMN", required=True, help="column (array) that names the task")
    rows.add_argument("--label-column", metavar="COLUMN", required=True, help="column (array) of labels")
    add_columns(rows)
    rows.add_argument("--shots", type=several(whole(1)), default="1,5", metavar="N,...",
                      help="labelled rows of a class at which the learner is reported")  # fmt: skip
    rows.add_argument("--ways", type=whole(2), metavar="N", help="the most classes of a task; else all, up to 20")
    rows.add_argument("--queries", type=whole(1), metavar="N", help="rows of a class to judge on; else up to 15")
    rows.add_argument("--held-out", type=number(0, 1), default=0.2, metavar="SHARE",
                      help="share of the tasks on which the learner is reported and not trained")  # fmt: skip
    rows.add_argument("--draws", type=whole(1), default=20, metavar="N",
                      help="draws of labelled rows from each held-out task")  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument("--learner", default="maml", help="maml, anil, protonet or r2d2")
    training.add_argument("--hidden", type=several_widths, metavar="N,...",
                          help="widths of the network's hidden layers; else two of 64")  # fmt: skip
    training.add_argument("--steps", type=whole(1), default=1000, help="outer steps")
    training.add_argument("--batch", type=whole(1), default=8, help="tasks in a step")
    training.add_argument("--rate", type=number(0, above=True), default=1e-3, help="of the outer optimiser, Adam")
    add_seed(training)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", required=True, help="the learner's file (.json)")
    return parser.options(words)


def several_widths(text: str) -> list[int]:
    """A list of widths, which may be alike."""
    return [whole(1)(word) for word in text.split(",")]


def run(options: argparse.Namespace) -> None:
    """Trains, writes the file and prints the report."""
    from metaal_jax import learners
    from metaal_jax.cli.files import labelled, read_rows
    from metaal_jax.studies.options import FILE, check_place
    from metaal_jax.studies.usage import UsageError, arguments
    from metaal_jax.training import meta_train

    check_place("--out", options.out, FILE)
    rows = read_rows(options)
    x, y, keep = labelled(rows, options.label_column, options.file)
    groups = [rows.columns[options.group_column][row] for row in keep]
    if "" in groups:
        row = int(keep[groups.index("")])
        raise UsageError(f"{options.file}: row {row} has no entry in --group-column {options.group_column}")
    with arguments():
        trained = meta_train(
            (x, y), groups=groups, learner=options.learner, hidden=options.hidden, ways=options.ways,
            shots=options.shots, queries=options.queries, steps=options.steps, batch=options.batch, rate=options.rate,
            held_out=options.held_out, draws=options.draws, seed=options.seed,
            progress=_announce if sys.stderr.isatty() else None,
        )  # fmt: skip
        learners.save(options.out, trained)
    print(trained)
    print(f"written to {options.out}; use it with: metaal suggest FILE --labels FILE --learner {options.out}")


def _announce(step: int, metrics: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"step {step}: {shown}", file=sys.stderr)
