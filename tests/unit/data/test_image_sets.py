"""A folder is evaluated as a whole: no file decides for the others, and none is lost in silence."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import image_sets
from data.image_files import list_files
from runtime.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)


def read(folder, **flags) -> np.ndarray:
    return np.concatenate(list(image_sets.image_set_from_folder(folder, **flags).batches(2)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P"])
@pytest.mark.parametrize("size", [None, 4, "3x5"])
def test_a_grey_file_does_not_make_the_others_grey(tmp_path, mode, size):
    first = Image.fromarray((GREY > 127) * np.uint8(255))
    first = first.convert("I").convert(mode) if mode == "I;16" else first.convert(mode)
    first.save(tmp_path / "0.png")
    for i in (1, 2):
        Image.fromarray(COLOUR).save(tmp_path / f"{i}.png")
    mixed = read(tmp_path, image_size=size)
    assert mixed.shape[1:] == {4: (4, 4, 3), "3x5": (3, 5, 3), None: (4, 6, 3)}[size]
    assert (mixed[0] == mixed[0][..., :1]).all()
    if not size:
        assert (mixed[1:] == COLOUR[None]).all()
    described = image_sets.image_set_from_folder(tmp_path, image_size=size).describe()
    assert "1 grey, 2 in colour, all as RGB" in described
    for i in (1, 2):
        (tmp_path / f"{i}.png").unlink()
    assert read(tmp_path, image_size=size).shape[-1] == 1


@pytest.mark.parametrize("suffix", ["gif", "tif", "TIFF", "bmp", "ppm", "avif", "jp2", "jfif", ""])
def test_every_format_is_read(tmp_path, suffix):
    formats = {"": "PNG", "jp2": "JPEG2000", "jfif": "JPEG", "tif": "TIFF"}
    name = f"a.{suffix}" if suffix else "a"
    Image.fromarray(COLOUR).save(tmp_path / name, formats.get(suffix, suffix or None))
    assert read(tmp_path).shape == (1, 4, 6, 3)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP"])
def test_of_several_images_in_a_file_the_first_is_used_and_they_are_counted(tmp_path, form):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(
        tmp_path / f"a.{form.lower()}", form, save_all=True, append_images=frames[1:], **options
    )
    assert read(tmp_path)[0, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)
    described = image_sets.image_set_from_folder(tmp_path).describe()
    assert "the first image of each of 1 files that hold several" in described


def test_hidden_files_are_counted_and_others_named(tmp_path):
    """A Mac's `._x.png` has the suffix of an image and is none."""
    folder = tmp_path / "pics"
    for name in ("__MACOSX", ".thumbnails", "b"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(COLOUR).save(folder / name / "1.png")
    Image.fromarray(COLOUR).save(folder / "0.png")
    for name in ("._0.png", ".DS_Store", "b/._1.png", "notes.txt", "b/more.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    listing = list_files(folder)
    assert (listing.images, listing.n_hidden) == (["0.png", "b/1.png"], 5)
    assert listing.others == ["b/more.json", "notes.txt"]
    described = image_sets.image_set_from_folder(folder).describe()
    assert described == (
        "2 images of 4 × 6 pixels, RGB; left out: 5 hidden files or folders, b/more.json and 1 "
        "more that are no images"
    )
    for name in ("0.png", "b/1.png"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"pics' holds no images; left out: 5 hidden"):
        read(folder)


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path):
    folder, elsewhere = tmp_path / "pics", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    Image.fromarray(COLOUR).save(elsewhere / "1.png")
    (folder / "class").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert read(folder).shape == (1, 4, 6, 3)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png: a link to a file that is gone"):
        read(folder)


def test_a_size_that_differs_is_refused_before_anything_is_computed(tmp_path):
    for i in range(5):
        Image.new("RGB", (8, 8 if i < 4 else 9)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"4\.png has 9 × 8 pixels .*0\.png 8 × 8; --image_s"):
        image_sets.image_set_from_folder(tmp_path)


def test_a_camera_s_turn_is_undone_before_sizes_are_compared(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "0.jpg", exif=exif)
    Image.new("RGB", (4, 6)).save(tmp_path / "1.jpg")
    assert read(tmp_path).shape == (2, 6, 4, 3)
    Image.new("RGB", (6, 4)).save(tmp_path / "2.jpg")
    with pytest.raises(UserError, match=r"2\.jpg has 4 × 6 pixels .*0\.jpg 6 × 4"):
        read(tmp_path)


def test_a_file_in_place_of_a_folder_is_named_and_the_reverse(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.npz' is a file, not a folder of images; --npz takes"):
        image_sets.image_set_from_folder(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"' is a folder, not an \.npz; --images takes a folder"):
        image_sets.image_set_from_npz(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_in_fortran_s_order_is_read(tmp_path, save):
    images = RNG.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    save(tmp_path / "f.npz", arr_0=np.asfortranarray(images))
    found = image_sets.image_set_from_npz(tmp_path / "f.npz")
    assert found.shape == (4, 6, 3)
    assert (np.concatenate(list(found.batches(2))) == images).all()


NAMES = st.sampled_from(["a", "b c", "ü", "._a", ".x", "猫", "__MACOSX"])
MODES = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "broken"])
PATHS = st.tuples(NAMES, NAMES, st.sampled_from([".png", ".tif", ".PNG", ".txt"]))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(PATHS, MODES, max_size=5))
def test_every_file_of_any_folder_is_an_image_or_counted(tree):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        modes = []
        for (parent, stem, suffix), mode in tree.items():
            (folder / parent).mkdir(exist_ok=True)
            file = folder / parent / (stem + suffix)
            if mode == "broken":
                file.write_bytes(b"text")
            else:
                Image.new("L", (4, 4), 255).convert(mode).save(file, "PNG")
            is_hidden = parent == "__MACOSX" or "." in (parent[0], stem[0])
            if not is_hidden and (mode, suffix) != ("broken", ".txt"):
                modes.append(mode)
        listing = list_files(folder)
        assert len(listing.images) == len(modes)
        if "broken" in modes or not modes:
            with pytest.raises(UserError, match=r"cannot be read|holds no images"):
                read(folder)
            return
        found = read(folder)
        is_grey = not {"RGB", "RGBA"} & set(modes)
        assert found.shape == (len(modes), 4, 4, 1 if is_grey else 3) and (found == 255).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC, which Pillow does not open"),
    ],
)
def test_a_file_that_is_no_image_is_named_for_what_it_is(tmp_path, content, message):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    name = "b.heic" if "HEIC" in message else "b.png"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: the image cannot be read \({message}"):
        read(tmp_path)


def test_an_npz_without_images_is_refused(tmp_path):
    np.savez(path := tmp_path / "a.npz", arr_0=np.zeros((0, 4, 6, 3), np.uint8))
    with pytest.raises(UserError, match="it holds no images"):
        image_sets.image_set_from_npz(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"no \.npz file: a Git LFS pointer"):
        image_sets.image_set_from_npz(path)
