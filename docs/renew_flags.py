"""Write the flags of `train.py`, by group, into docs/training.md: `python docs/renew_flags.py`."""

import re
import sys
from dataclasses import fields
from inspect import getdoc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.config import HELP_DEFAULTS, TrainConfig

PAGE = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- flags: written by docs/renew_flags.py -->", "<!-- end of flags -->"
GROUPS = {
    "Dataset": (
        *("dataset_name", "data_dir", "image_column", "label_column", "conditioning"),
        *("caption_column", "caption", "text_towers", "text_length", "caption_cache"),
        *("image_size", "channels", "latents", "vae", "streaming", "shuffle_buffer"),
        *("in_memory", "cache_on_device", "n_workers"),
    ),
    "Model": (
        *("model", "init_from", "patch_size", "block", "position", "rope", "qk_norm", "mlp"),
        *("norm", "remat", "half_precision"),
    ),
    "Objective": (
        *("objective", "prediction", "learned_sigma", "min_snr_gamma", "time_density"),
        *("logit_mean", "logit_std", "mode_scale", "time_shift", "label_dropout"),
    ),
    "Optimizer": (
        *("n_epochs", "n_steps", "batch_size", "accumulate_steps", "learning_rate", "schedule"),
        *("warmup_steps", "beta1", "beta2", "weight_decay", "clip_norm", "ema_decay"),
        *("nan_patience", "seed"),
    ),
    "Devices and processes": (
        *("fsdp", "distributed", "coordinator", "n_processes", "process_index"),
    ),
    "Run": (
        *("run_dir", "resume", "log_every", "eval_save_steps", "n_eval_batches"),
        *("sample_every_n", "keep_checkpoints", "wandb_project"),
    ),
    "Samples of the run": ("cfg_scale", "n_sample_steps", "solver", "sample_shift"),
    "FID during training": ("fid_every", "fid_reference", "fid_n", "fid_features", "inception"),
    "Instead of training": ("overfit_batch", "lr_range_test", "profile", "peak_tflops"),
}


def descriptions() -> dict[str, str]:
    """Return what the docstring of `TrainConfig` says of each flag."""
    args = (getdoc(TrainConfig) or "").partition("\nArgs:\n")[2]
    entries = re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w+: |\Z)", args)
    return {name: " ".join(text.split()) for name, text in entries}


def default(name: str, value: object) -> str:
    """Return a flag's default as the help page shows it."""
    shown = HELP_DEFAULTS.get(name) if value is None else value
    if isinstance(shown, tuple):
        shown = " ".join(map(str, shown))
    return "" if shown is None else str(shown)


def tables() -> str:
    """Return a table of flags for each group."""
    text, values = descriptions(), {field.name: field.default for field in fields(TrainConfig)}
    parts = []
    for group, names in GROUPS.items():
        rows = [f"| `--{name}` | {default(name, values[name])} | {text[name]} |" for name in names]
        parts.append(f"### {group}\n\n| flag | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def renewed(page: str) -> str:
    """Return the page with the tables as the code has them now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
