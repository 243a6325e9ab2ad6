"""Moments are packed and summed without loss; each row and step samples its own latents."""

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latents_cases import ENCODING, moments

from data import latents
from data.latents import MomentSums
from datasets_config import LatentEncoding
from methods import method
from methods.rectified_flow import RectifiedFlow
from networks import autoencoder
from runtime.errors import UserError

# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
def test_unpack_inverts_pack(mirrored):
    encoding = replace(ENCODING, mirrored=mirrored)
    rows = moments(5, encoding)
    assert rows.shape == (5, 8, 8, 8 if mirrored else 4)
    cells = latents.pack_moments(rows)
    np.testing.assert_array_equal(latents.unpack_moments(cells, encoding), rows)
    np.testing.assert_array_equal(np.frombuffer(cells[3], "<f2").reshape(rows[3].shape), rows[3])
    assert latents.unpack_moments([], encoding).shape == (0, *encoding.moments_shape)


def test_a_row_of_another_length_is_one_line():
    cells = latents.pack_moments(moments(3))
    cells[1] = cells[1][:-2]
    with pytest.raises(UserError, match="has 510 bytes where 8×8×4 float16 numbers take 512"):
        latents.unpack_moments(cells, ENCODING)
    with pytest.raises(UserError, match="has 512 bytes where 8×8×8 float16 numbers take 1024"):
        latents.unpack_moments(latents.pack_moments(moments(3)), replace(ENCODING, mirrored=True))


# --- statistics -----------------------------------------------------------------------------------


def test_expected_sums_are_those_of_many_samples():
    rows = moments(4)
    mean, deviation = rows[..., :2].astype(float), np.exp(rows[..., 2:].astype(float) / 2)
    noise = np.random.default_rng(1).standard_normal((4000, *mean.shape))
    z = (mean + deviation * noise).reshape(-1, 2)
    sums = MomentSums.of_moments(rows, 2)
    assert sums.n == mean[..., 0].size
    np.testing.assert_allclose(sums.mean, z.mean(0), atol=0.005)
    np.testing.assert_allclose(sums.std, z.std(0), rtol=0.005)


def test_sums_add_up_and_leave_mirrored_views_out():
    whole, parts = MomentSums.of_moments(moments(6), 2), np.split(moments(6), [1, 4])
    together = latents.add_moment_sums(MomentSums.of_moments(part, 2) for part in parts)
    read_back = MomentSums.from_record(json.loads(json.dumps(together.to_record())))
    both = MomentSums.of_moments(np.concatenate([moments(6), moments(6, seed=2)], axis=-1), 2)
    for sums in (together, read_back, both):
        assert sums.n == whole.n
        np.testing.assert_allclose(sums.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(sums.std, whole.std, rtol=1e-12)


def test_a_folder_without_latents_names_the_command_that_makes_them(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no finished latents: .* convert_imagenet\.py makes"):
            latents.check_latents(path)


# --- sampling --------------------------------------------------------------------

FACTORS = {"scaling_factor": 0.5, "shift_factor": 1.0}


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_latents_are_sampled_from_their_moments_and_scaled():
    """Mean 3 and deviation 2, less 1, times a half: mean 1 and deviation 1."""
    row = np.array([3.0, -3.0, np.log(4.0), np.log(0.25)], np.float16)
    x = autoencoder.sample_scaled_latents(
        jnp.asarray(np.tile(row, (4000, 2, 2, 1))), keys(4000), **FACTORS
    )
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x.mean((0, 1, 2)), [1.0, -2.0], atol=0.03)
    np.testing.assert_allclose(x.std((0, 1, 2)), [1.0, 0.25], rtol=0.03)
    flat = np.asarray(x).reshape(4000, -1)
    correlated = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlated).max() < 0.08


def test_each_row_is_sampled_with_its_own_key():
    rows = jnp.asarray(np.tile(moments(1), (4, 1, 1, 1)))
    x = autoencoder.sample_scaled_latents(rows, keys(4), **FACTORS)
    assert len({row.tobytes() for row in np.asarray(x)}) == 4
    order = np.array([2, 0, 3, 1])
    moved = autoencoder.sample_scaled_latents(rows, keys(4)[order], **FACTORS)
    np.testing.assert_array_equal(moved, x[order])
    alone = autoencoder.sample_scaled_latents(rows[:1], keys(4)[2:3], **FACTORS)
    np.testing.assert_array_equal(alone[0], x[2])


def test_no_variance_leaves_the_mean():
    rows = moments(2)
    rows[..., 2:] = autoencoder.LOG_VARIANCES[0]
    x = autoencoder.sample_scaled_latents(jnp.asarray(rows), keys(2), **FACTORS)
    np.testing.assert_allclose(x, (rows[..., :2].astype(np.float32) - 1) / 2, atol=1e-5)


def test_the_key_of_latents_is_none_of_the_others():
    """Over rows, uses and steps; and it is the one that the objective hands on."""
    seen = []

    def read(image, keys):
        seen.append(keys)
        return autoencoder.sample_scaled_latents(image, keys, **FACTORS)

    class Model:
        config = SimpleNamespace(n_classes=10)

        def __call__(self, x, t, label):
            return x

    batch = SimpleNamespace(
        row=jnp.arange(4), image=jnp.asarray(moments(4)), label=jnp.zeros(4, jnp.int32)
    )
    losses, all_keys = [], []
    for step in range(3):
        key = jax.random.key(step)
        losses.append(RectifiedFlow("uniform").loss(Model(), batch, key, to_input=read)[0].item())
        named = method.derive_row_keys(key, batch.row)
        assert (jax.random.key_data(seen[-1]) == jax.random.key_data(named.data)).all()
        all_keys += [tuple(k) for part in named for k in jax.random.key_data(part).tolist()]
    assert len(set(all_keys)) == 3 * 4 * len(method.RowKeys._fields)
    assert len(set(losses)) == 3


def test_an_encoding_comes_back_from_json():
    record = json.loads(json.dumps(dataclasses.asdict(ENCODING)))
    assert LatentEncoding.from_record(record) == ENCODING
