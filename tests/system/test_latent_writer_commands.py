"""Whatever happens on the way, a folder of latents ends as one that nothing happened to."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import averaging
import jax
import numpy as np
import pytest
from commands import CONVERT, fill, small_disk
from datasets import ClassLabel, Image, load_dataset
from faults_cases import Forks, children, wait_until
from hub_copies import image_file, make_copy
from latent_writer_cases import RNG, grey_cells, write
from PIL import Image as PillowImage

from data import images, latents
from data.load import open_dataset
from inference import grids
from networks.autoencoder import AutoencoderConfig, init_autoencoder_params
from pretrained import autoencoder as pretrained
from runtime.errors import UserError
from runtime.image_size import ImageSize

N_ROWS, N_FILES = {"train": 1437, "test": 360}, {"train": 23, "test": 6}
BEGUN = {"dataset_name": "digits", "image_size": 16, "rows_per_file": 64, "n_workers": 0}


class Converter:
    """`convert_imagenet.py` with this VAE, unless another is given."""

    def __init__(self, forks: Forks, vae: Path):
        self.forks, self.vae = forks, vae

    def start(self, out: Path | None = None, **flags: Any) -> int:
        given = {"vae": self.vae, **({"out": out} if out else {}), **flags}
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return self.forks.start(*words, command=CONVERT)

    def __call__(self, out: Path | None = None, **flags: Any) -> tuple[int, str, str]:
        """The exit status and what was printed."""
        self.start(out, **flags)
        return self.forks.end()

    def fails(self, *args: Path, **flags: Any) -> str:
        """The one line that it ends with."""
        status, out, err = self(*args, **flags)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
        return err


@pytest.fixture
def convert(server, vae) -> Iterator[Converter]:
    """Leaves no process behind."""
    yield Converter(server, vae)
    server.leave_nothing()


@pytest.fixture(scope="module")
def in_colour(tmp_path_factory) -> Path:
    return averaging.save(tmp_path_factory.mktemp("colour") / "vae", channels=3)


@pytest.fixture(scope="module")
def whole(server, vae, tmp_path_factory) -> Path:
    """A conversion that nobody disturbed: of 450 batches, so that others can be."""
    folder = tmp_path_factory.mktemp("whole") / "digits"
    status, _, err = Converter(server, vae)(folder, **BEGUN, batch_size=4, mirror=True)
    assert status == 0, err
    return folder


SAME = BEGUN | {"batch_size": 4, "mirror": True}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def n_made(folder: Path) -> int:
    return len([*folder.glob("data/*.parquet")])


def moments(folder: Path, split: str = "train") -> np.ndarray:
    """Of all rows, in their order."""
    dataset = latents.read_latent_dataset(folder)
    files = latents.latent_files(folder, split, dataset.n_files[split])
    return np.concatenate(
        [rows for file in files for rows in latents.iterate_moments(file, dataset.encoding)]
    )


# --- what is made ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_row_is_there_the_last_of_a_file_and_of_a_batch_too(whole):
    dataset = latents.check_latents(whole)
    assert (dataset.n_rows, dataset.n_files) == (N_ROWS, N_FILES)
    for split, n in N_ROWS.items():
        records = [
            latents.read_file_record(file)
            for file in latents.latent_files(whole, split, N_FILES[split])
        ]
        starts = range(0, n, 64)
        assert [r["rows"] for r in records] == [[i, min(i + 64, n)] for i in starts]
        assert [r["n_rows"] for r in records] == [min(64, n - i) for i in starts]
    images = open_dataset("digits", image_size=16)
    for split, of_split in (("train", images.train), ("test", images.eval)):
        mean = moments(whole, split)[..., :2].astype(np.float32)
        every = of_split.decode(np.arange(len(of_split)))
        np.testing.assert_allclose(mean, averaging.encode_means(every), atol=2e-3)
    second = np.square(mean := moments(whole)[..., :2].astype(np.float64)).mean((0, 1, 2))
    np.testing.assert_allclose(dataset.channel_mean, mean.mean((0, 1, 2)), rtol=1e-6)
    variance = second - np.square(dataset.channel_mean) + np.exp(averaging.LOG_VARIANCE)
    np.testing.assert_allclose(np.square(dataset.channel_std), variance, rtol=1e-6)


@pytest.mark.slow
def test_datasets_opens_the_folder_by_itself(whole):
    data = load_dataset(str(whole))
    assert {name: len(split) for name, split in data.items()} == N_ROWS
    label = data["train"].features["label"]
    assert isinstance(label, ClassLabel) and label.names == [str(i) for i in range(10)]
    expected = open_dataset("digits").train.labels
    np.testing.assert_array_equal(data["train"].with_format("numpy")["label"][:], expected)
    # As the card says.
    match = re.search(r'np\.frombuffer\(row\["moments"\], "<f2"\)\.reshape\((.*)\)', card(whole))
    assert match
    row = np.frombuffer(data["train"][7]["moments"], "<f2").reshape(eval(match[1]))
    np.testing.assert_array_equal(row, moments(whole)[7])


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.slow
def test_latents_made_anew_are_not_those_that_datasets_has_kept(convert, tmp_path):
    """Its cache goes by a folder's name and card, not by what is in the files."""
    flags = BEGUN | {"rows_per_file": 2000, "batch_size": 64}
    sizes = []
    for place, mirror in (("here", True), ("there", False), ("here", False)):
        folder = tmp_path / place / "digits"
        shutil.rmtree(folder, ignore_errors=True)
        assert convert(folder, **flags, mirror=mirror)[0] == 0
        sizes.append(len(load_dataset(str(folder))["train"][0]["moments"]))
        opened = open_dataset("digits", latents_dir=folder)
        np.testing.assert_array_equal(opened.train.decode(np.arange(9)), moments(folder)[:9])
    assert sizes == [1024, 512, 512]


@pytest.mark.slow
def test_the_way_images_are_read_changes_no_byte(convert, whole, tmp_path):
    """By threads, by two processes, or from a stream of row groups."""
    for name, change in (("processes", {"n_workers": 2}), ("streamed", {"streaming": True})):
        status, _, err = convert(tmp_path / name, **SAME | change)
        assert status == 0, err
        assert content(tmp_path / name) == content(whole)


@pytest.mark.slow
def test_eight_devices_make_the_same_latents(server, vae, whole, tmp_path):
    flags = [f"--{name}={value}" for name, value in (SAME | {"batch_size": 64}).items()]
    flags += ["--vae", vae, "--out", tmp_path / "digits"]
    status, _, err = server.run(*flags, command=CONVERT, n_devices=8)
    assert status == 0, err
    ours, theirs = (moments(folder).astype(np.float32) for folder in (tmp_path / "digits", whole))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    status, out, _ = server.run("--doctor", tmp_path / "digits", command=CONVERT, n_devices=8)
    assert status == 0 and "sound" in out
    flags = ["--dataset_name=digits", "--batch_size=12", "--vae", vae, "--out", tmp_path / "no"]
    status, _, err = server.run(*flags, command=CONVERT, n_devices=8)
    assert (status, err) == (2, "error: --batch_size 12 is not divisible by the 8 devices\n")


@pytest.mark.slow
def test_a_thousand_classes_survive(convert, tmp_path):
    """Their names, and labels beyond a byte."""
    names, labels = [f"class {i}" for i in range(1000)], [999, 0, 500, 128, 255, 256, 999, 1]
    columns = {"image": (Image(), grey_cells(8)), "label": (ClassLabel(names=names), labels)}
    folder = write(tmp_path / "many", **columns)
    status, _, err = convert(tmp_path / "latents", dataset_name=f"folder:{folder}", n_workers=0)
    assert status == 0, err
    for streaming in (False, True):
        opened = open_dataset(
            f"folder:{folder}", latents_dir=tmp_path / "latents", streaming=streaming
        )
        split = opened.full_splits()["train"]
        assert split.labels.tolist() == labels and opened.config.n_classes == 1000
        assert opened.config.label_names == tuple(names)


@pytest.mark.slow
def test_an_unlabelled_set_and_its_held_back_rows(convert, in_colour, tmp_path):
    """The images that were held out are held out of the latents."""
    copy = make_copy("butterflies", tmp_path / "butterflies")
    flags = {"dataset_name": "butterflies", "data_dir": copy, "image_size": 16, "vae": in_colour}
    status, out, err = convert(tmp_path / "latents", **flags, label_column="", n_workers=0)
    assert status == 0 and out.startswith("24 train rows of 8×8×6 in "), err
    opened = open_dataset("butterflies", latents_dir=tmp_path / "latents")
    images = open_dataset("butterflies", data_dir=copy, image_size=16)
    assert opened.config.n_classes == 0 and not opened.train.labels.any()
    assert opened.config.flip  # butterflies may be mirrored, and were
    for ours, theirs in ((opened.train, images.train), (opened.eval, images.eval)):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        every = np.arange(len(ours))
        mean = ours.decode(every)[..., :6].astype(np.float32)
        np.testing.assert_allclose(mean, averaging.encode_means(theirs.decode(every)), atol=2e-3)


@pytest.mark.slow
def test_captions_are_carried_over(convert, in_colour, tmp_path):
    """All five of each image, in their order."""
    copy = make_copy("coco", tmp_path / "coco")
    flags = {"dataset_name": "coco", "data_dir": copy, "image_size": 16, "vae": in_colour}
    status, _, err = convert(tmp_path / "latents", **flags, n_workers=0)
    assert status == 0, err
    opened = open_dataset("coco", latents_dir=tmp_path / "latents")
    images = open_dataset("coco", data_dir=copy)
    assert opened.config.conditioning == "text" and len(opened.train.captions[0]) == 5
    assert opened.train.captions == images.train.captions
    assert opened.eval.captions == images.eval.captions


# --- images of all kinds --------------------------------------------------------------------------


def file_of(image: PillowImage.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form)
    return file.getvalue()


@pytest.fixture
def album(tmp_path) -> Path:
    """Images of many kinds in two classes, of which the second, the third and the last are
    broken.
    """
    colours = PillowImage.open(io.BytesIO(image_file(RNG, "RGB", (28, 20))))
    good = file_of(colours, "PNG")
    images = {
        "cat/0.png": good,
        "cat/1.png": good[: len(good) // 2],
        "cat/2.png": b"no image",
        "cat/3.jpg": file_of(colours, "JPEG"),
        "dog/4.jpg": file_of(colours.convert("CMYK"), "JPEG"),
        "dog/5.png": file_of(colours.convert("L"), "PNG"),
        "dog/6.png": file_of(colours.convert("P"), "PNG"),
        "dog/7.png": file_of(colours.convert("RGBA"), "PNG"),
        "dog/8.jpg": b"",
    }
    for name, file in images.items():
        (tmp_path / "album/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "album/train" / name).write_bytes(file)
    return tmp_path / "album"


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_file", [4, 1], ids=["", "with files of no rows"])
def test_images_that_cannot_be_read_are_named_and_left_out(
    convert, album, in_colour, tmp_path, rows_per_file
):
    flags = {"dataset_name": f"folder:{album}", "image_size": "16x24", "vae": in_colour}
    folder = tmp_path / "latents"
    status, out, err = convert(folder, **flags, rows_per_file=rows_per_file, n_workers=1)
    assert status == 0, err
    assert "6 train rows (3 images could not be read and were left out) of 8×12×6" in out
    for row in (1, 2, 8):
        assert re.search(rf"warning: .*row {row}, column 'image': .*; it is left out", err)
    assert err.count("warning: ") == 3
    assert latents.check_latents(folder).skipped == {"train": [1, 2, 8]}

    kept = [p for p in sorted(album.glob("train/*/*")) if p.stem not in "128"]
    size = ImageSize(16, 24)
    seen = np.stack([images.decode_image(p.read_bytes(), channels=3, size=size) for p in kept])
    found = moments(folder)[..., :6].astype(np.float32)
    np.testing.assert_allclose(found, averaging.encode_means(seen), atol=2e-3)
    for streaming in (False, True):
        opened = open_dataset(f"folder:{album}", latents_dir=folder, streaming=streaming)
        split = opened.full_splits()["train"]
        assert split.labels.tolist() == [0, 0, 1, 1, 1, 1]
        assert opened.config.label_names == ("cat", "dog")
        np.testing.assert_array_equal(split.decode(np.arange(6)), moments(folder))
    status, out, _ = convert(doctor=folder, vae=None)
    assert status == 0 and "sound" in out
    assert convert(folder, **flags, rows_per_file=rows_per_file, verify=6)[0] == 0


@pytest.mark.slow
def test_a_dataset_without_a_readable_image_is_one_line(convert, album, tmp_path):
    for path in album.glob("train/*/*"):
        path.write_bytes(b"nothing")
    status, out, err = convert(tmp_path / "out", dataset_name=f"folder:{album}", image_size=16)
    assert status == 2 and "8 not readable (first: " in out
    assert err.splitlines()[-1] == f"error: no image of folder:{album} can be read"
    assert not (tmp_path / "out" / latents.INFO_FILE).exists()


# --- stopped and resumed --------------------------------------------------------------------------


@pytest.mark.slow
def test_five_kills_leave_no_trace(convert, whole, tmp_path):
    """No file counts that is not whole, and none is made twice."""
    rng, folder, whole_files = np.random.default_rng(0), tmp_path / "digits", content(whole)
    made_when_killed = []
    for kill in range(5):
        there = n_made(folder)
        times = {path: path.stat().st_mtime_ns for path in folder.glob("data/*.parquet")}
        child = convert.start(folder, **SAME)
        if kill:  # the first is hit as it starts
            wait_until(lambda there=there: n_made(folder) > there)
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(child, signal.SIGKILL)
        assert convert.forks.end()[0] == -signal.SIGKILL
        made_when_killed.append(n_made(folder))
        for path in folder.glob("data/*.parquet"):
            assert path.read_bytes() == whole_files[f"data/{path.name}"]
        assert times == {path: path.stat().st_mtime_ns for path in times}
        with pytest.raises(UserError, match="holds no finished latents"):
            latents.check_latents(folder)
    assert made_when_killed == sorted(set(made_when_killed)) and made_when_killed[-1] < 29
    status, _, err = convert(folder, **SAME)
    assert status == 0, err
    assert content(folder) == whole_files


@pytest.mark.slow
def test_a_whole_folder_stays_as_it_is(convert, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("data/*")}
    files = content(whole)
    status, out, _ = convert(whole, **SAME)
    assert status == 0 and "1437 train rows, 360 test rows of 8×8×2" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert content(whole) == files


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [0, 2])
def test_ctrl_c_ends_at_once_and_leaves_no_process(convert, whole, tmp_path, n_workers):
    folder = tmp_path / "digits"
    child = convert.start(folder, **SAME | {"n_workers": n_workers})
    wait_until(lambda: n_made(folder))
    os.kill(child, signal.SIGSTOP)  # or it could be done before it is asked to stop
    readers = children(child)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGCONT)
    sent = time.monotonic()
    status, out, err = convert.forks.end()
    assert (status, out) == (130, "") and "Traceback" not in err
    assert time.monotonic() - sent < 30
    assert not any(Path(f"/proc/{reader}").exists() for reader in readers)
    assert not [*folder.rglob("*tmp*")]
    assert convert(folder, **SAME)[0] == 0
    assert content(folder) == content(whole)


@pytest.mark.slow
def test_a_reader_that_is_killed_changes_no_byte(convert, whole, tmp_path):
    folder = tmp_path / "digits"
    child = convert.start(folder, **SAME | {"n_workers": 2})
    wait_until(lambda: n_made(folder))
    os.kill(children(child)[0], signal.SIGKILL)
    status, _, err = convert.forks.end()
    assert status == 0 and "warning: a worker was killed by SIGKILL; another takes its place" in err
    assert content(folder) == content(whole)


@pytest.mark.slow
def test_a_folder_begun_with_other_flags_is_refused_and_stays(convert, whole, tmp_path):
    """Half of one too."""
    other = averaging.params()
    other["post_quant"]["bias"][0] += 1e-3
    pretrained.save_autoencoder(tmp_path / "other", averaging.config(), other)
    half = shutil.copytree(whole, tmp_path / "half")
    (half / latents.INFO_FILE).unlink()
    for file in [*half.glob("data/train*")][::2]:
        file.unlink()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vae": tmp_path / "other"}, f"was begun with vae {convert.vae}, not {tmp_path}/other"),
        ({"image_size": 32}, "was begun with image_size 16, not 32"),
        ({"rows_per_file": 100}, "which is not of this conversion; resume it as it was begun"),
        ({"rows_per_file": 63}, "was begun with rows [0, 64], not [0, 63]"),
        ({"mirror": False}, "was begun with mirrored True, not False"),
        ({"half_precision": True}, "was begun with precision float32, not bfloat16"),
    ]
    for folder, some in ((half, changes), (whole, changes[:2])):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for change, message in some:
            assert message in convert.fails(folder, **SAME | change), change
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_two_at_once_in_one_folder(convert, vae, tmp_path, whole, cache):
    """The second ends with one line, and the first continues."""
    from commands import CONVERT, run

    folder = tmp_path / "digits"
    child = convert.start(folder, **SAME | {"batch_size": 1})
    wait_until(lambda: n_made(folder))
    os.kill(child, signal.SIGSTOP)
    flags = [f"--{name}={value}" for name, value in SAME.items()]
    second = run(CONVERT, *flags, "--vae", vae, "--out", folder, cache=cache)
    os.kill(child, signal.SIGCONT)
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == f"error: another process is writing to '{folder}'\n"
    assert convert.forks.end()[0] == 0
    latents.check_latents(folder)


@pytest.mark.slow
def test_a_full_disk_leaves_whole_files_only(convert, whole, tmp_path):
    with small_disk(tmp_path / "disk", 24) as disk:
        filler, folder = fill(disk, 500_000), disk / "digits"
        status, out, err = convert(folder, **SAME)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"error: no space left on {folder}/data/train-000")
        assert 1 < n_made(folder) < 23 and not [*folder.rglob("*tmp*")]
        for path in folder.glob("data/*"):
            assert path.read_bytes() == (whole / "data" / path.name).read_bytes()
        filler.unlink()
        assert convert(folder, **SAME)[0] == 0
        assert content(folder) == content(whole)


# --- is it right? ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_writes_a_grid_and_prints_the_psnr(convert, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "digits")
    status, out, err = convert(folder, **SAME, verify=20)
    assert status == 0, err
    match = re.search(r"(\d+) rows decoded: PSNR (.*) dB on average, (.*) at worst", out)
    assert match
    split = open_dataset("digits", image_size=16).train
    images = split.decode(np.linspace(0, N_ROWS["train"] - 1, 20).astype(int))
    decoded = grids.to_uint8(averaging.decode_means(averaging.encode_means(images)))
    errors = np.square(decoded / 255 - images / 255).mean((1, 2, 3))
    psnr = -10 * np.log10(errors)
    assert match[1] == "20"
    assert abs(float(match[2]) - psnr.mean()) < 0.1 and abs(float(match[3]) - psnr.min()) < 0.1
    with PillowImage.open(folder / "verify.png") as grid:
        assert grid.width > 16 * 64 and grid.height > 2 * 64
    latents.check_latents(folder)
    assert len(load_dataset(str(folder))["train"]) == N_ROWS["train"]


@pytest.mark.slow
def test_the_doctor_knows_the_vae(convert, whole, vae, tmp_path):
    """By its weights, its scale and what it makes of latents; also where it is now."""
    status, out, err = convert(doctor=whole, vae=None)
    assert status == 0, err
    assert out.startswith(f"{whole}: sound. 1437 train rows, 360 test rows of 8×8×2 from {vae}; ")
    assert re.search(r"deviation is (0\.9|1\.0)\d; decoding and encoding again changes 0% of", out)

    moved = tmp_path / "vae"
    folder = tmp_path / "digits"
    averaging.save(moved)
    flags = BEGUN | {"rows_per_file": 2000, "mirror": False}
    assert convert(folder, **flags | {"vae": moved})[0] == 0
    moved = moved.rename(tmp_path / "moved")
    assert "has moved, name its new place by --vae" in convert.fails(doctor=folder, vae=None)
    status, out, _ = convert(doctor=folder, vae=moved)
    assert status == 0 and "sound" in out

    other = averaging.params()
    other["decoder"]["conv_out"]["bias"][:] += 0.5
    pretrained.save_autoencoder(tmp_path / "vae", averaging.config(), other)
    assert "is not the one that the latents of digits were made with: its weights' hash" in (
        convert.fails(doctor=folder, vae=None)
    )
    facts = json.loads((moved / "config.json").read_text())
    for name, value in (("scaling_factor", 0.18215), ("shift_factor", 0.5)):
        (moved / "config.json").write_text(json.dumps(facts | {name: value}))
        message = convert.fails(doctor=folder, vae=moved)
        was = facts[name]
        assert f"{name} is {was}, and the VAE's own is {value}" in message


@pytest.mark.slow
def test_the_doctor_knows_an_untrained_vae(convert, tmp_path):
    config = AutoencoderConfig(
        in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        scaling_factor=1.0,
    )  # fmt: skip
    pretrained.save_autoencoder(
        tmp_path / "vae", config, init_autoencoder_params(config, jax.random.key(0))
    )
    flags = BEGUN | {"vae": tmp_path / "vae", "rows_per_file": 2000, "mirror": False}
    assert convert(tmp_path / "out", **flags)[0] == 0
    assert re.search(
        r"decoding and encoding them again changes \d+% of their variance; they are not of this "
        r"VAE, or it was never trained\n",
        convert.fails(doctor=tmp_path / "out", vae=None),
    )


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(convert, tmp_path):
    fails = partial(convert.fails, tmp_path / "out", dataset_name="digits")
    for change, message in (
        ({"sise": 3}, "error: unknown flag --sise; "),
        ({"image_size": "16x15"}, "--image_size 16x15: must be a multiple of 2, which the VAE"),
        ({"vae": tmp_path / "nowhere"}, "nowhere"),
        ({"doctor": tmp_path / "nowhere"}, "holds no finished latents"),
        ({"label_column": "colour"}, "has no column 'colour'"),
    ):
        assert message in fails(**change), change
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "cannot write to the folder" in convert.fails(tmp_path / "file", dataset_name="digits")


@pytest.mark.slow
def test_an_unknown_data_set_is_named_before_anything_is_loaded(convert, tmp_path):
    assert "did you mean 'digits'?" in convert.fails(tmp_path / "out", dataset_name="digit")
