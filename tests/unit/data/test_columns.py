"""Columns of tables as people have them: labels and captions of every kind, wrapped images."""

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import columns
from data.arrow import ArrowSplit
from data.load import open_dataset
from data.pipeline import Pipeline
from datasets_config import DatasetConfig
from runtime.errors import UserError


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TABLE = DatasetConfig(
    name="folder:x",
    path="x",
    image_column="",
    label_column="label",
    eval_split="",
    n_classes=0,
    channels=0,
    image_size=0,
    model="",
    n_steps=1,
)


def write_table(folder, name="train.parquet", /, *, n: int = 12, **values) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [PNG] * n} | values), folder / name)
    return f"folder:{folder}"


def all_labels(source) -> list[str]:
    """Names of the classes of all rows, in the order of the data."""
    labels = np.zeros(len(source.train) + len(source.eval), int)
    for split in (source.train, source.eval):
        labels[split.rows] = split.labels
    return [source.config.label_names[label] for label in labels]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 2, 3], ("1", "2", "3")),
        ([5, 10**10, 7], ("5", "7", "10000000000")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        (["0", "10", "2"], ("0", "2", "10")),
        (["ox", "ant", "bee"], ("ant", "bee", "ox")),
        ([-1, 0, 1], ("-1", "0", "1")),
    ],
)
def test_labels_become_classes_without_gaps(tmp_path, values, names):
    source = open_dataset(write_table(tmp_path, label=values * 4))
    assert source.config.label_names == names and source.config.n_classes == 3
    expected = [str(int(v)) if isinstance(v, float) else str(v) for v in values * 4]
    assert all_labels(source) == expected
    assert set(source.train.labels.tolist()) == {0, 1, 2}


def test_a_resumed_run_keeps_the_ids_of_named_classes():
    features = Features({"label": ClassLabel(names=["dog", "cat", "ox"])})
    data = Dataset.from_dict({"label": [0, 1, None, 2, 0]}, features=features)
    resumed = dataclasses.replace(TABLE, label_names=("cat", "dog", "ox"), n_classes=3)
    ids = columns.read_label_ids(resumed, "train", ArrowSplit(data))
    assert ids.tolist() == [1, 0, -1, 2, 1]


def test_declared_classes_that_no_row_has_are_left_out(tmp_path):
    """Labels from 1, of classes that are declared from 0: no sample is drawn of class 0. Classes
    with names are there, and a line says that some have no images.
    """
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=4)})
    labels = [1, 2, 3] * 4
    rows = {"image": [{"bytes": PNG, "path": None}] * 12, "label": labels}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "x")
    source = open_dataset(f"folder:{tmp_path / 'x'}")
    assert source.config.label_names == ("1", "2", "3")
    assert all_labels(source) == [*map(str, labels)]
    assert "4 classes: " not in str(source.notices) and "without" not in str(source.notices)
    resumed = open_dataset(f"folder:{tmp_path / 'x'}", class_order=["0", "1", "2", "3"])
    assert resumed.config.n_classes == 4 and all_labels(resumed) == [*map(str, labels)]
    assert "classes without training images: 1 (0)" in resumed.notices
    features["label"] = ClassLabel(names=["ant", "cat", "dog", "ox"])
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "named")
    named = open_dataset(f"folder:{tmp_path / 'named'}")
    assert named.config.label_names == ("ant", "cat", "dog", "ox")
    assert "classes without training images: 1 (ant)" in named.notices


def test_a_resume_without_classes_says_which_the_run_has(tmp_path):
    name = write_table(tmp_path)
    with pytest.raises(UserError, match=r"no classes .*; the run has cat, dog; put them back"):
        open_dataset(name, conditioning="class", class_order=["cat", "dog"])


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_are_the_ids_of_classes_that_the_table_names_by_words(tmp_path, kind):
    label = [kind(i) for i in range(10)] * 2
    for split in ("train", "test"):
        pq.write_table(pa.table({"img": [PNG] * 20, "label": label}), tmp_path / f"{split}.parquet")
    source = open_dataset("cifar10", data_dir=tmp_path)
    assert source.config.label_names[:2] == ("airplane", "automobile")
    assert source.train.labels.tolist() == label


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([i / 7 for i in range(12)], "not fractions such as 0.14"),
        ([[0, 1], [1, 0]] * 6, r"not List\(Value\('int64'\)\)"),
        ([{"a": 1}] * 12, r"not {'a': Value\('int64'\)}"),
    ],
)
def test_what_is_no_class_is_refused_by_name(tmp_path, label, message):
    name = write_table(tmp_path, label=label)
    with pytest.raises(UserError, match=f"column 'label': labels must be .*{message}") as caught:
        open_dataset(name)
    assert '--label_column ""' in str(caught.value) and len(str(caught.value)) < 300
    assert open_dataset(name, label_column="").config.n_classes == 0
    assert open_dataset(name, label_column="none").config.n_classes == 0


def test_an_index_is_no_class(tmp_path):
    name = write_table(tmp_path, n=120, label=list(range(120)))
    with pytest.raises(UserError, match="has 120 different values in 120 rows: no classes"):
        open_dataset(name)


def test_rows_without_a_class_are_an_error_or_left_out(tmp_path):
    name = write_table(tmp_path, label=[None, 1.0, 0.0, float("nan")] * 3)
    with pytest.raises(UserError, match=r"row 0, .*: 6 of 12 rows have none; --unlabelled skip"):
        open_dataset(name)
    source = open_dataset(name, unlabelled="skip")
    rows = sorted([*source.train.rows, *source.eval.rows])
    assert rows == [1, 2, 5, 6, 9, 10]


def test_a_test_split_without_labels_is_named_and_can_be_left_out(tmp_path):
    write_table(tmp_path, "Train/a.parquet", label=[0, 1] * 6)
    name = write_table(tmp_path, "Test/a.parquet", n=4, label=[-1] * 4)
    with pytest.raises(UserError, match=r"split 'test', row 0, .*--eval_split none"):
        open_dataset(name)
    source = open_dataset(name, eval_split="none")
    assert (source.train.name, source.eval.name, len(source.train)) == ("train", "train", 11)
    assert "splits that are not used: test" in "\n".join(source.notices)
    pq.write_table(pa.table({"image": [PNG] * 4}), tmp_path / "Test/a.parquet")
    with pytest.raises(UserError, match=r"cannot open|--eval_split none"):
        open_dataset(name)


def test_the_training_split_is_not_evaluated_on(tmp_path):
    write_table(tmp_path, "train.parquet", label=[0, 1] * 6)
    name = write_table(tmp_path, "test.parquet", label=[0, 1] * 6)
    with pytest.raises(UserError, match="is the split to train on; pass --eval_split none"):
        open_dataset(name, eval_split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_would_not_be_used_are_named(tmp_path, streaming):
    write_table(tmp_path, "train.parquet", label=[0, 1] * 6)
    name = write_table(tmp_path, "extra.parquet", label=[0, 1] * 6)
    with pytest.raises(UserError, match=r"extra.parquet in .* would not be used.*; rename or move"):
        open_dataset(name, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"", "the file is empty"),
    ],
)
def test_a_file_that_is_no_table_is_named_for_what_it_is(tmp_path, content, message, streaming):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=f"train.parquet' holds no rows: {message}"):
        open_dataset(f"folder:{tmp_path}", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_is_a_pattern_is_refused(tmp_path, streaming):
    name = write_table(tmp_path / "2021 [a]", label=["a", "b"] * 6)
    with pytest.raises(UserError, match=r"2021 \[a\]': its data files cannot be read"):
        open_dataset(name, streaming=streaming)


def test_splits_without_rows(tmp_path):
    table = pa.table({"image": [PNG] * 6, "label": [0, 1] * 3})
    empty = table.slice(0, 0)
    DatasetDict({"train": Dataset(table), "test": Dataset(empty)}).save_to_disk(tmp_path / "saved")
    source = open_dataset(f"folder:{tmp_path / 'saved'}")
    assert len(source.train) + len(source.eval) == 6
    assert "splits without rows: test" in source.notices
    (tmp_path / "files").mkdir()
    for split, rows in (("train", table), ("test", empty)):
        pq.write_table(rows, tmp_path / "files" / f"{split}.parquet")
    with pytest.raises(UserError, match=r"test.parquet' holds no rows: an empty table"):
        open_dataset(f"folder:{tmp_path / 'files'}")


def test_images_beside_a_table_that_no_row_names_are_counted(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    paths = [None, *(f"{i}.png" for i in range(1, 6))]
    pq.write_table(pa.table({"image": paths}), tmp_path / "train.PARQUET")
    source = open_dataset(f"folder:{tmp_path}")
    assert "3 images that no row names (0.png, 6.png, 7.png)" in source.notices[0]
    cells = [{"bytes": None, "path": f"{i}.png"} for i in range(8)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "train.PARQUET")
    source = open_dataset(f"folder:{tmp_path}")
    assert len(source.train.decode(np.arange(len(source.train)))) == 7


def test_a_first_cell_that_is_empty_does_not_hide_the_images(tmp_path):
    pq.write_table(pa.table({"photo": [None, *[PNG] * 11]}), tmp_path / "train.parquet")
    assert open_dataset(f"folder:{tmp_path}").config.image_column == "photo"
    pq.write_table(pa.table({"pixels": [[1, 2]] * 12}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"has no column of images .*; images are files"):
        open_dataset(f"folder:{tmp_path}")


def test_splits_can_be_named(tmp_path):
    for split, n in (("first", 12), ("second", 8)):
        write_table(tmp_path, f"{split}.parquet", n=n, label=[0, 1] * (n // 2))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {s}.parquet\n" for s in ("first", "second"))
        + "- config_name: some\n  data_files: first.parquet\n---\n"
    )
    with pytest.raises(UserError, match=r"without a configuration .*'all', 'some'.*:NAME"):
        open_dataset(f"folder:{tmp_path}")
    name = f"folder:{tmp_path}:all"
    with pytest.raises(UserError, match=r"no split 'train' .*--train_split"):
        open_dataset(name)
    source = open_dataset(name, train_split="second", eval_split="first")
    assert (len(source.train), len(source.eval)) == (8, 12)


def test_images_are_bytes_records_or_paths(tmp_path):
    write_table(tmp_path / "bytes", label=[0, 1] * 6)
    write_table(tmp_path / "records", image=[{"bytes": PNG, "path": "x"}] * 12, label=[0, 1] * 6)
    (tmp_path / "paths" / "sub").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "paths" / "sub" / f"{i}.png").write_bytes(png(i))
    write_table(tmp_path / "paths", image=[f"sub/{i}.png" for i in range(12)], label=[0, 1] * 6)
    for kind in ("bytes", "records", "paths"):
        source = open_dataset(f"folder:{tmp_path / kind}")
        assert source.config.n_classes == 2
        assert Pipeline(source, batch_size=4, seed=0).train_batch(0).image.shape == (4, 8, 8, 3)
    (tmp_path / "paths" / "sub" / "0.png").rename(tmp_path / "paths" / "0.png")
    with pytest.raises(UserError, match=r"names the image 'sub/0.png', which does not lie there"):
        open_dataset(f"folder:{tmp_path / 'paths'}")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["images", "records", "bytes"])
def test_of_several_images_the_first_is_taken(tmp_path, kind, streaming):
    cells = [[{"bytes": png(i), "path": None}, {"bytes": PNG, "path": None}] for i in range(1, 6)]
    if kind == "images":
        data = Dataset.from_dict({"views": cells}, features=Features(views=List(ImageFeature())))
        data.to_parquet(tmp_path / "train.parquet")
    else:
        plain = [[cell["bytes"] for cell in row] for row in cells]
        views = pa.table({"views": cells if kind == "records" else plain})
        pq.write_table(views, tmp_path / "train.parquet")
    source = open_dataset(f"folder:{tmp_path}", streaming=streaming)
    assert "column 'views' holds lists of images: the first of each is taken" in source.notices
    assert [(cell or {})["bytes"] for cell in source.train.data.read_cells([0, 4])] == [
        png(1),
        png(5),
    ]


def test_lines_stay_short_whatever_the_table_holds(tmp_path):
    values: dict[str, Any] = {f"column_{i}": [1.5] * 12 for i in range(800)}
    name = write_table(tmp_path, **values)
    with pytest.raises(UserError, match="793 more") as caught:
        open_dataset(name, label_column="kind")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("owner/name", "hf:owner/name"),
        ("https://huggingface.co/datasets/owner/name/tree/main", "hf:owner/name"),
        ("./my pics", "'folder:./my pics'"),
        ("hf://datasets/owner/name", "hf:owner/name"),
        ("huggingface.co/datasets/owner/name", "hf:owner/name"),
    ],
)
def test_a_name_without_its_prefix_is_completed(name, meant):
    with pytest.raises(UserError, match=f"pass --dataset_name {meant}$"):
        open_dataset(name)


labels = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-(2**62), 2**62)), min_size=8, max_size=12),
    st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=8, max_size=12),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=8, max_size=12),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=8, max_size=12),
    st.lists(st.lists(st.integers(0, 1), max_size=2), min_size=8, max_size=12),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(labels)
def test_any_labels_keep_their_meaning_or_are_refused_in_one_line(values):
    data = ArrowSplit(Dataset.from_dict({"label": values}))
    try:
        names = columns.read_class_names(TABLE, data, "label")
        config = dataclasses.replace(TABLE, label_names=names, n_classes=len(names))
        ids = columns.read_label_ids(config, "train", data)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) <= 300
        return
    assert set(ids.tolist()) - {-1} == set(range(len(names))) or bool in map(type, values)
    for value, i in zip(values, ids, strict=True):
        if value is None or value != value or value == "":
            assert i == -1
        elif isinstance(value, bool):
            assert i == value
        else:
            assert names[i] == (value if isinstance(value, str) else str(int(value)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_a_caption_says_something_or_is_the_null_caption(lists):
    data = ArrowSplit(
        Dataset.from_dict({"text": lists}, features=Features(text=List(Value("string"))))
    )
    config = dataclasses.replace(TABLE, caption_column="text")
    rows = np.arange(len(lists))
    captions = columns.read_captions(config, data, rows, np.zeros(len(lists), np.int32))
    for given_texts, texts in zip(lists, captions, strict=True):
        said = [text for text in given_texts or () if text and text.strip()]
        assert texts == (tuple(said) or ("",))
