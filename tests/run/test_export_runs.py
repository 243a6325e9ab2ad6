"""An exported folder computes what its run computes, describes it, and is never half written."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from export_cases import (
    SMALL,
    folder,  # noqa: F401
    trained,  # noqa: F401
)
from flax import nnx
from torch_autoencoders import nchw, nhwc, quiet

import export
import generate
from export import ExportConfig
from generate import GenerateConfig
from inference import grids
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from model import model_graphdef
from pretrained import transformer
from runtime.errors import UserError
from train import Trainer


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))


def first_code_block(card, heading):
    """Return the first block of Python under a heading."""
    return card.partition(heading)[2].partition("```python\n")[2].partition("```")[0]


def test_averaged_weights_are_written_by_default(trained, folder, tmp_path):
    found = transformer.load_transformer(str(folder))
    assert_same(found.params, trained.state.ema)
    assert found.config == trained.model_config
    export.main(ExportConfig(run=trained.run_dir, out=tmp_path / "raw", ema=False))
    assert_same(transformer.load_transformer(str(tmp_path / "raw")).params, trained.state.params)


def test_the_cards_code_makes_diffusers_compute_the_same(trained, folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    code = first_code_block((folder / "README.md").read_text(), "## In diffusers")
    names = {}
    with quiet():
        exec(code.replace("PATH_OR_ID", str(folder)), names)
    x = np.asarray(jax.random.normal(jax.random.key(3), (3, 8, 8, 1)))
    k, label = np.array([0, 500, 999]), np.array([1, 7, 10])
    with torch.no_grad():
        theirs = names["model"](nchw(x), torch.from_numpy(k), torch.from_numpy(label)).sample
    model = nnx.merge(model_graphdef(trained.model_config), trained.state.ema)
    ours = jax.jit(model)(x := jnp.asarray(x), jnp.asarray(k / 1000), jnp.asarray(label))
    np.testing.assert_allclose(nhwc(theirs), ours, rtol=0, atol=2e-5)


def test_the_cards_code_loads_the_model_here(folder):
    code = first_code_block((folder / "README.md").read_text(), "## Here")
    names = {}
    exec(code.replace("PATH_OR_ID", str(folder)), names)
    assert names["exported"].id == str(folder)
    x, t, label = jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, int)
    assert names["model"](x, t, label).shape == (1, 8, 8, 2)


def test_the_exported_model_samples_what_the_run_samples(trained, folder):
    found = TrainedModel.from_pretrained(str(folder))
    expected = SamplingPlan(trained.sampler(), trained.config.cfg_scale)
    assert found.plan(SamplingOverrides()) == expected
    assert found.label_names == list(trained.dataset.label_names)
    samples = found.sample([3, 7], found.plan(SamplingOverrides()))
    np.testing.assert_allclose(samples.x, trained.sample([3, 7]), atol=1e-5)


def test_generate_samples_from_the_exported_model(trained, folder, tmp_path):
    config = GenerateConfig(pretrained=str(folder), labels=("3", "7"), n=2, out=tmp_path / "a.npz")
    generate.main(config)
    samples = np.load(tmp_path / "a.npz")["arr_0"]
    expected = grids.to_uint8(trained.sample([3, 7]))
    assert np.abs(samples.astype(int) - expected).max() <= 1


def test_the_card_describes_the_model_and_its_training(trained, folder):
    card = (folder / "README.md").read_text()
    n = sum(x.size for x in jax.tree.leaves(trained.state.params))
    assert f"DiT-Nano/4 trained on digits: {n / 1e6:.3g} M parameters" in card
    assert "It generates images of 8×8×1 in −1 … 1." in card
    assert "It is conditioned on one of 10 classes; 10 is the null label." in card
    assert "It predicts epsilon, then the variance of each step" in card
    words = "python train.py --dataset_name digits --model DiT-Nano/4 --nohalf_precision"
    words += " --objective ddpm --learned_sigma --n_steps 2 --batch_size 8 --warmup_steps 1"
    assert f"{words} --weight_decay 0.1\n" in card
    assert "Not chosen yet by the owner" in card


def test_a_model_that_diffusers_cannot_hold_is_written_in_our_layout(tmp_path, capsys):
    odd = replace(SMALL, rope=True, position="learned", image_size="8x16")
    trainer = Trainer(replace(odd, run_dir=tmp_path / "run"))
    trainer.save()
    config = ExportConfig(run=tmp_path / "run", out=tmp_path / "out")
    reason = "diffusers' DiTTransformer2DModel cannot hold a model with position learned, rope "
    reason += "True, image_size 8x16, which is not square"
    with pytest.raises(UserError, match=f"--layout diffusers: {reason}; leave --layout out"):
        export.main(replace(config, layout="diffusers"))
    assert not (tmp_path / "out").exists()
    export.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"step 0 of {tmp_path / 'run'} as DiT: {tmp_path / 'out'}",
        f"this is the project's own layout: {reason}",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "DiT"
    found = transformer.load_transformer(str(tmp_path / "out"))
    assert_same(found.params, trainer.state.ema)
    assert "diffusers" not in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_is_not_empty_is_left_alone(trained, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"my-dit' already exists; name a new folder by --out"):
        export.main(ExportConfig(run=trained.run_dir, out=folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*out': Not a directory"):
        export.main(ExportConfig(run=trained.run_dir, out=tmp_path / "file" / "out"))
