"""Class-conditional diffusion transformers as others publish them: DiT, SiT, and diffusers' DiT.

All three have the same weights, under two sets of names. The original's are in the middle: the
names of diffusers are mapped to them and back, and they to ours and back.

SiT is DiT's network with another clock. Its time runs from noise (0) to data (1), is not scaled
before its sinusoids, and its velocity is data − noise (Ma et al. 2024, §2): `convert_sit` turns
all that around within the weights.
"""

import math
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from model import SIZES, ModelConfig, init_model_params
from networks.layers import sincos_table
from pretrained import weight_files
from runtime.errors import UserError

CLASS = "DiTTransformer2DModel"
CLASSES = (CLASS, "Transformer2DModel")  # the second is its first name
POSITIONS = "pos_embed"  # the original stores its table of positions with the weights
Tensors = dict[str, np.ndarray]

# Our linear maps to the original's; {i} is a block.
LINEAR = {
    "patch": "x_embedder.proj",
    "time.mlp.hidden": "t_embedder.mlp.0",
    "time.mlp.out": "t_embedder.mlp.2",
    "blocks.modulation": "blocks.{i}.adaLN_modulation.1",
    "blocks.attention.qkv.linear": "blocks.{i}.attn.qkv",
    "blocks.attention.out": "blocks.{i}.attn.proj",
    "blocks.mlp.up": "blocks.{i}.mlp.fc1",
    "blocks.mlp.down": "blocks.{i}.mlp.fc2",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.out": "final_layer.linear",
}
# The codes that train DiTs of diffusers' layout: whether their frequencies of time end at 1/10 000.
ORIGINAL, DIFFUSERS = "original", "diffusers"
TIME_ENDPOINTS = {ORIGINAL: False, DIFFUSERS: True}
FREQUENCY_FACT = "_downscale_freq_shift"  # after an argument of diffusers'; only we write it
# Class and version in the configs of facebook/DiT-XL-2-256 and -512: the version that was to bring
# DiT, when nobody could have trained one in diffusers.
CONVERSION = ("Transformer2DModel", "0.12.0.dev0")
TABLE = "y_embedder.embedding_table.weight"  # the embedding of each class
PATCH = "x_embedder.proj.weight"
DIFFUSERS_PATCH = "pos_embed.proj.weight"
DIFFUSERS_TABLE_ENDING = ".class_embedder.embedding_table.weight"
PARTS = {"kernel": "weight", "bias": "bias"}

# The original's names to diffusers', the first that fits. The embedders of t and of the class are
# shared in the original; diffusers repeats them in every block {i}.
RENAMES = (
    (r"^x_embedder\.", "pos_embed."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
    (r"^t_embedder\.mlp\.0\.", "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2."),
    (r"^y_embedder\.", "transformer_blocks.{i}.norm1.emb.class_embedder."),
    (r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer_blocks.\1.attn1.to_{part}."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
)

# Fields of our model with the values for which the original's code, and diffusers', compute the
# same.
REQUIRED = {
    "block": "adaln_zero",
    "position": "sincos",
    "rope": False,
    "qk_norm": False,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "norm": "layer",
    "text_width": 0,
    "bottleneck": 0,
    "inner_head": 0,
    "takes_span": False,
}

# Facts of diffusers' configs that set the shape, with their defaults.
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# Facts with the values that are supported.
SUPPORTED = {
    "activation_fn": ["gelu-approximate"],
    "norm_type": ["ada_norm_zero"],
    "norm_eps": [1e-5, 1e-6],
    "norm_elementwise_affine": [False],
    "attention_bias": [True, False],
    "attention_type": ["default"],
    "double_self_attention": [False],
    "only_cross_attention": [False],
    "use_linear_projection": [False],
}
# Facts that change nothing here, and those that are written.
WITHOUT_EFFECT = ("dropout", "norm_num_groups", "upcast_attention")
WRITTEN_FACTS = ("activation_fn", "norm_type", "norm_elementwise_affine", "attention_bias")


# --- the shape ------------------------------------------------------------------------------------


def append_null_row(tensors: MutableMapping[str, np.ndarray], n_classes: int) -> bool:
    """Append a row of zeros to a table that has one for each class and none for the null label.

    Returns True if there was such a table. Our models have the row; it must not be used.
    """
    names = [n for n in tensors if n == TABLE or n.endswith(DIFFUSERS_TABLE_ENDING)]
    short = [name for name in names if n_classes and len(tensors[name]) == n_classes]
    for name in short:
        x = tensors[name]
        tensors[name] = np.concatenate([x, np.zeros_like(x[:1])])
    return bool(short)


def infer_config(tensors: Mapping[str, np.ndarray], where: str, n_heads: int | None) -> ModelConfig:
    """Infer the shape of an original DiT, which comes without a config, from its tensors.

    The last row of its table of labels is taken for the null label, which `dit_file` decides.

    Heads leave no trace in the weights: they follow from the width and depth of the published
    sizes.

    Args:
        where: the file, for the messages of errors.
        n_heads: the number of heads of a size that was not published.

    Raises:
        UserError: it is no such model, or its number of heads is unknown.
    """
    try:
        width, channels, patch_size, _ = tensors[PATCH].shape
        _, n_tokens, _ = tensors[POSITIONS].shape
        n_rows, _ = tensors[TABLE].shape
        n_out, _ = tensors["final_layer.linear.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"'{where}' holds no DiT or SiT: {_describe_key_error(error)}") from None
    matches = [re.match(r"blocks\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(match[1]) for match in matches if match), default=-1)
    side = math.isqrt(n_tokens)
    if side**2 != n_tokens:
        raise UserError(f"'{where}': its {n_tokens} positions do not form a square")
    n_heads = n_heads or _find_published_heads(width, depth, where)
    try:
        return ModelConfig(
            width=width,
            depth=depth,
            n_heads=n_heads,
            patch_size=patch_size,
            image_size=side * patch_size,
            channels=channels,
            out_channels=n_out // patch_size**2,
            n_classes=n_rows - 1,
        )
    except UserError as error:
        raise UserError(f"'{where}': {error}") from None


def _describe_key_error(error: Exception) -> str:
    return f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _find_published_heads(width: int, depth: int, where: str) -> int:
    for size in SIZES.values():
        if (size["width"], size["depth"]) == (width, depth):
            return size["n_heads"]
    raise UserError(
        f"'{where}' has {depth} blocks of width {width}, which is no published size: give their "
        "number of heads, such as dit:heads=6:PATH"
    )


def config_from_diffusers(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Convert a `config.json` of diffusers to ours.

    Its `norm_eps` is 1e-5 by default, also where the weights are the original's, whose code has
    1e-6. They were trained with 1e-6, which is computed here.

    Raises:
        UserError: it is the config of something else, or of something that is not supported.
    """
    name = config.get("_class_name")
    if name not in CLASSES or (name != CLASS and config.get("norm_type") != "ada_norm_zero"):
        raise UserError(f"'{where}' is not a {CLASS} but {name or 'of no known class'}")
    # null is as good as absent, and names that start with _ describe the file.
    given = {k: v for k, v in config.items() if v is not None and not k.startswith("_")}
    facts = DEFAULTS | {"out_channels": given.get("in_channels", DEFAULTS["in_channels"])} | given
    for fact, value in facts.items():
        problem = ""
        if fact in DEFAULTS or fact == "out_channels":
            minimum = 0 if fact == "num_embeds_ada_norm" else 1
            if type(value) is not int or value < minimum:
                problem = f"must be a whole number of at least {minimum}"
        elif fact not in WITHOUT_EFFECT and value not in SUPPORTED.get(fact, []):
            problem = "not supported"
        if problem:
            raise UserError(f"'{where}': its {weight_files.CONFIG} says {fact} {value}: {problem}")
    try:
        return ModelConfig(
            width=facts["num_attention_heads"] * facts["attention_head_dim"],
            depth=facts["num_layers"],
            n_heads=facts["num_attention_heads"],
            patch_size=facts["patch_size"],
            image_size=facts["sample_size"],
            channels=facts["in_channels"],
            out_channels=facts["out_channels"],
            n_classes=facts["num_embeds_ada_norm"],
        )
    except UserError as error:
        raise UserError(f"'{where}': its {weight_files.CONFIG} says {error}") from None


def split_code(text: str) -> tuple[str | None, str]:
    """Split `diffusers:PATH_OR_ID` into the code that trained a DiT in diffusers' layout, a key of
    `TIME_ENDPOINTS`, and the rest.
    """
    word, _, rest = text.partition(":")
    return (word.lower(), rest) if rest and word.lower() in TIME_ENDPOINTS else (None, text)


def find_code(config: Mapping[str, Any], where: str) -> str:
    """Find by which code the weights of a `config.json` of diffusers were trained: a key of
    `TIME_ENDPOINTS`.

    The two codes space the frequencies of time differently. diffusers computes all DiTs with its
    own, also those that were converted, and its config does not say where they are from. Exports
    of this project do, and the published conversions are known by the version that wrote them.

    Raises:
        UserError: it may be either.
    """
    if FREQUENCY_FACT in config:
        return DIFFUSERS if str(config[FREQUENCY_FACT]).startswith("1") else ORIGINAL
    if (config.get("_class_name"), config.get("_diffusers_version")) == CONVERSION:
        return ORIGINAL
    raise UserError(
        f"'{where}': its {weight_files.CONFIG} does not say whether it was converted from DiT's "
        "own code or trained in diffusers, which differ in the frequencies of time: name it as "
        f"{ORIGINAL}:{where} or {DIFFUSERS}:{where}"
    )


def config_to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """Make the config from which diffusers builds the model.

    Raises:
        UserError: diffusers' DiT cannot express the model.
    """
    values = {name: getattr(config, name) for name in REQUIRED}
    unfit = [f"{name} {value}" for name, value in values.items() if value != REQUIRED[name]]
    if not config.size.is_square:
        unfit.append(f"image_size {config.size}, which is not square")
    if unfit:
        raise UserError(f"diffusers' {CLASS} cannot hold a model with {', '.join(unfit)}")
    return {
        "_class_name": CLASS,
        "num_attention_heads": config.n_heads,
        "attention_head_dim": config.width // config.n_heads,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.n_classes,
        "norm_eps": 1e-6,
        # diffusers has no name for it, and skips names that begin with _.
        FREQUENCY_FACT: "1 in these weights, as in diffusers"
        if config.time_endpoint
        else "0 in these weights, where diffusers has 1: see README.md",
    } | {name: values[0] for name, values in SUPPORTED.items() if name in WRITTEN_FACTS}


# --- the original's names and ours ----------------------------------------------------------------


def params_to_original(params: Mapping[str, Any], config: ModelConfig) -> Tensors:
    """Return our weights, without positions, under the original's names and axes, as views."""
    return dict(_iterate_originals(params, config))


def _iterate_originals(
    params: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    tree: dict[tuple[str, ...], Any] = dict(flatten_dict(params))
    yield TABLE, np.asarray(tree["label", "table"])
    for ours, theirs in LINEAR.items():
        for ours_part, part in PARTS.items():
            x, name = np.asarray(tree[*ours.split("."), ours_part]), f"{theirs}.{part}"
            for i in range(config.depth) if "{i}" in name else (None,):
                yield name.format(i=i), _to_axes((x if i is None else x[i]), name, config)


def _to_axes(x: np.ndarray, name: str, config: ModelConfig) -> np.ndarray:
    """Bring one of our arrays to the original's axes.

    A token's numbers are in the order (p q c) in both, but the original's first map is a
    convolution.
    """
    if name == PATCH:
        p = config.patch_size
        return x.reshape(p, p, config.channels, -1).transpose(3, 2, 0, 1)
    return x.T


def params_from_original(
    tensors: MutableMapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Convert the original's weights to ours, float32.

    Each is used once and none is left. They are popped from `tensors` one by one, so that there is
    never a second copy of all.

    Raises:
        UserError: some are missing, left over or of another shape; the message names a few. Or the
            positions differ from ours.
    """
    if POSITIONS in tensors:
        require_sincos_positions(tensors.pop(POSITIONS), config, where)
    weight_files.require_shapes(where, tensors, original_shapes(config))
    tree: dict[tuple[str, ...], np.ndarray] = {
        ("label", "table"): np.array(tensors.pop(TABLE), np.float32)
    }
    for ours, theirs in LINEAR.items():
        for ours_part, part in PARTS.items():
            path, name = (*ours.split("."), ours_part), f"{theirs}.{part}"
            array = np.empty(_our_shapes(config)[path], np.float32)
            if "{i}" in name:
                for i in range(config.depth):
                    array[i] = tensors.pop(name.format(i=i)).T
            elif name == PATCH:
                array[:] = tensors.pop(name).transpose(2, 3, 1, 0).reshape(array.shape)
            else:
                array[:] = tensors.pop(name).T
            tree[path] = array
    return unflatten_dict(tree)


@lru_cache
def _our_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of each of our weights by its path."""
    tree: Any = jax.eval_shape(partial(init_model_params, config), jax.random.key(0))
    leaves: dict[tuple[str, ...], Any] = dict(flatten_dict(tree))
    return {path: x.shape for path, x in leaves.items()}


def original_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the original's weights, but its positions, by its name."""
    return {name: x.shape for name, x in params_to_original(_make_zeros(config), config).items()}


def diffusers_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of diffusers' weights by its name."""
    zeros = params_to_diffusers(_make_zeros(config), config)
    return {name: x.shape for name, x in zeros.items()}


def _make_zeros(config: ModelConfig) -> dict[str, Any]:
    """Make weights that are all views of one zero, and so need no memory."""
    zeros = {path: np.broadcast_to(np.float32(0), s) for path, s in _our_shapes(config).items()}
    return unflatten_dict(zeros)


def require_sincos_positions(table: np.ndarray, config: ModelConfig, where: str) -> None:
    """Raise UserError if a stored table of positions is not the one that is computed here."""
    places = [np.arange(side, dtype=float) for side in config.grid]
    ours = sincos_table(config.width, *places)[None]
    error = weight_files.rounding_of_positions(table.dtype)
    table = np.asarray(table, np.float32)
    if table.shape != ours.shape or not np.allclose(table, ours, rtol=0, atol=error):
        raise UserError(f"'{where}': its {POSITIONS} is not the sine-cosine table of DiT")


# --- the original's names and diffusers' ----------------------------------------------------------


def params_to_diffusers(params: Mapping[str, Any], config: ModelConfig) -> Tensors:
    """Return our weights under diffusers' names and in its axes, as views."""
    return rename_to_diffusers(params_to_original(params, config), config.depth)


def params_from_diffusers(
    tensors: MutableMapping[str, np.ndarray], config: ModelConfig, where: str
) -> dict[str, Any]:
    """Convert diffusers' weights to ours, float32; they are popped from `tensors`.

    Raises:
        UserError: some are missing, left over or of another shape; or the blocks' embedders, which
            are copies of one, differ.
    """
    return params_from_original(rename_from_diffusers(tensors, config, where), config, where)


def rename_to_diffusers(tensors: Mapping[str, np.ndarray], depth: int) -> Tensors:
    """Return the original's weights under diffusers' names.

    Embedders are repeated for each block, and queries, keys and values have maps of their own.
    """
    renamed: Tensors = {}
    for name, x in tensors.items():
        theirs = diffusers_name(name)
        if "{part}" in theirs:
            for part, third in zip("qkv", np.split(x, 3)):
                renamed[theirs.format(part=part)] = third
        else:
            for i in range(depth) if "{i}" in theirs else (None,):
                renamed[theirs.format(i=i)] = x
    return renamed


def diffusers_name(name: str) -> str:
    """Return diffusers' name of one of the original's weights.

    It has {i} where each block has a copy, and {part} where there are three: q, k and v.
    """
    for pattern, replacement in RENAMES:
        renamed, n = re.subn(pattern, replacement, name)
        if n:
            return renamed
    raise AssertionError(name)


def block_maps(path: tuple[str, ...], config: ModelConfig) -> list[list[str]]:
    """Name diffusers' maps that lie side by side in one of ours, for each block.

    Args:
        path: of the kernel of ours.
    """
    names = [
        diffusers_name(f"{LINEAR['.'.join(path[:-1])].format(i=i)}.") for i in range(config.depth)
    ]
    return [
        [name.format(part=part).rstrip(".") for part in ("qkv" if "{part}" in name else ("",))]
        for name in names
    ]


def rename_from_diffusers(
    tensors: MutableMapping[str, np.ndarray], config: ModelConfig, where: str
) -> Tensors:
    """Return diffusers' weights under the original's names, popped from `tensors`."""
    if (table := tensors.pop("pos_embed.pos_embed", None)) is not None:  # in old files
        require_sincos_positions(table, config, where)
    weight_files.require_shapes(where, tensors, diffusers_shapes(config))
    renamed: Tensors = {}
    for name in original_shapes(config):
        theirs = diffusers_name(name)
        if "{part}" in theirs:
            parts = [tensors.pop(theirs.format(part=part)) for part in "qkv"]
            renamed[name] = np.concatenate(parts)
        elif "{i}" in theirs:
            renamed[name] = _pop_identical(
                [theirs.format(i=i) for i in range(config.depth)], tensors, where
            )
        else:
            renamed[name] = tensors.pop(theirs)
    return renamed


def _pop_identical(
    names: list[str], tensors: MutableMapping[str, np.ndarray], where: str
) -> np.ndarray:
    """Pop the tensors of these names, which must be equal, and return one."""
    first = tensors.pop(names[0])
    for name in names[1:]:
        if not np.array_equal(first, tensors.pop(name)):
            raise UserError(
                f"'{where}': {name} differs from {names[0]}, and a DiT has one for all blocks"
            )
    return first


# --- SiT ------------------------------------------------------------------------------------------


def convert_sit(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """Convert SiT's weights, read as a DiT's, to a model of ours, in place.

    Time runs the other way, the velocity changes its sign, and outputs beyond the velocity are
    dropped.

    With frequencies f, cos((1 − t)f) = cos f · cos(tf) + sin f · sin(tf) and sin((1 − t)f) =
    sin f · cos(tf) − cos f · sin(tf). Features of 1 − t are thus a reflection of the features of
    t, which is folded into the first linear map.
    """
    hidden = params["time"]["mlp"]["hidden"]
    out = params["final"]["out"]
    hidden["kernel"] = _reverse_time_kernel(hidden["kernel"])
    n, c = config.patch_size**2, config.channels
    for part, x in out.items():
        velocity = x.reshape(*x.shape[:-1], n, -1)[..., :c]
        out[part] = -velocity.reshape(*x.shape[:-1], n * c)
    return params, replace(config, out_channels=c, time_scale=1.0)


def _reverse_time_kernel(kernel: np.ndarray) -> np.ndarray:
    """Return W' with which W'·features(t) = W·features(1 − t), for `layers.time_features`."""
    w_cos, w_sin = np.split(kernel.astype(np.float64), 2)
    n = len(w_cos)
    f = 10_000.0 ** -(np.arange(n) / n).reshape(-1, 1)
    cos, sin = np.cos(f), np.sin(f)
    reversed_kernel = np.concatenate([cos * w_cos + sin * w_sin, sin * w_cos - cos * w_sin])
    return reversed_kernel.astype(np.float32)
