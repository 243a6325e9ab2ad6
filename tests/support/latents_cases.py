"""Inputs and helpers shared by the tests of data.latents."""

import numpy as np

from datasets_config import LatentEncoding

ENCODING = LatentEncoding(
    dataset_name="digits",
    source="data/digits",
    image_size=16,
    shape=(8, 8, 2),
    vae="somewhere",
    vae_hash="0" * 64,
    scaling_factor=1.6,
    shift_factor=-0.1,
    precision="float32",
    mirrored=False,
    captions=False,
)


def moments(n, encoding=ENCODING, seed=0):
    normal = np.random.default_rng(seed).standard_normal((n, *encoding.moments_shape))
    return normal.astype(np.float16)
