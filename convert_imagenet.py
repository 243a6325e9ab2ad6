"""Pictures → latents, once, so that training reads them instead of running a VAE at every step.

    python convert_imagenet.py                        # ImageNet at 256×256 through SDXL's VAE
    python convert_imagenet.py --dataset_name digits --image_size 32 --vae runs/vae/vae
    python convert_imagenet.py --doctor latents/digits

Stop it whenever you like and say the same again: files that are whole stay, and the result is the
same, byte for byte. `latents.py` says what is in the folder.
"""

from dataclasses import dataclass
from pathlib import Path

import jax

from data.latents import LatentDataset
from data.load import open_dataset
from inference import latent_check
from inference.codec import Codec
from inference.latent_writer import convert_dataset, make_encoding
from runtime import cli, parallel, run_folder
from runtime import files as runtime_files
from runtime.errors import UserError


@dataclass(frozen=True)
class ConvertConfig:
    """Make latents of a dataset's pictures, in a folder that training and `load_dataset` open.

    Args:
        dataset_name: a key of DATASET_CONFIGS, folder:PATH or hf:owner/name.
        data_dir: a local copy of the dataset.
        image_column: where to find pictures in folder: and hf: data.
        label_column: where to find classes in folder: and hf: data.
        caption_column: where to find captions.
        image_size: pixels to a side after centre crop and resize.
        streaming: read pictures from Parquet files, here or on the hub, as they are needed.
        vae: a folder in diffusers' layout, or an id on the hub; of the doctor, where the VAE of the
            latents is now, if it has moved.
        out: the folder.
        mirror: make latents of the mirrored pictures too.
        half_precision: run the VAE in bfloat16.
        batch_size: pictures at a time, over all devices.
        rows_per_file: of the source; what is lost when it is stopped is one file's work.
        n_workers: processes that decode; 0 for threads.
        verify: afterwards, decode so many rows and compare them with the pictures.
        doctor: do nothing but look whether this folder's latents are sound.
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


# What the help page says of values that are not given.
FILLED = {"vae": "stabilityai/sdxl-vae", "image_size": "as the dataset recommends"}
FILLED |= {"out": "latents/<dataset>", "mirror": "where the set allows flips"}
FILLED |= {"half_precision": "except on a CPU", "batch_size": "64 a device, 16 on a CPU"}
FILLED |= {"n_workers": "half of the CPUs"}
LEAST = {"rows_per_file": 1, "batch_size": 1, "image_size": 1, "n_workers": 0, "verify": 0}


def check(config: ConvertConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name, least in LEAST.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if config.batch_size and config.batch_size % jax.device_count():
        raise UserError(
            f"--batch_size {config.batch_size} is not divisible by the {jax.device_count()} devices"
        )


def main() -> None:
    config = cli.parse_flags(ConvertConfig, shown_defaults=FILLED)
    check(config)
    parallel.enable_compilation_cache()
    mesh = parallel.make_mesh()
    if config.doctor:
        print(latent_check.check_latents_with_vae(config.doctor, mesh, vae=config.vae))
        return
    half = (
        jax.default_backend() != "cpu" if config.half_precision is None else config.half_precision
    )
    codec = Codec.open(config.vae or FILLED["vae"], mesh, dtype="bfloat16" if half else "float32")
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
    run_folder.create_run_folder(folder / "data")
    with run_folder.exclusive_writer(folder):
        runtime_files.remove_leftovers(folder)
        done = convert_dataset(
            source,
            codec,
            folder,
            encoding,
            rows_per_file=config.rows_per_file,
            batch_size=config.batch_size,
            n_workers=config.n_workers,
        )
        if config.verify:
            print(latent_check.compare_with_images(done, folder, source, codec, config.verify))
    print(farewell(done, folder))


def farewell(done: LatentDataset, folder: Path) -> str:
    """What there is, and what to do next."""
    skipped = sum(map(len, done.skipped.values()))
    without = f" ({skipped} pictures could not be read and were left out)" if skipped else ""
    return (
        f"{done.counts}{without} of {'×'.join(map(str, done.encoding.shape))} in {folder}/\n"
        f"Next:\n  python train.py --latents {folder}"
    )


if __name__ == "__main__":
    cli.run_command(main)
