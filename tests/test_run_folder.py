"""A run's folder has one name and one writer, and its files are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime import files, run_folder
from runtime.errors import UserError
from runtime.signals import stopping

ROOT = Path(__file__).parents[1]


# --- names ----------------------------------------------------------------------------------------


def test_a_name_says_what_was_trained_on_what(tmp_path):
    path = run_folder.new("cifar10", "DiT-S/2", root=tmp_path)
    assert path.parent == tmp_path and path.name.startswith("cifar10-DiT-S-2-20")
    assert run_folder.new("folder:/data/my cats/", "DiT-S/2", root=tmp_path).name.startswith(
        "my cats-"
    )
    assert run_folder.new("hf:owner/dogs", "DiT-S/2", root=tmp_path).name.startswith("dogs-DiT-")
    assert not any(tmp_path.iterdir())


def test_runs_started_in_the_same_second_have_names_of_their_own(tmp_path):
    names = set()
    for _ in range(5):
        path = run_folder.new("digits", "DiT-Ti/2", root=tmp_path)
        path.mkdir()
        names.add(path)
    assert len(names) == 5


def start(root, name, dataset_name, model, *, age=0):
    (root / name).mkdir()
    config = {"dataset_name": dataset_name, "model": model, "model_config": {}, "dataset": {}}
    run_folder.write_config(root / name, config)
    at = 1_700_000_000 - age
    os.utime(root / name / "config.json", (at, at))
    return root / name


def test_the_newest_run_is_the_newest_of_that_data_and_model(tmp_path):
    start(tmp_path, "a", "digits", "DiT-S/2", age=40)
    b = start(tmp_path, "b", "digits", "DiT-S/2", age=30)
    c = start(tmp_path, "c", "digits", "DiT-B/2", age=20)
    start(tmp_path, "d", "mnist", "DiT-S/2", age=10)
    (tmp_path / "not a run").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{}")
    assert run_folder.newest("digits", "DiT-S/2", root=tmp_path) == b
    assert run_folder.newest("digits", None, root=tmp_path) == c
    with pytest.raises(UserError, match="no run of mnist with DiT-B/2"):
        run_folder.newest("mnist", "DiT-B/2", root=tmp_path)
    with pytest.raises(UserError, match="nothing to resume"):
        run_folder.newest("digits", None, root=tmp_path / "nowhere")


def test_a_run_is_new_or_resumed_and_never_mixed(tmp_path):
    run_folder.require_new(tmp_path / "not there")
    run_folder.require_new(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="already exists"):
            run_folder.require_new(taken)


# --- the configuration ----------------------------------------------------------------------------


def test_a_configuration_comes_back(tmp_path):
    config = {"dataset_name": "digits", "model": "DiT-S/2", "data_dir": None, "rope": False}
    config |= {"model_config": {"mlp_ratio": 4.0}, "dataset": {"label_names": ["0", "1"]}}
    run_folder.write_config(tmp_path, config)
    assert run_folder.read_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a run: it has no config"):
            run_folder.read_config(path)


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run_folder.read_config(tmp_path)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    with files.atomic(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), files.atomic(path) as file:
        file.write(b"ne")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_of_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError) as full, files.atomic(tmp_path / "config.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "config.json")


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path, ended):
    (tmp_path / "samples").mkdir()
    living = os.getppid()
    ours = [f".config.json.{ended}.tmp", f"samples/.1.png.{ended}.tmp", f".a.{os.getpid()}.tmp"]
    others = [f".out.png.{living}.tmp", "samples/1.png", "notes.tmp", ".hidden.tmp", ".x.1"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    files.tidy(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_run_may_begin_where_one_was_killed_before_it_had_begun(tmp_path, ended):
    (tmp_path / f".config.json.{ended}.tmp").touch()
    run_folder.require_new(tmp_path)
    (tmp_path / "notes.tmp").touch()
    with pytest.raises(UserError, match="already exists"):
        run_folder.require_new(tmp_path)


# --- one writer -----------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from run_folder import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which is writing to the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused(tmp_path, holder):
    with pytest.raises(UserError, match="another process"), run_folder.locked(tmp_path):
        pass


def test_kill_9_releases_the_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with run_folder.locked(tmp_path):
        pass


def test_the_lock_ends_with_its_block_and_leaves_no_file(tmp_path):
    for _ in range(2):
        with run_folder.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_another_error_inside_is_not_taken_for_a_lock(tmp_path):
    """Printing into a full pipe that does not block raises the very error a held lock does."""
    with pytest.raises(BlockingIOError), run_folder.locked(tmp_path):
        raise BlockingIOError


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def second_acts():
    """Records what reaches the handlers that were there before."""
    seen = []
    old = {
        n: signal.signal(n, lambda n, _: seen.append(n)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    yield seen
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(second_acts, number, capfd):
    with stopping() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number and second_acts == []
        os.kill(os.getpid(), number)
        assert second_acts == [number]
    assert "stopping after this step" in capfd.readouterr().err


def test_afterwards_the_handlers_are_as_before(second_acts):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), stopping():
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_leaving_ends_as_the_signal_would_have(second_acts, capsys):
    with stopping() as stop:
        stop.leave()
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        stop.leave()
    assert end.value.code == 143
    with stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.leave()


def test_a_thread_can_train_too():
    """Only the main thread may set handlers; elsewhere signals are not asked for."""
    results = []

    def body():
        with stopping() as stop:
            results.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [False]
