"""`python -m data.check` lists every bad file once and counts them; status 1 if there are any."""

import pytest
from bad_rows_cases import POINTER, write_dataset, write_folder
from pipeline_cases import own_cache  # noqa: F401

from data import check
from data.rows import BadRow
from runtime.errors import UserError


def status_of(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        check.main(words)
    return int(str(caught.value.code))


def test_a_folder_with_bad_files(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "pics")
    (folder / "cat/000.png").write_text(POINTER)
    (folder / "dog/001.png").write_text("<html>404</html>")
    problem = "the image cannot be read"
    expected = [
        f"{folder}/cat/000.png: {problem} (a Git LFS pointer: run `git lfs pull`)",
        f"{folder}/dog/001.png: {problem} (an HTML page: download the image again)",
        "2 of 20 rows are bad",
    ]
    monkeypatch.chdir(tmp_path)
    for words in (["pics"], ["./pics"], [str(folder)], [f"folder:{folder}"]):
        assert status_of(*words) == 1
        assert capsys.readouterr().out.splitlines() == expected


def test_a_dataset_without_bad_rows(capsys):
    assert status_of("digits") == 0
    assert capsys.readouterr().out == "0 of 1797 rows are bad\n"


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_rows_without_files_are_named_by_split_and_row(tmp_path, capsys, streaming):
    folder = write_dataset(tmp_path, 20, {4: b"", 9: None})
    assert status_of("--dataset_name", str(folder), *streaming) == 1
    assert capsys.readouterr().out.splitlines() == [
        "split 'train', row 4: the image cannot be read (the file is empty)",
        "split 'train', row 9: the cell is empty",
        "2 of 28 rows are bad",
    ]


def test_splits_of_any_name_can_be_checked(tmp_path, capsys):
    folder = write_dataset(tmp_path, 20, {4: b""})
    for file, name in zip(sorted(folder.rglob("*.parquet")), ("night", "day"), strict=True):
        (folder / name).mkdir()
        file.rename(folder / name / "0.parquet")
    card = "configs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {name}\n    path: {name}/*\n" for name in ("night", "day"))
    (folder / "README.md").write_text(f"---\n{card}---\n")
    assert status_of(str(folder), "--train_split", "day", "--eval_split", "night") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 28 rows are bad"


def test_consecutive_rows_with_one_reason_share_a_line():
    bad = [BadRow(row, "", "cannot read x.parquet") for row in (5, 6, 7, 9)]
    bad += [BadRow(10, "", "the cell is empty"), BadRow(11, "a.png", "no"), BadRow(12, "/b", "no")]
    assert list(check.describe_rows("train", bad)) == [
        "split 'train', rows 5–7: cannot read x.parquet",
        "split 'train', row 9: cannot read x.parquet",
        "split 'train', row 10: the cell is empty",
        "a.png (split 'train', row 11): no",
        "/b: no",
    ]


def test_what_is_no_dataset_is_one_line(tmp_path):
    with pytest.raises(UserError, match="missing --dataset_name"):
        check.main([])
    with pytest.raises(UserError, match="unknown dataset 'pics'"):
        check.main(["pics"])
    with pytest.raises(UserError, match="there is no folder"):
        check.main([str(tmp_path / "missing")])
