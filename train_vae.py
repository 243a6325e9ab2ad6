"""Train an autoencoder: the one whose latents a diffusion model learns.

    python train_vae.py --dataset_name digits --n_steps 2000 --run_dir runs/vae

It is trained to reconstruct pictures (L1 or L2, and LPIPS), with latents held loosely to a normal
distribution (KL) and, if asked, against a critic of patches (Rombach et al. 2022, appendix G). The
result, `RUN/vae/`, is a folder as diffusers has them. The run itself is that of `train.Trainer`.
"""

from runtime import cli, processes
from training import loop
from training.autoencoder.config import FILLED, VaeConfig
from training.autoencoder.trainer import VaeTrainer

__all__ = ["VaeConfig", "VaeTrainer"]


def main() -> None:
    config = cli.parse(VaeConfig, filled=FILLED)
    loop.begin(config)
    VaeTrainer(config).fit()
    processes.wait_for_all("the end")


if __name__ == "__main__":
    cli.run(main, processes.leave)
