"""A log that survives interruption, and a speed of training alone."""

import subprocess
import sys


def test_importing_is_quick_and_silent():
    code = "import sys, training.tracking; assert not {'jax', 'tensorboardX'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_writer_of_events_does_not_import_torch(tmp_path):
    code = "import sys, pathlib, training.tracking as t; t._writer(pathlib.Path(sys.argv[1]), "
    code += "purge_step=None).close(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [*tmp_path.iterdir()]
