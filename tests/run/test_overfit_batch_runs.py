"""`--overfit_batch` trains on the first batch only, and evaluates on it."""

import json
from dataclasses import replace

import nano  # noqa: F401  (its preset)
import pytest
from train_cases import TINY, assert_same

from runtime.errors import UserError
from train import Trainer

ONE = replace(TINY, overfit_batch=True)


@pytest.mark.slow
def test_a_run_on_one_batch_resumes_bit_for_bit(tmp_path, capsys):
    whole = Trainer(replace(ONE, run_dir=tmp_path / "whole"))
    whole.fit()
    assert json.loads((tmp_path / "whole/config.json").read_text())["overfit_batch"] is True
    Trainer(replace(ONE, run_dir=tmp_path / "run")).fit(7)
    resumed = Trainer.from_run(tmp_path / "run")
    assert resumed.step == 7 and resumed.config.overfit_batch
    resumed.fit()
    assert_same(resumed.state, whole.state)
    other = replace(ONE, run_dir=tmp_path / "run", resume=True, overfit_batch=False)
    with pytest.raises(UserError, match="overfit_batch was True, not False"):
        Trainer(other)


def test_cache_on_device_is_refused():
    with pytest.raises(UserError, match="--cache_on_device are mutually exclusive"):
        Trainer(replace(ONE, cache_on_device=True))
