"""Weights & Biases as one more place where a run is recorded: `--wandb_project NAME`.

The package hands what it is told to a process of its own, which sends it when it can: training
waits for no network. Its variables work as its users know them; `WANDB_MODE=offline` keeps all in
`wandb/` of the run's folder, for `wandb sync`.
"""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError
from runtime.files import atomic_file

if TYPE_CHECKING:
    import PIL.Image

ID = "wandb_id"  # a file of the run's folder
SECONDS = 20  # that a network may take to answer, at the beginning and at the end


def require_installed() -> None:
    """Raises UserError if the package is missing. A folder of its name in this one is no package:
    its own runs lie in such.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise UserError(
            "--wandb_project needs the package wandb: pip install --group wandb"
        )


class Sink:
    """One of a `Tracker`'s sinks. A failure is told once, in one line, and ends it alone.

    What W&B has of a step it keeps: a run that goes on from a checkpoint repeats the very numbers
    of the steps since, so these are not sent again.

    Args:
        folder: the run's, which keeps the id that the resumed run goes on under.
        project: where it is shown.
        settings: the run's config.
        fresh: whether the run starts at its first step, and so anew.
    """

    def __init__(self, folder: Path, *, project: str, settings: dict[str, Any], fresh: bool):
        self.folder, self.project, self.settings, self.fresh = folder, project, settings, fresh
        self.run: Any = None
        self.say: Callable[[str], None] = print

    def open(self, say: Callable[[str], None]) -> None:
        """Begin to record; what there is to say of it goes to `say`."""
        self.say = say
        self._attempt(self._open)
        if self.run:
            kept = f"kept for: wandb sync {Path(self.run.dir).parent}"
            where = kept if self.run.offline else self.run.url or "disabled"
            say(f"Weights & Biases: {where}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by their tags."""
        self._send(step, numbers)

    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None:
        """A picture."""
        self._send(step, {name: image})

    def close(self) -> None:
        """Hand over what is left. May be called twice."""
        if self.run:
            self._attempt(self.run.finish)
        self.run = None

    def _open(self) -> None:
        import wandb

        mine = wandb.Settings(
            console="off",  # what a run prints is its own
            silent=True,
            init_timeout=SECONDS,
            finish_timeout=SECONDS,
        )
        told: dict[str, Any] = {
            "project": self.project,
            "dir": self.folder,
            "name": self.folder.resolve().name,
            "id": self._id(),
            "resume": "allow",
            "config": self.settings,
            "allow_val_change": True,
            "reinit": "create_new",
            "settings": mine,
        }
        try:
            wandb.setup(mine)  # silent from here on: without a key it would ask for one, and wait
            self.run = wandb.init(**told)
        except Exception as error:
            self.say(f"Weights & Biases is not to be reached ({first_line(error)}): kept offline")
            wandb.teardown()  # the process that failed keeps the id to itself
            self.run = wandb.init(**told, mode="offline")

    def _id(self) -> str:
        path = self.folder / ID
        if self.fresh or not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_hex(4).encode())
        return path.read_text().strip()

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        if not self.run or step < self.run.step:
            return
        import wandb

        shown = {n: v if isinstance(v, float | int) else wandb.Image(v) for n, v in values.items()}
        self._attempt(lambda: self.run.log(shown, step=step))

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self.run = None
            self.say(f"Weights & Biases failed, training goes on: {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
