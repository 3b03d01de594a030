"""The options that experiments share, in groups: small dataclasses that stand in an experiment's config.

A group's fields are options of their own (`--meta-rate`, not `--training.meta-rate`), and lie flat in the run folder's
`config.json`; see `options`. An experiment gives other defaults by giving another group:

    sizes: Sizes = Sizes(budget=300)
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from metaal_jax.studies.folder import RunFolder
from metaal_jax.studies.options import above, at_least


@dataclass(frozen=True)
class Run:
    """The run, and where it is kept."""

    seed: int = 0
    """Decides everything that is drawn."""
    data_dir: str | None = None
    """Where TFDS sets are prepared; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: str | None = None
    """Run folder; by default one under runs/, named after what is run."""
    resume: bool = False
    """Go on with the run in the folder."""


@dataclass(frozen=True)
class Transfer:
    """From what is learned, to what."""

    source: str = "digits"
    """Data set for meta-training: digits, a TFDS image-classification set by name, or a .npz file with x and y."""
    target: str = "digits"
    """Data set for active learning. If it is the source, its classes are split: first half source, rest target."""
    meta_run: str | None = None
    """Run folder of an earlier run of the main job for this source and target, whose meta-learned networks are used.
    None trains them here."""


@dataclass(frozen=True)
class Sizes:
    """Active learning in numbers."""

    budget: int = 100
    """Labels bought in all, the first batch included."""
    batch_size: int = 10
    """Labels bought in one round."""
    initial: Literal["strategy", "random", "typical"] = "strategy"
    """First batch. strategy: random rows for random, typical rows (by the learner's own embedding) for all rules that
    need a model; random or typical: the same kind for every strategy."""
    seeds: int = 16
    """Runs of every arm; run i draws the same problem in all arms."""
    seeds_at_once: int = 4
    """How many of them are vmapped in one call of the compiled program."""
    pool: int | None = None
    """Pool rows; by default 5000, or 60 percent of a smaller training split."""
    test: int = 2000
    """Test rows judged after every round; at the end all rows of the test split are. Fewer where the set has fewer."""
    members: Annotated[int, at_least(2)] = 4
    """Committee members."""
    chunk: int = 100
    """Rows predicted at a time. Few stay in a CPU's cache (twice as fast as 1000); a GPU wants many."""


@dataclass(frozen=True)
class MetaTraining:
    """Meta-training on the source."""

    tasks: Literal["auto", "classes", "shapes", "both"] = "auto"
    """Tasks of the source. classes: its classes, and their rotations as further classes. shapes: level sets of
    distorted crops of single images, without labels. both: half of the tasks each. auto: shapes for natural images (32
    pixels, colour), both for omniglot, else classes."""
    shape_classes: int = 16000
    """Classes drawn for shapes."""
    ways: int | None = None
    """Classes of a meta-training task; by default 20, or fewer where the source has fewer."""
    meta_steps: int | None = None
    """Outer steps; by default 2000 below 16 pixels, else 15000."""
    meta_tasks: int = 1
    """Tasks of one outer step."""
    meta_labels: int = 80
    """Largest support set of a meta-training task; the smallest is a label a class."""
    meta_queries: int = 6
    """Query rows of each class."""
    meta_rate: float = 3e-3
    """Outer learning rate (Adam), falling to zero along a cosine."""
    inner_steps: Annotated[int, at_least(0)] = 1
    """Inner steps of MAML in meta-training."""
    inner_rate: float = 0.01
    """Inner learning rate (SGD) in meta-training."""
    first_order: bool = False
    """First-order MAML."""


@dataclass(frozen=True)
class Network:
    """The network that all learners but the linear ones have."""

    filters: int = 32
    """Channels of the network's blocks."""
    blocks: int | None = None
    """Blocks of the network; by default 4, or 2 below 16 pixels."""
    norm: Literal["none", "group", "batch"] = "none"
    """Norm layers of the network."""


@dataclass(frozen=True)
class Adaptation:
    """How a meta-learned network adapts to labels."""

    adapt_steps: Annotated[int, at_least(0)] = 20
    """Inner steps of the meta-learned network on the target (Adam, from the prototype head)."""
    adapt_rate: float = 1e-2
    """Their learning rate for the last layer."""
    adapt_body_rate: float = 3e-4
    """Their learning rate for the other layers."""
    temperature: Annotated[float, above(0)] = 1.0
    """Factor on the prototype head's logits."""
    own_steps: Annotated[int, at_least(0)] = 5
    """Inner steps of meta_sgd, in meta-training and on the target."""
    own_rate: float = 0.1
    """Inner learning rate (SGD) that meta_sgd starts from, and that of implicit_maml."""
    implicit_steps: Annotated[int, at_least(0)] = 10
    """Inner steps of implicit_maml."""
    proximal: float = 1.0
    """Strength of its pull to the initialisation."""
    reptile_steps: Annotated[int, at_least(0)] = 8
    """Inner steps of Reptile in meta-training (SGD, 10 rows each)."""
    reptile_adapt_steps: Annotated[int, at_least(0)] = 40
    """Its inner steps on the target (all labels)."""
    reptile_rate: float = 0.1
    """Its inner learning rate."""
    pool_rows: int | None = 500
    """Pool rows that +pseudo and +propagation learn from; None for all of them."""


@dataclass(frozen=True)
class Baselines:
    """Learners without meta-training."""

    scratch_steps: Annotated[int, at_least(0)] = 60
    """Steps from scratch (AdamW, all labels in every step)."""
    scratch_rate: float = 1e-3
    """Their learning rate."""
    scratch_decay: float = 3.0
    """Their weight decay."""
    frozen_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of logistic regression on the frozen, standardised embedding."""
    logistic_ridge: Annotated[float, above(0)] = 1.0
    """Ridge penalty of logistic regression on pixels from 0 to 1."""
    solver_steps: int = 64
    """Steps of the solver of both."""


@dataclass(frozen=True)
class Learning:
    """How all learners learn."""

    network: Network = Network()
    adaptation: Adaptation = Adaptation()
    baselines: Baselines = Baselines()


FREE = frozenset({"data_dir", "out", "resume", "save_results"})


def open_folder(config: Any, run: Run, otherwise: str, *, free: frozenset[str] = FREE) -> RunFolder:
    """The folder of a run: a new one, or one of the same config to go on with.

    Args:
      config: the experiment's, with `run` among its groups.
      run: where the run is kept.
      otherwise: the folder where `--out` is not given.
      free: names of options that do not decide the results.

    Raises:
      UsageError: see `RunFolder`.
    """
    return RunFolder(run.out or otherwise, config, resume=run.resume, free=free)
