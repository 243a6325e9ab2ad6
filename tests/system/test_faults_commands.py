"""Real faults from outside cost no more than what they hit; the rest of the run is unchanged."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from commands import NANO, SMALL, fill, run, small_disk
from faults_cases import (
    EVERY,
    FLAGS,
    SAMPLE_EVERY,
    SAVE_EVERY,
    assert_same_end,
    children,
    newest,
    wait_until,
    whole,  # noqa: F401
)
from PIL import Image
from train_cases import metrics

from data.load import open_dataset
from data.pipeline import Pipeline

GREETED = " steps of "  # what a run prints before its first step


# --- kill -9 --------------------------------------------------------------------------------------

N_KILLS = 28
KILLED = [*SMALL, *EVERY, "--n_steps", 900]
KILLED[KILLED.index("--n_sample_steps") + 1] = 50  # so that a sample is long enough to be hit
MOMENTS = ("step", "save", "sample", "start-up")


def logged(folder: Path) -> list[int]:
    """Steps of the complete lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text() if path.exists() else ""
    return [int(step) for step in re.findall(r'^{"step": (\d+),.*\n', lines, re.MULTILINE)]


def saving(folder: Path, started: float) -> bool:
    """Return True if a save that began after `started` is not complete."""
    for path in folder.glob("checkpoints/*"):
        with suppress(FileNotFoundError):  # it has just been completed
            if not path.name.isdecimal() and path.stat().st_mtime > started:
                return True
    return False


def hit(folder: Path, out: str, started: float) -> str:
    """Name the moment of the run, started then, that a kill has interrupted."""
    if GREETED not in out:
        return "start-up"
    if saving(folder, started):
        return "save"
    last = logged(folder)[-1] if logged(folder) else 0
    image = folder / f"samples/{last:07d}.png"
    is_sampled = image.exists() and image.stat().st_mtime > started
    return "sample" if last and not last % SAMPLE_EVERY and not is_sampled else "step"


def wait_for(
    moment: str, folder: Path, out: Path, started: float, rng: np.random.Generator
) -> None:
    """Wait for a random time into such a moment of the run that was started then."""
    if moment == "start-up":
        time.sleep(rng.uniform(0, 0.8))
        return
    saved = newest(folder) + SAVE_EVERY * rng.integers(2)
    wait_until(lambda: newest(folder) >= saved)
    wait_until(lambda: hit(folder, out.read_text(), started) == moment)
    time.sleep(rng.uniform(0, 0.02))


@pytest.mark.slow
def test_kills_at_any_moment_leave_no_trace(forks, tmp_path):
    """Each restart resumes from the newest complete checkpoint."""
    rng, folder = np.random.default_rng(0), tmp_path / "run"
    hits: dict[str, int] = dict.fromkeys(MOMENTS, 0)
    assert forks.run(*KILLED, "--run_dir", tmp_path / "whole")[0] == 0
    for _ in range(N_KILLS):
        there, started, known = newest(folder), time.time(), (folder / "config.json").exists()
        child = forks.start(*(["--resume"] if known else KILLED), "--run_dir", folder)
        wait_for(min(MOMENTS, key=hits.__getitem__), folder, forks.out, started, rng)
        os.killpg(child, signal.SIGKILL)
        status, out, err = forks.end()
        assert (status, err) == (-signal.SIGKILL, "")
        if GREETED in out:
            assert (f"resuming at step {there}:" if there else "starting:") in out
        hits[hit(folder, out, started)] += 1
    assert min(hits.values()) >= 4, hits
    assert forks.run("--resume", "--run_dir", folder)[0] == 0
    assert_same_end(forks, folder, tmp_path / "whole")


@pytest.mark.slow
def test_three_sigterms_leave_no_trace(forks, whole, tmp_path):
    """Sent in a step, in a save and in a sample: each run exits in time, at the step it was in."""
    rng, folder = np.random.default_rng(0), tmp_path / "run"
    for moment in ("step", "save", "sample"):
        started = time.time()
        child = forks.start(*(["--resume"] if newest(folder) else FLAGS), "--run_dir", folder)
        wait_for(moment, folder, forks.out, started, rng)
        os.kill(child, signal.SIGTERM)
        sent = time.monotonic()
        status, _, err = forks.end()
        assert status == 143 and time.monotonic() - sent < 30
        assert err.strip() == "stopping after this step; once more to exit at once"
        assert newest(folder) >= max(logged(folder))
    assert forks.run("--resume", "--run_dir", folder)[0] == 0
    assert_same_end(forks, folder, whole)


# --- what is there already ------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_restored(
    forks, whole, tmp_path, damage
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    files = (path for path in (folder / "checkpoints/200/ema").rglob("*") if path.is_file())
    damage(max(files, key=lambda path: path.stat().st_size))
    status, out, err = forks.run("--resume", "--run_dir", folder)
    assert status == 0 and "resuming at step 180:" in out
    assert err.startswith(f"warning: cannot read checkpoint {folder}/checkpoints/200: ")
    assert err.endswith("; taking the one before it\n") and err.count("\n") == 1
    assert (folder / "damaged/200/ema").is_dir()
    assert_same_end(forks, folder, whole)


@pytest.mark.slow
def test_a_resume_with_another_batch_or_other_data_is_refused_by_name(forks, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for flag, value, was in (("batch_size", 16, "8"), ("dataset_name", "mnist", "digits")):
        status, out, err = forks.run("--resume", "--run_dir", whole, f"--{flag}", value)
        assert (status, out) == (2, "")
        assert err == f"error: cannot resume: {flag} was {was}, not {value}\n"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_continues(forks, cache, tmp_path):
    folder = tmp_path / "run"
    child = forks.start(*SMALL, *EVERY, "--n_steps", 100_000, "--run_dir", folder)
    wait_until(lambda: newest(folder))
    for flags, why in (
        (["--resume"], f"another process is writing to '{folder}'"),
        (FLAGS, f"'{folder}' already exists; continue it with --resume"),
    ):
        done = run(NANO, *flags, "--run_dir", folder, cache=cache)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {why}") and done.stderr.count("\n") == 1
    there = newest(folder)
    wait_until(lambda: newest(folder) > there)
    os.kill(child, signal.SIGTERM)
    assert forks.end()[0] == 143
    assert logged(folder) == sorted(logged(folder))


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path, server) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24) as disk:
        yield disk


@pytest.mark.slow
def test_a_full_disk_costs_only_the_files_without_room(disk, forks, whole):
    """The run continues until its last checkpoint, and earlier checkpoints are intact."""
    folder = disk / "run"
    forks.start(*FLAGS, "--run_dir", folder)
    wait_until(lambda: newest(folder))
    filler = fill(disk)
    there = newest(folder)
    status, out, err = forks.end()
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: no space left for {folder}/checkpoints: a checkpoint ")
    assert err.endswith(f"; the last complete one is step {there}\n")
    unsaved = re.findall(r"step (\d+) is not saved, training continues: no space left for", out)
    assert [int(step) for step in unsaved] == list(range(there + SAVE_EVERY, 200, SAVE_EVERY))
    assert f"no space left on the disk of {folder}: metrics are not recorded" in out
    assert f"no space left for {folder}/samples/" in out and "step 200/200" in out
    filler.unlink()
    assert forks.run("--resume", "--run_dir", folder)[0] == 0
    assert_same_end(forks, folder, whole)


# --- data and their workers -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_that_cannot_be_decoded_is_named_and_costs_nothing(forks, tmp_path):
    """Once the image is repaired the run resumes, and ends as an undisturbed one."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 64), ("test", 8)):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
            image.save(tmp_path / f"data/{split}/cat/{i:03}.png")
    data = f"folder:{tmp_path / 'data'}"
    flags = [*SMALL, *EVERY, "--dataset_name", data, "--noin_memory", "--n_workers", 1]
    flags += ["--n_steps", 12]
    assert forks.run(*flags, "--run_dir", tmp_path / "whole")[0] == 0

    row = Pipeline(open_dataset(data), batch_size=8, seed=0, in_memory=False).batch_rows(5)[3]
    image, folder = tmp_path / f"data/train/cat/{row:03}.png", tmp_path / "run"
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    status, _, err = forks.run(*flags, "--run_dir", folder)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and f"{row:03}.png', row {row}, column 'image': " in err
    assert newest(folder) == 5
    image.write_bytes(good)
    status, out, err = forks.run("--resume", "--run_dir", folder)
    assert status == 0 and "resuming at step 5:" in out, err
    assert_same_end(forks, folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_no_number(forks, whole, tmp_path):
    folder = tmp_path / "run"
    child = forks.start(*FLAGS, "--noin_memory", "--n_workers", 2, "--run_dir", folder)
    for step in (1, 2 * SAVE_EVERY):
        wait_until(lambda step=step: newest(folder) >= step)
        os.kill(children(child)[0], signal.SIGKILL)
    status, _, err = forks.end()
    assert status == 0
    assert set(err.splitlines()) == {
        "warning: a worker was killed by SIGKILL; another takes its place"
    }
    assert_same_end(forks, folder, whole)


# --- other devices --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 8], ids=["DDP", "FSDP"])
def test_a_run_of_eight_devices_resumes_on_fewer(forks, tmp_path, fsdp):
    """The same bits are restored; the curve differs by the order of sums only: one device trains
    like eight.
    """
    whole = tmp_path / "whole"
    flags = [*SMALL, *EVERY, "--n_steps", 40, "--fsdp", fsdp, "--run_dir", whole]
    assert forks.run(*flags, n_devices=8)[0] == 0
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/40")
    saved = forks.digest(half, n_devices=8)
    for n_devices in (1, 4):
        folder = tmp_path / str(n_devices)
        shutil.copytree(half, folder)
        assert forks.digest(folder, n_devices) == saved
        status, out, err = forks.run("--resume", "--run_dir", folder, n_devices=n_devices)
        assert status == 0 and f"on {n_devices} × cpu" in out and "resuming at step 20:" in out, err
        for ours, theirs in zip(metrics(folder), metrics(whole), strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours.keys() & {"step", "loss", "grad_norm", "eval_loss"}:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
