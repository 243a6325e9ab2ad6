"""The published weights of FID's Inception → the tree that `metrics.inception.network` takes.

They have torchvision's names for its Inception-v3, as pytorch-fid's release `fid_weights` and
torch-fidelity's have them (`pt_inception-2015-12-05-6726825d.pth`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from networks.inception import shapes
from pretrained import loose, weight_files

EPSILON = 1e-3  # added to the variances of its batch norms
# Besides these there are counters of training steps, and the classes' bias: see `Features.logits`.
NORM = {
    "scale": "bn.weight",
    "shift": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
KERNEL, FC, FC_BIAS, COUNTER = "conv.weight", "fc.weight", "fc.bias", ".bn.num_batches_tracked"


@dataclass(frozen=True)
class Pretrained:
    """The network's weights, and the sha256 of them as they are published."""

    params: dict[str, Any] = field(repr=False)  # NumPy's float32
    hash: str


def load(path_or_id: str) -> Pretrained:
    """The weights in a file, in a folder, or in a repository on the hub.

    Raises:
        UserError: there are none, a file is damaged or holds more than tensors, or the weights are
            not those of this Inception: torchvision's own, for one, has other classes.
    """
    found = loose.read(path_or_id, "Inception")
    found = {name: x for name, x in found.items() if not name.endswith(COUNTER)}
    fits = "FID's Inception of 2015"
    weight_files.refuse_misfits(path_or_id, found, published_shapes(), fits)
    tensors = {name: x.astype(np.float32) for name, x in found.items()}
    return Pretrained(to_params(tensors), weight_files.tensors_hash(tensors))


def convolutions() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Each convolution's path in our tree, and the shape of its kernel."""
    tree: dict[tuple[str, ...], Any] = dict(flatten_dict(shapes()))
    return {
        path[:-1]: leaf.shape
        for path, leaf in tree.items()
        if path[-1] == "kernel" and path[0] != "fc"
    }


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every weight of a file by its name there, and its shape."""
    n_in, n_out = shapes()["fc"]["kernel"].shape
    found: dict[str, tuple[int, ...]] = {FC: (n_out, n_in), FC_BIAS: (n_out,)}
    for path, (height, width, i, o) in convolutions().items():
        name = ".".join(path)
        found[f"{name}.{KERNEL}"] = (o, i, height, width)
        found |= {f"{name}.{part}": (o,) for part in NORM.values()}
    return found


def to_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights as ours: batch norms are folded into the convolutions before them, in
    float64.
    """
    tree: dict[tuple[str, ...], np.ndarray] = {
        ("fc", "kernel"): np.ascontiguousarray(tensors[FC].T)
    }
    for path in convolutions():
        name = ".".join(path)
        kernel = tensors[f"{name}.{KERNEL}"].transpose(2, 3, 1, 0).astype(np.float64)
        norm = {ours: tensors[f"{name}.{n}"].astype(np.float64) for ours, n in NORM.items()}
        gain = norm["scale"] / np.sqrt(norm["variance"] + EPSILON)
        tree[*path, "kernel"] = (kernel * gain).astype(np.float32)
        tree[*path, "bias"] = (norm["shift"] - norm["mean"] * gain).astype(np.float32)
    return unflatten_dict(tree)
