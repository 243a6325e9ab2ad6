"""Export a trained run as a folder that others can load and upload.

    python export.py --run runs/imagenet-… --out my-dit
    hf upload me/my-dit my-dit

Models that diffusers can compute are written in its format, all others in this project's own.
`--init_from` of train.py and `pretrained.transformer` read both. Nothing is uploaded here.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from inference.run_weights import Weights, load_params
from inference.trained_model import TrainedModel
from model import ModelConfig
from pretrained import sd3, transformer
from pretrained.lora import INNER_HEAD, save_adapter
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import atomic_file, atomic_folder
from runtime.flags import Derived, flag, flags_of
from training.config import TrainConfig
from training.flag_groups import CheckpointFlags, RunSourceFlags

CARD_FILE = "README.md"
# Settings of the run that sampling needs, or a reader of the folder may want to know.
EXPORTED_SETTINGS = (
    *("dataset_name", "dataset", "model", "vae", "text_towers", "text_revisions", "text_length"),
    *("full_width", "buckets"),
    # How its dataset is opened, to compare samples with its images.
    *("conditioning", "image_column", "label_column", "caption_column", "caption", "channels"),
    *("image_size", "crop", "train_split", "eval_split", "unlabelled"),
    *("fsdp", "objective", "method", "prediction", "learned_sigma", "solver", "n_sample_steps"),
    *("noise_scale", "sample_shift", "cfg_scale", "label_dropout", "null_is_trained", "ema_decay"),
    "route_share",
)
# Flags that the card leaves out: they do not shape the weights, and some are paths of this machine.
HIDDEN_FLAGS = {name for name, known in flags_of(TrainConfig).items() if known.may_change} - {
    *("n_steps", "n_epochs", "accumulate_steps", "latents", "teacher", "align", "decay_from"),
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RunSourceFlags, CheckpointFlags):
    """Export a run's weights for other people and programs."""

    out: Path | None = flag(
        None, "a new folder for the whole model; adapters (LoRA) are merged into their base"
    )
    lora: Path | None = flag(
        None, "instead: a new file for a run's adapters alone (LoRA), in the format of PEFT"
    )
    layout: Literal["diffusers", "own"] | None = flag(
        Derived("diffusers if it can compute the model"), "format of the folder"
    )


def main(config: ExportConfig) -> None:
    """Load the checkpoint, write the folder or the file, print where it is.

    Raises:
        UserError: the run, the layout, the folder or the file cannot be used.
    """
    c = config
    processes.start_backend()
    if (c.out is None) == (c.lora is None):
        raise UserError("export.py takes --out FOLDER, or --lora FILE.safetensors")
    if c.lora and c.layout:
        raise UserError(f"--layout {c.layout} is of --out; a file of --lora has PEFT's layout")
    trained = TrainedModel.from_run(
        c.run,
        ema=c.ema,
        ema_std=c.ema_std,
        step=c.step,
        base=c.base,
        fsdp=parallel.devices().count,
    )
    if c.lora:
        export_adapter(c, trained)
    else:
        export_model(c, trained)


def export_adapter(config: ExportConfig, trained: TrainedModel) -> None:
    """Write a run's adapters without their base.

    Raises:
        UserError: the run has none, or no such file can hold them.
    """
    c, file = config, Path(str(config.lora))
    network = ModelConfig.from_json(trained.settings["model_config"])
    if not network.lora:
        raise UserError(f"--lora {file}: '{c.run}' has no adapters; --out FOLDER exports its model")
    if file.suffix != ".safetensors" or file.exists():
        raise UserError(f"--lora {file}: name a new file that ends in .safetensors")
    step, adapter = load_params(
        c.run, network, trained.mesh, Weights(ema=c.ema, ema_std=c.ema_std, step=c.step)
    )
    adapter = parallel.fetch_to_host(adapter)
    if not parallel.is_finite(adapter):
        raise UserError(f"the adapters of step {step} of {c.run} hold NaN or infinity; pass --step")
    if INNER_HEAD in network.lora.full_parts:
        print("the inner head is left out: a file of adapters has none")
    save_adapter(file, adapter, network, trained.label_names)
    print(f"adapters of step {step} of {c.run}: {file}")


def export_model(config: ExportConfig, trained: TrainedModel) -> None:
    """Write the whole model.

    Raises:
        UserError: the layout or the folder cannot be used.
    """
    c, out = config, Path(str(config.out))
    layout, reason = select_layout(c, trained.model)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"'{out}' already exists; name a new folder by --out")
    run, step, params = trained.settings, trained.step, parallel.fetch_to_host(trained.params)
    network = trained.model
    if network.inner_head and layout not in transformer.OWN_CLASSES:
        print(f"the inner head is left out: {layout} has none")
        network = replace(network, inner_head=0)
        params = {name: part for name, part in params.items() if name != "inner"}
    if not parallel.is_finite(params):
        raise UserError(f"the weights of step {step} of {c.run} hold NaN or infinity; pass --step")
    settings = {name: run[name] for name in EXPORTED_SETTINGS if name in run}
    settings |= {"step": step, "ema": c.ema, "cfg_scale": trained.default_cfg_scale}
    if c.ema_std is not None:
        settings["ema_std"] = c.ema_std
    n_params = sum(np.size(x) for x in jax.tree.leaves(params))
    card = model_card(out.name, run | settings, trained, layout, n_params)
    try:
        with atomic_folder(out) as folder:
            transformer.save_transformer(folder, network, params, settings, layout=layout)
            with atomic_file(folder / CARD_FILE) as file:
                file.write(card.encode())
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror}") from None
    print(f"step {step} of {c.run} as {layout}: {out}")
    if reason and not c.layout:
        print(f"this is the project's own layout: {reason}")


def select_layout(config: ExportConfig, model: ModelConfig) -> tuple[str, str]:
    """Return the name of the class to write, and the reason if it cannot be one of diffusers'.

    Raises:
        UserError: --layout diffusers is given, and diffusers cannot hold the model.
    """
    if config.layout == "diffusers":
        model = replace(model, inner_head=0)
    layout, reason = transformer.choose_layout(model)
    if config.layout == "diffusers" and reason:
        raise UserError(f"--layout diffusers: {reason}; leave --layout out for the project's own")
    return transformer.own_class_name(model) if config.layout == "own" else layout, reason


# --- the card -------------------------------------------------------------------------------------


def model_card(
    name: str, run: dict[str, Any], trained: TrainedModel, layout: str, n_params: int
) -> str:
    """Return the Markdown text of the folder's page on the hub.

    Args:
        run: `config.json` of the run, with the exported `step` and `ema`.
        layout: the name of the class, of diffusers or of this project.
    """
    model = trained.model
    diffusers = "" if layout in transformer.OWN_CLASSES else f"\n{diffusers_section(layout, model)}"
    library = "diffusers" if diffusers else "jax"
    params = f"{n_params / 1e6:.3g} M parameters"
    weights = "averaged (EMA)" if run["ema"] else "raw"
    if trained.ema_std is not None:
        weights = f"averaged (EMA of relative width {trained.ema_std:g})"
    span = ", span" if model.takes_span else ""
    return f"""---
library_name: {library}
tags:
- diffusion
- diffusion-transformer
- jax
---

# {name}

{run["model"]} trained on {run["dataset_name"]}: {params}, the {weights} weights of step \
{run["step"]}.
{trained.space.describe(model)} {trained.conditioning.describe()}{untrained_null_note(trained)}
{trained.method.describe()}

It was trained by

```sh
{training_command(run)}
```

## Here

```sh
python generate.py --pretrained PATH_OR_ID {trained.conditioning.example or "--n 16"}
python train.py --init_from PATH_OR_ID …    # also on other classes
```

or, in Python,

```python
from pretrained import transformer

exported = transformer.load_transformer("PATH_OR_ID")
model = exported.model()  # model(x, t, label{span}): x is b h w c, t in 0 … 1
```
{diffusers}
## Licence

Not chosen yet by the owner. The training data have their own terms.
"""


def untrained_null_note(trained: TrainedModel) -> str:
    """Return the sentence that warns of guidance, for a model that cannot be guided."""
    if trained.null_is_trained or not trained.model.is_conditional:
        return ""
    return " No label was dropped in training: sample it without guidance (scale 1)."


def diffusers_section(layout: str, model: ModelConfig) -> str:
    """Return the card's section on diffusers: how to load the model, and what to set so that it
    computes the same.
    """
    load = f"""## In diffusers

```python
from diffusers import {layout}

model = {layout}.from_pretrained("PATH_OR_ID")
"""
    inputs = f"inputs as b c h w and timestep = {model.time_scale:g}·t"
    arguments = (
        "x, tokens, pooled, timestep" if layout == sd3.CLASS else "x, timestep, class_labels"
    )
    call = f"`model({arguments})` takes {inputs}."
    if layout == sd3.CLASS or model.time_endpoint:
        return f"{load}```\n\n{call}\n"
    return f"""{load}for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
```

{call}
The last two lines are needed: these weights were trained with the frequencies of the original DiT's
time embedding. Those of diffusers are spaced a little differently, and its config cannot set them.
"""


def training_command(run: dict[str, Any]) -> str:
    """Return the command of the run: its dataset and the flags given at its starts."""
    given = run.get("given_flags")
    if given is None:  # a run of a version that did not record them
        words = [format_flag(name, run[name]) for name in ("dataset_name", "model", "n_steps")]
        return " ".join(["python train.py", *words, " # other flags were not recorded"])
    shown = {name: value for name, value in given.items() if name not in HIDDEN_FLAGS}
    flags = {"dataset_name": run["dataset_name"]} | shown
    return " ".join(["python train.py", *(format_flag(*pair) for pair in flags.items())])


def format_flag(name: str, value: Any) -> str:
    """Return a flag as it is typed in a shell: --seed 3, --rope, --noremat, --caption 'a' 'b'."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no'}{name}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(word)) for word in words)])


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(ExportConfig)))
