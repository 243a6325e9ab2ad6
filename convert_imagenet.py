"""Images → latents, once, so that training reads them instead of running a VAE at every step.

    python convert_imagenet.py                        # ImageNet at 256×256 through SDXL's VAE
    python convert_imagenet.py --dataset_name digits --image_size 32 --vae runs/vae/vae
    python convert_imagenet.py --doctor latents/digits

Stop it whenever you like: the same command resumes. Files that are complete stay, and the result is
the same, byte for byte. `data/latents.py` describes the folder, `inference/latent_writer.py` writes
it, and `inference/latent_check.py` is --doctor.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from data.buckets import resolve_shapes
from data.image_buckets import open_buckets, read_sides
from data.latents import LatentDataset, read_latent_dataset
from data.load import open_dataset
from data.rows import Source
from inference import latent_check
from inference.codec import Codec
from inference.latent_buckets import (
    BucketPart,
    bucket_parts,
    convert_parts,
    require_same_buckets,
    with_buckets,
)
from inference.latent_writer import convert_dataset, make_encoding
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.files import remove_leftovers
from runtime.flags import Derived, again, check_values, flag
from runtime.image_size import WrittenSize
from runtime.run_folder import create_run_folder, exclusive_writer
from training.flag_groups import (
    CROP_HELP,
    DatasetFlags,
    DeviceFlags,
    ImageFlags,
    LabelFlags,
    LoadingFlags,
)

DEFAULT_VAE = "stabilityai/sdxl-vae"
PATCH_SIZE = 2  # of the presets for latents


@dataclass(frozen=True, kw_only=True)
class LatentFlags:
    """Latents."""

    image_size: WrittenSize | None = again(ImageFlags, "image_size", above=None, at_least=1)
    crop: Literal["center", "letterbox"] | None = again(ImageFlags, "crop", help=CROP_HELP)
    vae: str | None = flag(
        Derived(DEFAULT_VAE),
        "a folder in diffusers' layout, an id on the hub, or a file such as "
        "sdxl:sdxl_vae.safetensors; with --doctor, where the VAE of the latents is now, if it has "
        "moved",
    )
    out: Path | None = flag(Derived("latents/<dataset>"), "the folder to write")
    mirror: bool | None = flag(
        Derived("where the dataset allows flips"), "make latents of the mirrored images too"
    )
    buckets: tuple[str, ...] = flag(
        (),
        "latents of images of any proportions: a number of shapes of the area of image_size, such "
        "as 5, or the shapes, such as 256x256 320x192",
    )
    half_precision: bool | None = flag(Derived("except on a CPU"), "run the VAE in bfloat16")
    batch_size: int | None = again(DeviceFlags, "batch_size")
    rows_per_file: int = flag(
        10_000,
        "rows of the dataset per file; at most one file's work is lost when stopped",
        at_least=1,
    )
    verify: int = flag(
        0, "afterwards, decode so many rows and compare them with the images", at_least=0
    )
    doctor: Path | None = flag(None, "only check whether this folder's latents are sound")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(DatasetFlags, LabelFlags, LoadingFlags, LatentFlags):
    """Make latents of a dataset's images, in a folder that training and `load_dataset` open."""

    dataset_name: str = again(DatasetFlags, "dataset_name", default="imagenet", is_setting=False)
    unlabelled: str = again(LabelFlags, "unlabelled", is_setting=False)
    streaming: bool = again(LoadingFlags, "streaming", is_setting=False)


def check_flags(config: ConvertConfig) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    check_values(config, vars(config))
    n_devices = parallel.devices().count
    if config.batch_size and config.batch_size % n_devices:
        raise UserError(
            f"--batch_size {config.batch_size} is not divisible by the {n_devices} devices"
        )


def main() -> None:
    """Open the VAE and the dataset, convert, and print what to do next."""
    config = cli.parse_flags(ConvertConfig)
    processes.start_backend()
    check_flags(config)
    parallel.enable_compilation_cache()
    mesh = parallel.make_mesh()
    if config.doctor:
        print(latent_check.check_latents_with_vae(config.doctor, mesh, vae=config.vae))
        return
    half_precision = config.half_precision
    if half_precision is None:
        half_precision = parallel.devices().platform != "cpu"
    dtype = "bfloat16" if half_precision else "float32"
    codec = Codec.open(config.vae or DEFAULT_VAE, mesh, dtype=dtype)
    source = open_dataset(
        config.dataset_name,
        data_dir=config.data_dir,
        image_column=config.image_column,
        label_column=config.label_column,
        caption_column=config.caption_column,
        image_size=config.image_size,
        channels=codec.config.in_channels,
        crop=config.crop,
        streaming=config.streaming,
        train_split=config.train_split,
        eval_split=config.eval_split,
        unlabelled=config.unlabelled,
    )
    for notice in source.notices:
        print(notice)
    name = Path(config.dataset_name.partition(":")[2] or config.dataset_name).name
    folder = config.out or Path("latents") / name
    dataset = convert(config, source, codec, folder)
    print(closing_words(dataset, folder))


def convert(config: ConvertConfig, source: Source, codec: Codec, folder: Path) -> LatentDataset:
    """Write the latents of an opened dataset, in one folder, or in one for each bucket.

    Raises:
        UserError: the folder was begun with other settings, or the VAE cannot encode the images.
    """
    encoding = make_encoding(source, codec, data_dir=config.data_dir, mirror=config.mirror)
    convert_part = partial(
        convert_dataset,
        codec=codec,
        rows_per_file=config.rows_per_file,
        batch_size=config.batch_size,
        n_workers=config.n_workers,
    )
    parts = [BucketPart(source, folder, encoding)]
    if config.buckets:
        multiple = PATCH_SIZE * codec.config.downsampling
        shapes = resolve_shapes(config.buckets, source.config.size, multiple)
        buckets = open_buckets(read_sides(source), shapes, batch_size=1)
        letterbox = source.config.crop == "letterbox"
        print("\n".join(buckets["train"].describe(source.config.size, letterbox=letterbox)))
        encoding = with_buckets(encoding, buckets)
        parts = list(bucket_parts(source, buckets, folder, encoding))
    create_run_folder(folder if config.buckets else folder / "data")
    with exclusive_writer(folder):
        for written_to in {folder, *(part.folder for part in parts)}:
            remove_leftovers(written_to)
        require_same_buckets(folder, encoding)
        if config.buckets:
            dataset = convert_parts(folder, encoding, parts, partial(convert_part, with_size=True))
            parts = [part for part in parts if part.folder.name in dataset.encoding.buckets]
        else:
            dataset = convert_part(source, folder=folder, encoding=encoding)
        for part in parts if config.verify else ():
            written = read_latent_dataset(part.folder)
            if written.n_rows["train"] < 2:  # a single row can be no split beside another
                continue
            n = config.verify
            print(latent_check.compare_with_images(written, part.folder, part.source, codec, n))
    return dataset


def closing_words(dataset: LatentDataset, folder: Path) -> str:
    """Describe what was written, and what to do next."""
    n_skipped = sum(map(len, dataset.skipped.values()))
    skipped = f" ({n_skipped} images could not be read and were left out)" if n_skipped else ""
    shape = ", ".join(dataset.encoding.buckets) or "×".join(map(str, dataset.encoding.shape))
    return (
        f"{dataset.row_summary}{skipped} of {shape} in {folder}/\n"
        f"Next:\n  python train.py --latents {shlex.quote(str(folder))}"
    )


if __name__ == "__main__":
    cli.run_command(main)
