"""All the pictures of a run that an evaluation looks at: as many of each class, drawn in batches,
and kept so that an interrupted drawing goes on.

    pictures = drawn.of_run(Path("runs/digits"), DrawConfig(n=1000), mesh)
"""

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

import generate
import images
import parallel
from errors import UserError
from metrics.pictures import Batch, PictureSet, written
from model import ModelConfig
from run_folder import atomic, read_config


@dataclass(frozen=True)
class DrawConfig:
    """What to draw, and how; what is None is as in the run.

    Args:
        n: how many pictures.
        step: of the checkpoint; the newest if None.
        vae: where the VAE of a run on latents is now, if it has moved.
    """

    n: int
    step: int | None = None
    ema: bool = True
    cfg_scale: float | None = None
    n_steps: int | None = None
    solver: str | None = None
    seed: int = 0
    vae: str | None = None
    batch_size: int = 64


def of_run(
    folder: Path, config: DrawConfig, mesh: parallel.Mesh, *, samples: Path | None = None
) -> PictureSet:
    """The pictures, which are drawn as they are asked for.

    Args:
        samples: an .npz that they are written to. Until it is whole, they are kept beside it.

    Raises:
        UserError: the folder is no run, or one that this cannot draw from.
    """
    c, run, model = config, read_config(folder), generate.saved_model(folder)
    if model.text_width:
        raise UserError(
            "this run was trained on captions, and which to draw is not known here: let "
            "generate.py write an .npz, and pass it by --npz"
        )
    codec = generate.codec_of(run, c.vae, mesh)
    step, params = generate.load_params(folder, model, mesh, ema=c.ema, step=c.step)
    how, labels = drawing(run, c), by_turns(model, c.n)
    size = min(c.batch_size, c.n)

    def draw(start: int) -> Batch:
        # The last batch is filled up, so that all are one compiled program.
        some = labels[np.minimum(np.arange(start, start + size), c.n - 1)]
        place = {"first": start, "batch_size": size, "mesh": mesh, "codec": codec}
        found = generate.sample(params, model, some, **how, **place)
        return images.to_uint8(found.x[: c.n - start])

    card = how | {"sampler": asdict(how["sampler"]), "run": str(folder), "step": step, "ema": c.ema}
    card |= {name: run.get(name) for name in ("dataset_name", "model", "ema_decay")}
    card |= {"vae": {"id": codec.id, "hash": codec.hash} if codec else None, "count": c.n}
    starts = range(0, c.n, size)
    if samples is None:
        return PictureSet(c.n, lambda _: map(draw, starts), card)
    return PictureSet(c.n, lambda _: kept(draw, starts, samples, labels, card), card)


def drawing(run: dict[str, Any], config: DrawConfig) -> dict[str, Any]:
    """How `generate.sample` shall draw: what is not said is as in the run."""
    c = config
    return {
        "sampler": generate.sampler_of(run, solver=c.solver, n_steps=c.n_steps),
        "cfg_scale": run["cfg_scale"] if c.cfg_scale is None else c.cfg_scale,
        "seed": c.seed,
    }


def by_turns(model: ModelConfig, n: int) -> Int32[np.ndarray, "n"]:
    """n labels, one of each class after the other: any stretch of them is balanced."""
    return np.arange(n, dtype=np.int32) % max(1, model.n_classes)


def kept(
    draw: Callable[[int], Batch],
    starts: range,
    samples: Path,
    labels: Int32[np.ndarray, "n"],
    card: dict[str, Any],
) -> Generator[Batch]:
    """The batches, which are written to `samples` too. What an earlier process drew is read."""
    parts = samples.with_name(f"{samples.name}.parts")
    yield from written(resumed(draw, starts, parts, card), samples, labels)
    shutil.rmtree(parts)


def resumed(
    draw: Callable[[int], Batch], starts: range, folder: Path, card: dict[str, Any]
) -> Generator[Batch]:
    """The batches, each kept in a file of the folder and drawn if it is not there.

    Raises:
        UserError: the folder was begun with other settings.
    """
    told, file = json.dumps(card | {"batch_size": starts.step}, indent=2), folder / "card.json"
    if file.exists() and file.read_text() != told:
        raise UserError(
            f"'{folder}' was begun with other settings, which its card.json tells: go on with "
            "those, remove it, or name another --samples"
        )
    folder.mkdir(exist_ok=True)
    with atomic(file) as record:
        record.write(told.encode())
    for start in starts:
        part = folder / f"{start:09}.npy"
        if part.exists():
            yield np.load(part)
            continue
        batch = draw(start)
        with atomic(part) as whole:
            np.save(whole, batch)
        yield batch
