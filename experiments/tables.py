"""The README's tables, drawn from the committed result files.

python experiments/tables.py
"""

import json
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
LABELS = (10, 20, 30, 50, 100)


def main_job(path: Path) -> str:
    """Accuracy of every arm of one run of the main job, and its paired differences to training from scratch."""
    result = json.loads(path.read_text())
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


def benchmark(path: Path) -> str:
    """Speeds and ratios of one benchmark: medians and quartiles."""
    result = json.loads(path.read_text())
    lines = []
    for row in result["rows"]:
        against = f"{row['name']} : {row['compared_with']}" if row["metric"] == "ratio" else row["name"]
        if row["metric"] == "ratio" or row["metric"].endswith("_per_second"):
            lines.append([against, row["metric"].replace("_", " "), f"{row['mean']:.4g}",
                          f"{row['low']:.4g} to {row['high']:.4g}"])  # fmt: skip
    caption = f"`{result['command']}` ({result['device']})"
    header = ["what", "figure", "median", "quartiles"]
    return f"{caption}\n\n" + tabulate(lines, header, tablefmt="github", disable_numparse=True)


def tables() -> dict[str, str]:
    """Every table, by the path of its file."""
    found = {}
    for path in sorted((ROOT / "experiments/results/meta_active").glob("*.json")):
        found[str(path.relative_to(ROOT))] = main_job(path)
    for path in sorted((ROOT / "benchmarks/results").glob("*/*.json")):
        found[str(path.relative_to(ROOT))] = benchmark(path)
    return found


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
