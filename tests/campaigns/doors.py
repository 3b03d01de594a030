"""Every strategy through `suggest` and `pick`, against the loop's own choice: `python tests/campaigns/doors.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_doors as doors
from metaal_jax.names import ADAPTIVE


def main() -> None:
    """Asks all, says which differ, and ends with 1 where any does."""
    wrong = []
    for what, ask, strategies in (
        ("suggest", doors.test_suggest_asks_for_what_the_loop_asks_for, doors.POSSIBLE),
        ("rounds of suggest", doors.test_rounds_of_suggest_are_those_of_the_loop, [*ADAPTIVE, *doors.TRAINED]),
        ("pick", doors.test_pick_picks_what_the_loop_picks, [*doors.WITHOUT_MODEL, *doors.TRAINED]),
    ):
        failed = []
        for strategy in strategies:
            try:
                ask(strategy)
            except (AssertionError, ValueError) as error:
                failed.append(strategy)
                print(f"{what}, {strategy}: {str(error).splitlines()[0]}", flush=True)
        print(f"{what:18} {len(strategies) - len(failed)} strategies the same, {len(failed)} not", flush=True)
        wrong += failed
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
