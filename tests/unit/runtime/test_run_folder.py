"""A run's folder has one name and one writer; its files are complete or absent."""

import errno
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from runtime import files, run_folder
from runtime.errors import UserError
from runtime.signals import catch_stop_signals

# --- names ----------------------------------------------------------------------------------------


def test_a_name_holds_dataset_and_model(tmp_path):
    path = run_folder.new_run_path("cifar10", "DiT-S/2", root=tmp_path)
    assert path.parent == tmp_path and path.name.startswith("cifar10-DiT-S-2-20")
    assert run_folder.new_run_path(
        "folder:/data/my cats/", "DiT-S/2", root=tmp_path
    ).name.startswith("my cats-")
    assert run_folder.new_run_path("hf:owner/dogs", "DiT-S/2", root=tmp_path).name.startswith(
        "dogs-DiT-"
    )
    assert not any(tmp_path.iterdir())


def test_runs_started_in_the_same_second_have_different_names(tmp_path):
    names = set()
    for _ in range(5):
        path = run_folder.new_run_path("digits", "DiT-Ti/2", root=tmp_path)
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


def test_the_newest_run_is_that_of_the_dataset_and_model(tmp_path):
    start(tmp_path, "a", "digits", "DiT-S/2", age=40)
    b = start(tmp_path, "b", "digits", "DiT-S/2", age=30)
    c = start(tmp_path, "c", "digits", "DiT-B/2", age=20)
    start(tmp_path, "d", "mnist", "DiT-S/2", age=10)
    (tmp_path / "not a run").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{}")
    assert run_folder.newest_run("digits", "DiT-S/2", root=tmp_path) == b
    assert run_folder.newest_run("digits", None, root=tmp_path) == c
    with pytest.raises(UserError, match="no run of mnist with DiT-B/2"):
        run_folder.newest_run("mnist", "DiT-B/2", root=tmp_path)
    with pytest.raises(UserError, match="nothing to resume"):
        run_folder.newest_run("digits", None, root=tmp_path / "nowhere")


def test_a_run_is_new_or_resumed_and_never_mixed(tmp_path):
    run_folder.require_unused(tmp_path / "not there")
    run_folder.require_unused(tmp_path)
    (tmp_path / "file").touch()
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="already exists"):
            run_folder.require_unused(used)


# --- the configuration ----------------------------------------------------------------------------


def test_a_configuration_comes_back(tmp_path):
    config = {"dataset_name": "digits", "model": "DiT-S/2", "data_dir": None, "rope": False}
    config |= {"model_config": {"mlp_ratio": 4.0}, "dataset": {"label_names": ["0", "1"]}}
    run_folder.write_config(tmp_path, config)
    assert run_folder.read_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_without_config_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a run: it has no config"):
            run_folder.read_config(path)


def test_what_is_no_run_is_named_for_what_it_is(tmp_path):
    run, export, pipeline = (tmp_path / name for name in ("runs/a", "export", "pipeline"))
    for folder in (run / "checkpoints" / "12", export, pipeline):
        folder.mkdir(parents=True)
    run_folder.write_config(run, dict.fromkeys(run_folder.REQUIRED_KEYS, ""))
    run_folder.write_config(export, {"_class_name": "DiTTransformer2DModel"})
    (pipeline / "model_index.json").write_text("{}")
    (tmp_path / "DiT-XL-2.pt").touch()
    way_out = "a published model is named by --pretrained, or by --init_from to start from"
    parts = {
        export: f"is not a run, but DiTTransformer2DModel as published: {way_out}",
        pipeline: f"it has no config.json; {way_out}",
        tmp_path / "DiT-XL-2.pt": f"it has no config.json; {way_out}",
        run / "checkpoints": f"name the run's folder, such as '{run}'",
        run / "checkpoints" / "12": f"name the run's folder, such as '{run}'",
        run.parent: f"name the run's folder, such as '{run}'",
    }
    for path, part in parts.items():
        with pytest.raises(UserError, match=re.escape(part)):
            run_folder.read_config(path)


def test_references_of_runs_and_files_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "a.pt").write_text("")
    absolute = run_folder.absolute_reference
    assert absolute("run") == f"{tmp_path}/run" and absolute("run@40") == f"{tmp_path}/run@40"
    assert absolute("a.pt") == f"{tmp_path}/a.pt"
    assert absolute("dit:heads=6:a.pt") == f"dit:heads=6:{tmp_path}/a.pt"
    assert absolute("facebook/DiT-XL-2-256") == "facebook/DiT-XL-2-256"
    with_step = run_folder.with_step_of
    assert with_step(f"{tmp_path}/run", "/old/run@40") == f"{tmp_path}/run@40"
    assert with_step(f"{tmp_path}/run@80", "/old/run@40") == f"{tmp_path}/run@80"
    for other in (f"{tmp_path}/a.pt", "facebook/DiT-XL-2-256"):
        assert with_step(other, "/old/run@40") == other
    assert run_folder.find_run("run@40", "--x") == (Path("run"), 40)
    assert run_folder.find_run(f"{tmp_path}/a.pt", "--x") is None
    for gone in ("/nothing", "run@x@5", "other@5"):
        with pytest.raises(UserError, match=r"no such run or file; .* by --x"):
            run_folder.find_run(gone, "--x")


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run_folder.read_config(tmp_path)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    with files.atomic_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), files.atomic_file(path) as file:
        file.write(b"ne")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_error_names_the_file(tmp_path):
    with pytest.raises(OSError) as full, files.atomic_file(tmp_path / "config.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "config.json")


def test_the_lock_ends_with_its_block_and_leaves_no_file(tmp_path):
    for _ in range(2):
        with run_folder.exclusive_writer(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_body_is_not_mistaken_for_a_held_lock(tmp_path):
    """Printing into a full pipe that does not block raises the very error a held lock does."""
    with pytest.raises(BlockingIOError), run_folder.exclusive_writer(tmp_path):
        raise BlockingIOError


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def old_handler_calls():
    """Record the signals that reach the previous handlers."""
    seen = []
    old = {
        n: signal.signal(n, lambda n, _: seen.append(n)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    yield seen
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded_and_the_second_acts(old_handler_calls, number, capfd):
    with catch_stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number and old_handler_calls == []
        os.kill(os.getpid(), number)
        assert old_handler_calls == [number]
    assert "stopping after this step" in capfd.readouterr().err


def test_afterwards_the_handlers_are_as_before(old_handler_calls):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), catch_stop_signals():
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_raise_exit_ends_as_the_signal_would_have(old_handler_calls, capsys):
    with catch_stop_signals() as stop:
        stop.raise_exit()
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        stop.raise_exit()
    assert end.value.code == 143
    with catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.raise_exit()


def test_a_thread_can_train_too():
    """Only the main thread may set handlers; other threads leave signals alone."""
    results = []

    def body():
        with catch_stop_signals() as stop:
            results.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [False]
