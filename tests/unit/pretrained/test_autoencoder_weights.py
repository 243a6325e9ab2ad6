"""diffusers' weights become ours and ours diffusers', to the bit; what does not fit is named."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
from autoencoder_weights_cases import (
    COMMIT,
    assert_same,
    folder,  # noqa: F401
    hub,  # noqa: F401
    params,  # noqa: F401
)
from torch_autoencoders import CONFIGS, SD, quiet, tensors_of, torch_autoencoder

from networks.autoencoder import init_autoencoder_params
from pretrained import autoencoder, weight_files
from pretrained.state_dicts import flatten_leaves
from runtime.errors import UserError

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def edit(folder, change, name=weight_files.WEIGHTS):
    """Rewrite a file of weights with `change` made to its tensors."""
    tensors = safetensors.numpy.load_file(folder / weight_files.WEIGHTS)
    safetensors.numpy.save_file(change(tensors), folder / name, {"format": "pt"})


def edit_config(folder, **facts):
    path = folder / weight_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def facts_of(model):
    """Return its config, as JSON would hold it."""
    facts = {k: v for k, v in model.config.items() if not k.startswith("_")}
    return json.loads(json.dumps(facts))


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_to_diffusers_and_back_to_the_bit(name, tmp_path):
    config, theirs = CONFIGS[name], torch_autoencoder(CONFIGS[name])
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    ours = autoencoder.load_autoencoder(str(tmp_path / "theirs"))
    assert ours.config == config
    autoencoder.save_autoencoder(tmp_path / "ours", ours.config, ours.params)
    with quiet():
        again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(tensors_of(again), tensors_of(theirs))
    assert facts_of(again) == facts_of(theirs)
    back = autoencoder.load_autoencoder(str(tmp_path / "ours"))
    assert_same(back.params, ours.params)
    assert (back.config, back.hash) == (ours.config, ours.hash)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_published_name_is_of_one_weight(name):
    config, names = CONFIGS[name], set(torch_autoencoder(CONFIGS[name]).state_dict())
    assert set(autoencoder.paths_and_shapes(config)) == names
    tree = jax.eval_shape(lambda: init_autoencoder_params(config, jax.random.key(0)))
    ours = {path for path, _ in autoencoder.paths_and_shapes(config).values()}
    assert ours == set(flatten_leaves(tree)) and len(ours) == len(names)


def test_saving_replaces_what_was_there(folder, params):
    doubled = jax.tree.map(lambda x: 2 * x, params)
    autoencoder.save_autoencoder(folder, replace(SD, scaling_factor=0.5), doubled)
    loaded = autoencoder.load_autoencoder(str(folder))
    assert_same(loaded.params, doubled)
    assert loaded.config.scaling_factor == 0.5
    assert sorted(path.name for path in folder.iterdir()) == [
        weight_files.CONFIG,
        weight_files.WEIGHTS,
    ]


def test_a_save_that_fails_leaves_the_old_weights(folder, params, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write weights to '.*': No space left on device"):
        autoencoder.save_autoencoder(folder, SD, jax.tree.map(lambda x: 2 * x, params))
    monkeypatch.undo()
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)
    assert sorted(path.name for path in folder.iterdir()) == [
        weight_files.CONFIG,
        weight_files.WEIGHTS,
    ]


def test_weights_of_another_config_are_not_saved(tmp_path, params):
    with pytest.raises(UserError, match=r"do not fit its config: .*quant_conv.bias"):
        autoencoder.save_autoencoder(tmp_path / "new", replace(SD, use_quant_conv=False), params)
    assert not (tmp_path / "new").exists()


# --- files ----------------------------------------------------------------------------------------


def test_a_pipeline_s_autoencoder_lies_in_its_vae(folder, params):
    (folder / "vae").mkdir()
    for name in (weight_files.CONFIG, weight_files.WEIGHTS):
        (folder / name).rename(folder / "vae" / name)
    (folder / "model_index.json").write_text("{}")
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_files_are_read_as_they_are(dtype, folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = safetensors.numpy.load_file(folder / weight_files.WEIGHTS)
    rounded = {k: torch.from_numpy(x).to(getattr(torch, dtype)) for k, x in tensors.items()}
    save_file(rounded, folder / weight_files.WEIGHTS, {"format": "pt"})
    loaded = autoencoder.params_to_diffusers(autoencoder.load_autoencoder(str(folder)).params)
    assert all(x.dtype == np.float32 for x in loaded.values())
    assert_same(loaded, {k: x.float().numpy() for k, x in rounded.items()})


def test_full_precision_is_preferred_and_half_is_enough(folder, params):
    half = "diffusion_pytorch_model.fp16.safetensors"
    edit(folder, lambda tensors: {k: x.astype("f2") for k, x in tensors.items()}, half)
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)
    (folder / weight_files.WEIGHTS).unlink()
    rounded = jax.tree.map(lambda x: np.asarray(x).astype("f2").astype("f4"), params)
    assert_same(autoencoder.load_autoencoder(str(folder)).params, rounded)


def test_the_hash_is_of_the_weights_not_of_their_file(folder, params):
    first = autoencoder.load_autoencoder(str(folder)).hash
    assert first == autoencoder.hash_weights(params)
    edit(folder, lambda tensors: old_names(tensors, as_convolutions=True))
    assert autoencoder.load_autoencoder(str(folder)).hash == first

    def nudged(tensors):
        tensors["decoder.conv_in.weight"][0, 0, 0, 0] += 1e-3
        return tensors

    autoencoder.save_autoencoder(folder, SD, params)
    edit(folder, nudged)
    assert autoencoder.load_autoencoder(str(folder)).hash != first


def old_names(tensors, *, as_convolutions):
    """Use attention's names from before 2023, and optionally the oldest files' linear maps."""
    loaded = {}
    for name, x in tensors.items():
        for new, old in OLD.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
                x = x[:, :, None, None] if as_convolutions and x.ndim == 2 else x
        loaded[name] = x
    return loaded


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_names_of_attention_are_known(as_convolutions, folder, params):
    edit(folder, lambda tensors: old_names(tensors, as_convolutions=as_convolutions))
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)


# --- what does not fit ----------------------------------------------------------------------------


def added(tensors):
    return tensors | {"encoder.extra.weight": np.zeros(3, "f4")}


def removed(tensors):
    return {k: x for k, x in tensors.items() if k != "decoder.mid_block.attentions.0.to_q.bias"}


def reshaped(tensors):
    return tensors | {"encoder.conv_in.weight": tensors["encoder.conv_in.weight"][:, :, :1]}


def twice(tensors):
    name = "encoder.mid_block.attentions.0.to_k.bias"
    return tensors | {name.replace("to_k", "key"): tensors[name]}


def as_double(tensors):
    return tensors | {"quant_conv.bias": np.zeros(8)}


@pytest.mark.parametrize(
    "change, message",
    [
        (added, "it has no place for encoder.extra.weight$"),
        (removed, "it lacks decoder.mid_block.attentions.0.to_q.bias$"),
        (reshaped, r"shape is encoder.conv_in.weight \(8, 3, 1, 3\), not \(8, 3, 3, 3\)$"),
        (twice, "encoder.mid_block.attentions.0.to_k.bias twice"),
        (as_double, "quant_conv.bias is F64, which is none of F32, F16, BF16"),
        (lambda _: {}, r"it lacks decoder.conv_in.bias, .* and \d+ more$"),
    ],
)
def test_every_weight_is_used_once_and_none_is_left(change, message, folder):
    edit(folder, change)
    with pytest.raises(UserError, match=message) as error:
        autoencoder.load_autoencoder(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"_class_name": "AutoencoderDC"}, "is not an AutoencoderKL but AutoencoderDC"),
        ({"_class_name": None}, "is not an AutoencoderKL but of no known class"),
        ({"act_fn": "gelu"}, "says act_fn gelu: not supported"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"temporal": 4}, "says temporal 4: not supported"),
        ({"norm_num_groups": 3}, "block_out_channels 8: not divisible by norm_num_groups 3"),
        ({"layers_per_block": 1.5}, "says layers_per_block 1.5: must be a whole number"),
        ({"block_out_channels": [8, "16"]}, "must be a list of widths"),
        ({"block_out_channels": 16}, "says block_out_channels 16: must be a list of widths"),
        ({"scaling_factor": "0.18"}, "says scaling_factor 0.18: must be a number"),
        ({"use_quant_conv": 1}, "says use_quant_conv 1: must be true or false"),
    ],
)
def test_a_config_of_something_else_is_refused(facts, message, folder):
    edit_config(folder, **facts)
    with pytest.raises(UserError, match=message) as error:
        autoencoder.load_autoencoder(str(folder))
    assert str(folder) in str(error.value)


def test_facts_missing_in_a_config_are_diffusers_defaults():
    theirs = type(torch_autoencoder(SD))()
    name = {"_class_name": "AutoencoderKL"}
    loaded = autoencoder.config_from_diffusers(name, "nowhere")
    assert loaded == autoencoder.config_from_diffusers(name | facts_of(theirs), "nowhere")


def test_configs_as_they_are_published_are_read():
    """Sizes may be lists, an absent fact may be null, and 1 may stand for 1.0."""
    facts = {"sample_size": [256, 512], "shift_factor": None, "scaling_factor": 1}
    config = autoencoder.config_from_diffusers({"_class_name": "AutoencoderKL"} | facts, "nowhere")
    assert (config.sample_size, config.shift_factor, config.scaling_factor) == (512, 0.0, 1.0)


def without(name):
    return lambda folder: (folder / name).unlink()


def torn(folder):
    path = folder / weight_files.WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])


def half_gone(folder):
    (folder / weight_files.INDEX).write_text('{"weight_map": {"a": "1.safetensors"}}')
    (folder / weight_files.WEIGHTS).unlink()


def an_html_page(folder):
    (folder / weight_files.CONFIG).write_text("<!DOCTYPE html><html></html>")


def pointing_elsewhere(folder):
    (folder / weight_files.INDEX).write_text('{"weight_map": {"a": "../1.safetensors"}}')
    (folder / weight_files.WEIGHTS).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (without(weight_files.CONFIG), "holds no config.json, nor a vae/config.json"),
        (without(weight_files.WEIGHTS), "holds no diffusion_pytorch_model.safetensors$"),
        (half_gone, "lacks 1.safetensors, which its .*index.json names"),
        (pointing_elsewhere, "it names files elsewhere"),
        (torn, "diffusion_pytorch_model.safetensors is damaged"),
        (lambda folder: (folder / weight_files.CONFIG).write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / weight_files.CONFIG).write_text("[]"), "config.json is damaged"),
        (an_html_page, "config.json is damaged: an HTML page"),
    ],
)
def test_damage_is_refused_in_one_line(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message):
        autoencoder.load_autoencoder(str(folder))


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, params):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write weights to"):
        autoencoder.save_autoencoder(tmp_path / "file" / "vae", SD, params)


# --- other files of weights -----------------------------------------------------------------------


def test_weights_in_several_files_are_one(folder, params):
    tensors = safetensors.numpy.load_file(folder / weight_files.WEIGHTS)
    (folder / weight_files.WEIGHTS).unlink()
    named = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(named.values()):
        some = {name: x for name, x in tensors.items() if named[name] == file}
        safetensors.numpy.save_file(some, folder / file)
    (folder / weight_files.INDEX).write_text(json.dumps({"weight_map": named}))
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)


def test_weights_as_torch_saves_them_are_the_same(folder, params):
    """And so are those of either format under the name of the other."""
    torch = pytest.importorskip("torch")
    weights, torchs = folder / weight_files.WEIGHTS, folder / "diffusion_pytorch_model.bin"
    weights.rename(torchs)
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)
    tensors = safetensors.numpy.load(torchs.read_bytes())
    state = {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
    torch.save(state, torchs)
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)
    torchs.rename(weights)
    assert_same(autoencoder.load_autoencoder(str(folder)).params, params)


def test_written_weights_are_safetensors(folder, params):
    """Compare with the format's own reader."""
    loaded = safetensors.numpy.load_file(folder / weight_files.WEIGHTS)
    assert_same(loaded, autoencoder.params_to_diffusers(params))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_an_id_of_the_hub_is_found_in_its_cache(hub, params, revision):
    loaded = autoencoder.load_autoencoder("us/vae", revision=revision)
    assert_same(loaded.params, params)
    assert (loaded.id, loaded.revision, loaded.config) == ("us/vae", COMMIT, SD)


def test_a_pipeline_of_the_hub_has_it_in_its_vae(hub, params):
    (hub / "vae").mkdir()
    (hub / weight_files.CONFIG).rename(hub / "vae" / weight_files.CONFIG)
    half = "diffusion_pytorch_model.fp16.safetensors"
    (hub / weight_files.WEIGHTS).rename(hub / "vae" / half)
    assert_same(autoencoder.load_autoencoder("us/vae").params, params)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "us/other",
            "cannot load 'us/other': it is not a local path, not complete in the hub's cache, and",
        ),
        (
            "/no/such/folder",
            "'/no/such/folder': it is neither a local path nor a valid id of the hub",
        ),
    ],
)
def test_missing_weights_are_refused_in_one_line(hub, name, message):
    with pytest.raises(UserError, match=message) as error:
        autoencoder.load_autoencoder(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("GatedRepoError", r"accept the terms on https://huggingface.co/us/vae"),
        ("RepositoryNotFoundError", "nor a public model of the hub"),
        ("RevisionNotFoundError", "no revision 'v2' of it"),
        ("RemoteEntryNotFoundError", "holds no config.json with diffusion_pytorch_model"),
        ("DisabledRepoError", "DisabledRepoError"),
    ],
)
def test_refusals_of_the_hub_become_one_line(kind, message, monkeypatch):
    pytest.importorskip("diffusers")
    from huggingface_hub import errors

    with quiet():
        from diffusers import configuration_utils

    def refuse(*_, **__):
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(configuration_utils, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=f"cannot load 'us/vae': .*{message}"):
        autoencoder.load_autoencoder("us/vae", revision="v2")
