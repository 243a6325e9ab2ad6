"""Groups of flags that several commands share: each flag stands here once, with its rules.

A command's config inherits from them, and declares what differs by `again`. The groups of a single
command stand beside it: those of `train.py` in `training.config`.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets_config import Crop
from methods.rectified_flow import TIME_GRIDS
from runtime.cli import FreeText
from runtime.errors import UserError
from runtime.flags import Derived, again, flag, flags_of, setting
from runtime.image_size import WrittenSize
from runtime.run_folder import TRAIN_COMMAND
from training import optim

DEFAULT_DATASET = "digits"
UNLABELLED = ("stop", "skip")
BY_DATASET = Derived("as the dataset recommends")  # in its entry in datasets_config.py
CROP_HELP = (
    "how an image gets the proportions of image_size: center cuts out its middle, letterbox shows "
    "all of it between black bars"
)
QUARTER = Derived("n_steps / 4, at most 1000")


# --- datasets -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DatasetFlags:
    """Dataset."""

    dataset_name: str = setting(
        DEFAULT_DATASET, "a key of DATASET_CONFIGS, folder:PATH or hf:owner/name"
    )
    data_dir: Path | None = flag(
        None,
        "local copy of the dataset: Parquet files, an image folder or a `save_to_disk` folder",
        may_change=True,
    )
    image_column: str | None = flag(None, "column of the images, for folder: and hf: datasets")
    train_split: str | None = flag(Derived("train"), "split to train on")
    eval_split: str | None = flag(
        Derived("the dataset's"), "split to evaluate on; none holds out rows of the training split"
    )


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Dataset."""

    image_size: WrittenSize = setting(
        BY_DATASET,
        "size of the images after crop and resize, such as 256 or 256x192 (height x width)",
        above=0,
    )
    channels: int = setting(BY_DATASET, "1 (greyscale) or 3 (RGB)")
    crop: Crop = setting(
        BY_DATASET,
        f"{CROP_HELP}, random cuts out a part anywhere, anew in each epoch",
    )


@dataclass(frozen=True, kw_only=True)
class LabelFlags:
    """Labels and captions."""

    label_column: str | None = flag(
        None, "column of the class labels, for folder: and hf: datasets"
    )
    caption_column: str | None = flag(
        None, "column of the captions, one or a list of them per image"
    )
    unlabelled: str = setting(
        "stop",
        "what to do about rows that have no class: stop, or skip to leave them out",
        choices=UNLABELLED,
    )


@dataclass(frozen=True, kw_only=True)
class LoadingFlags:
    """Loading."""

    streaming: bool = setting(
        False, "read images from Parquet files on demand, locally or from the hub"
    )
    n_workers: int | None = flag(
        Derived("half of the CPUs"),
        "worker processes that decode images, unless the dataset is in memory; 0 for threads",
        at_least=0,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class StorageFlags(LoadingFlags):
    """Loading."""

    shuffle_buffer: int = setting(
        10_000,
        "rows in the shuffle buffer of a streamed dataset",
        above=0,
        only_with=("streaming", None),
    )
    in_memory: bool | None = flag(
        Derived("up to 1 GiB"),
        "decode the dataset once and keep it in host memory",
        may_change=True,
    )
    cache_on_device: bool = setting(
        False, "keep the dataset in device memory and sample batches there", may_change=True
    )
    bad_rows: Literal["stop", "skip"] = setting(
        "stop",
        "rows that cannot be decoded: stop at the first, or skip them all, which decodes every row "
        "once before a new run and names them in bad_rows.json",
        may_change=True,
    )
    bad_rows_at_most: float = setting(
        0.01,
        "share of the training rows that may be skipped",
        at_least=0,
        at_most=1,
        only_with=("bad_rows", "skip"),
        may_change=True,
    )


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """Optimizer."""

    n_epochs: float | None = flag(
        None, "length of training in epochs; n_steps takes precedence", above=0, may_change=True
    )
    n_steps: int = setting(
        BY_DATASET,
        "length of training in updates; a larger value on resume stretches the schedule",
        above=0,
        may_change=True,
    )
    batch_size: int = setting(BY_DATASET, "images per update, over all devices", above=0)
    accumulate_steps: int = setting(
        1,
        "gradient accumulation: microbatches per update, to save memory",
        above=0,
        may_change=True,
    )
    learning_rate: float = setting(BY_DATASET, "peak learning rate", above=0)
    schedule: str = setting(
        "cosine",
        "constant, cosine, linear or wsd (constant, then linear)",
        choices=optim.SCHEDULES,
    )
    decay_from: int | None = flag(
        Derived("four fifths of n_steps"),
        "step at which wsd begins to decay; a resumed run may give another",
        at_least=0,
        only_with=("schedule", "wsd"),
        may_change=True,
    )
    warmup_steps: int = setting(
        Derived("n_steps / 20, at most 1000"), "steps of linear warmup", at_least=0
    )
    # AdamW divides by 1 − βⁿ.
    beta1: float = setting(
        0.9, "AdamW's decay rate of the first moment", at_least=0, at_most=0.999999
    )
    beta2: float = setting(
        0.999, "AdamW's decay rate of the second moment", at_least=0, at_most=0.999999
    )
    moments: Literal["fp32", "bf16"] = setting(
        "fp32",
        "precision that AdamW keeps its moments in; bf16 saves 4 bytes a weight that it moves",
    )
    weight_decay: float = setting(0.0, "weight decay, on matrices and kernels only", at_least=0)
    clip_norm: float = setting(1.0, "maximum gradient norm; 0 disables clipping", at_least=0)
    ema_decay: float = setting(
        BY_DATASET,
        "decay of the averaged weights (EMA), which are evaluated, sampled and exported",
        at_least=0,
        at_most=1,
    )
    nan_patience: int = setting(
        5,
        "non-finite steps in a row before rollback to the last checkpoint; each of them leaves the "
        "weights unchanged",
        above=0,
        may_change=True,
    )
    seed: int = setting(0, "random seed", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Run."""

    COMMAND: ClassVar[str]  # as config.json records it

    run_dir: Path | None = flag(
        Derived("a new one"),
        "run folder; by default runs/<dataset>-<model>-<time>",
        may_change=True,
        inherited=False,
    )
    resume: bool = flag(
        False,
        "continue run_dir, or the newest run of this dataset and model",
        may_change=True,
        inherited=False,
    )
    log_every: int = setting(
        50, "steps between lines of metrics, beside one of the last step", above=0, may_change=True
    )
    eval_save_steps: int = setting(
        QUARTER, "steps between evaluations, each with a checkpoint", above=0, may_change=True
    )
    n_eval_batches: int = setting(6, "batches per evaluation", above=0, may_change=True)
    sample_every_n: int = setting(
        QUARTER, "steps between grids of samples or reconstructions", above=0, may_change=True
    )
    keep_checkpoints: int = setting(
        2, "number of newest checkpoints to keep", above=0, may_change=True
    )
    keep_every: int | None = setting(
        None,
        "keep the checkpoints of steps that are multiples of this too, such as for --guide",
        above=0,
        may_change=True,
    )
    wandb_project: str | None = flag(
        None,
        "also log to this Weights & Biases project; with WANDB_MODE=offline, into the run folder",
        may_change=True,
    )

    @classmethod
    def flags_of_run(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the flags that start the training of a run once more, for `--config`.

        These are the flags given at the run's starts and its dataset, or all its values if it is of
        a version that did not record them; without those of a single start, and without those that
        the others leave unread.

        Args:
            saved: the run's `config.json`.

        Raises:
            UserError: the run is of another command.
        """
        command = saved.get("command", TRAIN_COMMAND)
        if command != cls.COMMAND:
            raise UserError(f"this is a run of {command}, not of {cls.COMMAND}")
        known = flags_of(cls)
        given = saved.get("given_flags")
        if given is None:
            values = {name: saved[name] for name in known if name in saved}
        else:
            pinned = ["dataset_name"]
            if "model" in known and "init_from" not in given:  # else the weights have the model
                pinned.append("model")
            values = {name: saved[name] for name in pinned} | given
        left_out = {
            name for name, rules in known.items() if not rules.inherited or rules.is_unread(saved)
        }
        return {name: value for name, value in values.items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Cluster."""

    distributed: bool = flag(
        False,
        "join the other processes of a cluster job (SLURM, Open MPI, Kubernetes, Cloud TPU), as "
        "JAX detects it",
        may_change=True,
        inherited=False,
    )
    coordinator: str | None = flag(
        None,
        "host:port of process 0, if JAX detects no cluster",
        may_change=True,
        inherited=False,
    )
    n_processes: int | None = flag(
        None,
        "number of processes, if JAX detects no cluster; 1 alone makes each task of a job a run of "
        "its own",
        may_change=True,
        inherited=False,
    )
    process_index: int | None = flag(
        None,
        "index of this process, from 0, if JAX detects no cluster",
        may_change=True,
        inherited=False,
    )


# --- evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InceptionFlags:
    """FID."""

    inception: str | None = flag(
        None,
        "weights of FID's Inception network: a file, a folder or a hub id; they take 0.1 GB of "
        "each device's memory, and half a GB more while features are computed",
    )


# --- sampling -------------------------------------------------------------------------------------

OF_MODEL = Derived("the model's own")


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Model."""

    run: Path | None = flag(None, "a run's folder")
    pretrained: str | None = flag(
        None,
        "instead of a run: DiT or SD3 of the hub or of a folder, as diffusers has them (a DiT "
        "perhaps as original:ID or diffusers:ID) or export.py writes them; or a file of the "
        "original DiT, SiT or SD3, such as dit:DiT-XL-2-256x256.pt",
    )
    lora: Path | None = flag(
        None,
        "adapters (LoRA) to add to the published model, in a file of PEFT, diffusers or export.py",
        only_with=("pretrained", None),
    )


@dataclass(frozen=True, kw_only=True)
class RunSourceFlags:
    """Model."""

    run: Path = again(SourceFlags, "run", default=MISSING)


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Model."""

    ema: bool = flag(True, "use a run's averaged weights (EMA); false uses the raw ones")
    ema_std: float | None = flag(
        None,
        "an average of this relative width instead, such as 0.15, made of the snapshots of a run "
        "that was trained with --ema_std",
    )
    step: int | None = flag(Derived("the newest"), "step of a run's checkpoint, or snapshot")
    base: str | None = flag(
        None, "current location of the base of a run's adapters (LoRA), if it has moved"
    )


@dataclass(frozen=True, kw_only=True)
class MovedFlags:
    """Model."""

    vae: str | None = flag(None, "current location of a latent model's VAE, if it has moved")
    text_towers: tuple[str, ...] = flag(
        (), "current locations of the model's text encoders, if they have moved"
    )


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Devices."""

    batch_size: int | None = flag(
        Derived("64 a device, 16 on a CPU"),
        "images at a time, on all devices together",
        at_least=1,
    )
    fsdp: int | None = flag(
        Derived("the run's own, as far as there are so many"),
        "devices that share one copy of the weights; 1 is plain data parallelism",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Sampling."""

    cfg_scale: float | None = flag(OF_MODEL, "classifier-free guidance scale; 1 disables guidance")
    n_steps: int | None = flag(OF_MODEL, "solver steps")
    solver: str | None = flag(
        OF_MODEL,
        "euler, heun, dpmpp_2m or sde; of DDPM: ddpm, ddim or dpmpp_2m; of MeanFlow: map",
    )
    shift: float | None = flag(
        OF_MODEL, "shift of rectified flow's time grid; above 1 spends more steps near the noise"
    )
    time_grid: str | None = flag(
        OF_MODEL,
        "times of rectified flow: even, or sd3 for those that published SD3s are sampled at, the "
        "last close to the data",
        choices=TIME_GRIDS,
    )
    interval: tuple[float, ...] | None = flag(
        Derived("0 1"), "guidance interval: two times to guide between, such as 0.2 0.8; 1 is noise"
    )
    eta: float | None = flag(
        Derived("0"), "fresh noise of ddim, from 0 (none) to 1 (as much as ddpm)"
    )
    guided_channels: int | None = flag(
        Derived("all"), "guide only the first so many channels; published DiTs guide 3"
    )
    inner_guidance: float | None = flag(
        Derived("1"),
        "scale of guidance by the model's inner head (--inner_head of train.py), such as 1.5; 1 "
        "disables it",
    )
    inner_interval: tuple[float, ...] | None = flag(
        Derived("0 1"), "two times between which inner guidance acts, such as 0.3 1"
    )
    route_guidance: float | None = flag(
        Derived("1"),
        "scale of guidance away from a prediction that leaves tokens out (--route of train.py), "
        "such as 1.5; 1 disables it",
    )
    route_rates: tuple[float, ...] | None = flag(
        Derived("0 and the share in training"),
        "shares of the tokens that the two predictions of route guidance leave out, the smaller "
        "first",
    )
    guide: str | None = flag(
        None, "RUN or RUN@STEP: a weaker model of the same data to guide by (autoguidance)"
    )
    guide_scale: float | None = flag(Derived("2 with --guide"), "scale of autoguidance")


@dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """Samples."""

    labels: tuple[str, ...] = flag(
        (),
        "class names or numbers, with equal shares of the samples; by default all classes, or up "
        "to ten, evenly spaced, in a figure or a comparison grid",
    )
    prompts: tuple[FreeText, ...] = flag(
        (),
        "captions, each in quotes, for a model that was trained on them; figures take by default "
        "those of the evaluation split",
    )
    cfg_sweep: tuple[float, ...] = flag(
        (), "guidance scales: a comparison grid with a row for each, from the same noise"
    )
    denoise: tuple[float, ...] = flag(
        (),
        "times in 0 … 1: a comparison grid of real images of the evaluation split, noised up to "
        "each time, and sampled from there",
    )
    seed: int | None = flag(Derived("0"), "seed of the noise; the same seed gives the same images")
