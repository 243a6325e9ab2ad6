"""A trained run → pictures.

    python generate.py --run runs/digits --labels 3 7 --n 16 --cfg_scale 2 --out grid.png
    python generate.py --run runs/coco --prompts "a cat on a sofa, from above" --n 4

Reads a run's `config.json` and newest checkpoint and nothing of training; `sample` is what the
trainer itself calls.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import cli
import images
import parallel
import text
from checkpoint import Checkpoints
from codec import Codec
from errors import UserError, unknown
from latents import Encoding
from model import Label, ModelConfig, graphdef, init_params
from run_folder import atomic, read_config
from sampling import SOLVERS, Solution, guided, initial_noise, time_grid
from showcase import captions
from text import Caption

Labels = Sequence[int] | Int[np.ndarray, "n"] | Caption


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn from a model; static, so each combination is compiled once.

    Args:
        solver: euler or heun.
        n_steps: steps of the solver.
        shift: of the time grid; above 1 spends more steps near the noise.
        interval: times between which guidance acts.
    """

    solver: str = "euler"
    n_steps: int = 50
    shift: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        if self.n_steps < 1:
            raise UserError(
                f"the number of sampling steps is {self.n_steps}; it must be at least 1"
            )


@partial(jax.jit, static_argnames=("config", "sampler", "guide", "trajectory"))
def draw(
    params: Any,
    label: Label,
    index: Int[Array, "b"],
    seed: Int[Array, ""],
    cfg_scale: Float[Array, ""],
    *,
    config: ModelConfig,
    sampler: Sampler,
    guide: bool,
    trajectory: bool,
) -> Solution:
    """One batch, from noise to pictures, as one compiled program."""
    model = nnx.merge(graphdef(config), params)

    def velocity(x, t, label):
        return model(x, jnp.full(x.shape[0], t), label)

    if guide:
        null = jax.tree.map(lambda x: jnp.full_like(x, config.n_classes), label)
        how = {"interval": sampler.interval, "together": jax.default_backend() != "cpu"}
        bound = guided(velocity, label, null, cfg_scale, **how)
    else:
        bound = partial(velocity, label=label)
    noise = initial_noise(seed, index, (config.image_size, config.image_size, config.channels))
    times = time_grid(sampler.n_steps, shift=sampler.shift)
    return SOLVERS[sampler.solver](bound, noise, times, trajectory=trajectory)


class Pictures(NamedTuple):
    """A `Solution` on the host: float32 in about −1 … 1."""

    x: Float[np.ndarray, "b h w c"]
    trajectory: Float[np.ndarray, "n+1 b h w c"] | None


def sample(
    params: Any,
    config: ModelConfig,
    labels: Labels,
    *,
    sampler: Sampler,
    mesh: parallel.Mesh,
    cfg_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 256,
    trajectory: bool = False,
    codec: Codec | None = None,
) -> Pictures:
    """Pictures of `labels`: ids of classes, or encoded captions; of a model of latents, as its
    `codec` decodes them.

    A picture is a function of the weights, its label, the seed and its place: that in `labels`,
    counted from `first`. Neither `batch_size` nor the number of devices changes it. Label
    `config.n_classes` is "no class"; `cfg_scale` 1 samples the conditional model in half the time.
    """
    labels = labels if isinstance(labels, Caption) else np.asarray(labels, np.int32)
    n = len(jax.tree.leaves(labels)[0])
    if not n:
        raise UserError("no labels to draw")
    if not math.isfinite(cfg_scale) or not 0 <= seed < 2**31:
        raise UserError(f"cfg_scale {cfg_scale} must be finite and seed {seed} in 0 … {2**31 - 1}")
    guide = cfg_scale != 1.0
    if guide and not (config.n_classes or config.text_width):
        raise UserError(
            f"cfg_scale {cfg_scale}: an unconditional model has no label to be guided by; "
            "leave it at 1"
        )
    config = replace(config, remat=False, unroll=1)
    size = -(-min(batch_size, n) // mesh.size) * mesh.size
    parts = []
    for start in range(0, n, size):
        index = np.arange(start, start + size, dtype=np.int32)
        rows = np.minimum(index, n - 1)  # the last batch is filled up with its last label
        label = jax.tree.map(lambda x, rows=rows: x[rows], labels)
        label, index = parallel.spread((label, first + index), mesh)
        solution = draw(
            params,
            label,
            index,
            seed,
            cfg_scale,
            config=config,
            sampler=sampler,
            guide=guide,
            trajectory=trajectory,
        )
        parts.append(parallel.fetch(solution))
    x = np.concatenate([part.x for part in parts])[:n]
    states = (
        np.concatenate([part.trajectory for part in parts], axis=1)[:, :n] if trajectory else None
    )
    if codec:
        x = codec.decode(x)
        states = None if states is None else codec.decode(states)
    return Pictures(x, states)


def label_ids(words: Sequence[int | str], names: Sequence[str], n_classes: int) -> list[int]:
    """Class names or numbers → numbers. A name wins over a number that is spelled the same.

    Raises:
        UserError: no such class.
    """
    # Without classes there is one label, the null label 0.
    ids = {str(i): i for i in range(n_classes or 1)} | {name: i for i, name in enumerate(names)}
    for word in words:
        if str(word) not in ids:
            raise unknown("label", word, names or [f"0 … {max(1, n_classes) - 1}"])
    return [ids[str(word)] for word in words]


def saved_model(run: Path) -> ModelConfig:
    """The shape of a run's model. Raises UserError where `config.json` does not describe one."""
    try:
        return ModelConfig(**read_config(run)["model_config"])
    except TypeError as error:
        raise UserError(f"the config.json of '{run}' is damaged: {error}") from None


def load_params(
    run: Path,
    config: ModelConfig,
    mesh: parallel.Mesh,
    *,
    ema: bool = True,
    step: int | None = None,
) -> tuple[int, Any]:
    """(step, weights) of a run's checkpoint, the newest if no step is named, averaged or raw."""
    item = "ema" if ema else "params"
    like = {item: parallel.abstract(partial(init_params, config, jax.random.key(0)), mesh)}
    with Checkpoints(run, read_only=True) as checkpoints:
        if step is None:
            step, items, _ = checkpoints.restore_newest(like)
        else:
            items = checkpoints.restore(checkpoints.pick(step), like)
    return step, items[item]


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures from a trained run.

    Args:
        run: the run's folder.
        labels: class names or numbers; all classes if not given. Each gets an equal share of n.
        prompts: captions, for a run that was trained on them; each in quotes.
        text_towers: where the run's text towers are now, if they have moved.
        vae: where the VAE of a run on latents is now, if it has moved.
        n: how many pictures.
        cfg_scale: guidance scale; 1 is none. Default: the run's own.
        n_steps: solver steps. Default: the run's own.
        seed: of the noise. The same seed gives the same pictures.
        out: where they go: .png is a grid with class names or prompts, .npz holds arr_0 (uint8
            images, n h w c) and arr_1 (labels, or the prompts' places).
        trajectory: a .gif of the way from noise to pictures.
        ema: use the averaged weights; False uses the raw ones.
        step: of the checkpoint; the newest if not given.
        solver: euler or heun. Default: the run's own.
        batch_size: pictures drawn at a time.
        fsdp: devices that share one copy of the weights. Default: the run's own, as far as there
            are so many.
    """

    run: Path
    labels: tuple[str, ...] = ()
    prompts: tuple[cli.Text, ...] = ()
    text_towers: tuple[str, ...] = ()
    vae: str | None = None
    n: int = 16
    cfg_scale: float | None = None
    n_steps: int | None = None
    seed: int = 0
    out: Path = Path("samples.png")
    trajectory: Path | None = None
    ema: bool = True
    step: int | None = None
    solver: str | None = None
    batch_size: int = 256
    fsdp: int | None = None


def check(config: GenerateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if config.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {config.out}: the name must end in .png (a grid) or .npz (arrays)")
    if config.trajectory and config.trajectory.suffix != ".gif":
        raise UserError(f"--trajectory {config.trajectory}: the name must end in .gif")
    for path in filter(None, (config.out, config.trajectory)):
        if not path.parent.is_dir():
            raise UserError(f"folder {path.parent} does not exist")
    for name in ("n", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.fsdp is not None and (config.fsdp < 1 or jax.device_count() % config.fsdp):
        raise UserError(f"--fsdp {config.fsdp} does not divide the {jax.device_count()} devices")


def spread(ids: Sequence[int], n: int) -> Int[np.ndarray, "n"]:
    """n labels, each id as often as the others, side by side."""
    share, rest = divmod(n, len(ids))
    return np.repeat(np.asarray(ids, np.int32), [share + (i < rest) for i in range(len(ids))])


class Subjects(NamedTuple):
    """What n pictures are of: each one's place in `names`, and what the model is told."""

    which: Int[np.ndarray, "n"]
    names: Sequence[str]
    labels: Labels


def subjects(config: GenerateConfig, run: dict[str, Any], model: ModelConfig) -> Subjects:
    """The labels or prompts asked for, each as often as the others.

    Raises:
        UserError: they are not what the run was trained on, or more than the pictures.
    """
    if config.prompts and not model.text_width:
        raise UserError("this run was trained without captions; choose classes by --labels")
    if model.text_width and (config.labels or not config.prompts):
        raise UserError('this run was trained on captions; say what to draw by --prompts "…"')
    if config.n < len(config.prompts or config.labels):
        raise UserError(f"--n {config.n} is fewer than the labels or prompts that it is to show")
    if not config.prompts:
        names = run["dataset"]["label_names"]
        ids = label_ids(config.labels, names, model.n_classes) or range(max(1, model.n_classes))
        which = spread(ids, config.n)
        return Subjects(which, names, which)
    names, which = config.prompts, spread(range(len(config.prompts)), config.n)
    towers = config.text_towers or run["text_towers"]
    if len(towers) != len(run["text_revisions"]):
        raise UserError(
            f"--text_towers: the run has {len(run['text_revisions'])}, not {len(towers)}"
        )
    encoded = text.encode(names, towers, run["text_revisions"], length=model.text_length)
    return Subjects(which, names, jax.tree.map(lambda x: x[which], encoded))


def write(out: Path, pictures, labels, names: Sequence[str]) -> None:
    """A grid with names, or the arrays in the layout of the ADM evaluation suite."""
    if out.suffix == ".png":
        images.save_png(images.grid(pictures, captions=captions(labels, names)), out)
    else:
        with atomic(out) as file:
            np.savez(file, arr_0=pictures, arr_1=np.asarray(labels, np.int64))


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turns what the system says of a path into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(config: GenerateConfig) -> None:
    """Load, draw, write."""
    check(config)
    parallel.keep_compiled()
    run = read_config(config.run)
    model = saved_model(config.run)
    which, names, labels = subjects(config, run, model)
    mesh = parallel.make_mesh(config.fsdp or math.gcd(run["fsdp"], jax.device_count()))
    codec = None
    if encoding := run["dataset"].get("encoding"):
        codec = Codec.of(Encoding.of(encoding), mesh, vae=config.vae or run["vae"])
    elif config.vae:
        raise UserError(f"--vae {config.vae}: the run was trained on pictures, not on latents")
    step, params = load_params(config.run, model, mesh, ema=config.ema, step=config.step)
    sampler = Sampler(
        solver=config.solver or run["solver"],
        n_steps=run["n_sample_steps"] if config.n_steps is None else config.n_steps,
        shift=run["sample_shift"],
    )
    pictures = sample(
        params,
        model,
        labels,
        sampler=sampler,
        mesh=mesh,
        cfg_scale=run["cfg_scale"] if config.cfg_scale is None else config.cfg_scale,
        seed=config.seed,
        batch_size=config.batch_size,
        trajectory=config.trajectory is not None,
        codec=codec,
    )
    with unwritable(config.out):
        write(config.out, images.to_uint8(pictures.x), which, names)
    print(f"{config.n} pictures from step {step} of {config.run}: {config.out}")
    if config.trajectory and pictures.trajectory is not None:
        states = images.to_uint8(pictures.trajectory)
        frames = [images.grid(x, captions=captions(which, names)) for x in states]
        with unwritable(config.trajectory):
            images.save_gif(frames, config.trajectory)
        print(f"their way from noise: {config.trajectory}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(GenerateConfig)))
