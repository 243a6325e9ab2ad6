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
import diffusion
import images
import parallel
import text
from checkpoint import Checkpoints
from codec import Codec
from errors import UserError, unknown
from latents import Encoding
from model import Label, ModelConfig, graphdef, init_params
from run_folder import atomic, read_config
from sampling import (
    DESCENTS,
    SOLVERS,
    Solution,
    Velocity,
    guided,
    initial_noise,
    step_noise,
    time_grid,
)
from showcase import captions
from text import Caption

Labels = Sequence[int] | Int[np.ndarray, "n"] | Caption


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn from a model; static, so each combination is compiled once.

    Args:
        solver: euler or heun; ddpm or ddim for a model that is trained by DDPM.
        n_steps: steps of the solver.
        shift: of the time grid; above 1 spends more steps near the noise.
        interval: times between which guidance acts.
        prediction: of `diffusion.PREDICTIONS`; None for a velocity.
        eta: of ddim: how much fresh noise, from 0 to 1.
        guided_channels: how many of a picture's channels are guided; by default all.
        clip: what ddpm and ddim take the data for, to where pictures are.
    """

    solver: str = "euler"
    n_steps: int = 50
    shift: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    prediction: str | None = None
    eta: float = 0.0
    guided_channels: int | None = None
    clip: bool = False

    def __post_init__(self):
        fitting = DESCENTS if self.prediction else SOLVERS
        if self.solver not in SOLVERS | DESCENTS:
            raise unknown("solver", self.solver, SOLVERS | DESCENTS)
        if self.prediction not in (None, *diffusion.PREDICTIONS):
            raise unknown("prediction", self.prediction, diffusion.PREDICTIONS)
        if self.solver not in fitting:
            trained = "DDPM" if self.prediction else "rectified flow"
            raise UserError(
                f"--solver {self.solver} is not for a model trained by {trained}, which takes one "
                f"of: {', '.join(fitting)}"
            )
        if self.n_steps < 1:
            raise UserError(
                f"the number of sampling steps is {self.n_steps}; it must be at least 1"
            )
        if self.prediction and self.n_steps > diffusion.N_STEPS:
            raise UserError(
                f"the number of sampling steps is {self.n_steps}; DDPM has {diffusion.N_STEPS}"
            )
        if self.eta and self.solver != "ddim":
            raise UserError(f"--eta {self.eta} is for --solver ddim")
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta {self.eta}: must be between 0 and 1")


@partial(jax.jit, static_argnames=("config", "sampler", "guide", "trajectory"))
def draw(
    params: Any,
    label: Label,
    index: Int[Array, "b"],
    seed: Int[Array, ""],
    cfg_scale: Float[Array, ""],
    null: Label | None = None,
    *,
    config: ModelConfig,
    sampler: Sampler,
    guide: bool,
    trajectory: bool,
) -> Solution:
    """One batch, from noise to pictures, as one compiled program."""
    model = nnx.merge(graphdef(config), params)

    def predict(x, t, label):
        return model(x, jnp.full(x.shape[0], t), label)

    if guide:
        if null is None:
            null = jax.tree.map(lambda x: jnp.full_like(x, config.n_classes), label)
        # A variance is not guided.
        more = config.channels if config.out_channels > config.channels else None
        how = {"interval": sampler.interval, "channels": sampler.guided_channels or more}
        together = jax.default_backend() != "cpu"
        bound = guided(predict, label, null, cfg_scale, together=together, **how)
    else:
        bound = partial(predict, label=label)
    shape = (config.image_size, config.image_size, config.channels)
    return solve(bound, index, seed, shape, sampler=sampler, trajectory=trajectory)


def solve(
    predict: Velocity,
    index: Int[Array, "b"],
    seed: Int[Array, ""],
    shape: tuple[int, int, int],
    *,
    sampler: Sampler,
    trajectory: bool,
) -> Solution:
    """From noise to pictures by `predict(x, t)`: a velocity, or what else the sampler says."""
    noise = initial_noise(seed, index, shape)
    if sampler.prediction is None:
        times = time_grid(sampler.n_steps, shift=sampler.shift)
        return SOLVERS[sampler.solver](predict, noise, times, trajectory=trajectory)

    def read(x, at):
        how = {"prediction": sampler.prediction, "clip": sampler.clip}
        return diffusion.estimate(predict(x, diffusion.told(at.step)), x, at, **how)

    chain, renew = diffusion.chain(sampler.n_steps), step_noise(seed, index, shape)
    how = {"trajectory": trajectory} | ({"eta": sampler.eta} if sampler.eta else {})
    return DESCENTS[sampler.solver](read, noise, chain, renew, **how)


class Pictures(NamedTuple):
    """A `Solution` on the host: float32 in about −1 … 1."""

    x: Float[np.ndarray, "b h w c"]
    trajectory: Float[np.ndarray, "n+1 b h w c"] | None
    estimates: Float[np.ndarray, "n b h w c"] | None


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
    null: Caption | None = None,
    batch_size: int = 256,
    trajectory: bool = False,
    estimates: bool = False,
    codec: Codec | None = None,
) -> Pictures:
    """Pictures of `labels`: ids of classes, or encoded captions; of a model of latents, as its
    `codec` decodes them.

    A picture is a function of the weights, its label, the seed and its place: that in `labels`,
    counted from `first`. Neither `batch_size` nor the number of devices changes it. Label
    `config.n_classes` is "no class"; `cfg_scale` 1 samples the conditional model in half the time.

    Args:
        null: one encoded caption, as long as the others, that guidance leads away from; by default
            the null label. For the published SD3 it is that of "".
        trajectory: whether all states are wanted too.
        estimates: whether that is what each step takes the picture for.
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
    require_channels(sampler, config, guide)
    config = replace(config, remat=False, unroll=1)
    size = -(-min(batch_size, n) // mesh.size) * mesh.size
    nulls = jax.tree.map(lambda x: np.repeat(x, size, axis=0), null)
    parts = []
    for start in range(0, n, size):
        index = np.arange(start, start + size, dtype=np.int32)
        rows = np.minimum(index, n - 1)  # the last batch is filled up with its last label
        label = jax.tree.map(lambda x, rows=rows: x[rows], labels)
        label, index, away = parallel.spread((label, first + index, nulls), mesh)
        solution = draw(
            params,
            label,
            index,
            seed,
            cfg_scale,
            away,
            config=config,
            sampler=sampler,
            guide=guide,
            trajectory=trajectory or estimates,
        )
        parts.append(parallel.fetch(solution))

    def whole(field: str, axis: int) -> Float[np.ndarray, "..."]:
        x = np.concatenate([getattr(part, field) for part in parts], axis=axis)
        x = np.take(x, range(n), axis=axis)
        return codec.decode(x) if codec else x

    return Pictures(
        whole("x", 0),
        whole("trajectory", 1) if trajectory else None,
        whole("estimates", 1) if estimates else None,
    )


def require_channels(sampler: Sampler, config: ModelConfig, guide: bool) -> None:
    """Raises UserError if so many channels cannot be guided."""
    n = sampler.guided_channels
    if n is not None and not guide:
        raise UserError(f"--guided_channels {n}: without guidance (cfg_scale 1) none is guided")
    if n is not None and not 1 <= n <= config.channels:
        raise UserError(f"--guided_channels {n}: the model's pictures have {config.channels}")


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
        estimates: a .gif of what each step on that way takes the pictures for.
        ema: use the averaged weights; False uses the raw ones.
        step: of the checkpoint; the newest if not given.
        solver: euler or heun, or ddpm or ddim after training by DDPM. Default: the run's own.
        eta: fresh noise of ddim, from 0 (none) to 1 (as much as ddpm).
        guided_channels: guide the first so many; by default all. Published DiTs are for 3.
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
    estimates: Path | None = None
    ema: bool = True
    step: int | None = None
    solver: str | None = None
    eta: float = 0.0
    guided_channels: int | None = None
    batch_size: int = 256
    fsdp: int | None = None


def check(config: GenerateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if config.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {config.out}: the name must end in .png (a grid) or .npz (arrays)")
    for name in ("trajectory", "estimates"):
        path = getattr(config, name)
        if path and path.suffix != ".gif":
            raise UserError(f"--{name} {path}: the name must end in .gif")
    for path in filter(None, (config.out, config.trajectory, config.estimates)):
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


def codec_of(run: dict[str, Any], vae: str | None, mesh: parallel.Mesh) -> Codec | None:
    """What decodes a run's latents; None where it draws pictures."""
    if encoding := run["dataset"].get("encoding"):
        return Codec.of(Encoding.of(encoding), mesh, vae=vae or run["vae"])
    if vae:
        raise UserError(f"--vae {vae}: the run was trained on pictures, not on latents")
    return None


def sampler_of(
    run: dict[str, Any], *, solver: str | None, n_steps: int | None, **how: Any
) -> Sampler:
    """How a run's pictures are drawn: as it says itself, but for what is asked for."""
    return Sampler(
        solver=solver or run["solver"],
        n_steps=run["n_sample_steps"] if n_steps is None else n_steps,
        shift=run["sample_shift"] or 1.0,
        prediction=run.get("prediction"),  # which runs of rectified flow do without
        clip=not run["dataset"].get("encoding"),
        **how,
    )


class Subjects(NamedTuple):
    """What n pictures are of: each one's place in `names`, what the model is told, and what instead
    if it is to be no picture in particular (None: the null label).
    """

    which: Int[np.ndarray, "n"]
    names: Sequence[str]
    labels: Labels
    null: Caption | None = None


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
    encoded = encode([*names, ""], config.text_towers or run["text_towers"], run, model)
    # To SD3 no prompt is an empty one.
    null = jax.tree.map(lambda x: x[-1:], encoded) if run.get("full_width") else None
    return Subjects(which, names, jax.tree.map(lambda x: x[which], encoded), null)


def encode(
    prompts: Sequence[str], towers: Sequence[str], run: dict[str, Any], model: ModelConfig
) -> Caption:
    """What the model is told by prompts. SD3 does without the last of its towers, T5.

    Raises:
        UserError: the towers are others than the run's.
    """
    full_width, known = run.get("full_width"), run["text_revisions"]
    if len(towers) not in (len(known), len(known) - bool(full_width)):
        raise UserError(f"--text_towers: the run has {len(known)}, not {len(towers)}")
    how = {"length": model.text_length, "full_width": full_width}
    encoded = text.encode(prompts, towers, known[: len(towers)], **how)
    n_token, n_pooled = encoded.tokens.shape[-1], encoded.pooled.shape[-1]
    if (n_token, n_pooled) != (model.text_width, model.pooled_width):
        raise UserError(
            f"the text towers {', '.join(towers)} give {n_token} channels of a token and "
            f"{n_pooled} of the pooled vector; the model takes {model.text_width} and "
            f"{model.pooled_width}"
        )
    return encoded


def write(out: Path, pictures, labels, names: Sequence[str]) -> None:
    """A grid with names, or the arrays in the layout of the ADM evaluation suite."""
    if out.suffix == ".png":
        images.save_png(images.grid(pictures, captions=captions(labels, names)), out)
    else:
        with atomic(out) as file:
            np.savez(file, arr_0=pictures, arr_1=np.asarray(labels, np.int64))


def write_gif(out: Path, states, labels, names: Sequence[str]) -> None:
    """Pictures in −1 … 1 at each step, as grids with names."""
    frames = [images.grid(images.to_uint8(x), captions=captions(labels, names)) for x in states]
    with unwritable(out):
        images.save_gif(frames, out)


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
    which, names, labels, null = subjects(config, run, model)
    mesh = parallel.make_mesh(config.fsdp or math.gcd(run["fsdp"], jax.device_count()))
    codec = codec_of(run, config.vae, mesh)
    step, params = load_params(config.run, model, mesh, ema=config.ema, step=config.step)
    pictures = sample(
        params,
        model,
        labels,
        sampler=sampler_of(
            run,
            solver=config.solver,
            n_steps=config.n_steps,
            eta=config.eta,
            guided_channels=config.guided_channels,
        ),
        mesh=mesh,
        cfg_scale=run["cfg_scale"] if config.cfg_scale is None else config.cfg_scale,
        seed=config.seed,
        null=null,
        batch_size=config.batch_size,
        trajectory=config.trajectory is not None,
        estimates=config.estimates is not None,
        codec=codec,
    )
    with unwritable(config.out):
        write(config.out, images.to_uint8(pictures.x), which, names)
    print(f"{config.n} pictures from step {step} of {config.run}: {config.out}")
    if config.trajectory and pictures.trajectory is not None:
        write_gif(config.trajectory, pictures.trajectory, which, names)
        print(f"their way from noise: {config.trajectory}")
    if config.estimates and pictures.estimates is not None:
        write_gif(config.estimates, pictures.estimates, which, names)
        print(f"what they were taken for on that way: {config.estimates}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(GenerateConfig)))
