"""Transformers of other projects: the same outputs as there, exports that return bit for bit, and
errors that name the misfit.
"""

from dataclasses import replace

import jax
import pytest
from dit_cases import (
    assert_same,
    one_thread,  # noqa: F401
)
from torch_transformers import SMALL

from model import init_model_params
from pretrained import transformer

OTHERS = {
    "learned": {"position": "learned"},
    "rotary": {"rope": True, "qk_norm": True, "position": "none"},
    "swiglu": {"mlp": "swiglu", "norm": "rms"},
    "plain": {"block": "cross_attention"},
    "captions": {"n_classes": 0, "text_width": 6, "pooled_width": 5, "text_length": 4},
    "joint": {"block": "joint", "position": "cropped", "qk_norm": True},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_a_model_diffusers_cannot_hold_is_written_as_ours_and_comes_back_to_the_bit(
    fields, tmp_path
):
    config = replace(SMALL, time_scale=12.0, **fields)
    name, reason = transformer.choose_layout(config)
    assert name == ("MMDiT" if config.block == "joint" else "DiT")
    assert "cannot hold a model with" in reason
    params = init_model_params(config, jax.random.key(0))
    transformer.save_transformer(tmp_path / "ours", config, params, {"dataset": {}})
    loaded = transformer.load_transformer(str(tmp_path / "ours"), dtype="bfloat16")
    assert loaded.config == replace(config, dtype="bfloat16")
    assert_same(loaded.params, jax.device_get(params))
