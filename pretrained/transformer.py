"""Diffusion transformers that are not runs of this project: of the hub, of a folder, of a file.

    found = load("facebook/DiT-XL-2-256")
    found.config, found.params       # ours, as if trained here
    found.settings                   # how it is sampled, as a run's config.json would say it

Which family they are of and how they are sampled is decided here; their names and axes are known by
the family's own module. `save` writes one that others can load.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from datasets_config import LatentEncoding
from model import JOINT, MODELS, ModelConfig, graphdef, init_params
from pretrained import autoencoder, dit, sd3, torch_file, weight_files
from runtime.errors import UserError, unknown
from runtime.files import atomic

SETTINGS = "settings.json"  # of what `save` wrote: how it is sampled
# Of a model, what the configs of diffusers' classes may not say, and its name in SETTINGS.
UNTOLD = {"time_scale": "time_scale", "image_size": "trained_size", "text_length": "trained_length"}
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
OWN = {"DiT": False, "MMDiT": True}  # our classes: whether their blocks are joint
FAMILIES: dict[str, Any] = dict.fromkeys(dit.CLASSES, dit) | {sd3.CLASS: sd3}

# How the published models are sampled.
FLOW = {"prediction": None, "solver": "euler", "n_sample_steps": 50, "sample_shift": 1.0}
DRAWN: dict[str, dict[str, Any]] = {
    "dit": {"prediction": "epsilon", "solver": "ddpm", "n_sample_steps": 250, "sample_shift": None},
    "sit": FLOW,
    "sd3": FLOW | {"n_sample_steps": 28, "sample_shift": 3.0, "cfg_scale": 7.0},
}
# Where SD3's towers are without it.
TOWERS = ["openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"]
TOWERS += ["google/t5-v1_1-xxl"]
# What diffusers' schedulers say of the chain of `diffusion.chain`, also by default.
CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
CHAIN |= {"beta_schedule": "linear"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# The VAE of models of four channels that come without one: (id, scale, pixels to a latent's side).
USUAL_VAE = ("stabilityai/sd-vae-ft-ema", 0.18215, 8)


@dataclass(frozen=True)
class Transformer:
    """A network, how to draw from it, and where it is from.

    Args:
        params: NumPy's float32, for `model.graphdef`.
        settings: what a run's `config.json` says that drawing needs.
        id: of the hub, or a whole path. revision: the hub's commit.
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    settings: dict[str, Any]
    id: str
    revision: str | None = None

    def model(self) -> nnx.Module:
        """A live module, `model(x, t, label)`."""
        return nnx.merge(graphdef(self.config), jax.tree.map(jnp.asarray, self.params))


def load(path_or_id: str, *, dtype: str = "float32", revision: str | None = None) -> Transformer:
    """A transformer of a folder, of the hub (by itself or in a pipeline's `transformer/`), or of a
    file of the original DiT or SiT.

    A file does not say which of the two it is of. Its name may (`DiT-XL-2-256x256.pt`), or what
    stands before its path: `dit:` or `sit:`; and of a size that was not published the number of
    heads too: `dit:heads=6:PATH`.

    Args:
        dtype: of matrix products.
        revision: of the hub: a branch, tag or commit.

    Raises:
        UserError: it is not to be had, is damaged, or is not what this project can compute; each by
            its name.
    """
    asked = _asked(str(path_or_id))
    path = Path(asked.place).expanduser()
    if path.is_file() or path.suffix in FILES:
        found = _of_file(path, asked)
    elif asked.family:
        raise UserError(f"'{path_or_id}': {asked.family}: is for a file of weights")
    else:
        found = _of_folder(asked.place, revision)
    config = replace(found.config, dtype=dtype)
    settings = found.settings | {"model_config": asdict(config)}
    return replace(found, config=config, settings=settings)


def preset_of(config: ModelConfig) -> str | None:
    """The name in `MODELS` of this shape, and of this patch size if there is one."""

    def fits(preset: dict[str, Any]) -> bool:
        joint = preset.get("block") == JOINT
        sizes = all(preset[name] == getattr(config, name) for name in ("width", "depth", "n_heads"))
        return sizes and joint == (config.block == JOINT)

    names = [name for name, preset in MODELS.items() if fits(preset)]
    names.sort(key=lambda name: MODELS[name]["patch_size"] != config.patch_size)
    return names[0] if names else None


# --- a file ---------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a person named."""

    family: str | None
    n_heads: int | None
    place: str


def _asked(words: str) -> Asked:
    found = re.fullmatch(r"(dit|sit):(?:heads=(\d+):)?(.+)", words, re.IGNORECASE)
    if not found:
        return Asked(None, None, words)
    family, n_heads, place = found.groups()
    return Asked(family.lower(), int(n_heads) if n_heads else None, place)


def _of_file(path: Path, asked: Asked) -> Transformer:
    where, family = str(path), asked.family or _family_by_name(path)
    if path.suffix == ".safetensors" and path.is_file():
        tensors = weight_files.read_safetensors(path)
    else:
        tensors = torch_file.read(path, within=("ema", "model"))
    config = dit.shape_of(tensors, where, asked.n_heads)
    if config.width % config.n_heads:
        raise UserError(f"'{where}': width {config.width} is not divisible by {config.n_heads}")
    params = dit.from_original(tensors, config, where)
    if family == "sit":
        params, config = dit.from_sit(params, config)
    place = str(path.resolve())
    drawn = DRAWN[family] | _guidance(config)
    settings = _settings(config, place, drawn, _usual_encoding(config, place))
    return Transformer(config, params, settings, place)


def _family_by_name(path: Path) -> str:
    words = [w for w in ("dit", "sit") if re.search(rf"(?<![a-z]){w}(?![a-z])", path.name.lower())]
    if len(words) != 1:
        raise UserError(
            f"'{path}' may be of DiT or of SiT, whose files look alike and whose times run in "
            f"opposite directions: say dit:{path} or sit:{path}"
        )
    return words[0]


# --- a folder, or the hub -------------------------------------------------------------------------


def _of_folder(place: str, revision: str | None) -> Transformer:
    if Path(place).expanduser().is_dir():
        said = weight_files.read_json(place, weight_files.CONFIG) or {}
        if "model_config" in said:
            raise UserError(
                f"'{place}' is a run of this project; export.py makes of it what is read here"
            )
    found = weight_files.read(place, subfolder="transformer", revision=revision)
    name = found.config.get("_class_name")
    if name not in FAMILIES | OWN:
        raise UserError(
            f"'{found.id}' is {name or 'of no known class'}, and none of: "
            f"{', '.join(FAMILIES | OWN)}"
        )
    ours = weight_files.read_json(place, SETTINGS, revision=found.revision or revision)
    if ours and not isinstance(ours.get("dataset", {}), dict):
        raise UserError(f"the {SETTINGS} of '{found.id}' is damaged: it has no dataset")
    if name in OWN:
        config = _own_config(found.config, found.id)
        params = _own_params(found.tensors, config, found.id)
    else:
        # How SD3's positions are counted, only its table of them tells.
        more = [found.tensors] if name == sd3.CLASS else []
        config = FAMILIES[name].read_config(found.config, found.id, *more)
        params = FAMILIES[name].to_params(found.tensors, config, found.id)
        if ours:
            told = {name: ours[key] for name, key in UNTOLD.items() if key in ours}
            config = replace(config, **told)
    if ours:
        settings = _settings(config, found.id, {}, None) | ours
    else:
        settings = _of_pipeline(place, found, config)
    return Transformer(config, params, settings, found.id, found.revision)


def _of_pipeline(place: str, found: weight_files.Published, config: ModelConfig) -> dict[str, Any]:
    """What the rest of a pipeline says, if there is one."""

    def read(name: str) -> dict[str, Any] | None:
        return weight_files.read_json(place, name, revision=found.revision)

    index, scheduler = read(weight_files.PIPELINE) or {}, read("scheduler/scheduler_config.json")
    usual = DRAWN["sd3"] if config.text_width else DRAWN["dit"] | _guidance(config)
    drawn = usual | (_schedule(scheduler, found.id) if scheduler else {})
    if drawn["prediction"] is None and config.out_channels != config.channels:
        raise UserError(f"'{found.id}': a flow has no variance to be learned, and it says one")
    facts = read("vae/config.json")
    encoding = _encoding(config, facts, found.id) if facts else _usual_encoding(config, found.id)
    settings = _settings(config, found.id, drawn, encoding)
    settings["dataset"]["label_names"] = _label_names(index.get("id2label"), config.n_classes)
    if config.text_width:  # see `text.Towers`
        towers = _towers(place)
        more = {"text_towers": towers, "text_revisions": [None] * len(TOWERS)}
        settings |= more | {"full_width": config.text_width}
    return settings


def _towers(place: str) -> list[str]:
    """SD3's text towers: those of a pipeline's folder, where T5 may be absent, or its originals."""
    folder = Path(place).expanduser()
    own = [folder / f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    return [str(path) for path in own if path.is_dir()] or TOWERS


def _schedule(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How a model was trained, as its scheduler tells it."""
    if str(said.get("_class_name")).startswith("FlowMatch"):
        flow = {name: FLOW[name] for name in ("prediction", "solver")}
        return flow | {"sample_shift": float(said.get("shift", 1.0))}
    for name, value in CHAIN.items():
        if said.get(name, value) != value:
            raise UserError(
                f"'{where}': its scheduler says {name} {said[name]}, and only {value} is supported"
            )
    if said.get("trained_betas") is not None:
        raise UserError(f"'{where}': its scheduler has trained_betas, which are not supported")
    kind = said.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise unknown(f"prediction_type of the scheduler of '{where}':", kind, PREDICTIONS)
    return {"prediction": PREDICTIONS[kind]}


def _encoding(config: ModelConfig, facts: dict[str, Any], where: str) -> LatentEncoding:
    vae = autoencoder.read_config(facts, f"{where}/vae")
    if vae.latent_channels != config.channels:
        raise UserError(
            f"'{where}': its VAE has {vae.latent_channels} channels, its transformer "
            f"{config.channels}"
        )
    return _encoding_by(
        config, where, where, vae.scaling_factor, vae.shift_factor, vae.downsampling
    )


def _usual_encoding(config: ModelConfig, where: str) -> LatentEncoding | None:
    """Of a model without a VAE: four channels are Stable Diffusion's latents."""
    name, scale, downsampling = USUAL_VAE
    if config.channels != 4:
        return None
    return _encoding_by(config, where, name, scale, 0.0, downsampling)


def _encoding_by(
    config: ModelConfig, where: str, vae: str, scale: float, shift: float, downsampling: int
) -> LatentEncoding:
    return LatentEncoding(
        dataset_name=Path(where).name,
        source=where,
        image_size=config.image_size * downsampling,
        shape=(config.image_size, config.image_size, config.channels),
        vae=vae,
        vae_hash="",  # any will do
        scaling_factor=scale,
        shift_factor=shift,
        precision="float32",
        mirrored=False,
        captions=bool(config.text_width),
    )


def _guidance(config: ModelConfig) -> dict[str, Any]:
    """Of models on classes. The scripts of DiT and SiT guide three of their four channels."""
    if not config.n_classes:
        return {"cfg_scale": 1.0}
    return {"cfg_scale": 4.0} | ({"guided_channels": 3} if config.channels == 4 else {})


def _label_names(names: Any, n_classes: int) -> list[str]:
    """Of a pipeline's names of classes, which may be lists of synonyms, the first, where no other
    class has it too.
    """
    names = names if isinstance(names, dict) else {}
    whole = [str(names.get(str(i), "")) for i in range(n_classes)]
    if not all(whole):
        return []
    first = [name.split(",")[0].strip() for name in whole]
    return [short if first.count(short) == 1 else long for short, long in zip(first, whole)]


def _settings(
    config: ModelConfig, where: str, drawn: Mapping[str, Any], encoding: LatentEncoding | None
) -> dict[str, Any]:
    """What a run's `config.json` would say."""
    name = Path(where).name
    return {
        "dataset_name": name,
        "dataset": {
            "name": name,
            "n_classes": config.n_classes,
            "label_names": [],
            "encoding": asdict(encoding) if encoding else None,
        },
        "model": preset_of(config) or name,
        "model_config": asdict(config),
        "vae": None,
        "text_towers": [],
        "text_revisions": [],
        "fsdp": 1,
        **FLOW,
        "cfg_scale": 1.0,
        **drawn,
    }


# --- our own layout, and what is written ----------------------------------------------------------


def layout_of(config: ModelConfig) -> tuple[str, str]:
    """The class under which a model is written, and what keeps it from being one of diffusers'."""
    family = sd3 if config.block == JOINT else dit
    try:
        family.write_config(config)
    except UserError as error:
        return own_class(config), str(error)
    return family.CLASS, ""


def own_class(config: ModelConfig) -> str:
    """The name of our own class."""
    return "MMDiT" if config.block == JOINT else "DiT"


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    layout: str | None = None,
) -> None:
    """Write a network as `load` and, if its `layout_of` is one of theirs, diffusers read it.

    Args:
        layout: by default what `layout_of` says.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder, layout = Path(folder).expanduser(), layout or layout_of(config)[0]
    if layout in OWN:
        said = {"_class_name": layout} | asdict(config)
        tensors = {".".join(path): np.asarray(x) for path, x in _leaves(params).items()}
    else:
        said = FAMILIES[layout].write_config(config)
        tensors = FAMILIES[layout].to_tensors(params, config)
    told = dict(settings) | {key: getattr(config, name) for name, key in UNTOLD.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / SETTINGS) as file:
            file.write(json.dumps(told, indent=2, default=str).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror}") from None
    weight_files.write(folder, said, tensors)


def _own_config(said: Mapping[str, Any], where: str) -> ModelConfig:
    facts = {name: value for name, value in said.items() if not name.startswith("_")}
    try:
        config = ModelConfig(**facts)
    except (TypeError, UserError) as error:
        raise UserError(f"the {weight_files.CONFIG} of '{where}' is damaged: {error}") from None
    if OWN[said["_class_name"]] != (config.block == JOINT):
        raise UserError(f"the {weight_files.CONFIG} of '{where}' is damaged: block {config.block}")
    return config


def _own_params(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    paths = {".".join(path): path for path in _leaves(tree)}
    shapes = {name: _leaves(tree)[path].shape for name, path in paths.items()}
    weight_files.refuse_misfits(where, tensors, shapes)
    return unflatten_dict({path: np.array(tensors[n], np.float32) for n, path in paths.items()})


def _leaves(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return dict(flatten_dict(tree))
