"""What is known of each dataset: where it lies, its columns and classes, how to train on it.

Facts only. `pipeline.py` opens the sets and checks them against what is written here; names of
classes in the data itself win over the ones below, which serve columns that carry none. The
training of `digits` is measured; the others are sensible starts on a single GPU, not tuned.
"""

from dataclasses import dataclass
from typing import Any

from runtime import errors


@dataclass(frozen=True)
class LatentEncoding:
    """How pictures became latents: the same for a whole folder, and written into each of its files.

    Args:
        dataset_name, source: of the pictures; the source is an id with its revision, or a folder.
        image_size: pixels to a side of the pictures.
        shape: (height, width, channels) of a latent.
        vae, vae_hash: where the VAE was, and the hash of its weights; "" where that is not known.
        scaling_factor, shift_factor: a model sees (z − shift) · scale.
        precision: that the VAE was run in.
        mirrored: whether a row also has the moments of the mirrored picture.
        captions: whether there is a column of captions.
    """

    dataset_name: str
    source: str
    image_size: int
    shape: tuple[int, int, int]
    vae: str
    vae_hash: str
    scaling_factor: float
    shift_factor: float
    precision: str
    mirrored: bool
    captions: bool

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Of a row: mean and log-variance, and after them those of the mirrored picture."""
        height, width, channels = self.shape
        return height, width, 2 * channels * (2 if self.mirrored else 1)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "LatentEncoding":
        """From what JSON has made of one, which has no tuples."""
        facts: dict[str, Any] = record | {"shape": tuple(record["shape"])}
        return cls(**facts)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset, and the training recommended for it.

    Args:
        path: an id on the Hugging Face hub, or a folder of this repository.
        config_name: which of the hub's configurations, where there are several.
        label_column: None for a set that is learnt without classes (`n_classes` is then 0).
        eval_split: None to hold back `eval_fraction` of the training rows.
        label_names: () for the data's own.
        caption_column: where each picture has a caption, or a list of them.
        templates: of captions made from class names where there is no such column, as "a photo of
            a {label}".
        flip: whether a mirrored picture is as good as the picture.
        latents_dir: where the set's latents lie, if it is for them and not for its pictures that
            the training is recommended.
        encoding: of a set that is opened as latents; `image_size` and `channels` are then theirs.
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
    image_size: int
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
    def conditioning(self) -> str:
        """What a model can be told of a picture: text, class or none."""
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
            caption_column="sentences_raw",  # five a picture: each epoch draws one
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
    """The entry called `name`; `UserError` with the nearest name when there is none."""
    if name not in DATASET_CONFIGS:
        raise errors.unknown_name("dataset", name, DATASET_CONFIGS)
    return DATASET_CONFIGS[name]
