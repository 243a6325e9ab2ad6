"""A folder of latents is what it says, or the doctor says what it is not; a batch of them is drawn
from their own distribution, each row and step anew.
"""

import dataclasses
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import averaging
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from data import latents
from data.latents import Sums
from data.load import open_source
from data.parquet import ParquetSplit
from data.pipeline import Pipeline
from datasets_config import LatentEncoding
from methods import rectified_flow
from networks import autoencoder
from runtime import parallel
from runtime.errors import UserError
from training import device_dataset

ENCODING = LatentEncoding(
    dataset_name="digits",
    source="data/digits",
    image_size=16,
    shape=(8, 8, 2),
    vae="somewhere",
    vae_hash="0" * 64,
    scaling_factor=1.6,
    shift_factor=-0.1,
    precision="float32",
    mirrored=False,
    captions=False,
)
N_TRAIN, N_TEST = 1437, 360


def moments(n, encoding=ENCODING, seed=0):
    normal = np.random.default_rng(seed).standard_normal((n, *encoding.moments_shape))
    return normal.astype(np.float16)


@pytest.fixture
def folder(latent_digits, tmp_path):
    """A copy that may be harmed."""
    return shutil.copytree(latent_digits, tmp_path / "latents")


def edit(folder, *, encoding=None, **facts):
    """Change what latents.json says."""
    record = json.loads((folder / latents.FACTS).read_text())
    record["encoding"] |= encoding or {}
    (folder / latents.FACTS).write_text(json.dumps(record | facts))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
def test_unpack_is_the_inverse_of_pack(mirrored):
    encoding = replace(ENCODING, mirrored=mirrored)
    rows = moments(5, encoding)
    assert rows.shape == (5, 8, 8, 8 if mirrored else 4)
    cells = latents.pack(rows)
    np.testing.assert_array_equal(latents.unpack(cells, encoding), rows)
    np.testing.assert_array_equal(np.frombuffer(cells[3], "<f2").reshape(rows[3].shape), rows[3])
    assert latents.unpack([], encoding).shape == (0, *encoding.moments_shape)


def test_a_row_of_another_length_is_one_line():
    cells = latents.pack(moments(3))
    cells[1] = cells[1][:-2]
    with pytest.raises(UserError, match="has 510 bytes where 8×8×4 float16 numbers take 512"):
        latents.unpack(cells, ENCODING)
    with pytest.raises(UserError, match="has 512 bytes where 8×8×8 float16 numbers take 1024"):
        latents.unpack(latents.pack(moments(3)), replace(ENCODING, mirrored=True))


# --- statistics -----------------------------------------------------------------------------------


def test_expected_sums_are_those_of_many_draws():
    rows = moments(4)
    mean, deviation = rows[..., :2].astype(float), np.exp(rows[..., 2:].astype(float) / 2)
    noise = np.random.default_rng(1).standard_normal((4000, *mean.shape))
    z = (mean + deviation * noise).reshape(-1, 2)
    sums = Sums.over(rows, 2)
    assert sums.n == mean[..., 0].size
    np.testing.assert_allclose(sums.mean, z.mean(0), atol=0.005)
    np.testing.assert_allclose(sums.std, z.std(0), rtol=0.005)


def test_sums_add_up_and_leave_mirrored_views_out():
    whole, parts = Sums.over(moments(6), 2), np.split(moments(6), [1, 4])
    together = latents.sum_of(Sums.over(part, 2) for part in parts)
    read_back = Sums.of(json.loads(json.dumps(together.record())))
    both = Sums.over(np.concatenate([moments(6), moments(6, seed=2)], axis=-1), 2)
    for sums in (together, read_back, both):
        assert sums.n == whole.n
        np.testing.assert_allclose(sums.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(sums.std, whole.std, rtol=1e-12)


def test_the_scaled_deviation_is_that_of_what_a_model_sees(latent_digits):
    """Of all channels together: one that lies beside the others counts as spread."""
    data = Pipeline(open_source("digits", latents_dir=latent_digits), batch_size=N_TRAIN, seed=0)
    z = data.train_batch(0).image.astype(float)[..., :2]  # their own deviation is small beside it
    of_means = np.sqrt(np.square(averaging.SCALE * z.std()) + np.exp(averaging.LOG_VARIANCE))
    assert abs(latents.examine(latent_digits).scaled_std - of_means) < 0.05


# --- the doctor -----------------------------------------------------------------------------------


def test_a_sound_folder_is_sound(latent_digits):
    said = latents.examine(latent_digits)
    assert said.n_rows == {"train": N_TRAIN, "test": N_TEST}
    assert said.n_files == {"train": 3, "test": 1} and said.skipped == {"train": [], "test": []}
    assert said.encoding.shape == (8, 8, 2) and said.encoding.mirrored


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
        latents.examine(folder)


def test_a_wrong_count_of_rows_is_refused(folder):
    edit(folder, n_rows={"train": N_TRAIN, "test": N_TEST + 1})
    with pytest.raises(UserError, match=r"'test' has 360 rows, and latents\.json says 361"):
        latents.examine(folder)


def test_a_missing_file_is_refused(folder):
    missing = folder / "data/train-00001-of-00003.parquet"
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        latents.examine(folder)


@pytest.mark.parametrize("n", [0, 3, 1000, -9])
def test_a_truncated_file_is_refused(folder, n):
    torn = folder / "data/train-00001-of-00003.parquet"
    torn.write_bytes(torn.read_bytes()[:n])
    with pytest.raises(UserError, match=f"{torn} is no file of latents, or damaged: "):
        latents.examine(folder)


def test_a_file_that_is_not_of_the_converter_is_refused(folder):
    other = folder / "data/train-00001-of-00003.parquet"
    table = pyarrow.parquet.read_table(other)
    pyarrow.parquet.write_table(table.replace_schema_metadata(), other)
    with pytest.raises(UserError, match=f"{other} is no file of latents, or damaged: "):
        latents.examine(folder)


def test_a_file_of_another_conversion_is_refused(folder):
    """Though it has as many rows of the same length."""
    other = folder / "data/train-00001-of-00003.parquet"
    table = pyarrow.parquet.read_table(other)
    record = json.loads(table.schema.metadata[latents.KEY])
    record["encoding"]["vae_hash"] = "e" * 64
    changed = {**table.schema.metadata, latents.KEY: json.dumps(record)}
    pyarrow.parquet.write_table(table.replace_schema_metadata(changed), other)
    with pytest.raises(UserError, match=f"but {other.name} has {'e' * 64}"):
        latents.examine(folder)


def test_rows_that_are_not_the_files_own_are_refused(folder):
    other = folder / "data/train-00002-of-00003.parquet"  # the one that is looked into
    table = pyarrow.parquet.read_table(other)
    rows = latents.unpack(table["moments"].to_pylist(), latents.read(folder).encoding)
    swapped = pyarrow.table(
        {"moments": latents.pack(rows * np.float16(1.1)), "label": table["label"]}, table.schema
    )
    pyarrow.parquet.write_table(swapped, other)
    with pytest.raises(UserError, match=f"the rows of {other.name} are not those that it was wr"):
        latents.examine(folder)


def test_a_file_whose_middle_is_damaged_is_refused(folder):
    other = folder / "data/train-00002-of-00003.parquet"
    content = bytearray(other.read_bytes())
    content[4:2000] = bytes(1996)
    other.write_bytes(content)
    with pytest.raises(UserError, match=f"{other} is damaged: "):
        latents.examine(folder)


@pytest.mark.parametrize("name", ["channel_mean", "channel_std"])
def test_edited_statistics_are_refused(folder, name):
    edit(folder, **{name: [0.5, 0.25]})
    with pytest.raises(UserError, match=r"channels have mean .* says .*0\.5 0\.25"):
        latents.examine(folder)


@pytest.mark.parametrize("factor", [0.01, 100])
def test_a_scale_that_is_of_another_vae_is_refused(folder, factor):
    """Also where it is the same in all files: latents must be of about unit variance."""
    scale = averaging.SCALE * factor
    edit(folder, encoding={"scaling_factor": scale})
    for file in (folder / "data").glob("*.parquet"):
        table = pyarrow.parquet.read_table(file)
        record = json.loads(table.schema.metadata[latents.KEY])
        record["encoding"]["scaling_factor"] = scale
        changed = {**table.schema.metadata, latents.KEY: json.dumps(record)}
        pyarrow.parquet.write_table(table.replace_schema_metadata(changed), file)
    with pytest.raises(UserError, match="where a model expects about 1: the scaling factor is of"):
        latents.examine(folder)


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
    text = (folder / latents.FACTS).read_text()
    (folder / latents.FACTS).write_text(damage(text))
    with pytest.raises(UserError) as error:
        latents.examine(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_latents_says_what_makes_them(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no finished latents: .* convert_imagenet\.py makes"):
            latents.examine(path)


# --- opened as a data set -------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_latents_are_those_of_the_pictures_with_their_labels(latent_digits, streaming):
    """Row by row: the mean of each is what the autoencoder makes of the picture, and so is that of
    its mirror image.
    """
    pictures = open_source("digits", image_size=16)
    source = open_source("digits", latents_dir=latent_digits, streaming=streaming)
    assert isinstance(source.train.data, ParquetSplit) == streaming
    assert source.config.label_names == pictures.config.label_names
    assert source.config.n_classes == 10 and source.config.flip
    assert (source.config.image_size, source.config.channels) == (8, 2)
    for ours, theirs in ((source.train, pictures.train), (source.eval, pictures.eval)):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        rows = np.array([0, 17, len(ours) - 1])
        found, seen = ours.images(rows), theirs.images(rows)
        mean, spread, mirrored, _ = np.split(found.astype(np.float32), 4, axis=-1)
        np.testing.assert_allclose(mean, averaging.means(seen), atol=2e-3)
        np.testing.assert_allclose(mirrored, averaging.means(seen[:, :, ::-1]), atol=2e-3)
        assert (spread == averaging.LOG_VARIANCE).all()


def test_the_right_size_may_be_said_and_a_wrong_one_is_one_line(latent_digits):
    opened = partial(open_source, "digits", latents_dir=latent_digits)
    assert opened(image_size=8, channels=2).config.image_size == 8
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 16}, "--image_size 16: the latents in .* have 8"),
        ({"channels": 1}, "--channels 1: the latents in .* have 2"),
        ({"data_dir": latent_digits}, "no --data_dir or --image_column"),
        ({"image_column": "moments"}, "no --data_dir or --image_column"),
    ]
    for how, message in wrong:
        with pytest.raises(UserError, match=message):
            opened(**how)
    with pytest.raises(UserError, match="are of digits, not mnist"):
        open_source("mnist", latents_dir=latent_digits)


def test_latents_without_classes_or_with_captions_from_their_names(latent_digits):
    assert open_source("digits", latents_dir=latent_digits, conditioning="none").config == replace(
        open_source("digits", latents_dir=latent_digits, label_column="").config
    )
    told = open_source("digits", latents_dir=latent_digits, templates=("the digit {label}",))
    assert told.train.captions[0] == (f"the digit {told.train.labels[0]}",)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_second_view_is_taken_where_the_pipeline_flips(latent_digits, in_memory):
    source = open_source("digits", latents_dir=latent_digits)
    data = Pipeline(source, batch_size=32, seed=3, in_memory=in_memory, n_workers=0)
    for step in (0, 44):  # the second runs into the next epoch
        place = step * 32 + np.arange(32)
        flips = np.concatenate([data.flips(epoch) for epoch in (0, 1)])[place]
        views = source.train.images(data.rows(step)).reshape(32, 8, 8, 2, 4)
        expected = np.where(flips[:, None, None, None], views[..., 1, :], views[..., 0, :])
        np.testing.assert_array_equal(data.train_batch(step).image, expected)
        assert 4 < flips.sum() < 28


def test_evaluation_never_mirrors(latent_digits):
    source = open_source("digits", latents_dir=latent_digits)
    data = Pipeline(source, batch_size=N_TEST, seed=3)
    (batch,) = data.eval_batches(1)
    first_views = source.eval.images(np.arange(N_TEST))[..., :4]
    assert {row.tobytes() for row in batch.image} == {row.tobytes() for row in first_views}


def test_streamed_and_stored_rows_are_the_same(latent_digits):
    stored = open_source("digits", latents_dir=latent_digits)
    streamed = open_source("digits", latents_dir=latent_digits, streaming=True)
    rows = np.arange(0, N_TRAIN, 7)
    np.testing.assert_array_equal(streamed.train.images(rows), stored.train.images(rows))
    data = Pipeline(streamed, batch_size=16, seed=0, n_workers=0)
    batch = data.train_batch(5)
    views = stored.train.images(data.rows(5)).reshape(16, 8, 8, 2, 4)
    assert all(
        any(np.array_equal(image, view[..., i, :]) for i in (0, 1))
        for image, view in zip(batch.image, views, strict=True)
    )


def test_batches_drawn_on_devices_are_the_pipelines(latent_digits):
    mesh = parallel.make_mesh()
    data = Pipeline(open_source("digits", latents_dir=latent_digits), batch_size=40, seed=1)
    draw = jax.jit(partial(device_dataset.draw_batch, batch_size=40, mesh=mesh))
    for start, stop in ((0, 3), (34, 37)):
        held = device_dataset.batches(data, mesh, start, stop)
        for step, here in zip(range(start, stop), held, strict=True):
            jax.tree.map(np.testing.assert_array_equal, draw(here, step), data.train_batch(step))


# --- what a step makes of them --------------------------------------------------------------------

FACTORS = {"scaling_factor": 0.5, "shift_factor": 1.0}


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_latents_are_drawn_from_their_moments_and_scaled():
    """Of mean 3 and deviation 2, less 1, times a half: of mean 1 and deviation 1."""
    row = np.array([3.0, -3.0, np.log(4.0), np.log(0.25)], np.float16)
    x = autoencoder.draw(jnp.asarray(np.tile(row, (4000, 2, 2, 1))), keys(4000), **FACTORS)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x.mean((0, 1, 2)), [1.0, -2.0], atol=0.03)
    np.testing.assert_allclose(x.std((0, 1, 2)), [1.0, 0.25], rtol=0.03)
    flat = np.asarray(x).reshape(4000, -1)
    correlated = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlated).max() < 0.08


def test_each_row_is_drawn_by_its_own_key():
    rows = jnp.asarray(np.tile(moments(1), (4, 1, 1, 1)))
    x = autoencoder.draw(rows, keys(4), **FACTORS)
    assert len({row.tobytes() for row in np.asarray(x)}) == 4
    order = np.array([2, 0, 3, 1])
    moved = autoencoder.draw(rows, keys(4)[order], **FACTORS)
    np.testing.assert_array_equal(moved, x[order])
    alone = autoencoder.draw(rows[:1], keys(4)[2:3], **FACTORS)
    np.testing.assert_array_equal(alone[0], x[2])


def test_no_variance_leaves_the_mean():
    rows = moments(2)
    rows[..., 2:] = autoencoder.LOG_VARIANCES[0]
    x = autoencoder.draw(jnp.asarray(rows), keys(2), **FACTORS)
    np.testing.assert_allclose(x, (rows[..., :2].astype(np.float32) - 1) / 2, atol=1e-5)


def test_the_key_that_latents_are_drawn_by_is_none_of_the_others():
    """Over rows, uses and steps; and it is the one that the objective hands on."""
    seen = []

    def read(image, keys):
        seen.append(keys)
        return autoencoder.draw(image, keys, **FACTORS)

    class Model:
        config = SimpleNamespace(n_classes=10)

        def __call__(self, x, t, label):
            return x

    batch = SimpleNamespace(
        row=jnp.arange(4), image=jnp.asarray(moments(4)), label=jnp.zeros(4, jnp.int32)
    )
    loss = rectified_flow.rectified_flow_loss(density=rectified_flow.uniform(), read=read)
    losses, all_keys = [], []
    for step in range(3):
        key = jax.random.key(step)
        losses.append(loss(Model(), batch, key)[0].item())
        named = rectified_flow.row_keys(key, batch.row)
        assert (jax.random.key_data(seen[-1]) == jax.random.key_data(named.data)).all()
        all_keys += [tuple(k) for part in named for k in jax.random.key_data(part).tolist()]
    assert len(set(all_keys)) == 3 * 4 * len(rectified_flow.RowKeys._fields)
    assert len(set(losses)) == 3


def test_an_encoding_comes_back_from_json():
    record = json.loads(json.dumps(dataclasses.asdict(ENCODING)))
    assert LatentEncoding.of(record) == ENCODING
