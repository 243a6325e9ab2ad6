"""Tiny DINOv2 encoders of random weights, as transformers writes them."""

from pathlib import Path
from typing import Any

import pytest

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 5 * 14,
}
VARIANTS = ("plain", "registers", "swiglu")


def random_dinov2(variant: str) -> Any:
    """A model of transformers with all weights random, those too that begin at 0 or 1."""
    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if variant == "registers":
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **SHAPE)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.Dinov2Config(use_swiglu_ffn=variant == "swiglu", **SHAPE)
        model = transformers.Dinov2Model(config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn(x.shape) * (0.2 if x.ndim > 1 else 0.5))
            if "norm" in name and name.endswith("weight"):
                x.add_(1)
    return model.eval()


def write_dinov2(folder: Path, variant: str = "plain") -> Any:
    """Write such a model as `save_pretrained` does, and return it."""
    model = random_dinov2(variant)
    model.save_pretrained(folder)
    return model
