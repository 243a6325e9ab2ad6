"""The published weights of LPIPS → the tree that `vae.losses.lpips` takes.

They lie in two files: VGG-16's own as torchvision names it (`vgg16-397923af.pth`), and those that
Zhang et al. learned (`vgg.pth`). One file with both, named as their module's state, does as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from networks.perceptual import VGG16, lpips_shapes
from pretrained import loose
from runtime.errors import UserError

# Where a convolution stands among torchvision's layers: a ReLU follows each, a pool each group.
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
CONVOLUTION = re.compile(r"(?:.*\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)")
LINEAR = re.compile(r"(?:.*\.)?lins?\.?(\d)\.model\.\d\.weight")


def load(path_or_id: str) -> Any:
    """The weights in a file, in the files of a folder, or in those of a repository on the hub.

    Raises:
        UserError: there are no such files, one is damaged or holds more than tensors, or weights
            are missing or of another shape.
    """
    found = named(loose.read(path_or_id, "LPIPS"))
    weights = {"vgg16": _groups(found), "linear": [found.get(f"linear.{i}") for i in range(5)]}
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: x is None)
    for (path, wanted), leaf in zip(jax.tree_util.tree_leaves_with_path(lpips_shapes()), leaves):
        if leaf is None or leaf.shape != wanted.shape:
            what = "no weights" if leaf is None else f"weights of shape {leaf.shape}"
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(f"LPIPS '{path_or_id}': {what} for {place}, of shape {wanted.shape}")
    return weights


def named(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that LPIPS needs, by our names, with kernels as (height, width, in, out)."""
    found = {}
    for name, tensor in tensors.items():
        if match := CONVOLUTION.fullmatch(name):
            kernel = match[2] == "weight"
            place = f"{match[1]}.{'kernel' if kernel else 'bias'}"
            found[place] = tensor.transpose(2, 3, 1, 0) if kernel and tensor.ndim == 4 else tensor
        elif match := LINEAR.fullmatch(name):
            found[f"linear.{match[1]}"] = tensor.reshape(-1)
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in found.items()}


def _groups(found: Mapping[str, np.ndarray]) -> list[list[dict[str, np.ndarray | None]]]:
    places = iter(PLACES)
    return [
        [{part: found.get(f"{place}.{part}") for part in ("kernel", "bias")} for place in group]
        for group in ([next(places) for _ in widths] for widths in VGG16)
    ]
