"""The numbers are the same on any number of devices and for any sharding of the weights."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parallel_cases import (
    CONFIGS,
    LOSS,
    MESHES,
    TINY,
    WIDE,
    assert_same_reports,
    batch_of,
    distance,
    key,
    quickly_compiled,
    results,  # noqa: F401
    steps,
    tapped_loss,
    weights,
)

from inference import sampler as inference_sampler
from methods.ddpm import DDPM
from model import BLOCKS, JOINT, init_model_params, model_graphdef
from runtime import parallel


@pytest.mark.slow
def test_twenty_clipped_steps_of_an_mmdit_report_what_one_device_reports():
    expected = steps(CONFIGS["MMDiT"], MESHES["1 device"])["reports"]
    for name in list(MESHES)[1:]:
        assert_same_reports(steps(CONFIGS["MMDiT"], MESHES[name])["reports"], expected)


@pytest.mark.slow
def test_steps_of_ddpm_report_what_one_device_reports():
    """With the variational bound, whose gradient is stopped in part."""
    loss = partial(DDPM(learned_sigma=True, min_snr_gamma=5.0).loss, label_dropout=0.3)
    config = replace(TINY, out_channels=2)
    expected, found = (
        steps(config, MESHES[name], n=4, loss=loss)["reports"]
        for name in ("1 device", "hybrid 2x4")
    )
    assert_same_reports(found, expected)


TEXT = {"n_classes": 0, "text_length": 6, "text_width": 10, "pooled_width": 8}


# With classes, those two are proved by twenty steps.
DESIGNS = [(block, TEXT) for block in (*BLOCKS, JOINT)]
DESIGNS += [(block, {}) for block in BLOCKS if block != TINY.block]


@pytest.mark.slow
@pytest.mark.parametrize("block, conditioning", DESIGNS)
def test_every_design_has_one_devices_gradient_on_all(block, conditioning):
    config = replace(TINY, block=block, qk_norm=True, **conditioning)
    batch = batch_of(16, config)

    def plain(params):
        batch_on_one = jax.tree.map(jnp.asarray, batch)
        return LOSS(nnx.merge(model_graphdef(config), params), batch_on_one, key)[0]

    loss, expected = quickly_compiled(jax.value_and_grad(plain))(weights(config))
    mesh = MESHES["hybrid 2x4"]
    step = quickly_compiled(parallel.value_and_grad(LOSS, model_graphdef(config), mesh))
    params = jax.device_put(weights(config), parallel.named_shardings(weights(config), mesh))
    (got, _), grads = step(params, parallel.shard_batch(batch, mesh), key)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    dead = jax.tree.map(lambda g: not np.abs(g).max() > 0, expected)
    pairs = zip(*map(jax.tree.leaves, (dead, grads, expected)), strict=True)
    alive = [(g, e) for d, g, e in pairs if not d]
    assert distance(*map(list, zip(*alive, strict=True))) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [{}, {"block": JOINT, "n_dual": 3, "remat": True}],
    ids=["DiT", "MMDiT, dual, remat"],
)
def test_taps_have_one_devices_gradient_on_all(fields):
    config = replace(TINY, depth=6, **fields)
    batch = batch_of(16, config)

    def plain(params):
        batch_on_one = jax.tree.map(jnp.asarray, batch)
        return tapped_loss(nnx.merge(model_graphdef(config), params), batch_on_one, key)[0]

    loss, expected = quickly_compiled(jax.value_and_grad(plain))(weights(config))
    for mesh in (MESHES["FSDP 8"], MESHES["hybrid 2x4"]):
        step = quickly_compiled(parallel.value_and_grad(tapped_loss, model_graphdef(config), mesh))
        params = jax.device_put(weights(config), parallel.named_shardings(weights(config), mesh))
        (got, _), grads = step(params, parallel.shard_batch(batch, mesh), key)
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        assert distance(grads, expected) < 1e-4


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_twenty_clipped_steps_of_a_dit_report_what_one_device_reports(results, name):
    assert_same_reports(results[name]["reports"], results["1 device"]["reports"])


@pytest.mark.parametrize("name", ["1 device", "hybrid 2x4"])
def test_gradients_of_microbatches_add_up_to_that_of_the_batch(name):
    batch = batch_of(32, TINY)
    whole, parts = (
        quickly_compiled(
            parallel.value_and_grad(LOSS, model_graphdef(TINY), MESHES[name], accumulate_steps=n)
        )
        for n in (1, 4)
    )
    params = parallel.create_sharded(lambda: jax.tree.map(jnp.asarray, weights(TINY)), MESHES[name])
    expected = whole(params, parallel.shard_batch(batch, MESHES[name]), key)
    got = parts(params, parallel.shard_batch(batch, MESHES[name]), key)
    assert distance(got, expected) < 1e-5
    for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(got[1]), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim)


def test_a_scale_leaves_the_gradient_as_it_is():
    mesh, batch = MESHES["hybrid 2x4"], batch_of(16, TINY)
    step = quickly_compiled(parallel.value_and_grad(LOSS, model_graphdef(TINY), mesh))
    params = parallel.create_sharded(lambda: jax.tree.map(jnp.asarray, weights(TINY)), mesh)
    plain = step(params, parallel.shard_batch(batch, mesh), key)
    scaled = step(params, parallel.shard_batch(batch, mesh), key, jnp.float32(1024))
    assert distance(scaled, plain) < 1e-6


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize(
    "loss, dtype",
    [(LOSS, "float32"), (LOSS, "bfloat16"), (tapped_loss, "bfloat16")],
    ids=["float32", "bfloat16", "taps"],
)
def test_fsdp_never_holds_the_whole_model(loss, remat, dtype):
    """Blocks are gathered one by one, and again in the backward pass, where activations are kept
    too: temporaries stay below what gathering all would take.
    """
    config = replace(WIDE, remat=remat, dtype=dtype)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(8, config)))
    mesh = MESHES["FSDP 8"]
    params = parallel.abstract_state(lambda: init_model_params(config, key), mesh)
    value_and_grad = jax.jit(parallel.value_and_grad(loss, model_graphdef(config), mesh))
    memory = value_and_grad.lower(params, batch, key).compile().memory_analysis()
    assert memory
    whole = sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory.argument_size_in_bytes < 1.3 / 8 * whole
    assert memory.output_size_in_bytes < 1.3 / 8 * whole
    assert memory.temp_size_in_bytes < whole / 2


def distillation_loss(model, batch, key, teacher):
    x, t = batch.image.astype(jnp.float32) / 255, batch.row / 16
    return jnp.square(model(x, t, batch.label) - teacher(x, t, batch.label)).mean(), {}


def test_a_frozen_transformer_is_gathered_block_by_block():
    """A teacher of another kind adds its shards, and a gathered block while it is called."""
    config, mesh = replace(WIDE, remat=False), MESHES["FSDP 8"]
    teacher = replace(WIDE, block=JOINT, depth=8, n_dual=2)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(8, config)))
    params, frozen = (
        parallel.abstract_state(lambda c=c: init_model_params(c, key), mesh)
        for c in (config, teacher)
    )
    run = parallel.value_and_grad(
        distillation_loss, model_graphdef(config), mesh, frozen_graphdef=model_graphdef(teacher)
    )
    step = jax.jit(lambda params, frozen, batch, key: run(params, batch, key, frozen=frozen))
    memory = step.lower(params, frozen, batch, key).compile().memory_analysis()
    assert memory
    whole, whole_teacher = (
        sum(4 * x.size for x in jax.tree.leaves(tree)) for tree in (params, frozen)
    )
    assert memory.argument_size_in_bytes < 1.3 / 8 * (whole + whole_teacher)
    assert memory.output_size_in_bytes < 1.3 / 8 * whole
    assert memory.temp_size_in_bytes < whole / 2 + whole_teacher / 6


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_transformer_distilled_on_all_devices_has_one_devices_gradient(accumulate_steps):
    config, teacher = TINY, replace(TINY, block=JOINT, n_dual=1, depth=3, remat=True)
    batch = batch_of(32, config)

    def plain(params, frozen):
        batch_on_one = jax.tree.map(jnp.asarray, batch)
        models = (nnx.merge(model_graphdef(c), p) for c, p in ((config, params), (teacher, frozen)))
        model, frozen_model = models
        return distillation_loss(model, batch_on_one, key, frozen_model)[0]

    loss, expected = quickly_compiled(jax.value_and_grad(plain))(weights(config), weights(teacher))
    mesh = MESHES["hybrid 2x4"]
    run = parallel.value_and_grad(
        distillation_loss,
        model_graphdef(config),
        mesh,
        frozen_graphdef=model_graphdef(teacher),
        accumulate_steps=accumulate_steps,
    )
    step = quickly_compiled(lambda params, frozen, batch: run(params, batch, key, frozen=frozen))
    params, frozen = (parallel.shard_params(weights(c), mesh) for c in (config, teacher))
    (got, _), grads = step(params, frozen, parallel.shard_batch(batch, mesh))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    assert distance(grads, expected) < 1e-4


def test_sampling_and_evaluation_never_hold_the_whole_model():
    """They are plain `jit` over sharded weights, which XLA gathers one block at a time."""
    mesh, config = MESHES["FSDP 8"], replace(WIDE, depth=12, remat=False)
    params = parallel.abstract_state(lambda: init_model_params(config, key), mesh)
    whole = sum(4 * x.size for x in jax.tree.leaves(params))
    batch = parallel.shard_batch(batch_of(8, config), mesh)
    sampler, how = inference_sampler.SamplerConfig(n_steps=3), {"guide": True, "trajectory": False}
    draw = inference_sampler.sample_batch.lower(
        params, batch.label, batch.row, 0, 2.0, config=config, sampler=sampler, **how
    )
    loss = jax.jit(lambda p, b: LOSS(nnx.merge(model_graphdef(config), p), b, key)[0])
    for lowered in (draw, loss.lower(params, batch)):
        memory = lowered.compile().memory_analysis()
        assert memory and memory.argument_size_in_bytes < 1.3 / 8 * whole
        assert memory.temp_size_in_bytes < whole / 4


def test_one_devices_gradient_is_jax_grad(results):
    """No mesh, no shard_map, no `GatheredOnCall`: the plain gradient of the whole batch's loss."""
    batch = jax.tree.map(jnp.asarray, batch_of(16, TINY))

    def plain(params):
        return LOSS(nnx.merge(model_graphdef(TINY), params), batch, jax.random.fold_in(key, 0))[0]

    loss, grads = quickly_compiled(jax.value_and_grad(plain))(weights(TINY))
    np.testing.assert_allclose(results["1 device"]["reports"]["loss"][0], loss, rtol=1e-5)
    assert distance(results["1 device"]["grads"], grads) < 1e-5


@pytest.mark.slow
def test_a_gradient_in_eight_bits_hardly_depends_on_the_number_of_devices():
    """A device scales by the largest number that it sees, which moves only very small ones."""
    config = replace(TINY, dtype="bfloat16")
    in_bf16, on_one, on_all = (
        jax.device_get(steps(c, MESHES[mesh], n=1)["grads"])
        for c, mesh in (
            (config, "1 device"),
            (replace(config, fp8=True), "1 device"),
            (replace(config, fp8=True), "DDP 8"),
        )
    )
    assert distance(on_all, on_one) < 0.1 * distance(on_one, in_bf16)
