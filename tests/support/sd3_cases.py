"""Inputs and helpers shared by the tests of sd3."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_text_encoders import save_clip, save_t5
from torch_autoencoders import nchw, nhwc, quiet, tensors_of

from data.batch import EncodedCaption
from model import JOINT, ModelConfig, model_graphdef
from pretrained import sd3

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
with quiet():
    diffusers = pytest.importorskip("diffusers")

PLAIN = ModelConfig(
    width=16,
    depth=3,
    n_heads=2,
    patch_size=2,
    image_size=8,
    channels=4,
    out_channels=4,
    n_classes=0,
    text_length=sd3.TEXT_LENGTH,
    text_width=24,
    pooled_width=16,
    caption_norm=False,
    block=JOINT,
    position="cropped",
    position_side=7,
    position_base=4,
)
CONFIGS = {
    "sd3": PLAIN,
    "sd3.5 large": replace(PLAIN, qk_norm=True, position_side=9, out_channels=3),
    "sd3.5 medium": replace(PLAIN, depth=4, n_dual=2, qk_norm=True),
    "all dual": replace(PLAIN, depth=2, n_dual=1),
    "published": replace(
        PLAIN, image_size=12, position="centred", position_side=16, position_base=6
    ),
}
rng = np.random.default_rng(0)
caption = EncodedCaption(
    rng.normal(size=(3, 7, 24)).astype(np.float16),
    np.ones((3, 7), bool),
    rng.normal(size=(3, 16)).astype(np.float16),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run torch on one thread: those of small models wait for each other beside other tests."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@functools.cache
def torch_transformer(config, *, seed=0):
    """As diffusers builds it. Norms and biases start as 1 and 0 and would hide a mistaken name."""
    with quiet():
        facts = {k: v for k, v in sd3.config_to_diffusers(config).items() if not k.startswith("_")}
        torch.manual_seed(seed)
        model = diffusers.SD3Transformer2DModel(**facts).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if config.position == "centred":
            model.pos_embed.pos_embed.copy_(torch.tensor(published_positions(config)))
    return model


def published_positions(config) -> np.ndarray:
    """Esser et al. 2024, §5.3.2, for a target of 16 · `position_base` pixels to a side."""
    h_max, s, d = config.position_side, config.position_base, config.width
    p = (np.arange(h_max) - (h_max - s) / 2) * 256 / (16 * s)
    angle = p[:, None] / 10_000 ** (np.arange(d // 4) / (d // 4))
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = [np.concatenate([axis[x], axis[y]]) for y in range(h_max) for x in range(h_max)]
    return np.stack(table)[None].astype(np.float32)


@functools.cache
def tensors_and_params(name):
    tensors = tensors_of(torch_transformer(CONFIGS[name]))
    return tensors, sd3.params_from_diffusers(tensors, CONFIGS[name], "torch")


t = np.array([0.03, 0.4, 1], np.float32)


def of_torch(model, x, t, caption):
    tokens, pooled = (torch.tensor(np.float32(v)) for v in (caption.tokens, caption.pooled))
    with torch.inference_mode():
        args = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        return nhwc(model(nchw(x), timestep=torch.tensor(1000 * t), **args).sample)


@functools.partial(jax.jit, static_argnums=0)
def of_ours(config, params, x, t, caption):
    return nnx.merge(model_graphdef(config), params)(x, t, caption)


# --- prompts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory):
    """CLIP-L, CLIP-G and T5; the second CLIP pads with another token than the first."""
    folder = tmp_path_factory.mktemp("text_encoders")
    large = save_clip(folder / "large", width=10, projected=10)
    giant = save_clip(folder / "giant", width=6, projected=6, seed=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(giant)
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(giant)
    return large, giant, save_t5(folder / "t5")


@pytest.fixture(scope="module")
def pipeline(encoder_folders):
    """diffusers' own, with a scheduler as published and without an autoencoder."""
    clip, t5 = transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel
    kinds = {"": clip, "_2": clip, "_3": t5}
    parts = {}
    for (suffix, kind), name in zip(kinds.items(), encoder_folders, strict=True):
        parts[f"text_encoder{suffix}"] = kind.from_pretrained(name).eval()
        parts[f"tokenizer{suffix}"] = transformers.AutoTokenizer.from_pretrained(name)
    with quiet():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts |= {"transformer": torch_transformer(CONFIGS["sd3.5 medium"])}
        parts |= {"scheduler": scheduler, "vae": None}
        made = diffusers.StableDiffusion3Pipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made
