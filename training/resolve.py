"""Filling in and checking the flags of `train.py`.

`resolve_train_config` is the one place where flags left out get their values and all values are
checked. `training.config` declares the flags; here nothing is loaded and no device is used. Only
the trainer reads the result: every other module takes plain arguments.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data import latents
from data.buckets import canonical_words, resolve_shapes
from datasets_config import DATASET_CONFIGS, DatasetConfig
from inference.guidance import unguidable_error
from inference.sampler import SamplerConfig
from inference.snapshots import check_std
from inference.spaces import Space, space_of
from methods.method import Method
from methods.registry import METHODS, find_method
from model import BLOCKS, JOINT, MODELS, ModelConfig, model_config
from runtime.errors import UserError
from runtime.flags import check_values, defaults_of, flags_of, paths_of, reject_unused
from runtime.image_size import ImageSize, canonical_size
from runtime.run_folder import absolute_reference, with_step_of
from training import wandb_sink
from training.alignment import DEFAULT_DEPTH, check_alignment
from training.auxiliary import check_layer_sync
from training.conditionings import RUN_CONDITIONINGS, ByCaption
from training.config import BY_PRESET, PRECISIONS, TrainConfig
from training.flag_groups import BY_DATASET, DEFAULT_DATASET
from training.lora import check_lora, lora_config
from training.mup import check_mup
from training.routing import check_routing

CONSTANT_TO_WSD = ("schedule", "constant", "wsd")  # they are the same until wsd decays
INNER_HEAD_DEPTH = 0.3  # of the blocks
FROZEN = {"teacher", "align"}  # flags of a second network, which may be a run that moves
MIN_RATIO_OF_STDS = 1.1  # of averages
MIN_DEPTH_FOR_REMAT = 24  # of L, XL and H
AnyConfig = TypeVar("AnyConfig")  # TrainConfig, or the config of another command that trains

# --- the flags that were given, now and in the run to resume --------------------------------------


def given_flags(config: Any) -> dict[str, Any]:
    """Return the flags that are set. Local text encoders and initial weights become absolute paths,
    so that a resumed run finds them from any directory.
    """
    values = {name: getattr(config, name) for name in flags_of(config)}
    given = {name: value for name, value in values.items() if value is not None}
    for name in {"init_from", *FROZEN} & given.keys():
        given[name] = absolute_reference(given[name])
    if "buckets" in given:
        given["buckets"] = canonical_words(given["buckets"])
    if "image_size" in given:
        given["image_size"] = canonical_size(given["image_size"])
    if encoders := given.get("text_towers"):
        folders = [Path(encoder).expanduser() for encoder in encoders]
        given["text_towers"] = tuple(
            str(folder.resolve()) if folder.is_dir() else encoder
            for folder, encoder in zip(folders, encoders)
        )
    return given


def recorded_flags(config: Any, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the flags given at all starts of a run, as JSON takes them, for its `config.json`.

    Args:
        config: the flags of this start, before `merge_saved` and `resolve_train_config`.
        saved: `config.json` of the run to resume; empty or None for a new run.

    Returns None if the run was started by a version that did not record them.
    """
    earlier = saved.get("given_flags") if saved else {}
    if earlier is None:
        return None
    known = flags_of(config)
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given_flags(config).items()
        if known[name].inherited
    }
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    if "n_epochs" in given:  # else the earlier n_steps would take precedence
        earlier = {name: value for name, value in earlier.items() if name != "n_steps"}
    return earlier | given


def merge_saved(config: AnyConfig, saved: dict[str, Any]) -> AnyConfig:
    """Fill in the flags left out from `config.json` of the run to resume.

    Raises:
        UserError: flags that may not change have another value than in the run; names all of them.
    """
    known, given = flags_of(config), given_flags(config)
    # JSON has no tuples.
    saved = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    if given.get("inner_head") is True and saved.get("inner_head"):
        given["inner_head"] = saved["inner_head"]  # the number that it stood for
    first_given = (saved.get("given_flags") or {}).get("buckets")
    if first_given and list(given.get("buckets", ())) == first_given:
        given["buckets"] = saved["buckets"]  # the shapes that were chosen
    for name in {"init_from", *FROZEN} & given.keys():
        given[name] = with_step_of(given[name], saved.get(name) or "")
    if "decay_from" not in given and {"n_steps", "n_epochs"} & given.keys():
        saved = saved | {"decay_from": None}  # it was of the other length
    changed = [
        f"{name} was {saved.get(name)}, not {value}"
        for name, value in given.items()
        if not (known[name].may_change or (name, saved.get(name), value) == CONSTANT_TO_WSD)
        # The base of adapters may have moved: its weights are compared instead.
        and not (name == "init_from" and saved.get("lora_rank"))
        and _canonical(name, saved.get(name)) != _canonical(name, value)
    ]
    changed += [f"there was no --{name}" for name in FROZEN & given.keys() if not saved.get(name)]
    if changed:
        raise UserError(f"cannot resume: {'; '.join(changed)}")
    # A flag that is newer than the run is not in its config.json.
    inherited = {name for name, flag in known.items() if flag.inherited} & saved.keys()
    values: dict[str, Any] = {name: saved[name] for name in inherited}
    if "n_epochs" in given:
        values["n_steps"] = None
    for name in paths_of(config) & values.keys():
        if values[name]:
            values[name] = Path(values[name])
    return type(config)(**values | given)


def _canonical(name: str, value: Any) -> Any:
    """Return one value for the synonyms of a precision."""
    return PRECISIONS.get(value, value) if name == "half_precision" else value


def require_same_implementation(
    run_dir: Path, saved: Mapping[str, Any], key: str, now: str
) -> None:
    """Reject resuming with another Python class than the one that trained the run.

    Args:
        saved: `config.json` of the run to resume; an old one does not say.
        key: trainer or method.
        now: `module:class`. Modules may differ: a script's is __main__ until it is imported.

    Raises:
        UserError: the classes differ.
    """
    before = saved.get(key) or now
    name = before.rpartition(":")[2]
    if name != now.rpartition(":")[2]:
        opened = f"{name}.from_run(…)" if key == "trainer" else f"{name} in METHODS"
        raise UserError(
            f"'{run_dir}' was trained by the {key} {before}, not by {now}: resume it with "
            f"{opened}; generate.py --run samples from it"
        )


def require_same_space(space: Space, saved: dict[str, Any]) -> None:
    """Reject resuming in another space. The locations of the VAE and of the images may differ.

    Args:
        space: of the dataset that is open.
        saved: `config.json` of the run to resume.

    Raises:
        UserError: a fact of the space differs.
    """
    before, now = space_of(saved["dataset"]["encoding"]).facts, space.facts
    for name in now or before:
        if before.get(name) != now.get(name):
            raise UserError(
                f"cannot resume: {name} of the latents was {before.get(name)}, not {now.get(name)}"
            )


# --- filling in the flags left out ----------------------------------------------------------------


def with_dataset_and_latents(config: TrainConfig) -> TrainConfig:
    """Fill in the dataset's name from its latents, or the folder of latents from the dataset."""
    name = config.dataset_name
    if config.latents and not name:
        name = latents.read_latent_dataset(config.latents).encoding.dataset_name
    name = name or DEFAULT_DATASET
    dataset = DATASET_CONFIGS.get(name)
    folder = config.latents
    if not folder and dataset and dataset.latents_dir:
        folder = Path(dataset.latents_dir)
    return replace(config, dataset_name=name, latents=folder)


def resolve_train_config(
    config: TrainConfig,
    dataset: DatasetConfig,
    *,
    n_rows: int,
    bucket_sizes: Sequence[int] = (),
    n_devices: int,
    fast_bf16: bool,
    starts_with_null: bool = False,
) -> TrainConfig:
    """Fill in every flag left out, from the dataset's recommendation or the defaults, and check all
    values.

    Args:
        n_rows: rows of the training split, for `n_epochs`.
        bucket_sizes: those of each bucket, if there are any.
        n_devices: devices that a batch is split over.
        fast_bf16: the devices multiply bfloat16 faster than float32: it is the default then.
        starts_with_null: the weights to start from have a trained null label.

    Raises:
        UserError: a value is impossible, or contradicts another.
    """
    values = known_values(config, dataset)
    given = given_flags(config)
    can_guide = bool(values["label_dropout"]) or starts_with_null
    conditioning = RUN_CONDITIONINGS[values["conditioning"]]
    is_guidable = find_method(values["objective"]).is_guidable
    if not (conditioning.has_null and can_guide and is_guidable):
        values["cfg_scale"] = given.get("cfg_scale", 1.0)
    for name in {*ByCaption.flags} - {*conditioning.flags}:
        if given.get(name):
            raise UserError(f"--{name} is for captions; pass --caption_column or --caption too")
        values["text_towers"] = ()
    values = drop_flags_of_other_methods(values, given)
    check_given(config, values)
    values["n_steps"] = length_of_training(config, values, bucket_sizes or [n_rows])
    if values["inner_head"] is True:
        values["inner_head"] = round(INNER_HEAD_DEPTH * MODELS[values["model"]]["depth"])
    resolved = TrainConfig(**derived_defaults(values, fast_bf16) | values)
    resolved = replace(resolved, buckets=_written_buckets(resolved, dataset))
    validate_train_config(resolved, n_devices)
    if not can_guide and resolved.cfg_scale != 1:
        raise UserError(
            f"--cfg_scale {resolved.cfg_scale}: with --label_dropout 0 no null label is trained to "
            "guide by; leave it at 1"
        )
    return resolved


def _written_buckets(config: TrainConfig, dataset: DatasetConfig) -> tuple[str, ...]:
    """Return the shapes that `--buckets` chooses or names, or those of latents, in pixels, as
    config.json records them.

    Raises:
        UserError: there are no such shapes.
    """
    if dataset.encoding:
        if config.buckets not in ((), dataset.encoding.buckets):
            raise UserError(
                "--buckets is for images; convert_imagenet.py --buckets makes latents of several "
                "shapes, which --latents knows"
            )
        if dataset.encoding.buckets and config.bad_rows == "skip":
            raise UserError("--bad_rows skip is for images, not for --latents of several shapes")
        return dataset.encoding.buckets
    if not config.buckets:
        return ()
    size = ImageSize.parse(config.image_size)
    shapes = resolve_shapes(config.buckets, size, config.patch_size)
    return tuple(shape.in_full for shape in shapes)


def known_values(config: Any, dataset: DatasetConfig) -> dict[str, Any]:
    """Return the value of each flag that is given, recommended by the dataset or has a default, in
    this order of precedence.
    """
    by_dataset = [name for name, flag in flags_of(config).items() if flag.default is BY_DATASET]
    recommended = {name: getattr(dataset, name) for name in by_dataset}
    return defaults_of(config) | recommended | given_flags(config)


def check_given(config: Any, values: Mapping[str, Any]) -> None:
    """Reject impossible values, before anything is computed from them, and given flags that others
    leave unread.

    Raises:
        UserError: the first one found.
    """
    check_values(config, values)
    if not config.resume:  # a resumed run may have inherited flags that are no longer read
        reject_unused(config, values, given_flags(config))


def length_of_training(config: Any, values: Mapping[str, Any], n_rows: Sequence[int]) -> int:
    """Return the number of updates, of `n_epochs` if no `n_steps` are given.

    Args:
        n_rows: those of each bucket: after the batches of `BucketOrder.batches_before` every row
            was in so many epochs. All rows together where there are no buckets.
    """
    if config.n_epochs is not None and config.n_steps is None:
        return sum(math.ceil(config.n_epochs * n / values["batch_size"]) for n in n_rows)
    return values["n_steps"]


def check_decay(config: Any) -> None:
    """Raise UserError unless the learning rate begins to decay between its warm-up and the end."""
    start = config.decay_from
    if start is None:
        return
    if config.schedule != "wsd":
        raise UserError(f"--decay_from {start} is for --schedule wsd; this is {config.schedule}")
    if not config.warmup_steps <= start < config.n_steps:
        raise UserError(
            f"--decay_from {start}: must be after the {config.warmup_steps} steps of warm-up, and "
            f"before the end at --n_steps {config.n_steps}"
        )


def check_averages(stds: Sequence[float], *, n_steps: int, snapshot_every: int) -> None:
    """Raise UserError unless these relative widths differ, so that averages of others can be made
    of them; made of one alone, those would be off by several per cent.
    """
    for std in stds:
        check_std(std)
    if stds and snapshot_every > n_steps:
        raise UserError(
            f"--snapshot_every {snapshot_every}: the run has {n_steps} steps; take a twentieth of "
            "them"
        )
    if len(stds) == 1:
        raise UserError(f"--ema_std {stds[0]:g}: takes two or more widths, such as 0.05 0.1")
    ascending = sorted(stds)
    for small, large in itertools.pairwise(ascending):
        if large < MIN_RATIO_OF_STDS * small - 1e-9:
            raise UserError(
                f"--ema_std {small:g} {large:g}: must be at least a tenth apart, such as 0.05 0.1"
            )


def defaults_of_length(n_steps: int) -> dict[str, int]:
    """Return the defaults that follow from the number of updates."""
    quarter = max(1, min(1000, n_steps // 4))
    return {
        "warmup_steps": min(1000, n_steps // 20),
        "eval_save_steps": quarter,
        "sample_every_n": quarter,
    }


def drop_flags_of_other_methods(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return `values` without the flags that only other methods read.

    Raises:
        UserError: such a flag is given, or there is no such method.
    """
    objective = values["objective"]
    read = method_flags(find_method(objective))
    readers: dict[str, list[str]] = {}
    for other, method in METHODS.items():
        for flag in method_flags(method) - read:
            readers.setdefault(flag, []).append(other)
    for flag, others in readers.items():
        if flag in given:
            named = " or ".join(others)
            raise UserError(f"--{flag} is for --objective {named}; this is {objective}")
    return {name: value for name, value in values.items() if name not in readers}


def method_flags(method: type[Method]) -> set[str]:
    """Return the names of the flags that a method reads, and not all methods do."""
    return {*flags_of(method), *method.sampling_flags}


def derived_defaults(values: dict[str, Any], fast_bf16: bool) -> dict[str, Any]:
    """Return the defaults that follow from the model, the objective, the length and the device."""
    preset = MODELS.get(values["model"], {})
    by_preset = [name for name, flag in flags_of(TrainConfig).items() if flag.default is BY_PRESET]
    return {
        **{name: preset.get(name, getattr(ModelConfig, name, None)) for name in by_preset},
        "align_at": max(1, round(DEFAULT_DEPTH * preset.get("depth", 0))),
        "remat": preset.get("depth", 0) >= MIN_DEPTH_FOR_REMAT,
        "half_precision": fast_bf16,
        **defaults_of_method(find_method(values["objective"])),
        "snapshot_every": max(1, values["n_steps"] // 20),
        "lora_alpha": float(values["lora_rank"] or 1),
        **defaults_of_length(values["n_steps"]),
    }


def defaults_of_method(method: type[Method]) -> dict[str, Any]:
    """Return the defaults that differ between methods."""
    prediction = flags_of(method).get("prediction")
    return {
        "solver": next(iter(method.solvers)),
        "prediction": prediction.default if prediction else None,
        "n_sample_steps": method.default_steps,
        "time_scale": method.default_time_scale,
    }


# --- checks ---------------------------------------------------------------------------------------


def validate_train_config(config: TrainConfig, n_devices: int) -> None:
    """Reject impossible values and combinations, before anything is loaded or written.

    Raises:
        UserError: the first one found.
    """
    check_decay(config)
    check_averages(config.ema_std, n_steps=config.n_steps, snapshot_every=config.snapshot_every)
    _validate_model_and_sampling(config)
    if n_devices % config.fsdp:
        raise UserError(f"--fsdp {config.fsdp} does not divide the {n_devices} devices")
    _reject_conflicting_modes(config)
    _reject_conflicting_storage(config)
    _reject_conflicts_of_buckets(config)
    _validate_fid_flags(config)


def _validate_model_and_sampling(config: TrainConfig) -> None:
    sampler_config(config)
    method = training_method(config)
    method.check_training(
        time_scale=config.time_scale,
        label_dropout=config.label_dropout if config.conditioning != "none" else 0.0,
        is_taught=bool(config.teacher),
    )
    if config.cfg_scale != 1 and not method.is_guidable:
        raise unguidable_error(method.title, f"--cfg_scale {config.cfg_scale:g}")
    if config.inner_head and not method.is_guidable:
        raise UserError(
            f"--inner_head {config.inner_head}: --objective {config.objective} cannot be guided by "
            "one; leave it at 0"
        )
    preset = MODELS[config.model]
    check_layer_sync(config.layer_sync, preset["depth"])
    check_mup(config.mup, width=preset["width"], n_heads=preset["n_heads"])
    check_lora(config)
    if config.align:
        check_alignment(config.align_at, depth=preset["depth"], is_taught=bool(config.teacher))
    if config.route:
        _validate_route(config, method)
    is_joint = preset.get("block") == JOINT
    if is_joint != (config.block == JOINT):
        allowed = "joint blocks only" if is_joint else f"one of: {', '.join(BLOCKS)}"
        raise UserError(f"--block {config.block}: {config.model} takes {allowed}")
    if not RUN_CONDITIONINGS[config.conditioning].has_null and config.cfg_scale != 1:
        raise UserError(
            f"--cfg_scale {config.cfg_scale}: an unconditional model cannot be guided; leave it at "
            "1"
        )


def _validate_route(config: TrainConfig, method: Method) -> None:
    if method.extra_passes(is_taught=bool(config.teacher)):
        raise UserError(
            f"--route {' '.join(map(str, config.route))}: --objective {config.objective} calls "
            "its network several times in a loss; train without a route"
        )
    height, width = ImageSize.parse(config.image_size).sides
    check_routing(
        config.route,
        config.route_share,
        depth=MODELS[config.model]["depth"],
        grid=(height // config.patch_size, width // config.patch_size),
        taps={
            "inner_head": (config.inner_head,),
            "layer_sync": config.layer_sync,
            "align_at": (config.align_at,) if config.align else (),
        },
    )


def _reject_conflicting_modes(config: TrainConfig) -> None:
    if config.lr_range_test and (config.resume or config.profile):
        other = "--resume" if config.resume else "--profile"
        raise UserError(
            f"--lr_range_test starts from fresh weights and trains no run: drop {other}"
        )
    if config.profile and config.cache_on_device:
        raise UserError("--profile measures blank batches and caches none: add --nocache_on_device")
    if config.overfit_batch and config.cache_on_device:
        raise UserError("--overfit_batch and --cache_on_device are mutually exclusive")
    if config.wandb_project is not None:
        wandb_sink.require_installed()


def _reject_conflicting_storage(config: TrainConfig) -> None:
    if config.streaming and config.in_memory:
        raise UserError("--in_memory and --streaming are mutually exclusive")
    if config.cache_on_device and (config.streaming or config.in_memory is False):
        raise UserError(
            "--cache_on_device holds the whole dataset; drop --streaming or --noin_memory"
        )
    if config.cache_on_device and not RUN_CONDITIONINGS[config.conditioning].fits_on_device:
        raise UserError(
            "--cache_on_device is for class labels; captions are read from their own cache"
        )


def _reject_conflicts_of_buckets(config: TrainConfig) -> None:
    if not config.buckets:
        return
    conflicts = {
        "--cache_on_device: it holds images of one shape": config.cache_on_device,
        "--position learned: its table has one shape; take sincos": config.position == "learned",
        "--align: the encoder sees one shape": config.align,
        "--overfit_batch: its samples have one shape": config.overfit_batch,
    }
    for conflict, is_given in conflicts.items():
        if is_given:
            raise UserError(f"--buckets is not for {conflict}")


def _validate_fid_flags(config: TrainConfig) -> None:
    if not config.fid_every:
        return
    if config.fid_n < 2:
        raise UserError(f"--fid_n {config.fid_n}: statistics need at least 2 samples")
    if not config.fid_reference:
        raise UserError(
            "--fid_every needs --fid_reference FILE.npz; write it with `python evaluate.py "
            "--make_reference FILE.npz --dataset_name NAME`"
        )
    if config.fid_features == "inception" and not config.inception:
        raise UserError(
            "--fid_every needs Inception's weights: pass --inception FILE (README.md links them); "
            "--fid_features pixels needs none, but is not FID"
        )


def require_even_batches(config: Any, n_devices: int) -> None:
    """Require a batch size that divides into the devices, and then into the microbatches.

    Raises:
        UserError: it does not.
    """
    if config.batch_size % (n_devices * config.accumulate_steps):
        microbatches = (
            f" × {config.accumulate_steps} microbatches" if config.accumulate_steps > 1 else ""
        )
        raise UserError(
            f"--batch_size {config.batch_size} is not divisible by the {n_devices} "
            f"devices{microbatches}"
        )


# --- objects of a resolved config -----------------------------------------------------------------


def network_config(config: TrainConfig, dataset: DatasetConfig) -> ModelConfig:
    """Return the model of a resolved `config`, without the widths of its text encoders."""
    precision = PRECISIONS[config.half_precision]
    return model_config(
        config.model,
        patch_size=config.patch_size,
        image_size=config.image_size,
        channels=config.channels,
        out_channels=training_method(config).out_channels(config.channels),
        n_classes=RUN_CONDITIONINGS[config.conditioning].n_classes(dataset),
        block=config.block,
        position=config.position,
        rope=config.rope,
        qk_norm=config.qk_norm,
        mlp=config.mlp,
        norm=config.norm,
        dtype="bfloat16" if precision == "float8" else precision,
        fp8=precision == "float8",
        remat=config.remat,
        bottleneck=config.bottleneck,
        inner_head=config.inner_head,
        route=config.route if config.route_share else (),
        time_scale=config.time_scale,
        takes_span=training_method(config).takes_span,
        lora=lora_config(config),
    )


def training_method(config: TrainConfig) -> Method:
    """Return the method of a resolved `config`, which makes the loss and knows how to sample."""
    return find_method(config.objective).from_flags(vars(config))


def sampler_config(config: TrainConfig, *, clip: bool = False) -> SamplerConfig:
    """Return the sampler of a resolved `config`.

    Args:
        clip: the data lie in −1 … 1.

    Raises:
        UserError: the solver is not one of the method's, or has not so many steps.
    """
    return SamplerConfig(
        config.solver,
        config.n_sample_steps,
        training_method(config),
        shift=config.sample_shift or 1.0,
        clip=clip,
    )
