"""Start commands without the cost of their imports: forks of a process that has imported what
they import and has started no backend.

    python tests/support/forks.py FD

FD is a socket. A line of JSON, {"words": ["train.py", …], "XLA_FLAGS": …, "leads_group": …}, asks
for a command, and comes with three files: the command's stdout and stderr, and a pipe that its
process id is written to and, at its end, its exit status as `subprocess` gives it.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import datasets
import flax
import jax
import optax
import orbax.checkpoint
import PIL.Image
import tensorboardX

LOADED = datasets, flax, jax, optax, orbax.checkpoint, PIL.Image, tensorboardX
COMMANDS = ("convert_imagenet", "evaluate", "export", "generate", "train")


def load_commands() -> None:
    """Import what the commands import: each of them is its own `__main__`."""
    sys.path[0] = str(Path(__file__).parents[2])
    for name in COMMANDS:
        importlib.import_module(name)
        del sys.modules[name]


def fork() -> int:
    """Fork, without JAX's warning that threads and forks do not go together: there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def serve(connection: socket.socket) -> list[str]:
    """Start what is asked for. Returns in each fork, with the words of the command that it is."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of who waits for a command: `wait_for`
    while True:
        message, files, *_ = socket.recv_fds(connection, 2**16, 3)
        while message and not message.endswith(b"\n"):
            message += connection.recv(2**16)
        if not message:
            sys.exit()
        if not fork():
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.close()
    request = json.loads(message)
    if child := fork():
        wait_for(child, request["leads_group"], *files)
    for stream, file in zip((1, 2), files, strict=False):
        os.dup2(file, stream)
    for file in files:
        os.close(file)
    # Ignored where the tests were begun in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XLA_FLAGS"] = request["XLA_FLAGS"]
    return request["words"]


def wait_for(command: int, leads_group: bool, out: int, err: int, report: int) -> NoReturn:
    """Report a command's process id and, at its end, its exit status."""
    for stream in (1, 2, out, err):  # whoever reads them waits for their end
        os.close(stream)
    if leads_group:
        os.setpgid(command, command)
    os.write(report, b"%d\n" % command)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
    os._exit(0)


def become(words: list[str]) -> None:
    """Do what `python WORDS` does."""
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).parent.absolute())
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = words[0]
    exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


if __name__ == "__main__":
    load_commands()
    gc.freeze()  # so that no fork's collector touches, and thereby copies, what all share
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
