"""Files of DiT and SiT as people save them: wrapped, in any precision, with and without a null
label, and with heads and arguments of any class beside the weights.
"""

import json
import pathlib
from argparse import Namespace
from collections import OrderedDict, defaultdict
from functools import cache, partial
from types import SimpleNamespace

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from dit_cases import (
    assert_same,
    one_thread,  # noqa: F401
)
from hypothesis import strategies as st
from torch_autoencoders import quiet
from torch_transformers import SMALL, WIDE, original_names, torch_dit

from inference.trained_model import SamplingOverrides, TrainedModel
from pretrained import dit, transformer
from pretrained.dit_file import parse_reference, read_label_table
from pretrained.weight_files import WEIGHTS, read_file_weights
from runtime.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
TABLE = dit.TABLE


@cache
def model():
    return torch_dit(SMALL)


@cache
def state():
    return {name: x.detach().clone() for name, x in original_names(model()).items()}


@cache
def params():
    tensors = {name: x.numpy().copy() for name, x in state().items()}
    return dit.params_from_original(tensors, SMALL, "here")


def load(path, facts="heads=4:classes=10:"):
    return transformer.load_transformer(f"dit:{facts}{path}")


def saved(contents, path, **options):
    torch.save(contents, path, **options)
    return path


def worse(tensors):
    return {name: x + 1 for name, x in tensors.items()}


def prefixed(prefix, tensors):
    return OrderedDict((prefix + name, x) for name, x in tensors.items())


# --- wrappings ------------------------------------------------------------------------------------


def test_the_average_is_taken_and_it_is_said(tmp_path, capsys):
    path = saved({"model": worse(state()), "ema": state()}, tmp_path / "a.pt")
    assert_same(load(path).params, params())
    assert capsys.readouterr().err == f"{path}: the weights are the average, 'ema'\n"
    path = saved({"ema": None, "model": state()}, tmp_path / "b.pt")
    assert_same(load(path).params, params())
    assert capsys.readouterr().err == ""


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    raw=st.sampled_from(("model", "state_dict", "model_state_dict", "net")),
    average=st.sampled_from((None, "ema", "ema_model", "model_ema", "ema_state_dict")),
    prefixes=st.lists(st.sampled_from(("module.", "_orig_mod.", "model.", "ema_model."))),
    zipped=st.booleans(),
    file_format=st.sampled_from(("torch", "safetensors")),
)
def test_weights_in_any_wrapping_are_read(
    raw, average, prefixes, zipped, file_format, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("file")
    prefix = "".join(prefixes)
    averaged = average is not None or "ema_model." in prefixes
    one = prefixed(prefix, state())
    contents = {raw: worse(one), average: one} if average else {raw: one}
    if file_format == "torch":
        contents |= {"ema_unused": None, "opt": {"state": {0: {"step": torch.ones(())}}}}
        path = saved(contents, folder / "a.pt", _use_new_zipfile_serialization=zipped)
    else:
        flat = {f"{key}.{n}": x.contiguous() for key, d in contents.items() for n, x in d.items()}
        safetensors_torch.save_file(flat, path := folder / "a.safetensors")
    if average and "ema_model." in prefixes:  # both copies are averages by their names
        with pytest.raises(UserError, match=r"2 copies of the weights .* save the one to use"):
            read_file_weights(path, (dit.PATCH,))
        return
    found = read_file_weights(path, (dit.PATCH,))
    assert_same(found.tensors, {name: x.numpy() for name, x in state().items()})
    assert bool(found.notices) == averaged


def test_a_list_of_averages_is_read_in_the_order_of_the_weights(tmp_path):
    trained = [x for name, x in state().items() if name != "pos_embed"]
    contents = {"model": worse(state()) | {"pos_embed": state()["pos_embed"]}}
    contents["ema"] = {"decay": 0.999, "shadow_params": trained, "collected_params": None}
    assert_same(load(saved(contents, tmp_path / "a.pt")).params, params())


class Net(torch.nn.Module):
    """A network of any class, which this process need not know to read its weights."""

    def __init__(self, tensors):
        super().__init__()
        for name, x in tensors.items():
            *parts, leaf = name.split(".")
            module = self
            for part in parts:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(x))
        self.owner = [self]


def test_a_whole_module_is_read_as_its_weights(tmp_path):
    path = saved({"model": Net(worse(state())), "ema": Net(state())}, tmp_path / "a.pt")
    assert_same(load(path).params, params())


# --- what lies beside the weights -----------------------------------------------------------------


def test_arguments_of_any_class_are_passed_over(tmp_path):
    beside = {
        "args": Namespace(data=pathlib.PosixPath("x"), lr=np.float64(1e-4), n=np.int64(3)),
        "config": SimpleNamespace(out=pathlib.PureWindowsPath("c"), betas=np.array([0.9, 0.99])),
        "more": [torch.device("cpu"), torch.float16, {1, 2}, slice(1), partial(int, 1), 1j],
        "seen": defaultdict(list, a=[1]),
        ("a", 1): {"rng": torch.get_rng_state(), pathlib.PosixPath("k"): 1},
        "fraction": np.float32(0.5),
        "epoch": torch.tensor(3),
    }
    for zipped in (True, False):
        contents = {"model": state()} | beside
        path = saved(contents, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert_same(load(path).params, params())


def test_an_average_of_numpy_arrays_is_taken(tmp_path):
    """As JAX scripts and some EMAs save it, in any order of memory and of bytes."""
    arrays = {name: np.asfortranarray(x.numpy()) for name, x in state().items()}
    arrays["x_embedder.proj.bias"] = arrays["x_embedder.proj.bias"].astype(">f4")
    for name, contents in (("a", {"model": worse(state()), "ema": arrays}), ("b", arrays)):
        for zipped in (True, False):
            path = tmp_path / f"{name}.pt"
            torch.save(contents, path, _use_new_zipfile_serialization=zipped)
            assert_same(load(path).params, params())


def test_what_cannot_be_read_beside_the_weights_is_passed_over(tmp_path):
    beside = {
        "names": np.array(["a", None], object),
        "when": np.array(["2026-01-01"], "datetime64[D]"),
        "spectrum": torch.zeros(3, dtype=torch.complex64),
        "args": Namespace(steps=range(3), n=np.int64(3)),
    }
    assert_same(load(saved({"model": state()} | beside, tmp_path / "a.pt")).params, params())


def test_the_model_in_the_arguments_tells_the_family(tmp_path):
    path = saved({"ema": state(), "args": Namespace(model="SiT-S/2")}, tmp_path / "0050000.pt")
    with pytest.raises(UserError, match="no published size: give their number of heads"):
        transformer.load_transformer(str(path))
    path = saved({"ema": state(), "args": Namespace(model="U-ViT")}, tmp_path / "0050000.pt")
    with pytest.raises(UserError, match="may be a DiT or a SiT"):
        transformer.load_transformer(str(path))


def test_another_network_in_the_file_is_named(tmp_path):
    beside = {"vae": {"conv.weight": torch.ones(2)}, "opt": {"state": {0: {"step": torch.ones(1)}}}}
    contents = {"ema": state(), "model_state_dict": worse(state())} | beside
    loaded = load(saved(contents, tmp_path / "a.pt"))
    assert loaded.notices == ("the weights are the average, 'ema'", "not read: vae (1 tensors)")


def test_heads_of_training_are_ignored_and_named(tmp_path):
    heads = {"projectors.0.0.weight": torch.ones(3, 4), "projectors.0.0.bias": torch.ones(3)}
    loaded = load(saved({"model": state() | heads}, tmp_path / "a.pt"))
    assert_same(loaded.params, params())
    assert loaded.notices == ("ignored, as only training uses them: projectors (2 tensors)",)
    path = saved(state() | {"logvar": torch.ones(3)}, tmp_path / "c.pt")
    assert load(path).notices == ("ignored, as only training uses them: logvar (1 tensors)",)
    path = saved(state() | {"register_tokens": torch.ones(3, 4)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="it has no place for register_tokens"):
        load(path)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_any_precision_are_read(dtype, suffix, tmp_path):
    rounded = {name: x.to(getattr(torch, dtype)) for name, x in state().items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({"model": rounded}, path)
    else:
        safetensors_torch.save_file({n: x.contiguous() for n, x in rounded.items()}, path)
    table = load(path).params["label"]["table"]
    assert table.dtype == np.float32
    np_type = getattr(ml_dtypes, dtype, dtype)
    np.testing.assert_array_equal(table, state()[TABLE].numpy().astype(np_type).astype("f4"))


def test_quantized_weights_are_refused_by_name(tmp_path):
    quantized = state() | {TABLE: torch.ones(11, 32, dtype=torch.int8)}
    with pytest.raises(UserError, match=r"embedding_table.weight is int8; weights are F32, F16"):
        load(saved(quantized, tmp_path / "a.pt"))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_sharded_folder_of_half_precision_is_read(variant, safe, tmp_path):
    with quiet():
        half = torch_dit(SMALL).half()
        half.save_pretrained(
            tmp_path, max_shard_size="50KB", variant=variant, safe_serialization=safe
        )
    assert not (tmp_path / WEIGHTS).exists() and list(tmp_path.glob("*-00002-of-*"))
    loaded = transformer.load_transformer(f"original:{tmp_path}")
    expected = state()[TABLE].numpy().astype("f2").astype("f4")
    np.testing.assert_array_equal(loaded.params["label"]["table"], expected)


def save_in_parts(tensors, folder, suffix):
    """Save every other tensor in a second file, and return the index of both."""
    names = [*tensors]
    stem, files = "model", {}
    for i in range(2):
        file = folder / f"{stem}-{i + 1:05}-of-00002.{suffix}"
        some = {name: tensors[name].clone().contiguous() for name in names[i::2]}
        torch.save(some, file) if suffix == "bin" else safetensors_torch.save_file(some, file)
        files |= dict.fromkeys(some, file.name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_of_several_files_is_a_file(suffix, tmp_path):
    wrapped = prefixed("module.", state()) | prefixed("model.", worse(state()))
    index = save_in_parts(prefixed("ema_model.", state()) | wrapped, tmp_path, suffix)
    assert_same(load(index).params, params())
    with pytest.raises(
        UserError, match=f"name one of its files, such as {index}, of a DiT or SiT as dit:"
    ):
        transformer.load_transformer(str(tmp_path))
    with pytest.raises(
        UserError, match=f"is one part of several: name their index, such as {index}"
    ):
        load(tmp_path / f"model-00002-of-00002.{suffix}")


def test_a_tensor_in_two_files_of_an_index_is_refused(tmp_path):
    index = save_in_parts(state(), tmp_path, "safetensors")
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    both = safetensors_torch.load_file(first) | safetensors_torch.load_file(second)
    safetensors_torch.save_file(both, second)
    with pytest.raises(UserError, match=r"is in another file of the same weights too"):
        load(index)
    second.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002"):
        load(index)
    index.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"index\.json is damaged: a Git LFS"):
        load(index)


def test_biases_that_no_block_has_are_zero(tmp_path):
    tensors = {name: x for name, x in state().items() if not name.endswith("qkv.bias")}
    loaded = load(saved(tensors, tmp_path / "a.pt"))
    assert loaded.notices == ("biases that are not in the file are zero: blocks.*.attn.qkv.bias",)
    assert not loaded.params["blocks"]["attention"]["qkv"]["linear"]["bias"].any()
    with quiet():
        facts = {k: v for k, v in model().config.items() if not k.startswith("_")}
        theirs = type(model())(**facts | {"attention_bias": False})
        theirs.load_state_dict(model().state_dict(), strict=False)
        theirs.save_pretrained(tmp_path)
    notice, _ = transformer.load_transformer(f"original:{tmp_path}").notices
    names = ", ".join(f"transformer_blocks.*.attn1.to_{part}.bias" for part in "qkv")
    assert notice == f"biases that are not in the file are zero: {names}"


def test_a_file_of_a_folder_with_a_config_names_the_folder(tmp_path):
    with quiet():
        model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a part of '{tmp_path}': name the folder"):
        load(tmp_path / WEIGHTS)


# --- the null label -------------------------------------------------------------------------------


def without_null(tensors):
    return tensors | {TABLE: tensors[TABLE][:-1]}


def check_unguided(reference, n_classes):
    trained = TrainedModel.from_pretrained(reference)
    assert trained.model.n_classes == n_classes
    plan = trained.plan(SamplingOverrides(n_steps=2))
    assert plan.cfg_scale == 1 and plan.sampler.guided_channels is None
    with pytest.raises(UserError, match=r"cfg_scale 4: .* has no null label to guide by; leave"):
        trained.plan(SamplingOverrides(cfg_scale=4.0))
    with pytest.raises(UserError, match="no null label to guide by"):
        trained.sample([0], plan.with_cfg_scale(2.0), decode=False)
    return trained


@pytest.mark.parametrize("facts", [{"num_classes": 10}, {"class_dropout_prob": 0.0}, {}])
def test_a_table_without_a_null_label_is_not_guided(facts, tmp_path):
    """The table of ten classes, also without arguments: nobody trains on nine."""
    contents = {"ema": without_null(state()), "args": Namespace(**facts)}
    path = saved(contents, tmp_path / "a.pt")
    trained = check_unguided(f"dit:heads=4:{path}", 10)
    table = trained.params["label"]["table"]
    np.testing.assert_array_equal(table[:10], state()[TABLE][:10])
    plan = trained.plan(SamplingOverrides(n_steps=2))
    assert trained.sample([9], plan, decode=False).x.shape == (1, 8, 8, 4)


def test_a_folder_without_a_null_label_is_not_guided(tmp_path):
    with quiet():
        model().save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / WEIGHTS)
    tensors = {n: x[:10].clone() if x.shape == (11, 32) else x for n, x in tensors.items()}
    safetensors_torch.save_file(tensors, tmp_path / WEIGHTS)
    check_unguided(f"original:{tmp_path}", 10)


def test_the_number_of_classes_can_be_given(tmp_path):
    path = saved(original_names(torch_dit(WIDE)), tmp_path / "a.pt")  # three classes and the null
    check_unguided(f"dit:heads=2:classes=4:{path}", 4)
    guided = TrainedModel.from_pretrained(f"dit:classes=3:heads=2:{path}")
    assert guided.model.n_classes == 3 and guided.plan(SamplingOverrides()).cfg_scale == 4
    with pytest.raises(UserError, match="5 classes, and 4 rows of labels: name it as dit:classes="):
        load(path, "heads=2:classes=5:")


@pytest.mark.parametrize(
    "n_rows, known, n_classes, has_null, said",
    [
        (1, {}, 0, True, ""),
        (11, {}, 10, True, "11 rows of labels are taken for 10 classes and the null label; if it"),
        (1001, {}, 1000, True, "1001 rows of labels are taken for 1000 classes and the null label"),
        (1001, {"dropout": 0.1}, 1000, True, ""),
        (1000, {}, 1000, False, "1000 rows of labels are taken for 1000 classes without a null"),
        (8, {}, 7, True, "8 rows of labels are taken for 7 classes and the null label"),
        (8, {"n_classes": 8}, 8, False, ""),
        (8, {"dropout": 0.0}, 8, False, ""),
        (8, {"dropout": 0.1}, 7, True, ""),
        (1000, {"dropout": 0.1}, 999, True, ""),
    ],
)
def test_the_rows_of_a_label_table(n_rows, known, n_classes, has_null, said):
    table = read_label_table(n_rows, "a.pt", **known)
    assert (table.n_classes, table.has_null) == (n_classes, has_null)
    assert table.notice.startswith(said) and bool(table.notice) == bool(said)


@pytest.mark.parametrize("n_rows", [2, 102])
def test_rows_that_may_be_either_are_asked_for(n_rows):
    with pytest.raises(UserError, match=rf"{n_rows} rows .* perhaps null: name it as dit:classes="):
        read_label_table(n_rows, "a.pt")


def test_facts_before_a_path_come_in_any_order():
    assert parse_reference("SiT:classes=3:heads=6:a:b.pt") == ("sit", 6, 3, "a:b.pt")
    assert parse_reference("sit:a.pt") == ("sit", None, None, "a.pt")
    assert parse_reference("us/dit") == (None, None, None, "us/dit")


def test_weights_of_a_folder_may_have_prefixes_and_heads(tmp_path):
    with quiet():
        model().save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / WEIGHTS)
    wrapped = prefixed("module.", tensors | {"proj_head.weight": torch.ones(2)})
    safetensors_torch.save_file(dict(wrapped), tmp_path / WEIGHTS)
    loaded = transformer.load_transformer(f"original:{tmp_path}")
    assert_same(loaded.params, params())
    assert loaded.notices[0] == "ignored, as only training uses them: proj_head (1 tensors)"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == dit.CLASS


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: run"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"", "the file is empty"),
    ],
)
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(content, message, suffix, tmp_path):
    (path := tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=f"a.{suffix} holds no weights: {message}"):
        load(path)


def test_a_file_that_was_copied_in_part_is_named(tmp_path):
    content = saved(state(), path := tmp_path / "a.pt").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="its end is missing: copy or download it again"):
        load(path)
