"""Published DINOv2 → `networks.vit.ViT`: of transformers' folders and of the original's files.

    vit = load_dinov2("dinov2-base")
    class_token, patches = vit(vit_inputs(images, ImageSize(224, 224)))

The original's names are in the middle: those of transformers are mapped to them, and they to ours.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from networks.inception import cubic, resize
from networks.vit import ViT, ViTConfig, vit_graphdef
from pretrained import weight_files
from pretrained.weight_files import CONFIG
from runtime.errors import UserError
from runtime.image_size import ImageSize

Tensors = dict[str, np.ndarray]
HUB_NAMES = re.compile(r"dinov2-(with-registers-)?(small|base|large|giant)")
HEAD_WIDTH = 64  # channels of a head, in every published size
DTYPES = ("float32", "bfloat16")
# Of ImageNet's images, on a scale of 0 … 1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# transformers' names to the original's: patterns that are replaced one after the other.
RENAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
# The map of patches, by transformers' name and the original's.
PATCHES = ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight")
# Tokens in place of patches that are hidden, in training only.
MASK_TOKEN = "mask_token"
# Our arrays of a block to the original's; linear maps are transposed.
LINEAR = {"attention.qkv.linear": "attn.qkv", "attention.out": "attn.proj"}
LINEAR_OF_MLP = {
    "gelu": {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    "swiglu": {"mlp.up": "mlp.w12", "mlp.down": "mlp.w3"},
}
# Facts of transformers' configs with the values for which it computes the same as we do.
SUPPORTED = {
    "hidden_act": ["gelu"],
    "layer_norm_eps": [1e-6],
    "qkv_bias": [True],
    "num_channels": [3],
}
MODEL_TYPES = ("dinov2", "dinov2_with_registers")


@dataclass(frozen=True)
class PretrainedDINOv2:
    """An encoder's shape and weights, and where they are from."""

    config: ViTConfig
    params: dict[str, Any] = field(repr=False)  # float32, for `vit_graphdef`
    hash: str  # of the weights, whatever file they came in
    id: str  # of the hub, or a whole path

    def model(self, dtype: str = "float32") -> ViT:
        """Build a live module that computes in `dtype`, and holds its matrices in it."""

        def convert(path: Any, x: np.ndarray) -> Array:
            return jnp.asarray(x, dtype if path[-1].key == "kernel" else jnp.float32)

        params = jax.tree_util.tree_map_with_path(convert, self.params)
        return nnx.merge(vit_graphdef(self.config, dtype), params)


def load_dinov2(path_or_id: str, dtype: str = "float32") -> ViT:
    """Load an encoder as a live module; `path_or_id` as `read_dinov2` takes it.

    Args:
        dtype: of its matrices and products, float32 or bfloat16.

    Raises:
        UserError: it cannot be had, is damaged, or is no DINOv2 that this project can compute.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    return read_dinov2(path_or_id).model(dtype)


def read_dinov2(path_or_id: str) -> PretrainedDINOv2:
    """Read an encoder's weights.

    Args:
        path_or_id: a folder as transformers' `save_pretrained` writes it, one of its weight files,
            a .pth of facebookresearch/dinov2, an id of the hub, or a short one: dinov2-small,
            -base, -large, -giant, dinov2-with-registers-small, …

    Raises:
        UserError: it cannot be had, is damaged, or is no DINOv2 that this project can compute.
    """
    where, facts, tensors = _read_files(path_or_id)
    tensors = rename_to_original(tensors)
    tensors.pop(MASK_TOKEN, None)
    config = infer_config(tensors, facts, where)
    weight_files.require_shapes(where, tensors, published_shapes(config), "a DINOv2")
    weight_files.require_floats(tensors, where)
    params = params_from_original(tensors, config)
    return PretrainedDINOv2(config, params, weight_files.hash_tensors(tensors), where)


def vit_inputs(
    images: Float[Array, "b h w c"], size: ImageSize
) -> Float[Array, "b {size.height} {size.width} 3"]:
    """Resize images and normalise them as DINOv2 was trained, differentiably.

    Args:
        images: grey or RGB in −1 … 1.
        size: of the result in pixels. Cubic, antialiased, not clipped.
    """
    small = resize(images.astype(jnp.float32), *size.sides, kernel=cubic, antialias=True)
    return normalize((small + 1) / 2)


def normalize(images: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Normalise grey or RGB images in 0 … 1 by ImageNet's mean and deviation."""
    mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (jnp.broadcast_to(images, (*images.shape[:3], 3)) - mean) / std


# --- files ----------------------------------------------------------------------------------------


def _read_files(path_or_id: str) -> tuple[str, dict[str, Any], Tensors]:
    """Return where the weights were found, the facts of a config.json beside them, if there is
    one, and the tensors.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        facts = weight_files.read_optional_json(str(path.parent), CONFIG) or {}
        if facts.get("model_type") not in MODEL_TYPES:  # a config of something else in this folder
            facts = {}
        file = weight_files.read_file_weights(path, PATCHES)
        weight_files.print_notices(str(path), file.notices)
        return str(path.resolve()), facts, file.tensors
    if path.is_dir() and not (path / CONFIG).is_file():
        tensors = weight_files.read_bare_weights(path_or_id, "DINOv2")
        return str(path.resolve()), {}, tensors
    if not path.is_dir() and HUB_NAMES.fullmatch(path_or_id):
        path_or_id = f"facebook/{path_or_id}"
    network = weight_files.read_network(
        path_or_id,
        anchors=PATCHES,
        files=weight_files.TRANSFORMERS_FILES,
        dtypes=weight_files.WEIGHT_DTYPES,
    )
    weight_files.print_notices(network.id, network.notices)
    return network.id, network.config, network.tensors


def rename_to_original(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return transformers' tensors, or the original's, by the original's names."""
    renamed: Tensors = {}
    for name, x in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = x
    for name in [name for name in renamed if ".attn.query." in name]:
        names = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed for part in names):
            joined = np.concatenate([renamed.pop(part) for part in names])
            renamed[name.replace("query", "qkv")] = joined
    return renamed


# --- the shape ------------------------------------------------------------------------------------


def infer_config(
    tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], where: str
) -> ViTConfig:
    """Infer an encoder's shape from its tensors, by the original's names.

    Heads leave no trace in the weights: `facts` of transformers' config.json name their number,
    else they have 64 channels, as in every published size.

    Raises:
        UserError: it is no DINOv2, its config.json says something else than its weights, or it
            needs something that is not supported.
    """
    mlp = "swiglu" if "blocks.0.mlp.w12.weight" in tensors else "gelu"
    down_name = f"blocks.0.{LINEAR_OF_MLP[mlp]['mlp.down']}.weight"
    for name, n_axes in (("pos_embed", 3), ("patch_embed.proj.weight", 4), (down_name, 2)):
        if name not in tensors or tensors[name].ndim != n_axes:
            raise UserError(f"'{where}' is no DINOv2: it lacks {name} of {n_axes} axes")
    patch, registers = tensors["patch_embed.proj.weight"].shape, tensors.get("register_tokens")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    config = ViTConfig(
        width=patch[0],
        depth=len(blocks),
        n_heads=facts.get("num_attention_heads", patch[0] // HEAD_WIDTH),
        hidden=tensors[down_name].shape[1],
        patch=patch[2],
        grid=math.isqrt(max(tensors["pos_embed"].shape[1] - 1, 0)),
        n_registers=0 if registers is None else registers.shape[1],
        mlp=mlp,
    )
    if config.n_heads < 1 or config.width % config.n_heads:
        raise UserError(
            f"'{where}': {config.n_heads} heads do not divide its {config.width} channels; pass "
            f"its folder with the {CONFIG} of transformers, which has num_attention_heads"
        )
    _check_facts(config, facts, where)
    return config


def _check_facts(config: ViTConfig, facts: Mapping[str, Any], where: str) -> None:
    kind = facts.get("model_type")
    if facts and kind not in MODEL_TYPES:
        raise UserError(f"'{where}' is a {kind or 'model of no known type'}, not a DINOv2")
    expected = SUPPORTED | {
        "hidden_size": [config.width],
        "num_hidden_layers": [config.depth],
        "patch_size": [config.patch, 2 * [config.patch]],
        "use_swiglu_ffn": [config.mlp == "swiglu"],
        "num_register_tokens": [config.n_registers],
    }
    for name, values in expected.items():
        if name in facts and facts[name] not in values:
            raise UserError(
                f"'{where}': its {CONFIG} says {name} {facts[name]}, which its weights or this "
                f"project do not have: {values[0]}"
            )


# --- the weights ----------------------------------------------------------------------------------


def published_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its original name, without the mask token's."""
    c, d = config, config.width
    up = c.hidden * (2 if c.mlp == "swiglu" else 1)
    names = LINEAR_OF_MLP[c.mlp]
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)}
    linear |= {names["mlp.up"]: (up, d), names["mlp.down"]: (d, c.hidden)}
    block = {f"{name}.weight": shape for name, shape in linear.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    norms = [f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")]
    block |= dict.fromkeys([*norms, "ls1.gamma", "ls2.gamma"], (d,))
    shapes = {f"blocks.{i}.{name}": shape for i in range(c.depth) for name, shape in block.items()}
    shapes |= {"cls_token": (1, 1, d), "pos_embed": (1, 1 + c.grid**2, d)}
    shapes |= {"register_tokens": (1, c.n_registers, d)} if c.n_registers else {}
    shapes |= {"patch_embed.proj.weight": (d, 3, c.patch, c.patch), "patch_embed.proj.bias": (d,)}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def params_from_original(tensors: Mapping[str, np.ndarray], config: ViTConfig) -> dict[str, Any]:
    """Convert the original's tensors to ours, float32, with those of all blocks stacked."""
    c = config

    def of(name: str) -> np.ndarray:
        return tensors[name].astype(np.float32)

    def stack(name: str, *, transpose: bool = False) -> np.ndarray:
        x = np.stack([of(f"blocks.{i}.{name}") for i in range(c.depth)])
        return np.ascontiguousarray(x.swapaxes(1, 2)) if transpose else x

    tree: dict[str, np.ndarray] = {
        "class_token": of("cls_token")[0, 0] + of("pos_embed")[0, 0],
        "positions": of("pos_embed")[0, 1:].reshape(c.grid, c.grid, c.width),
        "patch.kernel": of("patch_embed.proj.weight").transpose(2, 3, 1, 0).reshape(-1, c.width),
        "patch.bias": of("patch_embed.proj.bias"),
        "norm.scale": of("norm.weight"),
        "norm.shift": of("norm.bias"),
    }
    if c.n_registers:
        tree["registers"] = of("register_tokens")[0]
    for ours, name in (LINEAR | LINEAR_OF_MLP[c.mlp]).items():
        tree[f"blocks.{ours}.kernel"] = stack(f"{name}.weight", transpose=True)
        tree[f"blocks.{ours}.bias"] = stack(f"{name}.bias")
    for i in (1, 2):
        tree[f"blocks.norm{i}.scale"] = stack(f"norm{i}.weight")
        tree[f"blocks.norm{i}.shift"] = stack(f"norm{i}.bias")
        tree[f"blocks.scale{i}"] = stack(f"ls{i}.gamma")
    return unflatten_dict(tree, sep=".")
