"""The tables of documents about trained policies, drawn from result files."""

from collections.abc import Mapping
from pathlib import Path

from metaal_jax.studies.results import Record, read_results
from metaal_jax.studies.tables import caption, needed, row_rank, seeds_of
from metaal_jax.studies.text import markdown, row_difference, row_points


def policy_training(path: Path) -> str:
    """What a policy reached on held-out problems of its source, and less rules on the same problems, by their kind."""
    result = read_results(path)

    def kind_of(row: Record) -> tuple[int, ...]:
        return (row["ways"], row["pool"], row["labels"], row["batch"])

    rows = {(kind_of(row), row["strategy"]): row for row in result["rows"] if row["metric"] == "area"}
    paired = {(kind_of(pair), pair["b"]["strategy"]): pair for pair in result["paired"]}
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    seconds = next(row["seconds"] for row in reversed(result["rows"]) if row["metric"] == "validation_area")
    lines = [["area of the policy", *[row_points(rows[kind, "policy"]) for kind in kinds]]]
    for rule in dict.fromkeys(name for _, name in paired):
        lines.append([f"less {rule}", *[row_difference(paired.get((kind, rule))) for kind in kinds]])
    header = ["on the source", *["{} classes, {} rows, {} labels by {}".format(*kind) for kind in kinds]]
    cases = f"{rows[kinds[0], 'policy']['problems']} held-out problems of each kind"
    said = caption(result, cases, time="minutes of training", seconds=seconds)
    return f"{said}\n\n{markdown(lines, header)}"


def policy_targets(path: Path, most: int | None = None) -> str:
    """Trained policies on many targets: mean ranks, areas and differences, and each target's best rule."""
    result = read_results(path)
    area = {(r["target"], r["strategy"]): r for r in result["rows"] if r["metric"] == "area" and r["target"] != "all"}
    problems = {r["target"]: r for r in result["rows"] if r["metric"] == "problem"}
    parts = [caption(result, seeds_of(result))]
    for policy in dict.fromkeys(r["ranked_with"] for r in result["rows"] if "ranked_with" in r):
        found = {(r["strategy"], r["metric"]): r for r in result["rows"] if r.get("ranked_with") == policy}
        paired = {(p["target"], p["b"]["strategy"]): p for p in result["paired"]
                  if p["a"]["strategy"] == policy and p["metric"] == "area"}  # fmt: skip
        order = sorted((r for (_, metric), r in found.items() if metric == "mean_rank"), key=lambda r: r["mean"])
        lines = []
        for place, row in enumerate(order):
            name = row["strategy"]
            if most is not None and place >= most and name not in (policy, "random", "margin"):
                continue
            less = row_difference(paired.get(("all", name)))
            lines.append([name, row_rank(row), row_points(found[name, "area"]), less])
        header = ["strategy", f"mean rank of {len(order)}", "mean area", "policy less this"]
        parts.append(markdown(lines, header))
        rules = [row["strategy"] for row in order if row["strategy"] != policy]
        lines = []
        for target, of in problems.items():
            mean = {name: area[target, name]["mean"] for name in rules}
            best = max(mean, key=lambda name: mean[name])
            about = f"{of['classes']} classes, {of['pool']} rows, {of['budget']} labels"
            lines.append([target, about, row_points(area[target, policy]), row_difference(paired[target, "random"]),
                          best, row_difference(paired[target, best])])  # fmt: skip
        header = ["target", "problems", policy, "less random", "best rule there", "policy less it"]
        parts.append(markdown(lines, header))
    return "\n\n".join(parts)


def policy_evaluation(path: Path, most: int | None = None) -> str:
    """A trained policy beside rules on a new task: the best `most` of them and a few that texts name."""
    result = read_results(path)
    parts = [caption(result, seeds_of(result))]
    for batch in sorted({row["batch"] for row in result["rows"]}):
        found = {(r["strategy"], r["metric"]): r for r in result["rows"] if r["batch"] == batch}
        areas = sorted((r for (_, metric), r in found.items() if metric == "area"), key=lambda r: -r["mean"])
        of_batch = [pair for pair in result["paired"] if pair["batch"] == batch]
        first = of_batch[0]["a"]  # the policy that the table is about
        paired = {pair["b"]["strategy"]: pair for pair in of_batch if pair["a"] == first}
        lines = []
        for place, row in enumerate(areas):
            name = row["strategy"]
            shown = name.startswith("learned:") or name in ("random", "margin", "albl", "oracle")
            if most is not None and place >= most and not shown:
                continue
            share = found.get((name, "share_of_oracle"))
            lines.append([name, row_points(row), f"{share['mean']:.2f}" if share else "",
                          *(needed(found[name, f"labels_to_{goal}"], row["labels"]) for goal in (80, 90)),
                          row_difference(paired.get(name))])  # fmt: skip
        header = ["strategy", "area", "share of the oracle's gain", "to 80 %", "to 90 %", "policy less this"]
        parts.append(f"Batches of {batch}:\n\n{markdown(lines, header)}")
    return "\n\n".join(parts)


def policy_starts(paths: Mapping[str, Path]) -> str:
    """What training adds to a policy's own start, and how both stand beside rules, on each of the results."""
    parts, lines, rules = [], [], ("uncertain_herding", "max_herding", "margin", "random")
    for where, path in paths.items():
        result = read_results(path)
        parts.append(f"{where}: {caption(result, seeds_of(result))}")
        here = ("all", result["config"]["target"])
        paired = {(p["a"]["strategy"], p["b"]["strategy"]): p for p in result["paired"]
                  if p["metric"] == "area" and p.get("target", "all") in here}  # fmt: skip
        for policy in dict.fromkeys(a for a, _ in paired):
            # Those that were trained on single rows start from one and the same network.
            starts = [b for a, b in paired if a == policy and b.endswith("~start")]
            start = next((b for b in starts if b == f"{policy}~start"), starts[0])
            lines.append([where, policy, *(row_difference(paired.get((policy, b))) for b in (start, *rules))])
    header = [
        "on",
        "policy",
        "less its start",
        "less uncertain_herding",
        "less max_herding",
        "less margin",
        "less random",
    ]
    return "\n\n".join([*parts, markdown(lines, header)])


def policy_trainings(path: Path) -> str:
    """Policies by the way they were trained, or with learners that were: areas, and what the best has more."""
    result = read_results(path)

    def who(row: Record) -> tuple[str, str]:
        return (row["strategy"], row["learner"])

    rows = sorted((row for row in result["rows"] if row["metric"] == "area"), key=lambda row: -row["mean"])
    paired = {who(p["b"]): p for p in result["paired"] if who(p["a"]) == who(rows[0])}
    several = len({row["learner"] for row in rows}) > 1
    lines = []
    for row in rows:
        of_runs = ", ".join(f"{100 * mean:.2f}" for mean in row["runs"])
        names = who(row) if several else who(row)[:1]
        lines.append([*names, row_points(row), row_difference(paired.get(who(row))), of_runs])
    header = ["policy", *(["learner"] if several else []), "area", "the best less this", "each training"]
    config = result["config"]
    said = (f"`{result['command']}` ({result['device']}, {config['minutes']:g} minutes of training each, "
            f"{config['report_problems']} held-out problems)")  # fmt: skip
    return f"{said}\n\n{markdown(lines, header)}"
