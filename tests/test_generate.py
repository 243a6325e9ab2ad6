"""A picture is a function of its weights, label, seed and place; files hold what they promise."""

from dataclasses import replace
from functools import partial

import jax
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from commands import run
from PIL import Image, ImageSequence

import generate
import parallel
from drawing import Sampler, label_ids, sample, spread
from errors import UserError
from generate import GenerateConfig
from model import init_params, model_config
from train import TrainConfig, Trainer

CONFIG = model_config("DiT-Nano/4", image_size=8, channels=1, out_channels=1, n_classes=10)
SIGMA = replace(CONFIG, out_channels=2)  # it learns its variance
DDPM = Sampler("ddpm", 3, prediction="epsilon", clip=True)
DDIM = Sampler("ddim", 3, prediction="v", eta=0.5)
DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def params():
    """Weights away from their zero start."""
    fresh = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), fresh)


@pytest.fixture(scope="module")
def sigma_params():
    fresh = init_params(SIGMA, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), fresh)


def pictures(params, labels, *, mesh=None, config=CONFIG, **how):
    how = {"sampler": Sampler(n_steps=3), "cfg_scale": 2.0, "seed": 5} | how
    return sample(params, config, labels, mesh=mesh or parallel.make_mesh(), **how)


def test_batches_and_devices_do_not_change_a_picture(params):
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    whole = pictures(params, labels).x
    assert whole.shape == (10, 8, 8, 1)
    np.testing.assert_allclose(pictures(params, labels, batch_size=4).x, whole, atol=1e-5)
    one = parallel.make_mesh(devices=jax.devices()[:1])
    np.testing.assert_allclose(pictures(params, labels, mesh=one).x, whole, atol=1e-5)
    np.testing.assert_allclose(pictures(params, labels[:3]).x, whole[:3], atol=1e-5)
    np.testing.assert_allclose(pictures(params, labels[4:], first=4).x, whole[4:], atol=1e-5)
    assert np.abs(pictures(params, labels, seed=6).x - whole).max() > 0.1
    assert np.abs(whole[1] - whole[3]).max() > 0.1  # the same label, another place


@pytest.mark.parametrize("sampler", [DDPM, DDIM], ids=["ddpm", "ddim"])
def test_batches_and_devices_do_not_change_what_ddpm_draws(sigma_params, sampler):
    draw = partial(pictures, sigma_params, config=SIGMA, sampler=sampler)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    whole = draw(labels).x
    # The data that a noise prediction makes at the last step are off by 157 times its rounding.
    np.testing.assert_allclose(draw(labels, batch_size=4).x, whole, atol=1e-3)
    one = parallel.make_mesh(devices=jax.devices()[:1])
    np.testing.assert_allclose(draw(labels, mesh=one).x, whole, atol=1e-3)
    assert np.abs(draw(labels, seed=6).x - whole).max() > 0.1
    assert np.abs(whole[1] - whole[3]).max() > 0.1


def test_what_a_step_took_the_picture_for_is_there_if_asked(params, sigma_params):
    for network, config, sampler in (
        (params, CONFIG, Sampler(n_steps=3)),
        (sigma_params, SIGMA, DDPM),
    ):
        draw = partial(pictures, network, [1, 2, 3], config=config, sampler=sampler)
        x, states, estimates = draw(estimates=True, batch_size=2)
        assert states is None and estimates is not None and estimates.shape == (3, 3, 8, 8, 1)
        np.testing.assert_allclose(estimates[-1], x, atol=1e-5)
        assert draw(trajectory=True).estimates is None
        np.testing.assert_allclose(draw().x, x, atol=1e-3)
        if sampler.clip:
            assert np.abs(estimates).max() <= 1


def test_a_scale_of_one_is_the_conditional_model(params):
    plain = pictures(params, [3, 7], cfg_scale=1.0).x
    nearly = pictures(params, [3, 7], cfg_scale=1.0 + 1e-6).x
    np.testing.assert_allclose(plain, nearly, atol=1e-4)


def test_the_trajectory_ends_in_the_picture(params):
    result = pictures(params, [1, 2, 3], trajectory=True, batch_size=2)
    assert result.trajectory is not None and result.trajectory.shape == (4, 3, 8, 8, 1)
    np.testing.assert_array_equal(result.trajectory[-1], result.x)
    assert abs(result.trajectory[0].std() - 1) < 0.2


@pytest.mark.parametrize(
    "words, names, ids",
    [
        ([3, "7"], DIGITS, [3, 7]),
        (["ship", "0"], ["cat", "ship"], [1, 0]),
        (["1"], ["1", "0"], [0]),  # a name wins over a number
        (["2"], [], [2]),
    ],
)
def test_labels_are_names_or_numbers(words, names, ids):
    assert label_ids(words, names, len(names) or 3) == ids


def test_a_label_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown label 'catt'; did you mean 'cat'"):
        label_ids(["catt"], ["cat", "ship"], 2)
    with pytest.raises(UserError, match="unknown label '10'"):
        label_ids([10], DIGITS, 10)


def test_labels_share_the_pictures():
    assert spread([3, 7], 5).tolist() == [3, 3, 3, 7, 7]
    assert spread([3, 7, 9], 2).tolist() == [3, 7]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"out": "grid.jpg"}, "must end in .png"),
        ({"trajectory": "way.mp4"}, "must end in .gif"),
        ({"x0": "seen.png"}, "--x0 seen.png: the name must end in .gif"),
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"out": "/nowhere/grid.png"}, "folder /nowhere does not exist"),
        ({}, "is not a run"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(tmp_path, fields, message):
    paths = {name: type(tmp_path)(v) if isinstance(v, str) else v for name, v in fields.items()}
    with pytest.raises(UserError, match=message):
        generate.main(GenerateConfig(run=tmp_path, **paths))


@pytest.mark.slow
def test_the_command_draws_from_a_run(tmp_path, cache, capsys):
    folder = tmp_path / "run"
    config = TrainConfig(model="DiT-Nano/8", batch_size=8, n_steps=4, eval_save_steps=2)
    config = replace(config, n_eval_batches=1, n_sample_steps=2, run_dir=folder)
    Trainer(config).fit()
    before = sorted(folder.rglob("*"))

    command = ["generate.py", "--run", folder, "--labels", "3", "7", "--n", 6, "--n_steps", 4]
    command += ["--out", tmp_path / "a.npz", "--trajectory", tmp_path / "way.gif"]
    done = run(*command, cache=cache)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a.npz") as arrays:
        averaged, labels = arrays["arr_0"], arrays["arr_1"]
    assert averaged.shape == (6, 8, 8, 1) and averaged.dtype == np.uint8
    assert labels.tolist() == [3, 3, 3, 7, 7, 7]
    with Image.open(tmp_path / "way.gif") as frames:
        assert len(list(ImageSequence.Iterator(frames))) == 5

    how = GenerateConfig(run=folder, labels=("3", "7"), n=6, n_steps=4, out=tmp_path / "b.npz")
    generate.main(replace(how, ema=False))
    with np.load(tmp_path / "b.npz") as arrays:
        assert (arrays["arr_0"] != averaged).any()
    generate.main(replace(how, step=2, out=tmp_path / "grid.png"))
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 100
    assert sorted(folder.rglob("*")) == before  # a reader leaves no trace

    generate.main(replace(how, fsdp=8, out=tmp_path / "sharded.npz"))
    with np.load(tmp_path / "sharded.npz") as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - averaged).max() <= 1
    with pytest.raises(UserError, match="--fsdp 3 does not divide the 8 devices"):
        generate.main(replace(how, fsdp=3))

    wrong = run("generate.py", "--run", folder, "--labels", "eleven", cache=cache)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown label 'eleven'") and wrong.stdout == ""


@pytest.mark.parametrize("how", [{"seed": 2**40}, {"seed": -1}, {"cfg_scale": float("inf")}])
def test_numbers_that_cannot_be_are_refused(params, how):
    with pytest.raises(
        UserError, match="must be finite" if "cfg_scale" in how else "must be in 0 …"
    ):
        pictures(params, [1], **how)
    with pytest.raises(UserError, match="no labels"):
        pictures(params, [])


def test_a_sampler_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="unknown solver 'rk4'"):
        Sampler(solver="rk4")
    with pytest.raises(UserError, match="must be at least 1"):
        replace(Sampler(), n_steps=0)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"solver": "ddpm"}, "--solver ddpm is not for a model trained by rectified flow"),
        ({"prediction": "v"}, "--solver euler is not for a model trained by DDPM, which takes"),
        ({"solver": "ddpm", "prediction": "v", "n_steps": 1001}, "1001; DDPM has 1000"),
        ({"solver": "ddpm", "prediction": "v", "eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"eta": 0.5}, "--eta 0.5 is for --solver ddim"),
        ({"solver": "ddpm", "prediction": "eps"}, "unknown prediction 'eps'"),
        ({"solver": "ddim", "prediction": "v", "eta": 1.5}, "--eta 1.5: must be between 0 and 1"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(how, message):
    with pytest.raises(UserError, match=message):
        Sampler(**how)


def test_channels_that_cannot_be_guided_are_refused(params):
    with pytest.raises(UserError, match="--guided_channels 3: the model's pictures have 1"):
        pictures(params, [1], sampler=Sampler(guided_channels=3))
    with pytest.raises(UserError, match="--guided_channels 1: without guidance"):
        pictures(params, [1], sampler=Sampler(guided_channels=1), cfg_scale=1.0)
    one = pictures(params, [1], sampler=Sampler(n_steps=3, guided_channels=1)).x
    np.testing.assert_allclose(one, pictures(params, [1]).x, atol=1e-6)
