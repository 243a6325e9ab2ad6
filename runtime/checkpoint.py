"""Checkpoints of a run, which Orbax writes in the background.

A step's folder gets its final name only when it is complete, so a crash during a save costs that
save and nothing else. Weights, their average and the optimizer are separate items: a sampler reads
only what it needs, on any number of devices. Checksums over all bits are saved beside them; a
checkpoint that does not match its checksums is refused. What the items mean is the caller's.
"""

import errno
import functools
import json
import os
import re
import shutil
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from runtime import processes
from runtime.errors import UserError
from runtime.orbax_noise import release_failed_calls, silence_orbax
from runtime.run_folder import CHECKPOINTS_FOLDER

SNAPSHOTS_FOLDER = "snapshots"  # of averages alone, which are all kept
DAMAGED_FOLDER = "damaged"  # unreadable checkpoints are moved here
ARRAY_ITEMS = ("params", "ema", "optimizer", "power_ema")
METADATA_ITEMS = ("config", "data")
PROFILES_ITEM = "profiles"  # the metadata of a snapshot
CHECKSUMS_ITEM = "sums"
# Raised by Orbax over damaged files. A lack of memory is a RuntimeError and no damage.
DAMAGE_ERRORS = (ValueError, LookupError, OSError, AttributeError, TypeError, AssertionError)
# Threads of a failed save or read cannot be joined; they end within these times.
SAVE_STRAGGLER_SECONDS = 1.0
READ_STRAGGLER_SECONDS = 0.2
LISTING_ATTEMPTS = 10
MIN_SLICE_BYTES = 2**20  # of an array that several devices write a slice each of

T = TypeVar("T")


class DamageError(UserError):
    """A checkpoint that cannot be read, or whose bits are not those that were saved."""


class OtherContentsError(UserError):
    """A checkpoint of sound arrays that are not those that were asked for."""


class DiskFullError(UserError):
    """A checkpoint that was not written because the disk or a quota is full."""


class Checkpoints:
    """The folder `checkpoints/` or `snapshots/` of a run, with one folder per saved step.

    Use it as a context manager: leaving waits for the last write. Orbax prints nothing from then
    on; what goes wrong is raised.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        folder: str = CHECKPOINTS_FOLDER,
        keep: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        """Open or create the folder of checkpoints in a run's folder.

        Args:
            folder: its name.
            keep: number of newest steps to keep; older ones are deleted as new ones arrive.
            keep_every: keep the multiples of this too.
            read_only: never touch the folder, which another process may be writing to. Without it,
                half-written steps of a killed process are removed.
        """
        self.folder = run_dir.resolve() / folder
        self.saving = 0  # the step of the last save, which may still be being written
        self.save_failed = False  # the last one
        self._read_failed = False  # any one
        silence_orbax()
        _write_small_arrays_whole()
        items = (*ARRAY_ITEMS, *METADATA_ITEMS, PROFILES_ITEM, CHECKSUMS_ITEM)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self.manager = _list_steps(
            lambda: ocp.CheckpointManager(self.folder, item_names=items, options=options)
        )

    @staticmethod
    def exist(run_dir: Path) -> bool:
        """Return True if the run has a complete checkpoint."""
        return Checkpoints.newest_on_disk(run_dir) is not None

    @staticmethod
    def newest_on_disk(run_dir: Path) -> int | None:
        """Return the newest complete step of a run's folder without opening it, or None."""
        names = [path.name for path in (run_dir / CHECKPOINTS_FOLDER).glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Close the folder without waiting for the last write. `with` calls it."""
        self.manager.close()
        if self.save_failed:
            self._wait_for_failed_save()
        if self._read_failed:
            time.sleep(READ_STRAGGLER_SECONDS)
            release_failed_calls(None)

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self.manager.latest_step()

    def resolve_step(self, step: int | None = None) -> int:
        """Return `step`, by default the newest.

        Raises:
            UserError: there is no checkpoint, or none of this step.
        """
        steps, noun = sorted(self.manager.all_steps()), self.folder.name.removesuffix("s")
        if not steps:
            raise UserError(f"{self.folder} holds no complete {noun}")
        if step is not None and step not in steps:
            raise UserError(f"no {noun} of step {step} in {self.folder} (there are: {steps})")
        return steps[-1] if step is None else step

    def save(self, step: int, arrays: dict[str, Any], metadata: dict[str, dict[str, Any]]) -> None:
        """Begin to write step `step`, unless it is the newest already.

        Returns once the arrays are copied; the files are written in the background.

        Args:
            arrays: trees of arrays, by names in ARRAY_ITEMS.
            metadata: JSON objects, by names in METADATA_ITEMS, or PROFILES_ITEM.

        Raises:
            DiskFullError: now, or during the previous save if nobody has waited for it. Earlier
                steps are intact.
            RuntimeError: the folder holds a newer step.
        """
        self.wait()
        self.saving = step
        if self.save_failed:
            self._clean_up_failed_save()
        if step == self.latest_step():
            return
        self._check_space(arrays)
        items: dict[str, Any] = {}
        checksums: dict[str, Any] = {}
        for name, tree in arrays.items():
            items[name] = ocp.args.StandardSave(tree)
            checksums[name] = array_checksums(tree)
        for name, record in metadata.items():
            items[name] = ocp.args.JsonSave(record)
            checksums[name] = json_checksum(record)
        items[CHECKSUMS_ITEM] = ocp.args.JsonSave(checksums)
        with self._raise_disk_full():
            saved = self.manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            newest = self.latest_step()
            raise RuntimeError(f"step {step} not saved: {self.folder} holds step {newest}")

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Read the array items that `like` names.

        Args:
            like: for each item, the tree of shapes, types and shardings to restore to. The number
                of devices need not be the one that saved.

        Raises:
            OtherContentsError: it holds arrays of other names or shapes.
            DamageError: the checkpoint is damaged.
        """
        items: dict[str, Any] = {}
        for name, tree in like.items():
            items[name] = ocp.args.StandardRestore(tree)
        items[CHECKSUMS_ITEM] = ocp.args.JsonRestore()
        try:
            with self._raise_damage(step):
                restored = self.manager.restore(step, args=ocp.args.Composite(**items))
                for name in like:
                    saved = restored[CHECKSUMS_ITEM][name]
                    changed = array_checksums(restored[name]).items() ^ saved.items()
                    if changed:
                        raise ValueError(f"bits of {name}{min(changed)[0]} are not those saved")
        except DamageError as error:
            differences = [self._describe_difference(step, *item) for item in like.items()]
            if text := "; ".join(filter(None, differences)):
                raise OtherContentsError(
                    f"{self.folder / str(step)} is sound, but of another trainer or model: {text}"
                ) from error
            raise
        return {name: restored[name] for name in like}

    def _describe_difference(self, step: int, name: str, tree: Any) -> str:
        """Describe how an item's arrays differ from a tree in names or shapes; empty if they do
        not, or if the item is too damaged to compare.
        """
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                metadata = checkpointer.metadata(self.folder / str(step) / name)
            contents = metadata.item_metadata
            checksums = self.manager.restore(
                step, args=ocp.args.Composite(**{CHECKSUMS_ITEM: ocp.args.JsonRestore()})
            )
            saved = _shapes_by_name(contents.tree if contents else {})
            named_twice = {_plain_name(key) for key in checksums[CHECKSUMS_ITEM][name]}
        except Exception as error:  # the damage is reported by the caller
            release_failed_calls(error)
            return ""
        wanted = _shapes_by_name(tree)
        if {*saved} != named_twice or saved == wanted:
            return ""
        parts = {
            "lacks": sorted({*wanted} - {*saved}),
            "also has": sorted({*saved} - {*wanted}),
            "differs in": [
                f"{key} {saved[key]}, not {shape}"
                for key, shape in wanted.items()
                if saved.get(key, shape) != shape
            ],
        }
        texts = [f"{verb} {', '.join(keys[:2])}" for verb, keys in parts.items() if keys]
        return f"{name} {' and '.join(texts)}"

    def restore_newest(self, like: dict[str, Any]) -> tuple[int, dict[str, Any], list[int]]:
        """Read the newest step that is not damaged, with a warning for each that is.

        A step with damaged metadata counts as damaged.

        Returns:
            The step, its items with the metadata, and the damaged steps after it.

        Raises:
            UserError: there is no checkpoint.
            DamageError: all are damaged. With several processes, which would have to agree on
                another step: the newest is damaged.
        """
        self.resolve_step()
        damaged: list[int] = []
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                items = self.restore(step, like)
                metadata = {name: self.read_metadata(step, name) for name in METADATA_ITEMS}
                return step, items | metadata, damaged
            except DamageError as error:
                _list_steps(self.manager.reload)
                if sorted(self.manager.all_steps(), reverse=True) != steps:
                    # The run is training: new steps have arrived and old ones are deleted.
                    return self.restore_newest(like)
                if step == steps[-1] or processes.count() > 1:
                    raise
                print(f"warning: {error}; taking the one before it", file=sys.stderr)
                damaged.append(step)
        raise AssertionError("unreachable: resolve_step found a step")

    def read_metadata(self, step: int, name: str) -> dict[str, Any]:
        """Read one of the JSON objects of a step.

        Raises:
            DamageError: the checkpoint is damaged.
        """
        items = {name: ocp.args.JsonRestore(), CHECKSUMS_ITEM: ocp.args.JsonRestore()}
        with self._raise_damage(step):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
            if restored[CHECKSUMS_ITEM][name] != json_checksum(restored[name]):
                raise ValueError(f"'{name}' is not what was saved")
        return restored[name]

    def set_aside(self, steps: Iterable[int]) -> None:
        """Move damaged steps to `damaged/` in the run's folder, so that they can be saved anew."""
        folder = self.folder.parent / DAMAGED_FOLDER
        for step in steps:
            folder.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(_unused_path(folder / str(step)))
        self.manager.reload()

    def remove_after(self, step: int) -> None:
        """Remove newer steps than `step`, which a run that has gone back saves anew."""
        self.wait()
        for newer in [saved for saved in self.manager.all_steps() if saved > step]:
            self.manager.delete(newer)

    def wait(self) -> None:
        """Wait until all that was saved is on disk. A failed save is reported once.

        Raises:
            DiskFullError: it could not be written.
        """
        if self.save_failed:
            return
        with self._raise_disk_full():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def _check_space(self, arrays: dict[str, Any]) -> None:
        # Checked first: what Orbax has half written when the disk is full takes room from others.
        needed = sum(shard.data.nbytes for shard in _local_shards(arrays))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._disk_full_error(
                f"a checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
            )

    def _clean_up_failed_save(self) -> None:
        """Make room for the next save."""
        self._wait_for_failed_save()
        if processes.index() == 0:  # which alone creates these folders
            for half_written in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        self.save_failed = False

    def _wait_for_failed_save(self) -> None:
        """Let the threads of a failed save end.

        They trip over what is removed under them, and their errors would be taken for those of the
        next save.
        """
        time.sleep(SAVE_STRAGGLER_SECONDS)
        for _ in range(10):
            try:
                self.manager.check_for_errors()
                break
            except Exception as error:
                release_failed_calls(error)
        release_failed_calls(None)

    @contextmanager
    def _raise_disk_full(self):
        """Turn Orbax's error over a full disk into a DiskFullError."""
        try:
            yield
        except Exception as error:
            # By text: Orbax wraps the operating system's error in one of its own.
            if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
                raise
            self.save_failed = True
            release_failed_calls(error)
            raise self._disk_full_error("a checkpoint could not be written whole") from error

    @contextmanager
    def _raise_damage(self, step: int):
        """Turn an error over damaged files into a DamageError with a reason of one line."""
        try:
            yield
        except Exception as error:
            # A truncated array is a bare Exception of Orbax, caused by the actual error.
            is_bare = type(error) is Exception
            if not is_bare and not isinstance(error, DAMAGE_ERRORS):
                raise
            self._read_failed = True
            release_failed_calls(error)
            cause = error.__cause__ or error if is_bare else error
            reason = " ".join(str(cause).split())
            if not isinstance(cause, OSError) and type(cause) is not ValueError:
                reason = f"{type(cause).__name__}: {reason}"  # a KeyError's text is a bare name
            raise DamageError(
                f"cannot read checkpoint {self.folder / str(step)}: "
                f"{textwrap.shorten(reason, 200, placeholder=' …')}"
            ) from error

    def _disk_full_error(self, reason: str) -> DiskFullError:
        latest = self.latest_step()
        intact = (
            "there is none yet" if latest is None else f"the last complete one is step {latest}"
        )
        return DiskFullError(f"no space left for {self.folder}: {reason}; {intact}")


def _list_steps(call: Callable[[], T]) -> T:
    """Call what lists a folder of checkpoints, again if a run that is training deletes one then."""
    for _ in range(LISTING_ATTEMPTS - 1):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError):
            pass
    return call()


def _local_shards(tree: Any) -> Iterable[Any]:
    """Shards that this process writes: of a replicated array only the first copy."""
    return (
        shard
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )


def array_checksums(tree: Any) -> dict[str, int]:
    """Sum the words of each array modulo 2³²: any changed bit changes the sum.

    Computed where the array lives, so that the path to the disk and back is covered; sums of
    integers do not depend on the number of devices.
    """
    sums = jax.tree_util.tree_leaves_with_path(jax.device_get(_sum_words(tree)))
    return {jax.tree_util.keystr(path): int(x) for path, x in sums}


@jax.jit
def _sum_words(tree: Any) -> Any:
    def sum_array(x: Any) -> Any:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, words), dtype=jnp.uint32)

    return jax.tree.map(sum_array, tree)


def _plain_name(key: str) -> str:
    """Return a `keystr` without punctuation: ['opt_state'][1].mu → opt_state.1.mu."""
    return ".".join(re.findall(r"[^\[\]'.]+", key))


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_plain_name(jax.tree_util.keystr(path)): tuple(x.shape) for path, x in leaves}


def json_checksum(record: dict[str, Any]) -> int:
    """Checksum of a JSON object that does not depend on the order of its keys."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


@functools.cache  # once in a process
def _write_small_arrays_whole() -> None:
    """Let one device write an array that all hold, unless it is large.

    Orbax cuts each into one slice a device, and every cut is a program to compile and to start: of
    a small network's, on eight devices, a thousand, which took the first save four seconds.
    """
    own = ocp.type_handlers.get_type_handler(jax.Array)
    handler = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES,
        array_metadata_store=getattr(own, "_array_metadata_store", None),
    )
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _unused_path(path: Path) -> Path:
    paths = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *"abcdefghij"))
    return next(path for path in paths if not path.exists())
