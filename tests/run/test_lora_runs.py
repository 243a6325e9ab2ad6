"""A run that trains adapters keeps its base as it is, finds it again, and resumes bit for bit."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import (
    SMALL,
    trained,  # noqa: F401
)
from parallel_cases import CONFIGS, LOSS, MESHES, batch_of, key, quickly_compiled, weights
from train_cases import assert_same

import export
from export import ExportConfig
from inference.trained_model import TrainedModel
from model import model_graphdef
from networks.lora import LoraConfig, merge_adapters, split_adapter
from pretrained.lora import with_adapter
from pretrained.transformer import load_transformer
from runtime import parallel
from runtime.errors import UserError
from train import Trainer

LORA = LoraConfig(rank=4, alpha=8.0, full_parts=("label",))


def test_gradients_are_those_of_a_network_of_which_all_is_trained():
    """A frozen base, sharded too, leaves the gradients of the adapters as they are."""
    config = replace(CONFIGS["DiT"], lora=LORA)
    params = jax.tree.map(jnp.asarray, weights(config))

    def gradients(mesh, own, **base):
        run = parallel.value_and_grad(LOSS, model_graphdef(config), mesh)
        frozen = {name: parallel.shard_params(tree, mesh) for name, tree in base.items()}
        batch = parallel.shard_rows(batch_of(16, config), mesh)
        return quickly_compiled(partial(run, **frozen))(
            parallel.shard_params(own, mesh), batch, key
        )

    (expected, _), all_grads = gradients(MESHES["1 device"], params)
    of_own, _ = split_adapter(all_grads, LORA)
    own, base = split_adapter(params, LORA)
    for mesh in (MESHES["1 device"], MESHES["hybrid 2x4"]):
        (loss, _), grads = gradients(mesh, own, base=base)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for ours, theirs in zip(*map(jax.tree.leaves, (grads, of_own)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * abs(np.asarray(theirs)).max())


@pytest.fixture(scope="module")
def config(trained):
    """Of adapters of an earlier run's averaged weights."""
    return replace(SMALL, init_from=str(trained.run_dir), lora_rank=4, n_steps=4)


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory):
    trainer = Trainer(replace(config, run_dir=tmp_path_factory.mktemp("runs") / "lora"))
    base = jax.device_get(trainer.base)
    trainer.fit()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.base), base)
    return trainer


def test_it_resumes_bit_for_bit_with_its_base_elsewhere(trained, config, adapted, tmp_path):
    run = tmp_path / "run"
    Trainer(replace(config, run_dir=run)).fit(2)
    saved = json.loads((run / "config.json").read_text())
    assert saved["init_from"] == f"{trained.run_dir}@0" and len(saved["base_hash"]) == 64
    moved = trained.run_dir.rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match=r"@0: there is no such run or file; .* by --init_from"):
            Trainer.from_run(run)
        with pytest.raises(UserError, match=r"their base .*@0 cannot be read: .*"):
            TrainedModel.from_run(run).load_weights()
        TrainedModel.from_run(run, base=str(moved)).load_weights()
        resumed = Trainer(replace(config, run_dir=run, resume=True, init_from=str(moved)))
        resumed.fit()
        assert_same(resumed.state, adapted.state)
    finally:
        moved.rename(trained.run_dir)
    export.main(ExportConfig(run=trained.run_dir, out=tmp_path / "base"))
    base = str(tmp_path / "base")
    assert Trainer(replace(config, run_dir=run, resume=True, init_from=base)).step == 4
    with pytest.raises(UserError, match="lora_rank was 4, not 8"):
        Trainer(replace(config, lora_rank=8, run_dir=run, resume=True))
    with pytest.raises(UserError, match="whose weights have changed since"):
        TrainedModel.from_run(run, base=str(other_weights(trained, tmp_path))).load_weights()
    with pytest.raises(UserError, match="it holds adapters itself"):
        Trainer(replace(config, init_from=str(adapted.run_dir)))


def test_a_sharded_base_trains_as_a_whole_one(config, adapted, tmp_path):
    """The weights of each layer, the base's and the adapters', lie on four devices."""
    sharded = Trainer(replace(config, fsdp=4, run_dir=tmp_path / "run"))
    whole = jax.tree.leaves(sharded.base["blocks"])[-1]
    assert whole.addressable_shards[0].data.size * 4 == whole.size
    sharded.fit()
    for ours, theirs in zip(
        *map(jax.tree.leaves, (sharded.state.params, adapted.state.params)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def other_weights(trained, tmp_path):
    export.main(ExportConfig(run=trained.run_dir, ema=False, out=tmp_path / "raw"))
    return tmp_path / "raw"


def test_it_samples_from_the_base_with_its_adapters(trained, adapted):
    """The checkpoint holds no weight of the base, and what is loaded is whole."""
    expected = merge_adapters(adapted.averaged_weights, adapted.model_config.lora)
    found = TrainedModel.from_run(adapted.run_dir)
    assert found.model == trained.model_config
    for ours, theirs in zip(*map(jax.tree.leaves, (found.params, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)
    own = jax.tree.leaves(adapted.state.ema)
    assert sum(x.size for x in own) < 0.4 * sum(x.size for x in jax.tree.leaves(expected))
    _, base = split_adapter(trained.state.ema, LORA)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(adapted.base), jax.device_get(base))
    moved = jax.tree.map(lambda x: float(abs(x).max()), adapted.state.params)
    assert moved["blocks"]["mlp"]["up"]["low_rank"]["b"] > 0
    assert (adapted.state.params["label"]["table"] != trained.state.ema["label"]["table"]).any()


def test_its_export_is_a_whole_model_or_a_file_for_the_base(trained, adapted, tmp_path):
    run = adapted.run_dir
    export.main(ExportConfig(run=run, out=tmp_path / "whole"))
    export.main(ExportConfig(run=trained.run_dir, out=tmp_path / "base"))
    export.main(ExportConfig(run=run, lora=tmp_path / "a.safetensors"))
    whole = load_transformer(str(tmp_path / "whole"))
    joined = with_adapter(load_transformer(str(tmp_path / "base")), tmp_path / "a.safetensors")
    assert joined.settings["dataset"]["label_names"] == [str(i) for i in range(10)]
    for ours, theirs in zip(*map(jax.tree.leaves, (joined.params, whole.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for flags, message in (
        ({"run": run}, "takes --out FOLDER, or --lora FILE.safetensors"),
        ({"run": trained.run_dir, "lora": tmp_path / "b.safetensors"}, "has no adapters"),
        ({"run": run, "lora": tmp_path / "a.safetensors"}, "name a new file"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(ExportConfig(**flags))


def test_what_adapters_cannot_be_trained_with_is_refused(config):
    for changes, message in (
        ({"init_from": None}, "--lora_rank 4 adapts another model"),
        ({"optimizer": "muon"}, "--optimizer muon: it updates the blocks' matrices"),
        ({"mup": 16}, "--mup 16 is for weights that start fresh"),
        ({"lora_targets": ("bias",)}, "lora_targets"),
        ({"lora_rank": 0, "lora_alpha": 3.0}, "lora_alpha"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(replace(config, **changes))
