"""Time the VAE, images to latents and back, beside diffusers' in torch.

    python benchmarks/autoencoder.py --image_size 128 --batch_size 2
    python benchmarks/autoencoder.py --batch_size 16 --precision bf16

The network is Stable Diffusion's and SDXL's, with random weights: 84 million parameters. Encoding
is `Codec.encode`, from bytes on the host to moments on the device, and decoding its inverse. The
peer computes in float32, or under autocast beside bf16, with the same number of threads and on the
same device.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import (
    format_number,
    format_table,
    make_json_line,
    make_turn,
    require_known,
    run_interleaved,
)
from inference.codec import Codec
from networks.autoencoder import AutoencoderConfig, init_autoencoder_params
from pretrained.autoencoder import PretrainedAutoencoder, config_to_diffusers
from runtime import cli, parallel
from runtime.flags import flag

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class AutoencoderBenchConfig:
    """Time encoding and decoding."""

    image_size: int = flag(256, "pixels to a side")
    batch_size: int = flag(4, "images at a time")
    block_out_channels: tuple[int, ...] = flag((128, 256, 512, 512), "of the levels")
    precision: tuple[str, ...] = flag(("fp32", "bf16"), "fp32, bf16")
    rounds: int = flag(4, "measured rounds, after one for warming up")
    peer: bool = flag(True, "time torch too, if it is installed")


def compile_our_turns(
    config: AutoencoderConfig, precision: str, image: np.ndarray
) -> dict[str, Callable]:
    """Compile encoding and decoding, as turns."""
    params = jax.jit(lambda: init_autoencoder_params(config, jax.random.key(0)))()
    vae = PretrainedAutoencoder(config, jax.device_get(params), hash="", id="random", revision=None)
    codec = Codec(vae, parallel.make_mesh(), dtype=DTYPES[precision])
    z = parallel.fetch_to_host(codec.encode(image))[..., : config.latent_channels].astype(
        np.float32
    )
    codec.decode(z)
    return {
        f"encode, ours {precision}": make_turn(lambda: codec.encode(image)),
        f"decode, ours {precision}": make_turn(lambda: codec.decode(z)),
    }


def make_torch_turns(
    config: AutoencoderConfig, precision: str, image: np.ndarray
) -> dict[str, Callable]:
    """Make the same turns in torch."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() != "cpu" else "cpu"
    facts = {k: v for k, v in config_to_diffusers(config).items() if not k.startswith("_")}
    model: Any = AutoencoderKL(**facts)
    model.to(device).eval()
    is_half_precision = precision == "bf16"

    def run(function: Callable, *arrays: Any) -> Any:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=is_half_precision):
            return function(*arrays)

    def encode() -> Any:
        x = torch.from_numpy(image).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        moments = run(model.encode, x).latent_dist.parameters
        if device == "cuda":
            torch.cuda.synchronize()
        return moments

    z = encode()[:, : config.latent_channels].float()
    return {
        f"encode, torch {precision}": make_turn(encode),
        f"decode, torch {precision}": make_turn(lambda: run(model.decode, z).sample.float().cpu()),
    }


def time_autoencoder(c: AutoencoderBenchConfig) -> list[dict[str, Any]]:
    """Time encoding and decoding, of ours and of torch, in turns."""
    config = AutoencoderConfig(block_out_channels=c.block_out_channels, layers_per_block=2)
    shape = (c.batch_size, c.image_size, c.image_size, config.in_channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    turns: dict[str, Callable] = {}
    for precision in c.precision:
        turns |= compile_our_turns(config, precision, image)
        if missing := [p for p in ("torch", "diffusers") if not importlib.util.find_spec(p)]:
            print(f"left out: torch {precision}: {' and '.join(missing)} not installed")
        elif c.peer:
            turns |= make_torch_turns(config, precision, image)
    times = run_interleaved(turns, c.rounds)
    rows = []
    for name, t in times.items():
        peer = times.get(name.replace("ours", "torch"))
        rows.append(
            {
                "what": name,
                "median_s": t.median,
                "min_s": t.min,
                "images_per_second": c.batch_size / t.median,
                "times_as_fast_as_torch": t.times_as_fast_as(peer) if peer else None,
            }
        )
    return rows


def format_autoencoder_row(row: dict[str, Any]) -> dict[str, str]:
    """Format one row of the table, by column."""
    return {
        "task": row["what"],
        "s": format_number(row["median_s"]),
        "min": format_number(row["min_s"]),
        "images/s": format_number(row["images_per_second"]),
        "× torch": format_number(row["times_as_fast_as_torch"]),
    }


def main() -> None:
    config = cli.parse_flags(AutoencoderBenchConfig)
    require_known("precision", config.precision, DTYPES)
    rows = time_autoencoder(config)
    print(format_table([format_autoencoder_row(row) for row in rows]))
    print(make_json_line("autoencoder", rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
