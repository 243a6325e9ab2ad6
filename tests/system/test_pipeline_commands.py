"""Worker processes end with the script that started them; importing the pipeline is cheap."""

import os
import signal
import subprocess
import sys
import time

import pytest
from pipeline_cases import (
    ROOT,
    own_cache,  # noqa: F401
)

# Without a `__main__` guard, as in a notebook.
SCRIPT = """
from data.load import open_dataset
from data.pipeline import Pipeline

pipeline = Pipeline(open_dataset("digits"), batch_size=8, seed=0, in_memory=False, n_workers=2)
for batch in pipeline.train_batches(0, 10**9):
    print("ready", flush=True)
"""


def group(pgid: int) -> list[str]:
    """List the commands of a process group, without zombies."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in lines.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(pgid) and row[1][0] != "Z"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_script_that_was_ended(tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        assert len(group(process.pid)) >= 3
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # a terminal sends Ctrl-C to the whole group
        else:
            process.kill()
        process.stdout.close()
        process.wait(timeout=60)
    deadline = time.monotonic() + 20
    while group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert group(process.pid) == []


def test_importing_the_pipeline_loads_neither_jax_nor_the_large_libraries():
    code = "import sys, data.pipeline; print(*({'jax', 'datasets', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")
