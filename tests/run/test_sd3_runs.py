"""Stable Diffusion 3 equals diffusers': its transformer, weights, prompts, a complete sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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
from inference.trained_model import SamplingOverrides, TrainedModel
from methods.rectified_flow import RectifiedFlow
from model import MODELS, SD3, model_graphdef
from runtime import parallel
from runtime.errors import UserError
from train import TrainConfig, Trainer


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


def test_a_run_from_sd3_is_conditioned_as_sd3_is(pipeline, tmp_path, monkeypatch):
    """It trains on captions of three text encoders, padded to their full length; a dropped caption
    is the encoded "", as in guidance; who opens the run samples the same.
    """
    monkeypatch.setitem(MODELS, "SD3-Tiny", SD3 | {"width": 16, "depth": 4, "n_heads": 2})
    with quiet():
        pipeline.save_pretrained(tmp_path / "sd3")
    config = TrainConfig(
        dataset_name="digits",
        caption=("the digit {label}",),
        caption_cache=tmp_path / "captions",
        init_from=str(tmp_path / "sd3"),
        lora_rank=4,
        learning_rate=1e-2,
        warmup_steps=0,
        batch_size=8,
        n_sample_steps=2,
        half_precision=False,
        run_dir=tmp_path / "run",
    )
    trainer = Trainer(config)
    assert trainer.config.time_shift == trainer.config.sample_shift == 3
    assert trainer.model_config.text_length == 24 + 256 and trainer.conditioning.null is not None
    nothing = text_encoders.TextEncoders(trainer.config.text_towers, full_width=24).encode([""])[0]
    np.testing.assert_array_equal(trainer.conditioning.null.tokens[0], nothing.tokens)
    np.testing.assert_array_equal(trainer.conditioning.null.pooled[0], nothing.pooled)
    assert trainer.conditioning.null.mask.all()

    batch = parallel.shard_rows(trainer.data.first_rows(0, 8), trainer.mesh)
    for _ in range(2):
        step = trainer.update(trainer.state, batch, trainer.train_key, *trainer.frozen)
        trainer.state, report = step
    assert report.skipped == 0
    trainer.save()
    assert batch.label.mask.all()
    empty = trainer.conditioning.encode([""] * 8)
    empty = batch._replace(label=parallel.shard_rows(empty, trainer.mesh))
    key = jax.random.key(0)
    model = nnx.merge(model_graphdef(trainer.model_config), trainer.averaged_weights)
    dropped, _ = jax.jit(trainer.loss(label_dropout=1.0))(model, batch, key)
    given, expected = (
        trainer.eval_loss(trainer.state.ema, rows, key, *trainer.frozen) for rows in (batch, empty)
    )
    np.testing.assert_allclose(dropped, expected, rtol=1e-6)
    assert abs(dropped - given) > 1e-5 * given
    samples = trainer.sample(["the digit 3", "the digit 7"], cfg_scale=3.0)
    run = TrainedModel.from_run(tmp_path / "run")
    request = run.conditioning.request(2, prompts=["the digit 3", "the digit 7"])
    plan = run.plan(SamplingOverrides(cfg_scale=3.0))
    for negative in (request.negative, None):
        again = run.sample(request.rows(0, 2).labels, plan, negative=negative).x
        np.testing.assert_allclose(again, samples, atol=1e-5 * abs(samples).max())
    resumed = Trainer(TrainConfig(run_dir=tmp_path / "run", resume=True))
    jax.tree.map(
        np.testing.assert_array_equal, resumed.conditioning.null, trainer.conditioning.null
    )
    with pytest.raises(UserError, match="--text_length 8: SD3 takes all tokens"):
        Trainer(replace(config, text_length=8, run_dir=tmp_path / "cut"))
