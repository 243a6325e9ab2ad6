"""Print the hash of all bits of the state that a run resumes with: digest.py RUN."""

import hashlib
import sys

import jax
import nano  # noqa: F401  (its sizes)
import numpy as np

from runtime import cli
from train import Trainer


def main() -> None:
    leaves = jax.tree.leaves(Trainer.from_run(sys.argv[1]).state)
    print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest())


if __name__ == "__main__":
    cli.run_command(main)
