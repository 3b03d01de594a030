"""What a command line needs: mistakes that get one line, names that are checked, extras that are missing."""

import contextlib
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from metaal_jax import policies
from metaal_jax.checkpoint import CheckpointError
from metaal_jax.data import DataError
from metaal_jax.names import ADAPTIVE, ALIASES, LEARNED, STRATEGIES, Strategy, find


class UsageError(Exception):
    """Something that the user can mend; shown as one line, without a traceback."""


# Where a place is wrong or a disk is full, and not the program.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PLACE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
          errno.ELOOP, errno.EIO, errno.ENOTEMPTY)  # fmt: skip


def main(function: Callable[[], None], *, resumable: bool = True) -> None:
    """Runs a script's main function; errors that the user can mend become one line and exit status 2.

    Args:
      function: the script's.
      resumable: whether it keeps its finished steps in a run folder, and takes `--resume`.
    """
    kept, resume = ("finished steps are kept: ", ", then go on with --resume") if resumable else ("", "")
    try:
        function()
    except (UsageError, DataError, CheckpointError) as error:
        sys.exit(_say(str(error)))
    except OSError as error:
        if error.errno not in (*_FULL, *_PLACE):
            raise
        where = f" ({error.filename})" if error.filename else ""
        mend = "make room" if error.errno in _FULL else "let it be written"
        sys.exit(_say(f"{error.strerror}{where}; {kept}{mend}{resume}"))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(_say(f"not enough memory; {kept}ask for less, such as fewer rows, seeds or filters"))
    except KeyboardInterrupt:
        _leave(_say(f"interrupted{'; finished steps are kept: go on with --resume' if resumable else ''}", 130))


def _leave(status: int) -> None:
    """Ends the process at once: XLA may be computing in other threads, which dies of the interpreter's usual end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def warn(message: str) -> None:
    """One line on stderr, below the progress bars that stand there."""
    _say(message, word="warning")


def _say(message: str, status: int = 2, word: str = "error") -> int:
    # A bar that is left open would have this on its line, and draw itself once more behind it.
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    print(f"{word}: " + " ".join(message.split()), file=sys.stderr)
    return status


@contextlib.contextmanager
def arguments() -> Iterator[None]:
    """Where options become algorithms: a factory's `ValueError` is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def names(text: str | Sequence[str], known: Iterable[str], what: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Names, with commas between them or as a sequence, checked.

    Other spellings, `also`, are taken as they are and not listed in the message.

    Raises:
      UsageError: for an unknown or repeated name, or none.
    """
    parts = text.split(",") if isinstance(text, str) else text
    known, given = list(known), tuple(part.strip() for part in parts if part.strip())
    for name in given:
        if name not in (*known, *also):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"unknown {what} {name!r}; {hint}choose from {', '.join(known)}")
    if not given or len(set(given)) < len(given):
        raise UsageError(f"{what} list {text!r} is empty or repeats a name; choose from {', '.join(known)}")
    return given


def strategy_names(text: str) -> tuple[str, ...]:
    """Comma-separated names of strategies, bandits and trained policies (`learned:NAME`), checked.

    Raises:
      UsageError: for an unknown or repeated name, a policy that cannot be loaded, or none.
    """
    given = [part.strip() for part in text.split(",")]
    trained = [name for name in given if name.startswith(LEARNED)]
    found = names(text, STRATEGIES, "strategy", (*ALIASES, *ADAPTIVE, *trained))
    with arguments():
        for name in trained:
            find(name)
    return found


def strategies(text: str) -> dict[str, Strategy]:
    """Comma-separated strategies by the names that were given, looked up; see `strategy_names`."""
    return {name: find(name) for name in strategy_names(text)}


def by_usual_names(found: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """Strategies by their usual names in place of other spellings; raises a `UsageError` where two become one."""
    usual = {ALIASES.get(name, name): one for name, one in found.items()}
    if len(usual) < len(found):
        raise UsageError(f"--strategies {','.join(found)!r} names one strategy twice, by different spellings")
    return usual


def trained_policies(text: str) -> dict[str, policies.Saved]:
    """Comma-separated trained policies, loaded, by the names that strategies have: `learned:NAME`.

    Raises:
      UsageError: for a policy that cannot be loaded, one named twice, or none.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given or len(set(given)) < len(given):
        raise UsageError(f"--policies {text!r} is empty or names one twice; give names or paths")
    with arguments():
        return {LEARNED + name: policies.load(name) for name in given}


def command() -> str:
    """The command line, as a user would type it from the project's root; a resumed run has the bits of a whole one."""
    script = Path(sys.argv[0])
    given = [word for word in sys.argv[1:] if word != "--resume"]
    if script.name in ("metaal", "__main__.py"):  # installed, or python -m metaal_jax.cli
        return " ".join(["metaal", *given])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *given])


def need(module: str, *, extra: str) -> Any:
    """The module, which belongs to an extra of the package.

    >>> need("json", extra="experiments").dumps(1)
    '1'

    Raises:
      UsageError: where it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UsageError(
            f"{module.partition('.')[0]} is not installed; install it with: pip install 'metaal_jax[{extra}]'"
        ) from None
