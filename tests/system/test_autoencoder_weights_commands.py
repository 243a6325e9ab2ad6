"""diffusers' weights become ours and ours diffusers', to the bit; what does not fit is named."""

import subprocess
import sys

import pytest
from autoencoder_weights_cases import (
    folder,  # noqa: F401
    hub,  # noqa: F401
    params,  # noqa: F401
)
from commands import ROOT

from pretrained import autoencoder

TORCH_FREE = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_CACHE = sys.argv[1]
from pretrained import autoencoder
print(autoencoder.load_autoencoder("us/vae").hash)
"""


def test_the_hub_is_read_without_torch(hub, params):
    pytest.importorskip("diffusers")
    command = [sys.executable, "-c", TORCH_FREE, str(hub.parents[2])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == autoencoder.hash_weights(params) + "\n"
