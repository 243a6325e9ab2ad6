"""A run started from existing weights computes what they compute. New parts start fresh, and what
cannot be fitted is named.
"""

import nano  # noqa: F401  (its sizes)
import pytest
from commands import NANO, SMALL, run
from warm_start_cases import trained  # noqa: F401


@pytest.mark.slow
def test_the_command_starts_from_a_run(trained, tmp_path, cache):
    folder, _ = trained
    flags = [*SMALL, "--n_steps", 2, "--init_from", folder, "--run_dir", tmp_path / "second"]
    flags = [word for word in flags if word not in ("--model", "DiT-Nano/8")]
    done = run(NANO, *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"--init_from: starting from the weights of step 0 of {folder}" in done.stdout
    done = run(NANO, *flags[:-2], "--model", "DiT-Ti/2", cache=cache)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --init_from step 0 of {folder}: its width is 32, ")
