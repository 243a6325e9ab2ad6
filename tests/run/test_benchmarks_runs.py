"""The peer of the benchmarks is the model it is compared with, and turns are timed fairly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks_cases import (
    NANO,
    needs_torch,
    one_thread,  # noqa: F401
)

from benchmarks import peer
from model import init_model_params, model_graphdef


def as_torch(params) -> dict[str, np.ndarray]:
    """Return our weights under diffusers' names."""

    def linear(name, x):
        return {f"{name}.weight": x["kernel"].T, f"{name}.bias": x["bias"]}

    p = jax.tree.map(np.asarray, params)
    renamed = linear("pos_embed.proj", p["patch"])
    n_out, side = len(p["patch"]["bias"]), NANO.patch_size
    kernel = renamed["pos_embed.proj.weight"].reshape(n_out, side, side, NANO.channels)
    renamed["pos_embed.proj.weight"] = kernel.transpose(0, 3, 1, 2)
    renamed |= linear("proj_out_1", p["final"]["modulation"])
    renamed |= linear("proj_out_2", p["final"]["out"])
    for i in range(NANO.depth):
        block, at = jax.tree.map(lambda x, i=i: x[i], p["blocks"]), f"transformer_blocks.{i}"
        renamed |= linear(f"{at}.norm1.emb.timestep_embedder.linear_1", p["time"]["mlp"]["hidden"])
        renamed |= linear(f"{at}.norm1.emb.timestep_embedder.linear_2", p["time"]["mlp"]["out"])
        renamed[f"{at}.norm1.emb.class_embedder.embedding_table.weight"] = p["label"]["table"]
        renamed |= linear(f"{at}.norm1.linear", block["modulation"])
        for part, name in enumerate("qkv"):
            qkv = block["attention"]["qkv"]["linear"]
            third = {key: np.split(x, 3, axis=-1)[part] for key, x in qkv.items()}
            renamed |= linear(f"{at}.attn1.to_{name}", third)
        renamed |= linear(f"{at}.attn1.to_out.0", block["attention"]["out"])
        renamed |= linear(f"{at}.ff.net.0.proj", block["mlp"]["up"])
        renamed |= linear(f"{at}.ff.net.2", block["mlp"]["down"])
    return renamed


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_the_peer_is_the_same_function_with_as_many_parameters(one_thread):
    """diffusers repeats embedders in every block; `peer.build_torch_model` shares them."""
    import torch
    from flax import nnx

    params = init_model_params(NANO, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Zero-initialised weights would hide the ones they multiply.
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, noisy)
    theirs = peer.build_torch_model(NANO).eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in leaves)
    weights = {name: torch.tensor(np.array(x)) for name, x in as_torch(params).items()}
    theirs.load_state_dict(weights)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 16, 4)).astype(np.float32)
    t, label = np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 7, 10])
    ours = nnx.merge(model_graphdef(NANO), params)(*map(jnp.asarray, (x, t, label)))
    with torch.no_grad():
        y = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            torch.tensor(peer.TIME_SCALE * t),
            torch.tensor(label),
            return_dict=False,
        )[0]
    assert np.abs(ours).mean() > 0.1
    np.testing.assert_allclose(y.numpy().transpose(0, 2, 3, 1), ours, rtol=1e-3, atol=1e-4)
