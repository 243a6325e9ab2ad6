"""Train an autoencoder, on whose latents a diffusion model can be trained.

    python train_vae.py --dataset_name digits --n_steps 2000 --run_dir runs/vae

The loss is reconstruction (L1 or L2, and LPIPS), a small KL divergence of the latents from a normal
distribution and, with --gan_weight, a patch discriminator (Rombach et al. 2022, appendix G). The
result is `RUN/vae/`, in the format of diffusers. The run itself is `training.loop.Loop.fit`.
"""

from runtime import cli, processes
from training.autoencoder.config import VaeConfig
from training.autoencoder.trainer import VaeTrainer
from training.loop import initialize_jax

__all__ = ["VaeConfig", "VaeTrainer"]


@processes.explain_lost_process
def main() -> None:
    config = cli.parse_flags(VaeConfig)
    initialize_jax(config)
    VaeTrainer(config).fit()
    processes.wait_for_all("the end")


if __name__ == "__main__":
    cli.run_command(main, processes.exit_process)
