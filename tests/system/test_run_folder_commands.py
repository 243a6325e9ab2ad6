"""A run's folder has one writer, and leftovers of killed processes are removed."""

import os
import subprocess
import sys

import pytest
from commands import ROOT

from runtime import files, run_folder
from runtime.errors import UserError


@pytest.fixture
def ended():
    """Id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(
    tmp_path, ended
):
    (tmp_path / "samples").mkdir()
    living = os.getppid()
    ours = [f".config.json.{ended}.tmp", f"samples/.1.png.{ended}.tmp", f".a.{os.getpid()}.tmp"]
    others = [f".out.png.{living}.tmp", "samples/1.png", "notes.tmp", ".hidden.tmp", ".x.1"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_run_may_start_where_one_was_killed_before_its_first_file(tmp_path, ended):
    (tmp_path / f".config.json.{ended}.tmp").touch()
    run_folder.require_unused(tmp_path)
    (tmp_path / "notes.tmp").touch()
    with pytest.raises(UserError, match="already exists"):
        run_folder.require_unused(tmp_path)


# --- one writer -----------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from runtime.run_folder import exclusive_writer
with exclusive_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the run."""
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
    with pytest.raises(UserError, match="another process"), run_folder.exclusive_writer(tmp_path):
        pass


def test_kill_9_releases_the_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with run_folder.exclusive_writer(tmp_path):
        pass
