"""Run commands without the cost of their imports.

Each run is a fork of a process that has imported everything and started no backend.

python tests/support/forks.py OUT ERR: runs print to these files. A line of JSON requests one:
{"command": "train", "flags": […], "n_devices": N}, or {"digest": RUN} for one that prints the
digest of a run's state.
Answers with the run's process id, which leads its process group, and with its exit status.
"""

import hashlib
import json
import os
import signal
import sys

import datasets
import jax
import nano
import numpy as np
import orbax.checkpoint
import tensorboardX

import convert_imagenet
import generate
import train
from runtime import cli, processes

LOADED = nano, datasets, orbax.checkpoint, tensorboardX
COMMANDS = {
    "train": train.main,
    "convert_imagenet": convert_imagenet.main,
    "generate": lambda: generate.main(cli.parse_flags(generate.GenerateConfig)),
}


def digest(run_dir: str) -> str:
    """Hash all bits of the state that a run resumes with."""
    leaves = jax.tree.leaves(train.Trainer.from_run(run_dir).state)
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def execute(request: dict) -> None:
    """Become the requested run, and exit with its status."""
    os.setpgid(0, 0)
    # Ignored where the tests were begun in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in zip((1, 2), sys.argv[1:], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    n_devices = request.get("n_devices", 1)
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={n_devices}"
    if "digest" in request:
        cli.run_command(lambda: print(digest(request["digest"])))
    sys.argv[1:] = request["flags"]
    cli.run_command(COMMANDS[request["command"]], processes.exit_process)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            execute(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
