"""Importing the table of datasets is cheap."""

import subprocess
import sys


def test_the_table_needs_no_library():
    code = (
        "import sys, datasets_config; sys.exit('numpy' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
