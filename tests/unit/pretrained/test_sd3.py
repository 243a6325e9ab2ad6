"""Stable Diffusion 3 equals diffusers': its transformer, weights, prompts, a complete sample."""

import shutil
import warnings
from dataclasses import replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from sd3_cases import (
    CONFIGS,
    PLAIN,
    caption,
    encoder_folders,  # noqa: F401
    of_ours,
    of_torch,
    one_thread,  # noqa: F401
    pipeline,  # noqa: F401
    rng,
    t,
    tensors_and_params,
    torch,
    torch_transformer,
)
from torch_autoencoders import quiet, tensors_of

import sampling
from data import text_encoders
from data.batch import EncodedCaption
from inference.trained_model import TrainedModel
from methods.rectified_flow import RectifiedFlow
from model import init_model_params, model_config
from pretrained import sd3, transformer
from pretrained.sd3_names import DIFFUSERS, STABILITY, locate_parts
from runtime import parallel
from runtime.errors import UserError

with quiet():
    diffusers = pytest.importorskip("diffusers")
EACH = pytest.mark.parametrize("name", CONFIGS)


def noise(config, side):
    return rng.normal(size=(3, side, side, config.channels)).astype(np.float32)


# --- the transformer ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 8, 14])
@EACH
def test_the_velocity_is_that_of_diffusers_at_every_size(name, side):
    config, params = replace(CONFIGS[name], image_size=side), tensors_and_params(name)[1]
    x = noise(config, side)
    expected = of_torch(torch_transformer(CONFIGS[name]), x, t, caption)
    assert expected.shape == (3, side, side, config.out_channels) and expected.std() > 0.1
    actual = of_ours(config, params, x, t, caption)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@EACH
def test_weights_go_to_diffusers_and_back_to_the_bit(name):
    """But for the last context's queries, which change nothing."""
    config, (tensors, params) = CONFIGS[name], tensors_and_params(name)
    back = sd3.params_to_diffusers(params, config)
    assert back.keys() == tensors.keys() == sd3.diffusers_shapes(config).keys()
    unread = sd3.dropped_tensors(config)
    for key, x in tensors.items():
        assert (
            back[key].dtype == np.float32
            and back[key].shape == x.shape == sd3.diffusers_shapes(config)[key]
        )
        if key == sd3.TABLE:  # computed here in float64
            np.testing.assert_allclose(back[key], x, atol=1e-6)
        elif key not in unread:
            np.testing.assert_array_equal(back[key], x, key)
    again = torch_transformer(config, seed=1)
    again.load_state_dict({key: torch.tensor(x) for key, x in back.items()}, strict=True)
    x = noise(config, 8)
    expected = of_torch(torch_transformer(config), x, t, caption)
    np.testing.assert_allclose(of_torch(again, x, t, caption), expected, rtol=0, atol=2e-5)
    jax.tree.map(
        np.testing.assert_array_equal, sd3.params_from_diffusers(back, config, "ours"), params
    )


@EACH
@pytest.mark.parametrize(("layout", "unread"), [(DIFFUSERS, 0), (STABILITY, 2)])
def test_each_of_our_weights_is_found_once(name, layout, unread):
    """Stability's one map of queries, keys and values holds the queries that are dropped."""
    config = CONFIGS[name]
    paths = sd3.our_shapes(config)
    parts = [p for path in paths for one in locate_parts(path, config, layout) for p in one]
    assert len(parts) == len(set(parts))
    of = {part.name: part.n_parts for part in parts}
    assert len(parts) + unread == sum(of.values())  # no other part of a tensor is left


@EACH
def test_configs_go_to_diffusers_and_back(name):
    config, theirs = CONFIGS[name], torch_transformer(CONFIGS[name])
    ours = sd3.config_to_diffusers(config)
    assert (
        sd3.config_from_diffusers(ours, "ours", {sd3.TABLE: sd3.position_table(config)}) == config
    )
    published = theirs.config | {"_class_name": sd3.CLASS}
    assert sd3.config_from_diffusers(published, "theirs", tensors_of(theirs)) == config
    assert sd3.config_from_diffusers(ours, "short") == replace(config, position="centred")


def test_facts_missing_in_a_config_are_as_in_diffusers():
    facts = {"_class_name": sd3.CLASS, "attention_head_dim": 64}
    config = sd3.config_from_diffusers(facts, "short")
    with quiet(), torch.device("meta"):
        expected = diffusers.SD3Transformer2DModel().state_dict()
    assert {key: tuple(x.shape) for key, x in expected.items()} == sd3.diffusers_shapes(config)


@pytest.mark.parametrize(
    "facts, millions",
    [
        ({"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}, 2028),
        ({"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192}, 8057),
        (
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
            },
            2243,
        ),
    ],
    ids=["sd3 medium", "sd3.5 large", "sd3.5 medium"],
)
def test_the_published_ones_have_as_many_parameters_here(facts, millions):
    """As in diffusers with these settings, but for the last context's queries."""
    facts |= {"_class_name": sd3.CLASS, "qk_norm": "rms_norm"}
    facts["caption_projection_dim"] = 64 * facts["num_attention_heads"]
    config = sd3.config_from_diffusers(facts, "published")
    shapes = jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))
    ours = sum(x.size for x in jax.tree.leaves(shapes))
    unread = sum(x.size for x in sd3.dropped_tensors(config).values())
    theirs = sum(
        np.prod(shape) for key, shape in sd3.diffusers_shapes(config).items() if key != sd3.TABLE
    )
    assert ours + unread == theirs
    assert round(theirs / 1e6) == millions
    assert config.image_size == 128 and config.grid == (64, 64)


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "DiTTransformer2DModel"}, "is not an SD3Transformer2DModel but DiTTrans"),
        ({"_class_name": None}, "is not an SD3Transformer2DModel but of no known class"),
        ({"num_layers": "18"}, "its config.json says num_layers 18: must be a whole number"),
        ({"in_channels": 0}, "says in_channels 0: must be a whole number above 0"),
        ({"patch_size": None}, "says patch_size None: must be a whole number above 0"),
        ({"qk_norm": "layer_norm"}, "says qk_norm layer_norm: not supported"),
        ({"dual_attention_layers": [1]}, r"dual_attention_layers \[1\]: must be the first ones"),
        ({"dual_attention_layers": [0, 1, 2]}, "n_dual 3: .* never the last of the 3"),
        ({"caption_projection_dim": 24}, "caption_projection_dim 24: must be the width, 16"),
        ({"guidance_embeds": True}, "says guidance_embeds True: not supported"),
        ({"sample_size": 9}, "image_size 9 is not divisible by patch_size 2"),
    ],
)
def test_a_config_of_something_else_is_refused_by_its_name(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        sd3.config_from_diffusers(sd3.config_to_diffusers(PLAIN) | changes, "a/model")
    assert "a/model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, fields",
    [
        ({"rope": True}, "rope True"),
        ({"norm": "rms", "mlp": "swiglu"}, "mlp swiglu, norm rms"),
        ({"mlp_ratio": 3.0}, "mlp_ratio 3.0"),
        ({"position": "sincos"}, "position sincos"),
        ({"time_scale": 1.0}, "time_scale 1.0"),
        ({"caption_norm": True}, "caption_norm True"),
        ({"block": "adaln_zero"}, "block adaln_zero"),
        ({"n_classes": 10, "text_width": 0}, "n_classes 10, text_width 0"),
        ({"text_width": 0}, "text_width 0"),
        ({"image_size": 16}, "image_size 16"),
        ({"image_size": "8x16"}, "image_size 8x16"),
    ],
)
def test_a_model_that_sd3_cannot_hold_is_refused_by_its_field(changes, fields):
    with pytest.raises(
        UserError, match=f"SD3Transformer2DModel cannot hold a model with {fields}$"
    ):
        sd3.config_to_diffusers(replace(PLAIN, **changes))


def test_our_presets_are_refused_for_their_captions_norm_alone():
    """Trained without it, they are SD3s."""
    fields = {"image_size": 32, "channels": 4, "out_channels": 4, "n_classes": 0}
    fields |= {"text_length": 8, "text_width": 24, "pooled_width": 16}
    with pytest.raises(UserError, match=r"with caption_norm True$"):
        sd3.config_to_diffusers(model_config("MMDiT-S/2", **fields))
    assert sd3.config_to_diffusers(model_config("MMDiT-S/2", caption_norm=False, **fields))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("proj_out.bias"), "it lacks proj_out.bias"),
        (lambda x: x.update(extra=np.zeros(1)), "it has no place for extra"),
        (lambda x: x.update({"proj_out.bias": np.zeros(3)}), r"proj_out.bias \(3,\), not \(16,\)"),
        (lambda x: x.update({sd3.TABLE: x[sd3.TABLE] + 0.1}), "pos_embed is an unknown table of"),
        (
            lambda x: x.update({sd3.TABLE: x[sd3.TABLE] * np.nan}),
            "is an unknown table of positions",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    tensors = dict(tensors_and_params("sd3")[0])
    change(tensors)
    with pytest.raises(UserError, match=f"the weights of 'a/model'.*{message}"):
        sd3.params_from_diffusers(tensors, PLAIN, "a/model")


def test_positions_that_are_spaced_otherwise_are_refused():
    tensors = tensors_and_params("sd3")[0]
    for other in ({"position_base": 8}, {"position": "centred"}):
        with pytest.raises(UserError, match="is an unknown table of positions"):
            sd3.params_from_diffusers(tensors, replace(PLAIN, **other), "a/model")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_in_half_precision_are_read(dtype):
    tensors = {
        k: x.astype(dtype).astype(np.float32) for k, x in tensors_and_params("sd3")[0].items()
    }
    assert sd3.params_from_diffusers(tensors, PLAIN, "half")


PROMPTS = ["a red seven", "", "blue", "a circle and a square and a triangle, all red"]  # too long


def theirs(pipeline, prompts):
    """Tokens and pooled vectors of prompts, by diffusers."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device="cpu", do_classifier_free_guidance=False
        )
    return tokens.numpy(), pooled.numpy()


def test_prompts_are_those_of_diffusers_with_all_their_padding(encoder_folders, pipeline):
    tokens, pooled = theirs(pipeline, PROMPTS)
    encoded = text_encoders.TextEncoders(encoder_folders, full_width=24).encode(PROMPTS)
    actual = text_encoders.pad_embeddings(encoded, 24 + 256)
    assert actual.mask.all() and not any(e.truncated for e in encoded)  # T5 reads what CLIP cannot
    for ours, expected in ((actual.tokens, tokens), (actual.pooled, pooled)):
        assert ours.dtype == np.float16
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert actual.pooled[1].any()  # of no prompt


def test_text_encoders_of_a_pipelines_folder_have_their_tokenizers_beside_them(
    encoder_folders, tmp_path
):
    names = [tmp_path / f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    for name, text_encoder in zip(names, encoder_folders, strict=True):
        shutil.copytree(text_encoder, name)
        tokenizer = tmp_path / name.name.replace("text_encoder", "tokenizer")
        tokenizer.mkdir()
        for file in name.glob("*token*"):
            file.rename(tokenizer / file.name)
    (ours,), (expected,) = (
        text_encoders.TextEncoders([*map(str, some)], full_width=24).encode(["a red"])
        for some in (names, encoder_folders)
    )
    np.testing.assert_array_equal(ours.tokens, expected.tokens)


def test_a_saved_pipeline_is_read_whole(pipeline, tmp_path):
    with quiet():
        pipeline.save_pretrained(tmp_path)
    actual = transformer.load_transformer(str(tmp_path))
    assert actual.config == CONFIGS["sd3.5 medium"] and actual.settings["sample_shift"] == 3
    expected = tensors_and_params("sd3.5 medium")[1]
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected)
    tokens, pooled = theirs(pipeline, ["blue"])
    caption = TrainedModel.from_pretrained(str(tmp_path)).encode_captions(["blue"])
    for ours, theirs_ in ((caption.tokens[:, : 24 + 256], tokens), (caption.pooled, pooled)):
        np.testing.assert_allclose(ours, theirs_, rtol=0, atol=2e-3 * np.abs(theirs_).max())


def make_model(encoder_folders, *, full_width: int | None = 24, loaded_encoders=()) -> TrainedModel:
    """Make a model without weights that is conditioned by these text encoders."""
    settings = {
        "text_towers": encoder_folders,
        "text_revisions": [None] * 3,
        "full_width": full_width,
    }
    settings["dataset"] = {}
    mesh = parallel.make_mesh(1)
    return TrainedModel(
        "sd3", settings, PLAIN, mesh, lambda: (None, None), text_encoders=loaded_encoders
    )


def test_sd3s_null_label_is_an_empty_prompt(encoder_folders):
    request = make_model(encoder_folders).conditioning.request(4, prompts=("blue", "a red"))
    assert (list(request.label_index), request.names) == ([0, 0, 1, 1], ("blue", "a red"))
    rows = request.rows(0, 4)
    labels = rows.labels
    blue, red, nothing = text_encoders.TextEncoders(encoder_folders, full_width=24).encode(
        [*request.names, ""]
    )
    assert isinstance(labels, EncodedCaption) and rows.negative is not None
    for x, prompt in zip(labels.tokens, (blue, blue, red, red), strict=True):
        np.testing.assert_array_equal(x[: len(prompt.tokens)], prompt.tokens)
    null = rows.negative
    np.testing.assert_array_equal(null.tokens[0, : len(nothing.tokens)], nothing.tokens)
    np.testing.assert_array_equal(null.pooled, nothing.pooled[None])
    ours = make_model(encoder_folders, full_width=None).conditioning.request(1, prompts=("blue",))
    assert ours.negative is None


def test_sd3_does_without_t5_but_not_with_other_text_encoders(encoder_folders):
    large, giant, t5 = encoder_folders
    caption = make_model(encoder_folders, loaded_encoders=[large, giant]).encode_captions(["blue"])
    assert caption.tokens[:, :24].any() and not caption.tokens[:, 24:].any()
    with pytest.raises(UserError, match="the model has 3 text encoders, not 1"):
        make_model(encoder_folders, loaded_encoders=[large])
    with pytest.raises(UserError, match=r"give 24 channels .* and 10 of .* takes 24 and 16"):
        make_model(encoder_folders, loaded_encoders=[large, t5]).encode_captions(["blue"])
    with pytest.raises(UserError, match="the model has 3 text encoders, not 2"):
        make_model(encoder_folders, full_width=None, loaded_encoders=[large, giant])


def test_a_missing_t5_is_zeros(encoder_folders, pipeline):
    encoder, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    tokens, _ = theirs(pipeline, PROMPTS)
    pipeline.text_encoder_3 = encoder
    encoded = text_encoders.TextEncoders(encoder_folders[:2], full_width=24).encode(PROMPTS)
    actual = text_encoders.pad_embeddings(encoded, 24 + 256)
    np.testing.assert_allclose(actual.tokens, tokens, rtol=0, atol=2e-3 * np.abs(tokens).max())
    assert not actual.tokens[:, 24:].any() and actual.mask.all()
    assert [e.truncated for e in encoded] == [False, False, False, True]


def test_text_encoders_wider_than_the_model_are_refused(encoder_folders):
    with pytest.raises(UserError, match="have 24 channels: the model takes 20"):
        text_encoders.TextEncoders(encoder_folders, full_width=20)


# --- a complete sample ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_published_times_are_diffusers(n, shift):
    """Its grid without a given `sigmas`, which the reference code shares."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    times = RectifiedFlow(time_grid="sd3").time_steps(n, solver="euler", shift=shift)
    np.testing.assert_allclose(times, scheduler.sigmas, rtol=0, atol=2e-7)
    np.testing.assert_allclose(1000 * times[:-1], scheduler.timesteps, rtol=0, atol=2e-4)


def test_the_even_times_are_those_of_given_sigmas(pipeline):
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28))
    np.testing.assert_allclose(scheduler.sigmas, sampling.time_grid(28, shift=3.0), atol=1e-6)
    scheduler.set_timesteps(28)
    sigma_end = 3 * scheduler.sigma_min / (1 + 2 * scheduler.sigma_min)
    assert sigma_end == pytest.approx(0.0089, abs=1e-4)
    np.testing.assert_allclose(scheduler.sigmas[-2:], [sigma_end, 0], atol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas[:-1], sampling.time_grid(27, shift=3.0), atol=0.009)


PUBLISHED = {  # parameters of diffusers' models, and facts of their configs
    "SD3-2B": (2_028_328_000, {"num_layers": 24, "pos_embed_max_size": 192}),
    "SD3.5-M": (
        2_243_171_520,
        {
            "num_layers": 24,
            "pos_embed_max_size": 384,
            "dual_attention_layers": [*range(13)],
            "qk_norm": "rms_norm",
        },
    ),
    "SD3.5-L": (
        8_056_627_520,
        {"num_layers": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_presets_have_the_published_shapes(name):
    n_params, facts = PUBLISHED[name]
    heads = facts["num_layers"] if facts["num_layers"] == 38 else 24
    facts = facts | {"num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    published = sd3.config_from_diffusers(facts | {"_class_name": sd3.CLASS}, name)
    assert transformer.find_preset(published) == name
    fields = ("image_size", "channels", "out_channels", "n_classes")
    fields += ("text_length", "text_width", "pooled_width")
    ours = model_config(name, **{field: getattr(published, field) for field in fields})
    assert ours == published
    n_ours = sum(np.prod(shape) for shape in sd3.our_shapes(ours).values())
    assert n_ours + sum(x.size for x in sd3.dropped_tensors(ours).values()) == n_params
