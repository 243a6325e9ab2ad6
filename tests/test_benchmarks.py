"""The benchmarks of speed run, and their peer is the model that it is compared with."""

import importlib.util
import json
import os
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, run, settings

from benchmarks import peer, timing
from model import graphdef, init_params, model_config
from runtime.errors import UserError

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")),
    reason="the peer needs torch and diffusers: requirements-bench.txt",
)
NANO = model_config(
    "DiT-Ti/4", image_size=16, channels=4, out_channels=4, n_classes=10, width=32, depth=2
)
TINY = ["--model", "DiT-Ti/8", "--image_size", 16, "--rounds", 1]


# --- the peer -------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """torch's threads spin while they wait for one another: beside other tests, for minutes."""
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def as_torch(params) -> dict[str, np.ndarray]:
    """Our weights under diffusers' names."""

    def linear(name, x):
        return {f"{name}.weight": x["kernel"].T, f"{name}.bias": x["bias"]}

    p = jax.tree.map(np.asarray, params)
    found = linear("pos_embed.proj", p["patch"])
    n_out, side = len(p["patch"]["bias"]), NANO.patch_size
    kernel = found["pos_embed.proj.weight"].reshape(n_out, side, side, NANO.channels)
    found["pos_embed.proj.weight"] = kernel.transpose(0, 3, 1, 2)
    found |= linear("proj_out_1", p["final"]["modulation"])
    found |= linear("proj_out_2", p["final"]["out"])
    for i in range(NANO.depth):
        block, at = jax.tree.map(lambda x, i=i: x[i], p["blocks"]), f"transformer_blocks.{i}"
        found |= linear(f"{at}.norm1.emb.timestep_embedder.linear_1", p["time"]["mlp"]["hidden"])
        found |= linear(f"{at}.norm1.emb.timestep_embedder.linear_2", p["time"]["mlp"]["out"])
        found[f"{at}.norm1.emb.class_embedder.embedding_table.weight"] = p["label"]["table"]
        found |= linear(f"{at}.norm1.linear", block["modulation"])
        for part, name in enumerate("qkv"):
            qkv = block["attention"]["qkv"]["linear"]
            third = {key: np.split(x, 3, axis=-1)[part] for key, x in qkv.items()}
            found |= linear(f"{at}.attn1.to_{name}", third)
        found |= linear(f"{at}.attn1.to_out.0", block["attention"]["out"])
        found |= linear(f"{at}.ff.net.0.proj", block["mlp"]["up"])
        found |= linear(f"{at}.ff.net.2", block["mlp"]["down"])
    return found


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_the_peer_is_the_same_function_with_as_many_parameters(one_thread):
    """Without the embedders that diffusers repeats in every block, which `peer.build` shares."""
    import torch
    from flax import nnx

    params = init_params(NANO, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # What starts at zero would hide what it multiplies.
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, noisy)
    theirs = peer.build(NANO).eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in leaves)
    weights = {name: torch.tensor(np.array(x)) for name, x in as_torch(params).items()}
    theirs.load_state_dict(weights)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 16, 4)).astype(np.float32)
    t, label = np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 7, 10])
    ours = nnx.merge(graphdef(NANO), params)(*map(jnp.asarray, (x, t, label)))
    with torch.no_grad():
        y = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            torch.tensor(peer.TIME_SCALE * t),
            torch.tensor(label),
            return_dict=False,
        )[0]
    assert np.abs(ours).mean() > 0.1
    np.testing.assert_allclose(y.numpy().transpose(0, 2, 3, 1), ours, rtol=1e-3, atol=1e-4)


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fp32", "autocast"])
def test_the_peer_learns(one_thread, kind):
    """Its loss on one batch falls, so what is timed is training."""
    import torch

    torch.manual_seed(0)
    model = peer.build(NANO).train()
    how = {"device": "cpu", "batch_size": 8, "learning_rate": 3e-3}
    step = peer.train_step(model, NANO, peer.PEERS[kind], remat=False, **how)
    losses = [float(step()) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5])


def test_a_peer_that_cannot_be_says_why(monkeypatch):
    how = {"platform": "cpu", "batch_size": 1, "remat": False}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(peer.PeerMissing, match="'adaln'"):
        peer.Peer("fp32", "step", replace(NANO, block="adaln"), **how)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peer.PeerMissing, match=r"torch and diffusers .*requirements-bench\.txt"):
        peer.Peer("fp32", "step", NANO, **how)


# --- times ----------------------------------------------------------------------------------------


def test_turns_are_taken_in_rounds_of_which_the_first_does_not_count():
    order = []

    def turn(name, seconds):
        return lambda: order.append(name) or seconds.pop(0)

    times = timing.interleaved(
        {"a": turn("a", [100.0, 1.0, 2.0, 6.0]), "b": turn("b", [100.0, 3.0, 4.0, 6.0])}, 3
    )
    assert "".join(order) == "abbaabba"
    assert times["a"].seconds == (1.0, 2.0, 6.0)
    assert (times["a"].median, times["a"].min) == (2.0, 1.0)
    assert times["a"].times_as_fast_as(times["b"]) == 2.0  # of 3, 2 and 1
    with pytest.raises(UserError, match="--rounds 0"):
        timing.interleaved({}, 0)


def test_a_table_leaves_out_what_is_not_known():
    rows = [{"name": "a", "s": "1.5", "MFU": "n/a"}, {"name": "longer", "s": "n/a", "MFU": "n/a"}]
    assert timing.table(rows).splitlines() == [
        "| name   |   s |",
        "| ------ | --: |",
        "| a      | 1.5 |",
        "| longer | n/a |",
    ]


# --- the scripts ----------------------------------------------------------------------------------


def benchmark(script, *flags, cache):
    """What a script found; the table must be there, too."""
    done = run(f"benchmarks/{script}", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    *text, line = done.stdout.splitlines()
    table = [row for row in text if row.startswith("|")]
    assert len(table) > 2 and len({row.count("|") for row in table}) == 1
    found = json.loads(line)
    assert {"benchmark", "date", "device", "command", "versions", "rows"} <= set(found)
    return found["rows"], done.stdout


def test_step_without_a_peer(cache):
    how = ["--batch_size", 2, "--remat", "false,true", "--unroll", 1, "--precision", "bf16"]
    rows, _ = benchmark("step.py", *TINY, *how, "--peer", "none", cache=cache)
    assert [(row["remat"], row["unroll"]) for row in rows] == [(False, 1), (True, 1)]
    for row in rows:
        assert row["planned_bytes"] > 0 and row["compile_s"] > 0 and 0 < row["of_matmul"] < 1
        assert row["flops_per_second"] == pytest.approx(
            row["train_flops_per_image"] * row["images_per_second"]
        )


def test_a_plan_of_a_step_takes_none(cache):
    """The same memory as of a step that is taken."""
    how = [*TINY, "--batch_size", 2, "--unroll", 1, "--precision", "bf16", "--peer", "none"]
    (planned,), _ = benchmark("step.py", *how, "--plan_only", cache=cache)
    (taken,), _ = benchmark("step.py", *how, cache=cache)
    assert planned["planned_bytes"] == taken["planned_bytes"] > 0
    assert planned["median_s"] is None and planned["n_params"] == taken["n_params"]


@pytest.mark.slow
@needs_torch
def test_step_beside_torch(cache):
    how = ["--batch_size", 2, "--unroll", 1]
    rows, _ = benchmark("step.py", *TINY, *how, cache=cache)
    ours, *_, theirs = rows
    assert ours["n_params"] == theirs["n_params"]
    assert set(ours["times_as_fast_as"]) == {"fp32", "autocast"}
    assert theirs["times_as_fast_as"]["autocast"] == 1


def test_an_mmdit_has_no_peer(cache):
    flags = ["--model", "MMDiT-Ti/8", "--image_size", 16, "--rounds", 1, "--batch_size", 2]
    rows, text = benchmark("step.py", *flags, "--unroll", 1, "--precision", "fp32", cache=cache)
    assert len(rows) == 1
    assert "left out" in text


@pytest.mark.slow
@needs_torch
def test_sample(cache):
    rows, _ = benchmark("sample.py", *TINY, "--n", 2, "--n_steps", 2, cache=cache)
    assert [set(row["times_as_fast_as"]) for row in rows] == [{"fp32"}, {"autocast"}] * 2


def test_attention(cache):
    flags = ["--rounds", 1, "--batch_size", 1, "--tokens", 16, "--heads", 2, "--width", 24]
    rows, text = benchmark("attention.py", *flags, cache=cache)
    assert [row["way"] for row in rows] == ["own", "XLA"] * 2 and "left out: cuDNN" in text
    done = run("benchmarks/attention.py", "--heads", 2, cache=cache)
    assert done.returncode == 2 and "each number of heads needs its width" in done.stderr


def test_autoencoder(cache):
    flags = ["--rounds", 1, "--batch_size", 1, "--image_size", 16, "--block_out_channels", "32,32"]
    rows, _ = benchmark("autoencoder.py", *flags, "--precision", "bf16", "--nopeer", cache=cache)
    assert [row["what"] for row in rows] == ["encode, ours bf16", "decode, ours bf16"]


@pytest.mark.slow
@needs_torch
def test_autoencoder_beside_torch(cache):
    flags = ["--rounds", 1, "--batch_size", 1, "--image_size", 16, "--block_out_channels", "32,32"]
    rows, _ = benchmark("autoencoder.py", *flags, "--precision", "fp32", cache=cache)
    assert all(row["times_as_fast_as_torch"] > 0 for row in rows if "ours" in row["what"])


@pytest.mark.slow
def test_startup(cache):
    flags = ["--model", "DiT-Ti/8", "--rounds", 1, "--peer", "false"]
    rows, _ = benchmark("startup.py", *flags, cache=cache)
    assert rows["warm"]["median_s"] < rows["cold"]["median_s"]


@pytest.mark.slow
def test_the_gpu_script_without_a_gpu(cache):
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry"],
        cwd=ROOT,
        env=os.environ | settings(cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "status" not in done.stdout and "no time" not in done.stdout
    assert done.stdout.count("| model × batch") >= 8 and "| batch × tokens" in done.stdout
    assert "| what" in done.stdout


def test_the_gpu_script_is_well_formed():
    subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=ROOT, check=True)
