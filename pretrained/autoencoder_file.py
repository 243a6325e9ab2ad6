"""A single file of an autoencoder, alone or within a file of a whole Stable Diffusion, which has no
config beside its weights.

    read_autoencoder_file(Path("vae.safetensors"), parse_reference("sdxl:vae.safetensors"))

Its tensors have latent diffusion's names, or those of diffusers. Their shapes tell its config but
for the scale of latents. That follows from the network beside it in the file, from the file's
description of itself, or from a word before the path; otherwise it is asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder_names, weight_files
from pretrained.state_dicts import pop_heads
from pretrained.weight_files import PublishedNetwork
from runtime.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
PLACES = ("first_stage_model", "vae")  # where it lies in a file of several networks
GROUPS = 32  # of every norm of latent diffusion, which leave no trace in the weights


class Scale(NamedTuple):
    """The scale and shift of published latents, and their number of channels."""

    latent_channels: int
    scaling_factor: float
    shift_factor: float


# By the word before a path: of Stable Diffusion 1 and 2, XL, 3 and 3.5, and FLUX.1.
SCALES = {
    "sd": Scale(4, 0.18215, 0.0),
    "sdxl": Scale(4, 0.13025, 0.0),
    "sd3": Scale(16, 1.5305, 0.0609),
    "flux": Scale(16, 0.3611, 0.1159),
}
# Parts of names that only files of one family have.
FAMILY_PARTS = {
    "cond_stage_model": "sd",
    "conditioner": "sdxl",
    "joint_blocks": "sd3",
    "double_blocks": "flux",
}
ARCHITECTURE = "modelspec.architecture"  # in a file's description of itself
ARCHITECTURES = {
    "stable-diffusion-v1": "sd",
    "stable-diffusion-v2": "sd",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3",
    "flux-1": "flux",
}


class Reference(NamedTuple):
    """A path or hub id, with the family that may stand before a file's path."""

    family: str | None
    place: str


def parse_reference(text: str) -> Reference:
    """Split `sdxl:PATH` into its family and the path."""
    match = re.fullmatch(rf"({'|'.join(SCALES)}):(.+)", text, re.IGNORECASE)
    return Reference(match[1].lower(), match[2]) if match else Reference(None, text)


def read_autoencoder_file(
    path: Path, reference: Reference, *, scale: tuple[float, float] | None = None
) -> tuple[AutoencoderConfig, PublishedNetwork]:
    """Read the autoencoder in a file, however its weights are wrapped.

    Args:
        scale: scale and shift of latents, for files that do not tell them.

    Returns its config, and its tensors by diffusers' names.

    Raises:
        UserError: it cannot be read, is something else, or does not tell the scale of latents.
    """
    where = str(path)
    file = weight_files.read_file_weights(path, (autoencoder_names.ANCHOR,), places=PLACES)
    _refuse_part_of_folder(path)
    heads = pop_heads(file.tensors, autoencoder_names.PARTS)
    tensors = autoencoder_names.rename_to_diffusers(file.tensors, where)
    config = infer_config({name: x.shape for name, x in tensors.items()}, where)
    families = find_families(file.shapes, file.facts, where)
    if reference.family or not scale or len(_known_families(families, config)) == 1:
        family = _choose_family(reference.family, families, config, where)
        scale = SCALES[family][1:]
    config = replace(config, scaling_factor=scale[0], shift_factor=scale[1])
    prefix = f"{reference.family}:" if reference.family else ""
    notices = (*file.notices, *heads)
    return config, PublishedNetwork(f"{prefix}{path.resolve()}", None, {}, tensors, notices)


def _refuse_part_of_folder(path: Path) -> None:
    """Refuse a file whose config lies beside it: that tells the scale of latents."""
    config = weight_files.read_optional_json(str(path.parent), weight_files.CONFIG) or {}
    if config.get("_class_name") == autoencoder_names.CLASS:
        raise UserError(f"'{path}' is a part of '{path.parent}': name the folder, with its config")


# --- the config -----------------------------------------------------------------------------------


def holds_autoencoder(shapes: Shapes) -> bool:
    """Return True if a file of several networks has an autoencoder among them."""
    anchors = {f"{place}.{autoencoder_names.ANCHOR}" for place in PLACES}
    return any(name.endswith(tuple(anchors)) for name in shapes)


def infer_config(shapes: Shapes, where: str) -> AutoencoderConfig:
    """Infer an autoencoder's config, but for the scale of latents, from its tensors' shapes.

    Args:
        shapes: by diffusers' names.
        where: the file, for the messages of errors.

    Raises:
        UserError: it is no such autoencoder.
    """
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    try:
        return AutoencoderConfig(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(
                shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
            ),
            layers_per_block=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            norm_num_groups=GROUPS,
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
            mid_block_add_attention=any(".mid_block.attentions." in name for name in shapes),
        )
    except KeyError as error:
        raise UserError(f"'{where}' holds no AutoencoderKL: it lacks {error.args[0]}") from None
    except (UserError, IndexError) as error:
        raise UserError(f"'{where}' holds no AutoencoderKL: {error}") from None


def _count(shapes: Shapes, pattern: str) -> int:
    """Return how many numbers, from 0, stand in names after this pattern."""
    matches = [re.match(pattern, name) for name in shapes]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


# --- the scale of latents -------------------------------------------------------------------------


def find_families(shapes: Shapes, facts: Mapping[str, Any], where: str) -> set[str]:
    """Find the families that a file is of, by the networks in it and by what it says of itself.

    Raises:
        UserError: it scales each channel of latents by itself.
    """
    parts = {part for name in shapes for part in name.split(".")}
    if "edm_mean" in parts:
        raise UserError(
            f"'{where}' scales latents channel by channel, by its edm_mean: not supported"
        )
    families = {family for part, family in FAMILY_PARTS.items() if part in parts}
    architecture = str(facts.get(ARCHITECTURE, "")).lower()
    named = {family for start, family in ARCHITECTURES.items() if architecture.startswith(start)}
    return families | named


def _fitting_families(config: AutoencoderConfig) -> list[str]:
    """List the families whose latents have as many channels."""
    channels = config.latent_channels
    return [name for name, scale in SCALES.items() if scale.latent_channels == channels]


def _known_families(families: set[str], config: AutoencoderConfig) -> set[str]:
    """Return those of a file's families whose scale its latents can have."""
    # The upscaler of Stable Diffusion, of a quarter of the size, has another scale.
    return families & {*_fitting_families(config)} if config.downsampling == 8 else set()


def _choose_family(
    given: str | None, families: set[str], config: AutoencoderConfig, where: str
) -> str:
    """Choose the family whose scale of latents a file has.

    Args:
        given: the word before the path.
        families: those that the file is of.

    Raises:
        UserError: there is none, or none for certain.
    """
    channels, fitting = config.latent_channels, _fitting_families(config)
    if given and given not in fitting:
        expected = SCALES[given].latent_channels
        raise UserError(f"'{where}' has latents of {channels} channels; {given} has {expected}")
    if given and families - {given}:
        other = sorted(families - {given})[0]
        raise UserError(f"'{where}' is of {other} by what else is in it: leave out {given}:")
    if given:
        return given
    known = _known_families(families, config)
    if len(known) == 1:
        return known.pop()
    if not fitting:
        raise UserError(
            f"'{where}' has latents of {channels} channels, whose scale is not known: pass a "
            f"folder whose {weight_files.CONFIG} has their scaling_factor, as save_pretrained of "
            "diffusers writes it"
        )
    names = " or ".join(f"{name}:{where}" for name in fitting)
    raise UserError(f"'{where}' does not tell the scale of its latents: name it as {names}")
