"""DiTs of diffusers with random weights, under the original's names too; and SiT as its paper has
it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from torch_autoencoders import quiet

from model import ModelConfig
from pretrained.dit import config_to_diffusers

SMALL = ModelConfig(
    width=32,
    depth=2,
    n_heads=4,
    patch_size=2,
    image_size=8,
    channels=4,
    out_channels=8,
    n_classes=10,
)
WIDE = replace(SMALL, width=48, depth=3, n_heads=2, patch_size=4, image_size=16, n_classes=3)
GREY = replace(SMALL, width=16, n_heads=1, patch_size=1, image_size=5, channels=1, out_channels=1)
GREY = replace(GREY, n_classes=0)
CONFIGS = {"small": SMALL, "wide": WIDE, "grey": GREY}


def torch_dit(config, *, seed=0):
    """As diffusers builds it, away from its start, and with the config's frequencies of time."""
    torch = pytest.importorskip("torch")
    with quiet():
        diffusers = pytest.importorskip("diffusers")
        facts = {k: v for k, v in config_to_diffusers(config).items() if not k.startswith("_")}
        torch.manual_seed(seed)
        model = diffusers.DiTTransformer2DModel(**facts).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    embedders = [block.norm1.emb for block in model.transformer_blocks]
    for embedder in embedders[1:]:
        embedder.load_state_dict(embedders[0].state_dict())
    for embedder in () if config.time_endpoint else embedders:
        embedder.time_proj.downscale_freq_shift = 0
    return model


def original_names(model):
    """The state of diffusers' model under the original's names, its table of positions included."""
    import torch

    state = model.state_dict()
    renamed = {"pos_embed": model.pos_embed.pos_embed}
    plain = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    }
    embedding = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    renamed["y_embedder.embedding_table.weight"] = state[embedding]
    for i in range(len(model.transformer_blocks)):
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        plain |= {
            f"{there}.norm1.linear": f"{here}.adaLN_modulation.1",
            f"{there}.attn1.to_out.0": f"{here}.attn.proj",
            f"{there}.ff.net.0.proj": f"{here}.mlp.fc1",
            f"{there}.ff.net.2": f"{here}.mlp.fc2",
        }
        for part in ("weight", "bias"):
            parts = [state[f"{there}.attn1.to_{p}.{part}"] for p in "qkv"]
            renamed[f"{here}.attn.qkv.{part}"] = torch.cat(parts)
    for theirs, original in plain.items():
        for part in ("weight", "bias"):
            renamed[f"{original}.{part}"] = state[f"{theirs}.{part}"]
    return renamed


def sit(state, x, t, label, *, n_heads):
    """Compute SiT's velocity (Ma et al. 2024) of images (b c h w) from the original's weights.

    It is DiT's network (Peebles & Xie 2023, fig. 3), conditioned on t itself.
    """
    import torch
    from torch.nn import functional as F

    def linear(name, y):
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(y, shift, scale):
        y = F.layer_norm(y, y.shape[-1:], eps=1e-6)
        return y * (1 + scale[:, None]) + shift[:, None]

    frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angle = t[:, None] * frequency
    features = torch.cat([angle.cos(), angle.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][label])

    kernel = state["x_embedder.proj.weight"]
    width, _, p, _ = kernel.shape
    y = F.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=p)
    rows = y.shape[-1]
    y = y.flatten(2).transpose(1, 2) + state["pos_embed"]
    for i in range(sum(name.endswith("attn.qkv.bias") for name in state)):
        block = f"blocks.{i}"
        m = linear(f"{block}.adaLN_modulation.1", c).split(width, dim=1)
        qkv = linear(f"{block}.attn.qkv", norm(y, m[0], m[1])).split(width, dim=2)
        q, k, v = (z.unflatten(2, (n_heads, -1)).transpose(1, 2) for z in qkv)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        attended = linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        y = y + m[2][:, None] * attended
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(y, m[3], m[4])), approximate="tanh")
        y = y + m[5][:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(width, dim=1)
    y = linear("final_layer.linear", norm(y, shift, scale))
    y = y.reshape(len(y), rows, rows, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(len(y), -1, rows * p, rows * p)[:, : x.shape[1]]


def inputs(config):
    """Make images (b h w c), steps of a thousand, and labels that include the null label."""
    random = np.random.default_rng(0)
    shape = (3, config.image_size, config.image_size, config.channels)
    x = random.standard_normal(shape).astype(np.float32)
    label = np.minimum([0, 1, config.n_classes], config.n_classes)
    return x, np.array([0, 421, 999]), np.int32(label)
