"""Every entry is consistent, and a wrong name is corrected."""

import pytest

from datasets_config import DATASET_CONFIGS, find_dataset
from runtime.errors import UserError


@pytest.mark.parametrize("config", DATASET_CONFIGS.values(), ids=lambda c: c.name)
def test_an_entry_agrees_with_itself(config):
    family, _, patch = config.model.partition("/")
    assert family.removeprefix("MM") in {"DiT-Ti", "DiT-S", "DiT-B", "DiT-L", "DiT-XL"}
    assert patch in {"1", "2", "4", "8"} and config.image_size % int(patch) == 0
    assert config.channels in (1, 3)
    assert (config.n_classes == 0) == (config.label_column is None)
    assert len(set(config.label_names)) in (0, config.n_classes)
    assert 0 < config.ema_decay < 1 and 0 < config.eval_fraction < 0.5
    assert config.train_split != config.eval_split


def test_the_key_is_the_name():
    assert all(find_dataset(key).name == key for key in DATASET_CONFIGS)


def test_a_wrong_name_is_corrected():
    with pytest.raises(UserError, match=r"unknown dataset 'cifar'; did you mean 'cifar10'\?"):
        find_dataset("cifar")
