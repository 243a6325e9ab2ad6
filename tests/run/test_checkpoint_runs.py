"""What was saved comes back bit for bit, and no death costs more than the save it interrupts."""

import errno
import gc
import json
import logging
import os
import re
import shutil
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    DDP,
    FSDP,
    METADATA,
    OPTIMIZER,
    abstract_arrays,
    arrays_on,
    first,  # noqa: F401
    restore,
    save,
    truncate,
)
from commands import fill, small_disk
from orbax.checkpoint._src.path.step import Metadata

from runtime import parallel
from runtime.checkpoint import Checkpoints, DiskFullError, OtherContentsError
from runtime.errors import UserError
from runtime.orbax_noise import silence_orbax

ONE = parallel.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def second():
    return arrays_on(DDP, 1)


def assert_same(a, b):
    """The same tree, types included, and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- what comes back ------------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(tmp_path, first):
    """Optax's namedtuples too: with lists in their place training could not resume."""
    save(tmp_path, (5, first))
    restored = restore(tmp_path)
    assert_same(restored, first)
    OPTIMIZER.update(restored["ema"], restored["optimizer"]["state"], restored["params"])


def test_devices_share_the_writing_of_a_large_array_only(tmp_path):
    """Each of eight writes a slice of it, and one of them all of a smaller array."""
    large, small = np.arange(2**21, dtype=np.float32), np.arange(2**20, dtype=np.float32)
    arrays = {"params": parallel.replicate({"large": large, "small": small}, DDP)}
    save(tmp_path, (1, arrays))
    record = json.loads((tmp_path / "checkpoints/1/params/array_metadatas/process_0").read_text())
    written = [array["array_metadata"] for array in record["array_metadatas"]]
    assert {array["param_name"]: array["write_shape"] for array in written} == {
        "large": [2**18],
        "small": [2**20],
    }
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(1, jax.eval_shape(lambda: arrays)), arrays)


@pytest.mark.parametrize("there", [ONE, DDP], ids=["1 device", "DDP"])
def test_what_fsdp_saved_opens_anywhere(tmp_path, there):
    arrays = arrays_on(FSDP)
    assert not arrays["params"]["blocks"]["kernel"].sharding.is_fully_replicated
    save(tmp_path, (1, arrays))
    restored = restore(tmp_path, mesh=there)
    assert_same(restored, arrays)
    for x, y in zip(
        jax.tree.leaves(restored), jax.tree.leaves(abstract_arrays(there)), strict=True
    ):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_what_ddp_saved_opens_under_fsdp(tmp_path, first):
    save(tmp_path, (1, first))
    restored = restore(tmp_path, mesh=FSDP)
    assert_same(restored, first)
    assert not restored["params"]["blocks"]["kernel"].sharding.is_fully_replicated


def test_one_item_can_be_read_alone(tmp_path, first):
    save(tmp_path, (1, first))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(
            checkpoints.restore(1, {"ema": abstract_arrays(DDP)["ema"]})["ema"], first["ema"]
        )
        assert {name: checkpoints.read_metadata(1, name) for name in METADATA} == METADATA


def test_a_later_change_of_the_arrays_is_not_saved(tmp_path):
    """The training step gives its buffers away while the file is still being written."""
    arrays = arrays_on(DDP)
    expected = jax.device_get(arrays)
    scale = jax.jit(lambda a: jax.tree.map(lambda x: x * 0, a), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, METADATA)
        jax.block_until_ready(scale(arrays))
    assert_same(restore(tmp_path), expected)


# --- which steps there are ------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path, first, second):
    save(tmp_path / "multiples", *((i, first) for i in range(1, 7)), keep=1, keep_every=2)
    with Checkpoints(tmp_path / "multiples", read_only=True) as checkpoints:
        assert sorted(checkpoints.manager.all_steps()) == [2, 4, 6]
    save(tmp_path, (1, first), (2, first), (3, second), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert_same(restore(tmp_path), second)
    assert_same(restore(tmp_path, 2), first)


def test_a_missing_step_is_refused_with_the_list_of_steps(tmp_path, first):
    save(tmp_path, (1, first), (20, first))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (
            checkpoints.resolve_step(),
            checkpoints.resolve_step(1),
            checkpoints.latest_step(),
        ) == (20, 1, 20)
        with pytest.raises(UserError, match=r"no checkpoint of step 7 .*\[1, 20\]"):
            checkpoints.resolve_step(7)


def test_a_run_without_checkpoints_is_an_error(tmp_path):
    assert not Checkpoints.exist(tmp_path)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no complete"):
        checkpoints.resolve_step()


def test_saving_the_newest_step_again_does_nothing(tmp_path, first, second):
    save(tmp_path, (3, first))
    save(tmp_path, (3, second))
    assert_same(restore(tmp_path), first)


def test_an_older_step_is_an_error(tmp_path, first):
    """Orbax returns False, and a second run in the folder would save nothing."""
    save(tmp_path, (3, first))
    with pytest.raises(RuntimeError, match="step 2 not saved"):
        save(tmp_path, (2, first))


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_reading_writes_nothing(tmp_path, first):
    save(tmp_path, (1, first))
    (
        tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    ).mkdir()  # another process's, in the making
    before = contents(tmp_path)
    assert_same(restore(tmp_path), first)
    assert contents(tmp_path) == before


def test_reading_a_run_without_checkpoints_creates_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="no complete checkpoint"),
        Checkpoints(tmp_path, read_only=True) as checkpoints,
    ):
        checkpoints.resolve_step()
    assert list(tmp_path.iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------


def test_another_models_weights_are_refused(tmp_path, first):
    save(tmp_path, (4, first))
    other = abstract_arrays(DDP)
    other["params"]["label"]["table"] = jax.ShapeDtypeStruct((34, 65), jnp.float32)
    refused = pytest.raises(UserError, match=re.escape(str(tmp_path / "checkpoints" / "4")))
    with Checkpoints(tmp_path, read_only=True) as checkpoints, refused:
        checkpoints.restore(4, other)
    gc.collect()  # they complain now, not in a later test


def test_sound_checkpoints_of_other_arrays_are_not_called_damaged(tmp_path, first, capsys):
    save(tmp_path, (2, first), (4, first))
    other = abstract_arrays(DDP)
    other["params"]["label"]["table"] = jax.ShapeDtypeStruct((34, 65), jnp.float32)
    other["optimizer"]["mine"] = other["optimizer"].pop("step")
    refused = pytest.raises(OtherContentsError)
    with Checkpoints(tmp_path, read_only=True) as checkpoints, refused as error:
        checkpoints.restore_newest(other)
    assert str(error.value) == (
        f"{tmp_path / 'checkpoints' / '4'} is sound, but of another trainer or model: "
        "optimizer lacks mine and also has step; params differs in label.table (33, 65), not "
        "(34, 65)"
    )
    assert capsys.readouterr().err == ""
    gc.collect()


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("name", ["largest", "manifest.ocdbt", "_METADATA"])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, first, name, share):
    save(tmp_path, (4, first))
    folder = tmp_path / "checkpoints" / "4"
    files = (path for path in (folder / "params").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    truncate(largest if name == "largest" else folder / "params" / name, share)
    with pytest.raises(UserError, match=rf"^cannot read checkpoint {re.escape(str(folder))}: .+"):
        restore(tmp_path)
    gc.collect()


@pytest.mark.parametrize("share", [0, 0.5])
def test_truncated_metadata_is_refused_by_name(tmp_path, first, share):
    save(tmp_path, (4, first))
    folder = tmp_path / "checkpoints" / "4"
    truncate(folder / "data" / "metadata", share)
    refused = pytest.raises(UserError, match=re.escape(str(folder)))
    with Checkpoints(tmp_path, read_only=True) as checkpoints, refused:
        checkpoints.read_metadata(4, "data")


@pytest.mark.parametrize("text", ["[]", "null", '{"a": 1'])
@pytest.mark.parametrize("name", ["params/_METADATA", "params/array_metadatas/process_0", "sums"])
def test_metadata_with_other_content_is_damage(tmp_path, first, name, text):
    """Orbax trips over them in many ways."""
    save(tmp_path, (4, first))
    folder = tmp_path / "checkpoints" / "4"
    (folder / name.replace("sums", "sums/metadata")).write_text(text)
    with pytest.raises(UserError, match=rf"^cannot read checkpoint {re.escape(str(folder))}: .+"):
        restore(tmp_path)


@pytest.mark.parametrize("name", METADATA)
def test_metadata_with_a_changed_bit_is_refused_and_the_step_before_it_restored(
    tmp_path, first, second, name, capsys
):
    save(tmp_path, (4, first), (8, second))
    metadata_file = tmp_path / "checkpoints/8" / name / "metadata"
    changed = metadata_file.read_bytes().replace(b"3", b"7").replace(b"17", b"16")
    assert changed != metadata_file.read_bytes()
    metadata_file.write_bytes(changed)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=rf"checkpoints/8: '{name}' is not what was saved$"):
            checkpoints.read_metadata(8, name)
        step, items, damaged = checkpoints.restore_newest(abstract_arrays(DDP))
    assert (step, damaged) == (4, [8])
    assert {name: items.pop(name) for name in METADATA} == METADATA
    assert_same(items, first)
    assert capsys.readouterr().err.count("\n") == 1


def test_checkpoints_saved_and_deleted_during_a_restore_are_not_damaged(
    tmp_path, first, second, capsys
):
    """A run that trains deletes old ones, perhaps the one that is being read."""
    save(tmp_path, (4, first))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        shutil.move(tmp_path / "checkpoints/4", tmp_path / "gone")
        save(tmp_path, (8, second))
        step, items, damaged = checkpoints.restore_newest(abstract_arrays(DDP))
    assert (step, damaged) == (8, [])
    assert {name: items.pop(name) for name in METADATA} == METADATA
    assert_same(items, second)
    assert capsys.readouterr().err == ""


def test_a_step_deleted_while_the_folder_is_listed_is_no_error(
    tmp_path, first, second, monkeypatch
):
    """Orbax lists the names first and then asks each step for its time."""
    save(tmp_path, (4, first), (8, second))
    time_of_step = Metadata.commit_timestamp

    def delete_first(metadata):
        shutil.rmtree(tmp_path / "checkpoints/4", ignore_errors=True)
        assert time_of_step.fget
        return time_of_step.fget(metadata)

    monkeypatch.setattr(Metadata, "commit_timestamp", property(delete_first))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.resolve_step() == 8


def test_a_reason_is_one_short_line(tmp_path, first):
    """TensorStore's are two thousand letters."""
    save(tmp_path, (4, first))
    (tmp_path / "checkpoints/4/params/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError) as refused:
        restore(tmp_path)
    reason = str(refused.value).partition("checkpoints/4: ")[2]
    assert 20 < len(reason) <= 200 and "\n" not in reason


def test_only_uncaught_exceptions_of_orbax_are_silenced(monkeypatch):
    """In a thread, or in a coroutine that is garbage-collected."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(threading, "excepthook", reported.append)
    silence_orbax.__wrapped__()  # over the hooks of this test
    code = "async def forgotten(): pass\ncoroutine = forgotten()"
    for file in ("/site-packages/orbax/checkpoint/serialization.py", "/home/me/notebook.py"):
        names = {}
        exec(compile(code, file, "exec"), names)
        unraisable = SimpleNamespace(
            exc_value=RuntimeWarning("never awaited"),
            exc_traceback=None,
            object=names["coroutine"],
        )
        sys.unraisablehook(unraisable)  # pyright: ignore
        names["coroutine"].close()
    assert [unraisable.object.cr_code.co_filename for unraisable in reported] == [file]
    closed = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), exc_traceback=None)
    other = SimpleNamespace(exc_value=RuntimeError("something else"), exc_traceback=None)
    for error in (closed, other):
        threading.excepthook(error)  # pyright: ignore
    assert reported[1:] == [other]


@pytest.mark.parametrize("subject", ["a tensor of OCDBT", "a tensor of mine"])
def test_asyncio_reports_all_exceptions_but_those_of_orbax(tmp_path, subject, caplog):
    with Checkpoints(tmp_path):
        logging.getLogger("asyncio").error("Future exception was never retrieved: %s", subject)
    assert len(caplog.records) == (subject == "a tensor of mine")


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        yield disk


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_survives(
    disk, first, foreseen, monkeypatch
):
    save(disk, (1, first))
    if not foreseen:  # another process fills it during the save
        monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)
    huge = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**21))}}
    with pytest.raises(UserError, match=r"no space left .*the last complete one is step 1"):
        save(disk, (2, huge))
    assert_same(restore(disk), first)


@pytest.mark.parametrize("free_kib", [0, 4, 16, 32, 64])
def test_once_there_is_room_the_next_checkpoint_is_saved(
    disk, first, second, free_kib, monkeypatch
):
    """Wherever the disk was full in the one before."""
    monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(1, first, METADATA)
        checkpoints.wait()
        filler = fill(disk, 1024 * free_kib)
        checkpoints.save(2, first, METADATA)
        with pytest.raises(
            DiskFullError, match="could not be written whole; the last complete one is step 1"
        ):
            checkpoints.wait()
        checkpoints.wait()
        filler.unlink()
        checkpoints.save(3, second, METADATA)
    assert_same(restore(disk), second)


def test_leftovers_and_late_errors_of_a_failed_save_do_not_harm_the_next(
    disk, first, second, monkeypatch
):
    """Its threads may still write, and find that they cannot, when the failure is known."""
    monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(1, first, METADATA)
        checkpoints.wait()
        filler = fill(disk)
        with pytest.raises(DiskFullError):
            checkpoints.save(2, first, METADATA)
            checkpoints.wait()
        filler.unlink()
        honest_check, late = checkpoints.manager.check_for_errors, iter([OSError("no folder")] * 3)

        def check():
            for error in late:
                raise error
            honest_check()

        monkeypatch.setattr(checkpoints.manager, "check_for_errors", check)
        (disk / "checkpoints/2.orbax-checkpoint-tmp/late").mkdir(parents=True, exist_ok=True)
        checkpoints.wait()
        checkpoints.save(3, second, METADATA)
    assert not (disk / "checkpoints/2.orbax-checkpoint-tmp/late").exists()
    assert_same(restore(disk), second)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_used_up_quota_is_a_full_disk(tmp_path, first, code, monkeypatch):
    def save(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {os.strerror(code)}")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "save", save)
        with pytest.raises(DiskFullError, match="no space left for"):
            checkpoints.save(1, first, METADATA)


def test_needed_and_free_space_are_given_in_numbers_that_differ(disk):
    huge = {"params": {"w": jnp.zeros(2**20)}}
    fill(disk, 2**19)
    message = r"checkpoints: a checkpoint needs 4\.0 MiB, 0\.5 MiB are free; there is none yet"
    with Checkpoints(disk) as checkpoints, pytest.raises(DiskFullError, match=message):
        checkpoints.save(2, huge, METADATA)
