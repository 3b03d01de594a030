"""Trained policies on targets of many kinds: letters, photographs, digits and tables.

Claim: a policy trained on problems made from CIFAR-10 alone has a better mean rank than every single rule over ten
targets that it has never seen, of 2 to 47 classes, and is on none of them worse than random.

    python experiments/many_targets.py --meta-run runs/cifar10-mnist
    python experiments/many_targets.py --targets iris,wine --strategies random,margin,max_herding

A target is a set, or with `SET:LABEL=NUMBER` the classes of one group of it: one alphabet of Omniglot, one superclass
of CIFAR-100. Images go through the main job's meta-learned network, whatever it was meta-trained on; tables are taken
as their columns, standardised over all rows. Every seed draws a pool and test rows anew; logistic regression learns
from a cold start, as in `strategies.py`, and all strategies get the same problems. "all" leaves out the oracle, for
which small sets have no rows, and three rules whose cost grows with the square of the number of classes (hours at 47
classes; they are in the last third of `strategies.py`'s ranking).

Expected: a mean rank of 7.6 of 38 (max_herding 8.7, k_medoids 9.6, random 21.1); significantly above random on nine of
the ten. All figures: experiments/results/policies/ and the README. 26 minutes on two cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import strategies
from evaluate_policy import FREE, forget_changed, plain, rules_followed, short, trained_names
from metaal_jax import data, tasks
from metaal_jax.base import Problem
from metaal_jax.data.local import SPLITS
from metaal_jax.metrics import interval
from metaal_jax.names import STRATEGIES
from metaal_jax.studies.arms import make_embed, make_model, standardised, without_head
from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.options import RESULT_FILE, at_least, check_options, parse
from metaal_jax.studies.results import environment, write_results
from metaal_jax.studies.setting import Setting
from metaal_jax.studies.statistics import numbers, ranked, shown
from metaal_jax.studies.usage import UsageError, arguments, command, main, strategy_names
from strategy_report import TWINS, Cell, Table, share_picture

LEFT_OUT = ("oracle", "error_reduction", "error_reduction_01", "epig", *TWINS)


@dataclass(frozen=True)
class Config:
    """Compares trained policies with rules on many targets."""

    policies: str = "cifar10"
    """Comma-separated: names of policies that come with the package, or paths of saved ones."""
    strategies: str = "all"
    """Comma-separated rules beside them, or all: those that cost little for many classes."""
    targets: str = (
        "digits,wine,iris,breast_cancer,omniglot:alphabet=1,omniglot:alphabet=29,omniglot:alphabet=33,"
        "cifar100:coarse_label=4,cifar100:coarse_label=11,cifar100:coarse_label=18"
    )
    """Comma-separated sets, or groups of classes of a set."""
    seeds: Annotated[int, at_least(2)] = 32
    """Seeds; seed i draws the same problem of a target for all."""
    source: str = "cifar10"
    """Data set that the network was meta-trained on."""
    target: str = "mnist"
    """Data set that the main job was for: it decides the shape of images, and is not looked at."""
    meta_run: str = "runs/cifar10-mnist"
    """Run folder of the main job for this source and target, whose network embeds images."""
    meta_seed: int = 0
    """Seed of that run."""
    seed: int = 200
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str = "runs/many_targets"
    """Run folder."""
    resume: bool = False
    """Go on with the run in the folder."""
    save_results: Annotated[str | None, RESULT_FILE] = None
    """Also write the results to this JSON file, and the picture beside it."""


class Sizes(NamedTuple):
    """How large the problems of a target are, by its rows alone."""

    pool: int
    test: int
    budget: int
    batch: int


def sizes_of(rows: int) -> Sizes:
    """Two fifths for the test, at most 1,000; the rest is the pool, at most 2,000; ten rounds."""
    test = min(2 * rows // 5, 1000)
    pool = min(rows - test, 2000)
    budget = 100 if pool >= 400 else 50
    if budget > pool:
        raise UsageError(f"a target of {rows} rows is too small: {budget} labels are asked for; give another --targets")
    return Sizes(pool, test, budget, budget // 10)


def is_table(name: str, data_dir: str | None) -> bool:
    """Whether a target's rows are columns of a table, and no images."""
    base = name.partition(":")[0]
    may_be = base in data.TABLES or base.endswith(".npz")
    return may_be and len(data.load(base, "test", data_dir=data_dir).x.shape) == 2


def load_target(name: str, shape: tuple[int, ...] | None, data_dir: str | None) -> data.Arrays:
    """All rows of a target, of both splits, its classes numbered from 0; images of a shape, tables without one."""
    base, _, group = name.partition(":")
    label, _, number = group.partition("=")
    if group and not number.isdigit():
        raise UsageError(f"--targets: {name!r} must be SET or SET:LABEL=NUMBER, such as omniglot:alphabet=5")
    read = functools.partial(data.load, base, data_dir=data_dir)
    parts = []
    for split in SPLITS:
        arrays = read(split, image_shape=shape)
        keep = read(split, image_shape=shape, label=label).y == int(number) if group else np.ones(len(arrays.y), bool)
        parts.append((arrays.x[keep], arrays.y[keep]))
    x, y = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    if len(np.unique(y)) < 2:
        raise UsageError(f"--targets: {name!r} has {len(np.unique(y))} classes; give another NUMBER")
    classes, y = np.unique(y, return_inverse=True)
    return data.Arrays(x, y.astype(np.int32), len(classes))


def make_embedding(config: Config, setting: Any, meta: Any) -> Callable[[Any], Any]:
    """The main job's network without its last layer, `images -> [n, d]`."""
    model = make_model(setting.classes, setting.shape, strategies.main_config(config))
    body = without_head(model, meta, jnp.zeros((1, *setting.shape), setting.train_source.x.dtype))
    return jax.jit(functools.partial(make_embed(model, 100), body))


def make_problems(config: Config, embed: Callable[[Any], Any] | None, targets: dict[str, data.Arrays]) -> dict:
    """Every seed's problem of every target, embedded: leaves `[seeds, ...]`, by `(kind of embedding, target)`.

    `embed` is for images; tables need none.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), config.seeds)
    found = {}
    for name, arrays in tqdm(targets.items(), desc="embedding"):
        if embed is None or arrays.x.ndim == 2:
            z = (arrays.x - arrays.x.mean(0)) / np.maximum(arrays.x.std(0), 1e-6)
        else:
            z = np.concatenate([np.asarray(embed(arrays.x[i : i + 1000])) for i in range(0, len(arrays.x), 1000)])
        sizes = sizes_of(len(arrays.y))
        sampler = tasks.composed_problems(ways=arrays.classes, parts=1, pool=sizes.pool, test=sizes.test)
        rows = jax.device_put(tasks.class_data(z.astype(np.float32), arrays.y))

        @jax.jit
        @jax.vmap
        def draw(key: jax.Array, sampler: Any = sampler, rows: Any = rows) -> Problem:
            return standardised(lambda x: x, sampler(key, rows))[0]

        found["columns" if arrays.x.ndim == 2 else "meta", name] = draw(keys)
    return found


def job(config: Config) -> None:
    """The whole run."""
    check_options(config)
    trained = trained_names(config.policies)
    rules = [name for name in STRATEGIES if name not in LEFT_OUT]
    if config.strategies != "all":
        rules = list(strategy_names(config.strategies))
    if "oracle" in rules:
        raise UsageError(
            "--strategies: the oracle needs rows of its own, which these problems do not have; leave it out"
        )
    if "random" not in rules or len(rules) < 2:
        raise UsageError(f"--strategies {config.strategies!r} must hold random and a rule to compare with")
    chosen = [*strategy_names(",".join(trained)), *rules]
    inner = strategies.Config(seeds=config.seeds, source=config.source, target=config.target, meta_run=config.meta_run,
                              seed=config.seed, data_dir=config.data_dir)  # fmt: skip
    names = [part.strip() for part in config.targets.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--targets {config.targets!r} is empty or names one twice")
    tables = {name: is_table(name, config.data_dir) for name in names}
    trained_on = dataclasses.replace(inner, seed=config.meta_seed)
    # Where all targets are tables, neither the network's data nor the network are needed.
    setting = None if all(tables.values()) else Setting(strategies.main_config(trained_on))
    shape = setting.shape if setting else None
    targets = {name: load_target(name, None if tables[name] else shape, config.data_dir) for name in names}
    sizes = {name: sizes_of(len(arrays.y)) for name, arrays in targets.items()}
    with arguments():
        for name, arrays in targets.items():
            for strategy in chosen:
                strategies.make_run(inner, arrays.classes, strategy, sizes[name].batch, sizes[name].budget)
    folder = RunFolder(config.out, config, resume=config.resume, free=FREE)
    embed = setting and make_embedding(config, setting, strategies.main_network(trained_on, setting, folder))
    problems = make_problems(config, embed, targets)
    # Targets of one shape share a program.
    groups: dict[Any, list] = {}
    for place in problems:
        shape = (targets[place[1]].classes, sizes[place[1]], problems[place].x.shape)
        groups.setdefault(shape, []).append(place)
    work = [
        strategies.Work(classes, (strategy, size.batch, size.budget),
                        tuple(Cell(*place, size.batch, strategy) for place in places))
        for strategy in sorted(chosen, key=lambda name: name not in STRATEGIES or not STRATEGIES[name].costly)
        for (classes, size, _), places in groups.items()
    ]  # fmt: skip
    forget_changed(folder, trained, [cell for one in work for cell in one.cells])
    table = Table(strategies.run_cells(inner, work, problems, folder))
    area = {(cell.condition, cell.strategy): table.area(cell, int(table.labels[cell][-1])) for cell in table.labels}
    rows, paired, text = compare(config, area, names, trained, rules)
    rows += [{"target": name, "metric": "problem", "classes": targets[name].classes, **sizes[name]._asdict()}
             for name in names]  # fmt: skip
    followed = {name: {cell.condition: (table.labels[cell], table.values[cell]["shares"].mean(0))
                       for cell in table.labels if cell.strategy == name and "shares" in table.values[cell]}
                for name in trained}  # fmt: skip
    rows += [{"strategy": name, "source": config.source, "target": target, "metric": "share_of_rule", "rule": rule,
              "mean": round(float(share), 4)}
             for name, panels in followed.items() for target, (_, shares) in panels.items()
             for rule, share in zip(rules_followed(name), shares.mean(0), strict=True)]  # fmt: skip
    (folder.path / "table.txt").write_text(text + "\n")
    for place in (folder.path / "results.json", *([Path(config.save_results)] if config.save_results else [])):
        write_results(place, command=command(), environment=environment(), seconds=folder.seconds(),
                      config=dataclasses.asdict(config), rows=rows, paired=paired)  # fmt: skip
        picture(area, names, trained, rules, place.with_suffix(".png"))
        for name, panels in followed.items():
            if panels:
                share_picture(panels, rules_followed(name), place.with_name(f"{place.stem}-{plain(name)}-rules.png"))
    print(text)
    print(f"\nrun folder: {folder.path}")


def ranks_of(area: dict, names: list[str], compared: list[str]) -> dict[str, np.ndarray]:
    """Mean rank over the targets by area, 1 the best, for each seed."""
    values = np.asarray([[area[target, name] for name in compared] for target in names])
    return dict(zip(compared, ranked(values).mean(0), strict=True))


def over_targets(area: dict, names: list[str], strategy: str) -> np.ndarray:
    """Mean area over the targets, for each seed."""
    return np.mean([area[target, strategy] for target in names], axis=0)


def compare(
    config: Config, area: dict, names: list[str], trained: list[str], rules: list[str]
) -> tuple[list[dict], list[dict], str]:
    """Areas, mean ranks and paired differences on each target and over all of them.

    Each trained policy is ranked among the rules, without the others.
    """
    from tabulate import tabulate

    rows: list[dict] = []
    paired: list[dict] = []
    parts = []
    for strategy in (*trained, *rules):
        for target in names:
            rows.append({"strategy": strategy, "source": config.source, "target": target, "metric": "area",
                         **numbers(area[target, strategy])})  # fmt: skip
    for policy in trained:
        rank = ranks_of(area, names, [policy, *rules])
        order = sorted(rank, key=lambda name: rank[name].mean())
        lines = []
        for name in order:
            common = {"strategy": name, "ranked_with": policy, "source": config.source, "target": "all"}
            rows.append({**common, "metric": "mean_rank", **numbers(rank[name])})
            rows.append({**common, "metric": "area", **numbers(over_targets(area, names, name))})
            line = [name, f"{rank[name].mean():.1f}", f"{100 * over_targets(area, names, name).mean():.2f}", ""]
            if name != policy:
                by_target = {target: area[target, policy] - area[target, name] for target in names}
                by_target["all"] = over_targets(area, names, policy) - over_targets(area, names, name)
                both = {"a": {"strategy": policy}, "b": {"strategy": name}}
                paired += [{**both, "target": target, "metric": "area", **numbers(values, "difference")}
                           for target, values in by_target.items()]  # fmt: skip
                paired.append({**both, "target": "all", "metric": "mean_rank",
                               **numbers(rank[policy] - rank[name], "difference")})  # fmt: skip
                line[3] = shown(by_target["all"])
            lines.append([*line, *[f"{100 * area[target, name].mean():.1f}" for target in names]])
        header = ["strategy", "mean rank", "area", f"{short(policy)} less this", *names]
        title = f"{short(policy)} among {len(rules)} rules on {len(names)} targets, {config.seeds} seeds"
        parts.append(f"{title}\n\n" + tabulate(lines, header, stralign="right", colalign=("left",),
                                               disable_numparse=True))  # fmt: skip
        against = [[target, shown(area[target, policy] - area[target, "random"]), best,
                    shown(area[target, policy] - area[target, best])]
                   for target in names
                   for best in [max(rules, key=lambda name: area[target, name].mean())]]  # fmt: skip
        parts.append(tabulate(against, ["target", "less random", "best rule there", f"{short(policy)} less it"],
                              disable_numparse=True))  # fmt: skip
    return rows, paired, "\n\n".join(parts)


def picture(area: dict, names: list[str], trained: list[str], rules: list[str], path: Path) -> None:
    """Mean ranks of the best, and the first policy's differences to random and to the best rule overall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policy = trained[0]
    rank = {name: interval(values) for name, values in ranks_of(area, names, [policy, *rules]).items()}
    order = sorted(rank, key=lambda name: rank[name].mean)[:12][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.4))
    error = [[rank[n].mean - rank[n].low for n in order], [rank[n].high - rank[n].mean for n in order]]
    left.errorbar([rank[n].mean for n in order], range(len(order)), xerr=error, fmt="o", capsize=3)
    left.set_yticks(range(len(order)), [short(name) for name in order], fontsize=8)
    left.set_xlabel(f"mean rank of {len(rank)} over {len(names)} targets")
    overall = max(rules, key=lambda name: over_targets(area, names, name).mean())
    for shift, other in ((-0.15, "random"), (0.15, overall)):
        found = [interval(100 * (area[target, policy] - area[target, other])) for target in names]
        error = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
        right.errorbar([f.mean for f in found], np.arange(len(names)) + shift, xerr=error, fmt="o", capsize=3,
                       label=f"less {other}")  # fmt: skip
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_xlabel(f"area of {short(policy)}, points")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(lambda: job(parse(Config)))
