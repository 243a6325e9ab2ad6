"""training.loop."""

from pathlib import Path
from typing import Any

from runtime import parallel, processes


def settings(config: Any) -> dict[str, Any]:
    """A config by its fields' names, as JSON takes them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()}


def begin(config: Any) -> None:
    """What comes before anything asks for a device: meeting the run's other processes, and keeping
    compiled programs.
    """
    processes.join(
        config.distributed,
        coordinator=config.coordinator,
        n_processes=config.n_processes,
        process_index=config.process_index,
    )
    parallel.keep_compiled()
