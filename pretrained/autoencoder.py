"""Autoencoders as diffusers publishes them: Stable Diffusion's, SDXL's, SD3's, FLUX's, and ours in
the same form.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from networks.autoencoder import AutoencoderConfig, AutoencoderKL, graphdef, init_params
from pretrained import weight_files
from runtime.errors import UserError

CLASS, DOWN, UP = "AutoencoderKL", "DownEncoderBlock2D", "UpDecoderBlock2D"

KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list of widths",
}

# Our names to diffusers', one after the other.
RENAMES = (
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
    (r"\.blocks\.", ".resnets."),
    (r"^(encoder\..*)\.resize\.", r"\1.downsamplers.0."),
    (r"^(decoder\..*)\.resize\.", r"\1.upsamplers.0."),
    (r"\.middle\.before\.", ".mid_block.resnets.0."),
    (r"\.middle\.after\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.middle\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^(quant|post_quant)\.", r"\1_conv."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.shift$", ".bias"),
)
# What files of before 2023 call them.
OLD_RENAMES = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
# Axes of weights, by their number: of convolutions, linear maps, and the rest.
DIFFUSERS_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # ours are h w i o; diffusers' are o i h w
OUR_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


@dataclass(frozen=True)
class PretrainedAutoencoder:
    """An autoencoder's weights, where they are from and what they are."""

    config: AutoencoderConfig
    params: dict[str, Any] = field(repr=False)  # NumPy's float32, for `vae.autoencoder.graphdef`
    hash: str  # of the weights, whatever file they came in
    id: str  # of the hub, or a folder's whole path
    revision: str | None  # the hub's commit
    dtype: str = "float32"

    def model(self) -> AutoencoderKL:
        """A live module that computes in `dtype`."""
        params = jax.tree.map(jnp.asarray, self.params)
        return nnx.merge(graphdef(self.config, self.dtype), params)


def load_autoencoder(
    path_or_id: str, *, dtype: str = "float32", revision: str | None = None
) -> PretrainedAutoencoder:
    """An autoencoder of the hub or of a folder; in a pipeline's, its `vae/`.

    Args:
        dtype: that `Pretrained.model` computes in, float32 or bfloat16.
        revision: of the hub: a branch, tag or commit.

    Raises:
        UserError: it is not to be had, is damaged, or is not what this project can compute; each by
            its name.
    """
    found = weight_files.read_network(str(path_or_id), subfolder="vae", revision=revision)
    config = config_from_diffusers(found.config, found.id)
    graphdef(config, dtype)  # a dtype there is
    params = params_from_diffusers(found.tensors, config, found.id)
    return PretrainedAutoencoder(
        config, params, hash_weights(params), found.id, found.revision, dtype
    )


def save_autoencoder(
    folder: str | Path, config: AutoencoderConfig, params: Mapping[str, Any]
) -> None:
    """Write `config.json` and the weights as diffusers' `AutoencoderKL.from_pretrained` reads them.

    Raises:
        UserError: the weights do not fit the config, or the folder cannot be written to.
    """
    tensors = params_to_diffusers(params)
    require_config_shapes(tensors, config, str(folder))
    weight_files.write_network(Path(folder).expanduser(), config_to_diffusers(config), tensors)


def hash_weights(params: Mapping[str, Any]) -> str:
    """sha256 of an autoencoder's weights, by their names and axes in diffusers."""
    return weight_files.hash_tensors(params_to_diffusers(params))


# --- the config -----------------------------------------------------------------------------------


def config_from_diffusers(said: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """The facts of a `config.json`.

    Latents' means and deviations by channel (`latents_mean`, `latents_std`) are refused like
    everything else that would be ignored: the latents would silently be on another scale.

    Raises:
        UserError: the config of something else, or of something that is not supported.
    """
    name = said.get("_class_name")
    if name != CLASS:
        raise UserError(f"'{where}' is not an {CLASS} but {name or 'of no known class'}")
    # null is as good as absent, and what starts with _ is about the file.
    facts = {k: v for k, v in said.items() if v is not None and not k.startswith("_")}
    ours = {name: facts.pop(name) for name in facts.keys() & AutoencoderConfig.__annotations__}
    try:
        config = AutoencoderConfig(
            **{name: parse_fact(name, value) for name, value in ours.items()}
        )
    except UserError as error:
        raise UserError(f"'{where}': its {weight_files.CONFIG} says {error}") from None
    n = len(config.block_out_channels)
    supported = {
        "act_fn": ["silu", "swish"],  # two names of one function
        "down_block_types": [[DOWN] * n],
        "up_block_types": [[UP] * n],
    }
    for name, value in facts.items():
        if value not in supported.get(name, []):
            raise UserError(
                f"'{where}': its {weight_files.CONFIG} says {name} {value}: not supported"
            )
    return config


def parse_fact(name: str, value: Any) -> Any:
    """A fact as `AutoencoderConfig` has it: JSON has no tuples, and writes 1.0 as 1.

    Raises:
        UserError: it is of another kind.
    """
    default = AutoencoderConfig.__dataclass_fields__[name].default
    if name == "sample_size" and isinstance(value, list):
        value = max(value, default=0)
    if (
        isinstance(default, tuple)
        and isinstance(value, list)
        and all(type(n) is int for n in value)
    ):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{name} {value}: must be {KIND_NAMES[type(default)]}")
    return value


def config_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """All that diffusers needs to build it."""
    n = len(config.block_out_channels)
    blocks = {"down_block_types": [DOWN] * n, "up_block_types": [UP] * n}
    return {"_class_name": CLASS, "act_fn": "silu"} | blocks | asdict(config)


# --- the weights ----------------------------------------------------------------------------------


def apply_renames(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_name(path: tuple) -> str:
    """diffusers' name of a weight of ours."""
    return apply_renames(".".join(map(str, path)), RENAMES)


def flatten_leaves(params: Mapping[str, Any]) -> dict[tuple, Any]:
    """Each array of a tree by its path."""
    return dict(flatten_dict(params))


def params_to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our weights under diffusers' names and in its axes."""
    return {
        diffusers_name(path): np.transpose(np.asarray(x), DIFFUSERS_AXES[x.ndim])
        for path, x in flatten_leaves(params).items()
    }


@lru_cache
def paths_and_shapes(config: AutoencoderConfig) -> dict[str, tuple[tuple, tuple[int, ...]]]:
    """For each of diffusers' names of its weights: the path of ours, and diffusers' shape."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return {
        diffusers_name(path): (path, tuple(x.shape[i] for i in DIFFUSERS_AXES[x.ndim]))
        for path, x in flatten_leaves(tree).items()
    }


def require_config_shapes(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, where: str
) -> None:
    """Raises UserError unless the tensors are those of such an autoencoder."""
    shapes = {name: shape for name, (_, shape) in paths_and_shapes(config).items()}
    weight_files.require_shapes(where, tensors, shapes)


def params_from_diffusers(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, where: str
) -> dict[str, Any]:
    """diffusers' weights as ours. Each is used once and none is left.

    Raises:
        UserError: some are missing, left over or of another shape, with the names of a few.
    """
    paths = paths_and_shapes(config)
    found: dict[str, np.ndarray] = {}
    for old, x in tensors.items():
        name = apply_renames(old, OLD_RENAMES)
        if name in found:
            raise UserError(f"the weights of '{where}' hold {name} twice, once by an old name")
        # The first files had attention's linear maps as convolutions of one place.
        is_map = (
            x.ndim == 4 and x.shape[2:] == (1, 1) and name in paths and len(paths[name][1]) == 2
        )
        found[name] = x[:, :, 0, 0] if is_map else x
    require_config_shapes(found, config, where)
    return unflatten_dict(
        {
            path: np.array(
                np.transpose(found[name], OUR_AXES[found[name].ndim]), np.float32, order="C"
            )
            for name, (path, _) in paths.items()
        }
    )
