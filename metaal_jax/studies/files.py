"""Files that are written whole or not at all, places that can be written, and one process at a time in a folder."""

import errno
import os
import tempfile
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such system
    fcntl = None  # type: ignore[assignment]


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def why_not_writable(path: Path, *, folder: bool) -> str | None:
    """Why a file, or files in a folder, cannot be written; None where they can. Leaves nothing behind.

    Permissions alone do not tell: a file is made beside the place, in the folders that are there, and taken away.
    """
    try:
        if _there(path):
            if folder != path.is_dir():
                return f"{path} is a {'file' if folder else 'folder'}"
            place = path if folder else path.parent
        else:
            _there(path.with_name(path.name + ".new"))  # the name may be too long with it
            place = path.parent
        while not _there(place):
            place = place.parent
        if not place.is_dir():
            return f"{path} cannot be written: {place} is a file"
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    return None


def _there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # a file is on the way; the caller meets it higher up
        return False
    return True


class Lock:
    """A file that one process holds, until the last reference to this is gone or the process ends.

    Where the system has `flock`, it gives the lock back with the process, however that ended; elsewhere the file must
    be deleted by hand after a process that was killed. A process that holds a lock may take it again.
    """

    def __init__(self, path: Path, handle: int):
        self.path, self._identity = path, _identity(os.fstat(handle))
        self._finish = weakref.finalize(self, _release, handle, None if fcntl else path)

    def still_holds(self) -> bool:
        """Whether the file is the one that was locked, and not another in its place."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False


_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


def take_lock(path: Path) -> Lock | str:
    """The lock on a file, which is made; or who holds it, as it says there.

    Raises:
      OSError: where the file cannot be made.
    """
    name = os.path.realpath(path)
    held = _held.get(name)
    if held is not None and held.still_holds():
        return held
    flags = os.O_RDWR | os.O_CREAT | (0 if fcntl else os.O_EXCL)
    try:
        handle = os.open(path, flags, 0o644)
    except FileExistsError:
        return f"{_holder(path)}; if it has ended, delete {path}"
    if fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return _holder(path)
            raise
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    lock = _held[name] = Lock(path, handle)
    return lock


def _holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text())}"
    except (OSError, ValueError):
        return "another process"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _release(handle: int, path: Path | None) -> None:
    os.close(handle)
    if path is not None:
        path.unlink(missing_ok=True)
