"""Runs `train.py` until its first step has finished, and prints when each part of that was done.

    python benchmarks/first_step.py --run_dir RUN

Takes the flags of `train.py`; the times are seconds since the epoch. `startup.py` starts it.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

import train


def main() -> None:
    at = {"imported": time.time()}
    honest_init, honest_step = train.Trainer.__init__, train.Trainer.train_step

    def init(self, *args, **named):
        honest_init(self, *args, **named)
        jax.block_until_ready(self.state)
        at["built"] = time.time()

    def first_step(self, *args, **named):
        at["opened"] = time.time()
        jax.block_until_ready(honest_step(self, *args, **named))
        at["stepped"] = time.time()
        jax.block_until_ready(honest_step(self, *args, **named))
        at["stepped_again"] = time.time()
        print("\n" + json.dumps(at), flush=True)
        os._exit(0)  # there is nothing to save

    train.Trainer.__init__, train.Trainer.train_step = init, first_step
    train.main()


if __name__ == "__main__":
    main()
