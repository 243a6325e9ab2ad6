"""The folder of a run: its name, its only writer and its `config.json`.

Nothing here knows checkpoints, metrics or models; other modules write them into the folder.
"""

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import TEMPORARY_NAME, atomic_file

RUNS = Path("runs")
CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"
TRAIN_COMMAND = "train.py"  # a config.json without "command" is of this one
MEASUREMENT_FOLDERS = ("profile", "lr_range_test")  # of measurements that need no run
PUBLISHED = "a published model is named by --pretrained, or by --init_from to start from"
REQUIRED_KEYS = ("dataset_name", "model", "model_config", "dataset")


def new_run_path(dataset_name: str, model: str, *, root: Path = RUNS) -> Path:
    """Name a new run, such as runs/cifar10-DiT-S-2-20261121-093000. Creates nothing."""
    dataset = Path(dataset_name.partition(":")[2] or dataset_name).name
    name = f"{dataset}-{model.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = (root / (name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in paths if not path.exists())


def split_reference(reference: str) -> tuple[Path, int | None]:
    """Split `RUN@STEP` into a run's folder and the step of a checkpoint; `RUN` has none."""
    if not Path(reference).is_dir() and (named := re.fullmatch(r"(.+)@(\d+)", reference)):
        return Path(named[1]), int(named[2])
    return Path(reference), None


def find_run(reference: str, flag: str) -> tuple[Path, int | None] | None:
    """Split the reference of a run, `RUN` or `RUN@STEP`, into its folder and the step of a
    checkpoint. None if it names something else, such as a published model.

    Args:
        flag: that the reference was given by, for the message of an error.

    Raises:
        UserError: there is nothing in this place.
    """
    folder, step = split_reference(str(Path(reference).expanduser()))
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        return folder, step
    if step is not None or (folder.is_absolute() and not folder.exists()):
        raise UserError(
            f"there is no such run or file; if it has moved, give its new place by {flag}"
        )
    return None


def absolute_reference(reference: str) -> str:
    """Make the path of a reference absolute, if it is one: of a run, `RUN@STEP`, or of a file, also
    with a prefix such as `dit:`.
    """
    place, step = split_reference(str(Path(reference).expanduser()))
    if place.exists():
        return f"{place.resolve()}{'' if step is None else f'@{step}'}"
    prefix, colon, file = reference.rpartition(":")
    if colon and Path(file).expanduser().exists():
        return f"{prefix}:{Path(file).expanduser().resolve()}"
    return reference


def with_step_of(reference: str, recorded: str) -> str:
    """Return a run's reference with the step of the recorded one, unless it names another. Other
    references are returned as they are.
    """
    _, step = split_reference(reference)
    _, recorded_step = split_reference(recorded)
    is_run = (Path(reference) / CHECKPOINTS_FOLDER).is_dir()
    if is_run and step is None and recorded_step is not None:
        return f"{reference}@{recorded_step}"
    return reference


def newest_run(
    dataset_name: str, model: str | None, *, command: str = TRAIN_COMMAND, root: Path = RUNS
) -> Path:
    """Find the run of this dataset (and model, if given) that was started or resumed last.

    Raises:
        UserError: there is no such run.
    """
    paths = root.glob(f"*/{CONFIG_FILE}")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(UserError):  # one damaged run must not hide the others
            config = read_config(path.parent, command=command)
            if config["dataset_name"] == dataset_name and model in (None, config["model"]):
                return path.parent
    with_model = f" with {model}" if model else ""
    raise UserError(f"nothing to resume: {root}/ holds no run of {dataset_name}{with_model}")


def require_unused(run_dir: Path) -> None:
    """Refuse a folder that is in use: a run is either new or resumed, never mixed.

    The folder may hold measurements that need no run (a profile, a range test) and temporary files
    of a process that was killed before it completed any.

    Raises:
        UserError: the folder is in use.
    """

    def is_allowed(path: Path) -> bool:
        return path.name in MEASUREMENT_FOLDERS or bool(TEMPORARY_NAME.fullmatch(path.name))

    if run_dir.exists() and not (run_dir.is_dir() and all(map(is_allowed, run_dir.iterdir()))):
        raise UserError(
            f"'{run_dir}' already exists; continue it with --resume, or pass another --run_dir"
        )


def create_run_folder(run_dir: Path) -> None:
    """Create the folder if it does not exist, and check that files can be created in it.

    Raises:
        UserError: they cannot.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder '{run_dir}': {error.strerror}") from None


@contextmanager
def exclusive_writer(run_dir: Path) -> Generator[None]:
    """Lock an existing folder as its only writer. The lock ends with the process at the latest.

    Raises:
        UserError: another process holds the lock.
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


def read_config(run_dir: Path, *, command: str = TRAIN_COMMAND) -> dict[str, Any]:
    """Read `config.json`: the flags that the run was started with, `model_config` and `dataset`.

    Raises:
        UserError: the folder is not a run, is a run of another command, or the file is damaged.
    """
    try:
        config = json.loads((run_dir / CONFIG_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        way_out = _suggest_run(run_dir)
        raise UserError(f"'{run_dir}' is not a run: it has no {CONFIG_FILE}{way_out}") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{run_dir / CONFIG_FILE} is damaged: {error}") from None
    known_keys = config if isinstance(config, dict) else {}
    if class_name := known_keys.get("_class_name"):
        raise UserError(f"'{run_dir}' is not a run, but {class_name} as published: {PUBLISHED}")
    missing = [key for key in REQUIRED_KEYS if key not in known_keys]
    if missing:
        raise UserError(f"{run_dir / CONFIG_FILE} is damaged: it lacks {', '.join(missing)}")
    run_command = config.get("command", TRAIN_COMMAND)
    if run_command != command:
        raise UserError(f"'{run_dir}' is a run of {run_command}, not of {command}")
    return config


def _suggest_run(path: Path) -> str:
    """Suggest what a path without config.json may be instead of a run; empty if unknown."""
    if path.is_file() or (path / "model_index.json").is_file():
        return f"; {PUBLISHED}"
    runs = [folder for folder in path.parents[:2] if (folder / CONFIG_FILE).is_file()]
    runs += sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))
    return f"; name the run's folder, such as '{runs[0]}'" if runs else ""


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write `config.json`; values that JSON does not know are written as their `str`."""
    with atomic_file(run_dir / CONFIG_FILE) as file:
        file.write(json.dumps(config, indent=2, default=str).encode() + b"\n")
