"""The main job: meta-train on a source, then learn actively on a new target, against training from scratch.

Claim: after meta-training on tasks made of CIFAR-10 images, the same network needs a fraction of the labels on MNIST
that it needs from scratch, whichever query strategy is used.

    python experiments/meta_active.py                                   # digits to digits, other classes
    python experiments/meta_active.py --source cifar10 --target mnist
    python experiments/meta_active.py --source omniglot --target mnist

Expected from CIFAR-10 to MNIST, over 16 seeds: with typical rows 87.1 % after 20 labels and 92.4 after 100, from
scratch 56.4 and 78.9; with random rows 67.4 and 90.5, from scratch 46.0 and 73.7. It takes 33 minutes on two CPU cores.
All figures: experiments/results/meta_active/ and the README. `metaal study` is the same without a clone.
"""

from metaal_jax.studies.main_job import Config, job
from metaal_jax.studies.options import parse
from metaal_jax.studies.usage import main

if __name__ == "__main__":
    main(lambda: job(parse(Config)))
