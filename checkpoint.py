"""What survives: a run's checkpoints, which Orbax writes in the background.

A step's folder gets its final name only when it is complete, so a crash in the middle of a save
costs that save and nothing else. Weights, their average and the optimizer are separate items: a
sampler reads only what it needs, on any number of devices.
"""

import logging
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from errors import UserError

FOLDER = "checkpoints"
ARRAYS = ("params", "ema", "optimizer")
NOTES = ("config", "data")


class Checkpoints:
    """The folder `checkpoints/` of a run: one folder per saved step.

    Leaving it as a context manager waits for the last write.
    """

    def __init__(self, run_dir: Path, *, keep: int | None = None, read_only: bool = False):
        """Open or create `checkpoints/` in a run's folder.

        Args:
            keep: so many of the newest steps are kept; older ones go as new ones arrive.
            read_only: never touch the folder, which another process may be writing to. Without it,
                what a killed process left half-written is removed.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = run_dir.resolve() / FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        items = ARRAYS + NOTES
        self.manager = ocp.CheckpointManager(self.folder, item_names=items, options=options)

    @staticmethod
    def exist(run_dir: Path) -> bool:
        """Whether the run has a complete checkpoint."""
        return any(path.name.isdecimal() for path in (run_dir / FOLDER).glob("*"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self.manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self.manager.latest_step()

    def pick(self, step: int | None = None) -> int:
        """The step asked for, or the newest.

        Raises:
            UserError: there is none, or not that one.
        """
        steps = sorted(self.manager.all_steps())
        if not steps:
            raise UserError(f"{self.folder} holds no complete checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.folder} (there are: {steps})")
        return steps[-1] if step is None else step

    def save(self, step: int, arrays: dict[str, Any], notes: dict[str, dict]) -> None:
        """Begin to write step `step`: `arrays` by the names in ARRAYS, JSON objects by those in
        NOTES.

        Returns once the arrays are copied; the writing goes on in the background. Saving the newest
        step again does nothing.

        Raises:
            UserError: the disk is full, now or during the previous save. Earlier steps are intact.
            RuntimeError: a newer step is already there.
        """
        if step == self.latest():
            return
        self._check_space(step, arrays)
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(note) for name, note in notes.items()}
        with self._disk_full_is_said():
            saved = self.manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise RuntimeError(f"step {step} not saved: {self.folder} holds step {self.latest()}")

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Read the items named in `like`, which gives their shapes, types and shardings.

        The number of devices need not be the one that saved.

        Raises:
            UserError: the checkpoint is damaged or was written by another configuration.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        with self._damage_is_said(step):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}

    def note(self, step: int, name: str) -> dict[str, Any]:
        """One of the JSON objects of a step.

        Raises:
            UserError: the checkpoint is damaged.
        """
        items = {name: ocp.args.JsonRestore()}
        with self._damage_is_said(step):
            return self.manager.restore(step, args=ocp.args.Composite(**items))[name]

    def wait(self) -> None:
        """Wait until all that was saved is on disk."""
        with self._disk_full_is_said():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def _check_space(self, step: int, arrays: dict[str, Any]) -> None:
        # Asked first: when Orbax itself meets a full disk, its threads print their tracebacks.
        needed = sum(shard.data.nbytes for shard in _local_shards(arrays))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._disk_full(
                f"step {step} needs {needed >> 20} MiB, {free >> 20} MiB are free"
            )

    @contextmanager
    def _disk_full_is_said(self):
        try:
            yield
        except (ValueError, OSError) as error:
            if "No space left" not in str(error):
                raise
            raise self._disk_full("a checkpoint could not be written") from error

    @contextmanager
    def _damage_is_said(self, step: int):
        try:
            yield
        except Exception as error:
            # A truncated array is a bare Exception of Orbax, caused by what is wrong with it.
            bare = type(error) is Exception
            if not bare and not isinstance(error, (ValueError, KeyError, OSError)):
                raise
            reason = str(error.__cause__ if bare else error).strip().partition("\n")[0]
            raise UserError(
                f"cannot read checkpoint {self.folder / str(step)}: {reason}"
            ) from error

    def _disk_full(self, reason: str) -> UserError:
        return UserError(
            f"no space left on the disk of {self.folder}: {reason}; "
            f"the last complete checkpoint is step {self.latest()}"
        )


def _local_shards(tree: Any) -> Iterable[Any]:
    """What this process writes: of a replicated array only the first copy."""
    return (
        shard
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )
