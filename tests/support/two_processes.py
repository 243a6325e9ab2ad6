"""Run one of two processes that train together as parallel_cases.py does.

python tests/support/two_processes.py PORT INDEX FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

if __name__ == "__main__":
    port, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    jax.devices()  # before conftest asks for eight in one process

    import numpy as np
    from parallel_cases import CONFIGS, steps

    from runtime import parallel

    for name, config in CONFIGS.items():
        reports = steps(config, parallel.make_mesh(4))["reports"]
        if index == 0:
            np.savez(folder / f"{name}.npz", **reports)
