"""Facts about each dataset: its location, columns and classes, and the training recommended for it.

Facts only. `data.load` opens a dataset and checks it against them; class names in the data itself
take precedence over the ones below, which serve columns that carry none. The training of `digits`
is measured; the others are sensible starting points on a single GPU, not tuned.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from runtime import errors
from runtime.image_size import ImageSize, WrittenSize

Crop = Literal["center", "random", "letterbox"]


@dataclass(frozen=True)
class LatentEncoding:
    """The conversion of images to latents, recorded for a folder and in each of its files.

    Args:
        dataset_name: of the images.
        source: of the images: an id with its revision, or a folder.
        image_size: of the images in pixels; 256, or 256x192 (height x width).
        shape: (height, width, channels) of a latent.
        vae: the VAE's location.
        vae_hash: hash of the VAE's weights; "" where it is not known.
        scaling_factor: a model sees (z − shift) · scale.
        shift_factor: see `scaling_factor`.
        precision: that the VAE was run in.
        mirrored: a row also has the moments of the mirrored image.
        captions: there is a column of captions.
        buckets: shapes of the images in pixels, if there are several; `image_size` and `shape` are
            then those that samples have.
        crop: as of `DatasetConfig`.
    """

    dataset_name: str
    source: str
    image_size: WrittenSize
    shape: tuple[int, int, int]
    vae: str
    vae_hash: str
    scaling_factor: float
    shift_factor: float
    precision: str
    mirrored: bool
    captions: bool
    buckets: tuple[str, ...] = ()
    crop: Crop = "center"

    @property
    def size(self) -> ImageSize:
        """Height and width of the images."""
        return ImageSize.parse(self.image_size)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shape of a row: mean and log-variance, then those of the mirrored image if there are
        any.
        """
        height, width, channels = self.shape
        return height, width, 2 * channels * (2 if self.mirrored else 1)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "LatentEncoding":
        """Convert from JSON, which has no tuples."""
        tuples = {"shape": tuple(record["shape"]), "buckets": tuple(record.get("buckets", ()))}
        fields: dict[str, Any] = record | tuples
        return cls(**fields)

    def at_bucket(self, size: ImageSize) -> "LatentEncoding":
        """Return the encoding of images of one of the buckets."""
        factor = self.size.height // self.shape[0]
        latent = size.divided(factor)
        assert latent, f"{size} is not divisible by {factor}"
        shape = (*latent.sides, self.shape[-1])
        return dataclasses.replace(self, image_size=size.written, shape=shape, buckets=())


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset, and the training recommended for it.

    Args:
        name: the key in `DATASET_CONFIGS`, or what the user gave.
        path: an id on the Hugging Face hub, or a folder of this repository.
        config_name: one of the hub's configurations, where there are several.
        image_column: the column of images.
        label_column: None for a dataset without classes (`n_classes` is then 0).
        train_split: the split to train on.
        caption_column: a column with a caption for each image, or a list of them.
        templates: captions made from class names where there is no such column, as "a photo of
            a {label}".
        eval_split: None to hold out `eval_fraction` of the training rows.
        eval_fraction: see `eval_split`.
        n_classes: 0 for none.
        label_names: () for the data's own.
        channels: 1 (grey) or 3 (RGB); of latents, theirs.
        image_size: 256 pixels, or 256x192 (height x width); of latents, theirs.
        crop: how images get these proportions: center, their middle; random, in training a part
            anywhere, else the middle; letterbox, all of them between black bars.
        model: a preset of `model.py`.
        batch_size: rows of a global batch.
        learning_rate: peak of the schedule.
        n_steps: of the training.
        flip: a mirrored image is as good as the image.
        ema_decay: of the averaged weights.
        cfg_scale: guidance scale to sample with.
        latents_dir: folder of the dataset's latents, if the training is recommended for them and
            not for the images.
        encoding: of a dataset that is opened as latents.
    """

    name: str
    path: str
    config_name: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    train_split: str = "train"
    caption_column: str | None = None
    templates: tuple[str, ...] = ()
    eval_split: str | None = "test"
    eval_fraction: float = 0.1
    n_classes: int
    label_names: tuple[str, ...] = ()
    channels: int = 3
    image_size: WrittenSize
    crop: Crop = "center"
    model: str
    batch_size: int = 128
    learning_rate: float = 3e-4
    n_steps: int
    flip: bool = True
    ema_decay: float = 0.9995
    cfg_scale: float = 1.5
    latents_dir: str | None = None
    encoding: LatentEncoding | None = None

    @property
    def size(self) -> ImageSize:
        """Height and width of the images, or of the latents."""
        return ImageSize.parse(self.image_size)

    @property
    def conditioning(self) -> str:
        """Conditioning that the data allow: "text", "class" or "none"."""
        if self.caption_column or self.templates:
            return "text"
        return "class" if self.n_classes else "none"


DATASET_CONFIGS = {
    config.name: config
    for config in (
        DatasetConfig(
            name="digits",
            path="data/digits",
            n_classes=10,
            channels=1,
            image_size=8,
            label_names=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
            model="DiT-Ti/2",
            batch_size=64,
            learning_rate=3e-3,
            n_steps=900,
            flip=False,  # a mirrored 2 is no digit
            ema_decay=0.98,
            cfg_scale=1.25,
        ),
        DatasetConfig(
            name="mnist",
            path="ylecun/mnist",
            n_classes=10,
            channels=1,
            image_size=28,
            label_names=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
            model="DiT-Ti/2",
            learning_rate=1e-3,
            n_steps=10_000,
            flip=False,
            ema_decay=0.999,
        ),
        DatasetConfig(
            name="fashion_mnist",
            path="zalando-datasets/fashion_mnist",
            n_classes=10,
            channels=1,
            image_size=28,
            label_names=(
                *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
            model="DiT-Ti/2",
            learning_rate=1e-3,
            n_steps=15_000,
            flip=False,  # all shoes point to the left
            ema_decay=0.999,
        ),
        DatasetConfig(
            name="cifar10",
            path="uoft-cs/cifar10",
            image_column="img",
            n_classes=10,
            image_size=32,
            label_names=(
                *("airplane", "automobile", "bird", "cat", "deer"),
                *("dog", "frog", "horse", "ship", "truck"),
            ),
            model="DiT-S/2",
            batch_size=256,
            learning_rate=4e-4,
            n_steps=100_000,
        ),
        DatasetConfig(
            name="flowers",
            path="nelorth/oxford-flowers",  # 7 k rows; the official split trains on 1,020
            n_classes=102,
            image_size=64,
            model="DiT-S/4",
            n_steps=60_000,
            cfg_scale=2.0,
        ),
        DatasetConfig(
            name="butterflies",
            path="huggan/smithsonian_butterflies_subset",
            label_column=None,
            eval_split=None,
            n_classes=0,
            image_size=64,
            model="DiT-S/4",
            batch_size=64,
            n_steps=20_000,
            ema_decay=0.999,
            cfg_scale=1.0,
        ),
        DatasetConfig(
            name="tiny_imagenet",
            path="zh-plus/tiny-imagenet",
            eval_split="valid",
            n_classes=200,
            image_size=64,
            # the names in the data are WordNet ids, like n01443537
            model="DiT-B/4",
            batch_size=256,
            learning_rate=2e-4,
            n_steps=200_000,
            ema_decay=0.9999,
            cfg_scale=2.0,
        ),
        DatasetConfig(
            name="celeba",
            path="flwrlabs/celeba",
            config_name="img_align+identity+attr",
            label_column="Smiling",  # or any other of its 40 attributes, with --label_column
            eval_split="valid",
            n_classes=2,
            image_size=64,
            label_names=("not smiling", "smiling"),
            model="DiT-S/4",
            batch_size=256,
            n_steps=100_000,
            ema_decay=0.9999,
        ),
        DatasetConfig(
            name="celebahq",
            path="korexyz/celeba-hq-256x256",
            eval_split="validation",
            n_classes=2,
            image_size=128,
            label_names=("female", "male"),  # not verified; the data's own win
            model="DiT-B/8",
            learning_rate=2e-4,
            n_steps=150_000,
            ema_decay=0.9999,
        ),
        DatasetConfig(
            name="imagenet",
            path="ILSVRC/imagenet-1k",  # gated: log in and accept its terms
            eval_split="validation",
            n_classes=1000,
            image_size=256,
            latents_dir="latents/imagenet",
            model="DiT-B/2",
            batch_size=256,
            learning_rate=1e-4,
            n_steps=400_000,
            ema_decay=0.9999,
            cfg_scale=1.5,
        ),
        DatasetConfig(
            name="coco",
            path="Multimodal-Fatima/COCO_captions_train",
            label_column=None,
            caption_column="sentences_raw",  # five per image: each epoch samples one
            eval_split=None,
            eval_fraction=0.02,
            n_classes=0,
            image_size=64,
            model="MMDiT-S/4",
            batch_size=256,
            n_steps=200_000,
            ema_decay=0.9999,
            cfg_scale=3.0,
        ),
    )
}


def find_dataset(name: str) -> DatasetConfig:
    """Return the entry of this name.

    Raises:
        UserError: there is none. The message names the nearest one.
    """
    if name not in DATASET_CONFIGS:
        error = errors.unknown_name("dataset", name, DATASET_CONFIGS)
        raise errors.UserError(f"{error}; a folder is folder:PATH, one of the hub hf:owner/name")
    return DATASET_CONFIGS[name]
