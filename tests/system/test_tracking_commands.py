"""A record that survives interruption, and a speed that is training's alone."""

import subprocess
import sys


def test_importing_is_quick_and_silent():
    code = "import sys, tracking; assert not {'jax', 'tensorboardX'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
