"""Evaluate images against statistics of real ones: FID, sFID, the Inception Score, KID, FD-DINOv2,
precision and recall, of a run's samples, a published model's, or images on disk.

    python evaluate.py --make_reference cifar10.npz --dataset_name cifar10 --inception WEIGHTS
    python evaluate.py --run runs/cifar10-… --reference cifar10.npz --inception WEIGHTS
    python evaluate.py --images some/folder --reference cifar10.npz --inception WEIGHTS

Every result is recorded with everything it depends on; the batch size and the number of devices do
not change it. With `--samples`, repeating the same command resumes an interrupted evaluation; of
several guidance scales or averages, those that are recorded are not evaluated again.
"""

import gc
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from data import image_sets
from data.image_sets import ImageSet
from evaluation import protocols
from evaluation.comparison import Comparison, extract_features
from evaluation.features import FeatureExtractor, build_matching_extractor, default_batch_size
from evaluation.protocols import DGM_EVAL, PROTOCOLS
from evaluation.reference import Reference, read_reference, write_reference
from evaluation.scores import Scores
from evaluation.sweep import Evaluation, evaluate_in_turn, format_scale, format_table
from inference import curves, sample_files
from inference.sample_files import EvaluationSamplesConfig
from inference.snapshots import check_std, find_snapshot
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import check_distinct_paths, report_unwritable
from runtime.flags import Derived, again, check_values, flag, flags_of, reject_unused
from runtime.image_size import WrittenSize
from training.flag_groups import (
    CROP_HELP,
    CheckpointFlags,
    ClusterFlags,
    DatasetFlags,
    DeviceFlags,
    ImageFlags,
    InceptionFlags,
    MovedFlags,
    RequestFlags,
    SamplingFlags,
    SourceFlags,
)

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
RECORD_FILE = "evaluations.jsonl"
DEFAULT_SPLIT = "train"
DEFAULT_N_SAMPLES = 50_000


@dataclass(frozen=True, kw_only=True)
class ImageSourceFlags(SourceFlags):
    """Images to evaluate."""

    images: Path | None = flag(None, "evaluate a folder of images")
    npz: Path | None = flag(
        None, "evaluate an .npz of images (arr_0), as generate.py and --samples write it"
    )
    dataset_name: str | None = again(DatasetFlags, "dataset_name", default=None, is_setting=False)
    data_dir: Path | None = again(DatasetFlags, "data_dir")
    image_column: str | None = again(DatasetFlags, "image_column")
    split: str | None = flag(Derived(DEFAULT_SPLIT), "split of the dataset")
    image_size: WrittenSize | None = again(ImageFlags, "image_size", above=None, at_least=2)
    crop: Literal["center", "letterbox"] | None = again(ImageFlags, "crop", help=CROP_HELP)


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """FID."""

    reference: Path | None = flag(
        None,
        "statistics of real images: of --make_reference, pytorch-fid, clean-fid or the ADM suite",
    )
    make_reference: Path | None = flag(
        None, "write such statistics to this .npz, and compare nothing"
    )
    features: Literal["inception", "dinov2", "pixels"] = flag(
        "inception",
        "inception; dinov2, for FD-DINOv2 as Stein et al. 2023 measure it; or pixels, which need "
        "no weights. A distance in pixels is not FID",
    )
    inception: str | None = again(InceptionFlags, "inception", only_with=("features", "inception"))
    encoder: str | None = flag(
        Derived(DGM_EVAL.encoder),
        "DINOv2's weights: a folder or file of transformers' or of facebookresearch/dinov2, or an "
        "id of the hub. Papers use dinov2-large, 1.2 GB",
        only_with=("features", "dinov2"),
    )
    preparation: str | None = flag(
        Derived("the reference's"),
        "how images are resized for Inception: pytorch_fid, adm or clean_fid; by default, for "
        "references of other tools, adm if they hold spatial statistics, else pytorch_fid",
        only_with=("features", "inception"),
    )
    n_features: int = flag(
        10_000,
        "images of each side that KID, precision and recall compare; 0 disables them",
        at_least=0,
    )
    out: Path | None = flag(
        Derived(f"{RECORD_FILE} of the run, or here"), "file to which one line of JSON is appended"
    )


@dataclass(frozen=True, kw_only=True)
class SampleFlags(SamplingFlags):
    """Samples of a model."""

    cfg_scale: tuple[float, ...] | None = again(  # pyright: ignore[reportIncompatibleVariableOverride]
        SamplingFlags,
        "cfg_scale",
        help="classifier-free guidance scale; 1 disables guidance. Several are evaluated in turn, "
        "with a table and a plot of their scores at the end",
    )
    protocol: str | None = flag(
        None,
        "sample and compare as a paper does: dit, adm, sit, repa or jit; other flags must not "
        "contradict it",
        choices=PROTOCOLS,
    )
    n: int | None = flag(
        Derived(DEFAULT_N_SAMPLES),
        "number of samples to generate, as many of each class unless --protocol says otherwise",
        at_least=2,
    )
    seed: int = again(
        RequestFlags,
        "seed",
        default=0,
        help="seed of the noise, and of the random subsets of KID and the Inception Score",
        at_least=0,
    )
    samples: Path | None = flag(
        None,
        "also write the samples to this .npz, in the ADM suite's layout; of several guidance "
        "scales or averages, NAME-1.5.npz for each",
    )
    ema_std: tuple[float, ...] | None = again(
        CheckpointFlags,
        "ema_std",
        help="relative width of an average to evaluate instead, made of the snapshots of a run "
        "that was trained with --ema_std. Several are evaluated in turn, as scales are",
    )
    step: int | None = again(CheckpointFlags, "step")
    base: str | None = again(CheckpointFlags, "base")
    ema: bool | None = again(CheckpointFlags, "ema", default=Derived("True"))
    vae: str | None = again(MovedFlags, "vae")
    batch_size: int | None = again(DeviceFlags, "batch_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ImageSourceFlags, ScoreFlags, SampleFlags, ClusterFlags):
    """Compare images with the statistics of real ones, or compute such statistics.

    The images are those of a run, a published model, a folder, an .npz or a dataset.
    """


IMAGE_SOURCES = ("run", "pretrained", "images", "npz", "dataset_name")
# Flags that only some sources take.
SAMPLING_FLAGS = tuple(field.name for field in fields(SamplingOverrides))
MODEL_FLAGS = ("n", "vae", "samples", "protocol", *SAMPLING_FLAGS)
RUN_FLAGS = ("step", "ema", "ema_std", "base")
DATASET_FLAGS = ("data_dir", "image_column", "split")
# Flags that may have several values → the plot's name, and its axis.
SWEPT = {
    "cfg_scale": ("guidance", "guidance scale"),
    "ema_std": ("averages", "relative width of the average"),
}


# --- flags ----------------------------------------------------------------------------------------


def check_flags(config: EvaluateConfig) -> None:
    """Raise UserError for flags that cannot work, before anything is loaded."""
    _check_source(config)
    if (config.reference is None) == (config.make_reference is None):
        raise UserError(
            "pass either --reference FILE.npz, which `python evaluate.py --make_reference FILE.npz "
            "--dataset_name NAME` makes, or --make_reference"
        )
    if config.make_reference and config.out:
        raise UserError("--out needs --reference: --make_reference compares nothing")
    check_values(config, vars(config))
    if 0 < config.n_features < 2:
        raise UserError("--n_features 1: must be 0 or at least 2")
    _check_swept(config)
    _check_files(config)  # the name as given before those of the scales
    for one in split_sweep(config):
        _check_files(one)
        _check_protocol(one)
    reject_unused(config, vars(config), [n for n, x in vars(config).items() if x is not None])
    if config.features == "inception" and not config.inception:
        raise UserError(
            f"FID needs Inception's weights: pass --inception {WEIGHTS_FILE} (from the releases of "
            "github.com/mseitzer/pytorch-fid) or an id on the hub; --features dinov2 takes others "
            "from the hub, and --features pixels needs none, but neither is FID"
        )


def _check_source(config: EvaluateConfig) -> None:
    given = [name for name in IMAGE_SOURCES if getattr(config, name) is not None]
    if len(given) != 1:
        flags = ", ".join(f"--{name}" for name in IMAGE_SOURCES)
        passed = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"pass exactly one of {flags} to name the images to evaluate, not {passed}")
    source = given[0]
    needed = (
        dict.fromkeys(MODEL_FLAGS, ("run", "pretrained"))
        | dict.fromkeys(RUN_FLAGS, ("run",))
        | {"lora": ("pretrained",)}
        | dict.fromkeys(DATASET_FLAGS, ("dataset_name",))
    )
    for name, sources in needed.items():
        if getattr(config, name) is not None and source not in sources:
            raise UserError(f"--{name} needs --{' or --'.join(sources)}")
    for name in ("image_size", "crop"):
        if getattr(config, name) is not None and source in ("run", "pretrained", "npz"):
            raise UserError(f"--{name} does not apply to --{source}: its images have a size")


def _check_swept(config: EvaluateConfig) -> None:
    for name in SWEPT:
        values = getattr(config, name) or ()
        for value in values:
            flags_of(config)[name].check(name, value)
            if values.count(value) > 1:
                raise UserError(f"--{name} {value:g} is given twice")
        if len(values) > 1 and config.make_reference:
            raise UserError(f"--make_reference takes one --{name}, not {len(values)}")
    if all(len(getattr(config, name) or ()) > 1 for name in SWEPT):
        raise UserError("--cfg_scale and --ema_std: give several values of one of them at a time")
    for std in config.ema_std or ():
        check_std(std)


def _check_protocol(config: EvaluateConfig) -> None:
    if config.protocol and config.make_reference:
        raise UserError("--protocol needs --reference: --make_reference compares nothing")
    if config.protocol:
        names = (*SAMPLING_FLAGS, "preparation", "features")
        values = {name: getattr(config, name) for name in names} | {"cfg_scale": scale_of(config)}
        protocols.check_flags(config.protocol, values, ema=config.ema is not False)


def _check_files(config: EvaluateConfig) -> None:
    written = ("make_reference", "samples", "out")
    for path in filter(None, (getattr(config, name) for name in written)):
        if not path.parent.is_dir():
            raise UserError(f"folder {path.parent} does not exist")
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        if path.suffix != ".npz" and path != config.out:
            raise UserError(f"{path}: the name must end in .npz")
    check_distinct_paths(config, written=written, read=("npz", "reference"))


# --- guidance scales and protocols ----------------------------------------------------------------


def scale_of(config: EvaluateConfig) -> float | None:
    """Return the guidance scale of a config that has one, or None for the model's own."""
    return config.cfg_scale[0] if config.cfg_scale else None


def std_of(config: EvaluateConfig) -> float | None:
    """Return the width of the average of a config that has one, or None for the run's own EMA."""
    return config.ema_std[0] if config.ema_std else None


def swept_flag(config: EvaluateConfig) -> str | None:
    """Return the name of the flag that has several values, if one has."""
    return next((name for name in SWEPT if len(getattr(config, name) or ()) > 1), None)


def split_sweep(config: EvaluateConfig) -> list[EvaluateConfig]:
    """Return for each guidance scale, or each average, the config that evaluates it alone."""
    flag_name = swept_flag(config)
    if flag_name is None:
        return [config]
    configs: list[EvaluateConfig] = []
    for value in getattr(config, flag_name):
        one = replace(config, **{flag_name: (value,)})
        if path := config.samples:
            name = f"{path.stem}-{format_scale(value)}{path.suffix}"
            one = replace(one, samples=path.with_name(name))
        if (flag_name, value) == ("cfg_scale", 1) and not (
            config.guide and config.guide_scale != 1
        ):  # a single evaluation refuses limits without guidance
            one = replace(one, interval=None, guided_channels=None)
        configs.append(one)
    return configs


def apply_protocol(
    config: EvaluateConfig, model: TrainedModel | None, reference: Reference | None
) -> EvaluateConfig:
    """Return a config with the values of its protocol, if it names one.

    Raises:
        UserError: the protocol cannot evaluate the model, or compare with the reference.
    """
    if not (config.protocol and model and reference):
        return config
    protocol, channels, scale = PROTOCOLS[config.protocol], model.model.channels, scale_of(config)
    if scale is None:
        scale = protocol.cfg_scale or model.default_cfg_scale
    if not model.model.n_classes:
        kind = "of captions" if model.conditioning.takes_prompts else "without labels"
        raise UserError(f"--protocol {protocol.name} evaluates models of classes, not {kind}")
    protocol.check_method(model.method)
    protocol.check_reference(reference)
    protocol.check_channels(channels, cfg_scale=scale, guided_channels=config.guided_channels)
    flags = protocol.flags(cfg_scale=scale, channels=channels)
    return replace(config, n=config.n or protocol.n, **flags | {"cfg_scale": (scale,)})


# --- images ---------------------------------------------------------------------------------------


def open_model(config: EvaluateConfig) -> TrainedModel | None:
    """Open the model to sample from; None if images on disk are evaluated."""
    c = config
    if c.run:
        return TrainedModel.from_run(
            c.run,
            ema=c.ema is not False,
            ema_std=std_of(c),
            step=c.step,
            base=c.base,
            vae=c.vae,
        )
    if c.pretrained:
        return TrainedModel.from_pretrained(c.pretrained, lora=c.lora, vae=c.vae)
    return None


def open_images(
    configs: Sequence[EvaluateConfig], model: TrainedModel | None, batch_size: int
) -> list[ImageSet]:
    """Open the images that each config evaluates; samples are generated as they are read.

    Raises:
        UserError: the images cannot be read, or the model cannot be sampled this way.
    """
    if model:
        sampling = [sampling_config(one, batch_size) for one in configs]
        files = [one.samples for one in configs]
        return sample_files.open_image_sets(model, sampling, samples=files)
    return [_open_stored_images(one) for one in configs]


def open_in_turn(
    configs: Sequence[EvaluateConfig], model: TrainedModel | None, batch_size: int
) -> Iterator[ImageSet]:
    """Open the images that each config evaluates: those of guidance scales all at once, and those
    of averages, each with weights of its own, when they are asked for.

    Raises:
        UserError: as `open_images`.
    """
    if len({one.ema_std for one in configs}) == 1:
        yield from open_images(configs, model, batch_size)
        return
    for one in configs:
        gc.collect()  # of the last model, which refers to itself
        yield from open_images([one], open_model(one), batch_size)


def _open_stored_images(config: EvaluateConfig) -> ImageSet:
    c = config
    if c.images:
        return image_sets.image_set_from_folder(c.images, image_size=c.image_size, crop=c.crop)
    if c.npz:
        return image_sets.image_set_from_npz(c.npz)
    return image_sets.image_set_from_split(
        str(c.dataset_name),
        split=c.split or DEFAULT_SPLIT,
        data_dir=c.data_dir,
        image_column=c.image_column,
        image_size=c.image_size,
        crop=c.crop,
    )


def sampling_config(config: EvaluateConfig, batch_size: int) -> EvaluationSamplesConfig:
    """Return the settings of a model's samples, with the batch size of an .npz that was begun."""
    c = config
    if c.samples and not c.batch_size:
        # The default depends on the devices; an .npz begun on other devices resumes with its own.
        batch_size = sample_files.unfinished_batch_size(c.samples) or batch_size
    sampling = EvaluationSamplesConfig(
        n=c.n or DEFAULT_N_SAMPLES,
        seed=c.seed,
        batch_size=batch_size,
        cfg_scale=scale_of(c),
        n_steps=c.n_steps,
        solver=c.solver,
        shift=c.shift,
        time_grid=c.time_grid,
        interval=c.interval,
        eta=c.eta,
        guided_channels=c.guided_channels,
        inner_guidance=c.inner_guidance,
        inner_interval=c.inner_interval,
        route_guidance=c.route_guidance,
        route_rates=c.route_rates,
        guide=c.guide,
        guide_scale=c.guide_scale,
    )
    if c.protocol:
        protocol = PROTOCOLS[c.protocol]
        sampling = replace(sampling, labels=protocol.labels, rounding=protocol.rounding)
    return sampling


# --- the command ----------------------------------------------------------------------------------


@processes.explain_lost_process
def main(config: EvaluateConfig) -> None:
    """Load the reference, compute the features of all images, write the scores or statistics."""
    check_flags(config)
    processes.join_cluster(
        config.distributed,
        coordinator=config.coordinator,
        n_processes=config.n_processes,
        process_index=config.process_index,
    )
    processes.start_backend()
    parallel.enable_compilation_cache()
    if config.samples and processes.is_distributed():
        raise UserError("--samples needs a single process: drop it, or run without --distributed")
    reference = read_reference(config.reference) if config.reference else None
    model = open_model(config)
    warn_of_crop(model, reference)
    if config.run and swept_flag(config) == "ema_std":
        # The run may be training: all averages are of one step.
        find = partial(find_snapshot, config.run, config.ema_std or (), config.step)
        config = replace(config, step=int(processes.broadcast_from_first(lambda: str(find()))))
    configs = [apply_protocol(one, model, reference) for one in split_sweep(config)]
    mesh = model.mesh if model else parallel.make_mesh()
    batch_size = config.batch_size or default_batch_size(mesh)
    extractor = open_extractor(configs[0], reference, mesh)
    sets = open_in_turn(configs, model, batch_size)
    n_features, seed = config.n_features, config.seed
    if reference:
        comparison = Comparison(reference, extractor, batch_size, n_features, seed)
        compare(config, configs, sets, comparison)
    elif path := config.make_reference:
        images = next(sets)
        describe(images, config)
        summary = extract_features(images, extractor, batch_size, n_features, seed)
        if processes.is_first():
            card = build_card(images, extractor)
            with report_unwritable(path):
                write_reference(path, summary.pool, summary.spatial, summary.features, card)
            print(f"statistics of {summary.count} images: {path}")
    processes.wait_for_all("the end")


def open_extractor(
    config: EvaluateConfig, reference: Reference | None, mesh: parallel.Mesh
) -> FeatureExtractor:
    """Open the network whose features are compared, with a warning if papers use another.

    Raises:
        UserError: its weights cannot be loaded, or are not those of the reference.
    """
    is_dinov2 = config.features == "dinov2"
    extractor = build_matching_extractor(
        reference,
        mesh,
        space=config.features,
        weights=(config.encoder or DGM_EVAL.encoder) if is_dinov2 else config.inception,
        preparation=config.preparation,
    )
    warning = DGM_EVAL.compare_encoder(extractor.card) if is_dinov2 else ""
    if warning and processes.is_first():
        print(warning)
    return extractor


def warn_of_crop(model: TrainedModel | None, reference: Reference | None) -> None:
    """Print a warning if only one of the model and the reference is of cropped images."""
    if model and reference and processes.is_first():
        warning = reference.compare_crop(model.settings.get("crop") or "center")
        if warning:
            print(warning)


def describe(images: ImageSet, config: EvaluateConfig, reference: Reference | None = None) -> None:
    """Print what is evaluated, and what to mind about it."""
    if not processes.is_first():
        return
    print(images.describe())
    if reference and (warning := reference.compare_sizes(images.shape)):
        print(warning)
    if config.protocol and (warning := PROTOCOLS[config.protocol].compare_n(images.count)):
        print(warning)


def compare(
    config: EvaluateConfig,
    configs: Sequence[EvaluateConfig],
    sets: Iterator[ImageSet],
    comparison: Comparison,
) -> None:
    """Compare sets of images with the reference, and report the scores.

    Args:
        config: as given.
        configs: of each set.
    """
    reference, name = comparison.reference, swept_flag(config)

    def open_evaluation(one: EvaluateConfig) -> Evaluation:
        images = next(sets)
        if one is configs[0]:
            describe(images, one, reference)
        make_card = partial(build_card, images, comparison.extractor, reference, one)
        label = f"{name} {format_scale(getattr(one, name)[0])}" if name else ""
        return Evaluation(images, make_card, label, one.samples)

    record = config.out or (config.run or Path()) / RECORD_FILE
    results = evaluate_in_turn(map(open_evaluation, configs), comparison, record)
    if name and processes.is_first():
        report_sweep(name, getattr(config, name), results, record)


def report_sweep(
    flag_name: str, values: Sequence[float], results: Sequence[Scores], record: Path
) -> None:
    """Print a table of the scores of several values of a flag, and plot them beside the record."""
    print(format_table(values, results, flag_name))
    title, label = SWEPT[flag_name]
    path = record.with_name(f"{record.stem}-{title}.png")
    with report_unwritable(path):
        curves.save_figure(curves.plot_scores(values, results, label), path)
    print(f"scores over {title}: {path}")


def build_card(
    images: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Build the record of everything a result depends on.

    Its keys are a file format: programs read them from evaluations.jsonl and from references.
    """
    card = {
        "pictures": images.card | {"count": images.count, "shape": list(images.shape)},
        "features": extractor.card,
        "command": shlex.join(sys.argv),
        "jax": jax.__version__,
        "made": time.ctime(),
    }
    if reference and config:
        card["reference"] = {
            "path": str(reference.path),
            "sha256": reference.sha256,
            "pictures": reference.card,
        }
        single = {"cfg_scale": scale_of(config), "ema_std": std_of(config)}
        card["config"] = asdict(config) | single
        if config.protocol:
            card["protocol"] = PROTOCOLS[config.protocol].card(images.count)
    return card


if __name__ == "__main__":
    cli.run_command(
        lambda: main(cli.parse_flags(EvaluateConfig)),
        processes.exit_process,
    )
