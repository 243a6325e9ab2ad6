"""What the steps of a run cost: `python train.py --profile`.

Measures a `Trainer`'s own compiled steps on blank pictures and hands the figures to `profiling`.
"""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

import drawing
import parallel
import profiling

if TYPE_CHECKING:
    from train import Trainer


def profile(trainer: "Trainer") -> str:
    """Compile and time one step of training, of evaluation and of sampling, and report.

    Leaves the trainer's weights changed, and a trace of the training step in `profile/` of the
    run's folder.
    """
    m, batch, key = trainer.model_config, trainer.blank_batch(), trainer.train_key
    batch = parallel.place(batch, trainer.mesh)
    forward = trainer.config.batch_size * sum(profiling.flops_by_module(m).values())
    guide = bool(m.n_classes or m.text_width)
    draw = partial(
        drawing.draw,
        config=m,
        sampler=trainer.sampler(n_steps=1),
        guide=guide,
        trajectory=False,
    )
    noise_and_labels = (batch.label, batch.row, 0, jnp.float32(2))

    def train(compiled):
        trainer.state, report = compiled(trainer.state, batch, key)
        return report

    profiles = [
        profiling.profile_step(
            "train",
            trainer.update,
            (trainer.state, batch, key),
            flops=profiling.TRAIN_PER_FORWARD * forward,
            run=train,
        ),
        profiling.profile_step(
            "eval",
            trainer.eval_loss,
            (trainer.state.ema, batch, key),
            flops=forward,
            run=lambda compiled: compiled(trainer.state.ema, batch, key),
        ),
        profiling.profile_step(
            "sample, guided" if guide else "sample",
            jax.jit(draw),
            (trainer.state.ema, *noise_and_labels),
            flops=(1 + guide) * forward,
            run=lambda compiled: compiled(trainer.state.ema, *noise_and_labels),
        ),
    ]
    trace = profiling.trace(lambda: train(profiles[0].compiled), trainer.run_dir / "profile")
    return profiling.report(
        m,
        sum(x.size for x in jax.tree.leaves(trainer.state.params)),
        profiles,
        device_kind=jax.devices()[0].device_kind,
        n_devices=jax.device_count(),
        dtype=m.dtype,
        peak=trainer.peak,
        trace_file=trace,
    )
