"""How good are pictures? FID and its relatives, of a run's samples or of pictures that are at hand.

    python evaluate.py --make_reference cifar10.npz --dataset_name cifar10 --inception WEIGHTS
    python evaluate.py --run runs/cifar10-… --reference cifar10.npz --inception WEIGHTS
    python evaluate.py --images some/folder --reference cifar10.npz --inception WEIGHTS

Every number is written beside all that it depends on. Neither the size of batches nor the number of
devices is among that. Stop it whenever you like: with `--samples`, the same command goes on.
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
from data.image_sets import Batch, PictureSet
from evaluation import features as evaluation_features
from evaluation import metrics, reference
from evaluation.features import Extractor, Gathered, Rows
from evaluation.reference import Reference
from inference import sample_files
from inference.sample_files import DrawConfig
from inference.trained_model import SamplingOverrides, TrainedModel
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import check_distinct_paths, report_unwritable

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
RECORD = "evaluations.jsonl"
SPLIT = "train"
NAMES = {  # of a distance in Inception's features, and in pixels, which is no FID
    "inception": ("fid", "kid", "precision", "recall", "sfid"),
    "pixels": ("pixel_frechet", "pixel_kernel", "pixel_precision", "pixel_recall"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare pictures with the statistics of real ones, or make such statistics.

    Args:
        run: a run's folder: its pictures are drawn here, as many of each class.
        pretrained: or a published model, as generate.py takes it.
        images: or a folder of pictures.
        npz: or a file of them (arr_0), as generate.py and --samples write it.
        dataset_name: or a data set, by a key of DATASET_CONFIGS, folder:PATH or hf:owner/name.
        data_dir: a local copy of the data set.
        image_column: where to find pictures in folder: and hf: data.
        split: of the data set.
        image_size: crop and resize pictures of files and data sets to so many pixels.
        reference: statistics of real pictures: of --make_reference, pytorch-fid, clean-fid or the
            ADM suite.
        make_reference: write such statistics to this .npz, and compare nothing.
        inception: weights of FID's Inception network: a file, a folder or an id on the hub.
        features: inception, or pixels, which need no weights. A distance in pixels is not FID.
        preparation: how pictures are resized for Inception: pytorch_fid, adm or clean_fid. Of a
            reference that does not say, it is adm if it has spatial statistics, else pytorch_fid.
        n: how many pictures to draw.
        step: of the run's checkpoint; the newest if not given.
        ema: use a run's averaged weights; False uses the raw ones.
        cfg_scale: guidance scale; 1 is none.
        n_steps: solver steps.
        solver: euler or heun; ddpm or ddim after training by DDPM.
        shift: of rectified flow's time grid; above 1 spends more steps near the noise.
        interval: guide between two times only, such as 0.2 0.8; 1 is noise.
        eta: fresh noise of ddim, from 0 (none) to 1 (as much as ddpm).
        guided_channels: guide the first so many; by default all. Published DiTs are for 3.
        seed: of the noise, and of what is chosen at random for KID and the Inception Score.
        vae: where the VAE of a model of latents is, if elsewhere than it says.
        samples: keep the drawn pictures in this .npz, in the ADM suite's layout.
        n_features: pictures of each side that KID, precision and recall look at; 0 for none.
        batch_size: pictures drawn and looked at at a time.
        out: a file that gets one more line of JSON.
        distributed: join the other processes of a cluster's job, as train.py does.
        coordinator: host:port of process 0, where no cluster is detected.
        n_processes: of the job, likewise.
        process_index: of this process, from 0, likewise.
    """

    run: Path | None = None
    pretrained: str | None = None
    images: Path | None = None
    npz: Path | None = None
    dataset_name: str | None = None
    data_dir: Path | None = None
    image_column: str | None = None
    split: str | None = None
    image_size: int | None = None
    reference: Path | None = None
    make_reference: Path | None = None
    inception: str | None = None
    features: Literal["inception", "pixels"] = "inception"
    preparation: str | None = None
    n: int | None = None
    step: int | None = None
    ema: bool | None = None
    cfg_scale: float | None = None
    n_steps: int | None = None
    solver: str | None = None
    shift: float | None = None
    interval: tuple[float, ...] | None = None
    eta: float | None = None
    guided_channels: int | None = None
    seed: int = 0
    vae: str | None = None
    samples: Path | None = None
    n_features: int = 10_000
    batch_size: int | None = None
    out: Path | None = None
    distributed: bool = False
    coordinator: str | None = None
    n_processes: int | None = None
    process_index: int | None = None


# What the help page says of values that are not given.
FILLED = {"n": "50000", "cfg_scale": "the model's own", "n_steps": "the model's own"}
FILLED |= {"solver": "the model's own", "shift": "the model's own", "eta": 0, "interval": "0 1"}
FILLED |= {"preparation": "the reference's"}
FILLED |= {"batch_size": "64 a device, 16 on a CPU", "out": f"{RECORD} of the run, or here"}
FILLED |= {"image_size": "as the data set recommends", "split": SPLIT, "ema": True}
N_DRAWN = 50_000
SUBJECTS = ("run", "pretrained", "images", "npz", "dataset_name")
OF_MODELS = ("n", "vae", "samples", *(field.name for field in fields(SamplingOverrides)))
OF_RUNS = ("step", "ema")
OF_DATA = ("data_dir", "image_column", "split")


def check(config: EvaluateConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    given = [name for name in SUBJECTS if getattr(config, name) is not None]
    if len(given) != 1:
        which = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(
            f"name one of --{', --'.join(SUBJECTS)}, whose pictures are judged, not {which}"
        )
    owners = dict.fromkeys(OF_MODELS, ("run", "pretrained")) | dict.fromkeys(OF_RUNS, ("run",))
    for name, of in (owners | dict.fromkeys(OF_DATA, ("dataset_name",))).items():
        if getattr(config, name) is not None and given[0] not in of:
            raise UserError(f"--{name} is for --{' and --'.join(of)}")
    if config.image_size is not None and given[0] in ("run", "pretrained", "npz"):
        raise UserError(f"--image_size is not for --{given[0]}, whose pictures have their size")
    if (config.reference is None) == (config.make_reference is None):
        raise UserError(
            "pass --reference FILE.npz, which `python evaluate.py --make_reference FILE.npz "
            "--dataset_name NAME` makes, or --make_reference, but not both"
        )
    if config.make_reference and config.out:
        raise UserError("--out is for --reference: --make_reference compares nothing")
    _check_numbers(config)
    _check_files(config)
    if config.features == "pixels" and (config.inception or config.preparation):
        raise UserError("--features pixels takes neither --inception nor --preparation")
    if config.features == "inception" and not config.inception:
        raise UserError(
            f"FID needs Inception's weights: pass --inception {WEIGHTS} (from the releases of "
            "github.com/mseitzer/pytorch-fid) or an id on the hub; --features pixels does without, "
            "but is no FID"
        )


def _check_files(config: EvaluateConfig) -> None:
    written = "make_reference", "samples", "out"
    for path in filter(None, (getattr(config, name) for name in written)):
        if not path.parent.is_dir():
            raise UserError(f"folder {path.parent} does not exist")
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        if path.suffix != ".npz" and path != config.out:
            raise UserError(f"{path}: the name must end in .npz")
    check_distinct_paths(config, written=written, read=("npz", "reference"))


def _check_numbers(config: EvaluateConfig) -> None:
    least_of = {"n": 2, "n_features": 0, "batch_size": 1, "image_size": 2, "seed": 0}
    for name, least in least_of.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if 0 < config.n_features < 2:
        raise UserError("--n_features 1: must be 0 or at least 2")


# --- whose pictures -------------------------------------------------------------------------------


def drawable(config: EvaluateConfig) -> TrainedModel | None:
    """What pictures are drawn from, if they are to be drawn."""
    c = config
    if c.run:
        return TrainedModel.of_run(c.run, ema=c.ema is not False, step=c.step, vae=c.vae)
    return TrainedModel.of_pretrained(c.pretrained, vae=c.vae) if c.pretrained else None


def subject(config: EvaluateConfig, run: TrainedModel | None, batch_size: int) -> PictureSet:
    """The pictures that are asked for."""
    c = config
    if run:
        wishes = vars(SamplingOverrides.of(c))
        # The default depends on the devices: what was begun on others goes on all the same.
        begun = sample_files.begun_by(c.samples) if c.samples and not c.batch_size else None
        how = DrawConfig(n=c.n or N_DRAWN, seed=c.seed, batch_size=begun or batch_size, **wishes)
        return sample_files.of(run, how, samples=c.samples)
    if c.images:
        return image_sets.of_folder(c.images, image_size=c.image_size)
    if c.npz:
        return image_sets.of_npz(c.npz)
    return image_sets.of_dataset(
        str(c.dataset_name),
        split=c.split or SPLIT,
        data_dir=c.data_dir,
        image_column=c.image_column,
        image_size=c.image_size,
    )


# --- scores ---------------------------------------------------------------------------------------


def gathered(
    config: EvaluateConfig,
    extract: Extractor,
    of: PictureSet,
    batch_size: int,
    real: Reference | None,
) -> Gathered:
    """The features of a set, with a progress bar.

    Raises:
        UserError: there are fewer than two pictures, or not as many features as the reference has.
    """
    if of.count < 2:
        raise UserError(f"statistics need at least two pictures, not {of.count}")

    def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
        quiet = None if processes.is_first() else True  # None: unless a person watches
        with tqdm(total=of.count, unit=" pictures", disable=quiet) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def fitting(parts: Iterator[Rows]) -> Iterator[Rows]:
        for part in parts:
            if real:  # said at once, not after hours
                evaluation_features.require_fit(real, part.pool.shape[1])
            yield part

    rows = extract(counted(of.batches(batch_size)), batch_size=min(batch_size, of.count))
    keep = {"n_features": config.n_features, "keep_logits": real is not None}
    return evaluation_features.gather(fitting(rows), of.count, seed=config.seed, **keep)


def scores(
    config: EvaluateConfig, found: Gathered, real: Reference, features: np.ndarray | None
) -> dict[str, float]:
    """Every measure that both sides have the features for.

    Args:
        features: of some of the reference's pictures.
    """
    distance, kernel, precision, recall = NAMES[config.features][:4]
    said = {distance: metrics.frechet_distance(found.pool, real.pool)}
    if found.spatial and real.spatial:
        said["sfid"] = metrics.frechet_distance(found.spatial, real.spatial)
    if found.logits is not None:
        score = metrics.inception_score(found.logits, seed=config.seed)
        said |= {"inception_score": score.mean, "inception_score_std": score.std}
    if features is not None and min(len(features), len(found.features)) > 1:
        spread = metrics.kernel_distance(found.features, features, seed=config.seed)
        both = metrics.precision_recall(features, found.features)
        said |= {kernel: spread.mean, f"{kernel}_std": spread.std}
        said |= {precision: both.precision, recall: both.recall}
    return said


def real_features(
    config: EvaluateConfig, real: Reference, extract: Extractor, batch_size: int
) -> np.ndarray | None:
    """Of some of the reference's pictures: from its file, or made from the pictures in it."""
    if not config.n_features:
        return None
    if real.features is None and real.has_pictures:
        of = image_sets.of_npz(real.path)
        return gathered(config, extract, of, batch_size, real).features
    if real.features is None or len(real.features) <= config.n_features:
        return real.features
    # Data sets are often sorted by class: the first rows would not do.
    rows = np.random.default_rng(config.seed).permutation(len(real.features))
    return real.features[rows[: config.n_features]]


# --- the command ----------------------------------------------------------------------------------


def main(config: EvaluateConfig) -> None:
    """Read what is compared with, look at all pictures, write what was found."""
    check(config)
    processes.join(
        config.distributed,
        coordinator=config.coordinator,
        n_processes=config.n_processes,
        process_index=config.process_index,
    )
    parallel.keep_compiled()
    if config.samples and processes.is_distributed():
        raise UserError("--samples is for one process; draw them with one, or leave them out")
    real = reference.read(config.reference) if config.reference else None
    run = drawable(config)
    mesh = run.mesh if run else parallel.make_mesh()
    size = config.batch_size or evaluation_features.batch_size(mesh)
    how = {"weights": config.inception, "preparation": config.preparation}
    extract = evaluation_features.like(real, mesh, space=config.features, **how)
    of = subject(config, run, size)
    found = gathered(config, extract, of, size, real)
    features = real_features(config, real, extract, size) if real else None
    if processes.is_first():
        card = {"pictures": of.card | {"count": of.count}, "features": extract.card}
        card |= {"command": shlex.join(sys.argv), "jax": jax.__version__, "made": time.ctime()}
        conclude(config, found, real, features, card)
    processes.wait_for_all("the end")


def conclude(
    config: EvaluateConfig,
    found: Gathered,
    real: Reference | None,
    features: np.ndarray | None,
    card: dict[str, Any],
) -> None:
    """Write statistics, or compare them with the reference's.

    Args:
        features: of some of the reference's pictures.
    """
    if real:
        said = scores(config, found, real, features)
        known = {"path": str(real.path), "sha256": real.sha256, "pictures": real.card}
        tell(config, said, card | {"reference": known, "config": asdict(config)})
    elif config.make_reference:
        with report_unwritable(config.make_reference):
            reference.write(config.make_reference, found.pool, found.spatial, found.features, card)
        print(f"statistics of {found.count} pictures: {config.make_reference}")


def tell(config: EvaluateConfig, said: dict[str, float], card: dict[str, Any]) -> None:
    """Print the numbers, and add a line to the record."""
    for name, value in said.items():
        print(f"{name:20} {value:.6g}")
    if lacking := [name for name in NAMES[config.features] if name not in said]:
        print(f"not known of this reference, or not asked for: {', '.join(lacking)}")
    out = config.out or (config.run or Path()) / RECORD
    line = json.dumps(said | {"card": card}, default=str)
    with report_unwritable(out), out.open("a") as file:
        file.write(line + "\n")
    print(f"{card['pictures']['count']} pictures; all that this depends on is in {out}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(EvaluateConfig, filled=FILLED)), processes.leave)
