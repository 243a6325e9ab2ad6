"""Logging to Weights & Biases besides the run's folder: `--wandb_project NAME`.

The wandb package sends metrics from a process of its own, so training waits for no network. Its
environment variables work as usual; `WANDB_MODE=offline` keeps everything in `wandb/` of the run's
folder, for `wandb sync`. A failure never ends the run.
"""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError
from runtime.files import atomic_file

if TYPE_CHECKING:
    import PIL.Image

ID_FILE = "wandb_id"  # in the run's folder
TIMEOUT_SECONDS = 20  # for the network to answer, at the beginning and at the end


def require_installed() -> None:
    """Raises UserError if the package is missing."""
    spec = importlib.util.find_spec("wandb")
    # Without an origin it is a folder `wandb/` of past runs, not the package.
    if spec is None or spec.origin is None:
        raise UserError("--wandb_project needs the package wandb: pip install --group wandb")


class WandbSink:
    """A `Sink` of a `Tracker`. After a failure it prints one line and logs nothing more.

    W&B keeps the steps that it has: a run that resumes from a checkpoint repeats the same numbers
    for the steps since, so they are not sent again.

    Args:
        folder: the run's, which keeps the id that a resumed run continues under.
        project: of Weights & Biases.
        settings: the run's config.
        is_new: whether the run starts at its first step, under a new id.
    """

    def __init__(self, folder: Path, *, project: str, settings: dict[str, Any], is_new: bool):
        self.folder = folder
        self.project = project
        self.settings = settings
        self.is_new = is_new
        self.run: Any = None
        self.message: Callable[[str], None] = print

    def open(self, message: Callable[[str], None]) -> None:
        """Start logging. Lines for a person go to `message`."""
        self.message = message
        self._attempt(self._open)
        if self.run:
            place = self.run.url or "disabled"
            if self.run.offline:
                place = f"kept for: wandb sync {Path(self.run.dir).parent}"
            message(f"Weights & Biases: {place}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers by their tags."""
        self._send(step, metrics)

    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None:
        """Log an image."""
        self._send(step, {name: image})

    def close(self) -> None:
        """Finish sending. May be called twice."""
        if self.run:
            self._attempt(self.run.finish)
        self.run = None

    def _open(self) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",  # the output of a run is not captured
            silent=True,
            init_timeout=TIMEOUT_SECONDS,
            finish_timeout=TIMEOUT_SECONDS,
        )
        init = partial(
            wandb.init,
            project=self.project,
            dir=self.folder,
            name=self.folder.resolve().name,
            id=self._read_id(),
            resume="allow",
            config=self.settings,
            allow_val_change=True,
            reinit="create_new",
            settings=settings,
        )
        try:
            wandb.setup(settings)  # silent from here on: without a key it would ask, and wait
            self.run = init()
        except Exception as error:
            self.message(f"Weights & Biases cannot be reached ({first_line(error)}): kept offline")
            wandb.teardown()  # the process that failed would keep the id to itself
            self.run = init(mode="offline")

    def _read_id(self) -> str:
        """The id of the run on W&B, made anew for a new run."""
        path = self.folder / ID_FILE
        if self.is_new or not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_hex(4).encode())
        return path.read_text().strip()

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        if not self.run or step < self.run.step:
            return
        import wandb

        loggable = {
            name: value if isinstance(value, float | int) else wandb.Image(value)
            for name, value in values.items()
        }
        self._attempt(lambda: self.run.log(loggable, step=step))

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self.run = None
            self.message(f"Weights & Biases failed, training continues: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
