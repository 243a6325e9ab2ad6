"""Training that starts from weights that are there: a run's, or a published model's.

`read` finds them, `filled` takes the model's flags from them, and `fitted` makes them those of the
model to be trained. Classes, the size of pictures and their patches may be others, and what that
changes is said; all else must be the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from datasets_config import DATASET_CONFIGS, DatasetConfig, LatentEncoding
from inference.trained_model import TrainedModel
from model import ModelConfig
from pretrained import transformer
from runtime import parallel, processes
from runtime.checkpoint import FOLDER as CHECKPOINTS
from runtime.errors import UserError
from training.config import TrainConfig

# Flags of the model that are its source's, if not said.
FLAGS = ("block", "position", "rope", "qk_norm", "mlp", "norm")
# What no flag says of a model.
BEYOND_FLAGS = ("n_class_tokens", "mlp_ratio", "time_scale")
BEYOND_FLAGS += ("caption_norm", "n_dual", "position_side", "position_base")
# What must be the same; of captions, their channels.
SAME = ("width", "depth", "n_heads", *FLAGS, "text_width", "pooled_width")
Fresh = Callable[[str], dict[str, Any]]  # a part of a new model's weights, by its name


@dataclass(frozen=True)
class Source:
    """What training starts from. `name` is for messages."""

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    settings: Mapping[str, Any]
    name: str

    @property
    def label_names(self) -> Sequence[str]:
        return self.settings["dataset"].get("label_names") or ()


def read(path_or_id: str) -> Source:
    """The averaged weights of a run's newest checkpoint, or a model that `transformer.load` finds.

    Raises:
        UserError: neither is there.
    """
    folder = Path(path_or_id).expanduser()
    if not (folder / CHECKPOINTS).is_dir():
        with processes.first_then_others():
            found = transformer.load(path_or_id)
        return Source(found.config, found.params, found.settings, found.id)
    # Each device has a part of them, and the host the whole.
    of = TrainedModel.of_run(folder, fsdp=jax.device_count())
    return Source(of.model, parallel.fetch(of.params), of.settings, f"step {of.step} of {folder}")


def filled(config: TrainConfig, source: Source) -> TrainConfig:
    """`config` with the model and the objective of the source, where nothing else is said.

    Raises:
        UserError: the source's shape has no name here.
    """
    s, said = source.config, {k: v for k, v in vars(config).items() if v is not None}
    name = transformer.preset_of(s)
    if name is None:
        raise UserError(
            f"--init_from {source.name}: no preset has width {s.width}, depth {s.depth} and "
            f"{s.n_heads} heads; add one to MODELS in model.py"
        )
    kept: dict[str, Any] = {"model": name}
    if "model" not in said:
        kept["patch_size"] = s.patch_size
    if _size(said.get("model", name)) == _size(name):
        kept |= {flag: getattr(s, flag) for flag in FLAGS}
    prediction = source.settings.get("prediction")
    objective = "ddpm" if prediction else "rectified_flow"
    if said.get("objective", objective) == objective:
        kept["objective"] = objective
        if prediction:
            kept |= {"prediction": prediction, "learned_sigma": s.out_channels > s.channels}
    if s.text_width and _has_captions(config):
        kept["text_towers"] = tuple(source.settings["text_towers"])
    return replace(config, **kept | said)


def _size(model: str) -> str:
    """Of a preset's name, all but the patches."""
    return model.rpartition("/")[0]


def _has_captions(config: TrainConfig) -> bool:
    entry = DATASET_CONFIGS.get(config.dataset_name)
    named = config.caption_column or config.caption or (entry and entry.conditioning == "text")
    return config.conditioning == "text" or (config.conditioning is None and bool(named))


def beyond_flags(config: ModelConfig, record: Mapping[str, Any]) -> ModelConfig:
    """`config` with what no flag says from another's record."""
    return replace(config, **{name: record[name] for name in BEYOND_FLAGS if name in record})


# --- one model's weights as another's -------------------------------------------------------------


def fitted(
    source: Source, config: ModelConfig, dataset: DatasetConfig, fresh: Fresh
) -> tuple[dict[str, Any], list[str]]:
    """The source's weights as those of a model with `config`, and what a person should know of it:
    what had to be done, and if it was trained on other latents.

    Raises:
        UserError: something that must be the same is not, by its name.
    """
    for name in SAME:
        there, here = getattr(source.config, name), getattr(config, name)
        if there != here:
            raise UserError(f"--init_from {source.name}: {name} is {there} there, and {here} here")
    params, notices = dict(source.params), [f"the weights are those of {source.name}"]
    for fit in (_fit_patches, _fit_outputs, _fit_positions):
        changed, notice = fit(source, config, fresh)
        params |= changed
        notices += notice
    if not config.text_width:
        changed, notice = _fit_classes(source, config, dataset.label_names, fresh)
        params |= changed
        notices += notice
    return params, notices + _other_latents(source, dataset.encoding)


def _other_latents(source: Source, encoding: LatentEncoding | None) -> list[str]:
    record = source.settings["dataset"].get("encoding")
    there = LatentEncoding.of(record) if record else None
    if there is None or encoding is None:
        kinds = ["latents" if e else "pictures" for e in (encoding, there)]
        return [] if there is encoding else [f"it learns {kinds[0]}, and {kinds[1]} there"]
    scales = [(e.scaling_factor, e.shift_factor) for e in (there, encoding)]
    hashes = {e.vae_hash for e in (there, encoding)} - {""}
    if scales[0] == scales[1] and len(hashes) < 2:
        return []
    here, there = (f"of {e.vae}, times {e.scaling_factor:g}" for e in (encoding, there))
    return [f"the latents are those {here}, and those {there} there"]


Fitted = tuple[dict[str, Any], list[str]]


def _patches_are_others(source: ModelConfig, config: ModelConfig) -> bool:
    return (source.patch_size, source.channels) != (config.patch_size, config.channels)


def _fit_patches(source: Source, config: ModelConfig, fresh: Fresh) -> Fitted:
    s, c = source.config, config
    if not _patches_are_others(s, c):
        return {}, []
    there, here = (f"{m.patch_size}×{m.patch_size}×{m.channels}" for m in (s, c))
    said = f"patches are {here}, and {there} there: the maps from and to patches start fresh"
    return {"patch": fresh("patch")}, [said]


def _fit_outputs(source: Source, config: ModelConfig, fresh: Fresh) -> Fitted:
    """The last map, which tells more or less of each pixel with a learned variance or without."""
    s, c, final = source.config, config, source.params["final"]
    if _patches_are_others(s, c):
        return {"final": final | {"out": fresh("final")["out"]}}, []
    if s.out_channels == c.out_channels:
        return {}, []

    def resized(x: np.ndarray) -> np.ndarray:
        pixels = np.asarray(x).reshape(*x.shape[:-1], c.patch_size**2, s.out_channels)
        more = max(0, c.out_channels - s.out_channels)
        pixels = np.pad(pixels, [(0, 0)] * (pixels.ndim - 1) + [(0, more)])
        return pixels[..., : c.out_channels].reshape(*x.shape[:-1], -1)

    out = {name: resized(x) for name, x in final["out"].items()}
    said = f"it says {c.out_channels} channels, and {s.out_channels} there: " + (
        "the new ones start at zero" if c.out_channels > s.out_channels else "the last are left out"
    )
    return {"final": final | {"out": out}}, [said]


def _fit_positions(source: Source, config: ModelConfig, fresh: Fresh) -> Fitted:
    """Tables that are learned are resized; all others are computed."""
    s, c = source.config, config
    if s.grid == c.grid:
        return {}, []
    said = f"there are {c.grid[0]}×{c.grid[1]} patches, and {s.grid[0]}×{s.grid[1]} there: "
    if c.position != "learned":
        return {}, [f"{said}positions are computed anew"]
    table = resized_table(np.asarray(source.params["position"]["table"]), s.grid, c.grid)
    return {"position": {"table": table}}, [f"{said}the learned positions are resized"]


def resized_table(
    table: Float[np.ndarray, "n d"], grid: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "m d"]:
    """A table over a grid, on another, by cubic interpolation (Dosovitskiy et al. 2021, §3.2)."""
    image = jnp.asarray(table).reshape(*grid, -1)
    resized = jax.image.resize(image, (*new, image.shape[-1]), "cubic")
    return np.asarray(resized.reshape(-1, image.shape[-1]))


def _fit_classes(
    source: Source, config: ModelConfig, label_names: Sequence[str], fresh: Fresh
) -> Fitted:
    """Rows of classes that both have; the null stays last."""
    n, m = source.config.n_classes, config.n_classes
    rows = kept_rows(source.label_names, n, label_names, m)
    if rows == list(range(n)):
        return {}, []
    rows, new = np.array([*rows, n]), fresh("label")
    label = {
        name: np.where(_column(rows >= 0, x), np.asarray(x)[rows], new[name])
        for name, x in source.params["label"].items()
    }
    n_kept = int((rows[:-1] >= 0).sum())
    return {"label": label}, [
        f"of {m} classes {n_kept} are among the {n} there: others start fresh"
    ]


def _column(x: np.ndarray, like: Any) -> np.ndarray:
    return x.reshape(-1, *[1] * (like.ndim - 1))


def kept_rows(there: Sequence[str], n: int, here: Sequence[str], m: int) -> list[int]:
    """For each of m classes its number among n others, or −1: by name where both have names, by the
    first of its synonyms where the whole name is not found; else, if they are as many, they are
    taken for the same.
    """
    if len(there) != n or len(here) != m or not (n and m):
        return list(range(n)) if n == m else [-1] * m
    if _keys(there) == _keys(here):
        return list(range(n))
    by_whole = _places(_lowered(there), _lowered(here))
    by_first = _places(_firsts(there), _firsts(here))
    return [first if whole < 0 else whole for whole, first in zip(by_whole, by_first)]


def _places(there: Sequence[str], here: Sequence[str]) -> list[int]:
    """Where each name is there, or −1 where it does not stand for one class on both sides."""
    theirs, ours, place = Counter(there), Counter(here), {name: i for i, name in enumerate(there)}
    return [place[name] if theirs[name] == ours[name] == 1 else -1 for name in here]


def _keys(names: Sequence[str]) -> list[str]:
    """Names less their case and, where no other has the same first, less their synonyms."""
    whole, first = _lowered(names), _firsts(names)
    return [short if first.count(short) == 1 else long for short, long in zip(first, whole)]


def _lowered(names: Sequence[str]) -> list[str]:
    return [str(name).lower() for name in names]


def _firsts(names: Sequence[str]) -> list[str]:
    return [name.split(",")[0].strip() for name in _lowered(names)]
