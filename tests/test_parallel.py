"""However many devices there are and however the weights lie on them, the numbers are the same."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import free_port, start
from flax import nnx
from jax.sharding import PartitionSpec as P

from data.batch import Batch, Caption
from inference import sampler as inference_sampler
from methods.ddpm import ddpm_loss
from methods.rectified_flow import logit_normal, rectified_flow_loss
from model import BLOCKS, JOINT, ModelConfig, graphdef, init_params
from runtime import parallel
from training import optim

key = jax.random.key(0)
DEVICES = jax.devices()
MESHES = {
    "1 device": parallel.make_mesh(devices=DEVICES[:1]),
    "DDP 8": parallel.make_mesh(1),
    "FSDP 8": parallel.make_mesh(8),
    "hybrid 2x4": parallel.make_mesh(4),
}
TINY = ModelConfig(
    width=64,
    depth=2,
    n_heads=2,
    patch_size=2,
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=5,
)
CONFIGS = {"DiT": TINY, "MMDiT": replace(TINY, block=JOINT, qk_norm=True)}
WIDE = ModelConfig(
    width=256,
    depth=6,
    n_heads=4,
    patch_size=2,
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=10,
    remat=True,
)
OPTIMIZER = optim.optimizer(
    optax.constant_schedule(1e-3), beta1=0.9, beta2=0.999, weight_decay=0.1, clip_norm=0.1
)
# Four meshes are compiled: that takes longer than anything that is run.
quickly_compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LOSS = rectified_flow_loss(density=logit_normal(), label_dropout=0.3)


def weights(config):
    """Far from their zero start, so that every one has a gradient."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, key))
    return jax.tree.map(lambda p: np.float32(rng.normal(scale=0.1, size=p.shape)), shapes)


def batch_of(n, config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, config.image_size, config.image_size, config.channels)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    if config.text_width:
        mask = np.arange(config.text_length) < rng.integers(0, config.text_length, (n, 1))
        tokens = rng.normal(size=(*mask.shape, config.text_width)).astype(np.float16)
        pooled = rng.normal(size=(n, config.pooled_width)).astype(np.float16)
        label = Caption(tokens, mask, pooled)
    else:
        label = rng.integers(0, config.n_classes, n).astype(np.int32)
    return Batch(np.arange(n, dtype=np.int32), image, label)


def per_device(tree):
    """Bytes of a tree on its first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# --- the same numbers -----------------------------------------------------------------------------


def steps(config, mesh, n=20, loss=LOSS):
    """Every step's loss, metrics and norms; the first step's gradient; the weights at last."""
    value_and_grad = parallel.value_and_grad(loss, graphdef(config), mesh)

    @quickly_compiled
    def step(params, state, batch, key):
        (loss, metrics), grads = value_and_grad(params, batch, key)
        updates, state = OPTIMIZER.update(grads, state, params)
        norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        return optax.apply_updates(params, updates), state, metrics | norms | {"loss": loss}, grads

    params = parallel.create(lambda: jax.tree.map(jnp.asarray, weights(config)), mesh)
    state = parallel.create(lambda: OPTIMIZER.init(weights(config)), mesh)
    reports, gradients = [], []
    for i in range(n):
        batch = parallel.spread(batch_of(16, config, seed=i), mesh)
        params, state, report, grads = step(params, state, batch, jax.random.fold_in(key, i))
        reports.append(parallel.fetch(report))
        gradients.append(grads)
    reports = jax.tree.map(lambda *x: np.stack(x), *reports)
    return {"reports": reports, "grads": gradients[0], "params": params}


@pytest.fixture(scope="module")
def results():
    return {name: steps(CONFIGS["DiT"], mesh) for name, mesh in MESHES.items()}


def assert_same_reports(got, expected):
    """The gradient norm too: a mean in the wrong place makes it n_devices times too large."""
    assert (expected["grad_norm"] > 0.1).all()  # so that clipping acts
    for metric in ("loss", "grad_norm", "update_norm", "binned_loss", "bin_share"):
        np.testing.assert_allclose(got[metric], expected[metric], rtol=1e-5, err_msg=metric)


def distance(a, b):
    """The largest difference, relative to the size of the whole array."""

    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / np.abs(b).max()

    return max(jax.tree.leaves(jax.tree.map(of, a, b)))


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_twenty_clipped_steps_of_a_dit_report_what_one_device_reports(results, name):
    assert_same_reports(results[name]["reports"], results["1 device"]["reports"])


@pytest.mark.slow
def test_twenty_clipped_steps_of_an_mmdit_report_what_one_device_reports():
    expected = steps(CONFIGS["MMDiT"], MESHES["1 device"])["reports"]
    for name in list(MESHES)[1:]:
        assert_same_reports(steps(CONFIGS["MMDiT"], MESHES[name])["reports"], expected)


@pytest.mark.slow
def test_steps_of_ddpm_report_what_one_device_reports():
    """With the variational bound, whose gradient is stopped in part."""
    how = {"n": 4, "loss": ddpm_loss(learned_sigma=True, min_snr_gamma=5.0, label_dropout=0.3)}
    config = replace(TINY, out_channels=2)
    expected = steps(config, MESHES["1 device"], **how)["reports"]
    for name in ("DDP 8", "hybrid 2x4"):
        assert_same_reports(steps(config, MESHES[name], **how)["reports"], expected)


@pytest.mark.slow
def test_two_processes_of_four_devices_report_what_one_device_reports(tmp_path):
    """FSDP inside each process, and the data axis across them."""
    how = {"cache": tmp_path / "xla", "n_devices": 4}
    port = free_port()
    pair = [start("tests/two_processes.py", port, index, tmp_path, **how) for index in (0, 1)]
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name, config in CONFIGS.items():
        with np.load(tmp_path / f"{name}.npz") as got:
            assert_same_reports(got, steps(config, MESHES["1 device"])["reports"])


@pytest.mark.parametrize("name", MESHES)
def test_parts_of_a_batch_add_up_to_the_gradient_of_all(name):
    batch = batch_of(32, TINY)
    whole, parts = (
        quickly_compiled(
            parallel.value_and_grad(LOSS, graphdef(TINY), MESHES[name], accumulate_steps=n)
        )
        for n in (1, 4)
    )
    params = parallel.create(lambda: jax.tree.map(jnp.asarray, weights(TINY)), MESHES[name])
    expected = whole(params, parallel.place(batch, MESHES[name]), key)
    got = parts(params, parallel.place(batch, MESHES[name]), key)
    assert distance(got, expected) < 1e-5
    for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(got[1]), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim)


def test_a_scale_leaves_the_gradient_as_it_is():
    mesh, batch = MESHES["hybrid 2x4"], batch_of(16, TINY)
    step = quickly_compiled(parallel.value_and_grad(LOSS, graphdef(TINY), mesh))
    params = parallel.create(lambda: jax.tree.map(jnp.asarray, weights(TINY)), mesh)
    plain = step(params, parallel.place(batch, mesh), key)
    scaled = step(params, parallel.place(batch, mesh), key, jnp.float32(1024))
    assert distance(scaled, plain) < 1e-6


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_gradients_are_those_of_one_device(results, name):
    assert distance(results[name]["grads"], results["1 device"]["grads"]) < 1e-5
    assert distance(results[name]["params"], results["1 device"]["params"]) < 1e-4


TEXT = {"n_classes": 0, "text_length": 6, "text_width": 10, "pooled_width": 8}


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, TEXT], ids=["class", "captions"])
@pytest.mark.parametrize("block", [*BLOCKS, JOINT])
def test_every_design_has_one_devices_gradient_on_all(block, told):
    config = replace(TINY, block=block, qk_norm=True, **told)
    batch = batch_of(16, config)

    def plain(params):
        batch_on_one = jax.tree.map(jnp.asarray, batch)
        return LOSS(nnx.merge(graphdef(config), params), batch_on_one, key)[0]

    loss, expected = quickly_compiled(jax.value_and_grad(plain))(weights(config))
    for mesh in (MESHES["DDP 8"], MESHES["hybrid 2x4"])[: 1 if block in BLOCKS else 2]:
        step = quickly_compiled(parallel.value_and_grad(LOSS, graphdef(config), mesh))
        params = jax.device_put(weights(config), parallel.shardings(weights(config), mesh))
        (got, _), grads = step(params, parallel.place(batch, mesh), key)
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        dead = jax.tree.map(lambda g: not np.abs(g).max() > 0, expected)
        pairs = zip(*map(jax.tree.leaves, (dead, grads, expected)), strict=True)
        alive = [(g, e) for d, g, e in pairs if not d]
        assert distance(*map(list, zip(*alive, strict=True))) < 1e-4


def test_one_devices_gradient_is_jax_grad(results):
    """No mesh, no shard_map, no `Gathered`: the plain gradient of the whole batch's loss."""
    batch = jax.tree.map(jnp.asarray, batch_of(16, TINY))

    def plain(params):
        return LOSS(nnx.merge(graphdef(TINY), params), batch, jax.random.fold_in(key, 0))[0]

    loss, grads = quickly_compiled(jax.value_and_grad(plain))(weights(TINY))
    np.testing.assert_allclose(results["1 device"]["reports"]["loss"][0], loss, rtol=1e-5)
    assert distance(results["1 device"]["grads"], grads) < 1e-5


def test_gradients_lie_as_the_weights_do(results):
    for name in ("FSDP 8", "hybrid 2x4"):
        params, grads = results[name]["params"], results[name]["grads"]
        for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
            assert g.sharding.is_equivalent_to(p.sharding, g.ndim)
        assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(params))


# --- memory ---------------------------------------------------------------------------------------


def test_fsdp_holds_an_eighth_of_weights_average_and_moments():
    def make():
        shapes = jax.eval_shape(lambda: init_params(WIDE, key))
        params = jax.tree.map(lambda p: jnp.ones(p.shape), shapes)
        return {"params": params, "ema": params, "optimizer": OPTIMIZER.init(params)}

    state = parallel.create(make, MESHES["FSDP 8"])
    for name, tree in state.items():
        assert per_device(tree) <= 1.3 / 8 * nbytes(tree), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [True, False])
def test_fsdp_never_holds_the_whole_model(remat, dtype):
    """Blocks are gathered one by one, and again in the backward pass, where activations are kept
    too: temporaries stay below what gathering all would take.
    """
    config = replace(WIDE, remat=remat, dtype=dtype)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(8, config)))
    mesh = MESHES["FSDP 8"]
    params = parallel.abstract(lambda: init_params(config, key), mesh)
    value_and_grad = jax.jit(parallel.value_and_grad(LOSS, graphdef(config), mesh))
    memory = value_and_grad.lower(params, batch, key).compile().memory_analysis()
    assert memory
    whole = sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory.argument_size_in_bytes < 1.3 / 8 * whole
    assert memory.output_size_in_bytes < 1.3 / 8 * whole
    assert memory.temp_size_in_bytes < whole / 2


def test_sampling_and_evaluation_never_hold_the_whole_model():
    """They are plain `jit` over sharded weights, which XLA gathers one block at a time."""
    mesh, config = MESHES["FSDP 8"], replace(WIDE, depth=12, remat=False)
    params = parallel.abstract(lambda: init_params(config, key), mesh)
    whole = sum(4 * x.size for x in jax.tree.leaves(params))
    batch = parallel.place(batch_of(8, config), mesh)
    sampler, how = inference_sampler.SamplerConfig(n_steps=3), {"guide": True, "trajectory": False}
    draw = inference_sampler.sample_batch.lower(
        params, batch.label, batch.row, 0, 2.0, config=config, sampler=sampler, **how
    )
    loss = jax.jit(lambda p, b: LOSS(nnx.merge(graphdef(config), p), b, key)[0])
    for lowered in (draw, loss.lower(params, batch)):
        memory = lowered.compile().memory_analysis()
        assert memory and memory.argument_size_in_bytes < 1.3 / 8 * whole
        assert memory.temp_size_in_bytes < whole / 4


# --- where arrays live ----------------------------------------------------------------------------


def specs(shapes, mesh="FSDP 8"):
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return parallel.partition(tree, MESHES[mesh])


def test_the_largest_axis_that_divides_is_split():
    assert specs({"a": (64, 128), "b": (256, 64), "c": (3, 3, 16, 512)}) == {
        "a": P(None, "fsdp"),
        "b": P("fsdp", None),
        "c": P(None, None, None, "fsdp"),
    }
    assert specs({"a": (64, 1001)}) == {"a": P("fsdp", None)}  # the largest does not


def test_the_depth_of_stacked_blocks_is_never_split():
    """Each block must be whole in the scan, on every device."""
    shapes = {"mlp": {"kernel": (1024, 64, 32), "bias": (64, 17)}}
    split = {"kernel": P(None, "fsdp", None), "bias": P()}
    for stack in ("blocks", "dual_blocks"):
        assert specs({stack: shapes})[stack]["mlp"] == split
    moments = optax.adam(1e-3).init({"blocks": {"kernel": jnp.zeros((8, 64, 17))}})
    mu = parallel.partition(moments, MESHES["FSDP 8"])[0].mu
    assert mu == {"blocks": {"kernel": P(None, "fsdp", None)}}


def test_small_odd_and_scalar_arrays_are_replicated():
    shapes = {"odd": (333, 777), "small": (8, 8), "scalar": (), "one": (1,)}
    assert set(specs(shapes).values()) == {P()}
    # Smallness is a block's, not that of the whole stack.
    assert specs({"blocks": {"bias": (100, 512)}}) == {"blocks": {"bias": P()}}


def test_ddp_replicates_everything():
    assert specs({"a": (64, 128)}, "DDP 8") == {"a": P()}


def test_created_weights_do_not_depend_on_the_mesh():
    def make():
        normal = jax.random.normal
        return {"kernel": normal(key, (64, 128)), "blocks": {"bias": normal(key, (2, 1024))}}

    expected = parallel.create(make, MESHES["1 device"])
    for name in ("FSDP 8", "hybrid 2x4"):
        params = parallel.create(make, MESHES[name])
        assert not any(p.sharding.is_fully_replicated for p in jax.tree.leaves(params))
        jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", MESHES)
def test_placing_splits_rows_in_order(name):
    mesh = MESHES[name]
    n = 16 // mesh.size
    placed = parallel.place(batch_of(16, TINY), mesh)
    for x, field in zip(placed, batch_of(16, TINY), strict=True):
        for device, shard in zip(mesh.devices.ravel(), shards(x, mesh), strict=True):
            assert shard.device == device
        np.testing.assert_array_equal(np.concatenate([s.data for s in shards(x, mesh)]), field)
        assert all(len(s.data) == n for s in shards(x, mesh))


def shards(x, mesh):
    order = mesh.devices.ravel().tolist()
    return sorted(x.addressable_shards, key=lambda shard: order.index(shard.device))
