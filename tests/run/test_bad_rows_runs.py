"""A run that skips bad rows is, bit for bit, a run on a dataset that never had them."""

import json
from dataclasses import replace

from bad_rows_cases import POINTER, write_dataset
from pipeline_cases import own_cache  # noqa: F401
from train_cases import TINY, assert_same, metrics

from train import Trainer

BAD = {3: None, 11: POINTER.encode(), 29: b""}  # rows of a dataset of 40


def test_skipping_is_never_having_had_the_bad_rows_also_when_interrupted(tmp_path):
    damaged = f"folder:{write_dataset(tmp_path / 'damaged', 40, BAD)}"
    clean = f"folder:{write_dataset(tmp_path / 'clean', 40, BAD, without=True)}"
    expected = Trainer(replace(TINY, dataset_name=clean, run_dir=tmp_path / "expected"))
    expected.fit()
    run = tmp_path / "run"
    skip = replace(
        TINY,
        dataset_name=damaged,
        bad_rows="skip",
        bad_rows_at_most=0.1,
        in_memory=False,
        n_workers=0,
        run_dir=run,
    )
    Trainer(skip).fit(6)
    record = json.loads((run / "bad_rows.json").read_text())
    assert [row["row"] for row in record["train"]["bad_rows"]] == list(BAD)
    resumed = Trainer.from_run(run)
    resumed.fit()
    assert_same(resumed.state, expected.state)
    assert metrics(run)[-1] == metrics(tmp_path / "expected")[-1]
    assert not (tmp_path / "expected/bad_rows.json").exists()
