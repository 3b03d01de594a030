"""The tables of the READMEs, drawn from the committed result files.

`python experiments/tables.py` prints those of the project's README and writes `experiments/results/README.md`,
`benchmarks/results/README.md` and `docs/regression.md`, which hold all others.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from metaal_jax.studies.policy_tables import (
    policy_evaluation,
    policy_starts,
    policy_targets,
    policy_training,
    policy_trainings,
)
from metaal_jax.studies.tables import Strategies, active_regression, benchmark, few_shot, learners, main_job, sinusoids
from metaal_jax.studies.usage import main

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SPEEDS = ROOT / "experiments/results", ROOT / "benchmarks/results"
FOLLOWED = ("random", "margin", "entropy", "bald", "power_bald", "sampled_bald", "batch_bald", "badge", "typical",
            "typiclust", "max_herding", "uncertain_herding", "k_center", "oracle")  # fmt: skip
# What draws the results about policies, by the first word of their names.
POLICIES = {
    "starts": policy_starts,
    "on": policy_evaluation,
    "many": policy_targets,
    "ways": policy_trainings,
    "joint": policy_trainings,
}


def policy_results(draw: Callable) -> list[Path]:
    """The results about policies that are drawn by this function."""
    paths = sorted((RESULTS / "policies").glob("*.json"))
    return [path for path in paths if POLICIES.get(path.stem.partition("-")[0], policy_training) is draw]


def starts() -> dict[str, Path]:
    """Trained policies beside their own starts, by where they are judged."""
    return {path.stem.removeprefix("starts-"): path for path in policy_results(policy_starts)}


def strategies() -> Strategies | None:
    """The comparison of strategies, where it is there."""
    folder = RESULTS / "strategies"
    return Strategies(folder) if any(folder.glob("*-*.json")) else None


def tables() -> dict[str, str]:
    """The tables of the project's README, by what they are drawn from."""
    found = {}
    for path in sorted((RESULTS / "meta_active").glob("*.json")):
        draw = learners if path.stem.endswith(("-learners", "-propagation")) else main_job
        found[str(path.relative_to(ROOT))] = draw(path)
    compared = strategies()
    if compared:
        found["strategies"] = f"{compared.caption()}\n\n{compared.areas(10, 100, FOLLOWED)}"
        found["strategies, ranks"] = compared.ranks(12)
        found["strategies, adapted"] = compared.adapted()
    runs = sorted((RESULTS / "few_shot").glob("*.json"))
    if runs:
        found["few-shot"] = few_shot(runs)
    for draw, *most in ((policy_training,), (policy_evaluation, 8), (policy_targets, 8), (policy_trainings,)):
        found |= {str(path.relative_to(ROOT)): draw(path, *most) for path in policy_results(draw)}
    if starts():
        found["policies, starts"] = policy_starts(starts())
    for path in sorted(SPEEDS.glob("*/loop.json")):
        found[str(path.relative_to(ROOT))] = benchmark(path)
    return found


def benchmarks() -> str:
    """The document about speed."""
    text = ["# Benchmarks\n\nMedians and quartiles, drawn by `python experiments/tables.py`. A ratio `a : b` is the "
            "time of b divided by that of a.\n"]  # fmt: skip
    for path in sorted(SPEEDS.glob("*/*.json")):
        text.append(f"## {path.stem}, {path.parent.name}\n\n{benchmark(path)}\n")
    return "\n".join(text)


def results(compared: Strategies) -> str:
    """The document about strategies and policies."""
    text = ["# Query strategies\n\nMean accuracy along the curve (area) in percent with 95 % intervals over seeds, "
            f"and mean ranks by area. Drawn by `python experiments/tables.py`.\n\n{compared.caption()}\n",
            f"## Mean ranks\n\n{compared.ranks()}\n"]  # fmt: skip
    for batch, labels in compared.settings():
        text.append(f"## Batches of {batch}, up to {labels} labels\n\n{compared.areas(batch, labels)}\n")
    for draw in (policy_evaluation, policy_targets):
        text += [f"## Trained policies, {path.stem}\n\n{draw(path)}\n" for path in policy_results(draw)]
    for where, path in starts().items():
        draw = policy_evaluation if where == "mnist" else policy_targets
        text.append(f"## Trained policies and their starts, {where}\n\n{draw(path)}\n")
    return "\n".join(text)


def regression() -> str:
    """The document about targets."""
    folder = RESULTS / "regression"
    return f"""# Regression

Means with 95 % intervals, drawn by `python experiments/tables.py`.

## Meta-learning: sinusoids

Mean squared error on new tasks after gradient steps on a few points, the protocol of Finn et al. (2017); all learners
get the same tasks.

{sinusoids(folder / "sinusoids.json")}

## Active learning: three tables

Mean over labels of the test error, in standard deviations of the target; less is better. All strategies get the same
pools and test rows.

{active_regression(folder / "active.json")}
"""


def documents() -> dict[Path, str]:
    """The generated documents beside the results."""
    found = {SPEEDS / "README.md": benchmarks(), ROOT / "docs/regression.md": regression()}
    compared = strategies()
    if compared:
        found[RESULTS / "README.md"] = results(compared)
    return found


def write_all() -> None:
    """Prints the tables of the project's README and writes the documents."""
    argparse.ArgumentParser(description=(__doc__ or "").strip()).parse_args()
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
    for path, text in documents().items():
        path.write_text(text)


if __name__ == "__main__":
    main(write_all)
