"""Eight virtual devices, run-time checks of the shapes in signatures, and no silent broadcasting."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

CHECKED = ("layers", "model", "objectives", "optim", "sampling", "images", "generate")
install_import_hook(CHECKED, "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
