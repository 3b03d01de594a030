"""Samplers, `(key, data) -> Task | Problem`, that draw from arrays on the device; and what prepares those arrays."""

from metaal_jax.tasks.class_data import ClassData, class_data
from metaal_jax.tasks.class_sets import LabelledSet, LabelledSets, class_sets, labelled_sets
from metaal_jax.tasks.composed import composed_problems
from metaal_jax.tasks.few_shot import few_shot, growing, minibatches, mixture
from metaal_jax.tasks.problems import ProblemData, extend, problem, problems
from metaal_jax.tasks.shapes import shape_exemplars
from metaal_jax.tasks.sinusoids import sinusoids
from metaal_jax.tasks.splits import split, split_classes

__all__ = [
    "ClassData",
    "LabelledSet",
    "LabelledSets",
    "ProblemData",
    "class_data",
    "class_sets",
    "composed_problems",
    "extend",
    "few_shot",
    "growing",
    "labelled_sets",
    "minibatches",
    "mixture",
    "problem",
    "problems",
    "shape_exemplars",
    "sinusoids",
    "split",
    "split_classes",
]
