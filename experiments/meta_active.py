"""The main job: meta-train on a source, then learn actively on a new target, against training from scratch.

Claim: after meta-training on tasks made of CIFAR-10 images, the same network needs a fraction of the labels on MNIST
that it needs from scratch, whichever query strategy is used.

    python experiments/meta_active.py                                   # digits to digits, other classes
    python experiments/meta_active.py --source cifar10 --target mnist
    python experiments/meta_active.py --source omniglot --target mnist

`metaal study` is the same without a clone. Figures and times: experiments/results/meta_active/ and the table in the
README.
"""

from metaal_jax.studies.main_job import Config, job
from metaal_jax.studies.options import parse
from metaal_jax.studies.usage import main

if __name__ == "__main__":
    main(lambda: job(parse(Config)))
