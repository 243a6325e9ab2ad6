"""The numbers are the same on any number of devices and for any sharding of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from parallel_cases import (
    MESHES,
    OPTIMIZER,
    TINY,
    WIDE,
    batch_of,
    distance,
    key,
    results,  # noqa: F401
)

from model import init_model_params
from runtime import parallel


def per_device(tree):
    """Bytes of a tree on its first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_gradients_are_those_of_one_device(results, name):
    assert distance(results[name]["grads"], results["1 device"]["grads"]) < 1e-5
    assert distance(results[name]["params"], results["1 device"]["params"]) < 1e-4


def test_gradients_are_sharded_as_the_weights(results):
    for name in ("FSDP 8", "hybrid 2x4"):
        params, grads = results[name]["params"], results[name]["grads"]
        for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
            assert g.sharding.is_equivalent_to(p.sharding, g.ndim)
        assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(params))


# --- a frozen model ------------------------------------------------------------------------------


class Toy(nnx.Module):
    """A perceptron: large kernels are sharded, biases are not."""

    def __init__(self, width, *, rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.out = nnx.Linear(width, 64, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


STUDENT, TEACHER = (nnx.split(Toy(width, rngs=nnx.Rngs(width))) for width in (32, 128))


def distill(model, rows, key, teacher):
    """Equal the teacher, and see the student through it."""
    y = model(rows)
    loss = jnp.square(y - teacher(rows)).mean() + jnp.square(teacher(y)).mean()
    return loss, {"teacher": teacher(rows).mean()}


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("name", MESHES)
def test_a_student_learns_from_a_frozen_teacher(name, accumulate_steps):
    x, mesh = jax.random.normal(key, (16, 64)), MESHES[name]
    params, frozen = (nnx.to_pure_dict(model[1]) for model in (STUDENT, TEACHER))

    def plain(params):
        return distill(nnx.merge(STUDENT[0], params), x, key, nnx.merge(*TEACHER))

    (loss, metrics), expected = jax.value_and_grad(plain, has_aux=True)(params)
    run = parallel.value_and_grad(
        distill,
        STUDENT[0],
        mesh,
        frozen_graphdef=TEACHER[0],
        accumulate_steps=accumulate_steps,
    )
    step = jax.jit(lambda params, frozen, x: run(params, x, key, frozen=frozen), donate_argnums=0)
    params, frozen = (parallel.shard_params(tree, mesh) for tree in (params, frozen))
    if mesh.shape["fsdp"] > 1:
        assert not frozen["hidden"]["kernel"].sharding.is_fully_replicated
    (got, reported), grads = step(params, frozen, parallel.shard_batch(np.asarray(x), mesh))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(reported["teacher"], metrics["teacher"], rtol=1e-4)
    assert distance(grads, expected) < 1e-5
    # The teacher has no gradient, and stays where and as it was; the student was donated.
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, frozen, nnx.to_pure_dict(TEACHER[1]))


def test_a_frozen_model_needs_its_weights_and_they_need_their_model():
    frozen, x = nnx.to_pure_dict(TEACHER[1]), jnp.zeros((16, 64))
    for graphdef, weights in ((TEACHER[0], None), (None, frozen)):
        run = parallel.value_and_grad(
            distill, STUDENT[0], MESHES["1 device"], frozen_graphdef=graphdef
        )
        with pytest.raises(ValueError, match="belong together"):
            run(nnx.to_pure_dict(STUDENT[1]), x, key, frozen=weights)


# --- memory ---------------------------------------------------------------------------------------


def test_fsdp_holds_an_eighth_of_weights_average_and_moments():
    def make():
        shapes = jax.eval_shape(lambda: init_model_params(WIDE, key))
        params = jax.tree.map(lambda p: jnp.ones(p.shape), shapes)
        return {"params": params, "ema": params, "optimizer": OPTIMIZER.init(params)}

    state = parallel.create_sharded(make, MESHES["FSDP 8"])
    for name, tree in state.items():
        assert per_device(tree) <= 1.3 / 8 * nbytes(tree), name


# --- device work in flight ------------------------------------------------------------------------


def test_each_result_is_read_after_n_later_items_are_dispatched():
    events = []

    def dispatch(item):
        events.append(f"dispatch {item}")
        return item

    def read(item):
        events.append(f"read {item}")
        return 10 * item

    results = parallel.keep_in_flight(map(dispatch, range(4)), n=2, read=read)
    assert list(results) == [0, 10, 20, 30]
    assert events == [
        "dispatch 0",
        "dispatch 1",
        "dispatch 2",
        "read 0",
        "dispatch 3",
        "read 1",
        "read 2",
        "read 3",
    ]


def test_an_error_of_a_dispatch_is_raised_after_the_results_before_it():
    results = parallel.keep_in_flight((6 // x for x in [1, 2, 0, 3]), n=2, read=str)
    assert [next(results), next(results)] == ["6", "3"]
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- where arrays live ----------------------------------------------------------------------------


def specs(shapes, mesh="FSDP 8"):
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return parallel.partition_specs(tree, MESHES[mesh])


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
    mu = parallel.partition_specs(moments, MESHES["FSDP 8"])[0].mu
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

    expected = parallel.create_sharded(make, MESHES["1 device"])
    for name in ("FSDP 8", "hybrid 2x4"):
        params = parallel.create_sharded(make, MESHES[name])
        assert not any(p.sharding.is_fully_replicated for p in jax.tree.leaves(params))
        jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", MESHES)
def test_shard_batch_splits_rows_in_order(name):
    mesh = MESHES[name]
    n = 16 // mesh.size
    placed = parallel.shard_batch(batch_of(16, TINY), mesh)
    for x, field in zip(placed, batch_of(16, TINY), strict=True):
        for device, shard in zip(mesh.devices.ravel(), shards(x, mesh), strict=True):
            assert shard.device == device
        np.testing.assert_array_equal(np.concatenate([s.data for s in shards(x, mesh)]), field)
        assert all(len(s.data) == n for s in shards(x, mesh))


def shards(x, mesh):
    order = mesh.devices.ravel().tolist()
    return sorted(x.addressable_shards, key=lambda shard: order.index(shard.device))
