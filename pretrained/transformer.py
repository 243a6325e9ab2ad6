"""Diffusion transformers that were not trained by this project: of the hub, a folder or a file.

    pretrained = load_transformer("facebook/DiT-XL-2-256")
    pretrained.config, pretrained.params  # ours, as if trained here
    pretrained.settings                   # how it is sampled, by the keys of a run's config.json

This module decides which family a model belongs to and how it is sampled. The names and axes of its
weights are known by the family's own module, `dit.py` or `sd3.py`. `save_transformer` writes one
that others can load.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from datasets_config import LatentEncoding
from methods.registry import method_of
from model import JOINT, MODELS, ModelConfig, init_model_params, model_graphdef
from pretrained import autoencoder, dit, sd3, weight_files
from pretrained.autoencoder_file import SCALES
from pretrained.dit_file import Reference, parse_reference, read_dit_file
from pretrained.sd3_file import is_sd3, read_sd3_file
from pretrained.state_dicts import flatten_leaves, pop_heads
from pretrained.weight_files import FILE_SUFFIXES
from runtime.errors import UserError, unknown_name
from runtime.files import atomic_file

SETTINGS = "settings.json"  # written by `save_transformer`: how the model is sampled
# Fields of a ModelConfig that the configs of diffusers' classes cannot hold, and their keys in
# SETTINGS.
SETTINGS_KEYS = {
    "time_scale": "time_scale",
    "time_endpoint": "time_endpoint",
    "image_size": "trained_size",
    "text_length": "trained_length",
    "route": "route",
}
OWN_CLASSES = {"DiT": False, "MMDiT": True}  # our classes: whether their blocks are joint
DIFFUSERS_CLASSES = (*dit.CLASSES, sd3.CLASS)

# Sampling defaults of the published models.
FLOW: dict[str, Any] = {
    "objective": "rectified_flow",
    "prediction": None,
    "solver": "euler",
    "n_sample_steps": 50,
    "sample_shift": 1.0,
}
SAMPLING_DEFAULTS: dict[str, dict[str, Any]] = {
    "dit": {
        "objective": "ddpm",
        "prediction": "epsilon",
        "solver": "ddpm",
        "n_sample_steps": 250,
        "sample_shift": None,
    },
    "sit": FLOW,
    "sd3": FLOW | {"n_sample_steps": 28, "sample_shift": 3.0, "time_grid": "sd3", "cfg_scale": 7.0},
}
# The originals of SD3's text encoders, for transformers that come without them.
SD3_TEXT_ENCODERS = [
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "google/t5-v1_1-xxl",
]
OWN_PATCH = "patch.kernel"  # a weight of our own layout
# Facts of a scheduler of diffusers that are supported, which are also its defaults. They are the
# chain of `methods.ddpm`.
SUPPORTED_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# Variances that schedulers name, and ours; a learned one is the network's.
VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "learned_range": None,
}
# Facts of a flow's scheduler that change its times, and are not supported.
OTHER_TIMES = (
    *("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas"),
    *("use_beta_sigmas", "invert_sigmas", "stochastic_sampling"),
)
# The VAEs of models that come without one, by their family: of four channels, and SD3's.
DEFAULT_VAES = {
    "sd": "stabilityai/sd-vae-ft-ema",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
}
DOWNSAMPLING = 8  # pixels to a latent's side, of both
# Networks that people take for a diffusion transformer's, by a part of their tensors' names.
OTHER_NETWORKS = {
    "input_blocks": "a U-Net, as in Stable Diffusion 1, 2 and XL",
    "down_blocks": "a U-Net or a VAE",
    "double_blocks": "FLUX",
    "transformer_blocks": f"diffusers' layout without its {weight_files.CONFIG}",
    "lora_up": "a LoRA without the model that it changes",
    "lora_A": "a LoRA without the model that it changes",
}


@dataclass(frozen=True)
class PretrainedTransformer:
    """A network, how it is sampled, and where it is from.

    Args:
        params: NumPy's float32, for `model.model_graphdef`.
        settings: the part of a run's `config.json` that sampling needs.
        id: of the hub, or an absolute path.
        revision: the hub's commit.
        notices: lines for a person on how the weights were found, which are printed.
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    settings: dict[str, Any]
    id: str
    revision: str | None = None
    notices: tuple[str, ...] = ()

    def model(self) -> nnx.Module:
        """Build a live module, `model(x, t, label)`; a mean flow takes `span=` too."""
        return nnx.merge(model_graphdef(self.config), jax.tree.map(jnp.asarray, self.params))


def load_transformer(
    path_or_id: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    announce: bool = True,
) -> PretrainedTransformer:
    """Load a transformer of a folder, of the hub, or of a file of the original DiT, SiT or SD3.

    In a folder or a repository it lies by itself, or in a pipeline's `transformer/`.

    DiT and SiT files share a layout. The file's name may say which it is (`DiT-XL-2-256x256.pt`),
    or the arguments in it; otherwise prefix the path with `dit:` or `sit:`. A size that was not
    published also needs its number of heads: `dit:heads=6:PATH`, `sd3:heads=6:PATH`. A model that
    was trained without a null label may need its number of classes, `dit:classes=10:PATH`.

    A DiT in diffusers' layout is computed and guided as by DiT's own code or as by diffusers. If
    its config does not tell by which it was trained, prefix it with `original:` or `diffusers:`.

    Args:
        dtype: of matrix products.
        revision: of the hub: a branch, tag or commit.
        announce: print how the weights were found and are taken.

    Raises:
        UserError: it cannot be had, is damaged, or holds something that this project cannot
            compute, which the message names.
    """
    code, rest = dit.split_code(str(path_or_id))
    reference = parse_reference(rest)
    path = Path(reference.place).expanduser()
    if path.is_file() or path.suffix in FILE_SUFFIXES:
        if code:
            raise UserError(f"'{path_or_id}': {code}: is for a folder or id of diffusers")
        pretrained = _load_file(path, reference)
    elif reference.family:
        raise UserError(f"'{path_or_id}': {reference.family}: is for a file of weights")
    else:
        pretrained = _load_folder_or_hub(reference.place, revision, code)
    if announce:
        weight_files.print_notices(pretrained.id, pretrained.notices)
    config = replace(pretrained.config, dtype=dtype)
    settings = pretrained.settings | {"model_config": asdict(config)}
    return replace(pretrained, config=config, settings=settings)


def find_preset(config: ModelConfig) -> str | None:
    """Find the name in `MODELS` of this shape; of this kind of patches and of this patch size if
    there is one.
    """

    def fits(preset: dict[str, Any]) -> bool:
        is_joint = preset.get("block") == JOINT
        same_size = all(
            preset[name] == getattr(config, name) for name in ("width", "depth", "n_heads")
        )
        return same_size and is_joint == (config.block == JOINT)

    def differences(name: str) -> tuple[bool, ...]:
        preset = MODELS[name]
        other_kind = bool(preset.get("bottleneck")) != bool(config.bottleneck)
        other_blocks = (preset.get("n_dual", 0), preset.get("qk_norm", False)) != (
            config.n_dual,
            config.qk_norm,
        )
        return other_kind, preset["patch_size"] != config.patch_size, other_blocks

    names = [name for name, preset in MODELS.items() if fits(preset)]
    return min(names, key=differences, default=None)


def _load_file(path: Path, reference: Reference) -> PretrainedTransformer:
    file = weight_files.read_file_weights(path, (dit.PATCH,), fixed=(dit.POSITIONS,))
    place = str(path.resolve())
    if dit.PATCH not in file.tensors:
        raise _explain_other_network(path, file.shapes)
    if reference.family == "sd3" or (not reference.family and is_sd3(file)):
        if reference.n_classes is not None:
            raise UserError(
                f"'{path}': SD3 has no classes: leave out classes={reference.n_classes}:"
            )
        sd3_file = read_sd3_file(file, path, reference.n_heads)
        config = sd3_file.config
        encoding = _default_encoding(config, place, vae=place if sd3_file.has_vae else None)
        settings = _make_settings(config, place, SAMPLING_DEFAULTS["sd3"], encoding)
        settings |= _text_settings(config, SD3_TEXT_ENCODERS)
        return PretrainedTransformer(
            config, sd3_file.params, settings, place, notices=sd3_file.notices
        )
    dit_file = read_dit_file(file, path, reference)
    config = dit_file.config
    guidance = _default_guidance(config, has_null=dit_file.has_null)
    sampling = SAMPLING_DEFAULTS[dit_file.family] | guidance
    if dit_file.family == "dit":
        sampling |= _default_variance(config)
    settings = _make_settings(config, place, sampling, _default_encoding(config, place))
    return PretrainedTransformer(config, dit_file.params, settings, place, notices=dit_file.notices)


def _explain_other_network(path: Path, names: Collection[str]) -> UserError:
    """Describe a file without a diffusion transformer as what it is."""
    config = weight_files.read_optional_json(str(path.parent), weight_files.CONFIG) or {}
    if "_class_name" in config:
        return UserError(f"'{path}' is a part of '{path.parent}': name the folder, with its config")
    parts = {part for name in names for part in name.split(".")}
    kinds = [kind for part, kind in OTHER_NETWORKS.items() if part in parts]
    return UserError(
        f"'{path}' holds no DiT, SiT or SD3{f', but {kinds[0]}' if kinds else ''}: it lacks "
        f"{dit.PATCH}"
    )


# --- a folder, or the hub -------------------------------------------------------------------------


def _load_folder_or_hub(
    place: str, revision: str | None, code: str | None
) -> PretrainedTransformer:
    if Path(place).expanduser().is_dir():
        _refuse_run(place)
        _refuse_bare_files(Path(place).expanduser())
    network = weight_files.read_network(
        place,
        subfolder="transformer",
        anchors=(dit.DIFFUSERS_PATCH, OWN_PATCH),
        revision=revision,
        dtypes=weight_files.WEIGHT_DTYPES,
    )
    class_name = network.config.get("_class_name")
    if class_name not in (*DIFFUSERS_CLASSES, *OWN_CLASSES):
        raise UserError(
            f"'{network.id}' is {class_name or 'of no known class'}, and none of: "
            f"{', '.join((*DIFFUSERS_CLASSES, *OWN_CLASSES))}"
        )
    settings = weight_files.read_optional_json(
        place, SETTINGS, revision=network.revision or revision
    )
    if settings and not isinstance(settings.get("dataset", {}), dict):
        raise UserError(f"the {SETTINGS} of '{network.id}' is damaged: it has no dataset")
    config = _read_config(network, settings or {})
    if code and (settings or class_name not in dit.CLASSES):
        raise UserError(f"'{network.id}': {code}: is for a {dit.CLASS} that others trained")
    if class_name in dit.CLASSES and not settings:
        code = code or dit.find_code(network.config, network.id)
        config = replace(config, time_endpoint=dit.TIME_ENDPOINTS[code])
    has_null = not dit.append_null_row(network.tensors, config.n_classes)
    params, heads = _read_params(network, config)
    if settings:
        settings = _make_settings(config, network.id, {}, None) | settings
    else:
        settings = _read_pipeline_settings(place, network, config, code, has_null=has_null)
    notices = (*network.notices, *heads)
    if code:
        notices = (*notices, _describe_code(code, network.id, settings))
    return PretrainedTransformer(config, params, settings, network.id, network.revision, notices)


def _describe_code(code: str, where: str, settings: Mapping[str, Any]) -> str:
    """Return the notice of which of two codes a DiT in diffusers' layout is computed and guided as,
    and how to have the other.
    """
    names = {dit.ORIGINAL: "DiT's own code", dit.DIFFUSERS: "diffusers"}
    other = dit.ORIGINAL if code == dit.DIFFUSERS else dit.DIFFUSERS
    n_guided = settings.get("guided_channels")
    channels = f"the first {n_guided}" if n_guided else "all"
    guided = "" if settings["cfg_scale"] == 1 else f", and {channels} of its channels are guided"
    return (
        f"computed as by {names[code]}{guided}; to have it as by {names[other]}, name it as "
        f"{other}:{where}"
    )


def _refuse_run(folder: str) -> None:
    config = weight_files.read_optional_json(folder, weight_files.CONFIG) or {}
    if "model_config" in config:
        raise UserError(
            f"'{folder}' is a run of this project: name it by --run, or export it by export.py and "
            "load the export"
        )


def _refuse_bare_files(folder: Path) -> None:
    """Refuse a folder of weight files without a config, such as a training script's."""
    if any((folder / part / weight_files.CONFIG).is_file() for part in ("", "transformer")):
        return
    names = (*FILE_SUFFIXES, weight_files.INDEX_SUFFIX)
    files = sorted(path for path in folder.iterdir() if path.name.endswith(names))
    if files:
        indices = [path for path in files if path.suffix == ".json"]
        file = (indices or files)[-1]
        raise UserError(
            f"'{folder}' holds no {weight_files.CONFIG}: name one of its files, such as {file}, of "
            f"a DiT or SiT as dit:{file} or sit:{file}"
        )


def _read_config(
    network: weight_files.PublishedNetwork, settings: Mapping[str, Any]
) -> ModelConfig:
    """Convert a config to ours, by the family that it names."""
    class_name = network.config["_class_name"]
    if class_name in OWN_CLASSES:
        return _read_own_config(network.config, network.id)
    if class_name == sd3.CLASS:
        # Only SD3's table of positions tells how they are counted.
        config = sd3.config_from_diffusers(network.config, network.id, network.tensors)
    else:
        config = dit.config_from_diffusers(network.config, network.id)
    fields = {name: settings[key] for name, key in SETTINGS_KEYS.items() if key in settings}
    return ModelConfig.from_json(vars(config) | fields)


def _read_params(
    network: weight_files.PublishedNetwork, config: ModelConfig
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert weights to ours. Returns them, and notices of what is ignored or zero."""
    class_name, tensors = network.config["_class_name"], network.tensors
    if class_name in OWN_CLASSES:
        heads = pop_heads(tensors, _own_shapes(config))
        return _read_own_params(tensors, config, network.id), heads
    family = sd3 if class_name == sd3.CLASS else dit
    shapes = family.diffusers_shapes(config)
    notices = ()
    if network.config.get("attention_bias") is False:
        notices = weight_files.fill_missing_biases(tensors, shapes)
    notices = (*notices, *pop_heads(tensors, shapes))
    return family.params_from_diffusers(tensors, config, network.id), notices


def _read_pipeline_settings(
    place: str,
    network: weight_files.PublishedNetwork,
    config: ModelConfig,
    code: str | None,
    *,
    has_null: bool,
) -> dict[str, Any]:
    """Derive the settings from the rest of a pipeline, if there is one.

    Args:
        code: that a DiT was trained by, which says how it is sampled where the pipeline does not.
    """

    def read(name: str) -> dict[str, Any] | None:
        return weight_files.read_optional_json(place, name, revision=network.revision)

    index = read(weight_files.PIPELINE) or {}
    scheduler = read("scheduler/scheduler_config.json")
    if config.text_width:
        sampling = SAMPLING_DEFAULTS["sd3"]
    else:
        sampling = SAMPLING_DEFAULTS["dit"] | _default_guidance(config, has_null=has_null)
        if code == dit.DIFFUSERS:
            sampling.pop("guided_channels", None)
        else:
            sampling |= _default_variance(config)
    if scheduler:
        sampling = sampling | _read_scheduler(scheduler, network.id)
    method = method_of(sampling | {"learned_sigma": config.out_channels > config.channels})
    if method.out_channels(config.channels) != config.out_channels:
        raise UserError(
            f"'{network.id}': its scheduler is of a flow, which has no variance to predict, and "
            "its network predicts one"
        )
    vae = read("vae/config.json")
    if vae:
        encoding = _read_encoding(config, vae, network.id)
    else:
        encoding = _default_encoding(config, network.id)
    settings = _make_settings(config, network.id, sampling, encoding)
    settings["dataset"]["label_names"] = _read_label_names(index.get("id2label"), config.n_classes)
    if config.text_width:
        settings |= _text_settings(config, _find_text_encoders(place))
    return settings


def _text_settings(config: ModelConfig, encoders: list[str]) -> dict[str, Any]:
    """Make the settings of SD3's text encoders: see `text_encoders.TextEncoders`."""
    return {
        "text_towers": encoders,
        "text_revisions": [None] * len(SD3_TEXT_ENCODERS),
        "full_width": config.text_width,
    }


def _find_text_encoders(place: str) -> list[str]:
    """List SD3's text encoders: those of a pipeline's folder, where T5 may be absent, or the
    originals of the hub.
    """
    folder = Path(place).expanduser()
    own = [folder / f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    return [str(path) for path in own if path.is_dir()] or SD3_TEXT_ENCODERS


def _read_scheduler(facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read from a scheduler's config how a model was trained."""
    if str(facts.get("_class_name")).startswith("FlowMatch"):
        for name in OTHER_TIMES:
            if facts.get(name):
                raise UserError(
                    f"'{where}': its scheduler says {name} {facts[name]}, which is not supported"
                )
        return {
            "objective": FLOW["objective"],
            "prediction": FLOW["prediction"],
            "solver": FLOW["solver"],
            "sample_shift": float(facts.get("shift", 1.0)),
        }
    for name, value in SUPPORTED_SCHEDULE.items():
        if facts.get(name, value) != value:
            raise UserError(
                f"'{where}': its scheduler says {name} {facts[name]}, and only {value} is supported"
            )
    if facts.get("trained_betas") is not None:
        raise UserError(f"'{where}': its scheduler has trained_betas, which are not supported")
    prediction = facts.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise unknown_name(
            f"prediction_type of the scheduler of '{where}':", prediction, PREDICTIONS
        )
    sampling = {"objective": "ddpm", "prediction": PREDICTIONS[prediction]}
    variance = facts.get("variance_type")
    if variance not in (None, *VARIANCES):
        raise unknown_name(f"variance_type of the scheduler of '{where}':", variance, VARIANCES)
    if variance and VARIANCES[variance]:
        sampling["fixed_variance"] = VARIANCES[variance]
    return sampling


def _read_encoding(config: ModelConfig, facts: dict[str, Any], where: str) -> LatentEncoding:
    vae = autoencoder.config_from_diffusers(facts, f"{where}/vae")
    if vae.latent_channels != config.channels:
        raise UserError(
            f"'{where}': its VAE has {vae.latent_channels} channels, its transformer "
            f"{config.channels}"
        )
    return _make_encoding(
        config, where, where, vae.scaling_factor, vae.shift_factor, vae.downsampling
    )


def _default_encoding(
    config: ModelConfig, where: str, vae: str | None = None
) -> LatentEncoding | None:
    """Return the encoding for a model whose VAE has no config: four channels are Stable
    Diffusion's, sixteen of an MMDiT are SD3's.

    Args:
        vae: the file that holds it.
    """
    family = "sd3" if config.block == JOINT and config.channels == 16 else "sd"
    channels, scale, shift = SCALES[family]
    if config.channels != channels:
        return None
    vae = vae or DEFAULT_VAES[family]
    return _make_encoding(config, where, vae, scale, shift, DOWNSAMPLING)


def _make_encoding(
    config: ModelConfig, where: str, vae: str, scale: float, shift: float, downsampling: int
) -> LatentEncoding:
    return LatentEncoding(
        dataset_name=Path(where).name,
        source=where,
        image_size=config.size.times(downsampling).written,
        shape=config.image_shape,
        vae=vae,
        vae_hash="",  # accepts any
        scaling_factor=scale,
        shift_factor=shift,
        precision="float32",
        mirrored=False,
        captions=bool(config.text_width),
    )


def _default_guidance(config: ModelConfig, *, has_null: bool) -> dict[str, Any]:
    """Return the guidance of models on classes, and their label dropout if there was none.

    The sampling scripts of DiT and SiT guide three of their four channels.
    """
    if not has_null:
        return {"cfg_scale": 1.0, "label_dropout": 0.0}
    if not config.n_classes:
        return {"cfg_scale": 1.0}
    if config.channels == 4:
        return {"cfg_scale": 4.0, "guided_channels": 3}
    return {"cfg_scale": 4.0}


def _default_variance(config: ModelConfig) -> dict[str, Any]:
    """Return the variance of DiT's own sampling script where none is learned."""
    return {} if config.out_channels > config.channels else {"fixed_variance": "beta"}


def _read_label_names(names: Any, n_classes: int) -> list[str]:
    """Shorten a pipeline's names of classes, each a list of synonyms, to the first synonym.

    A name stays whole if another class has the same first synonym.
    """
    names = names if isinstance(names, dict) else {}
    full_names = [str(names.get(str(i), "")) for i in range(n_classes)]
    if not all(full_names):
        return []
    short_names = [name.split(",")[0].strip() for name in full_names]
    return [
        short if short_names.count(short) == 1 else full
        for short, full in zip(short_names, full_names)
    ]


def _make_settings(
    config: ModelConfig, where: str, sampling: Mapping[str, Any], encoding: LatentEncoding | None
) -> dict[str, Any]:
    """Make the part of a run's `config.json` that sampling needs."""
    name = Path(where).name
    return {
        "dataset_name": name,
        "dataset": {
            "name": name,
            "n_classes": config.n_classes,
            "label_names": [],
            "encoding": asdict(encoding) if encoding else None,
        },
        "model": find_preset(config) or name,
        "model_config": asdict(config),
        "vae": None,
        "text_towers": [],
        "text_revisions": [],
        "fsdp": 1,
        **FLOW,
        "learned_sigma": config.out_channels > config.channels,
        "cfg_scale": 1.0,
        **sampling,
    }


# --- our own layout, and writing ------------------------------------------------------------------


def choose_layout(config: ModelConfig) -> tuple[str, str]:
    """Return the class under which a model is written, and why it is none of diffusers' if so."""
    family = sd3 if config.block == JOINT else dit
    try:
        family.config_to_diffusers(config)
    except UserError as error:
        return own_class_name(config), str(error)
    return family.CLASS, ""


def own_class_name(config: ModelConfig) -> str:
    """Return the name of our own class for a model."""
    return "MMDiT" if config.block == JOINT else "DiT"


def save_transformer(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    layout: str | None = None,
) -> None:
    """Write a network as `load_transformer` and, in a layout of theirs, diffusers read it.

    Args:
        layout: the class to write it as, by default that of `choose_layout`.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = Path(folder).expanduser()
    layout = layout or choose_layout(config)[0]
    if layout in OWN_CLASSES:
        network_config = {"_class_name": layout} | asdict(config)
        tensors = {".".join(path): np.asarray(x) for path, x in flatten_leaves(params).items()}
    else:
        family = sd3 if layout == sd3.CLASS else dit
        network_config = family.config_to_diffusers(config)
        tensors = family.params_to_diffusers(params, config)
    fields = {key: getattr(config, name) for name, key in SETTINGS_KEYS.items()}
    text = json.dumps(dict(settings) | fields, indent=2, default=str)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / SETTINGS) as file:
            file.write(text.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror}") from None
    weight_files.write_network(folder, network_config, tensors)


def _read_own_config(facts: Mapping[str, Any], where: str) -> ModelConfig:
    fields = {name: value for name, value in facts.items() if not name.startswith("_")}
    try:
        config = ModelConfig.from_json(fields)
    except (TypeError, UserError) as error:
        raise UserError(f"the {weight_files.CONFIG} of '{where}' is damaged: {error}") from None
    if OWN_CLASSES[facts["_class_name"]] != (config.block == JOINT):
        raise UserError(f"the {weight_files.CONFIG} of '{where}' is damaged: block {config.block}")
    return config


def _own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our weights by its name in a file."""
    leaves = flatten_leaves(jax.eval_shape(lambda: init_model_params(config, jax.random.key(0))))
    return {".".join(path): leaf.shape for path, leaf in leaves.items()}


def _read_own_params(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    shapes = _own_shapes(config)
    weight_files.require_shapes(where, tensors, shapes)
    return unflatten_dict(
        {tuple(name.split(".")): np.array(tensors[name], np.float32) for name in shapes}
    )
