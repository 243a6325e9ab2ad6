"""Single files of autoencoders are read as diffusers reads them, and never on a guessed scale."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from dit_cases import (
    assert_same,
    one_thread,  # noqa: F401
)
from original_names import latent_diffusion_names
from torch_autoencoders import nchw, nhwc, params_of, quiet, tensors_of, torch_autoencoder

from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder
from runtime.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
with quiet():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

# Latent diffusion's norms have 32 groups, and four levels make an eighth of the size.
SD = AutoencoderConfig(block_out_channels=(32, 32, 64, 32))
SDXL = replace(SD, scaling_factor=0.13025)
SD3 = replace(
    SD,
    latent_channels=16,
    layers_per_block=2,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
CONFIGS = {"sd": SD, "sdxl": SDXL, "sd3": SD3}
PREFIX = "first_stage_model."
UNET = "model.diffusion_model.input_blocks.0.0.weight"
# What lies beside the VAE in a file of a whole Stable Diffusion, and its family.
BESIDE = [
    ("cond_stage_model.transformer.text_model.embeddings.position_ids", "sd"),
    ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "sdxl"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "sd3"),
]


@cache
def model(name):
    return torch_autoencoder(CONFIGS[name])


@cache
def state(name):
    return latent_diffusion_names(model(name))


def prefixed(tensors, prefix=PREFIX):
    return {f"{prefix}{name}": x for name, x in tensors.items()}


def load(tensors, path, family="", **options):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(tensors, path, options.pop("metadata", None))
    else:
        torch.save(tensors, path)
    return autoencoder.load_autoencoder(f"{family}{path}", **options)


@pytest.mark.parametrize(("beside", "name"), BESIDE)
def test_the_vae_of_a_whole_file_is_as_diffusers_converts_it(beside, name, tmp_path):
    theirs, tensors = model(name), prefixed(state(name)) | {UNET: torch.ones(2)}
    converted = convert_ldm_vae_checkpoint(dict(tensors), dict(theirs.config))
    assert_same({k: x.numpy() for k, x in converted.items()}, tensors_of(theirs))
    loaded = load(tensors | {beside: torch.ones(3)}, tmp_path / "a.safetensors")
    assert loaded.config == CONFIGS[name] and loaded.id == str(tmp_path / "a.safetensors")
    assert_same(loaded.params, params_of(theirs, CONFIGS[name]))
    # What the file tells of its latents counts beside another model too.
    assert autoencoder.load_autoencoder(loaded.id, scale=(0.5, 0.1)).config == CONFIGS[name]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_vae_of_a_file_computes_what_diffusers_does(name, tmp_path):
    theirs, rng = model(name), np.random.default_rng(0)
    loaded = load(state(name), tmp_path / "a.safetensors", f"{name}:")
    image = rng.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    z = rng.normal(size=(1, 2, 2, CONFIGS[name].latent_channels)).astype(np.float32)
    with torch.no_grad():
        mean = nhwc(theirs.encode(nchw(image)).latent_dist.mean)
        decoded = nhwc(theirs.decode(nchw(z)).sample)

    @jax.jit
    def compute(image, z):
        ours = loaded.model()
        return ours.encode(image).mean, ours.decode(z)

    for actual, expected in zip(compute(image, z), (mean, decoded), strict=True):
        assert expected.std() > 0.01
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def in_state_dict(tensors):
    return {"state_dict": tensors | {"loss.logvar": torch.ones(()), "loss.lpips.w": torch.ones(2)}}


def in_diffusers_names(_):
    return {name: x.clone() for name, x in model("sd").state_dict().items()}


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (in_state_dict, "ckpt"),
        (lambda tensors: {"epoch": 3, "ema": prefixed(tensors, "module.")}, "pt"),
        (lambda tensors: prefixed(tensors, "_orig_mod.vae."), "safetensors"),
        (in_diffusers_names, "safetensors"),
        (lambda tensors: {name: x.half() for name, x in tensors.items()}, "safetensors"),
    ],
)
def test_a_vae_alone_is_read_in_any_wrapping(wrap, suffix, tmp_path):
    loaded = load(wrap(state("sd")), path := tmp_path / f"a.{suffix}", "sdxl:")
    assert loaded.config == SDXL and loaded.id == f"sdxl:{path}"
    kernel = loaded.params["encoder"]["conv_in"]["kernel"]
    expected = params_of(model("sd"), SD)["encoder"]["conv_in"]["kernel"]
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-3)
    again = autoencoder.load_autoencoder(loaded.id)
    assert again.hash == loaded.hash and again.config == SDXL


def test_a_scale_that_the_file_does_not_tell_is_asked_for(tmp_path):
    path = tmp_path / "vae.safetensors"
    with pytest.raises(UserError, match=rf"name it as sd:{path} or sdxl:{path}$"):
        load(state("sd"), path)
    latents_are_scaled_by = (0.5, 0.1)
    config = autoencoder.load_autoencoder(str(path), scale=latents_are_scaled_by).config
    assert (config.scaling_factor, config.shift_factor) == latents_are_scaled_by
    with pytest.raises(UserError, match=rf"name it as sd3:{path} or flux:{path}$"):
        load(state("sd3"), path)
    described = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    assert load(state("sd"), path, metadata=described).config == SDXL


BOTH = {name: torch.ones(2) for name, _ in BESIDE[:2]}


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        ("sd3:", {}, "has latents of 4 channels; sd3 has 16"),
        ("sd:", {BESIDE[1][0]: torch.ones(2)}, "is of sdxl by what else is in it: leave out sd:"),
        ("", BOTH, "does not tell the scale of its latents"),
        ("", {"edm_mean": torch.ones(4)}, "scales latents channel by channel, by its edm_mean"),
        (
            "sd:",
            {f"{PREFIX}encoder.down.3.attn.0.q.bias": torch.ones(4)},
            "it has no place for enc",
        ),
        ("sd:", {f"{PREFIX}decoder.conv_in.weight": None}, "it lacks decoder.conv_in.weight"),
        ("sd:", {f"{PREFIX}decoder.norm_out.bias": None}, "it lacks decoder.conv_norm_out.bias"),
        (
            "sd:",
            {f"{PREFIX}encoder.conv_norm_out.bias": torch.ones(64)},
            "conv_norm_out.bias twice",
        ),
        ("sd:", {f"{PREFIX}encoder.conv_in.weight": None}, "it lacks encoder.conv_in.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(family, tensors, message, tmp_path):
    tensors = {k: x for k, x in (prefixed(state("sd")) | tensors).items() if x is not None}
    with pytest.raises(UserError, match=message) as error:
        load(tensors, tmp_path / "a.safetensors", family)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_upscalers_vae_is_not_on_the_scale_of_others(tmp_path):
    """Stable Diffusion's upscaler has text encoders of the same name, and a VAE of a quarter."""
    small = latent_diffusion_names(torch_autoencoder(replace(SD, block_out_channels=(32, 32, 32))))
    with pytest.raises(UserError, match="does not tell the scale of its latents"):
        load(prefixed(small) | {BESIDE[0][0]: torch.ones(2)}, tmp_path / "a.safetensors")


def test_a_file_beside_its_config_names_the_folder(tmp_path):
    with quiet():
        model("sd").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=f"is a part of '{tmp_path}': name the folder"):
        autoencoder.load_autoencoder(str(file))
    with pytest.raises(UserError, match="sdxl: is for a file of weights"):
        autoencoder.load_autoencoder(f"sdxl:{tmp_path}")
