"""Protocols of evaluation: the conventions under which published figures were measured.

    PROTOCOLS["sit"].flags(cfg_scale=1.5, channels=4)

The conventions are those of each paper and its code; those of FD-DINOv2 are `DGM_EVAL`. No
published figure was reproduced with them here: neither the weights nor the reference statistics
were at hand. Samples nothing itself.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from evaluation.reference import Reference
from methods.method import Method
from methods.registry import METHODS
from runtime.errors import UserError

LIMITS = ("interval", "guided_channels")  # of guidance
OPEN_FLAGS = ("cfg_scale", *LIMITS)  # flags that a protocol may leave open


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Conventions of a paper's evaluation.

    Args:
        name: its value of `--protocol`.
        source: the paper and the script of its samples.
        objective: method of the models that it evaluates, a key of `METHODS`.
        solver, n_steps, shift: the sampler.
        cfg_scale: guidance scale; None leaves it open.
        guided_channels: guide only the first so many channels; None guides all.
        interval: guidance interval, where t = 1 is noise; None leaves it open.
        labels: balanced has as many samples of each class, random a random class for each sample.
        rounding: conversion to bytes, a key of `grids.ROUNDINGS`.
        preparation: how images are resized for Inception, a key of `inception.PREPARATIONS`.
        features: the features that are compared.
        n: number of samples of the published figures.
    """

    name: str
    source: str
    objective: str
    solver: str
    n_steps: int
    shift: float = 1.0
    cfg_scale: float | None = None
    guided_channels: int | None = None
    interval: tuple[float, float] | None = None
    labels: Literal["balanced", "random"]
    rounding: str
    preparation: str
    features: str = "inception"
    n: int = 50_000

    @property
    def fixed_flags(self) -> dict[str, Any]:
        """Flags of evaluate.py whose values it fixes for every model."""
        names = ("solver", "n_steps", "shift", "features", "preparation", *OPEN_FLAGS)
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def check_method(self, method: Method) -> None:
        """Raise UserError if it does not evaluate models of a method."""
        required = METHODS[self.objective]
        if not isinstance(method, required):
            raise UserError(
                f"--protocol {self.name} evaluates models of {required.title}, not of "
                f"{method.title}"
            )

    def check_reference(self, reference: Reference) -> None:
        """Raise UserError if the images of a reference were prepared in another way."""
        # A file of means and covariances alone does not say how its images were prepared.
        has_card = "features" in reference.card or reference.feature_card["preparation"] == "adm"
        preparation = reference.feature_card.get("preparation") if has_card else self.preparation
        if preparation != self.preparation:
            raise UserError(
                f"--protocol {self.name} prepares images as {self.preparation}, and reference "
                f"{reference.path} holds features of {preparation}"
            )

    def check_channels(
        self, channels: int, *, cfg_scale: float, guided_channels: int | None
    ) -> None:
        """Raise UserError if data of so many channels cannot be guided by it.

        Args:
            guided_channels: as given by its flag.
        """
        n_guided = self.guided_channels or channels
        if cfg_scale != 1 and n_guided > channels:
            raise UserError(
                f"--protocol {self.name} guides {n_guided} channels, and the model has {channels}"
            )
        if cfg_scale != 1 and guided_channels not in (None, n_guided):
            raise UserError(
                f"--guided_channels {guided_channels} contradicts --protocol {self.name}, which "
                f"guides all {n_guided}"
            )

    def flags(self, *, cfg_scale: float, channels: int) -> dict[str, Any]:
        """Return its flags for a model of so many channels. At a guidance scale of 1, limits of
        guidance are left out.
        """
        flags = self.fixed_flags
        if cfg_scale == 1:
            return flags | {name: None for name in LIMITS if name in flags}
        return flags | {"guided_channels": self.guided_channels or channels}

    def compare_n(self, n: int) -> str:
        """Return a warning if n samples are not as many as it has; else ""."""
        if n == self.n:
            return ""
        return (
            f"warning: --protocol {self.name} has {self.n} samples, and these are {n}: the scores "
            "are not the paper's"
        )

    def card(self, n: int) -> dict[str, Any]:
        """Return its values for the record of an evaluation of n samples."""
        deviations = [] if n == self.n else [f"n {n}, not {self.n}"]
        return asdict(self) | {"deviations": deviations}


TABLE = (
    Protocol(
        name="dit",
        source="Peebles & Xie 2023; sample_ddp.py of facebookresearch/DiT",
        objective="ddpm",
        solver="ddpm",
        n_steps=250,
        guided_channels=3,
        interval=(0.0, 1.0),
        labels="random",
        rounding="half_up",
        preparation="adm",
    ),
    Protocol(
        name="adm",
        source="Dhariwal & Nichol 2021; image_sample.py of openai/guided-diffusion",
        objective="ddpm",
        solver="ddpm",
        n_steps=250,
        cfg_scale=1.0,
        labels="random",
        rounding="down",
        preparation="adm",
    ),
    Protocol(
        name="sit",
        source="Ma et al. 2024; sample_ddp.py SDE of willisma/SiT",
        objective="rectified_flow",
        solver="sde",
        n_steps=250,
        guided_channels=3,
        interval=(0.0, 1.0),
        labels="random",
        rounding="half_up",
        preparation="adm",
    ),
    Protocol(  # its figures are with and without an interval
        name="repa",
        source="Yu et al. 2025; generate.py --mode sde of sihyun-yu/REPA",
        objective="rectified_flow",
        solver="sde",
        n_steps=250,
        labels="random",
        rounding="down",
        preparation="adm",
    ),
    Protocol(
        name="jit",
        source="Li & He 2025; main_jit.py of LTH14/JiT, whose interval 0.1 1 has t = 1 at the data",
        objective="rectified_flow",
        solver="heun",
        n_steps=50,
        interval=(0.0, 0.9),
        labels="balanced",
        rounding="nearest",
        preparation="adm",  # torch-fidelity resizes as TensorFlow 1 does
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in TABLE}


def check_flags(name: str, values: Mapping[str, Any], *, ema: bool = True) -> None:
    """Raise UserError for a flag that contradicts a protocol.

    Args:
        values: of the flags of sampling and features by name; None for those that are not given.
        ema: the averaged weights are sampled.
    """
    fixed = PROTOCOLS[name].fixed_flags
    if not ema:
        raise UserError(f"--ema False contradicts --protocol {name}, which samples the average")
    for flag, value in values.items():
        if value is None or (flag in OPEN_FLAGS and flag not in fixed):
            continue
        if flag not in fixed:
            raise UserError(f"--{flag} {_as_typed(value)} is not part of --protocol {name}")
        if value != fixed[flag]:
            raise UserError(
                f"--{flag} {_as_typed(value)} contradicts --protocol {name}, which has "
                f"{_as_typed(fixed[flag])}"
            )


def _as_typed(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in values)


# --- features of DINOv2 ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderProtocol:
    """Conventions of features of DINOv2: its class token after the last norm, in float32, of
    images that Pillow has resized to a square by bicubic interpolation in bytes, without a crop,
    and that are normalised by ImageNet's mean and deviation.

    Args:
        name: of the preparation of images, in references.
        source: the paper and its code.
        encoder: whose features have the paper's name.
        width, depth, n_registers: of that encoder.
        size: side of its images in pixels.
        position_offset: of its positions, which are resized to fewer patches than those of
            training: see `ViTConfig`.
    """

    name: str
    source: str
    encoder: str
    width: int
    depth: int
    n_registers: int
    size: int
    position_offset: float

    def compare_encoder(self, card: Mapping[str, Any]) -> str:
        """Return a warning if features are of another encoder than its own; else "".

        Args:
            card: of the features.
        """
        shape = card["encoder"]
        names = ("width", "depth", "n_registers")
        if all(shape[name] == getattr(self, name) for name in names):
            return ""
        return (
            f"warning: papers measure FD-DINOv2 with {self.encoder}, and this encoder has "
            f"{shape['depth']} blocks of {shape['width']} channels and {shape['n_registers']} "
            "registers: the scores do not compare with theirs"
        )


# Other code crops, resizes tensors, or takes another size of network. Positions are those of
# torch.hub's models; transformers' differ by the offset.
DGM_EVAL = EncoderProtocol(
    name="dgm_eval",
    source="Stein et al. 2023; models/dinov2.py of layer6ai-labs/dgm-eval without --clean_resize",
    encoder="dinov2-large",
    width=1024,
    depth=24,
    n_registers=0,
    size=224,
    position_offset=0.1,
)
