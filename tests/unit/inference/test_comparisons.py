"""Real images to compare samples with are those of the run's dataset, as it was trained on."""

from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from data.load import open_dataset
from export import EXPORTED_SETTINGS
from inference.comparisons import open_eval_split
from inference.conditioning import Captions
from inference.trained_model import TrainedModel
from model import model_config
from runtime import parallel
from runtime.errors import UserError


def write_classes(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((8, 8, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def test_a_dataset_whose_classes_have_changed_is_not_compared_with(tmp_path):
    """Else the images of another class would be shown as those of the class that was named."""
    name = write_classes(tmp_path / "pets", "cat", "dog")
    settings = {"dataset_name": name, "dataset": {"label_names": ["cat", "dog"]}}
    model = model_config("DiT-Ti/8", image_size=8, channels=3, out_channels=3, n_classes=2)
    trained = TrainedModel("x", settings, model, parallel.make_mesh(), lambda: (None, None))
    assert open_eval_split(trained).config.n_classes == 2
    write_classes(tmp_path / "pets", "ant")
    with pytest.raises(UserError, match=r"--denoise needs .* had 2 classes, now it has 3 \(added:"):
        open_eval_split(trained)


def test_an_export_records_how_its_dataset_is_opened():
    """All that `open_eval_split` reads, but for places on the disk and the way of reading."""
    flags = {"conditioning", "image_column", "label_column", "caption_column", "caption"}
    flags |= {"channels", "image_size", "train_split", "eval_split", "unlabelled", "dataset"}
    assert {"dataset_name", *flags} <= {*EXPORTED_SETTINGS}


def never(texts) -> NoReturn:
    raise AssertionError("nothing is to be encoded")


def test_a_split_without_captions_is_named(tmp_path):
    source = open_dataset(write_classes(tmp_path / "x", "a"), conditioning="none")
    captions = Captions(never, ["encoder"], open_store=never)
    with pytest.raises(UserError, match="split 'train' has no captions"):
        captions.all_words(source.eval)
    with pytest.raises(UserError, match="split 'train' has no captions"):
        captions.of_rows(source.eval, np.arange(1))
