"""Tiny DINOv2 encoders of random weights, as transformers writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
ORIGINAL_NAMES = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "attention.q_proj": "attn.qkv",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.gate_proj": "mlp.w12",
    "mlp.down_proj": "mlp.w3",
    "layernorm.": "norm.",
}
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 5 * 14,
}
VARIANTS = ("plain", "registers", "swiglu")


def random_dinov2(variant: str) -> Any:
    """A model of transformers with all weights random, those too that begin at 0 or 1."""
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
            x.copy_(torch.randn(x.shape) * (0.1 if x.ndim == 2 else 0.5))
            if "norm" in name and name.endswith("weight"):
                x.add_(1)
    return model.eval()


def write_dinov2(folder: Path, variant: str = "plain") -> Any:
    """Write such a model as `save_pretrained` does, and return it."""
    model = random_dinov2(variant)
    model.save_pretrained(folder)
    return model


def features_of_torch(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its class tokens and patches, of normalised images (b, h, w, 3)."""
    grid = (x.shape[1] // 14, x.shape[2] // 14)
    with torch.no_grad():
        tokens = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    return tokens[:, 0], tokens[:, -grid[0] * grid[1] :].reshape(len(x), *grid, -1)


def original_tensors(model: Any) -> dict[str, Any]:
    """The model's weights as facebookresearch/dinov2 names them, which joins q, k and v, and the
    two maps of SwiGLU.
    """
    weights = model.state_dict()
    found: dict[str, Any] = {}
    for name, x in weights.items():
        if any(part in name for part in ("k_proj", "v_proj", "mlp.up_proj")):
            continue
        if "q_proj" in name:
            x = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if "gate_proj" in name:
            x = torch.cat([x, weights[name.replace("gate_proj", "up_proj")]])
        for theirs, original in ORIGINAL_NAMES.items():
            name = name.replace(theirs, original)
        found[name] = x
    return found
