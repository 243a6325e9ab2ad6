"""Tasks that a launcher started together, as its environment variables tell.

Without a flag each task would train a run of its own, and all of them in the same minute into
folders of the same name. Nothing is joined here; `processes` does that.
"""

from collections.abc import Mapping
from typing import NamedTuple

from runtime.errors import UserError

DETECTED = "--distributed"
BY_HAND = "--coordinator HOST:PORT --n_processes N --process_index I"


class Launcher(NamedTuple):
    """A program that starts several tasks of one command.

    Args:
        counts: variables with the number of tasks; the first one that is set counts.
        rank: the variable with the number of this task. A shell that only holds an allocation, in
            which nothing was started yet, has none.
        flags: the flags that join its tasks to one run.
    """

    name: str
    counts: tuple[str, ...]
    rank: str
    flags: str


# The innermost comes first: torchrun may run inside a SLURM job.
LAUNCHERS = (
    Launcher("torchrun", ("WORLD_SIZE",), "RANK", BY_HAND),
    Launcher("Open MPI", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK", DETECTED),
    # A step has its own number of tasks: `srun --ntasks=1` in a job of two is a single process.
    Launcher("SLURM", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID", DETECTED),
    Launcher("MPI", ("PMI_SIZE",), "PMI_RANK", BY_HAND),
)
# Kubernetes tells the pods of an indexed job their number, and not how many there are.
KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"


def require_single_task(environ: Mapping[str, str]) -> None:
    """Refuse to run alone as one of several tasks.

    Args:
        environ: the environment variables.

    Raises:
        UserError: a launcher has started other tasks of this command.
    """
    for launcher in LAUNCHERS:
        count = next((environ[name] for name in launcher.counts if name in environ), "")
        if count.isdecimal() and launcher.rank in environ:
            if int(count) > 1:
                task = f"task {environ[launcher.rank]} of {count} of {launcher.name}"
                raise _error(task, launcher.flags)
            return
    index = environ.get(KUBERNETES_INDEX, "")
    if index.isdecimal() and int(index) > 0:
        raise _error(f"pod {index} of an indexed Kubernetes job", f"{DETECTED} or {BY_HAND}")


def _error(task: str, flags: str) -> UserError:
    return UserError(
        f"this is {task}, and without a flag each would be a run of its own: pass {flags} for one "
        "run of all, or --n_processes 1 for a run of each"
    )
