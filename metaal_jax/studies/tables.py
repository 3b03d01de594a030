"""The tables of documents, drawn from result files: the main job, few-shot learning, strategies, regression, speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaal_jax.studies.results import Record, read_results
from metaal_jax.studies.text import markdown, row_difference, row_points

LABELS = (10, 20, 30, 50, 100)
GOALS = (80, 90, 95)


def caption(result: Mapping[str, Any], cases: str, *, time: str = "minutes", seconds: float | None = None) -> str:
    """The command behind a result, its device, how long it took, and of how many cases it is."""
    minutes = (result["seconds"] if seconds is None else seconds) / 60
    return f"`{result['command']}` ({result['device']}, {minutes:.0f} {time}, {cases})"


def seeds_of(result: Mapping[str, Any]) -> str:
    """How many seeds a result is of."""
    config: Mapping[str, Any] = result["config"]
    return f"{config['seeds']} seeds" if "seeds" in config else f"{result['rows'][0]['seeds']} seeds"


def needed(row: Record, most: int) -> str:
    """Median labels to a goal; `> 100` where most seeds do not reach it."""
    return f"> {most}" if row["median"] is None else f"{row['median']:.0f}"


def main_job(path: Path) -> str:
    """Accuracy of every arm of one run of the main job, and its paired differences to training from scratch."""
    result = read_results(path)
    rows = {(r["learner"], r["strategy"], r["metric"], r["labels"]): r for r in result["rows"]}
    most = max(r["labels"] for r in result["rows"])
    paired = {
        (p["a"]["learner"], p["a"]["strategy"], p["labels"]): p
        for p in result["paired"]
        if p["b"]["learner"] == "scratch" and p["metric"] == "accuracy"
    }
    lines = []
    for arm in dict.fromkeys((r["learner"], r["strategy"]) for r in result["rows"]):
        lines.append([
            *arm, *(row_points(rows[*arm, "accuracy", labels], 1) for labels in LABELS),
            f"{100 * rows[*arm, 'area', most]['mean']:.1f}",
            *(needed(rows[*arm, f"labels_to_{goal}", most], most) for goal in GOALS),
            *(row_difference(paired.get((*arm, labels)), 1) for labels in (20, 50, 100)),
        ])  # fmt: skip
    header = ["learner", "strategy", *[str(n) for n in LABELS], "area", *[f"to {goal} %" for goal in GOALS],
              *[f"− scratch, {n}" for n in (20, 50, 100)]]  # fmt: skip
    return f"{caption(result, seeds_of(result))}\n\n{markdown(lines, header)}"


def learners(path: Path) -> str:
    """Accuracy of every learner of one run of the main job, from no label on."""
    result = read_results(path)
    rows = {(r["learner"], r["metric"], r["labels"]): r for r in result["rows"]}
    most = max(r["labels"] for r in result["rows"])
    shown = [n for n in (10, 15, 20, 30, 50, 60, 100, 200) if any(key[1:] == ("accuracy", n) for key in rows)]
    lines = []
    for name in dict.fromkeys(r["learner"] for r in result["rows"]):
        lines.append([
            name, row_points(rows[name, "cold_accuracy", 0], 1),
            *(row_points(rows[name, "accuracy", n], 1) for n in shown), row_points(rows[name, "area", most], 1),
            *(needed(rows[name, f"labels_to_{goal}", most], most) for goal in GOALS[1:]),
        ])  # fmt: skip
    header = ["learner", "0", *map(str, shown), "area", *[f"to {goal} %" for goal in GOALS[1:]]]
    return f"{caption(result, seeds_of(result))}\n\n{markdown(lines, header)}"


def benchmark(path: Path) -> str:
    """Speeds, ratios and differences of one benchmark: medians and quartiles."""
    result = read_results(path)
    lines = []
    for row in result["rows"]:
        against = f"{row['name']} : {row['compared_with']}" if row["metric"] == "ratio" else row["name"]
        if row["metric"] in ("ratio", "largest_difference") or row["metric"].endswith("_per_second"):
            lines.append([against, row["metric"].replace("_", " "), f"{row['mean']:.4g}",
                          f"{row['low']:.4g} to {row['high']:.4g}"])  # fmt: skip
    text = markdown(lines, ["what", "figure", "median", "quartiles"])
    return f"`{result['command']}` ({result['device']})\n\n{text}"


def few_shot(paths: Sequence[Path]) -> str:
    """Few-shot accuracies: one line a run, the paper's figure beside ours."""
    lines = []
    for path in paths:
        result = read_results(path)
        rows = {row["metric"]: row for row in result["rows"]}
        row = result["rows"][0]
        lines.append([
            row["learner"], row["target"], f"{row['ways']}-way {row['shots']}-shot",
            row_points(rows.get("accuracy_transductive"), absent="–"),
            row_points(rows.get("accuracy_non_transductive"), absent="–"),
            str(row.get("published", "")), f"{result['seconds'] / 60:.0f}", f"`{result['command']}`",
        ])  # fmt: skip
    header = ["learner", "set", "tasks", "transductive", "non-transductive", "paper", "minutes", "command"]
    return markdown(lines, header)


class Strategies:
    """The comparison of strategies, read from the folder of its results."""

    def __init__(self, folder: Path):
        self.summary = read_results(folder / "summary.json")
        # By embedding and condition.
        self.places = {
            (path.stem.partition("-")[0], path.stem.partition("-")[2]): {
                (r["strategy"], r["batch"], r["metric"], r["labels"]): r for r in read_results(path)["rows"]
            }
            for path in sorted(folder.glob("*-*.json"))
        }

    def caption(self) -> str:
        """The command behind it."""
        return caption(self.summary, seeds_of(self.summary))

    def areas(self, batch: int, labels: int, names: Sequence[str] | None = None) -> str:
        """Area up to a number of labels, each strategy in each condition on each embedding; all of them, best first."""
        if names is None:
            held = {name: None for rows in self.places.values() for name, b, m, n in rows
                    if (b, m, n) == (batch, "area", labels)}  # fmt: skip
            total = {name: sum(rows[name, batch, "area", labels]["mean"] for rows in self.places.values())
                     for name in held}  # fmt: skip
            names = sorted(total, key=lambda name: -total[name])
        lines = [[name, *(row_points(rows.get((name, batch, "area", labels)), 1) for rows in self.places.values())]
                 for name in names]  # fmt: skip
        return markdown([line for line in lines if any(line[1:])], ["strategy", *[f"{e}, {c}" for e, c in self.places]])

    def settings(self) -> list[tuple[int, int]]:
        """The batch sizes, and the numbers of labels of their areas."""
        return sorted({(b, n) for rows in self.places.values() for _, b, metric, n in rows if metric == "area"})

    def ranks(self, most: int | None = None) -> str:
        """Mean ranks, best first by the rank on the meta-learned embedding at the larger number of labels."""
        ranks = {(r["strategy"], r["learner"], r["labels"]): r
                 for r in self.summary["rows"] if r["metric"] == "mean_rank"}  # fmt: skip
        columns = sorted({(e, n) for _, e, n in ranks}, key=lambda c: (c[1], c[0]))
        largest = ("meta", max(n for _, n in columns))
        first = largest if largest in columns else columns[-1]

        def place(name: str) -> list[float]:
            # Those that stop at fewer labels come last, by their rank there.
            return [ranks[name, *c]["mean"] if (name, *c) in ranks else 1e3 for c in (first, columns[0])]

        names = sorted({name for name, _, _ in ranks}, key=lambda name: (*place(name), name))
        lines = [[name, *(row_rank(ranks.get((name, *column))) for column in columns)] for name in names]
        return markdown(lines[:most], ["strategy", *[f"{e}, up to {n}" for e, n in columns]])

    def adapted(self) -> str:
        """The best strategies with full adaptation."""
        rows = {(r["strategy"], r["metric"], r["labels"]): r for r in self.summary["rows"] if r["learner"] == "maml"}
        shown = sorted({n for _, metric, n in rows if metric == "accuracy"})
        most = max(n for _, metric, n in rows if metric == "area")
        lines = [[name, row_points(rows[name, "area", most], 1),
                  *(row_points(rows[name, "accuracy", n], 1) for n in shown)]
                 for name in dict.fromkeys(name for name, _, _ in rows)]  # fmt: skip
        return markdown(lines, ["strategy", "area", *map(str, shown)])


def row_rank(row: Record | None) -> str:
    """A mean rank with its interval."""
    return "" if row is None else f"{row['mean']:.1f} ± {(row['high'] - row['low']) / 2:.1f}"


def _bracketed(row: Record, name: str = "mean", sign: str = "") -> str:
    return f"{row[name]:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def sinusoids(path: Path) -> str:
    """Mean squared error on sinusoids after fine-tuning, by points and steps."""
    result = read_results(path)
    rows = {(r["labels"], r["steps"], r["learner"]): r for r in result["rows"]}
    names = list(dict.fromkeys(key[2] for key in rows))
    lines = [[*map(str, cell), *(_bracketed(rows[*cell, name]) for name in names)]
             for cell in dict.fromkeys(key[:2] for key in rows)]  # fmt: skip
    text = markdown(lines, ["points", "steps", *names])
    return f"{caption(result, str(result['rows'][0]['tasks']) + ' tasks')}\n\n{text}"


def active_regression(path: Path) -> str:
    """Area under the curve of the root mean squared error of every strategy, less random's."""
    result = read_results(path)
    paired = {(p["target"], p["a"]["strategy"]): p for p in result["paired"]}
    lines = []
    for row in (r for r in result["rows"] if r["metric"] == "rmse_area"):
        pair = paired.get((row["target"], row["strategy"]))
        more = ["", ""] if pair is None else [_bracketed(pair, "difference", "+"), f"{pair['p_holm']:.2g}"]
        lines.append([row["target"], row["strategy"], _bracketed(row), *more])
    text = markdown(lines, ["table", "strategy", "area of RMSE", "less random's", "p (Holm)"])
    return f"{caption(result, str(result['rows'][0]['seeds']) + ' seeds')}\n\n{text}"
