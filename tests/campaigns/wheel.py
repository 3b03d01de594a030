"""The wheel as somebody has it who installed it: no clone, a package folder that is not written, an empty folder.

    python tests/campaigns/wheel.py [--index]

Builds the wheel from a copy of the project, installs it in a fresh environment and runs there the command `metaal`, the
doors and all shipped policies. The packages it depends on are borrowed from the environment that this runs in, or with
`--index` installed from the package index, without any extra: then what needs one must name it. Building needs the
index in both cases. The exit status is 1 if anything failed. Two minutes; with `--index` as long as the download takes.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT_FROM = ("metaal_jax", "pyproject.toml", "README.md", "LICENSE")
POLICIES = """if True:
    import jax
    from metaal_jax import names, policies
    found = policies.shipped()
    for name in found:
        policy = names.policy(name, k=5)
        assert jax.tree.leaves(policy.init(jax.random.key(0))), name
    print(len(found), 'policies')
"""
SUGGEST = """if True:
    import numpy as np
    import metaal_jax as ml
    x = np.load('rows.npy')
    print(ml.suggest(x, {0: 'a', 1: 'b'}, k=3, strategy='margin').tolist(), ml.__file__)
"""
WHOLE = ("--strategies", "random,margin", "--budget", "10", "--batch-size", "5", "--seeds", "2")
STUDY = ("--learners", "logistic", "--strategies", "random,margin", "--seeds", "4", "--budget", "20", "--pool", "100",
         "--test", "50", "--save-results", "found.json")  # fmt: skip
TASKS = ("--group-column", "group", "--label-column", "y", "--shots", "1", "--queries", "1", "--steps", "4")


def run(words: list[str], where: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, and all that was said."""
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).strip()


def install(place: Path, *, index: bool) -> Path:
    """A fresh environment with the wheel."""
    source, wheels, environment = place / "source", place / "wheels", place / "environment"
    source.mkdir()
    for name in BUILT_FROM:
        there = ROOT / name
        copy = shutil.copytree if there.is_dir() else shutil.copy
        copy(there, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    shutil.rmtree(source)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    own = [str(environment / "bin" / "python"), *pip[1:]]
    subprocess.run([*own, "install", *([] if index else ["--no-deps"]), wheel], check=True)
    if not index:
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def state(folder: Path) -> dict[str, str]:
    """All files of a folder with their checksums."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip


def main() -> int:
    """Builds, installs and tries."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", action="store_true", help="install everything from the package index")
    index, failed = parser.parse_args().index, 0
    place = Path(tempfile.mkdtemp(prefix="wheel-"))
    try:
        installed = install(place, index=index)
        (package,) = installed.glob("lib/python*/site-packages/metaal_jax")
        for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
            folder.chmod(0o555)
        before, work, home = state(package), place / "work", place / "home"
        work.mkdir()
        home.mkdir()
        x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 2
        np.save(work / "rows.npy", x)
        np.savez(work / "own.npz", x=x, y=y, group=np.arange(60) // 6)
        (work / "labels.csv").write_text("row,label\n0,a\n1,b\n2,a\n")
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        metaal, python = str(installed / "bin" / "metaal"), str(installed / "bin" / "python")
        extra = ("pip install 'metaal_jax[experiments]'", 2)
        compare, study = (extra, extra) if index else (("margin against random", 0), ("run folder: runs/", 0))
        tries: list[tuple[list[str], str, int]] = [
            ([metaal, "--help"], "suggest", 0),
            ([metaal, "suggest", "rows.npy", "--labels", "labels.csv", "-k", "3"], "", 0),
            ([metaal, "predict", "rows.npy", "--labels", "labels.csv"], "row,class,probability", 0),
            ([metaal, "compare", "own.npz", *WHOLE], *compare),
            ([metaal, "study", *STUDY], *study),
            ([metaal, "train", "own.npz", *TASKS, "--out", "learner.json"], "held-out tasks", 0),
            ([metaal, "suggest", "rows.npy", "--labels", "labels.csv", "--learner", "learner.json"], "", 0),
            ([metaal, "strategies"], "uncertain_herding: ", 0),
            ([python, "-m", "metaal_jax.cli", "strategies", "omniglot"], "trained by", 0),
            ([python, "-c", POLICIES], "policies", 0),
            ([python, "-c", SUGGEST], str(package), 0),
        ]
        for words, wanted, wanted_status in tries:
            status, said = run(words, work, environment)
            good = status == wanted_status and wanted in said
            failed += not good
            shown = " ".join(word if "\n" not in word else "..." for word in [Path(words[0]).name, *words[1:]])
            print(f"{'ok' if good else 'FAILED'}: {shown}", flush=True)
            if not good:
                print(f"  status {status}: {said}")
        untouched = state(package) == before
        print(f"the package folder is {'as it was' if untouched else 'CHANGED'}")
        return int(bool(failed) or not untouched)
    finally:
        for folder in (path for path in place.rglob("*") if path.is_dir() and not path.is_symlink()):
            folder.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
