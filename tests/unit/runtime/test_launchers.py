"""One of several tasks of a launcher does not train alone unless it is asked to."""

import jax
import pytest

from runtime import launchers, processes
from runtime.errors import UserError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (SLURM, "task 1 of 2 of SLURM, .* pass --distributed for one run"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "task 1 of 4 of SLURM"),
        (MPI, "task 0 of 8 of Open MPI, .* pass --distributed for"),
        (TORCHRUN, "task 3 of 4 of torchrun, .* pass --coordinator HOST:PORT --n_processes N"),
        (SLURM | TORCHRUN, "task 3 of 4 of torchrun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "task 0 of 2 of MPI, .* pass --coordinator"),
        ({"JOB_COMPLETION_INDEX": "1"}, "pod 1 of an indexed Kubernetes job"),
    ],
)
def test_a_task_among_others_is_refused(environ, message):
    with pytest.raises(UserError, match=message) as error:
        launchers.require_single_task(environ)
    assert "--n_processes 1 for a run of each" in str(error.value)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a job of two
        {"SLURM_NTASKS": "2"},  # a shell that holds an allocation
        SLURM | {"SLURM_NTASKS": ""},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "2"},  # left over in a shell
        {"JOB_COMPLETION_INDEX": "0"},  # perhaps the only pod
        {"JOB_COMPLETION_INDEX": "first"},
    ],
)
def test_a_task_that_may_be_the_only_one_runs(environ):
    launchers.require_single_task(environ)


def test_the_flags_choose(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="task 1 of 2 of SLURM"):
        processes.join_cluster()
    processes.join_cluster(n_processes=1)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: joined.append(args))
    processes.join_cluster(True)
    processes.join_cluster(coordinator="a:1", n_processes=2, process_index=1)
    assert joined == [(None, None, None), ("a:1", 2, 1)]
