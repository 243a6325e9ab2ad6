"""Adapters in PEFT's names: diffusers loads them and predicts the same, and they return."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sd3_cases import (
    CONFIGS,
    caption,
    one_thread,  # noqa: F401
    torch,
    torch_transformer,
)
from torch_autoencoders import nchw, nhwc, quiet, tensors_of
from torch_transformers import CONFIGS as DIT_CONFIGS

from model import init_model_params, model_graphdef
from networks.lora import LoraConfig, merge_adapters, split_adapter
from pretrained import lora, sd3, transformer, weight_files
from runtime import parallel
from runtime.errors import UserError

pytest.importorskip("peft")
LORA = LoraConfig(rank=3, alpha=4.0)
MEDIUM = CONFIGS["sd3.5 medium"]
DIT = DIT_CONFIGS["small"]


def adapters_of(config, **changes):
    """Random adapters, and all weights of the network with them merged."""
    lora_config = replace(LORA, **changes)
    adapted = replace(config, lora=lora_config)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_model_params(adapted, jax.random.key(0)))
    params = jax.tree.map(lambda p: jnp.float32(rng.normal(scale=0.2, size=p.shape)), shapes)
    return adapted, *split_adapter(params, lora_config)


def test_diffusers_predicts_the_same(tmp_path):
    adapted, own, _ = adapters_of(MEDIUM)
    lora.save_adapter(tmp_path / "a.safetensors", own, adapted, [])
    theirs = torch_transformer(MEDIUM, seed=3)
    base = jax.tree.map(jnp.asarray, sd3.params_from_diffusers(tensors_of(theirs), MEDIUM, "torch"))
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 4)).astype(np.float32)
    t = np.array([0.03, 0.4, 1], np.float32)
    merged = merge_adapters(parallel.join_trees(split_adapter(base, LORA)[1], own), LORA)
    ours = jax.jit(nnx.merge(model_graphdef(MEDIUM), merged))(x, t, caption)
    tokens, pooled = (torch.tensor(np.float32(v)) for v in (caption.tokens, caption.pooled))

    def of_torch():
        with torch.inference_mode():
            args = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
            return nhwc(theirs(nchw(x), timestep=torch.tensor(1000 * t), **args).sample)

    before = of_torch()
    with quiet():
        theirs.load_lora_adapter(str(tmp_path / "a.safetensors"))
    assert abs(of_torch() - before).max() > 0.1
    np.testing.assert_allclose(ours, of_torch(), atol=2e-5 * abs(ours).max())


@pytest.mark.parametrize("config", [MEDIUM, DIT], ids=["SD3", "DiT"])
def test_adapters_return(config, tmp_path):
    """The file added to the base gives the merged weights, and the new table of classes."""
    is_dit = bool(config.n_classes)
    adapted, own, frozen = adapters_of(config, full_parts=("label",) if is_dit else ())
    file = tmp_path / "a.safetensors"
    names = [f"class {i}" for i in range(config.n_classes)]
    lora.save_adapter(file, own, adapted, names)
    base = init_model_params(config, jax.random.key(0)) | frozen
    published = transformer.PretrainedTransformer(config, base, {"dataset": {}}, "base")
    found = lora.with_adapter(published, file)
    merged = merge_adapters(parallel.join_trees(frozen, own), LORA)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.params, merged)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    if is_dit:
        assert found.settings["dataset"]["label_names"] == names


def test_scales_of_other_files_are_read(tmp_path):
    """Without metadata α is the rank; a pattern or a tensor of α goes before that of all."""
    name = "transformer_blocks.0.attn.to_q"
    a, b = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)

    def scale(metadata=None, prefix="transformer.", **more):
        tensors = {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        tensors |= {f"{prefix}{name}.{key}": value for key, value in more.items()}
        facts = {lora.METADATA: json.dumps(metadata)} if metadata else {}
        weight_files.write_safetensors(tmp_path / "b.safetensors", tensors, facts)
        return lora.read_adapter(tmp_path / "b.safetensors").changes[name][0, 0] / 2

    assert scale() == 1
    assert scale(prefix="base_model.model.") == 1
    assert scale({"transformer.lora_alpha": 8}) == 4
    assert (
        scale({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 1}}) == 0.5
    )
    assert scale({"transformer.lora_alpha": 8, "transformer.use_rslora": True}) == pytest.approx(
        8 / 2**0.5
    )
    assert scale(alpha=np.full(1, 6, np.float32)) == 3
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert scale(prefix="base_model.model.") == 4


def test_files_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "c.safetensors"
    a, b = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)

    def with_module(name, a=a, b=b):
        tensors = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        weight_files.write_safetensors(file, tensors, {})

    config = MEDIUM
    base = transformer.PretrainedTransformer(
        config, init_model_params(config, jax.random.key(0)), {"dataset": {}}, "base"
    )
    with_module("single_transformer_blocks.0.attn.to_q")
    with pytest.raises(UserError, match=r"of another model.*which is unknown here"):
        lora.with_adapter(base, file)
    with_module("transformer_blocks.0.attn.to_q", b=np.ones((8, 2), np.float32))
    with pytest.raises(UserError, match=r"of \(8, 16\), which is of \(16, 16\) here"):
        lora.with_adapter(base, file)
    weight_files.write_safetensors(file, {"lora_unet_x.lora_down.weight": a}, {})
    with pytest.raises(UserError, match="no adapter with PEFT's names"):
        lora.read_adapter(file)
    with_module("transformer_blocks.0.attn.to_q", b=np.ones((16, 3), np.float32))
    with pytest.raises(UserError, match="has rank 2, and its lora_B 3"):
        lora.read_adapter(file)
    tensors = {"text_encoder.x.lora_A.weight": a, "text_encoder.x.lora_B.weight": b}
    weight_files.write_safetensors(file, tensors, {})
    with pytest.raises(UserError, match="adapters of text encoders are not supported"):
        lora.read_adapter(file)
    weight_files.write_safetensors(file, {"x.lora_A.weight": a}, {lora.METADATA: "[]"})
    with pytest.raises(UserError, match="is damaged: its lora_adapter_metadata is list"):
        lora.read_adapter(file)
    weight_files.write_safetensors(file, {"x.lora_A.weight": a}, {})
    with pytest.raises(UserError, match=r"without its x\.lora_B\.weight"):
        lora.read_adapter(file)
    adapted, own, _ = adapters_of(replace(config, rope=True))
    with pytest.raises(UserError, match="cannot hold a model with rope"):
        lora.save_adapter(file, own, adapted, [])
    adapted, own, _ = adapters_of(config, full_parts=("patch",))
    with pytest.raises(UserError, match="patch: trained in full"):
        lora.save_adapter(file, own, adapted, [])
