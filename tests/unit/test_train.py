"""A run leaves what it promises, resumes bit for bit, and fails with one line."""

import nano  # noqa: F401  (its preset)
import pytest

import generate
from runtime.errors import UserError
from train import Trainer


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        Trainer.from_run(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "\udcff", '{"model": 1}'])
def test_a_damaged_config_is_reported(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        Trainer.from_run(str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        generate.main(generate.GenerateConfig(run=tmp_path))
