"""A run is a folder: its name, who may write to it, and its `config.json`.

Nothing here knows of checkpoints, metrics or models; they are written into the folder by others.
"""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import TEMPORARY, atomic

RUNS = Path("runs")
CONFIG = "config.json"
TRAIN = "train.py"  # whose runs do not say in their config.json which command they are of
NO_RUN = ("profile", "lr_range_test")  # folders of what is measured without one
NEEDED = ("dataset_name", "model", "model_config", "dataset")


def new(dataset_name: str, model: str, *, root: Path = RUNS) -> Path:
    """A name for a new run, such as runs/cifar10-DiT-S-2-20261121-093000. Creates nothing."""
    subject = Path(dataset_name.partition(":")[2] or dataset_name).name
    name = f"{subject}-{model.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = (root / (name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in paths if not path.exists())


def newest(
    dataset_name: str, model: str | None, *, command: str = TRAIN, root: Path = RUNS
) -> Path:
    """The run of this data set (and model, if named) that was last started or gone on with.

    Raises:
        UserError: there is none.
    """
    runs = sorted(root.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        with suppress(UserError):  # one damaged run must not hide the others
            config = read_config(path.parent, command=command)
            if config["dataset_name"] == dataset_name and model in (None, config["model"]):
                return path.parent
    of_model = f" with {model}" if model else ""
    raise UserError(f"nothing to resume: {root}/ holds no run of {dataset_name}{of_model}")


def require_new(run_dir: Path) -> None:
    """Raises UserError if the folder is in use: a run is new or resumed, never mixed.

    What needs no run (a profile, a range test) may lie there already, and what a process left that
    was killed before it wrote anything whole.
    """

    def is_nothing(path: Path) -> bool:
        return path.name in NO_RUN or bool(TEMPORARY.fullmatch(path.name))

    if run_dir.exists() and not (run_dir.is_dir() and all(map(is_nothing, run_dir.iterdir()))):
        raise UserError(
            f"'{run_dir}' already exists; go on with it by --resume, or name another --run_dir"
        )


def make(run_dir: Path) -> None:
    """Create the folder, if need be. Raises UserError where that cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass  # it can be written to
    except OSError as error:
        raise UserError(f"cannot write to the folder '{run_dir}': {error.strerror}") from None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The only writer of an existing folder. The lock ends with the process, however it ends.

    Raises:
        UserError: another process has it.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to '{run_dir}'") from None
        yield
    finally:
        os.close(descriptor)


def read_config(run_dir: Path, *, command: str = TRAIN) -> dict[str, Any]:
    """The settings a run was started with, its `model_config` and its `dataset`.

    Raises:
        UserError: the folder is not a run, or one of another command, or the file is damaged.
    """
    try:
        config = json.loads((run_dir / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{run_dir}' is not a run: it has no {CONFIG}") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{run_dir / CONFIG} is damaged: {error}") from None
    lacks = [name for name in NEEDED if not isinstance(config, dict) or name not in config]
    if lacks:
        raise UserError(f"{run_dir / CONFIG} is damaged: it lacks {', '.join(lacks)}")
    if (made_by := config.get("command", TRAIN)) != command:
        raise UserError(f"'{run_dir}' is a run of {made_by}, not of {command}")
    return config


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write a run's settings."""
    with atomic(run_dir / CONFIG) as file:
        file.write(json.dumps(config, indent=2, default=str).encode() + b"\n")
