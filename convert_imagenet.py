"""Images → latents, once, so that training reads them instead of running a VAE at every step.

    python convert_imagenet.py                        # ImageNet at 256×256 through SDXL's VAE
    python convert_imagenet.py --dataset_name digits --image_size 32 --vae runs/vae/vae
    python convert_imagenet.py --doctor latents/digits

Stop it whenever you like: the same command resumes. Files that are complete stay, and the result is
the same, byte for byte. `data/latents.py` describes the folder, `inference/latent_writer.py` writes
it, and `inference/latent_check.py` is --doctor.
"""

from dataclasses import dataclass
from pathlib import Path

from data.latents import LatentDataset
from data.load import open_dataset
from inference import latent_check
from inference.codec import Codec
from inference.latent_writer import convert_dataset, make_encoding
from runtime import cli, parallel
from runtime.errors import UserError
from runtime.files import remove_leftovers
from runtime.run_folder import create_run_folder, exclusive_writer


@dataclass(frozen=True)
class ConvertConfig:
    """Make latents of a dataset's images, in a folder that training and `load_dataset` open.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name.
        data_dir: a local copy of the dataset.
        image_column: where to find images in folder: and hf: data.
        label_column: where to find classes in folder: and hf: data.
        caption_column: where to find captions.
        image_size: pixels to a side after centre crop and resize.
        streaming: read images from Parquet files, here or on the hub, as they are needed.
        vae: a folder in diffusers' layout, or an id on the hub; with --doctor, where the VAE of the
            latents is now, if it has moved.
        out: the folder to write.
        mirror: make latents of the mirrored images too.
        half_precision: run the VAE in bfloat16.
        batch_size: images at a time, on all devices together.
        rows_per_file: rows of the dataset per file; at most one file's work is lost when stopped.
        n_workers: processes that decode; 0 for threads.
        verify: afterwards, decode so many rows and compare them with the images.
        doctor: only check whether this folder's latents are sound.
    """

    dataset_name: str = "imagenet"
    data_dir: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    image_size: int | None = None
    streaming: bool = False
    vae: str | None = None
    out: Path | None = None
    mirror: bool | None = None
    half_precision: bool | None = None
    batch_size: int | None = None
    rows_per_file: int = 10_000
    n_workers: int | None = None
    verify: int = 0
    doctor: Path | None = None


DEFAULT_VAE = "stabilityai/sdxl-vae"
HELP_DEFAULTS = {
    "vae": DEFAULT_VAE,
    "image_size": "as the dataset recommends",
    "out": "latents/<dataset>",
    "mirror": "where the dataset allows flips",
    "half_precision": "except on a CPU",
    "batch_size": "64 a device, 16 on a CPU",
    "n_workers": "half of the CPUs",
}
MINIMA = {"rows_per_file": 1, "batch_size": 1, "image_size": 1, "n_workers": 0, "verify": 0}


def check_flags(config: ConvertConfig) -> None:
    """Raises UserError for flags that cannot work, before anything is loaded."""
    for name, minimum in MINIMA.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name} {value}: must be at least {minimum}")
    n_devices = parallel.devices().count
    if config.batch_size and config.batch_size % n_devices:
        raise UserError(
            f"--batch_size {config.batch_size} is not divisible by the {n_devices} devices"
        )


def main() -> None:
    """Open the VAE and the dataset, convert, and print what to do next."""
    config = cli.parse_flags(ConvertConfig, shown_defaults=HELP_DEFAULTS)
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
        streaming=config.streaming,
    )
    encoding = make_encoding(source, codec, data_dir=config.data_dir, mirror=config.mirror)
    name = Path(config.dataset_name.partition(":")[2] or config.dataset_name).name
    folder = config.out or Path("latents") / name
    create_run_folder(folder / "data")
    with exclusive_writer(folder):
        remove_leftovers(folder)
        dataset = convert_dataset(
            source,
            codec,
            folder,
            encoding,
            rows_per_file=config.rows_per_file,
            batch_size=config.batch_size,
            n_workers=config.n_workers,
        )
        if config.verify:
            n = config.verify
            print(latent_check.compare_with_images(dataset, folder, source, codec, n))
    print(closing_words(dataset, folder))


def closing_words(dataset: LatentDataset, folder: Path) -> str:
    """Describe what was written, and what to do next."""
    n_skipped = sum(map(len, dataset.skipped.values()))
    skipped = f" ({n_skipped} images could not be read and were left out)" if n_skipped else ""
    shape = "×".join(map(str, dataset.encoding.shape))
    return (
        f"{dataset.row_summary}{skipped} of {shape} in {folder}/\n"
        f"Next:\n  python train.py --latents {folder}"
    )


if __name__ == "__main__":
    cli.run_command(main)
