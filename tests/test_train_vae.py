"""An autoencoder's training does what it says, goes on where it stopped, and is that of one device
on any number of them.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, run, start
from flax import nnx
from PIL import Image
from test_train import assert_same, metrics

from data.batch import Batch
from methods.rectified_flow import to_float
from networks import perceptual
from networks.autoencoder import AutoencoderConfig, Moments, mode, sample
from pretrained import autoencoder
from runtime import files, parallel
from runtime.errors import UserError
from train import Trainer
from training.autoencoder import losses
from training.autoencoder import trainer as autoencoder_trainer
from training.autoencoder.config import DEFAULTS, FILLED, VaeConfig, norm_groups
from training.autoencoder.losses import AutoencoderWithCritic, LossInputs
from training.autoencoder.trainer import VaeTrainer
from training.config import TrainConfig

COMMAND = "train_vae.py"
TINY = VaeConfig(
    block_out_channels=(8, 8),
    batch_size=8,
    n_steps=8,
    warmup_steps=2,
    log_every=3,
    eval_save_steps=6,
    sample_every_n=6,
    n_eval_batches=1,
    attention=False,
    gan_weight=0.5,
    gan_start=3,
)
FLAGS = [
    "--block_out_channels",
    "8,8",
    "--noattention",
    "--batch_size",
    "8",
    "--n_eval_batches",
    "1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> VaeTrainer:
    """A small run from beginning to end, with a critic from its middle on."""
    trainer = VaeTrainer(replace(TINY, run_dir=tmp_path_factory.mktemp("runs") / "whole"))
    trainer.fit()
    return trainer


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(whole):
    folder = whole.run_dir
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [3, 6, 6, 8]
    losses_of_critic = {"gan_loss", "critic_loss", "gan_weight"}
    assert {"loss", "pixel_loss", "gradient_loss", "kl", *losses_of_critic} < set(lines[0])
    assert all(lines[0][name] == 0 for name in losses_of_critic)  # it has not started
    assert all(lines[1][name] != 0 for name in losses_of_critic)
    assert lines[-1].keys() == {"step", "psnr"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"6", "8"}
    with Image.open(folder / "reconstructions" / "final.png") as picture:
        assert min(picture.size) > 256  # large enough for a person to see
    assert (folder / "reconstructions" / "0000006.png").exists()
    assert not list(folder.glob(".*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["command"] == COMMAND and config["image_size"] == 16


def test_the_exported_autoencoder_is_the_averaged_one_and_its_latents_have_unit_variance(whole):
    found = autoencoder.load(str(whole.run_dir / "vae"))
    image = whole.source.train.images(np.arange(48))
    for part, saved in zip(
        jax.tree.leaves(losses.without_critic(whole.state.ema)),
        jax.tree.leaves(found.params),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(part), saved)
    moments = found.model().encode(to_float(jnp.asarray(image)))
    z = (mode(moments) - found.config.shift_factor) * found.config.scaling_factor
    variance = jnp.exp(moments.log_variance) * found.config.scaling_factor**2
    assert abs(z.mean()) < 0.2
    assert abs(jnp.sqrt(z.var() + variance.mean()) - 1) < 0.1


def test_a_sheet_shows_originals_above_their_reconstructions(whole, monkeypatch):
    monkeypatch.setattr(VaeTrainer, "reconstruct", lambda self, image: 255 - image)
    sheet = np.asarray(whole.sheets()[0].convert("L"), int)
    height = (sheet.shape[0] - 4) // 4
    above, below = sheet[4 : height - 4], sheet[4 + height : 2 * height - 4]
    assert np.median(above + below) == 255


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    """At a step that is no multiple of anything, with the critic already there."""
    broken = VaeTrainer(replace(TINY, run_dir=tmp_path / "run"))
    honest_step = VaeTrainer.train_step

    def step(self, batch):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step(self, batch)

    monkeypatch.setattr(VaeTrainer, "train_step", step)
    with pytest.raises(SystemExit) as exit:
        broken.fit()
    assert exit.value.code == 143
    assert (tmp_path / "run" / "vae" / "config.json").exists()
    monkeypatch.undo()

    resumed = VaeTrainer.from_run(tmp_path / "run")
    assert resumed.step == 5
    resumed.fit()
    assert_same(resumed.state, whole.state)
    assert metrics(resumed.run_dir) == metrics(whole.run_dir)
    one, two = (
        (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (resumed.run_dir, whole.run_dir)
    )
    assert one == two


def test_a_run_is_resumed_by_the_command_that_began_it(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a run of train_vae.py, not of train.py"):
        Trainer(TrainConfig(run_dir=whole.run_dir, resume=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(whole.run_dir)
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer(TrainConfig(resume=True))
    assert VaeTrainer(VaeConfig(resume=True)).step == 8
    with pytest.raises(UserError, match="cannot resume: kl_weight was 1e-06, not 1"):
        VaeTrainer(VaeConfig(resume=True, kl_weight=1.0))


# --- the command line -----------------------------------------------------------------------------


def test_a_run_that_is_killed_politely_goes_on(tmp_path, cache):
    folder = tmp_path / "run"
    words = [COMMAND, *FLAGS, "--run_dir", folder, "--n_steps", "400", "--log_every", "1"]
    process = start(*words, cache=cache)
    until = time.time() + 120
    while not (folder / "metrics.jsonl").exists() or not metrics(folder):
        assert process.poll() is None and time.time() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err
    assert "no weights of LPIPS (--lpips): trained on L2 and the gradients of pictures" in out
    step = metrics(folder)[-1]["step"]
    assert (folder / "vae/config.json").exists()
    resume = [COMMAND, "--resume", "--run_dir", folder, "--n_steps", step + 2]
    result = run(*resume, cache=cache)
    assert result.returncode == 0, result.stderr
    assert f"going on at step {step}" in result.stdout and "PSNR" in result.stdout
    assert f"--image_size 16 --vae {folder}/vae" in result.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--kl_wait", "1"], "unknown flag --kl_wait; did you mean --kl_weight?"),
        (["--pixel_loss", "l3"], "unknown pixel_loss 'l3' (one of: l1, l2)"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(tmp_path, cache, flags, message):
    result = run(COMMAND, *flags, "--run_dir", tmp_path / "run", cache=cache)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kl_weight": -1.0}, "--kl_weight -1.0: must not be below 0"),
        ({"latent_channels": 0}, "--latent_channels 0: must be above 0"),
        ({"shuffle_buffer": 9}, "--shuffle_buffer is for --streaming"),
        ({"image_size": 18, "block_out_channels": (8, 8, 8)}, "18 is not divisible by 4: 3 widths"),
        ({"batch_size": 9}, "--batch_size 9 is not divisible by the 8 devices"),
        ({"lpips": "nowhere", "image_size": 8}, "at least 16 pixels"),
        ({"lpips": "nobody/nowhere"}, "no file or folder"),
        ({"gan_weight": 1.0, "accumulate_steps": 2, "batch_size": 16}, "drop --accumulate_steps"),
        ({"schedule": "sine"}, "unknown schedule"),
        ({"dataset_name": "digit"}, "did you mean 'digits'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        VaeTrainer(VaeConfig(run_dir=tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


def test_help_tells_every_flag():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, COMMAND, "--help"], cwd=ROOT, env=environment, capture_output=True
    )
    page = result.stdout.decode()
    assert result.returncode == 0
    assert all(f"--{field.name}=" in page for field in fields(VaeConfig))
    assert set(FILLED) >= set(DEFAULTS)


def test_every_field_is_read():
    """A setting that nothing reads is a promise that nobody keeps."""
    read = set()
    for module in ("train_vae.py", "train_vae_config.py", "train.py", "open_run.py"):
        tree = ast.parse((ROOT / module).read_text())
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "validate"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {node.attr} if owner in ("c", "config") else set()
    assert {field.name for field in fields(VaeConfig)} <= read


# --- the loss -------------------------------------------------------------------------------------

SMALL = AutoencoderConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 8),
    norm_num_groups=2,
    sample_size=16,
    mid_block_add_attention=False,
)
RESOLVED = replace(TINY, pixel_loss="l2", gradient_weight=0.1, kl_weight=1e-2, lpips_weight=1.0)


def noise(n: int = 8) -> Batch:
    """A batch of pictures that show nothing."""
    image = np.random.default_rng(0).integers(0, 255, (n, 16, 16, 1), dtype=np.uint8)
    row = np.arange(n, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(row, image, row))


@pytest.fixture(scope="module")
def adversaries():
    model = AutoencoderWithCritic(SMALL, dtype="float32", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


@pytest.mark.parametrize("name", ["objective", "adversarial"])
def test_any_number_of_devices_has_the_gradient_of_one(adversaries, name):
    graphdef, params = adversaries
    found = []
    for n in (1, 2):
        mesh = parallel.make_mesh(devices=jax.devices()[:n])
        mean = (parallel.device_mean,) if name == "adversarial" else ()
        loss = getattr(autoencoder_trainer, name)(RESOLVED, *mean)
        value_and_grad = jax.jit(parallel.value_and_grad(loss, graphdef, mesh))
        batch = parallel.place(noise(), mesh)
        given = LossInputs(jax.random.key(1), ())
        found.append(jax.device_get(value_and_grad(params, batch, given)))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-6)


def test_the_adversarial_gradient_is_that_of_its_parts(adversaries):
    """For the autoencoder, of the reconstruction, the KL, and the critic's opinion times λ; for the
    critic, of its hinge loss. Each differentiated by itself.
    """
    graphdef, params = adversaries
    batch, given, c = noise(), LossInputs(jax.random.key(1), ()), RESOLVED

    def pictures(params):
        model, image = nnx.merge(graphdef, params), to_float(batch.image)
        moments = model.encode(image)
        z = sample(moments, losses.row_keys(given.key, batch.row))
        return model, image, moments, model.decode(z)

    def plain(params):
        return losses.objective(c)(nnx.merge(graphdef, params), batch, given)[0]

    def near(params):
        _, image, _, picture = pictures(params)
        return losses.reconstruction_loss(c)(picture, image, ())[0]

    def fools(params):
        model, _, _, picture = pictures(params)
        return perceptual.hinge_generator(model.discriminator(picture))

    def tells(params):
        model, image, _, picture = pictures(params)
        return perceptual.hinge_critic(model.discriminator(image), model.discriminator(picture))

    def both(params):
        return losses.adversarial(c)(nnx.merge(graphdef, params), batch, given)

    grads, reported = jax.jit(jax.grad(both, has_aux=True))(params)
    parts = jax.jit(lambda p: [jax.grad(part)(p) for part in (plain, near, fools, tells)])(params)
    of_plain, of_near, of_fools, of_tells = parts
    last = [tree["decoder"]["conv_out"]["kernel"] for tree in (of_near, of_fools)]
    weight = c.gan_weight * perceptual.adaptive_weight(*last)
    np.testing.assert_allclose(reported["gan_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(
        perceptual.norm(weight * last[1]), c.gan_weight * perceptual.norm(last[0]), rtol=1e-2
    )
    for name in params:
        expected = of_tells[name]
        if name != "discriminator":
            expected = jax.tree.map(lambda a, b: a + weight * b, of_plain[name], of_fools[name])
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_each_row_draws_its_own_noise_by_its_place_alone():
    moments = Moments(jnp.zeros((4, 2, 2, 3)), jnp.zeros((4, 2, 2, 3)))
    key = jax.random.key(0)
    z = sample(moments, losses.row_keys(key, jnp.arange(4)))
    part = Moments(*(x[2:] for x in moments))
    of_part = sample(part, losses.row_keys(key, jnp.arange(2, 4)))
    np.testing.assert_array_equal(of_part, z[2:])
    assert len(np.unique(np.asarray(z))) == z.size


def test_lpips_is_a_part_of_the_distance_where_it_has_weights(adversaries):
    graphdef, params = adversaries
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape, scale=0.05)), jnp.float32),
        perceptual.lpips_shapes(),
    )
    loss, model = losses.objective(RESOLVED), nnx.merge(graphdef, params)
    without, _ = loss(model, noise(2), LossInputs(jax.random.key(0), ()))
    total, reported = loss(model, noise(2), LossInputs(jax.random.key(0), weights))
    assert reported["lpips_loss"] > 0
    np.testing.assert_allclose(total - without, reported["lpips_loss"], rtol=1e-3)
    mesh = parallel.make_mesh(devices=jax.devices()[:2])
    loss = losses.adversarial(RESOLVED, parallel.device_mean)
    value_and_grad = parallel.value_and_grad(loss, graphdef, mesh)
    given = LossInputs(jax.random.key(0), weights)
    (_, reported), grads = jax.eval_shape(value_and_grad, params, noise(2), given)
    assert "lpips_loss" in reported and jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "widths, groups", [((128, 256, 512, 512), 32), ((32, 64), 8), ((8, 12), 1), ((6,), 1)]
)
def test_a_group_of_channels_is_no_channel_alone(widths, groups):
    assert norm_groups(widths) == groups


# --- an export is whole or not there --------------------------------------------------------------


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    def write(content: str, fail: bool = False):
        with files.atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(content)
            if fail:
                raise RuntimeError

    write("old")
    with pytest.raises(RuntimeError):
        write("half", fail=True)
    assert (tmp_path / "x" / "file").read_text() == "old"
    write("new")
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / ".x.999999999.tmp").mkdir()  # of a process that was killed
    files.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
