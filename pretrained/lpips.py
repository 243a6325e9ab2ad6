"""The published weights of LPIPS → the tree that `networks.perceptual.lpips` takes.

They come in two files: VGG-16's own as torchvision names it (`vgg16-397923af.pth`), and those that
Zhang et al. learned (`vgg.pth`). One file with both, named as their module's state, does as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from networks.perceptual import VGG16, lpips_shapes
from pretrained.weight_files import read_bare_weights
from runtime.errors import UserError

# Indices of the convolutions among torchvision's layers: a ReLU follows each, a pool each group.
CONVOLUTION_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
CONVOLUTION = re.compile(r"(?:.*\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)")
LINEAR = re.compile(r"(?:.*\.)?lins?\.?(\d)\.model\.\d\.weight")


def load_lpips(path_or_id: str) -> Any:
    """Load the weights in a file, in the files of a folder, or in those of a hub's repository.

    Raises:
        UserError: there are no such files, one is damaged or holds more than tensors, or weights
            are missing or of another shape.
    """
    tensors = rename_to_ours(read_bare_weights(path_or_id, "LPIPS"))
    weights = {
        "vgg16": _group_convolutions(tensors),
        "linear": [tensors.get(f"linear.{i}") for i in range(5)],
    }
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: x is None)
    expected_leaves = jax.tree_util.tree_leaves_with_path(lpips_shapes())
    for (path, expected), leaf in zip(expected_leaves, leaves):
        if leaf is None or leaf.shape != expected.shape:
            problem = "no weights" if leaf is None else f"weights of shape {leaf.shape}"
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"LPIPS '{path_or_id}': {problem} for {place}, of shape {expected.shape}"
            )
    return weights


def rename_to_ours(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors that LPIPS needs by our names, with kernels as (h, w, in, out)."""
    ours: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if match := CONVOLUTION.fullmatch(name):
            is_kernel = match[2] == "weight"
            our_name = f"{match[1]}.{'kernel' if is_kernel else 'bias'}"
            is_4d_kernel = is_kernel and tensor.ndim == 4
            ours[our_name] = tensor.transpose(2, 3, 1, 0) if is_4d_kernel else tensor
        elif match := LINEAR.fullmatch(name):
            ours[f"linear.{match[1]}"] = tensor.reshape(-1)
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in ours.items()}


def _group_convolutions(
    tensors: Mapping[str, np.ndarray],
) -> list[list[dict[str, np.ndarray | None]]]:
    indices = iter(CONVOLUTION_INDICES)
    return [
        [{part: tensors.get(f"{index}.{part}") for part in ("kernel", "bias")} for index in group]
        for group in ([next(indices) for _ in widths] for widths in VGG16)
    ]
