"""Autoencoders of diffusers with random weights, and images in their axes and ours."""

import contextlib
import warnings

import numpy as np
import pytest

from networks.autoencoder import AutoencoderConfig
from pretrained.autoencoder import config_to_diffusers, params_from_diffusers

SD = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4)
SD3 = AutoencoderConfig(
    block_out_channels=(8, 16, 16),
    latent_channels=16,
    norm_num_groups=8,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
    force_upcast=False,
)
GREY = AutoencoderConfig(
    in_channels=1,
    out_channels=1,
    latent_channels=3,
    block_out_channels=(12, 8, 16, 8),
    norm_num_groups=2,
    use_post_quant_conv=False,
)
NO_ATTENTION = AutoencoderConfig(
    block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False
)
CONFIGS = {"sd": SD, "sd3": SD3, "grey": GREY, "no_attention": NO_ATTENTION}


def torch_autoencoder(config, *, seed=0):
    """As diffusers builds it. Norms start as 1 and 0 and would hide a name given to two of them."""
    torch = pytest.importorskip("torch")
    with quiet():
        diffusers = pytest.importorskip("diffusers")
        facts = {k: v for k, v in config_to_diffusers(config).items() if not k.startswith("_")}
        torch.manual_seed(seed)
        model = diffusers.AutoencoderKL(**facts).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p) if "norm" in name else 0.01 * torch.randn_like(p))
    return model


@contextlib.contextmanager
def quiet():
    """diffusers warns of what it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors_of(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def params_of(model, config):
    return params_from_diffusers(tensors_of(model), config, "torch")


def nchw(x):
    import torch

    return torch.from_numpy(np.array(x, np.float32).transpose(0, 3, 1, 2))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)
