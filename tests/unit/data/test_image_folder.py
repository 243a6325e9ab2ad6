"""Folders as people have them: every image is a row with the right class and caption, or one line
says what is wrong.
"""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import sources
from data.image_files import list_files
from data.image_folder import open_image_folder, sort_files
from data.images import open_upright
from data.load import open_dataset
from data.pipeline import Pipeline
from runtime.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_image(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    Image.fromarray(pixels).convert(mode).save(path, format=kind)


def write_images(folder: Path, *paths: str, **options) -> Path:
    for path in paths:
        write_image(folder / path, **options)
    return folder


def classes_by_file(source) -> dict[str, str]:
    """The class of each row by the path of its image, of both splits."""
    found = {}
    for split in (source.train, source.eval):
        cells = split.data.read_cells(split.rows.tolist())
        for cell, label in zip(cells, split.labels, strict=True):
            found[Path((cell or {})["path"]).name] = source.config.label_names[label]
    return found


def notices(source) -> str:
    return "\n".join(source.notices)


# --- splits and classes ---


def test_a_stray_image_beside_class_folders_is_an_error_or_left_out(tmp_path):
    folder = tmp_path / "pets"
    write_images(folder, *(f"{kind}/{kind}{i}.png" for kind in ("cat", "dog") for i in range(4)))
    write_images(folder, "stray.png")
    with pytest.raises(UserError, match=r"stray\.png.*1 of 9 rows .*--unlabelled skip"):
        open_dataset(f"folder:{folder}")
    source = open_dataset(f"folder:{folder}", unlabelled="skip")
    assert classes_by_file(source) == {
        f"{kind}{i}.png": kind for kind in ("cat", "dog") for i in range(4)
    }
    assert "1 row of 'train' left out" in notices(source)
    without = open_dataset(f"folder:{folder}", label_column="none")
    assert (without.config.n_classes, len(without.train) + len(without.eval)) == (0, 9)


def test_splits_are_found_whatever_their_case(tmp_path):
    folder = write_images(
        tmp_path / "x",
        *(
            f"{split}/{kind}/{i}.JPG"
            for split in ("Train", "TEST")
            for kind in "ab"
            for i in (1, 2)
        ),
    )
    source = open_dataset(f"folder:{folder}")
    assert (source.train.name, source.eval.name, source.config.label_names) == (
        *("train", "test"),
        ("a", "b"),
    )
    assert (len(source.train), len(source.eval)) == (4, 4)
    write_images(folder, "extra/a/1.png", "2.png")
    with pytest.raises(
        UserError, match=r"2 images \(2.png, extra/a/1.png\) lie beside the folders"
    ):
        open_dataset(f"folder:{folder}")


def test_folders_of_splits_are_splits_without_a_training_split(tmp_path):
    """Not two classes called "test" and "valid"."""
    folder = write_images(
        tmp_path / "x",
        *(
            f"{split}/{kind}/{i}.png"
            for split in ("test", "valid")
            for kind in "ab"
            for i in (1, 2)
        ),
    )
    with pytest.raises(UserError, match=r"no split 'train' \(.*\); pass --train_split NAME"):
        open_dataset(f"folder:{folder}")
    source = open_dataset(f"folder:{folder}", train_split="valid", eval_split="Test")
    assert (source.train.name, source.eval.name) == ("validation", "test")
    assert source.config.label_names == ("a", "b")


def test_two_folders_of_a_split_are_refused(tmp_path):
    folder = write_images(tmp_path / "x", "train/a/1.png", "train2/a/1.png", "val/a/1.png")
    with pytest.raises(UserError, match="train, train2 are all named after the split 'train'; "):
        open_dataset(f"folder:{folder}")


def test_a_folder_that_is_linked_twice_is_read_twice(tmp_path):
    write_images(tmp_path / "all", "a/1.png", "b/2.png")
    (tmp_path / "x").mkdir()
    for name, target in (("cat", "a"), ("dog", "b"), ("pet", "a")):
        os.symlink(tmp_path / "all" / target, tmp_path / "x" / name)
    os.symlink(tmp_path / "x", tmp_path / "all" / "a" / "loop")
    listing = list_files(tmp_path / "x")
    assert {path for path in listing.images if "loop" not in path} == {
        *("cat/1.png", "dog/2.png", "pet/1.png")
    }


def test_an_image_that_pillow_does_not_open_is_a_bad_row_and_not_left_out(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(6)))
    (folder / "IMG_7.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match=r"IMG_7\.HEIC.*convert it to JPEG.*--bad_rows skip"):
        Pipeline(open_dataset(f"folder:{folder}"), batch_size=1, seed=0)


def test_a_configuration_of_a_folder_without_any_is_refused(tmp_path):
    folder = write_images(tmp_path / "x", "1.jpg", "2.jpg")
    with pytest.raises(UserError, match="lists no configurations; pass folder:"):
        open_dataset(f"folder:{folder}:small")


def test_archives_that_are_not_opened_say_what_to_do(tmp_path):
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a.txt", "x")
    with pytest.raises(UserError, match=r"2 zip files \(test.zip, train.zip\); unpack them, or"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "pics.tar.gz").write_bytes(b"x")
    for path in ("x", "x/pics.tar.gz"):
        with pytest.raises(UserError, match="; unpack "):
            open_dataset(f"folder:{tmp_path / path}")


def test_a_folder_of_other_classes_is_not_taken_for_a_known_dataset(tmp_path):
    write_images(tmp_path, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4)))
    with pytest.raises(UserError, match=r"'cifar10' has 10 classes, .* 2 \(cat, dog\)"):
        open_dataset("cifar10", data_dir=tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path):
    folder = write_images(
        tmp_path / "x", *(f"{kind}/{i}.png" for kind in ("boat", "train", "car") for i in range(3))
    )
    assert open_dataset(f"folder:{folder}").config.label_names == ("boat", "car", "train")


def test_classes_are_the_outermost_folders_that_differ(tmp_path):
    folder = write_images(
        tmp_path / "x",
        "data/cats/a/1.png",
        "data/cats/b/2.png",
        "data/cats/3.png",
        "data/dogs/4.png",
    )
    source = open_dataset(f"folder:{folder}")
    assert classes_by_file(source) == {"1.png": "cats", "2.png": "cats"} | {
        "3.png": "cats",
        "4.png": "dogs",
    }
    by_innermost = open_dataset(f"folder:{folder}", label_column="folder").config
    assert by_innermost.label_names == ("cats", "cats/a", "cats/b", "dogs")


def test_numbers_are_in_the_order_of_numbers(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{k}/{i}.png" for k in (0, 1, 10, 2) for i in (1, 2)))
    source = open_dataset(f"folder:{folder}")
    assert source.config.label_names == ("0", "1", "2", "10")
    assert "labels 0 … 10 are numbered 0 … 3" in notices(source)


def test_a_resumed_run_keeps_its_classes(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{k}/{k}{i}.png" for k in (1, 10, 2) for i in (1, 2)))
    source = open_dataset(f"folder:{folder}", class_order=["1", "10", "2"])
    assert source.config.label_names == ("1", "10", "2")
    assert classes_by_file(source)["101.png"] == "10"


def test_hidden_files_broken_links_and_other_suffixes(tmp_path):
    folder = write_images(
        tmp_path / "x", "a.png", "b.TIF", "c.gif", "d.avif", "e.png_large", "photo", "sub/f.jfif"
    )
    for name in (".DS_Store", "._a.png", "Thumbs.db", ".git/x.png", "__MACOSX/a.png", "notes.pdf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    os.symlink("/nowhere/at/all.png", folder / "gone.png")
    os.symlink(folder, folder / "sub" / "loop")
    source = open_dataset(f"folder:{folder}")
    assert len(source.train) + len(source.eval) == 8
    assert "left out, as no images: 1 (notes.pdf); 5 hidden" in notices(source)
    assert "1 not readable (first: " in notices(source) and "gone.png)" in notices(source)
    with pytest.raises(UserError, match=r"gone\.png|cannot be read"):
        Pipeline(source, batch_size=1, seed=0)


def test_a_link_to_a_folder_that_is_gone_is_named(tmp_path):
    write_images(tmp_path / "x", "cat/0.png", "dog/0.png")
    os.symlink(tmp_path / "moved", tmp_path / "x" / "fox")
    with pytest.raises(UserError, match="x/fox' is a link to what is not there: remove it"):
        open_dataset(f"folder:{tmp_path / 'x'}")


def test_folders_that_are_links_to_one_place_are_all_there(tmp_path):
    store = write_images(tmp_path / "store", "a.png", "b.png")
    for split in ("train", "val"):
        (tmp_path / "x" / split).mkdir(parents=True)
        os.symlink(store, tmp_path / "x" / split / "cat")
    os.symlink(tmp_path / "x", tmp_path / "x" / "val" / "loop")
    source = open_dataset(f"folder:{tmp_path / 'x'}")
    assert (source.train.name, len(source.train)) == ("train", 2)
    assert (source.eval.name, len(source.eval)) == ("validation", 2)


def test_a_zip_of_class_folders_is_opened(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{k}/{k}{i}.png" for k in "ab" for i in (1, 2)))
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "pets.zip").write_bytes((tmp_path / "pets.zip").read_bytes())
    for place in ("pets.zip", "only"):
        source = open_dataset(f"folder:{tmp_path / place}")
        assert classes_by_file(source) == {f"{k}{i}.png": k for k in "ab" for i in (1, 2)}
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"broken.zip' cannot be unpacked"):
        open_dataset(f"folder:{tmp_path / 'broken.zip'}")


def test_a_zip_that_another_process_has_unpacked_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("a.png", b"")
    folder = sources._unzip(tmp_path / "pets.zip")
    shutil.rmtree(folder)
    extract = zipfile.ZipFile.extractall

    def extract_twice(archive, place):
        extract(archive, folder)
        (folder / "by another process").touch()
        extract(archive, place)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", extract_twice)
    assert sources._unzip(tmp_path / "pets.zip") == folder
    assert (folder / "by another process").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["pets"]


def test_images_beside_parquet_files_ask_which_is_meant(tmp_path):
    folder = write_images(tmp_path / "x", "a.png")
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [(folder / "a.png").read_bytes()] * 4
    pq.write_table(pa.table({"jpg": cells}), folder / "train.parquet")
    with pytest.raises(UserError, match=r"holds train.parquet and 1 image files \(a.png\)"):
        open_dataset(f"folder:{folder}")


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=6
).filter(
    lambda name: not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini", "__MACOSX")
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(["a", "b", "Train", "test"]), max_size=3), names),
        min_size=1,
        max_size=8,
    )
)
def test_every_image_of_any_tree_is_a_row_or_the_tree_is_refused(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("tree")
    paths = {"/".join([*folders, f"{name}.png"]) for folders, name in files}
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    try:
        opened = open_image_folder(sort_files(list_files(root)), label_column=None)
    except UserError as error:
        assert re.search("lie beside the folders of splits|named after the split", str(error))
        return
    rows = [cell["path"] for split in opened.splits.values() for cell in split["image"]]
    assert sorted(rows) == sorted(str(root / path) for path in paths)


# --- captions and tables beside images ---


def test_text_files_beside_images_are_captions(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(6)))
    for i in range(5):
        name = f"{i}.jpg.txt" if i == 4 else f"{i}.txt"
        (folder / name).write_text(f" photo\n {i} \n" if i else "  \n", encoding="utf-8")
    source = open_dataset(f"folder:{folder}", conditioning="text")
    captions = {
        Path((cell or {})["path"]).name: text
        for split in (source.train, source.eval)
        for cell, text in zip(split.data.read_cells(split.rows.tolist()), split.captions)
    }
    assert captions == {f"{i}.jpg": (f"photo {i}",) for i in range(1, 5)} | {
        "0.jpg": ("",),
        "5.jpg": ("",),
    }
    assert "without a caption" in notices(source)


@pytest.mark.parametrize("place", [".", "train"])
def test_a_line_is_never_joined_to_an_image_of_another_folder(tmp_path, place):
    """Nor is an image of the evaluation split ever a row to train on."""
    folder = write_images(tmp_path / "x", "train/1.png", "train/2.png", "val/1.png", "val/7.png")
    lines = ["file_name,text", "train/1.png,one", "val/1.png,a dog", "val/7.png,seven"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    listing = list_files(folder / place)
    splits = open_image_folder(sort_files(listing), label_column=None).splits
    train = splits["train"]
    texts = {
        os.path.relpath(image["path"], folder): text
        for image, text in zip(train["image"], train["text"])
    }
    assert texts == {"train/1.png": "one", "train/2.png": None}


@pytest.mark.parametrize("start", ["", "/on/another/machine/"])
def test_a_line_whose_image_is_missing_is_not_of_another(tmp_path, start):
    folder = write_images(tmp_path / "x", "train/2.png", "train/3.png", "val/1.png")
    names = ["train/1.png", "train/2.png", "train/3.png", "val/1.png"]
    lines = ["file_name,text", *(f"{start}{name},text of {name}" for name in names)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    splits = open_image_folder(sort_files(list_files(folder)), label_column=None).splits
    texts = {
        image["path"].removeprefix(f"{folder}/").removeprefix(start): text
        for split in splits.values()
        for image, text in zip(split["image"], split["text"])
    }
    assert texts == {name: f"text of {name}" for name in names}


@pytest.mark.parametrize(
    ("name", "header", "cell"),
    [
        ("metadata.csv", "file_name,text", "images/{i:04}.jpg,caption {i}"),
        ("captions.csv", "img;words;n", "{i:04};caption {i};3"),
        ("labels.tsv", "path\ttext", "C:\\x\\images\\{i:04}.jpg\tcaption {i}"),
        ("train.csv", "text,id", '"caption {i}",./{i:04}.jpg'),
    ],
)
def test_a_table_names_images_in_any_column(tmp_path, name, header, cell):
    folder = write_images(tmp_path / "x", *(f"images/{i:04}.jpg" for i in range(5)))
    lines = [header, *(cell.format(i=i) for i in range(5))]
    (folder / name).write_text("\n".join(lines), encoding="utf-8-sig")
    column = "words" if "words" in header else "text"
    source = open_dataset(f"folder:{folder}", caption_column=column)
    assert {text for split in (source.train, source.eval) for (text,) in split.captions} == {
        f"caption {i}" for i in range(5)
    }
    assert f"columns from {name}" in notices(source)


def test_a_table_of_each_split_names_its_own_images(tmp_path):
    """As `imagefolder` of Hugging Face has them; the names are the same in both splits."""
    paths = [f"{split}/{i}.jpg" for split in ("train", "test") for i in range(4)]
    folder = write_images(tmp_path / "x", *paths)
    for split, first in (("train", 0), ("test", 1)):
        lines = ["file_name,label", *(f"{i}.jpg,{(i + first) % 2}" for i in range(4))]
        (folder / split / "metadata.csv").write_text("\n".join(lines))
    source = open_dataset(f"folder:{folder}")
    assert source.train.labels.tolist() == [0, 1, 0, 1]
    assert source.eval.labels.tolist() == [1, 0, 1, 0]


def test_names_of_another_case_are_found_and_classes_are_no_names(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.JPG" for i in range(6)))
    lines = ["path,label", *(f"{i}.jpg,{i % 2}" for i in range(6))]
    (folder / "labels.csv").write_text("\n".join(lines))
    source = open_dataset(f"folder:{folder}", label_column="label")
    assert classes_by_file(source) == {f"{i}.JPG": str(i % 2) for i in range(6)}


def test_a_table_without_a_header_is_refused(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(4)))
    (folder / "captions.csv").write_text("".join(f"{i}.jpg,photo {i}\n" for i in range(4)))
    with pytest.raises(UserError, match="names an image, and no columns; write a line"):
        open_dataset(f"folder:{folder}", conditioning="text")


def test_columns_of_tables_do_not_take_the_place_of_images_and_captions(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(4)))
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"beside {i}")
    lines = ["file_name,image,text", *(f"{i}.jpg,nice,table {i}" for i in range(4))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"leaves open which column to take .*table.text"):
        open_dataset(f"folder:{folder}", conditioning="text")
    source = open_dataset(f"folder:{folder}", caption_column="table.text")
    assert source.eval.captions[0][0].startswith("table ")
    by_folder = write_images(tmp_path / "y", "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    (by_folder / "metadata.csv").write_text(
        "file_name,label\na/1.png,7\na/2.png,8\nb/3.png,7\nb/4.png,8"
    )
    source = open_dataset(f"folder:{by_folder}")
    assert source.config.label_names == ("7", "8")
    assert "takes the place of the 2 classes by folder" in notices(source)


def test_a_table_one_folder_up_is_read(tmp_path):
    folder = write_images(tmp_path / "x", *(f"images/{i}.jpg" for i in range(4)))
    lines = [json.dumps({"image": f"{i}.jpg", "label": 5 + i % 2}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = open_dataset(f"folder:{folder / 'images'}")
    assert classes_by_file(source) == {f"{i}.jpg": str(5 + i % 2) for i in range(4)}


def test_lines_that_are_missing_and_images_that_are_missing(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.png" for i in range(6)))
    lines = ["file_name,label", *(f"{i}.png,{i % 2}" for i in range(4)), "gone.png,1"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"4\.png.*2 of 7 rows .*--unlabelled skip"):
        open_dataset(f"folder:{folder}")
    source = open_dataset(f"folder:{folder}", unlabelled="skip")
    assert len(source.train) + len(source.eval) == 5
    with pytest.raises(UserError, match=r"gone\.png|cannot be read"):
        Pipeline(source, batch_size=1, seed=0)


def test_several_lines_for_an_image_are_several_captions(tmp_path):
    folder = write_images(tmp_path / "x", "a.jpg", "b.jpg", "c.jpg")
    lines = ["image,caption", *(f'{name}.jpg,"{name}, {i}"' for name in "abc" for i in (1, 2))]
    (folder / "captions.csv").write_text("\n".join(lines))
    source = open_dataset(f"folder:{folder}", caption_column="caption")
    assert source.train.captions[0] == ("a, 1", "a, 2")


def test_a_tables_column_divides_a_folder_into_splits(tmp_path):
    """They were all training rows."""
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(6)))
    words = ["Train", "train", "train", "val", "val", "test"]
    lines = ["file_name,split,label", *(f"{i}.jpg,{words[i]},{i % 2}" for i in range(6))]
    table = folder / "metadata.csv"
    table.write_text("\n".join(lines))
    source = open_dataset(f"folder:{folder}")
    assert (len(source.train), len(source.eval), source.eval.name) == (3, 2, "validation")
    assert "3 images to train; 2 images to validation; 1 image to test" in notices(source)
    assert "splits that are not used: test" in notices(source)
    # A word that is no split, and a column of one word, divide nothing.
    for word in ("other", "train"):
        table.write_text("\n".join(lines).replace("val", word).replace("test", word))
        source = open_dataset(f"folder:{folder}")
        assert len(source.train) + len(source.eval) == 6
        assert "column 'split' of a table divides nothing" in notices(source)


def test_captions_that_are_all_empty_are_refused(tmp_path):
    folder = write_images(tmp_path / "x", *(f"{i}.jpg" for i in range(4)))
    for i in range(4):
        (folder / f"{i}.txt").write_text(" \n")
    with pytest.raises(UserError, match="all 3 rows of 'train' are without a caption; pass"):
        open_dataset(f"folder:{folder}", conditioning="text")


def test_a_table_that_cannot_be_used_is_named(tmp_path):
    folder = write_images(tmp_path / "x", "a.jpg", "b.jpg")
    (folder / "metadata.csv").write_text("file_name,text\nq.jpg,x\n")
    with pytest.raises(UserError, match=r"metadata.csv' has no column that names images"):
        open_dataset(f"folder:{folder}")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\nnot json\n')
    with pytest.raises(UserError, match=r"metadata.jsonl', line 2: not JSON"):
        open_dataset(f"folder:{folder}")
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"metadata.jsonl' cannot be read"):
        open_dataset(f"folder:{folder}")


# --- colour and size ---


def test_colour_is_kept_if_any_image_has_it_and_the_median_decides_the_size(tmp_path):
    folder = write_images(tmp_path / "x", "000.png", mode="L", size=(4, 4))
    write_images(folder, *(f"{i:03}.png" for i in range(1, 20)), mode="L", size=(30, 25))
    assert open_dataset(f"folder:{folder}").config.channels == 1
    write_images(folder, "012.png", mode="RGB", size=(60, 50))
    write_images(folder, "013.gif", mode="P")
    config = (source := open_dataset(f"folder:{folder}")).config
    assert (config.channels, config.image_size) == (3, 24)
    assert "shorter side 4–50 px, median 25; " in notices(source)
    assert "smaller than 24 px" in notices(source)


def test_images_that_a_size_enlarges_are_counted_as_they_stand(tmp_path):
    """One lies; of the others, some are turned by EXIF or XMP, and one is large."""
    turned, xmp = Image.Exif(), b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned[0x0112] = 6
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    cases: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
        ("0.jpg", (30, 20), {}),
        ("1.jpg", (30, 20), {"exif": turned}),
        ("2.jpg", (30, 20), {"xmp": xmp}),
        ("3.png", (30, 20), {"pnginfo": text}),
        ("4.webp", (30, 20), {"xmp": xmp}),
        ("5.tiff", (30, 20), {"tiffinfo": {0x0112: 6}}),
        ("6.tiff", (30, 20), {"tiffinfo": {700: xmp}}),
        ("7.jpg", (90, 80), {}),
    ]
    for name, size, facts in cases:
        Image.new("RGB", size).save(tmp_path / name, **facts)
        expected = (20, 30) if facts else size
        assert open_upright((tmp_path / name).read_bytes()).size == expected, name
    source = open_dataset(f"folder:{tmp_path}", image_size="30x20")
    assert "1 smaller than 30x20 px, which are enlarged" in notices(source)
    assert source.train.format.shape == (30, 20, 3)


def test_headers_are_cached_until_a_file_changes(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "x", *(f"{i}.png" for i in range(8)), mode="L")
    open_dataset(f"folder:{folder}")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or original(file))
    assert open_dataset(f"folder:{folder}").config.channels == 1 and not opened
    write_images(folder, "3.png", mode="RGB")
    os.utime(folder / "3.png", ns=(1, 1))
    assert open_dataset(f"folder:{folder}").config.channels == 3 and len(opened) == 1
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(b"damaged")
    assert open_dataset(f"folder:{folder}").config.channels == 3


def test_a_file_that_could_not_be_read_is_looked_at_again(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "x", *(f"{i}.png" for i in range(8)))

    def fail(file):
        raise PermissionError(file)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        open_dataset(f"folder:{folder}", image_size=8, channels=3)
    assert "not readable" not in notices(open_dataset(f"folder:{folder}"))


# --- the hub ---


def test_a_hub_out_of_reach_is_one_line(monkeypatch, caplog):
    """Its client printed each of six attempts, twice."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    def fail(*_):
        hub_logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("Dataset uoft-cs/cifar10 is not cached in None")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    level = hub_logging.get_verbosity()
    with pytest.raises(UserError, match=r"the hub is out of reach.*; --data_dir FOLDER opens"):
        open_dataset("cifar10")
    assert "Retrying" not in caplog.text and hub_logging.get_verbosity() == level
