"""The settings of `generate.py`: every flag, and what cannot be."""

from dataclasses import dataclass
from pathlib import Path

import jax

import drawn
from cli import Text
from errors import UserError
from run_folder import require_apart

MOST_SHOWN = 400  # pictures of a grid or a sheet
N, N_OF_SHEET = 16, 10


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures from a trained run, or from a published model.

    Args:
        run: the run's folder.
        pretrained: instead of a run: DiT or SD3 of the hub or of a folder, as diffusers has them or
            export.py writes them; or a file of the original DiT or SiT, such as
            dit:DiT-XL-2-256x256.pt.
        labels: class names or numbers; all classes if not given. Each gets an equal share of n.
        prompts: captions, for a model that was trained on them; each in quotes.
        negative_prompt: a caption that guidance leads away from, in place of the empty one.
        text_towers: where the model's text towers are, if elsewhere than it says.
        vae: where the VAE of a model of latents is, if elsewhere than it says.
        n: how many pictures; of a sheet, how many columns, by default one of each label, up to 10.
        seed: of the noise. The same seed gives the same pictures.
        seeds: one for each picture, in place of n and seed: a picture is then the same whatever
            else is drawn, and that of --seed with n 1.
        out: where they go: .png is a grid with class names or prompts; .npz holds arr_0 (uint8
            images, n h w c) and arr_1 (labels, or the prompts' places); a folder gets a file for
            each, and card.json with all that they depend on. An interrupted .npz or folder goes on.
        trajectory: a .gif of the way from noise to pictures.
        x0: a .gif of what each step on that way takes the pictures for.
        cfg_sweep: scales of guidance: a sheet with a row for each, from the same noise.
        denoise: times in 0 … 1: a sheet of real pictures of the evaluation split, noised up to
            each time, and what the model makes of them from there. --labels chooses classes.
        cfg_scale: guidance scale; 1 is none.
        interval: guide between two times only, such as 0.2 0.8; 1 is noise.
        guided_channels: guide the first so many; by default all. Published DiTs are for 3.
        solver: euler or heun, or ddpm or ddim after training by DDPM.
        n_steps: solver steps.
        shift: of rectified flow's time grid; above 1 spends more steps near the noise.
        eta: fresh noise of ddim, from 0 (none) to 1 (as much as ddpm).
        ema: use a run's averaged weights; False uses the raw ones.
        step: of a run's checkpoint; the newest if not given.
        batch_size: pictures drawn at a time, on all devices together.
        fsdp: devices that share one copy of the weights.
    """

    run: Path | None = None
    pretrained: str | None = None
    labels: tuple[str, ...] = ()
    prompts: tuple[Text, ...] = ()
    negative_prompt: Text | None = None
    text_towers: tuple[str, ...] = ()
    vae: str | None = None
    n: int | None = None
    seed: int | None = None
    seeds: tuple[int, ...] = ()
    out: Path = Path("samples.png")
    trajectory: Path | None = None
    x0: Path | None = None
    cfg_sweep: tuple[float, ...] = ()
    denoise: tuple[float, ...] = ()
    cfg_scale: float | None = None
    interval: tuple[float, ...] | None = None
    guided_channels: int | None = None
    solver: str | None = None
    n_steps: int | None = None
    shift: float | None = None
    eta: float | None = None
    ema: bool = True
    step: int | None = None
    batch_size: int = 256
    fsdp: int | None = None

    @property
    def sheet(self) -> str | None:
        """The flag of the sheet that is asked for."""
        return next((name for name in ("cfg_sweep", "denoise") if getattr(self, name)), None)


# What the help page says of values that are not given.
OWN = ("cfg_scale", "solver", "n_steps", "shift")
FILLED = dict.fromkeys(OWN, "the model's own") | {"seed": 0, "eta": 0, "interval": "0 1"}
FILLED |= {"n": N}
FILLED |= {"fsdp": "the run's own, as far as there are so many"}


def check(config: GenerateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if (config.run is None) == (config.pretrained is None):
        raise UserError("name a run's folder by --run, or a published model by --pretrained")
    if config.pretrained and (config.step is not None or not config.ema):
        raise UserError("--step and --ema choose among a run's weights; --pretrained has one set")
    for name in ("n", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if config.fsdp is not None and (config.fsdp < 1 or jax.device_count() % config.fsdp):
        raise UserError(f"--fsdp {config.fsdp} does not divide the {jax.device_count()} devices")
    for other in ("n", "seed"):
        if config.seeds and getattr(config, other) is not None:
            raise UserError(f"--seeds has one for each picture; drop --{other}")
    if config.labels and (config.prompts or config.negative_prompt is not None):
        raise UserError("--labels are of classes, and prompts are captions; pass one of them")
    _check_files(config)
    _check_sheet(config)
    shown = "a grid shows" if config.out.suffix == ".png" else "--trajectory and --x0 show"
    n = len(config.seeds) or config.n or N
    if n > MOST_SHOWN and (config.out.suffix == ".png" or config.trajectory or config.x0):
        raise UserError(
            f"{shown} at most {MOST_SHOWN} pictures, not {n}: name a folder or an .npz by --out, "
            "and no --trajectory or --x0"
        )


def _check_files(config: GenerateConfig) -> None:
    if config.out.suffix not in (".png", ".npz", "") and not config.out.is_dir():
        raise UserError(
            f"--out {config.out}: the name must end in .png (a grid) or .npz (arrays), or be a "
            "folder's"
        )
    for name in ("trajectory", "x0"):
        path = getattr(config, name)
        if path and path.suffix != ".gif":
            raise UserError(f"--{name} {path}: the name must end in .gif")
    for path in filter(None, (config.out, config.trajectory, config.x0)):
        if not path.parent.is_dir():
            raise UserError(f"folder {path.parent} does not exist")
        if path.is_dir() and path.suffix in (".png", ".npz", ".gif"):
            raise UserError(f"{path} is a folder; name a file")
    require_apart(config, written=("out", "trajectory", "x0"))
    if config.out.suffix not in (".png", ".npz"):
        drawn.require_ours(config.out)


def _check_sheet(config: GenerateConfig) -> None:
    if not config.sheet:
        return
    others = {"cfg_sweep": ("denoise", "cfg_scale", "trajectory", "x0")}
    others["denoise"] = ("trajectory", "x0", "prompts", "negative_prompt")
    for other in others[config.sheet]:
        if getattr(config, other) not in (None, ()):
            raise UserError(f"--{config.sheet} makes a sheet of its own; drop --{other}")
    if config.out.suffix != ".png":
        raise UserError(f"--out {config.out}: --{config.sheet} makes a sheet, a .png")
    if config.cfg_sweep and set(config.cfg_sweep) == {1}:
        raise UserError("--cfg_sweep 1: name a scale besides 1, which is no guidance")
    if wrong := [t for t in config.denoise if not 0 < t <= 1]:
        raise UserError(f"--denoise {wrong[0]:g}: a time must be above 0 and at most 1")
    n_rows = len(config.cfg_sweep) or 1 + 2 * len(config.denoise)
    n = len(config.seeds) or config.n or len(config.labels or config.prompts) or N_OF_SHEET
    if n * n_rows > MOST_SHOWN:
        raise UserError(f"a sheet of {n * n_rows} pictures is more than {MOST_SHOWN}; lower --n")
