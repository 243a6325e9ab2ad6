"""Tokens are aligned with an encoder's features, which train the blocks before them and no more."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE
from flax import nnx
from latents_cases import ENCODING
from model_cases import TEXT, TINY, build_with_params, key, with_random_weights

from data.batch import Batch
from inference.spaces import space_of
from methods.method import pixels_to_input
from methods.rectified_flow import RectifiedFlow
from model import JOINT
from runtime.errors import UserError
from runtime.parallel import make_mesh
from training import optim
from training.alignment import (
    CLEAN_TIME,
    Alignment,
    Encoder,
    look_by_run,
    normalize_over_patches,
    null_label,
    open_encoder,
    resize_grid,
)
from training.auxiliary import mean_cosine, with_auxiliary
from training.routing import with_routing
from training.step import PROJECTOR, ProjectorState, initial_state, update

NETWORK = replace(TINY, depth=4)
SEEN_BY = replace(TINY, patch_size=4, width=64)  # its grid is smaller
NEUTRAL = {"inner_weight": 0.0, "layer_sync": (), "sync_weight": 0.2}
BATCH = Batch(
    jnp.arange(4), jax.random.randint(key, (4, 8, 8, 3), 0, 256).astype(jnp.uint8), jnp.arange(4)
)


def alignment(network=NETWORK, encoder=SEEN_BY, block=2):
    graphdef, state = nnx.split(with_random_weights(encoder))
    return Alignment(
        Encoder(
            graphdef,
            nnx.to_pure_dict(state),
            partial(look_by_run, config=encoder),
            encoder.width,
            reference="",
            fingerprint="",
        ),
        network,
        to_input=pixels_to_input,
        block=block,
        weight=0.3,
        end=10,
    )


def parameters(aligned):
    network = nnx.to_pure_dict(nnx.split(with_random_weights(aligned.network))[1])
    return network | {PROJECTOR: aligned.init_projector(key)}


def gradients(aligned, loss):
    """The loss with the alignment, its metrics, and its gradient."""
    total: Any = with_auxiliary(loss, **NEUTRAL, alignment=aligned)

    @partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    def run(params, encoder):
        network = nnx.merge(aligned.encoder.graphdef, encoder)
        return jax.value_and_grad(
            lambda p: total(nnx.merge(aligned.graphdef, p), BATCH, key, network), has_aux=True
        )(params)

    (value, metrics), grads = run(parameters(aligned), aligned.encoder.weights)
    return value, metrics, grads


def flat(model, batch, key):
    """A loss that is constant."""
    x = jnp.float32(batch.image) / 255
    return 0.0 * model(x, jnp.full(4, 0.4), batch.label).mean(), {}


def test_what_patches_share_is_subtracted_in_part():
    f = jnp.asarray([[1.0, 5.0], [3.0, 5.0]]).reshape(1, 2, 1, 2)  # two patches, two channels
    expected = [[(1 - 0.6 * 2) / 1, 0.4 * 5 / 1e-6], [(3 - 0.6 * 2) / 1, 0.4 * 5 / 1e-6]]
    np.testing.assert_allclose(normalize_over_patches(f).reshape(2, 2), expected, rtol=1e-4)


def test_a_grid_is_resized_bilinearly():
    f = jnp.arange(4.0).reshape(1, 2, 2, 1)
    assert resize_grid(f, (2, 2)) is f
    middle = resize_grid(f, (4, 4))[0, 1:3, 1:3, 0]
    np.testing.assert_allclose(middle, [[0.75, 1.25], [1.75, 2.25]], rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"block": JOINT}], ids=["DiT", "MMDiT"])
def test_it_adds_minus_the_cosine_and_trains_the_blocks_before_alone(fields):
    aligned = alignment(replace(NETWORK, **fields), replace(SEEN_BY, **fields))
    value, metrics, grads = gradients(aligned, flat)
    np.testing.assert_allclose(value, 0.3 * metrics["align_loss"], rtol=1e-6)
    assert metrics["loss"] == 0
    for g in jax.tree.leaves(grads["blocks"]):
        assert (g[2:] == 0).all()
    assert all(jnp.abs(g[0]).max() > 0 for g in jax.tree.leaves(grads["blocks"]))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads[PROJECTOR]))
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads["final"]))


def test_the_value_is_that_of_the_clean_image_without_a_label():
    aligned = alignment()
    params = parameters(aligned)
    _, metrics, _ = gradients(aligned, flat)
    x = jnp.float32(BATCH.image)
    network = build_with_params(NETWORK, {n: p for n, p in params.items() if n != PROJECTOR})
    _, (tokens,) = network(x / 255, jnp.full(4, 0.4), BATCH.label, taps=(2,))
    kernel = params[PROJECTOR]["convolution"]["kernel"]
    grid = jnp.pad(tokens.reshape(4, 4, 4, 32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = jnp.stack(
        [jnp.stack([grid[:, i : i + 4, j : j + 4] for j in range(3)]) for i in range(3)]
    )
    projected = jnp.einsum("ijbhwd,ijdf->bhwf", windows, kernel)
    seen = with_random_weights(SEEN_BY)
    _, (features,) = seen(x / 127.5 - 1, jnp.full(4, CLEAN_TIME), jnp.full(4, 5), taps=(1,))
    targets = normalize_over_patches(resize_grid(features.reshape(4, 2, 2, 64), (4, 4)))
    expected = -mean_cosine(projected.reshape(4, 16, 64), targets.reshape(4, 16, 64))
    np.testing.assert_allclose(metrics["align_loss"], expected, rtol=1e-4)


def test_it_stands_beside_the_other_losses_and_a_route():
    network = replace(NETWORK, inner_head=1, route=(2, 3))
    aligned = alignment(network)
    options = {"inner_weight": 0.5, "layer_sync": (1, 2), "sync_weight": 0.2}
    total: Any = with_routing(
        with_auxiliary(RectifiedFlow().loss, **options, alignment=aligned), 0.5
    )
    encoder = aligned.encoder.merge()
    value, metrics = jax.jit(lambda p: total(nnx.merge(aligned.graphdef, p), BATCH, key, encoder))(
        parameters(aligned)
    )
    parts = metrics["loss"] + 0.5 * metrics["inner_loss"] - 0.2 * metrics["layer_similarity"]
    np.testing.assert_allclose(value, parts + 0.3 * metrics["align_loss"], rtol=1e-5)


def test_an_encoder_of_captions_sees_the_empty_one():
    config = replace(SEEN_BY, **TEXT)
    features = look_by_run(with_random_weights(config), jnp.ones((3, 8, 8, 3)), config=config)
    assert features.shape == (3, 2, 2, 64) and jnp.isfinite(features).all()
    np.testing.assert_array_equal(null_label(config, None, 3).mask, np.zeros((3, 1), bool))  # pyright: ignore


def test_a_published_encoder_needs_images():
    with pytest.raises(UserError, match="--align dinov2-base: it sees images, and --latents has"):
        open_encoder("dinov2-base", network=NETWORK, space=space_of(ENCODING), mesh=make_mesh())


def test_a_gradient_that_is_not_finite_leaves_the_projector_and_the_network():
    adamw = optim.clipped_adamw(
        lambda _: 0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, clip_norm=1.0
    )
    state = initial_state(
        {"w": {"kernel": jnp.ones((2, 2))}},
        adamw,
        {},
        projector={"kernel": jnp.ones(3)},
        projector_optimizer=adamw,
    )

    def step(factor):
        def value_and_grad(weights, *_):
            grads = jax.tree.map(lambda x: 0.1 * x, weights)
            grads[PROJECTOR] = jax.tree.map(lambda x: factor * x, grads[PROJECTOR])
            return (jnp.ones(()), {}), grads

        return update(
            state,
            None,
            key,
            read_batch=lambda batch, position: batch,
            value_and_grad=value_and_grad,
            optimizer=adamw,
            ema_decay=0.9,
            log_every=10,
            projector_optimizer=adamw,
        )

    new, report = step(1.0)
    np.testing.assert_allclose(report.window["grad_norm"], 0.2)  # the network's own
    assert isinstance(new.projector, ProjectorState)
    assert (new.projector.weights["kernel"] < 1).all() and PROJECTOR not in new.params
    new, report = step(jnp.inf)
    for a, b in ((new.projector, state.projector), (new.params, state.params)):
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert report.skipped == 1
