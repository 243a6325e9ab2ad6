"""Transformers of other projects: the same outputs as there, exports that return bit for bit, and
errors that name the misfit.
"""

import json
import math
from argparse import Namespace
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_transformers
from dit_cases import (
    assert_same,
    one_thread,  # noqa: F401
)
from flax import nnx
from torch_autoencoders import SD, nchw, nhwc, quiet, tensors_of
from torch_transformers import CONFIGS, SMALL, inputs, original_names, torch_dit

import sampling
from datasets_config import LatentEncoding
from inference.sampler import SamplerConfig
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from methods.ddpm import DDPM
from methods.rectified_flow import RectifiedFlow
from model import init_model_params, model_config, model_graphdef
from pretrained import dit, transformer, weight_files
from pretrained.autoencoder import config_to_diffusers as write_vae_config
from runtime.errors import UserError

torch = pytest.importorskip("torch")


@cache
def predictor(config):
    return jax.jit(lambda params, *inputs: nnx.merge(model_graphdef(config), params)(*inputs))


def predicted(config, params, x, t, label):
    return predictor(config)(params, x, np.float32(t), label)


def of_torch(model, x, k, label):
    with torch.no_grad():
        y = model(nchw(x), torch.from_numpy(k), torch.from_numpy(label).long()).sample
    return nhwc(y)


@cache
def example(name):
    return torch_dit(CONFIGS[name])


def save_as_diffusers(folder, model):
    """Save weights as the published conversions of the original's are."""
    with quiet():
        model.save_pretrained(folder)
    name, version = dit.CONVERSION
    edit_config(folder, _class_name=name, _diffusers_version=version)
    return folder


def edit_config(folder, **facts):
    path = folder / weight_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def saved(path, model, within=None):
    """Save weights as the original's files have them: bare, or as a training script does."""
    state = original_names(model)
    worse = {name: x + 1 for name, x in state.items()}
    checkpoint = {"model": worse, "ema": state, "opt": {"state": {}}, "args": Namespace(lr=1e-4)}
    torch.save({None: state, "ema": checkpoint, "model": {"model": state}}[within], path)
    return path


def facts_of(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


# --- they compute the same ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dit_of_diffusers_computes_the_same(name, tmp_path):
    config, theirs = CONFIGS[name], example(name)
    loaded = transformer.load_transformer(str(save_as_diffusers(tmp_path / "dit", theirs)))
    assert loaded.config == config
    x, k, label = inputs(config)
    ours = predicted(config, loaded.params, x, k / 1000, label)
    np.testing.assert_allclose(ours, of_torch(theirs, x, k, label), rtol=0, atol=2e-5)


def test_a_dit_trained_in_diffusers_keeps_its_frequencies_of_time(tmp_path, capsys):
    """They are not the original's, and the config says neither: the person is asked."""
    config = replace(SMALL, time_endpoint=True)
    theirs, folder = torch_dit(config), tmp_path / "dit"
    with quiet():
        theirs.save_pretrained(folder)
    with pytest.raises(UserError, match=f"name it as original:{folder} or diffusers:{folder}$"):
        transformer.load_transformer(str(folder))
    loaded = transformer.load_transformer(f"diffusers:{folder}")
    assert loaded.config == config and loaded.id == str(folder)
    x, k, label = inputs(config)
    expected = of_torch(theirs, x, k, label)
    ours = predicted(config, loaded.params, x, k / 1000, label)
    # At t = 999 the last bit of a frequency is an angle of 6e-5.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    converted = predicted(SMALL, loaded.params, x, k / 1000, label)
    assert np.square(converted - expected).mean() > (1e-3 * np.std(expected)) ** 2
    # diffusers computes an export of it as it is.
    transformer.save_transformer(tmp_path / "ours", config, loaded.params, loaded.settings)
    with quiet():
        again = type(theirs).from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(of_torch(again, x, k, label), expected)
    assert transformer.load_transformer(str(tmp_path / "ours")).config == config
    (tmp_path / "ours" / transformer.SETTINGS).unlink()
    assert transformer.load_transformer(str(tmp_path / "ours")).config == config
    with pytest.raises(UserError, match="original: is for a folder or id of diffusers"):
        transformer.load_transformer(f"original:{folder / weight_files.WEIGHTS}")


def test_the_code_that_a_published_dit_is_computed_by_is_said(tmp_path, capsys):
    folder = save_as_diffusers(tmp_path / "dit", example("small"))
    for prefix, code, n_guided, guided in (
        ("", "DiT's own code", 3, "the first 3"),
        ("diffusers:", "diffusers", None, "all"),
    ):
        loaded = transformer.load_transformer(f"{prefix}{folder}")
        assert loaded.config.time_endpoint == bool(prefix)
        assert loaded.settings.get("guided_channels") == n_guided
        message = f"computed as by {code}, and {guided} of its channels are guided; to have it as"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("within", [None, "ema", "model"])
def test_an_original_dit_computes_the_same(name, within, tmp_path):
    config, theirs = CONFIGS[name], example(name)
    path = saved(tmp_path / "DiT-test.pt", theirs, within)
    loaded = transformer.load_transformer(f"dit:heads={config.n_heads}:{path}")
    assert loaded.config == config
    x, k, label = inputs(config)
    ours = predicted(config, loaded.params, x, k / 1000, label)
    np.testing.assert_allclose(ours, of_torch(theirs, x, k, label), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sit_computes_the_same_with_its_time_turned_around(name, tmp_path):
    config, theirs = CONFIGS[name], example(name)
    path = saved(tmp_path / "SiT-test.pt", theirs)
    loaded = transformer.load_transformer(f"sit:heads={config.n_heads}:{path}")
    assert loaded.config == replace(config, out_channels=config.channels, time_scale=1.0)
    x, _, label = inputs(config)
    t = np.array([0, 0.3, 1], np.float32)
    with torch.no_grad():
        velocity = torch_transformers.sit(
            original_names(theirs),
            nchw(x),
            1 - torch.from_numpy(t),
            torch.from_numpy(label).long(),
            n_heads=config.n_heads,
        )
    ours = predicted(loaded.config, loaded.params, x, t, label)
    np.testing.assert_allclose(ours, -nhwc(velocity), rtol=0, atol=2e-5)
    assert np.std(ours) > 0.1


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dit_goes_to_diffusers_and_back_to_the_bit(name, tmp_path):
    theirs = example(name)
    ours = transformer.load_transformer(str(save_as_diffusers(tmp_path / "theirs", theirs)))
    transformer.save_transformer(tmp_path / "ours", ours.config, ours.params, ours.settings)
    with quiet():
        again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(tensors_of(again), tensors_of(theirs))
    assert facts_of(again) == facts_of(theirs)
    back = transformer.load_transformer(str(tmp_path / "ours"))
    assert_same(back.params, ours.params)
    assert back.config == ours.config
    again_settings = json.loads(json.dumps(back.settings))
    for name, value in json.loads(json.dumps(ours.settings)).items():
        assert again_settings[name] == value


def test_a_clock_of_ones_own_is_kept_beside_what_diffusers_reads(tmp_path):
    config = replace(SMALL, time_scale=1.0)
    transformer.save_transformer(
        tmp_path / "dit", config, init_model_params(config, jax.random.key(0)), {}
    )
    assert transformer.load_transformer(str(tmp_path / "dit")).config == config


def test_every_weight_of_a_published_size_has_one_name():
    """XL/2 at 256 and 512 pixels, as the original's files have it."""
    for image_size in (32, 64):
        config = model_config(
            "DiT-XL/2", image_size=image_size, channels=4, out_channels=8, n_classes=1000
        )
        shapes = dit.original_shapes(config)
        assert len(shapes) == 11 + 28 * 10
        assert sum(map(math.prod, shapes.values())) == 675_129_632 - 256 * 1152  # its positions
        zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        zeros["pos_embed"] = np.broadcast_to(np.float32(0), (1, (image_size // 2) ** 2, 1152))
        assert dit.infer_config(zeros, "nowhere", None) == config


# --- sampling -------------------------------------------------------------------------------------


def test_a_pipeline_gives_class_names_and_sampling_settings(tmp_path):
    names = {str(i): f"name {i}, synonym" for i in range(9)} | {"9": "name 0"}
    folder = pipeline_of(tmp_path / "pipeline", example("small"), names)
    settings = transformer.load_transformer(str(folder)).settings
    label_names = settings["dataset"]["label_names"]
    assert label_names[1:3] == ["name 1", "name 2"] and label_names[9] == "name 0"
    assert label_names[0] == "name 0, synonym"  # its first synonym is another's too
    encoding = LatentEncoding.from_record(settings["dataset"]["encoding"])
    assert (encoding.scaling_factor, encoding.vae) == (0.25, str(folder))
    assert (encoding.image_size, encoding.shape) == (16, (8, 8, 4))
    space = TrainedModel.from_pretrained(str(folder)).space
    assert space.to_images(inputs(SMALL)[0]).shape == (3, 16, 16, 3)


def save_pipeline(folder, model, scheduler):
    import diffusers

    library: Any = diffusers
    facts = write_vae_config(replace(SD, scaling_factor=0.25))
    facts = {name: value for name, value in facts.items() if not name.startswith("_")}
    pipeline = library.DiTPipeline(model, library.AutoencoderKL(**facts), scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


def pipeline_of(folder, model, id2label):
    with quiet():
        save_pipeline(folder, model, ddim())
    save_as_diffusers(folder / "transformer", model)
    index = folder / "model_index.json"  # where the published ones have their classes
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": id2label}))
    return folder


def test_samples_of_a_dit_without_learned_variance_are_those_of_its_pipeline(tmp_path, monkeypatch):
    """A whole chain of diffusers', trained and guided there, with the same noise in every step."""
    from diffusers.pipelines.dit import pipeline_dit
    from diffusers.schedulers import scheduling_ddpm

    theirs = torch_dit(replace(SMALL, n_classes=1000, out_channels=4, time_endpoint=True))
    index, shape, states = jnp.arange(2), (8, 8, 4), []
    fresh_noise = sampling.step_noise(0, index, shape)
    with quiet():
        facts = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
        scheduler: Any = scheduling_ddpm.DDPMScheduler(
            **facts, variance_type="fixed_large", timestep_spacing="linspace"
        )
        pipeline = save_pipeline(tmp_path / "pipeline", theirs, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    step = scheduler.step

    def step_with_our_noise(output, k, x, **options):
        noise = nchw(np.asarray(fresh_noise(jnp.int32(int(k)))))
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.repeat(2, 1, 1, 1)
        )
        result = step(output, k, x, **options)
        states.append(nhwc(result.prev_sample[:2]))
        return result

    first = nchw(np.asarray(sampling.initial_noise(0, index, shape)))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: first)
    monkeypatch.setattr(scheduler, "step", step_with_our_noise)
    pipeline([1, 7], guidance_scale=4.0, num_inference_steps=5, output_type="np")
    model = TrainedModel.from_pretrained(f"diffusers:{tmp_path / 'pipeline'}")
    plan = model.plan(SamplingOverrides(n_steps=5))
    samples = model.sample([1, 7], plan, decode=False, trajectory=True)
    assert samples.trajectory is not None and len(states) == 5
    for ours, expected in zip(samples.trajectory[1:], states, strict=True):
        assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()
    # Its scheduler says which; a network alone is sampled as by the code that trained it.
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": "fixed_small"}))
    for place, code, fixed in (
        ("pipeline", "original", "posterior"),
        ("pipeline/transformer", "original", "beta"),
        ("pipeline/transformer", "diffusers", "posterior"),
    ):
        model = TrainedModel.from_pretrained(f"{code}:{tmp_path / place}")
        assert model.plan(SamplingOverrides()).sampler.method == DDPM(fixed_variance=fixed)


def ddim():
    """The scheduler of the published pipelines."""
    import diffusers

    scheduler: Any = diffusers
    return scheduler.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)


def test_samples_are_those_of_diffusers(tmp_path):
    """From the same noise, guided, by DDIM, which adds none of its own."""
    theirs = example("small")
    model = TrainedModel.from_pretrained(str(save_as_diffusers(tmp_path / "dit", theirs)))
    labels = [1, 7]
    plan = model.plan(SamplingOverrides(solver="ddim", n_steps=4, cfg_scale=4.0, guided_channels=4))
    samples = model.sample(labels, plan, decode=False, trajectory=True)
    assert samples.trajectory is not None
    with quiet():
        scheduler = ddim()
    scheduler.num_inference_steps = 3  # a stride of 333
    x, label = nchw(samples.trajectory[0]), torch.tensor([*labels, 10, 10])
    for i, k in enumerate((999, 666, 333, 0)):
        with torch.no_grad():
            output = theirs(torch.cat([x, x]), torch.full((4,), k), label).sample
        cond, null = output[:, :4].chunk(2)
        x = scheduler.step(null + 4.0 * (cond - null), k, x).prev_sample
        expected = nhwc(x)
        error = np.abs(samples.trajectory[i + 1] - expected).max() / np.abs(expected).max()
        assert error < 1e-5


def test_files_of_the_original_are_sampled_as_published(tmp_path):
    theirs = example("small")
    loaded = TrainedModel.from_pretrained(f"dit:heads=4:{saved(tmp_path / 'a.pt', theirs)}")
    sampler = SamplerConfig("ddpm", 250, DDPM(learned_sigma=True), guided_channels=3)
    assert loaded.plan(SamplingOverrides()) == SamplingPlan(sampler, 4.0)
    encoding = loaded.settings["dataset"]["encoding"]
    assert (encoding["vae"], encoding["image_size"]) == ("stabilityai/sd-vae-ft-ema", 64)
    grey = transformer.load_transformer(
        f"dit:heads=1:{saved(tmp_path / 'grey.pt', example('grey'))}"
    ).settings
    assert grey["dataset"]["encoding"] is None and grey["cfg_scale"] == 1.0
    assert "guided_channels" not in grey
    assert grey["fixed_variance"] == "beta" and "fixed_variance" not in loaded.settings
    loaded = TrainedModel.from_pretrained(f"SiT:heads=4:{tmp_path / 'a.pt'}")
    assert loaded.plan(SamplingOverrides()) == SamplingPlan(
        SamplerConfig("euler", 50, guided_channels=3),
        4.0,
        None,
    )


def test_sd3_is_sampled_as_published(tmp_path):
    captions = {"n_classes": 0, "text_length": 333, "text_width": 24, "pooled_width": 8}
    table = {"position": "cropped", "position_side": 8, "position_base": 4}
    config = replace(SMALL, block="joint", out_channels=4, caption_norm=False, **captions, **table)
    assert transformer.choose_layout(config) == ("SD3Transformer2DModel", "")
    params = init_model_params(config, jax.random.key(0))
    transformer.save_transformer(tmp_path / "all" / "transformer", config, params, {})
    (tmp_path / "all" / "scheduler").mkdir()
    facts = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}
    (tmp_path / "all" / "scheduler" / "scheduler_config.json").write_text(json.dumps(facts))
    loaded = transformer.load_transformer(str(tmp_path / "all"))
    assert_same(loaded.params, jax.device_get(params))
    model = TrainedModel.from_pretrained(str(tmp_path / "all"))
    published = RectifiedFlow(time_grid="sd3")
    sampler = SamplerConfig("euler", 28, published, shift=2.5)
    assert model.plan(SamplingOverrides()) == SamplingPlan(sampler, 7.0)
    even = replace(sampler, method=RectifiedFlow())
    assert model.plan(SamplingOverrides(time_grid="even")) == SamplingPlan(even, 7.0)
    assert transformer.SAMPLING_DEFAULTS["sd3"]["sample_shift"] == 3.0
    assert loaded.settings["full_width"] == 24 and len(loaded.settings["text_towers"]) == 3


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub's cache of the repository us/dit, with nothing in it yet."""
    from huggingface_hub import constants

    cached = tmp_path / "models--us--dit"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return cached


def test_a_pipeline_of_the_hub_is_read_from_its_cache(cached):
    names = {str(i): f"name {i}" for i in range(10)}
    pipeline = pipeline_of(cached / "snapshots" / COMMIT, example("small"), names)
    loaded = transformer.load_transformer("us/dit")
    assert (loaded.id, loaded.revision, loaded.config) == ("us/dit", COMMIT, SMALL)
    assert loaded.settings["dataset"]["label_names"][3] == "name 3"
    assert loaded.settings["dataset"]["encoding"]["vae"] == "us/dit"
    (pipeline / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot load 'us/dit': .* the hub is out of reach"):
        transformer.load_transformer("us/dit")


@pytest.mark.parametrize("cache_holds", ["nothing", "absences", "all files"])
def test_a_file_missing_in_the_cache_may_exist_on_the_hub(cached, cache_holds):
    """It may be an export, with settings of how it is sampled."""
    folder, missing = cached / "snapshots" / COMMIT, cached / ".no_exist" / COMMIT
    save_as_diffusers(folder, example("small"))
    if cache_holds == "nothing":
        with pytest.raises(UserError, match=r"cannot load 'us/dit': .* the hub is out of reach"):
            transformer.load_transformer("us/dit")
        return
    if cache_holds == "absences":
        names = (transformer.SETTINGS, "model_index.json", "vae/config.json")
        for name in (*names, "scheduler/scheduler_config.json"):
            (missing / name).parent.mkdir(parents=True, exist_ok=True)
            (missing / name).touch()
    else:
        (folder / ".gitattributes").touch()
    assert transformer.load_transformer("us/dit").settings["prediction"] == "epsilon"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("x_embedder.proj.weight"),
            "holds no DiT, SiT or SD3: it lacks x_embedder",
        ),
        (lambda t: t.pop("pos_embed"), "holds no DiT or SiT: it lacks pos_embed"),
        (lambda t: t.pop("blocks.0.mlp.fc1.bias"), "it lacks blocks.0.mlp.fc1.bias"),
        (lambda t: t.update(more=t["pos_embed"]), "it has no place for more"),
        (
            lambda t: t.update(pos_embed=t["pos_embed"][:, :15]),
            "its 15 positions do not form a square",
        ),
        (lambda t: t.update(pos_embed=t["pos_embed"] + 1), "is not the sine-cosine table of DiT"),
        (
            lambda t: t.update({"blocks.1.mlp.fc2.bias": t["blocks.1.mlp.fc1.bias"]}),
            r"of another shape is blocks.1.mlp.fc2.bias \(128,\), not \(32,\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    state = original_names(example("small"))
    change(state)
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(UserError, match=message):
        transformer.load_transformer(f"dit:heads=4:{tmp_path / 'dit.pt'}")


@pytest.mark.parametrize(
    "reference, message",
    [
        ("{}/unnamed.pt", "may be a DiT or a SiT: .* name it as dit:.*unnamed.pt or sit:"),
        ("{}/dit-or-sit.pt", "may be a DiT or a SiT"),
        (
            "{}/my_SiT.pt",
            "2 blocks of width 32, which is no published size: give their number of heads",
        ),
        ("dit:heads=5:{}/unnamed.pt", "width 32 is not divisible by 5"),
        ("dit:heads=0:{}/unnamed.pt", "give their number of heads"),
        ("dit:{}/nowhere.pt", "nowhere.pt: No such file or directory"),
        ("sit:{}", "sit: is for a file of weights"),
        ("{}/visit.pt", "may be a DiT or a SiT"),
    ],
)
def test_ambiguous_references_are_refused(reference, message, tmp_path):
    for name in ("unnamed", "dit-or-sit", "my_SiT", "visit"):
        saved(tmp_path / f"{name}.pt", example("small"))
    with pytest.raises(UserError, match=message):
        transformer.load_transformer(reference.format(tmp_path))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"_class_name": "UNet2DModel"}, "is UNet2DModel, and none of: DiTTransformer2DModel"),
        ({"activation_fn": "geglu"}, "says activation_fn geglu: not supported"),
        ({"num_layers": "two"}, "says num_layers two: must be a whole number of at least 1"),
        ({"patch_size": 0}, "says patch_size 0: must be a whole number of at least 1"),
        ({"register_tokens": 4}, "says register_tokens 4: not supported"),
        ({"num_layers": 3}, "it lacks transformer_blocks.2"),
        ({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}, "is not a DiT"),
        ({"_class_name": "DiT"}, "the config.json of .* is damaged"),
        ({"sample_size": 9}, "its config.json says image_size 9 is not divisible by patch_size 2"),
    ],
)
def test_a_config_of_something_else_is_refused(facts, message, tmp_path):
    folder = save_as_diffusers(tmp_path / "dit", example("small"))
    edit_config(folder, **facts)
    with pytest.raises(UserError, match=message):
        transformer.load_transformer(str(folder))


def test_the_class_of_the_first_files_is_known(tmp_path):
    folder = save_as_diffusers(tmp_path / "dit", example("small"))
    edit_config(folder, _class_name="Transformer2DModel", cross_attention_dim=None)
    assert transformer.load_transformer(str(folder)).config == SMALL


def test_embedders_that_are_not_copies_are_refused(tmp_path):
    model = torch_dit(SMALL)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias += 1
    folder = save_as_diffusers(tmp_path / "dit", model)
    with pytest.raises(UserError, match=r"blocks.1.*linear_2.bias differs from .*blocks.0"):
        transformer.load_transformer(str(folder))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"beta_end": 0.012}, "says beta_end 0.012, and only 0.02 is supported"),
        ({"prediction_type": "sampel"}, "unknown prediction_type .*did you mean 'sample'"),
        ({"trained_betas": [0.1]}, "has trained_betas"),
        ({"rescale_betas_zero_snr": True}, "says rescale_betas_zero_snr True, and only False"),
        ({"variance_type": "learned"}, "unknown variance_type .*one of: fixed_small, "),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of a flow, which has no variance"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
            "says use_karras_sigmas True, which is not supported",
        ),
    ],
)
def test_a_schedule_that_is_not_ours_is_refused(facts, message, tmp_path):
    save_as_diffusers(tmp_path / "all" / "transformer", example("small"))
    path = tmp_path / "all" / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message):
        transformer.load_transformer(str(tmp_path / "all"))
