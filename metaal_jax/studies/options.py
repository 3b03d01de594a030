"""Options that are checked before anything is computed: numbers in their range, places that can be written.

A config is a dataclass. What its fields allow follows from their types, and where that is not right, from a `Range` or
a `Place` in `typing.Annotated`:

    members: Annotated[int, at_least(2)] = 4
    held_out: Annotated[int, at_least(0)] = 0
    save_results: Annotated[str | None, RESULT_FILE] = None

Without one, an `int` is at least 1, or as `SEED` says if its name ends in `seed`; a `float` is finite and at least 0.

A field may be a dataclass itself, a group of options. Groups order a config, its help and what functions take; options
are named without them, on the command line and in files, so that none may stand in two groups of a config.
"""

import contextlib
import dataclasses
import io
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metaal_jax.studies.files import why_not_writable
from metaal_jax.studies.usage import UsageError, need

C = TypeVar("C")
FLOAT32_MAX = 3.4028234663852886e38
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that are allowed, as `int` or `float` hold them on a device.

    Attributes:
      least, most: the ends, which are allowed themselves.
      above: whether `least` is not.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def why_not(self, value: float) -> str | None:
        """Why a number is not allowed, for `... must be ...`; None for one that is."""
        whole = isinstance(value, int)
        largest = INT32_MAX if whole and self.most == math.inf else FLOAT32_MAX
        words = [] if whole or abs(value) <= FLOAT32_MAX else ["a finite number"]  # NaN compares with nothing
        if self.most < math.inf and not self.least <= value <= self.most:
            return " ".join([*words, f"from {self.least:.10g} to {self.most:.10g}"])
        low = value <= self.least if self.above else value < self.least
        if self.least > -math.inf and (words or low):
            words.append(f"{'above' if self.above else 'at least'} {self.least:.10g}")
        if not words and abs(value) > largest:
            words.append(f"at most {largest}")
        return ", ".join(words) or None


def at_least(least: float) -> Range:
    """That number or more."""
    return Range(least)


def above(least: float) -> Range:
    """More than that number."""
    return Range(least, above=True)


def between(least: float, most: float) -> Range:
    """From one number to another."""
    return Range(least, most)


SEED = between(0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class Place:
    """What is written where an option says.

    Attributes:
      folder: a folder, or else a file.
      picture: whether a picture is written beside the file, with the ending `.png`.
    """

    folder: bool = False
    picture: bool = False


RESULT_FILE, RESULT_FOLDER, FILE = Place(picture=True), Place(folder=True), Place()


def parse(
    config: type[C], description: str | None = None, *, words: Sequence[str] | None = None, prog: str | None = None
) -> C:
    """The command line as a config.

    Args:
      config: its class.
      description: above the help; None for the docstring.
      words: the options; None for those of the process.
      prog: the command before them; None for that of the process.

    Raises:
      UsageError: for words that are no options of it, or not of their type.
    """
    tyro = need("tyro", extra="experiments")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found: C = tyro.cli(
                config, prog=prog, args=words, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
        except SystemExit as ended:
            if ended.code in (0, None):
                raise
            raise UsageError(_in_one_line(said.getvalue())) from None
    return found


def _in_one_line(said: str) -> str:
    """What Tyro says in a box: its first part, and the options that it takes to be meant."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    boxed = "╭" in plain  # without UTF-8 the title is a part of its own
    plain = re.sub(r"^╭.*$|^╰.*$|^│|│$", "", plain, flags=re.MULTILINE)
    first, *others = re.split(r"^ *(?:─{3,}|-{3,}) *$", plain, flags=re.MULTILINE)[0 if boxed else 1 :] or [plain]
    words = " ".join(first.split()).rstrip(".")
    meant = [name for part in others if "meant" in part for name in re.findall(r"^ +(--[\w-]+)", part, re.MULTILINE)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else ";"
    return f"{words}{hint} --help shows all options"


def flat(config: Any) -> dict[str, Any]:
    """The options of a config by name, those in its groups too.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Solver:
    ...     steps: int = 8
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     rate: float = 0.1
    ...     solver: Solver = Solver()
    >>> flat(Config())
    {'rate': 0.1, 'steps': 8}

    Raises:
      TypeError: where two options have one name.
    """
    return {name: value for name, (value, _) in _options(config).items()}


def with_options(config: C, **options: Any) -> C:
    """A copy of a config with other values of options, in whichever groups they are.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Solver:
    ...     steps: int = 8
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     rate: float = 0.1
    ...     solver: Solver = Solver()
    >>> with_options(Config(), steps=9)
    Config(rate=0.1, solver=Solver(steps=9))

    Raises:
      TypeError: for a name that is no option's.
    """
    if unknown := options.keys() - flat(config):
        raise TypeError(f"{type(config).__name__} has no option {', '.join(sorted(unknown))}")
    changed: C = _changed(config, options)
    return changed


def _changed(config: Any, options: dict[str, Any]) -> Any:
    new = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            new[field.name] = _changed(value, options)
        elif field.name in options:
            new[field.name] = options[field.name]
    return dataclasses.replace(config, **new)


def _options(config: Any) -> dict[str, tuple[Any, Any]]:
    """Value and declared type of every option by name."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = _options(value) if dataclasses.is_dataclass(value) else {field.name: (value, hints[field.name])}
        if twice := found.keys() & inner:
            raise TypeError(f"{type(config).__name__} has two options with the name {min(twice)}")
        found |= inner
    return found


def check_options(config: Any) -> None:
    """Checks every number and place among the options of a config.

    None is allowed where the type says so. Places are tried: nothing is left there.

    >>> from typing import Annotated
    >>> @dataclasses.dataclass
    ... class Config:
    ...     rate: float = 0.1
    ...     members: Annotated[int, at_least(2)] = 4
    >>> check_options(Config())
    >>> check_options(Config(rate=float("nan")))
    Traceback (most recent call last):
      ...
    metaal_jax.studies.usage.UsageError: --rate nan must be a finite number, at least 0

    Raises:
      UsageError: naming the option, what it was and what it may be.
    """
    for name, (value, hint) in _options(config).items():
        option = f"--{name.replace('_', '-')}"
        marks = getattr(hint, "__metadata__", ())
        for place in (mark for mark in marks if isinstance(mark, Place) and value is not None):
            check_place(option, value, place)
        declared = next((mark for mark in marks if isinstance(mark, Range)), None)
        real = float in _types(hint)
        if isinstance(value, list | tuple) and not value:
            raise UsageError(f"{option} is empty; give something, or leave it out")
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool):
                usual = SEED if name.endswith("seed") else at_least(0 if real else 1)
                _check_number(f"{option} {one}", float(one) if real else one, declared or usual)


def _types(hint: Any) -> set[Any]:
    """The types in a hint, those of an alternative or of a tuple's members too."""
    return {hint}.union(*map(_types, typing.get_args(hint)))


def _check_number(what: str, value: float, allowed: Range) -> None:
    if why := allowed.why_not(value):
        raise UsageError(f"{what} must be {why}")


def numbers_of(
    option: str, text: str, *, of: type[int] | type[float], like: str, allowed: Range = Range(1)
) -> list[Any]:
    """Comma-separated numbers of an option, checked.

    >>> numbers_of("--batches", "1,10", of=int, like="1,10")
    [1, 10]

    Args:
      option: its name, for messages.
      text: what was given.
      of: `int` or `float`.
      like: an example of what may be given.
      allowed: the range of each.

    Raises:
      UsageError: for words that are no numbers, numbers that are not allowed, and none.
    """
    found = []
    for word in text.split(","):
        try:
            found.append(of(word))
        except ValueError:
            kind = "whole numbers" if of is int else "numbers"
            raise UsageError(f"{option} {text!r} must be {kind} with commas between them, such as {like}") from None
        _check_number(f"{option} {text!r}: {word.strip()}", found[-1], allowed)
    return found


def choices(lines: Mapping[str, str]) -> str:
    """Names and what they mean, for `--help`."""
    return "One of: " + "; ".join(f"{name}: {line}" for name, line in lines.items())


def check_place(option: str, path: str | Path, place: Place) -> None:
    """Checks that something can be written to a path, before it is there to be written.

    Raises:
      UsageError: with the reason that the system gives.
    """
    path = Path(path)
    if place.picture and path.suffix == ".png":
        raise UsageError(f"{option} {path}: a picture is written beside this file, under that name; end it in .json")
    if why := why_not_writable(path, folder=place.folder):
        raise UsageError(f"{why}; give another {option}")
