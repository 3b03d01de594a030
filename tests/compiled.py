"""Programs that earlier runs of the tests compiled, for this one; a run needs none of them.

JAX does not write an entry of its cache whole or not at all, so processes that run at a time do not share a folder.
Each begins with links to what is kept and, at its end, gives back what it has compiled itself.
"""

import hashlib
import os
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

MOST = 2**30  # bytes that are kept
SETTLED = 5.0  # seconds after which nobody is still writing an entry


def kept() -> Path:
    """The folder in the user's cache for these versions, these flags and this kind of CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.findall(r"^(?:model name|flags|Features)\s*:.*$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    mark = hashlib.sha256("\n".join([os.environ["XLA_FLAGS"], *dict.fromkeys(cpu)]).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "metaal_jax" / "compiled" / f"jax-{version('jax')}-jaxlib-{version('jaxlib')}-{mark}"


def borrow(folder: Path, source: Path) -> None:
    """Fills the folder with what is kept: by links, and by copies where a link cannot be made."""
    for entry in source.glob("*-cache"):
        try:
            os.link(entry, folder / entry.name)
        except OSError:
            shutil.copyfile(entry, folder / entry.name)


def give_back(folder: Path, target: Path) -> None:
    """Keeps what is new in the folder, each entry whole or not at all, and the newest of what is then too much."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in folder.glob("*-cache"):
        if not (target / entry.name).exists() and time.time() - entry.stat().st_mtime > SETTLED:
            fresh = target / f"{entry.name}.{os.getpid()}"
            shutil.copyfile(entry, fresh)
            os.replace(fresh, target / entry.name)
    sizes = sorted(((path.stat().st_mtime, path.stat().st_size, path) for path in target.iterdir()), reverse=True)
    total = 0
    for _, size, path in sizes:
        total += size
        if total > MOST:
            path.unlink(missing_ok=True)
