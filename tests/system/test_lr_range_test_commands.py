"""`train.py --lr_range_test` suggests a learning rate and starts no run."""

import json

import pytest
from commands import NANO, SMALL, run

from runtime import run_folder
from runtime.errors import UserError


@pytest.mark.slow
def test_the_command_suggests_a_rate_and_leaves_no_run(tmp_path, cache):
    folder = tmp_path / "run"
    flags = [*SMALL, "--run_dir", folder, "--lr_range_test", 40]
    done = run(NANO, *flags, cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("--learning_rate ") and "lowest at" in done.stdout
    assert {path.name for path in (folder / "lr_range_test").iterdir()} == {
        "loss.png",
        "points.json",
    }
    points = json.loads((folder / "lr_range_test" / "points.json").read_text())
    assert len(points["rates"]) == len(points["losses"]) == 40
    assert f"--learning_rate {points['suggested']:.1e} " in done.stdout
    # The loss before the first step is that of an output of zeros: the mean square of noise − data.
    assert points["losses"][0] > 1.5 and min(points["losses"]) < 0.95 * points["losses"][0]
    run_folder.require_unused(folder)  # a run may begin here
    with pytest.raises(UserError, match="is not a run"):
        run_folder.read_config(folder)
