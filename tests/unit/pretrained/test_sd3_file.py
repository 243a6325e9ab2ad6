"""Single files of SD3 under Stability AI's names are read as diffusers' converter reads them."""

from dataclasses import asdict, replace
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from dit_cases import assert_same
from original_names import latent_diffusion_names, stability_names
from sd3_cases import (
    PLAIN,
    caption,
    of_ours,
    of_torch,
    one_thread,  # noqa: F401
    rng,
    t,
    torch,
    torch_transformer,
)
from torch_autoencoders import quiet, tensors_of, torch_autoencoder

from networks.autoencoder import AutoencoderConfig
from pretrained import autoencoder, sd3, transformer
from pretrained.sd3_file import infer_config
from runtime.errors import UserError

safetensors_torch = pytest.importorskip("safetensors.torch")
with quiet():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

PUBLISHED = replace(PLAIN, channels=16, out_channels=16, position="centred", position_base=64)
CONFIGS = {
    "sd3": replace(PUBLISHED, position_side=64),
    "sd3.5 large": replace(PUBLISHED, qk_norm=True, position_side=65),
    "sd3.5 medium": replace(PUBLISHED, depth=4, n_dual=2, qk_norm=True, position_side=66),
}
PREFIX = "model.diffusion_model."
VAE = AutoencoderConfig(
    block_out_channels=(32, 32, 32, 32),
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


@cache
def state(name):
    return stability_names(torch_transformer(CONFIGS[name]))


@cache
def params(name):
    tensors = tensors_of(torch_transformer(CONFIGS[name]))
    return sd3.params_from_diffusers(tensors, CONFIGS[name], "torch")


def prefixed(tensors, prefix=PREFIX):
    return {f"{prefix}{name}": x for name, x in tensors.items()}


def load(tensors, path, facts=""):
    safetensors_torch.save_file(tensors, path)
    return transformer.load_transformer(f"{facts}{path}")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_single_file_predicts_what_diffusers_does(name, tmp_path):
    model, tensors = torch_transformer(CONFIGS[name]), prefixed(state(name))
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    assert_same({k: x.numpy() for k, x in converted.items()}, tensors_of(model))
    facts = "" if CONFIGS[name].qk_norm else "sd3:heads=2:"
    loaded = load(tensors, tmp_path / "a.safetensors", facts)
    assert loaded.config == replace(CONFIGS[name], image_size=128) and loaded.notices == ()
    assert loaded.settings["sample_shift"] == 3 and loaded.settings["full_width"] == 24
    assert_same(loaded.params, params(name))
    x = rng.normal(size=(3, 8, 8, 16)).astype(np.float32)
    actual = of_ours(CONFIGS[name], loaded.params, x, t, caption)
    np.testing.assert_allclose(actual, of_torch(model, x, t, caption), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("width", "depth", "n_dual", "qk_norm", "side"),
    [(1536, 24, 0, False, 192), (2432, 38, 0, True, 192), (1536, 24, 13, True, 384)],
    ids=["sd3 medium", "sd3.5 large", "sd3.5 medium"],
)
def test_the_published_sizes_follow_from_their_shapes(width, depth, n_dual, qk_norm, side):
    published = replace(
        PUBLISHED,
        width=width,
        depth=depth,
        n_heads=depth,
        n_dual=n_dual,
        qk_norm=qk_norm,
        text_width=4096,
        pooled_width=2048,
        image_size=128,
        position_side=side,
    )
    shapes = sd3.stability_shapes(published)
    tensors = {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}
    assert asdict(infer_config(tensors, "published", None)) == asdict(published)


def test_a_file_of_the_whole_pipeline_holds_its_vae(tmp_path):
    vae = torch_autoencoder(VAE)
    inside = prefixed(latent_diffusion_names(vae), "first_stage_model.")
    beside = {
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "model_sampling.sigmas": torch.ones(3),
    }
    path = tmp_path / "sd3.safetensors"
    loaded = load(prefixed(state("sd3.5 large")) | inside | beside, path)
    assert_same(loaded.params, params("sd3.5 large"))
    assert loaded.notices == (
        "not read: model_sampling (1 tensors), text_encoders (1 tensors)",
        "the text encoders are those of the hub, or of --text_towers",
    )
    encoding = loaded.settings["dataset"]["encoding"]
    assert encoding["vae"] == str(path) and encoding["image_size"] == 1024
    assert (encoding["scaling_factor"], encoding["shift_factor"]) == (1.5305, 0.0609)
    ours = autoencoder.load_autoencoder(str(path))
    assert ours.config == VAE and ours.id == str(path)
    assert_same(ours.params, autoencoder.params_from_diffusers(tensors_of(vae), VAE, "torch"))
    without = load(state("sd3.5 large"), tmp_path / "b.safetensors")
    encoding = without.settings["dataset"]["encoding"]
    assert encoding["vae"] == "stabilityai/stable-diffusion-3-medium-diffusers"


# --- eight bits -----------------------------------------------------------------------------------


def in_eight_bits(tensors, dtype):
    return {name: x.to(dtype) for name, x in tensors.items()}


def scaled(tensors, leaf, *, by_output=False):
    """Divide each matrix by its largest number, or those of its rows, times 1/448."""
    result = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, x in tensors.items():
        result[name] = x
        if x.ndim == 2:
            largest = x.abs().amax(1, keepdim=True) if by_output else x.abs().max()
            scale = largest / 448
            result[name] = (x / scale).to(torch.float8_e4m3fn)
            result[name.replace("weight", leaf)] = scale
            result[name.replace("weight", "scale_input")] = torch.ones(1)
    return result


def largest_difference(one, other):
    pairs = zip(one.values(), other.values(), strict=True)
    differences = (
        largest_difference(a, b) if isinstance(a, dict) else np.abs(a - b).max() for a, b in pairs
    )
    return max(differences)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_eight_bits_are_read_as_the_numbers_that_they_are(dtype, suffix, tmp_path):
    rounded = in_eight_bits(state("sd3.5 large"), getattr(torch, dtype))
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({"ema": rounded}, path)
        loaded = transformer.load_transformer(str(path))
    else:
        loaded = load(prefixed(rounded), path)
    kernel = params("sd3.5 large")["label"]["tokens"]["kernel"]
    expected = kernel.astype(getattr(ml_dtypes, dtype)).astype("f4")
    np.testing.assert_array_equal(loaded.params["label"]["tokens"]["kernel"], expected)


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_output", [False, True])
def test_scales_beside_eight_bits_are_applied(leaf, by_output, tmp_path):
    tensors = prefixed(scaled(state("sd3.5 large"), leaf, by_output=by_output))
    loaded = load(tensors, tmp_path / "a.safetensors")
    assert "are multiplied by the scales beside them" in loaded.notices[0]
    expected = params("sd3.5 large")
    largest = max(float(x.abs().max()) for x in state("sd3.5 large").values() if x.ndim == 2)
    assert 0 < largest_difference(loaded.params, expected) <= largest / 2**4


def without_scale(tensors):
    del tensors["context_embedder.scale_weight"]


def alone(tensors):
    tensors["context_embedder.weight"] = tensors["context_embedder.weight"].float()


def unscaled(tensors):
    for name in [name for name in tensors if name.endswith("scale_weight")]:
        del tensors[name]


def of_other_shape(tensors):
    tensors["context_embedder.scale_weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scale, "context_embedder.weight is in eight bits without the scale that others"),
        (alone, "context_embedder.scale_weight has no weight in eight bits beside it"),
        (unscaled, "it has context_embedder.scale_input, but no scales of weights"),
        (of_other_shape, r"scale_weight is of shape \(2,\), beside a weight of \(16, 24\)"),
    ],
)
def test_scales_that_cannot_be_applied_are_refused(change, message, tmp_path):
    tensors = scaled(state("sd3.5 large"), "scale_weight")
    change(tensors)
    with pytest.raises(UserError, match=message):
        load(tensors, tmp_path / "a.safetensors")


# --- what does not fit ----------------------------------------------------------------------------


def test_biases_that_no_block_has_are_zero(tmp_path):
    tensors = {name: x for name, x in state("sd3.5 large").items() if "mlp.fc1.bias" not in name}
    loaded = load(tensors, tmp_path / "a.safetensors")
    (notice,) = loaded.notices
    assert notice.startswith("biases that are not in the file are zero: joint_blocks.*.context_")
    assert not loaded.params["blocks"]["picture"]["mlp"]["up"]["bias"].any()
    some = {
        name: x for name, x in state("sd3.5 large").items() if "1.x_block.mlp.fc1.b" not in name
    }
    with pytest.raises(UserError, match=r"it lacks joint_blocks.1.x_block.mlp.fc1.bias$"):
        load(some, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("name", "facts", "change", "message"),
    [
        ("sd3", "", {}, "3 blocks of width 16, which is no published size: .* sd3:heads=6:"),
        ("sd3", "sd3:heads=3:", {}, "width 16 is not divisible by 3 heads"),
        ("sd3.5 large", "sd3:classes=3:", {}, "SD3 has no classes: leave out classes=3:"),
        ("sd3", "dit:", {}, "holds no DiT or SiT: it lacks y_embedder.embedding_table.weight"),
        ("sd3.5 large", "", {"y": torch.ones(2)}, "do not fit the shape .* has no place for y"),
        (
            "sd3.5 large",
            "",
            {"context_embedder.weight": None},
            "no SD3: it lacks context_embedder.w",
        ),
        ("sd3.5 large", "", {"pos_embed": torch.ones(1, 65**2, 16)}, "unknown table of positions"),
        ("sd3.5 large", "", {"pos_embed": torch.ones(1, 0, 16)}, "one of its tensors is empty"),
        ("sd3.5 large", "", {"x_embedder.proj.weight": None}, "no DiT, SiT or SD3: it lacks x_emb"),
    ],
)
def test_a_file_that_is_no_sd3_is_refused_in_one_line(name, facts, change, message, tmp_path):
    tensors = {k: x for k, x in (state(name) | change).items() if x is not None}
    with pytest.raises(UserError, match=message) as error:
        load(tensors, tmp_path / "a.safetensors", facts)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "but a U-Net, as in Stable Diffusion 1"),
        ("transformer_blocks.0.attn.to_q.weight", "but diffusers' layout without its config.json"),
        ("double_blocks.0.img_attn.qkv.weight", "but FLUX: it lacks x_embedder.proj.weight"),
    ],
)
def test_another_network_is_named(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load({name: torch.ones(2), "position_ids": torch.arange(3)}, tmp_path / "a.safetensors")
