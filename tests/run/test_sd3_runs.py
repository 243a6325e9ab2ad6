"""Stable Diffusion 3 equals diffusers': its transformer, weights, prompts, a complete sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from sd3_cases import (
    CONFIGS,
    encoder_folders,  # noqa: F401
    one_thread,  # noqa: F401
    pipeline,  # noqa: F401
    tensors_and_params,
    torch,
)
from torch_autoencoders import nchw, nhwc, quiet

import sampling
from data import text_encoders
from inference import sampler
from inference.sampler import SamplerConfig
from methods.rectified_flow import RectifiedFlow
from runtime import parallel


def test_a_guided_sample_is_that_of_diffusers(encoder_folders, pipeline):
    config = replace(CONFIGS["sd3.5 medium"], image_size="8x12")
    revisions, prompts = (
        [str(text_encoders.find_revision(name)) for name in encoder_folders],
        ["a red", "blue", "", ""],
    )
    caption = text_encoders.encode_captions(
        prompts, encoder_folders, revisions, length=0, full_width=24
    )
    assert caption.mask.all()
    tokens, pooled = (torch.tensor(np.float32(v)) for v in (caption.tokens, caption.pooled))
    x = np.asarray(sampling.initial_noise(3, jnp.arange(3), config.image_shape))
    with quiet(), torch.inference_mode():
        expected = pipeline(
            prompt_embeds=tokens[:3],
            pooled_prompt_embeds=pooled[:3],
            negative_prompt_embeds=tokens[3:].expand(3, -1, -1),
            negative_pooled_prompt_embeds=pooled[3:].expand(3, -1),
            height=8 * pipeline.vae_scale_factor,
            width=12 * pipeline.vae_scale_factor,
            num_inference_steps=5,
            guidance_scale=4.5,
            latents=nchw(x),
            output_type="latent",
        ).images
    actual = sampler.sample_images(
        tensors_and_params("sd3.5 medium")[1],
        config,
        jax.tree.map(lambda x: x[:3], caption),
        negative=jax.tree.map(lambda x: x[3:], caption),
        sampler=SamplerConfig(n_steps=5, shift=3.0, method=RectifiedFlow(time_grid="sd3")),
        mesh=parallel.make_mesh(1),
        cfg_scale=4.5,
        seed=3,
    )
    expected = nhwc(expected)
    assert np.abs(expected - x).max() > 1
    np.testing.assert_allclose(actual.x, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
