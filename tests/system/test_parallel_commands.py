"""The numbers are the same on any number of devices and for any sharding of the weights."""

import numpy as np
import pytest
from commands import free_port, start
from parallel_cases import CONFIGS, MESHES, assert_same_reports, steps


@pytest.mark.slow
def test_two_processes_of_four_devices_report_what_one_device_reports(tmp_path):
    """FSDP inside each process, and the data axis across them."""
    script = "tests/support/two_processes.py"
    cache = tmp_path / "xla"
    port = free_port()
    pair = [start(script, port, index, tmp_path, cache=cache, n_devices=4) for index in (0, 1)]
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name, config in CONFIGS.items():
        with np.load(tmp_path / f"{name}.npz") as got:
            assert_same_reports(got, steps(config, MESHES["1 device"])["reports"])
