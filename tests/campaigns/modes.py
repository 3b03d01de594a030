"""A row of each table of tests in other modes of JAX: 64 bits, NaN as an error, leaks of tracers, ranks by hand.

    python tests/campaigns/modes.py                    # all modes
    python tests/campaigns/modes.py nans leaks         # some
    python tests/campaigns/modes.py x64 --rows loop    # some rows
    python tests/campaigns/modes.py --verbose          # with pytest's own words for what fails

One line a mode and what failed in it below; the exit status is 1 if anything did. About 8 minutes on two cores.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODES = {
    "usual": {},
    "x64": {"JAX_ENABLE_X64": "1"},
    "nans": {"JAX_DEBUG_NANS": "1"},
    "leaks": {"JAX_CHECK_TRACER_LEAKS": "1"},
    "ranks": {"JAX_NUMPY_RANK_PROMOTION": "raise"},
}
# Which tests of a file, as for pytest's -k. A row that chooses none is a failure: it says nothing.
ROWS = {
    "strategies": "keep_the_contract and (margin or badge or bald or typical or herding)",
    "learners": "test_contract and (maml or fine_tune or committee or laplace)",
    "meta_learners": "test_contract and (implicit_maml or r2d2 or metaoptnet or protonet or meta_sgd or logistic)",
    "logistic": "are_scikit_learns and wine or wide or weights or leaving",
    "semi_supervised": "test_contract_with_a_pool",
    "acquisition": "keep_the_contract or against_their_definitions",
    "policies": "TestLearned and test_contract or test_defined_from or solves_the_toy and (reinforce or pathwise)",
    "bandits": "contract",
    "loop": "test_a_run_and_its_trace or test_seeds_and_problems or asking_and_telling or exhausted_pool",
    "metrics": "not finite",
    "stopping": "by_hand or signals",
    "tasks": "test_few_shot or test_growing or test_problems",
    "outer": "two_pieces or mean_gradient",
}


def run(row: str, which: str, mode: str) -> tuple[str, list[str], str]:
    """The counts of pytest's last line, the names of what failed, and all it said."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", f"tests/test_{row}.py"]
    command += ["-k", which] if which else []
    settings = {**os.environ, **MODES[mode], "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=settings, text=True, capture_output=True)
    said = done.stdout + done.stderr
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", said, re.M)
    if done.returncode and not failed:
        failed = [(f"tests/test_{row}.py", "no test of this name" if done.returncode == 5 else said[-300:])]
    passed = re.findall(r"(\d+) passed", said)
    return passed[-1] if passed else "0", [f"{name}  {why}".rstrip() for name, why in failed], said


def main() -> int:
    """Runs the wanted rows in the wanted modes; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", help=f"of {', '.join(MODES)}; all but usual if none is given")
    parser.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--verbose", action="store_true", help="all that pytest says of what fails")
    options = parser.parse_args()
    rows = options.rows.split(",") if options.rows else list(ROWS)
    for given, known in ((options.modes, MODES), (rows, ROWS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    worst = 0
    for mode in options.modes or list(MODES)[1:]:
        began = time.monotonic()
        found = [run(row, ROWS[row], mode) for row in rows]
        failed = [name for _, names, _ in found for name in names]
        passed = sum(int(number) for number, _, _ in found)
        print(f"{mode:6} {passed} passed, {len(failed)} failed, {time.monotonic() - began:.0f} s", flush=True)
        for name in failed:
            print(f"       {name}")
        if options.verbose:
            print("".join(said for _, names, said in found if names))
        worst |= bool(failed)
    return worst


if __name__ == "__main__":
    sys.exit(main())
