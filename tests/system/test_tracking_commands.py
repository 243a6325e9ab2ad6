"""A log that survives interruption, and a speed of training alone."""

import subprocess
import sys


def test_importing_is_quick_and_silent():
    code = "import sys, training.tracking; assert not {'jax', 'tensorboardX'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
