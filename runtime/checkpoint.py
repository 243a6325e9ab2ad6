"""What survives: a run's checkpoints, which Orbax writes in the background.

A step's folder gets its final name only when it is complete, so a crash in the middle of a save
costs that save and nothing else. Weights, their average and the optimizer are separate items: a
sampler reads only what it needs, on any number of devices. Sums of all bits are saved beside them:
what comes back is what was saved, or is refused.
"""

import errno
import json
import logging
import os
import shutil
import sys
import textwrap
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from runtime.errors import UserError

CHECKPOINTS_FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged"  # checkpoints that cannot be read are moved here
ARRAY_ITEMS = ("params", "ema", "optimizer")
METADATA_ITEMS = ("config", "data")
CHECKSUMS_ITEM = "sums"
# What Orbax raises over damaged files. A lack of memory is a RuntimeError and no damage.
DAMAGE_ERRORS = (ValueError, LookupError, OSError, AttributeError, TypeError, AssertionError)


class DamageError(UserError):
    """A checkpoint that cannot be read, or is not what was saved."""


class DiskFullError(UserError):
    """A checkpoint that was not written for want of space."""


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
        _hush_orbax()
        self.folder = run_dir.resolve() / CHECKPOINTS_FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self.failed = False  # the last save
        items = (*ARRAY_ITEMS, *METADATA_ITEMS, CHECKSUMS_ITEM)
        self.manager = ocp.CheckpointManager(self.folder, item_names=items, options=options)

    @staticmethod
    def exist(run_dir: Path) -> bool:
        """Whether the run has a complete checkpoint."""
        return any(path.name.isdecimal() for path in (run_dir / CHECKPOINTS_FOLDER).glob("*"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self.manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self.manager.latest_step()

    def resolve_step(self, step: int | None = None) -> int:
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
            DiskFullError: now or during the previous save, if nobody has waited for it. Earlier
                steps are intact.
            RuntimeError: a newer step is already there.
        """
        self.wait()
        if self.failed:
            self._after_a_failure()
        if step == self.latest_step():
            return
        self._check_space(arrays)
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(read_metadata) for name, read_metadata in notes.items()}
        sums: dict[str, Any] = {name: array_checksums(tree) for name, tree in arrays.items()}
        sums |= {name: json_checksum(read_metadata) for name, read_metadata in notes.items()}
        items[CHECKSUMS_ITEM] = ocp.args.JsonSave(sums)
        with self._disk_full_is_said():
            saved = self.manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise RuntimeError(f"step {step} not saved: {self.folder} holds step {self.latest_step()}")

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Read the items named in `like`, which gives their shapes, types and shardings.

        The number of devices need not be the one that saved.

        Raises:
            DamageError: the checkpoint is damaged or was written by another configuration.
        """
        items: dict[str, Any] = {n: ocp.args.StandardRestore(tree) for n, tree in like.items()}
        items[CHECKSUMS_ITEM] = ocp.args.JsonRestore()
        with self._damage_is_said(step):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
            for name in like:
                changed = array_checksums(restored[name]).items() ^ restored[CHECKSUMS_ITEM][name].items()
                if changed:
                    raise ValueError(f"bits of {name}{min(changed)[0]} are not those saved")
        return {name: restored[name] for name in like}

    def restore_newest(self, like: dict[str, Any]) -> tuple[int, dict[str, Any], list[int]]:
        """The newest step that can be read, its items, and the damaged steps after it, of which
        each is said. One with damaged notes counts as damaged.

        Raises:
            UserError: there is no checkpoint.
            DamageError: none can be read; with several processes, which would have to agree on it,
                the newest cannot.
        """
        self.resolve_step()
        damaged, steps = [], sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                items = self.restore(step, like)
                for name in METADATA_ITEMS:
                    self.read_metadata(step, name)
                return step, items, damaged
            except DamageError as error:
                self.manager.reload()
                if sorted(self.manager.all_steps(), reverse=True) != steps:
                    # Its run goes on: new ones have come, and old ones gone.
                    return self.restore_newest(like)
                if step == steps[-1] or jax.process_count() > 1:
                    raise
                print(f"warning: {error}; taking the one before it", file=sys.stderr)
                damaged.append(step)
        raise AssertionError("there is a first step")

    def set_aside(self, steps: Iterable[int]) -> None:
        """Move damaged checkpoints to `damaged/` of the run's folder: new ones take their place."""
        aside = self.folder.parent / DAMAGED_FOLDER
        for step in steps:
            aside.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(_unused(aside / str(step)))
        self.manager.reload()

    def read_metadata(self, step: int, name: str) -> dict[str, Any]:
        """One of the JSON objects of a step.

        Raises:
            DamageError: the checkpoint is damaged.
        """
        items = {name: ocp.args.JsonRestore() for name in (name, CHECKSUMS_ITEM)}
        with self._damage_is_said(step):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
            found = json_checksum(restored[name])
            if restored[CHECKSUMS_ITEM].get(name, found) != found:  # older checkpoints have no sum of it
                raise ValueError(f"'{name}' is not what was saved")
        return restored[name]

    def wait(self) -> None:
        """Wait until all that was saved is on disk. A failed save is said once.

        Raises:
            DiskFullError: it cannot be.
        """
        if self.failed:
            return
        with self._disk_full_is_said():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def _check_space(self, arrays: dict[str, Any]) -> None:
        # Asked first: what Orbax has half written when it meets the end takes room from others.
        needed = sum(shard.data.nbytes for shard in _local_shards(arrays))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._disk_full(
                f"a checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
            )

    def _after_a_failure(self) -> None:
        """Make way for the next save. The failed one's threads go on for a while, and trip over
        what is removed under them; their errors would be taken for the next one's.
        """
        time.sleep(1)  # nothing waits for them all
        for _ in range(10):
            with suppress(Exception):
                self.manager.check_for_errors()
                break
        if jax.process_index() == 0:  # which alone makes these folders
            for half_written in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        self.failed = False

    @contextmanager
    def _disk_full_is_said(self):
        try:
            yield
        except Exception as error:
            # By text: Orbax wraps the operating system's error in one of its own.
            if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
                raise
            self.failed = True
            raise self._disk_full("a checkpoint could not be written whole") from error

    @contextmanager
    def _damage_is_said(self, step: int):
        try:
            yield
        except Exception as error:
            # A truncated array is a bare Exception of Orbax, caused by what is wrong with it.
            bare = type(error) is Exception
            if not bare and not isinstance(error, DAMAGE_ERRORS):
                raise
            cause = error.__cause__ or error if bare else error
            reason = " ".join(str(cause).split())
            if not isinstance(cause, OSError) and type(cause) is not ValueError:
                reason = f"{type(cause).__name__}: {reason}"  # a KeyError's text is a bare name
            raise DamageError(
                f"cannot read checkpoint {self.folder / str(step)}: "
                f"{textwrap.shorten(reason, 200, placeholder=' …')}"
            ) from error

    def _disk_full(self, reason: str) -> DiskFullError:
        last = self.latest_step()
        left = "there is none yet" if last is None else f"the last complete one is step {last}"
        return DiskFullError(f"no space left for {self.folder}: {reason}; {left}")


def _local_shards(tree: Any) -> Iterable[Any]:
    """What this process writes: of a replicated array only the first copy."""
    return (
        shard
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )


@jax.jit
def _sums(tree: Any) -> Any:
    def of(x):
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, words), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def array_checksums(tree: Any) -> dict[str, int]:
    """Of each array, the sum of its words modulo 2³²: any changed bit changes it.

    Computed where the array lies, so that the way to the disk and back is covered; sums of whole
    numbers do not depend on the number of devices.
    """
    sums = jax.tree_util.tree_leaves_with_path(jax.device_get(_sums(tree)))
    return {jax.tree_util.keystr(path): int(x) for path, x in sums}


def json_checksum(read_metadata: dict[str, Any]) -> int:
    """Of what a JSON object says, however it is written."""
    return zlib.crc32(json.dumps(read_metadata, sort_keys=True).encode())


def _hush_orbax() -> None:
    """What goes wrong is raised, and said once. Let the reads and writes that Orbax then gives up
    end in silence: each would print a traceback of its own, from a thread or as it is forgotten.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    names = r"Store\._get_array_metadatas|_read_array_\S+|async_serialize_\S+"
    forgotten = f"coroutine '({names})' was never awaited"
    warnings.filterwarnings("ignore", forgotten, RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_is_not_orbaxs)
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        hook = getattr(module, name)
        if getattr(hook, "func", None) is not _unless_orbaxs:
            setattr(module, name, partial(_unless_orbaxs, hook))


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    """asyncio tells of exceptions that nobody has asked for."""
    told = logging.Formatter().format(record)  # with the traceback
    return not any(name in told for name in ("OCDBT", "TensorStore", "orbax"))


def _unless_orbaxs(hook: Callable[[Any], None], unhandled: Any) -> None:
    """What Python calls with an exception that nobody catches."""
    trace = "".join(traceback.format_tb(unhandled.exc_traceback))
    coroutine = getattr(getattr(unhandled, "object", None), "cr_code", None)
    trace += coroutine.co_filename if coroutine else ""
    closed = "Event loop is closed" in str(unhandled.exc_value)  # by whom, its trace does not tell
    if not closed and "orbax" not in trace and "tensorstore" not in trace:
        hook(unhandled)


def _unused(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *"abcdefghij"))
    return next(name for name in names if not name.exists())
