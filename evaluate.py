"""Evaluate images against statistics of real ones: FID, sFID, the Inception Score, KID, precision
and recall, of a run's samples, a published model's, or images on disk.

    python evaluate.py --make_reference cifar10.npz --dataset_name cifar10 --inception WEIGHTS
    python evaluate.py --run runs/cifar10-… --reference cifar10.npz --inception WEIGHTS
    python evaluate.py --images some/folder --reference cifar10.npz --inception WEIGHTS

Every result is recorded with everything it depends on; the batch size and the number of devices do
not change it. With `--samples`, repeating the same command resumes an interrupted evaluation.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from data import image_sets
from data.image_sets import ImageBatch, ImageSet
from evaluation import metrics
from evaluation.features import (
    FeatureBatch,
    FeatureExtractor,
    FeatureSummary,
    build_matching_extractor,
    check_feature_width,
    default_batch_size,
    summarize_features,
)
from evaluation.reference import Reference, read_reference, write_reference
from inference import sample_files
from inference.sample_files import EvaluationSamplesConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import check_distinct_paths, report_unwritable
from runtime.flags import Derived, again, check_values, flag
from training.flag_groups import (
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
# Names of the scores in the record, by feature space: distance, kernel distance, precision, recall.
# A distance between pixels is no FID and never called so.
METRIC_NAMES = {
    "inception": ("fid", "kid", "precision", "recall", "sfid"),
    "pixels": ("pixel_frechet", "pixel_kernel", "pixel_precision", "pixel_recall"),
}


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
    image_size: int | None = again(ImageFlags, "image_size", above=None, at_least=2)


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(InceptionFlags):
    """FID."""

    reference: Path | None = flag(
        None,
        "statistics of real images: of --make_reference, pytorch-fid, clean-fid or the ADM suite",
    )
    make_reference: Path | None = flag(
        None, "write such statistics to this .npz, and compare nothing"
    )
    features: Literal["inception", "pixels"] = flag(
        "inception", "inception, or pixels, which need no weights. A distance in pixels is not FID"
    )
    preparation: str | None = flag(
        Derived("the reference's"),
        "how images are resized for Inception: pytorch_fid, adm or clean_fid; by default, for "
        "references of other tools, adm if they hold spatial statistics, else pytorch_fid",
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

    n: int | None = flag(
        Derived(DEFAULT_N_SAMPLES),
        "number of samples to generate, as many of each class",
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
        None, "also write the samples to this .npz, in the ADM suite's layout"
    )
    step: int | None = again(CheckpointFlags, "step")
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
MODEL_FLAGS = ("n", "vae", "samples", *(field.name for field in fields(SamplingOverrides)))
RUN_FLAGS = ("step", "ema")
DATASET_FLAGS = ("data_dir", "image_column", "split")


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
    _check_files(config)
    if config.features == "pixels" and (config.inception or config.preparation):
        raise UserError("--features pixels takes neither --inception nor --preparation")
    if config.features == "inception" and not config.inception:
        raise UserError(
            f"FID needs Inception's weights: pass --inception {WEIGHTS_FILE} (from the releases of "
            "github.com/mseitzer/pytorch-fid) or an id on the hub; --features pixels needs none, "
            "but is not FID"
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
        | dict.fromkeys(DATASET_FLAGS, ("dataset_name",))
    )
    for name, sources in needed.items():
        if getattr(config, name) is not None and source not in sources:
            raise UserError(f"--{name} needs --{' or --'.join(sources)}")
    if config.image_size is not None and source in ("run", "pretrained", "npz"):
        raise UserError(f"--image_size does not apply to --{source}: its images have a size")


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


# --- images ---------------------------------------------------------------------------------------


def open_model(config: EvaluateConfig) -> TrainedModel | None:
    """Open the model to sample from; None if images on disk are evaluated."""
    c = config
    if c.run:
        return TrainedModel.from_run(c.run, ema=c.ema is not False, step=c.step, vae=c.vae)
    return TrainedModel.from_pretrained(c.pretrained, vae=c.vae) if c.pretrained else None


def open_images(config: EvaluateConfig, model: TrainedModel | None, batch_size: int) -> ImageSet:
    """Open the images to evaluate; samples are generated as they are read.

    Raises:
        UserError: the images cannot be read, or the model cannot be sampled this way.
    """
    c = config
    if model:
        return _open_samples(c, model, batch_size)
    if c.images:
        return image_sets.image_set_from_folder(c.images, image_size=c.image_size)
    if c.npz:
        return image_sets.image_set_from_npz(c.npz)
    return image_sets.image_set_from_split(
        str(c.dataset_name),
        split=c.split or DEFAULT_SPLIT,
        data_dir=c.data_dir,
        image_column=c.image_column,
        image_size=c.image_size,
    )


def _open_samples(config: EvaluateConfig, model: TrainedModel, batch_size: int) -> ImageSet:
    c = config
    if c.samples and not c.batch_size:
        # The default depends on the devices; an .npz begun on other devices resumes with its own.
        batch_size = sample_files.unfinished_batch_size(c.samples) or batch_size
    sampling = EvaluationSamplesConfig(
        n=c.n or DEFAULT_N_SAMPLES,
        seed=c.seed,
        batch_size=batch_size,
        cfg_scale=c.cfg_scale,
        n_steps=c.n_steps,
        solver=c.solver,
        shift=c.shift,
        interval=c.interval,
        eta=c.eta,
        guided_channels=c.guided_channels,
        inner_guidance=c.inner_guidance,
        inner_interval=c.inner_interval,
        guide=c.guide,
        guide_scale=c.guide_scale,
    )
    return sample_files.open_image_set(model, sampling, samples=c.samples)


# --- features and scores --------------------------------------------------------------------------


def extract_features(
    config: EvaluateConfig,
    extractor: FeatureExtractor,
    images: ImageSet,
    batch_size: int,
    reference: Reference | None,
) -> FeatureSummary:
    """Compute the features of all images, with a progress bar.

    Raises:
        UserError: fewer than two images, or the reference holds features of another width.
    """
    if images.count < 2:
        raise UserError(f"statistics need at least two images, not {images.count}")

    def show_progress(batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        disable = None if processes.is_first() else True  # None: tqdm asks if this is a terminal
        with tqdm(total=images.count, unit=" images", disable=disable) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def check_width(batches: Iterator[FeatureBatch]) -> Iterator[FeatureBatch]:
        for batch in batches:
            if reference:  # at the first batch, not after hours
                check_feature_width(reference, batch.pool.shape[1])
            yield batch

    batches = show_progress(images.batches(batch_size))
    features = extractor(batches, batch_size=min(batch_size, images.count))
    return summarize_features(
        check_width(features),
        images.count,
        n_features=config.n_features,
        keep_logits=reference is not None,
        seed=config.seed,
    )


def compute_scores(
    config: EvaluateConfig,
    summary: FeatureSummary,
    reference: Reference,
    reference_features: np.ndarray | None,
) -> dict[str, float]:
    """Compute every score for which both sides have the features.

    Args:
        reference_features: pool features of some of the reference's images.
    """
    distance, kernel, precision, recall = METRIC_NAMES[config.features][:4]
    scores = {distance: metrics.frechet_distance(summary.pool, reference.pool)}
    if summary.spatial and reference.spatial:
        scores["sfid"] = metrics.frechet_distance(summary.spatial, reference.spatial)
    if summary.logits is not None:
        score = metrics.inception_score(summary.logits, seed=config.seed)
        scores["inception_score"] = score.mean
        scores["inception_score_std"] = score.std
    if reference_features is not None and min(len(reference_features), len(summary.features)) > 1:
        kid = metrics.kernel_distance(summary.features, reference_features, seed=config.seed)
        manifold = metrics.precision_recall(reference_features, summary.features)
        scores[kernel] = kid.mean
        scores[f"{kernel}_std"] = kid.std
        scores[precision] = manifold.precision
        scores[recall] = manifold.recall
    return scores


def load_reference_features(
    config: EvaluateConfig, reference: Reference, extractor: FeatureExtractor, batch_size: int
) -> np.ndarray | None:
    """Return features of at most `n_features` of the reference's images: those in its file, or
    computed from its images; None if it holds neither.
    """
    if not config.n_features:
        return None
    if reference.features is None and reference.has_images:
        images = image_sets.image_set_from_npz(reference.path)
        return extract_features(config, extractor, images, batch_size, reference).features
    if reference.features is None or len(reference.features) <= config.n_features:
        return reference.features
    # A random subset: datasets are often sorted by class, so the first rows would be a few classes.
    rows = np.random.default_rng(config.seed).permutation(len(reference.features))
    return reference.features[rows[: config.n_features]]


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
    mesh = model.mesh if model else parallel.make_mesh()
    batch_size = config.batch_size or default_batch_size(mesh)
    extractor = build_matching_extractor(
        reference,
        mesh,
        space=config.features,
        weights=config.inception,
        preparation=config.preparation,
    )
    images = open_images(config, model, batch_size)
    if processes.is_first():
        print(images.describe())
        if reference and (warning := reference.compare_sizes(images.shape)):
            print(warning)
    summary = extract_features(config, extractor, images, batch_size, reference)
    if reference:
        reference_features = load_reference_features(config, reference, extractor, batch_size)
        if processes.is_first():
            n, m = (0 if x is None else len(x) for x in (summary.features, reference_features))
            if m and n != m:
                print(f"KID, precision and recall compare {n} images with {m} of the reference")
            scores = compute_scores(config, summary, reference, reference_features)
            report_scores(config, scores, build_card(images, extractor, reference, config))
    elif config.make_reference and processes.is_first():
        card = build_card(images, extractor)
        with report_unwritable(config.make_reference):
            write_reference(
                config.make_reference, summary.pool, summary.spatial, summary.features, card
            )
        print(f"statistics of {summary.count} images: {config.make_reference}")
    processes.wait_for_all("the end")


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
        card["config"] = asdict(config)
    return card


def report_scores(config: EvaluateConfig, scores: dict[str, float], card: dict[str, Any]) -> None:
    """Print the scores and append them to the record."""
    for name, value in scores.items():
        print(f"{name:20} {value:.6g}")
    if missing := [name for name in METRIC_NAMES[config.features] if name not in scores]:
        print(f"not computed (no features in the reference, or disabled): {', '.join(missing)}")
    out = config.out or (config.run or Path()) / RECORD_FILE
    line = json.dumps(scores | {"card": card}, default=str)
    with report_unwritable(out), out.open("a") as file:
        file.write(line + "\n")
    print(f"{card['pictures']['count']} images; recorded in {out}")


if __name__ == "__main__":
    cli.run_command(
        lambda: main(cli.parse_flags(EvaluateConfig)),
        processes.exit_process,
    )
