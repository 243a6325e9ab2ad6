"""A folder of latents is checked against its record; its rows are those of the images."""

import json
import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import averaging
import jax
import numpy as np
import pyarrow.parquet
import pytest

from data import latents
from data.load import open_dataset
from data.parquet import ParquetSplit
from data.pipeline import Pipeline
from runtime import parallel
from runtime.errors import UserError
from training import device_dataset

N_TRAIN, N_TEST = 1437, 360


@pytest.fixture
def folder(latent_digits, tmp_path):
    """Return a copy that a test may damage."""
    return shutil.copytree(latent_digits, tmp_path / "latents")


def edit(folder, *, encoding=None, **facts):
    """Change latents.json."""
    record = json.loads((folder / latents.INFO_FILE).read_text())
    record["encoding"] |= encoding or {}
    (folder / latents.INFO_FILE).write_text(json.dumps(record | facts))


def test_the_scaled_deviation_is_that_of_a_models_input(latent_digits):
    """It is taken over all channels together: a channel of another mean adds to it."""
    data = Pipeline(open_dataset("digits", latents_dir=latent_digits), batch_size=N_TRAIN, seed=0)
    z = data.train_batch(0).image.astype(float)[..., :2]  # their own deviation is small beside it
    of_means = np.sqrt(np.square(averaging.SCALE * z.std()) + np.exp(averaging.LOG_VARIANCE))
    assert abs(latents.check_latents(latent_digits).scaled_std - of_means) < 0.05


# --- checks ---------------------------------------------------------------------------------------


def test_a_sound_folder_passes(latent_digits):
    dataset = latents.check_latents(latent_digits)
    assert dataset.n_rows == {"train": N_TRAIN, "test": N_TEST}
    assert dataset.n_files == {"train": 3, "test": 1} and dataset.skipped == {
        "train": [],
        "test": [],
    }
    assert dataset.encoding.shape == (8, 8, 2) and dataset.encoding.mirrored


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [
        ("scaling_factor", 0.13025, averaging.SCALE),
        ("shift_factor", 0.5, averaging.SHIFT),
        ("vae_hash", "f" * 64, ""),
        ("mirrored", False, True),
        ("image_size", 32, 16),
    ],
)
def test_another_encoding_in_the_json_is_refused(folder, name, value, was):
    edit(folder, encoding={name: value})
    message = rf"{name} is {value} in latents.json, but train-00000-of-00003.parquet has {was}"
    with pytest.raises(UserError, match=message):
        latents.check_latents(folder)


def test_a_wrong_count_of_rows_is_refused(folder):
    edit(folder, n_rows={"train": N_TRAIN, "test": N_TEST + 1})
    with pytest.raises(UserError, match=r"'test' has 360 rows, and latents\.json says 361"):
        latents.check_latents(folder)


def test_a_missing_file_is_refused(folder):
    missing = folder / "data/train-00001-of-00003.parquet"
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        latents.check_latents(folder)


@pytest.mark.parametrize("n", [0, 3, 1000, -9])
def test_a_truncated_file_is_refused(folder, n):
    torn = folder / "data/train-00001-of-00003.parquet"
    torn.write_bytes(torn.read_bytes()[:n])
    with pytest.raises(UserError, match=f"{torn} is no file of latents, or damaged: "):
        latents.check_latents(folder)


def test_a_file_without_the_converters_record_is_refused(folder):
    other = folder / "data/train-00001-of-00003.parquet"
    table = pyarrow.parquet.read_table(other)
    pyarrow.parquet.write_table(table.replace_schema_metadata(), other)
    with pytest.raises(UserError, match=f"{other} is no file of latents, or damaged: "):
        latents.check_latents(folder)


def test_a_file_of_another_conversion_is_refused(folder):
    """It has as many rows of the same length, but another VAE."""
    other = folder / "data/train-00001-of-00003.parquet"
    table = pyarrow.parquet.read_table(other)
    record = json.loads(table.schema.metadata[latents.METADATA_KEY])
    record["encoding"]["vae_hash"] = "e" * 64
    changed = {**table.schema.metadata, latents.METADATA_KEY: json.dumps(record)}
    pyarrow.parquet.write_table(table.replace_schema_metadata(changed), other)
    with pytest.raises(UserError, match=f"but {other.name} has {'e' * 64}"):
        latents.check_latents(folder)


def test_rows_that_are_not_the_files_own_are_refused(folder):
    other = folder / "data/train-00002-of-00003.parquet"  # the smallest, whose rows are read
    table = pyarrow.parquet.read_table(other)
    rows = latents.unpack_moments(
        table["moments"].to_pylist(), latents.read_latent_dataset(folder).encoding
    )
    swapped = pyarrow.table(
        {"moments": latents.pack_moments(rows * np.float16(1.1)), "label": table["label"]},
        table.schema,
    )
    pyarrow.parquet.write_table(swapped, other)
    with pytest.raises(UserError, match=f"the rows of {other.name} are not those that it was wr"):
        latents.check_latents(folder)


def test_a_file_whose_middle_is_damaged_is_refused(folder):
    other = folder / "data/train-00002-of-00003.parquet"
    content = bytearray(other.read_bytes())
    content[4:2000] = bytes(1996)
    other.write_bytes(content)
    with pytest.raises(UserError, match=f"{other} is damaged: "):
        latents.check_latents(folder)


@pytest.mark.parametrize("name", ["channel_mean", "channel_std"])
def test_edited_statistics_are_refused(folder, name):
    edit(folder, **{name: [0.5, 0.25]})
    with pytest.raises(UserError, match=r"channels have mean .* says .*0\.5 0\.25"):
        latents.check_latents(folder)


@pytest.mark.parametrize("factor", [0.01, 100])
def test_the_scale_of_another_vae_is_refused(folder, factor):
    """Also where it is the same in all files: latents must be of about unit variance."""
    scale = averaging.SCALE * factor
    edit(folder, encoding={"scaling_factor": scale})
    for file in (folder / "data").glob("*.parquet"):
        table = pyarrow.parquet.read_table(file)
        record = json.loads(table.schema.metadata[latents.METADATA_KEY])
        record["encoding"]["scaling_factor"] = scale
        changed = {**table.schema.metadata, latents.METADATA_KEY: json.dumps(record)}
        pyarrow.parquet.write_table(table.replace_schema_metadata(changed), file)
    with pytest.raises(UserError, match="where a model expects about 1: the scaling factor is of"):
        latents.check_latents(folder)


def without(text, name):
    record = json.loads(text)
    (record if name in record else record["encoding"]).pop(name)
    return json.dumps(record)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: '"latents"',
        lambda text: without(text, "encoding"),
        lambda text: without(text, "n_rows"),
        lambda text: without(text, "vae_hash"),
        lambda text: json.dumps(json.loads(text) | {"n_files": {}}),
        lambda text: json.dumps(json.loads(text) | {"n_files": {"train": 0, "test": 1}}),
        lambda text: json.dumps(json.loads(text) | {"more": 1}),
        lambda text: json.dumps(json.loads(text) | {"channel_std": [1.0]}),
    ],
)
def test_damaged_json_is_one_line(folder, damage):
    text = (folder / latents.INFO_FILE).read_text()
    (folder / latents.INFO_FILE).write_text(damage(text))
    with pytest.raises(UserError) as error:
        latents.check_latents(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# --- opened as a dataset -------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_latents_are_those_of_the_images_with_their_labels(latent_digits, streaming):
    """The mean of each row is the autoencoder's of the image, and that of its second view is of the
    mirrored image.
    """
    originals = open_dataset("digits", image_size=16)
    source = open_dataset("digits", latents_dir=latent_digits, streaming=streaming)
    assert isinstance(source.train.data, ParquetSplit) == streaming
    assert source.config.label_names == originals.config.label_names
    assert source.config.n_classes == 10 and source.config.flip
    assert (source.config.image_size, source.config.channels) == (8, 2)
    for ours, theirs in ((source.train, originals.train), (source.eval, originals.eval)):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        rows = np.array([0, 17, len(ours) - 1])
        moments = ours.decode(rows)
        decoded = theirs.decode(rows)
        mean, spread, mirrored, _ = np.split(moments.astype(np.float32), 4, axis=-1)
        np.testing.assert_allclose(mean, averaging.encode_means(decoded), atol=2e-3)
        np.testing.assert_allclose(mirrored, averaging.encode_means(decoded[:, :, ::-1]), atol=2e-3)
        assert (spread == averaging.LOG_VARIANCE).all()


def test_the_size_of_latents_may_be_given_and_a_wrong_one_is_refused(latent_digits):
    opened = partial(open_dataset, "digits", latents_dir=latent_digits)
    assert opened(image_size=8, channels=2).config.image_size == 8
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 16}, "--image_size 16: the latents in .* have image_size 8"),
        ({"channels": 1}, "--channels 1: the latents in .* have channels 2"),
        ({"data_dir": latent_digits}, "no --data_dir or --image_column"),
        ({"image_column": "moments"}, "no --data_dir or --image_column"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            opened(**arguments)
    with pytest.raises(UserError, match="are of digits, not mnist"):
        open_dataset("mnist", latents_dir=latent_digits)


def test_latents_without_classes_or_with_captions_from_their_names(latent_digits):
    assert open_dataset("digits", latents_dir=latent_digits, conditioning="none").config == replace(
        open_dataset("digits", latents_dir=latent_digits, label_column="").config
    )
    captioned = open_dataset("digits", latents_dir=latent_digits, templates=("the digit {label}",))
    assert captioned.train.captions[0] == (f"the digit {captioned.train.labels[0]}",)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_second_view_is_used_where_the_pipeline_flips(latent_digits, in_memory):
    source = open_dataset("digits", latents_dir=latent_digits)
    data = Pipeline(source, batch_size=32, seed=3, in_memory=in_memory, n_workers=0)
    for step in (0, 44):  # the second runs into the next epoch
        place = step * 32 + np.arange(32)
        flips = np.concatenate([data.epoch_flips(epoch) for epoch in (0, 1)])[place]
        views = source.train.decode(data.batch_rows(step)).reshape(32, 8, 8, 2, 4)
        expected = np.where(flips[:, None, None, None], views[..., 1, :], views[..., 0, :])
        np.testing.assert_array_equal(data.train_batch(step).image, expected)
        assert 4 < flips.sum() < 28


def test_evaluation_never_mirrors(latent_digits):
    source = open_dataset("digits", latents_dir=latent_digits)
    data = Pipeline(source, batch_size=N_TEST, seed=3)
    (batch,) = data.eval_batches(1)
    first_views = source.eval.decode(np.arange(N_TEST))[..., :4]
    assert {row.tobytes() for row in batch.image} == {row.tobytes() for row in first_views}


def test_streamed_and_stored_rows_are_the_same(latent_digits):
    stored = open_dataset("digits", latents_dir=latent_digits)
    streamed = open_dataset("digits", latents_dir=latent_digits, streaming=True)
    rows = np.arange(0, N_TRAIN, 7)
    np.testing.assert_array_equal(streamed.train.decode(rows), stored.train.decode(rows))
    data = Pipeline(streamed, batch_size=16, seed=0, n_workers=0)
    batch = data.train_batch(5)
    views = stored.train.decode(data.batch_rows(5)).reshape(16, 8, 8, 2, 4)
    assert all(
        any(np.array_equal(image, view[..., i, :]) for i in (0, 1))
        for image, view in zip(batch.image, views, strict=True)
    )


def test_batches_gathered_on_devices_are_the_pipelines(latent_digits):
    mesh = parallel.make_mesh()
    data = Pipeline(open_dataset("digits", latents_dir=latent_digits), batch_size=40, seed=1)
    gather = jax.jit(partial(device_dataset.gather_batch, batch_size=40, mesh=mesh))
    for start, stop in ((0, 3), (34, 37)):
        held = device_dataset.batches(data, mesh, start, stop)
        for step, here in zip(range(start, stop), held, strict=True):
            jax.tree.map(np.testing.assert_array_equal, gather(here, step), data.train_batch(step))
