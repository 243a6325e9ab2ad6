"""Everything of a run that is decided before a device is used: `prepare(config) -> Prepared`.

In this order: the run's folder and what it recorded, the weights to start from, the dataset, every
flag, the conditioning, the method, the network. Nothing is written but the cache of encoded
captions, with a progress bar.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data import bad_rows
from data.buckets import Buckets
from data.image_buckets import Sides, open_buckets, read_sides
from data.load import open_dataset
from data.rows import Source
from inference.conditioning import Conditioning
from inference.guidance import null_is_trained
from inference.spaces import space_of
from methods.method import Method
from methods.registry import recorded_name
from model import ModelConfig
from runtime import processes, processor, run_folder
from runtime.errors import UserError
from runtime.image_size import ImageSize
from runtime.parallel import Devices
from training import adapters, warm_start
from training.conditionings import RUN_CONDITIONINGS
from training.config import TrainConfig
from training.resolve import (
    merge_saved,
    network_config,
    recorded_flags,
    require_even_batches,
    require_same_space,
    resolve_train_config,
    training_method,
    with_dataset_and_latents,
)


@dataclass(frozen=True)
class Prepared:
    """A run before its first step.

    Args:
        config: every flag, resolved.
        given_flags: those that were given, at all starts; None if they were not recorded.
        run_dir: the run's folder, which may not exist yet.
        saved: its `config.json`; empty for a new run.
        weights: of another model, to start from, or the base of adapters (LoRA).
        null_is_trained: whether the model can be guided: labels are dropped, or the weights bring
            a null label.
        buckets: of the rows of both splits, if there are any.
    """

    config: TrainConfig
    given_flags: dict[str, Any] | None
    run_dir: Path
    saved: Mapping[str, Any] = field(repr=False)
    source: Source = field(repr=False)
    conditioning: Conditioning
    method: Method
    network: ModelConfig
    weights: warm_start.StartingWeights | None = field(repr=False)
    null_is_trained: bool
    buckets: Mapping[str, Buckets] | None = field(repr=False)


def prepare(config: TrainConfig, devices: Devices) -> Prepared:
    """Open the run's folder and the dataset, and decide every flag.

    Args:
        devices: their number and kind; none is used, but to encode captions and to read a run
            that the weights come from.

    Raises:
        UserError: flags or a dataset that cannot work.
    """
    run_dir = find_run_dir(config, with_dataset_and_latents(config).dataset_name, config.model)
    saved = read_saved(run_dir) if run_dir and config.resume else {}
    given = recorded_flags(config, saved)
    config = _merge(config, saved, devices)
    weights = None
    if config.init_from and (not saved or config.lora_rank):
        weights = warm_start.load_starting_weights(config.init_from)
    if weights and not saved:
        config = warm_start.with_source_flags(config, weights)
    record = saved or (weights.settings if weights else {})
    starts_with_null = bool(record) and null_is_trained(record)
    source = _open_source(config, saved)
    if saved:
        require_same_space(space_of(source.config.encoding), saved)
    resolve = partial(
        resolve_train_config,
        config,
        source.config,
        n_devices=devices.count,
        fast_bf16=_has_fast_bf16(devices),
        starts_with_null=starts_with_null,
    )
    config = resolve(n_rows=len(source.train))
    kind = RUN_CONDITIONINGS[config.conditioning]
    if saved:
        kind.require_same(source.config, saved)
    if not saved:  # a finished run may be sampled on any number of devices
        require_even_batches(config, devices.count)
    if not config.profile:  # it reads no images
        source = leave_out_bad_rows(config, source, run_dir)
        config = resolve(n_rows=len(source.train))  # fewer rows make shorter epochs
    buckets = None
    if config.buckets and not config.profile:
        source, buckets = _assign_buckets(config, source)
        # Each bucket has its own last batch of an epoch.
        config = resolve(n_rows=len(source.train), bucket_sizes=buckets["train"].sizes)
    conditioning = kind.open(
        config, source, saved.get("text_revisions"), full_width=record.get("full_width")
    )
    network = _network(config, source, conditioning, saved, weights)
    for shape in buckets["train"].shapes if buckets else ():
        replace(network, image_size=shape.written)  # patches must divide it
    return Prepared(
        config=config,
        given_flags=given,
        run_dir=run_dir or new_run_dir(config.dataset_name, config.model),
        saved=saved,
        source=source,
        conditioning=conditioning,
        method=training_method(config),
        network=network,
        weights=weights,
        null_is_trained=(not kind.has_null or bool(config.label_dropout) or starts_with_null),
        buckets=buckets,
    )


# --- the run's folder -----------------------------------------------------------------------------


def read_saved(run_dir: Path) -> dict[str, Any]:
    """Read the `config.json` of a run to resume. If the run cannot be guided, its scale is 1: older
    versions recorded another one.

    Raises:
        UserError: the folder is not a run of train.py, or the file is damaged.
    """
    saved = run_folder.read_config(run_dir)
    if time_scale := saved.get("model_config", {}).get("time_scale"):
        saved = {"time_scale": time_scale} | saved
    newer_flags = {"optimizer": "adamw", "mup": 0, "ema_std": (), "lora_rank": 0}
    newer_flags |= {"crop": "center", "buckets": ()}
    saved = newer_flags | saved
    return saved if null_is_trained(saved) else saved | {"cfg_scale": 1.0}


def find_run_dir(config: Any, dataset_name: str, model: str | None) -> Path | None:
    """Return a run's folder if it is given or exists; the same in all processes.

    Args:
        config: of a command that trains.

    Raises:
        UserError: there is no run to resume, the folder of a new run is in use, or `data_dir` is
            of no dataset.
    """

    named = config.dataset_name or getattr(config, "latents", None)
    if config.data_dir and not (named or config.resume):
        raise UserError(
            f"--data_dir {config.data_dir}: of which dataset? Pass --dataset_name "
            f"{shlex.quote(f'folder:{config.data_dir}')} to train on a folder of your own, or the "
            "name of the dataset that it is a copy of"
        )

    def find() -> str:
        if config.resume and not config.run_dir:
            return str(run_folder.newest_run(dataset_name, model, command=config.COMMAND))
        if config.run_dir and not config.resume:
            run_folder.require_unused(Path(config.run_dir))
        return str(config.run_dir or "")

    path = processes.broadcast_from_first(find)
    return Path(path) if path else None


def new_run_dir(dataset_name: str, model: str) -> Path:
    """Return a folder's name for a new run; the same in all processes."""
    return Path(
        processes.broadcast_from_first(lambda: str(run_folder.new_run_path(dataset_name, model)))
    )


# --- parts ----------------------------------------------------------------------------------------


def _merge(config: TrainConfig, saved: dict[str, Any], devices: Devices) -> TrainConfig:
    """Fill in the flags of the resumed run, if there is one, and the dataset's name."""
    if saved:
        if config.fsdp is None:
            config = replace(config, fsdp=math.gcd(saved["fsdp"], devices.count))
        config = replace(merge_saved(config, saved), objective=recorded_name(saved))
    return with_dataset_and_latents(config)


def _has_fast_bf16(devices: Devices) -> bool:
    """Return True if process 0 multiplies bfloat16 faster than float32.

    Hosts may have different processors, and all must run one program.
    """
    fast = devices.platform != "cpu" or processor.multiplies_bf16()
    return processes.broadcast_from_first(lambda: "fast" if fast else "") == "fast"


def _open_source(c: TrainConfig, saved: Mapping[str, Any]) -> Source:
    return open_dataset(
        c.dataset_name,
        data_dir=c.data_dir,
        image_column=c.image_column,
        label_column=c.label_column,
        conditioning=c.conditioning,
        caption_column=c.caption_column,
        templates=c.caption or (),
        image_size=c.image_size,
        channels=None if c.profile else c.channels,  # a profile reads no images
        crop=c.crop,
        streaming=bool(c.streaming),
        latents_dir=c.latents,
        train_split=c.train_split,
        eval_split=c.eval_split,
        unlabelled=c.unlabelled or "stop",
        class_order=saved.get("dataset", {}).get("label_names") or (),
    )


def _assign_buckets(config: TrainConfig, source: Source) -> tuple[Source, Mapping[str, Buckets]]:
    """Assign rows to buckets, if latents have none yet. Returns the source with a description of
    the buckets, and those of each split.
    """
    if source.buckets:
        buckets, names = source.buckets, config.buckets
    else:
        shapes = [ImageSize.parse(word) for word in config.buckets]
        buckets, names = open_buckets(read_sides_once(source), shapes, config.batch_size), ()
    letterbox = source.config.crop == "letterbox"
    lines = buckets["train"].describe(source.config.size, names, letterbox=letterbox)
    return replace(source, notices=(*source.notices, *lines)), buckets


def _network(
    config: TrainConfig,
    source: Source,
    conditioning: Conditioning,
    saved: Mapping[str, Any],
    weights: warm_start.StartingWeights | None,
) -> ModelConfig:
    """Return the network of a resolved config: what no flag sets is that of the weights to start
    from.
    """
    network = network_config(config, source.config)
    if config.init_from:
        record = saved.get("model_config") or (vars(weights.config) if weights else {})
        network = warm_start.keep_fields_without_flag(network, record)
    network = replace(network, **conditioning.fields)
    if not network.lora:
        return network
    full_parts = adapters.parts_to_train(weights, network, source.config)
    return replace(network, lora=replace(network.lora, full_parts=full_parts))


def read_sides_once(source: Source) -> Sides:
    """Read the sizes of all images in process 0. All processes use these: one that could not read
    a file would have other batches than the rest.
    """

    def read() -> str:
        return json.dumps({name: sides.tolist() for name, sides in read_sides(source).items()})

    sides = json.loads(processes.broadcast_text(read))
    return {name: np.array(rows, np.int32).reshape(-1, 2) for name, rows in sides.items()}


def leave_out_bad_rows(config: Any, source: Source, run_dir: Path | None) -> Source:
    """Leave out the rows that cannot be decoded, if they are to be skipped: those that the resumed
    run left out, or all that process 0 finds now.

    Args:
        config: of a command that trains, resolved.
        source: the dataset with all its rows.

    Raises:
        UserError: they are too many, or a resumed run that left out rows is not to skip any.
    """
    if config.bad_rows == "stop" and not config.resume:
        return source

    def find() -> str:
        record = bad_rows.read_record(run_dir) if run_dir and config.resume else ""
        if config.bad_rows == "stop" and record:
            raise UserError(
                f"cannot resume: the run left out the rows in {run_dir}/{bad_rows.RECORD_FILE}; "
                "drop --bad_rows stop"
            )
        if config.bad_rows == "stop" or record:
            return record
        found = {
            "train": bad_rows.find_bad_rows(source.train),
            "eval": bad_rows.find_bad_rows(source.eval),
        }
        bad_rows.require_few_bad_rows(source, found, config.bad_rows_at_most)
        return bad_rows.to_json(bad_rows.leave_out(source, found))

    record = processes.broadcast_text(find)
    return bad_rows.leave_out(source, bad_rows.from_json(record, source)) if record else source
