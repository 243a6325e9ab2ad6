"""An average of a run's weights of any width, made of snapshots of two or more that it kept
(Karras et al. 2024, §3.2).

Writes nothing. The mathematics is `networks.power_ema`.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from networks import power_ema
from networks.power_ema import MAX_STD, Profiles, gamma_of_std
from runtime import parallel
from runtime.checkpoint import PROFILES_ITEM, SNAPSHOTS_FOLDER, Checkpoints, DamageError
from runtime.errors import UserError

MAX_ERROR = 0.1  # of a profile, relative to its norm
MIN_STD = 1e-3  # narrower averages are all but the weights themselves
NEGLIGIBLE = 1e-9  # a weight below the rounding of the sum


def check_std(std: float) -> None:
    """Raises UserError if there is no average of this relative width."""
    if not MIN_STD <= std < MAX_STD:
        raise UserError(
            f"--ema_std {std:g}: must be at least {MIN_STD:g}, and below {MAX_STD:.4f}, the width "
            "of a plain mean"
        )


def load_average(
    run: Path, like: Any, mesh: parallel.Mesh, std: float, *, step: int | None = None
) -> tuple[int, Any]:
    """Make the average of relative width `std` at the snapshot of `step`, by default the newest, of
    the snapshots up to there.

    They are read one after the other and summed in float32, so that memory holds one of them
    besides the sum.

    Args:
        like: shapes, types and shardings of the weights.

    Returns the snapshot's step, and the weights.

    Raises:
        UserError: there is no such snapshot, one cannot be read, or they are too few for this
            width.
    """
    with Checkpoints(run, folder=SNAPSHOTS_FOLDER, read_only=True) as snapshots:
        last = snapshots.resolve_step(step)
        weights = weigh_snapshots(snapshots, std, last)
        zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), like)
        total = parallel.create_sharded(zeros, mesh)
        for each, shares in weights.items():
            total = add_weighted(total, read_averages(snapshots, each, like, len(shares)), shares)
    return last, total


def find_snapshot(run: Path, stds: Sequence[float], step: int | None = None) -> int:
    """Return the step of the newest snapshot, or `step`, whose averages give one of each relative
    width.

    Raises:
        UserError: see `load_average`.
    """
    with Checkpoints(run, folder=SNAPSHOTS_FOLDER, read_only=True) as snapshots:
        last = snapshots.resolve_step(step)
        for std in stds:
            weigh_snapshots(snapshots, std, last)
    return last


def weigh_snapshots(
    snapshots: Checkpoints, std: float, last: int
) -> dict[int, Float32[np.ndarray, "n"]]:
    """Return, by step, the weights of each snapshot's averages in the sum, without snapshots that
    add nothing.

    Raises:
        UserError: see `load_average`.
    """
    # Steps between which every update was skipped have the same averages: the last one counts.
    step_of: dict[int, int] = {}
    stds: list[float] = []
    for step in sorted(each for each in snapshots.manager.all_steps() if each <= last):
        with _explaining_damage(snapshots, step):
            record = snapshots.read_metadata(step, PROFILES_ITEM)
        step_of[record["n_updates"]] = step
        stds = record["ema_std"]
    step_of.pop(0, None)
    if not step_of:
        raise UserError(f"--ema_std {std:g}: no update had moved the weights by step {last}")
    times, gammas = np.array([*step_of], np.float64), [gamma_of_std(each) for each in stds]
    tracked = Profiles(np.repeat(times, len(gammas)), np.tile(gammas, len(times)))
    wanted = Profiles(times[-1:], np.array([gamma_of_std(std)]))
    weights, error = power_ema.solve_weights(tracked, wanted)
    if error > MAX_ERROR:
        raise UserError(
            f"--ema_std {std:g}: snapshots of widths {' '.join(f'{each:g}' for each in stds)} "
            f"({len(times)} by step {last}) would give it with an error of {error:.0%}; take a "
            "width nearer to those, or train with a smaller --snapshot_every"
        )
    by_step = dict(zip(step_of.values(), weights.reshape(len(times), -1).astype(np.float32)))
    return {step: shares for step, shares in by_step.items() if abs(shares).max() > NEGLIGIBLE}


def read_averages(snapshots: Checkpoints, step: int, like: Any, n: int) -> tuple[Any, ...]:
    """Read the n averages of a snapshot."""
    with _explaining_damage(snapshots, step):
        return snapshots.restore(step, {"power_ema": (like,) * n})["power_ema"]


@contextmanager
def _explaining_damage(snapshots: Checkpoints, step: int) -> Generator[None]:
    """Tell a person what to do about a snapshot that cannot be read."""
    try:
        yield
    except DamageError as error:
        if not (snapshots.folder / str(step)).exists():
            raise UserError(
                f"{snapshots.folder / str(step)} is gone: the run went back to an earlier "
                "checkpoint meanwhile; repeat the command"
            ) from None
        raise UserError(f"{error}; move this folder away to do without it") from None


@partial(jax.jit, donate_argnums=0)
def add_weighted(total: Any, averages: tuple[Any, ...], weights: Float[Array, "n"]) -> Any:
    """total + Σ weightᵢ·averageᵢ, leaf by leaf."""
    return jax.tree.map(
        lambda sum_, *leaves: sum_ + sum(w * x for w, x in zip(weights, leaves)), total, *averages
    )
