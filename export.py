"""A trained run → a folder that others can load, and that can be uploaded as it is.

    python export.py --run runs/imagenet-… --out my-dit
    hf upload me/my-dit my-dit

What diffusers can compute is written as diffusers reads it, all else in this project's own layout.
`--init_from` of train.py and `pretrained.transformer.load` read both.
"""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from datasets_config import DATASET_CONFIGS, LatentEncoding
from inference.trained_model import TrainedModel
from model import ModelConfig
from pretrained import sd3, transformer
from runtime import cli, parallel
from runtime.errors import UserError
from runtime.files import atomic, atomic_folder
from training.config import DEFAULTS, FREE_ON_RESUME, PER_START, RECOMMENDED, TrainConfig
from training.resolve import derived

CARD = "README.md"
# Of a run's settings, what drawing needs, and what a reader of the folder may ask.
KEPT = (
    *("dataset_name", "dataset", "model", "vae", "text_towers", "text_revisions", "text_length"),
    *("fsdp", "objective", "prediction", "learned_sigma", "solver", "n_sample_steps"),
    *("sample_shift", "cfg_scale", "ema_decay"),
)
# What may change as a run goes on, and still is a part of what was trained.
OF_TRAINING = {"n_steps", "accumulate_steps", "latents"}


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's weights as others read them.

    Args:
        run: the run's folder.
        out: a new folder.
        ema: the averaged weights; False takes the raw ones.
        step: of the checkpoint; the newest if not given.
        layout: diffusers or own; by default diffusers where it can compute the model.
    """

    run: Path
    out: Path
    ema: bool = True
    step: int | None = None
    layout: Literal["diffusers", "own"] | None = None


def main(config: ExportConfig) -> None:
    """Load, write, tell."""
    c = config
    of = TrainedModel.of_run(c.run, ema=c.ema, step=c.step, fsdp=jax.device_count())
    run, model = of.settings, of.model
    layout, reason = choose(c, model)
    if c.out.exists() and not (c.out.is_dir() and not any(c.out.iterdir())):
        raise UserError(f"'{c.out}' already exists; name a new folder by --out")
    step, params = of.step, parallel.fetch(of.params)
    settings = {name: run[name] for name in KEPT if name in run} | {"step": step, "ema": c.ema}
    try:
        with atomic_folder(c.out) as folder:
            transformer.save(folder, model, params, settings, layout=layout)
            with atomic(folder / CARD) as file:
                n = sum(np.size(x) for x in jax.tree.leaves(params))
                file.write(card(c.out.name, run | settings, model, layout, n).encode())
    except OSError as error:
        raise UserError(f"cannot write '{c.out}': {error.strerror}") from None
    print(f"step {step} of {c.run} as {layout}: {c.out}")
    if reason and not c.layout:
        print(f"this is the project's own layout: {reason}")


def choose(config: ExportConfig, model: ModelConfig) -> tuple[str, str]:
    """The class to write, and what keeps it from being one of diffusers'.

    Raises:
        UserError: diffusers is asked for, and cannot hold the model.
    """
    layout, reason = transformer.layout_of(model)
    if config.layout == "diffusers" and reason:
        raise UserError(f"--layout diffusers: {reason}; leave --layout out for the project's own")
    return transformer.own_class(model) if config.layout == "own" else layout, reason


# --- the card -------------------------------------------------------------------------------------


def card(name: str, run: dict[str, Any], model: ModelConfig, layout: str, n_params: int) -> str:
    """What the folder's page on the hub says."""
    diffusers = "" if layout in transformer.OWN else f"\n{in_diffusers(layout, model)}"
    library = "diffusers" if diffusers else "jax"
    encoding = run["dataset"].get("encoding")
    params = f"{n_params / 1e6:.3g} M parameters"
    kind = "averaged (EMA)" if run["ema"] else "raw"
    return f"""---
library_name: {library}
tags:
- diffusion
- diffusion-transformer
- jax
---

# {name}

{run["model"]} trained on {run["dataset_name"]}: {params}, the {kind} weights of step {run["step"]}.
{subject(run, model, LatentEncoding.of(encoding) if encoding else None)}

It was trained by

```sh
{command(run)}
```

## Here

```sh
python generate.py --pretrained PATH_OR_ID {"--prompts …" if model.text_width else "--n 16"}
python train.py --init_from PATH_OR_ID …    # also on other classes
```

or, in Python,

```python
from pretrained import transformer

found = transformer.load("PATH_OR_ID")
model = found.model()  # model(x, t, label): pictures b h w c, t in 0 … 1
```
{diffusers}
## Licence

Its owner has not said yet. The data have their own terms.
"""


def subject(run: dict[str, Any], model: ModelConfig, encoding: LatentEncoding | None) -> str:
    """What it draws, and what it says."""
    size = f"{model.image_size}×{model.image_size}×{model.channels}"
    if encoding:
        what = (
            f"It draws latents of {size}, which the VAE `{encoding.vae}` decodes to pictures of "
            f"{encoding.image_size}×{encoding.image_size}\n(SHA-256 of its weights: "
            f"{encoding.vae_hash or 'not known'}). To the VAE go x / {encoding.scaling_factor} + "
            f"{encoding.shift_factor}."
        )
    else:
        what = f"It draws pictures of {size} in −1 … 1."
    if model.text_width:
        towers = ", ".join(f"`{tower}`" for tower in run["text_towers"])
        told = f"It is told captions, as {towers} encode them."
    elif model.n_classes:
        told = f"It is told one of {model.n_classes} classes, and {model.n_classes} for none."
    else:
        told = "It is told nothing."
    return f"{what} {told}\n{says(run, model)}"


def says(run: dict[str, Any], model: ModelConfig) -> str:
    """The meaning of its time and of its output."""
    if not run.get("prediction"):
        return (
            "Rectified flow: x_t = (1 − t)·data + t·noise, and it says the velocity noise − data; "
            "t = 1 is noise."
        )
    sigma = ", then where each step's variance lies" if model.out_channels > model.channels else ""
    return (
        f"DDPM with 1,000 steps, β from 1e-4 to 0.02: it says {run['prediction']}{sigma}. t is the "
        "step over 1,000."
    )


def in_diffusers(layout: str, model: ModelConfig) -> str:
    """How it is called there, and what must be set for it to compute the same."""
    load = f"""## In diffusers

```python
from diffusers import {layout}

model = {layout}.from_pretrained("PATH_OR_ID")
"""
    call = f"pictures b c h w and timestep = {model.time_scale:g}·t"
    if layout == sd3.CLASS:
        return f"""{load}```

`model(x, tokens, pooled, timestep)` takes {call}.
"""
    return f"""{load}for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
```

`model(x, timestep, class_labels)` takes {call}.
The last two lines are needed: diffusers spaces the frequencies of time a little otherwise than the
original DiT, whose spacing these weights were trained with, and its config has no word for that.
"""


def command(run: dict[str, Any]) -> str:
    """The command that a run was begun with, without what goes without saying."""
    run = {"objective": "rectified_flow"} | run  # the first runs had no choice of one
    name, recommended = run["dataset_name"], DATASET_CONFIGS.get(run["dataset_name"])
    unsaid = (FREE_ON_RESUME | PER_START) - OF_TRAINING
    usual = DEFAULTS | derived(run, "cpu")
    if recommended:
        usual |= {field: getattr(recommended, field) for field in RECOMMENDED}
    if run.get("latents"):  # which have a size of their own, and a model for it
        unsaid |= {"image_size", "channels"}
        usual["model"] = None
    said = {"dataset_name": name}
    for field in fields(TrainConfig):
        value = run.get(field.name)
        if value not in (None, []) and field.name not in unsaid and value != usual.get(field.name):
            said.setdefault(field.name, value)
    return " ".join(["python train.py", *(flag(*pair) for pair in said.items())])


def flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no'}{name}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(word)) for word in words)])


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(ExportConfig)))
