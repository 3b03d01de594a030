"""The tables of the READMEs, drawn from the committed result files.

`python experiments/tables.py` prints those of the project's README and writes `experiments/results/README.md`,
`benchmarks/results/README.md` and `docs/regression.md`, which hold all others.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from metaal_jax.studies.results import read_results
from metaal_jax.studies.usage import main

ROOT = Path(__file__).resolve().parent.parent
LABELS = (10, 20, 30, 50, 100)


def main_job(path: Path) -> str:
    """Accuracy of every arm of one run of the main job, and its paired differences to training from scratch."""
    result = read_results(path)
    rows = {(r["learner"], r["strategy"], r["metric"], r["labels"]): r for r in result["rows"]}
    most = max(r["labels"] for r in result["rows"])
    arms = list(dict.fromkeys((r["learner"], r["strategy"]) for r in result["rows"]))
    paired = {
        (p["a"]["learner"], p["a"]["strategy"], p["labels"]): p
        for p in result["paired"]
        if p["b"]["learner"] == "scratch" and p["metric"] == "accuracy"
    }
    lines = []
    for learner, strategy in arms:
        line = [learner, strategy]
        for labels in LABELS:
            row = rows[learner, strategy, "accuracy", labels]
            line.append(f"{100 * row['mean']:.1f} ± {50 * (row['high'] - row['low']):.1f}")
        line.append(f"{100 * rows[learner, strategy, 'area', most]['mean']:.1f}")
        for target in (80, 90, 95):
            needed = rows[learner, strategy, f"labels_to_{target}", most]["median"]
            line.append(f"> {most}" if needed is None else f"{needed:.0f}")
        for labels in (20, 50, 100):
            pair = paired.get((learner, strategy, labels))
            line.append(
                f"{100 * pair['difference']:+.1f} [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]" if pair else ""
            )
        lines.append(line)
    header = ["learner", "strategy", *[str(n) for n in LABELS], "area", "to 80 %", "to 90 %", "to 95 %",
              *[f"− scratch, {n}" for n in (20, 50, 100)]]  # fmt: skip
    seeds, minutes = result["rows"][0]["seeds"], result["seconds"] / 60
    caption = f"`{result['command']}` ({result['device']}, {minutes:.0f} minutes, {seeds} seeds)"
    return f"{caption}\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True)


def learners(path: Path) -> str:
    """Accuracy of every learner of one run of the main job, from no label on."""
    result = read_results(path)
    rows = {(r["learner"], r["metric"], r["labels"]): r for r in result["rows"]}
    most = max(r["labels"] for r in result["rows"])
    shown = [n for n in (10, 15, 20, 30, 50, 60, 100, 200) if any(key[1:] == ("accuracy", n) for key in rows)]
    cell = lambda r: f"{100 * r['mean']:.1f} ± {50 * (r['high'] - r['low']):.1f}"  # noqa: E731
    lines = []
    for learner in dict.fromkeys(r["learner"] for r in result["rows"]):
        line = [learner, cell(rows[learner, "cold_accuracy", 0]),
                *[cell(rows[learner, "accuracy", n]) for n in shown], cell(rows[learner, "area", most])]  # fmt: skip
        for target in (90, 95):
            needed = rows[learner, f"labels_to_{target}", most]["median"]
            line.append(f"> {most}" if needed is None else f"{needed:.0f}")
        lines.append(line)
    seeds, minutes = result["rows"][0]["seeds"], result["seconds"] / 60
    caption = f"`{result['command']}` ({result['device']}, {minutes:.0f} minutes, {seeds} seeds)"
    header = ["learner", "0", *map(str, shown), "area", "to 90 %", "to 95 %"]
    return f"{caption}\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True)


def benchmark(path: Path) -> str:
    """Speeds, ratios and differences of one benchmark: medians and quartiles."""
    result = read_results(path)
    lines = []
    for row in result["rows"]:
        against = f"{row['name']} : {row['compared_with']}" if row["metric"] == "ratio" else row["name"]
        if row["metric"] in ("ratio", "largest_difference") or row["metric"].endswith("_per_second"):
            lines.append([against, row["metric"].replace("_", " "), f"{row['mean']:.4g}",
                          f"{row['low']:.4g} to {row['high']:.4g}"])  # fmt: skip
    caption = f"`{result['command']}` ({result['device']})"
    header = ["what", "figure", "median", "quartiles"]
    return f"{caption}\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True)


FOLLOWED = ("random", "margin", "entropy", "bald", "power_bald", "sampled_bald", "batch_bald", "badge", "typical",
            "typiclust", "max_herding", "uncertain_herding", "k_center", "oracle")  # fmt: skip


def strategy_places() -> dict[tuple[str, str], dict]:
    """The comparison of strategies: results by embedding and condition."""
    found = {}
    for path in sorted((ROOT / "experiments/results/strategies").glob("*-*.json")):
        result = read_results(path)
        found[tuple(path.stem.split("-"))] = {
            (r["strategy"], r["batch"], r["metric"], r["labels"]): r for r in result["rows"]
        }
    return found


def strategy_areas(places: dict, batch: int, labels: int, names: tuple[str, ...]) -> str:
    """Area up to a number of labels, each strategy in each condition on each embedding."""
    lines = []
    for name in names:
        line = [name]
        for rows in places.values():
            row = rows.get((name, batch, "area", labels))
            line.append(f"{100 * row['mean']:.1f} ± {50 * (row['high'] - row['low']):.1f}" if row else "")
        if any(line[1:]):
            lines.append(line)
    return tabulate(lines, ["strategy", *[f"{e}, {c}" for e, c in places]], tablefmt="github", disable_numparse=True)


def strategy_ranks(most: int | None = None) -> str:
    """Mean ranks, best first by the rank on the meta-learned embedding at the larger number of labels."""
    result = read_results(ROOT / "experiments/results/strategies/summary.json")
    ranks = {(r["strategy"], r["learner"], r["labels"]): r for r in result["rows"] if r["metric"] == "mean_rank"}
    columns = sorted({(e, n) for _, e, n in ranks}, key=lambda c: (c[1], c[0]))
    first = ("meta", max(n for _, n in columns)) if ("meta", max(n for _, n in columns)) in columns else columns[-1]
    # Those that stop at fewer labels come last, by their rank there.
    place = lambda name: [ranks[name, *c]["mean"] if (name, *c) in ranks else 1e3 for c in (first, columns[0])]  # noqa: E731
    names = sorted({name for name, _, _ in ranks}, key=lambda name: (*place(name), name))
    cell = lambda r: f"{r['mean']:.1f} ± {(r['high'] - r['low']) / 2:.1f}" if r else ""  # noqa: E731
    lines = [[name, *[cell(ranks.get((name, *column))) for column in columns]] for name in names]
    header = ["strategy", *[f"{e}, up to {n}" for e, n in columns]]
    return tabulate(lines[:most], header, tablefmt="github", disable_numparse=True)


def strategy_caption() -> str:
    """The command behind the comparison of strategies."""
    result = read_results(ROOT / "experiments/results/strategies/summary.json")
    seeds, minutes = result["config"]["seeds"], result["seconds"] / 60
    return f"`{result['command']}` ({result['device']}, {minutes:.0f} minutes, {seeds} seeds)"


def fully_adapted() -> str:
    """The best strategies with full adaptation."""
    result = read_results(ROOT / "experiments/results/strategies/summary.json")
    rows = {(r["strategy"], r["metric"], r["labels"]): r for r in result["rows"] if r["learner"] == "maml"}
    shown = sorted({n for _, metric, n in rows if metric == "accuracy"})
    most = max(n for _, metric, n in rows if metric == "area")
    cell = lambda r: f"{100 * r['mean']:.1f} ± {50 * (r['high'] - r['low']):.1f}"  # noqa: E731
    names = list(dict.fromkeys(name for name, _, _ in rows))
    lines = [
        [name, cell(rows[name, "area", most]), *[cell(rows[name, "accuracy", n]) for n in shown]] for name in names
    ]
    return tabulate(lines, ["strategy", "area", *map(str, shown)], tablefmt="github", disable_numparse=True)


def few_shot(paths: list[Path]) -> str:
    """Few-shot accuracies: one line a run, the paper's figure beside ours."""
    lines = []
    for path in paths:
        result = read_results(path)
        rows = {row["metric"]: row for row in result["rows"]}
        cell = lambda r: f"{100 * r['mean']:.2f} ± {50 * (r['high'] - r['low']):.2f}" if r else "–"  # noqa: E731
        row = result["rows"][0]
        lines.append([
            row["learner"], row["target"], f"{row['ways']}-way {row['shots']}-shot",
            cell(rows.get("accuracy_transductive")), cell(rows.get("accuracy_non_transductive")),
            str(row.get("published", "")), f"{result['seconds'] / 60:.0f}", f"`{result['command']}`",
        ])  # fmt: skip
    header = ["learner", "set", "tasks", "transductive", "non-transductive", "paper", "minutes", "command"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def few_shot_results() -> list[Path]:
    """The result files of `few_shot.py`."""
    return sorted((ROOT / "experiments/results/few_shot").glob("*.json"))


def policy_training(path: Path) -> str:
    """What a policy reached on held-out problems of its source, and less rules on the same problems, by their kind."""
    result = read_results(path)
    kind_of = lambda row: (row["ways"], row["pool"], row["labels"], row["batch"])  # noqa: E731
    rows = {(kind_of(row), row["strategy"]): row for row in result["rows"] if row["metric"] == "area"}
    paired = {(kind_of(pair), pair["b"]["strategy"]): pair for pair in result["paired"]}
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    trained = next(row for row in reversed(result["rows"]) if row["metric"] == "validation_area")
    lines = [["area of the policy", *[_percent(rows[kind, "policy"]) for kind in kinds]]]
    for rule in dict.fromkeys(name for _, name in paired):
        lines.append([f"less {rule}", *[_difference(paired.get((kind, rule))) for kind in kinds]])
    header = ["on the source", *["{} classes, {} rows, {} labels by {}".format(*kind) for kind in kinds]]
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    caption = (f"`{result['command']}` ({result['device']}, {trained['seconds'] / 60:.0f} minutes of training, "
               f"{rows[kinds[0], 'policy']['problems']} held-out problems of each kind)")  # fmt: skip
    return f"{caption}\n\n{table}"


def policy_targets(path: Path, most: int | None = None) -> str:
    """Trained policies on many targets: mean ranks, areas and differences, and each target's best rule."""
    result = read_results(path)
    area = {(r["target"], r["strategy"]): r for r in result["rows"] if r["metric"] == "area" and r["target"] != "all"}
    problems = {r["target"]: r for r in result["rows"] if r["metric"] == "problem"}
    parts = []
    for policy in dict.fromkeys(r["ranked_with"] for r in result["rows"] if "ranked_with" in r):
        found = {(r["strategy"], r["metric"]): r for r in result["rows"] if r.get("ranked_with") == policy}
        paired = {(p["target"], p["b"]["strategy"]): p for p in result["paired"]
                  if p["a"]["strategy"] == policy and p["metric"] == "area"}  # fmt: skip
        ranked = sorted((r for (_, metric), r in found.items() if metric == "mean_rank"), key=lambda r: r["mean"])
        lines = []
        for place, row in enumerate(ranked):
            name = row["strategy"]
            if most is not None and place >= most and name not in (policy, "random", "margin"):
                continue
            rank = f"{row['mean']:.1f} ± {(row['high'] - row['low']) / 2:.1f}"
            lines.append([name, rank, _percent(found[name, "area"]), _difference(paired.get(("all", name)))])
        header = ["strategy", f"mean rank of {len(ranked)}", "mean area", "policy less this"]
        parts.append(tabulate(lines, header, tablefmt="github", disable_numparse=True))
        rules = [row["strategy"] for row in ranked if row["strategy"] != policy]
        lines = []
        for target, of in problems.items():
            best = max(rules, key=lambda name: area[target, name]["mean"])
            about = f"{of['classes']} classes, {of['pool']} rows, {of['budget']} labels"
            lines.append([target, about, _percent(area[target, policy]), _difference(paired[target, "random"]), best,
                          _difference(paired[target, best])])  # fmt: skip
        header = ["target", "problems", policy, "less random", "best rule there", "policy less it"]
        parts.append(tabulate(lines, header, tablefmt="github", disable_numparse=True))
    seeds, minutes = result["config"]["seeds"], result["seconds"] / 60
    caption = f"`{result['command']}` ({result['device']}, {minutes:.0f} minutes, {seeds} seeds)"
    return "\n\n".join([caption, *parts])


def policy_evaluation(path: Path, most: int | None = None) -> str:
    """A trained policy beside rules on a new task: the best `most` of them and a few that texts name."""
    result = read_results(path)
    parts = []
    for batch in sorted({row["batch"] for row in result["rows"]}):
        found = {(r["strategy"], r["metric"]): r for r in result["rows"] if r["batch"] == batch}
        areas = sorted((r for (_, metric), r in found.items() if metric == "area"), key=lambda r: -r["mean"])
        paired = {pair["b"]["strategy"]: pair for pair in result["paired"] if pair["batch"] == batch}
        lines = []
        for place, row in enumerate(areas):
            name = row["strategy"]
            shown = name.startswith("learned:") or name in ("random", "margin", "albl", "oracle")
            if most is not None and place >= most and not shown:
                continue
            needed = [found[name, f"labels_to_{goal}"]["median"] for goal in (80, 90)]
            share = found.get((name, "share_of_oracle"))
            lines.append([name, _percent(row), f"{share['mean']:.2f}" if share else "",
                          *[f"> {row['labels']}" if n is None else f"{n:.0f}" for n in needed],
                          _difference(paired.get(name))])  # fmt: skip
        header = ["strategy", "area", "share of the oracle's gain", "to 80 %", "to 90 %", "policy less this"]
        parts.append(f"Batches of {batch}:\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True))
    seeds, minutes = result["config"]["seeds"], result["seconds"] / 60
    caption = f"`{result['command']}` ({result['device']}, {minutes:.0f} minutes, {seeds} seeds)"
    return "\n\n".join([caption, *parts])


def policy_trainings(path: Path) -> str:
    """Policies by the way they were trained, or with learners that were: areas, and what the best has more."""
    result = read_results(path)
    who = lambda row: (row["strategy"], row["learner"])  # noqa: E731
    rows = sorted((row for row in result["rows"] if row["metric"] == "area"), key=lambda row: -row["mean"])
    paired = {who(p["b"]): p for p in result["paired"] if who(p["a"]) == who(rows[0])}
    several = len({row["learner"] for row in rows}) > 1
    lines = []
    for row in rows:
        of_runs = ", ".join(f"{100 * mean:.2f}" for mean in row["runs"])
        names = who(row) if several else who(row)[:1]
        lines.append([*names, _percent(row), _difference(paired.get(who(row))), of_runs])
    header = ["policy", *(["learner"] if several else []), "area", "the best less this", "each training"]
    config = result["config"]
    caption = (f"`{result['command']}` ({result['device']}, {config['minutes']:g} minutes of training each, "
               f"{config['report_problems']} held-out problems)")  # fmt: skip
    return f"{caption}\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True)


def _percent(row: dict) -> str:
    return f"{100 * row['mean']:.2f} ± {50 * (row['high'] - row['low']):.2f}"


def _difference(pair: dict | None) -> str:
    if pair is None:
        return ""
    return f"{100 * pair['difference']:+.2f} [{100 * pair['low']:+.2f}, {100 * pair['high']:+.2f}]"


def policy_results(draw: Callable) -> list[Path]:
    """The results that are drawn by this function, by the first word of their names."""
    kinds = {"on": policy_evaluation, "many": policy_targets, "ways": policy_trainings, "joint": policy_trainings}
    paths = sorted((ROOT / "experiments/results/policies").glob("*.json"))
    return [path for path in paths if kinds.get(path.stem.partition("-")[0], policy_training) is draw]


def _with_interval(row: dict, name: str = "mean", sign: str = "") -> str:
    return f"{row[name]:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def _caption(result: dict, cases: str) -> str:
    return f"`{result['command']}` ({result['device']}, {result['seconds'] / 60:.0f} minutes, {cases})"


def sinusoids(path: Path) -> str:
    """Mean squared error on sinusoids after fine-tuning, by points and steps."""
    result = read_results(path)
    rows = {(r["labels"], r["steps"], r["learner"]): r for r in result["rows"]}
    names = list(dict.fromkeys(key[2] for key in rows))
    cells = dict.fromkeys(key[:2] for key in rows)
    lines = [[*cell, *(_with_interval(rows[*cell, name]) for name in names)] for cell in cells]
    text = tabulate(lines, ["points", "steps", *names], tablefmt="github", disable_numparse=True)
    return f"{_caption(result, str(result['rows'][0]['tasks']) + ' tasks')}\n\n{text}"


def active_regression(path: Path) -> str:
    """Area under the curve of the root mean squared error of every strategy, less random's."""
    result = read_results(path)
    paired = {(p["target"], p["a"]["strategy"]): p for p in result["paired"]}
    lines = []
    for row in (r for r in result["rows"] if r["metric"] == "rmse_area"):
        pair = paired.get((row["target"], row["strategy"]))
        more = ["", ""] if pair is None else [_with_interval(pair, "difference", "+"), f"{pair['p_holm']:.2g}"]
        lines.append([row["target"], row["strategy"], _with_interval(row), *more])
    header = ["table", "strategy", "area of RMSE", "less random's", "p (Holm)"]
    text = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    return f"{_caption(result, str(result['rows'][0]['seeds']) + ' seeds')}\n\n{text}"


def regression() -> str:
    """The document about targets."""
    folder = ROOT / "experiments/results/regression"
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


def tables() -> dict[str, str]:
    """The tables of the project's README, by what they are drawn from."""
    found = {}
    for path in sorted((ROOT / "experiments/results/meta_active").glob("*.json")):
        draw = learners if path.stem.endswith(("-learners", "-propagation")) else main_job
        found[str(path.relative_to(ROOT))] = draw(path)
    places = strategy_places()
    if places:
        found["strategies"] = strategy_caption() + "\n\n" + strategy_areas(places, 10, 100, FOLLOWED)
        found["strategies, ranks"] = strategy_ranks(12)
        found["strategies, adapted"] = fully_adapted()
    if few_shot_results():
        found["few-shot"] = few_shot(few_shot_results())
    for draw, *most in ((policy_training,), (policy_evaluation, 8), (policy_targets, 8), (policy_trainings,)):
        found |= {str(path.relative_to(ROOT)): draw(path, *most) for path in policy_results(draw)}
    for path in sorted((ROOT / "benchmarks/results").glob("*/loop.json")):
        found[str(path.relative_to(ROOT))] = benchmark(path)
    return found


def documents() -> dict[Path, str]:
    """The generated documents beside the results."""
    text = ["# Benchmarks\n\nMedians and quartiles, drawn by `python experiments/tables.py`. A ratio `a : b` is the "
            "time of b divided by that of a.\n"]  # fmt: skip
    for path in sorted((ROOT / "benchmarks/results").glob("*/*.json")):
        text.append(f"## {path.stem}, {path.parent.name}\n\n{benchmark(path)}\n")
    found = {ROOT / "benchmarks/results/README.md": "\n".join(text)}
    places = strategy_places()
    if places:
        text = ["# Query strategies\n\nMean accuracy along the curve (area) in percent with 95 % intervals over seeds, "
                f"and mean ranks by area. Drawn by `python experiments/tables.py`.\n\n{strategy_caption()}\n",
                f"## Mean ranks\n\n{strategy_ranks()}\n"]  # fmt: skip
        keys = {key[1:] for rows in places.values() for key in rows if key[2] == "area"}
        for batch, _, labels in sorted(keys):
            names = {
                name: None for rows in places.values() for name, b, m, n in rows if (b, m, n) == (batch, "area", labels)
            }
            order = sorted(
                names, key=lambda n: -sum(rows[n, batch, "area", labels]["mean"] for rows in places.values())
            )
            text.append(f"## Batches of {batch}, up to {labels} labels\n\n"
                        f"{strategy_areas(places, batch, labels, tuple(order))}\n")  # fmt: skip
        for draw in (policy_evaluation, policy_targets):
            text += [f"## Trained policies, {path.stem}\n\n{draw(path)}\n" for path in policy_results(draw)]
        found[ROOT / "experiments/results/README.md"] = "\n".join(text)
    found[ROOT / "docs/regression.md"] = regression()
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
