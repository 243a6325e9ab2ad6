"""Damage prints one line, and kill -9 costs no more than the save that it interrupts."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from checkpoint_cases import (
    first,  # noqa: F401
    save,
    truncate,
)
from commands import ROOT

from runtime.checkpoint import Checkpoints

READER = """
import sys
from pathlib import Path
from checkpoint_cases import restore
from runtime.errors import UserError

for _ in range(8):
    try:
        restore(Path(sys.argv[1]))
    except UserError as error:
        print(error)
"""


def test_damage_is_reported_once_and_orbax_is_silent(tmp_path, first, cache):
    """Abandoned reads of Orbax would print tracebacks, now or at the exit."""
    save(tmp_path, (4, first))
    for name in ("params", "ema", "optimizer"):
        files = (path for path in (tmp_path / "checkpoints/4" / name).rglob("d/*"))
        for path in files:
            truncate(path, 0.5)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("cannot read checkpoint") == 8
    assert done.stderr == "" and done.returncode == 0


# --- kill -9 --------------------------------------------------------------------------------------

VICTIM = """
import os, signal, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp
from runtime.checkpoint import Checkpoints

run_dir, delay = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for child_delay in delay.split():
    folder = run_dir / child_delay
    if os.fork():
        os.wait()
        continue
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.full((1 << 21,), 1.0)}}, {"data": {"n_rows": 1}})
        checkpoints.wait()
        if child_delay == "rename":
            os.rename = os.replace = kill
            Path.rename = Path.replace = kill
        else:
            threading.Timer(float(child_delay), kill).start()
        checkpoints.save(2, {"params": {"w": jnp.full((1 << 21,), 2.0)}}, {"data": {"n_rows": 2}})
        checkpoints.wait()
    os._exit(0)
"""
DELAYS = ("rename", "0.0", "0.02", "0.05", "0.1")


def test_kill_9_during_a_save_costs_that_save_and_nothing_else(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", VICTIM, str(tmp_path), " ".join(DELAYS)]
    subprocess.run(command, env=environment, cwd=ROOT, timeout=120)
    interrupted = 0
    for delay in DELAYS:
        folder = tmp_path / delay / "checkpoints"
        interrupted += any(not path.name.isdecimal() for path in folder.iterdir())
        with Checkpoints(tmp_path / delay) as checkpoints:
            step = checkpoints.resolve_step()
            shape = {"params": {"w": jax.ShapeDtypeStruct((1 << 21,), jnp.float32)}}
            restored = checkpoints.restore(step, shape)["params"]["w"]
            assert (restored == step).all()
            assert checkpoints.read_metadata(step, "data") == {"n_rows": step}
            checkpoints.save(3, {"params": {"w": restored}}, {"data": {"n_rows": 3}})
        names = {path.name for path in folder.iterdir()}
        assert names in ({"1", "3"}, {"1", "2", "3"})
    assert interrupted >= 1
