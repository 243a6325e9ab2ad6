"""Run `train.py` until its first step has finished, and print when each stage was done.

    python benchmarks/first_step.py --run_dir RUN

Takes the flags of `train.py`. Times are in seconds since the epoch. `startup.py` starts it.
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
    end_times = {"imported": time.time()}
    original_init = train.Trainer.__init__
    original_step = train.Trainer.train_step

    def init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        jax.block_until_ready(self.state)
        end_times["built"] = time.time()

    def first_step(self, *args, **kwargs):
        end_times["opened"] = time.time()
        jax.block_until_ready(original_step(self, *args, **kwargs))
        end_times["stepped"] = time.time()
        jax.block_until_ready(original_step(self, *args, **kwargs))
        end_times["stepped_again"] = time.time()
        print("\n" + json.dumps(end_times), flush=True)
        os._exit(0)  # there is nothing to save

    train.Trainer.__init__ = init
    train.Trainer.train_step = first_step
    train.main()


if __name__ == "__main__":
    main()
