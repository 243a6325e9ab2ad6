"""Files of weights without a config: of torch.save or safetensors, by a path, a folder, or an id of
the Hugging Face hub. What is in them is known by the family's own module.
"""

from pathlib import Path

import numpy as np

from pretrained import torch_file
from runtime.errors import UserError

PATTERNS = ("*.pth", "*.pt", "*.bin", "*.safetensors")


def read(path_or_id: str, what: str) -> dict[str, np.ndarray]:
    """The tensors of all files there.

    Args:
        what: they are for, as errors shall say.

    Raises:
        UserError: there are no such files, or one is damaged or holds more than tensors.
    """
    found: dict[str, np.ndarray] = {}
    for path in _files(path_or_id, what):
        found |= _read_one(path)
    return found


def _read_one(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".safetensors":
        return torch_file.read(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _files(path_or_id: str, what: str) -> list[Path]:
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else _from_hub(path_or_id, what)
    files = sorted(file for pattern in PATTERNS for file in folder.glob(pattern))
    if not files:
        raise UserError(f"{what} '{path_or_id}': no {', '.join(PATTERNS)} there")
    return files


def _from_hub(name: str, what: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's client raises its own kinds, and those of several others
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{what} '{name}' is no file or folder, and cannot be had from the hub: {reason}"
        ) from error
