"""Every flag of `train.py`, with its default and its rules.

Facts only: a setting left out is None here. `training.resolve` fills it in and checks the result by
the flags' metadata. Groups that other commands share are in `training.flag_groups`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from methods.ddpm import DDPMFlags
from methods.mean_flow import MeanFlowFlags
from methods.rectified_flow import RectifiedFlowFlags
from methods.registry import DEFAULT_METHOD
from model import MODELS
from runtime.cli import FreeText
from runtime.flags import Derived, again, flag, setting
from runtime.run_folder import TRAIN_COMMAND
from training.alignment import AlignFlags
from training.auxiliary import AuxiliaryFlags
from training.flag_groups import (
    BY_DATASET,
    ClusterFlags,
    DatasetFlags,
    DeviceFlags,
    ImageFlags,
    InceptionFlags,
    LabelFlags,
    MovedFlags,
    OptimizerFlags,
    RunFlags,
    SamplingFlags,
    StorageFlags,
)
from training.lora import LoraFlags
from training.mup import WidthTransferFlags
from training.routing import RouteFlags
from training.teacher import TeacherFlags

BY_PRESET = Derived("the model's")  # in its entry of MODELS, else in ModelConfig
# Values of --half_precision → the dtype of the computation.
PRECISIONS = {
    False: "float32",
    True: "bfloat16",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8",  # of the products of the blocks; bfloat16 for all else
}


@dataclass(frozen=True, kw_only=True)
class BucketFlags:
    """Dataset."""

    buckets: tuple[str, ...] = setting(
        (),
        "train images of any proportions: a number of shapes of the area of image_size, between "
        "1:2 and 2:1, such as 5, or the shapes, such as 256x256 320x192",
    )


@dataclass(frozen=True, kw_only=True)
class LatentFlags:
    """Dataset."""

    latents: Path | None = flag(
        None,
        "folder written by convert_imagenet.py, to train on latents instead of images",
        may_change=True,
    )
    vae: str | None = again(MovedFlags, "vae", only_with=("latents", None), may_change=True)


@dataclass(frozen=True, kw_only=True)
class CaptionFlags(LabelFlags):
    """Labels and captions."""

    conditioning: str = setting(
        BY_DATASET,
        "class, text or none; by default text if captions are configured, class if there are "
        "classes",
    )
    caption: tuple[FreeText, ...] | None = flag(
        None, 'caption templates filled with the class name, such as "a photo of a {label}"'
    )
    text_towers: tuple[str, ...] = setting(
        ("openai/clip-vit-large-patch14",),
        "text encoders, by Hugging Face id or folder; several are concatenated as in SD3",
    )
    text_length: int | None = flag(
        Derived("the text encoders' own"), "maximum caption length in tokens", above=0
    )
    caption_cache: Path | None = flag(
        Derived("beside the dataset"), "folder for the encoded captions", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Model."""

    model: str = setting(BY_DATASET, "a preset such as DiT-S/2", choices=MODELS)
    init_from: str | None = flag(
        None,
        "initial weights: a run, RUN or RUN@STEP, a folder or hub id in the format of diffusers or "
        "export.py, or a file of DiT, SiT or SD3; model flags then default to its own",
    )
    patch_size: int = setting(BY_PRESET, "patch size in pixels; overrides the preset", above=0)
    block: str = setting(
        BY_PRESET,
        "conditioning of the DiT blocks: adaln_zero, adaln, cross_attention or in_context",
    )
    position: str = setting(
        BY_PRESET,
        "absolute position embedding: sincos, cropped or centred (the middle of a large table, as "
        "in SD3), learned or none",
    )
    rope: bool = setting(BY_PRESET, "2-D rotary position embedding in attention")
    qk_norm: bool = setting(BY_PRESET, "normalise queries and keys")
    mlp: str = setting(BY_PRESET, "gelu or swiglu")
    norm: str = setting(BY_PRESET, "layer or rms")
    bottleneck: int = setting(
        BY_PRESET,
        "embed patches by two maps with so many channels between them, for large patches of "
        "pixels; 0 for one map",
        at_least=0,
    )
    time_scale: float = setting(
        Derived("1000, with meanflow 1"),
        "factor of t before its sinusoids; 1 for a flow that meanflow is to start from",
        above=0,
    )
    inner_head: bool | int = setting(
        0,
        "a second head after so many blocks, trained beside the last one, to guide by "
        "(--inner_guidance of generate.py); without a number after three tenths of them",
    )
    remat: bool = setting(
        Derived("for L, XL and H"),
        "recompute activations in the backward pass to save memory",
        may_change=True,
    )
    half_precision: bool | Literal["bf16", "fp16", "fp8"] = setting(
        Derived("where the device multiplies bfloat16 faster"),
        "compute in bfloat16 (bf16 or true), in float16 with loss scaling (fp16), or in bfloat16 "
        "with the blocks' products in eight bits (fp8)",
    )


@dataclass(frozen=True, kw_only=True)
class MethodFlags:
    """Method."""

    objective: str = setting(
        DEFAULT_METHOD,
        "training objective: rectified_flow, meanflow (samples in one step), ddpm, or module:class "
        "of a method of your own",
    )
    prediction: str = setting(
        Derived("velocity, with ddpm: epsilon"),
        "output of the network: velocity or x0 (the clean image); of ddpm: epsilon, x0 or v",
    )
    label_dropout: float = setting(
        0.1,
        "fraction of labels or captions replaced by the null label, for classifier-free guidance; "
        "with 0 the model cannot be guided",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class TrainDeviceFlags:
    """Devices."""

    fsdp: int = again(DeviceFlags, "fsdp", default=1, is_setting=True, above=0, may_change=True)


@dataclass(frozen=True, kw_only=True)
class BlockOptimizerFlags:
    """Optimizer of the blocks."""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "optimizer of the blocks' matrices; all other weights use AdamW"
    )


@dataclass(frozen=True, kw_only=True)
class AverageFlags:
    """Averages to choose from."""

    ema_std: tuple[float, ...] = setting(
        (),
        "relative widths of two or more further averages, such as 0.05 0.1; --ema_std of "
        "generate.py, evaluate.py, figures.py and export.py makes others of their snapshots",
    )
    snapshot_every: int = setting(
        Derived("n_steps / 20"),
        "steps between snapshots of those averages, which are all kept, with one more at the end",
        above=0,
        only_with=("ema_std", None),
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class PreviewFlags:
    """Samples of the run."""

    cfg_scale: float = again(
        SamplingFlags, "cfg_scale", default=BY_DATASET, is_setting=True, may_change=True
    )
    n_sample_steps: int = setting(
        Derived("50, with meanflow 1"), "solver steps per sample", above=0, may_change=True
    )
    solver: str = again(
        SamplingFlags,
        "solver",
        default=Derived("euler, with meanflow map, with ddpm ddpm"),
        is_setting=True,
        may_change=True,
    )
    sample_shift: float = setting(
        1.0, "shift of the sampling times towards noise", above=0, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class FidFlags:
    """FID during training."""

    fid_every: int = setting(
        0,
        "steps between FID evaluations, with one more at the end; 0 disables them. Training waits "
        "meanwhile: Inception alone needs 20 minutes for 5000 samples on two CPU cores",
        at_least=0,
        may_change=True,
    )
    fid_reference: Path | None = flag(
        None,
        "reference statistics: an .npz of evaluate.py --make_reference, of pytorch-fid, clean-fid "
        "or the ADM suite",
        only_with=("fid_every", None),
        may_change=True,
    )
    fid_n: int = setting(
        5000,
        "samples per FID evaluation, equally many of each class. FID falls as the number rises: "
        "compare only results with the same number (published ones use 50000)",
        only_with=("fid_every", None),
        may_change=True,
    )
    fid_features: Literal["inception", "pixels"] = setting(
        "inception",
        "inception, or pixels, which needs no weights; its result is not FID and is called "
        "pixel_frechet",
        only_with=("fid_every", None),
        may_change=True,
    )
    inception: str | None = again(
        InceptionFlags, "inception", only_with=("fid_every", None), may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class MeasurementFlags:
    """Instead of training."""

    overfit_batch: bool = setting(
        False,
        "train and evaluate on the first batch only, with new noise and times at each step, to "
        "check that the model can learn. The batch is written to samples/batch.png, and the "
        "samples should converge to it. The loss should approach 0, slowest near t = 0, where the "
        "noise to predict is almost invisible",
    )
    lr_range_test: bool | int = flag(
        False,
        "raise the learning rate from 1e-6 to 1e-1 on fresh weights, over 300 steps or the number "
        "given, plot the loss, suggest a learning rate, and exit",
        may_change=True,
        inherited=False,
    )
    profile: bool = flag(
        False,
        "measure the training, evaluation and sampling steps, print a report, and exit",
        may_change=True,
        inherited=False,
    )
    peak_tflops: float | None = flag(
        None,
        "peak TFLOP/s of this device, if training/flops.py does not know it",
        above=0,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    DatasetFlags,
    ImageFlags,
    BucketFlags,
    LatentFlags,
    CaptionFlags,
    StorageFlags,
    ModelFlags,
    MethodFlags,
    RectifiedFlowFlags,
    MeanFlowFlags,
    DDPMFlags,
    AuxiliaryFlags,
    AlignFlags,
    RouteFlags,
    LoraFlags,
    TeacherFlags,
    BlockOptimizerFlags,
    OptimizerFlags,
    WidthTransferFlags,
    AverageFlags,
    TrainDeviceFlags,
    ClusterFlags,
    RunFlags,
    PreviewFlags,
    FidFlags,
    MeasurementFlags,
):
    """Train a diffusion transformer on a Hugging Face dataset, by default on the digits in this
    repository.

    A flag left out takes the value of the resumed run, else the dataset's recommendation, else its
    default.
    """

    COMMAND: ClassVar[str] = TRAIN_COMMAND
