"""Query strategies: scorers by what they look at, and the lifts that make policies of them.

A scorer is a pure function `(key, view) -> [n]`, higher = query first. It may score rows that cannot be asked for;
the lifts leave those out.
"""

from metaal_jax.acquisition.batches import class_balanced, diverse, stochastic_top_k
from metaal_jax.acquisition.clustering import cluster_balanced, k_means, lloyd, typiclust
from metaal_jax.acquisition.combinators import (
    epsilon_mixture,
    per_cost,
    planned,
    product_of_ranks,
    subsampled,
    sum_of_ranks,
    switch_at,
    with_learner,
)
from metaal_jax.acquisition.coverage import k_medoids, max_herding, prob_cover, uncertain_herding
from metaal_jax.acquisition.density import density, density_weighted, discriminative
from metaal_jax.acquisition.disagreement import (
    bald,
    consensus_entropy,
    mean_kl,
    mean_std,
    variation_ratio,
    vote_entropy,
)
from metaal_jax.acquisition.diversity import k_center, typical
from metaal_jax.acquisition.gradient_embedding import badge
from metaal_jax.acquisition.influence import (
    expected_gradient_length,
    expected_model_change,
    glister,
    head_gradient_length,
    predicted_loss,
)
from metaal_jax.acquisition.information import batch_bald, epig
from metaal_jax.acquisition.lifts import (
    one_of,
    per_row,
    pick_in_turn,
    require_policy,
    require_scorer,
    select_top,
    top_k,
)
from metaal_jax.acquisition.pool import score_pool
from metaal_jax.acquisition.refit import expected_error_reduction, greedy_oracle
from metaal_jax.acquisition.regression import (
    committee_variance,
    expected_variance_reduction,
    greedy_input,
    greedy_output,
    igs,
)
from metaal_jax.acquisition.uncertainty import entropy, least_confident, margin, random, ratio, tempered
from metaal_jax.rows import predict_pool, row_noise

__all__ = [
    "badge",
    "bald",
    "batch_bald",
    "class_balanced",
    "cluster_balanced",
    "committee_variance",
    "consensus_entropy",
    "density",
    "density_weighted",
    "discriminative",
    "diverse",
    "entropy",
    "epig",
    "epsilon_mixture",
    "expected_error_reduction",
    "expected_gradient_length",
    "expected_model_change",
    "expected_variance_reduction",
    "glister",
    "greedy_input",
    "greedy_oracle",
    "greedy_output",
    "head_gradient_length",
    "igs",
    "k_center",
    "k_means",
    "k_medoids",
    "least_confident",
    "lloyd",
    "margin",
    "max_herding",
    "mean_kl",
    "mean_std",
    "one_of",
    "per_cost",
    "per_row",
    "pick_in_turn",
    "planned",
    "predict_pool",
    "predicted_loss",
    "prob_cover",
    "product_of_ranks",
    "random",
    "ratio",
    "require_policy",
    "require_scorer",
    "row_noise",
    "score_pool",
    "select_top",
    "stochastic_top_k",
    "subsampled",
    "sum_of_ranks",
    "switch_at",
    "tempered",
    "top_k",
    "typical",
    "typiclust",
    "uncertain_herding",
    "variation_ratio",
    "vote_entropy",
    "with_learner",
]
