"""Published autoencoders: Stable Diffusion's, SDXL's, SD3's, FLUX's, as diffusers has them.

Ours are written in the same form. The network itself is `networks/autoencoder.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from networks.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    autoencoder_graphdef,
    init_autoencoder_params,
)
from pretrained import weight_files
from pretrained.autoencoder_file import parse_reference, read_autoencoder_file
from pretrained.autoencoder_names import ANCHOR, CLASS, diffusers_name, rename_to_diffusers
from pretrained.state_dicts import flatten_leaves
from runtime.errors import UserError

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list of widths",
}

# The order of a weight's axes, by their number: of convolutions, linear maps, and the rest.
DIFFUSERS_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # ours are h w i o; diffusers' are o i h w
OUR_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


@dataclass(frozen=True)
class PretrainedAutoencoder:
    """An autoencoder's config and weights, and where they are from."""

    config: AutoencoderConfig
    params: dict[str, Any] = field(repr=False)  # float32, for `autoencoder_graphdef`
    hash: str  # of the weights, whatever file they came in
    id: str  # of the hub, or a folder's whole path
    revision: str | None  # the hub's commit
    dtype: str = "float32"

    def model(self) -> AutoencoderKL:
        """Build a live module that computes in `dtype`."""
        params = jax.tree.map(jnp.asarray, self.params)
        return nnx.merge(autoencoder_graphdef(self.config, self.dtype), params)


def load_autoencoder(
    path_or_id: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    scale: tuple[float, float] | None = None,
) -> PretrainedAutoencoder:
    """Load an autoencoder of the hub, of a folder (of a pipeline, its `vae/`) or of a single file.

    A file holds the autoencoder alone, or a whole Stable Diffusion. The scale of its latents may be
    for you to say: `sd:PATH`, `sdxl:PATH`, `sd3:PATH` or `flux:PATH`.

    Args:
        dtype: of the computation of `PretrainedAutoencoder.model`, float32 or bfloat16.
        revision: of the hub: a branch, tag or commit.
        scale: scale and shift of latents, for files that do not tell them.

    Raises:
        UserError: it cannot be had, is damaged, or holds something that this project cannot
            compute, which the message names.
    """
    reference = parse_reference(str(path_or_id))
    path = Path(reference.place).expanduser()
    if path.is_file() or path.suffix in weight_files.FILE_SUFFIXES:
        config, network = read_autoencoder_file(path, reference, scale=scale)
    elif reference.family:
        raise UserError(f"'{path_or_id}': {reference.family}: is for a file of weights")
    else:
        network = weight_files.read_network(
            str(path_or_id), subfolder="vae", anchors=(ANCHOR,), revision=revision
        )
        config = config_from_diffusers(network.config, network.id)
    autoencoder_graphdef(config, dtype)  # raises for an unknown dtype
    params = params_from_diffusers(network.tensors, config, network.id)
    weight_files.print_notices(network.id, network.notices)
    return PretrainedAutoencoder(
        config=config,
        params=params,
        hash=hash_weights(params),
        id=network.id,
        revision=network.revision,
        dtype=dtype,
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
    """Return the sha256 of an autoencoder's weights, by their names and axes in diffusers."""
    return weight_files.hash_tensors(params_to_diffusers(params))


# --- the config -----------------------------------------------------------------------------------


def config_from_diffusers(config: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """Convert a `config.json` of diffusers to ours.

    Latents' means and deviations by channel (`latents_mean`, `latents_std`) are refused like
    everything else that would be ignored: the latents would silently be on another scale.

    Raises:
        UserError: it is the config of something else, or of something that is not supported.
    """
    name = config.get("_class_name")
    if name != CLASS:
        raise UserError(f"'{where}' is not an {CLASS} but {name or 'of no known class'}")
    # null is as good as absent, and names that start with _ describe the file.
    facts = {k: v for k, v in config.items() if v is not None and not k.startswith("_")}
    fields = {name: facts.pop(name) for name in facts.keys() & AutoencoderConfig.__annotations__}
    try:
        ours = AutoencoderConfig(
            **{name: parse_fact(name, value) for name, value in fields.items()}
        )
    except UserError as error:
        raise UserError(f"'{where}': its {weight_files.CONFIG} says {error}") from None
    n = len(ours.block_out_channels)
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
    return ours


def parse_fact(name: str, value: Any) -> Any:
    """Convert a JSON value to the type of its field: JSON has no tuples, and writes 1.0 as 1.

    Raises:
        UserError: it is of another type.
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
    """Make the config from which diffusers builds the autoencoder."""
    n = len(config.block_out_channels)
    return {
        "_class_name": CLASS,
        "act_fn": "silu",
        "down_block_types": [DOWN] * n,
        "up_block_types": [UP] * n,
        **asdict(config),
    }


# --- the weights ----------------------------------------------------------------------------------


def params_to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return our weights under diffusers' names and in its axes."""
    return {
        diffusers_name(path): np.transpose(np.asarray(x), DIFFUSERS_AXES[x.ndim])
        for path, x in flatten_leaves(params).items()
    }


@lru_cache
def paths_and_shapes(
    config: AutoencoderConfig,
) -> dict[str, tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Return for each of diffusers' names of weights the path of ours, and diffusers' shape."""
    tree = jax.eval_shape(lambda: init_autoencoder_params(config, jax.random.key(0)))
    return {
        diffusers_name(path): (path, tuple(x.shape[i] for i in DIFFUSERS_AXES[x.ndim]))
        for path, x in flatten_leaves(tree).items()
    }


def require_config_shapes(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, where: str
) -> None:
    """Raise UserError unless the tensors are those of such an autoencoder."""
    shapes = {name: shape for name, (_, shape) in paths_and_shapes(config).items()}
    weight_files.require_shapes(where, tensors, shapes)


def params_from_diffusers(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, where: str
) -> dict[str, Any]:
    """Convert diffusers' weights to ours, float32. Each is used once and none is left.

    Raises:
        UserError: some are missing, left over or of another shape; the message names a few.
    """
    paths = paths_and_shapes(config)
    renamed = rename_to_diffusers(tensors, where)
    for name, x in renamed.items():
        # The oldest files store attention's linear maps as 1×1 convolutions.
        is_linear = name in paths and len(paths[name][1]) == 2
        if is_linear and x.ndim == 4 and x.shape[2:] == (1, 1):
            renamed[name] = x[:, :, 0, 0]
    require_config_shapes(renamed, config, where)
    return unflatten_dict(
        {
            path: np.array(
                np.transpose(renamed[name], OUR_AXES[renamed[name].ndim]), np.float32, order="C"
            )
            for name, (path, _) in paths.items()
        }
    )
