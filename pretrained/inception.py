"""The published weights of FID's Inception → the tree of `networks.inception.inception_features`.

They have torchvision's names for its Inception-v3, as pytorch-fid's release `fid_weights` and
torch-fidelity's have them (`pt_inception-2015-12-05-6726825d.pth`). The network itself is
`networks/inception.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from networks.inception import inception_shapes
from pretrained import weight_files

EPSILON = 1e-3  # added to the variances of its batch norms
# Our names of a batch norm's arrays, and the published ones.
NORM = {
    "scale": "bn.weight",
    "shift": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
# Files also hold counters of training steps, which are skipped, and the classes' bias, which is
# not part of the logits: see `Features.logits`.
KERNEL, FC, FC_BIAS, COUNTER = "conv.weight", "fc.weight", "fc.bias", ".bn.num_batches_tracked"


@dataclass(frozen=True)
class PretrainedInception:
    """The network's weights, and the sha256 of them as they are published."""

    params: dict[str, Any] = field(repr=False)  # NumPy's float32
    hash: str


def load_inception(path_or_id: str) -> PretrainedInception:
    """Load the weights in a file, in a folder, or in a repository of the hub.

    Raises:
        UserError: there are none, a file is damaged or holds more than tensors, or the weights are
            not those of this Inception. torchvision's own, for one, has other classes.
    """
    published = {
        name: x
        for name, x in weight_files.read_bare_weights(path_or_id, "Inception").items()
        if not name.endswith(COUNTER)
    }
    weight_files.require_shapes(
        path_or_id, published, published_shapes(), reference="FID's Inception of 2015"
    )
    tensors = {name: x.astype(np.float32) for name, x in published.items()}
    return PretrainedInception(fold_batch_norms(tensors), weight_files.hash_tensors(tensors))


def kernel_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return each convolution's path in our tree, and the shape of its kernel (h, w, in, out)."""
    tree: dict[tuple[str, ...], Any] = dict(flatten_dict(inception_shapes()))
    return {
        path[:-1]: leaf.shape
        for path, leaf in tree.items()
        if path[-1] == "kernel" and path[0] != "fc"
    }


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Return every weight of a file by its name there, and its shape."""
    n_in, n_out = inception_shapes()["fc"]["kernel"].shape
    shape_by_name: dict[str, tuple[int, ...]] = {FC: (n_out, n_in), FC_BIAS: (n_out,)}
    for path, (height, width, i, o) in kernel_shapes().items():
        name = ".".join(path)
        shape_by_name[f"{name}.{KERNEL}"] = (o, i, height, width)
        shape_by_name |= {f"{name}.{part}": (o,) for part in NORM.values()}
    return shape_by_name


def fold_batch_norms(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert published weights to ours.

    Batch norms are folded into the convolutions before them, in float64.
    """
    tree: dict[tuple[str, ...], np.ndarray] = {
        ("fc", "kernel"): np.ascontiguousarray(tensors[FC].T)
    }
    for path in kernel_shapes():
        name = ".".join(path)
        kernel = tensors[f"{name}.{KERNEL}"].transpose(2, 3, 1, 0).astype(np.float64)
        norm = {ours: tensors[f"{name}.{n}"].astype(np.float64) for ours, n in NORM.items()}
        gain = norm["scale"] / np.sqrt(norm["variance"] + EPSILON)
        tree[*path, "kernel"] = (kernel * gain).astype(np.float32)
        tree[*path, "bias"] = (norm["shift"] - norm["mean"] * gain).astype(np.float32)
    return unflatten_dict(tree)
