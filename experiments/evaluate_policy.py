"""Trained policies on a new task, beside every rule, a bandit over rules and the greedy oracle.

Claim: a policy trained on problems made from CIFAR-10 alone has, in batches of ten, a larger area under the learning
curve on MNIST than every rule of the list, which was fixed before (the oracle, which sees labels, is no rule but a
bound). Its lead on the best rule is small, +0.2 points: to see it takes some hundred problems. With single rows it is
ahead in the mean, and cannot be told apart from the best rule.

    python experiments/evaluate_policy.py --meta-run runs/cifar10-mnist --batches 1,10
    python experiments/evaluate_policy.py --policies runs/policies/cifar10-evolution/policy.json --strategies margin

Cells, problems and learner are those of `strategies.py`: logistic regression on the main job's meta-learned embedding,
all strategies on the same problems from a cold start; the oracle chooses by rows of its own. What the policy looks at
is measured by runs in which it sees one feature in a random order. A run can grow: with `--resume` other policies,
rules and batches are added to it, and a policy that changed is run again.

Expected: see experiments/results/policies/ and the README.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

import strategies
from metaal_jax import policies
from metaal_jax.metrics import interval, labels_to_reach
from metaal_jax.names import ADAPTIVE, LEARNED, STRATEGIES
from metaal_jax.policies import features
from metaal_jax.studies.files import write
from metaal_jax.studies.folder import RunFolder, read_object
from metaal_jax.studies.options import RESULT_FILE, check_options, numbers_of, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.statistics import finite, holm, numbers, paired_p, shown
from metaal_jax.studies.usage import UsageError, arguments, command, main, names
from strategy_report import Cell, Table, share_picture, win_picture, wins

# What a run was of may grow and shrink: a cell depends on its own strategy alone.
FREE = frozenset(
    {"out", "resume", "data_dir", "save_results", "policies", "strategies", "without", "importance", "batches"}
)
EMBEDDING, CONDITION = "meta", "plain"
BOUNDS = ("random", "oracle")


@dataclass(frozen=True)
class Config:
    """Compares trained policies with rules on a new task."""

    policies: str = "cifar10"
    """Comma-separated: names of policies that come with the package, or paths of saved ones."""
    strategies: str = "all"
    """Comma-separated rules beside them, or all."""
    without: str = ""
    """Comma-separated rules to leave out of all of them, such as those that cost much with single rows."""
    importance: bool = True
    """Also run the first policy with each feature in a random order."""
    batches: str = "10"
    """Comma-separated batch sizes."""
    budget: int = 100
    """Labels bought in all."""
    pool: int = 5000
    """Pool rows."""
    test: int = 5000
    """Test rows."""
    held_out: int = 300
    """Rows beside the pool that the oracle chooses by."""
    seeds: int = 32
    """Seeds; seed i draws the same problem for all."""
    source: str = "cifar10"
    """Data set that the network was meta-trained on."""
    target: str = "mnist"
    """Data set of the new task."""
    meta_run: str = "runs/cifar10-mnist"
    """Run folder of the main job for this source and target, whose network embeds."""
    meta_seed: int = 0
    """Seed of that run."""
    seed: int = 100
    """Decides everything that is drawn; another one than that of `strategies.py`."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str = "runs/evaluate_policy"
    """Run folder."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file, and the picture beside it."""


def trained_names(text: str) -> list[str]:
    """Comma-separated policies, as strategies are named."""
    trained = [LEARNED + part.strip() for part in text.split(",") if part.strip()]
    if not trained:
        raise UsageError("--policies is empty; give names or paths")
    return trained


def cells_of(config: Config) -> tuple[strategies.Config, list[str], list[str]]:
    """The comparison as one of `strategies.py`; the policies' names there, and those with a scrambled feature."""
    check_options(config)
    trained = trained_names(config.policies)
    scrambled = [f"{trained[0]}~{feature}" for feature in features.ROWS] if config.importance else []
    rules = [*STRATEGIES, *ADAPTIVE]
    if config.strategies != "all":
        rules = [part.strip() for part in config.strategies.split(",")]
    left_out = names(config.without, rules, "rule to leave out") if config.without else ()
    rules = [name for name in rules if name not in left_out]
    batches = numbers_of("--batches", config.batches, of=int, like="1,10")
    if not set(rules) - set(BOUNDS[1:]) - set(trained):
        raise UsageError(f"--strategies {config.strategies!r} must hold a rule to compare with, such as max_herding")
    several = [k for k in batches if k != 1]
    # Features are scrambled in the larger batches, which cost less.
    single = dict.fromkeys([*trained, *(scrambled if not several else ()), *rules])
    chosen = ",".join(dict.fromkeys([*trained, *scrambled, *rules]))
    cells = strategies.Config(
        strategies=chosen, conditions=CONDITION, embeddings=EMBEDDING, batches=",".join(map(str, several)) or "none",
        one_by_one=",".join(single) if 1 in batches else "none",
        budget=config.budget, costly_budget=config.budget, pool=config.pool, test=config.test,
        held_out=config.held_out, seeds=config.seeds, source=config.source, target=config.target,
        meta_run=config.meta_run, seed=config.seed, best=0, data_dir=config.data_dir,
    )  # fmt: skip
    return cells, trained, scrambled


def job(config: Config) -> None:
    """The whole run."""
    inner, trained, scrambled = cells_of(config)
    plan = strategies.make_plan(inner)
    main_config = dataclasses.replace(strategies.main_config(inner), seed=config.meta_seed)
    setting = Setting(main_config)
    have = setting.problem_data.pool.y.shape[0], setting.problem_data.test.y.shape[0]
    for name, wanted, rows in (("pool", config.pool + config.held_out, have[0]), ("test", config.test, have[1])):
        if wanted > rows:
            raise UsageError(f"{wanted} rows wanted for --{name}, {config.target!r} has {rows}")
    with arguments():
        for strategy, k, budget in plan.programs:
            strategies.make_run(inner, setting.classes, strategy, k, budget)
    folder = RunFolder(config.out, config, resume=config.resume, free=FREE)
    work = plan.work(setting.classes)
    forget_changed(folder, trained, [cell for one in work for cell in one.cells])
    meta = strategies.main_network(dataclasses.replace(inner, seed=config.meta_seed), setting, folder)
    problems = strategies.make_problems(inner, setting, meta, plan.places)
    table = Table(strategies.run_cells(inner, work, problems, folder))
    rows, paired, text = compare(config, table, trained, scrambled)
    (folder.path / "table.txt").write_text(text + "\n")
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=dataclasses.asdict(config), rows=rows, paired=paired)  # fmt: skip
        picture(config, table, trained, scrambled, place.with_suffix(".png"))
        for name in trained:
            panels = {f"batches of {cell.batch}": (table.labels[cell], table.values[cell]["shares"].mean(0))
                      for cell in table.labels if cell.strategy == name and "shares" in table.values[cell]}  # fmt: skip
            if panels:
                share_picture(panels, rules_followed(name), place.with_name(f"{place.stem}-{plain(name)}-rules.png"))
    for k in sorted({cell.batch for cell in table.labels}):
        some = [c for c in table.labels if c.batch == k and c.strategy not in scrambled]
        held, won = wins(part_of(table, some), config.budget, (EMBEDDING, CONDITION, k))
        win_picture([short(name) for name in held], won.astype(int), 1, folder.path / f"wins_{k}.png",
                    f"wins by area in batches of {k}, 5 % after Holm's correction")  # fmt: skip
    print(text)
    print(f"\nrun folder: {folder.path}")


def forget_changed(folder: RunFolder, trained: list[str], cells: list[Cell]) -> None:
    """Forgets the cells of policies that are not what they were when these ran; those of rules stay."""
    file = folder.path / "policies.json"
    held = read_object(file, "its policies are then taken to be what they were") if file.exists() else {}
    for name in trained:
        saved = policies.load(name.removeprefix(LEARNED))
        leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(saved.params))
        mark = hashlib.sha256(repr((saved.network, saved.rules, saved.plan)).encode() + leaves).hexdigest()
        if held.get(name, mark) != mark:
            for cell in cells:
                if cell.strategy.rpartition("~")[0] == name or cell.strategy == name:
                    folder.forget(cell.step())
        held[name] = mark
    write(file, json.dumps(held, indent=1) + "\n")


def short(name: str) -> str:
    """A strategy's name for pictures: of a policy's path the folder's name."""
    path = Path(name.removeprefix(LEARNED))
    return f"{LEARNED}{path.parent.name}" if name.startswith(LEARNED) and path.suffix else name


def rules_followed(name: str) -> tuple[str, ...]:
    """The rules that a trained selector follows, in its order."""
    return policies.load(name.removeprefix(LEARNED)).rules


def plain(name: str) -> str:
    """A trained policy's name for files."""
    return short(name).removeprefix(LEARNED)


def part_of(table: Table, cells: list[Cell]) -> Table:
    """The table of some of the cells."""
    part = Table({})
    part.labels = {cell: table.labels[cell] for cell in cells}
    part.values = {cell: table.values[cell] for cell in cells}
    return part


def compare(
    config: Config, table: Table, trained: list[str], scrambled: list[str]
) -> tuple[list[dict], list[dict], str]:
    """Areas, shares of the oracle's gain, labels to targets and paired differences to every rule."""
    from tabulate import tabulate

    rows: list[dict] = []
    paired: list[dict] = []
    parts = []
    for k in sorted({cell.batch for cell in table.labels}):
        cell = lambda name, k=k: Cell(EMBEDDING, CONDITION, k, name)  # noqa: E731
        names = [c.strategy for c in table.labels if c.batch == k and c.strategy not in scrambled]
        area = {name: table.area(cell(name), config.budget) for name in names}
        where = {"source": config.source, "target": config.target, "batch": k}

        def add(name: str, metric: str, labels: int, values: np.ndarray, where: dict = where) -> None:
            rows.append({"strategy": name, **where, "metric": metric, "labels": labels, **numbers(values)})

        rules = [name for name in names if name not in trained and name != "oracle"]
        corrected = holm({name: paired_p(area[trained[0]] - area[name]) for name in rules})
        corrected = {name: float(f"{p:.3g}") for name, p in corrected.items()}
        lines = []
        for name in sorted(names, key=lambda name: -area[name].mean()):
            add(name, "area", config.budget, area[name])
            accuracy, labels = table.values[cell(name)]["accuracy"], table.labels[cell(name)]
            for i, n in enumerate(labels):
                if n % max(config.budget // 10, 1) == 0:
                    add(name, "accuracy", int(n), accuracy[:, i])
            if "shares" in table.values[cell(name)]:
                for n, shares in zip(labels, table.values[cell(name)]["shares"].mean(0), strict=True):
                    if n % max(config.budget // 10, 1) == 0:
                        rows.extend({"strategy": name, **where, "metric": "share_of_rule", "rule": rule,
                                     "labels": int(n), "mean": round(float(share), 4)}
                                    for rule, share in zip(rules_followed(name), shares, strict=True))  # fmt: skip
            needed = {}
            for goal in (0.8, 0.9):
                needed[goal] = np.median(labels_to_reach(labels, accuracy, goal))
                rows.append({"strategy": name, **where, "metric": f"labels_to_{round(100 * goal)}",
                             "labels": config.budget,
                             "median": finite(needed[goal])})  # fmt: skip
            share = ""
            if all(bound in area for bound in BOUNDS):
                most = (area["oracle"] - area["random"]).mean()
                gain = (area[name] - area["random"]).mean() / most if most else np.nan  # nothing to gain has no shares
                rows.append({"strategy": name, **where, "metric": "share_of_oracle", "labels": config.budget,
                             "mean": finite(round(float(gain), 4))})  # fmt: skip
                share = f"{gain:.2f}" if most else ""
            against = ""
            if name not in trained:
                both = area[trained[0]] - area[name]
                paired.append({"a": {"strategy": trained[0]}, "b": {"strategy": name}, **where, "metric": "area",
                               "labels": config.budget, **numbers(both, "difference"),
                               **({"p_holm": corrected[name]} if name in corrected else {})})  # fmt: skip
                against = shown(both)
            low = interval(100 * area[name])
            goals = [f"{n:.0f}" if np.isfinite(n) else f"> {config.budget}" for n in needed.values()]
            lines.append([name, f"{low.mean:.2f} ± {low.high - low.mean:.2f}", share, *goals, against])
        header = ["strategy", "area", "share of the oracle's gain", "to 80 %", "to 90 %", f"{trained[0]} less this"]
        title = f"{config.target}, batches of {k}, up to {config.budget} labels, {config.seeds} seeds"
        text = tabulate(lines, header, stralign="right", colalign=("left",), disable_numparse=True)
        parts.append(f"{title}\n\n{text}")
        held = [name for name in scrambled if cell(name) in table.labels]
        for name in held:
            rows.append({"strategy": trained[0], **where, "metric": "importance", "feature": name.rpartition("~")[2],
                         "labels": config.budget,
                         **numbers(area[trained[0]] - table.area(cell(name), config.budget))})  # fmt: skip
    return rows, paired, "\n\n".join(parts)


def picture(config: Config, table: Table, trained: list[str], scrambled: list[str], path: Path) -> None:
    """Differences to the best rule along the curve, and what each feature is worth to the policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({cell.batch for cell in table.labels})
    panels = len(sizes) + bool(scrambled)
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.0), squeeze=False)
    for axis, k in zip(axes[0], sizes, strict=False):
        cell = lambda name, k=k: Cell(EMBEDDING, CONDITION, k, name)  # noqa: E731
        names = [c.strategy for c in table.labels if c.batch == k and c.strategy not in scrambled]
        rules = sorted((n for n in names if n not in trained and n != "oracle"),
                       key=lambda n: -table.area(cell(n), config.budget).mean())  # fmt: skip
        base = table.values[cell(rules[0])]["accuracy"]
        near = [name for name in rules[1:4] if name != "random"]  # so far below that it hides the rest
        for name in [*trained, *near, *(n for n in ("oracle",) if n in names)]:
            found = [interval(column) for column in 100 * (table.values[cell(name)]["accuracy"] - base).T]
            axis.plot(table.labels[cell(name)], [f.mean for f in found], label=short(name))
            axis.fill_between(table.labels[cell(name)], [f.low for f in found], [f.high for f in found], alpha=0.12,
                              linewidth=0)  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"batches of {k}", fontsize=10)
        axis.set_xlabel("labels bought")
        axis.set_ylabel(f"accuracy less that of {rules[0]}, points")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    if scrambled:
        axis, k = axes[0][-1], sizes[-1]
        base = table.area(Cell(EMBEDDING, CONDITION, k, trained[0]), config.budget)
        found = {name.rpartition("~")[2]: interval(100 * (base - table.area(Cell(EMBEDDING, CONDITION, k, name),
                 config.budget))) for name in scrambled}  # fmt: skip
        order = sorted(found, key=lambda name: found[name].mean)
        middle = [found[name].mean for name in order]
        error = [[found[n].mean - found[n].low for n in order], [found[n].high - found[n].mean for n in order]]
        axis.barh(range(len(order)), middle, xerr=error)
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_xlabel("area lost without the feature, points")
        axis.set_title(f"what {short(trained[0])} looks at", fontsize=10)
    figure.suptitle(f"{config.source} to {config.target}, {config.seeds} seeds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
