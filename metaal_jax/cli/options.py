"""Options that subcommands share, their help with defaults, and mistakes in one line."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# Those of the library, which is not imported for a help; a test holds the two together.
STRATEGY, LEARNER, SCALE, MEMBERS = "uncertain_herding", "linear", "columns", 20
SCALES = ("columns", "common", "none")


def fail(message: str) -> NoReturn:
    """Ends with one line on stderr and status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, argparse.SUPPRESS, []) and action.default is not False
        return f"{action.help} (default: %(default)s)" if shown else action.help


class Parser(argparse.ArgumentParser):
    """A parser of one subcommand."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """One line, and where to look."""
        fail(f"{message.removeprefix('argument ')}; {self.prog} --help shows all options")

    def options(self, words: Sequence[str]) -> argparse.Namespace:
        """The options of a command line; words that are none are refused with those that are like them."""
        found, rest = self.parse_known_args(words)
        if rest:
            word = rest[0].partition("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            self.error(f"unknown option {word!r}" + (f" (did you mean {near[0]}?)" if near else ""))
        return found


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        top = 2**31 - 1 if most is None else most
        if not least <= value <= top:
            ends = f"at least {least}" if value < least and most is None else f"from {least} to {top}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number {ends}")
        return value

    return parse


def number(least: float, below: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number, at least or `above` an end and below another."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value < below:
            ends = f"{'above' if above else 'at least'} {least:g}" + (f", below {below:g}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} must be a finite number {ends}")
        return value

    return parse


def several(one: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """The type of an option that is a list with commas."""

    def parse(text: str) -> list[Any]:
        words = [word.strip() for word in text.split(",")]
        if not all(words):
            raise argparse.ArgumentTypeError(f"{text!r} must be a list with commas, such as 'a,b'")
        found = [one(word) for word in words]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} names something twice")
        return found

    return parse


def add_columns(group: Any) -> None:
    """Options that say what the columns of a file are."""
    group.add_argument("--drop", metavar="COLUMN", action="append", default=[], help="leave a column out; repeatable")
    group.add_argument("--header", choices=("yes", "no"), help="whether a .csv begins with names; else it is seen")


def add_pool(parser: Parser) -> None:
    """The file of rows and its labels, for suggest and predict."""
    group = parser.add_argument_group("rows and labels")
    group.add_argument("file", metavar="FILE", help=".npy, .npz with an array x, or .csv of numbers, a line a row")
    group.add_argument("--id", metavar="COLUMN", help="column (array of a .npz) that names the rows; else 0, 1, ...")
    add_columns(group)
    labels = group.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="FILE", help=".csv of lines row,label, where row is a number or --id")
    labels.add_argument(
        "--label-column", metavar="COLUMN", help="column of FILE with labels; empty where there is none"
    )


def add_model(parser: Parser) -> Any:
    """What predicts, for suggest, predict and compare; gives the group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--learner", default=LEARNER, help="linear, prototypes, ridge, network, propagation, or a file of metaal train"
    )
    group.add_argument(
        "--scale", default=SCALE, choices=SCALES, help="columns for tables, common for embeddings, or none"
    )
    return group


def add_members(group: Any) -> None:
    """How many members a committee has."""
    group.add_argument(
        "--members", type=whole(2), default=MEMBERS, metavar="N", help="draws of the model that committees see"
    )


def add_seed(group: Any) -> None:
    """The seed of all that is random."""
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of all that is random")
