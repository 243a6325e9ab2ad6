"""Scores of published evaluators on synthetic inputs, for `test_golden.py` to compare ours with.

    python3.11 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.14.1 torchvision==0.29.1 "scipy<1.16" numpy pillow tqdm
    /tmp/golden/bin/pip install --no-deps pytorch-fid==0.3.0 torch-fidelity==0.4.0
    /tmp/golden/bin/python tests/support/golden/make.py

It writes golden.json, with the versions, beside itself. Inputs are functions of fixed seeds, in
NumPy alone and by the generator whose numbers never change (`RandomState`), so that a test makes
the same without torch. Weights are random: the numbers test an implementation and score nothing.
"""

# pyright: reportMissingImports=false

import importlib.metadata
import json
import platform
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np

FILE = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "torchvision", "scipy", "numpy", "pytorch-fid", "torch-fidelity")
KEPT = 24  # features of each image that are written
REAL_SEED = 1
SAMPLES_SEED = 2


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Random weights of FID's Inception, by its published names, under which features keep their
    size from layer to layer.
    """
    state = {}
    for name, shape in shapes:
        # By name, so that the order does not matter.
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("conv.weight"):
            x = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            x = rng.uniform(0.5, 1.5, shape)
        else:
            x = rng.standard_normal(shape) * 0.1
        state[name] = x.astype(np.float32)
    return state


def images(n: int, seed: int) -> np.ndarray:
    """Smooth colour images of 48 × 64 pixels, in integer arithmetic; a higher seed, darker ones."""
    corners = np.random.RandomState(seed).randint(0, 256 // seed, (n, 7, 9, 3))

    def between(x, axis):
        """Eight places from each corner to the next, times eight."""
        low, high = (np.take(x, range(i, x.shape[axis] - 1 + i), axis) for i in (0, 1))
        k = np.arange(8).reshape(-1, *[1] * (3 - axis))
        interpolated = np.expand_dims(low, axis + 1) * (8 - k) + np.expand_dims(high, axis + 1) * k
        return interpolated.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    return (between(between(corners, 1), 2) // 64).astype(np.uint8)


def features(n: int, seed: int, d: int = 64) -> np.ndarray:
    """Correlated rows, none below 0, as pooled features are."""
    mix = np.random.RandomState(0).standard_normal((d, d)) / np.sqrt(d)
    rng = np.random.RandomState(seed)
    shift = 0.1 * seed + 0.1 * rng.standard_normal(d)
    return np.maximum(rng.standard_normal((n, d)) @ mix + shift, 0).astype(np.float32)


def logits(n: int) -> np.ndarray:
    """Logits of twelve classes."""
    return (2 * np.random.RandomState(5).standard_normal((n, 12))).astype(np.float32)


def permutation(n: int) -> np.ndarray:
    """The order of rows in our Inception Score with seed 0."""
    return np.random.default_rng(0).permutation(n)


# --- the published evaluators ---------------------------------------------------------------------


def from_pytorch_fid(state, folders: list[str]) -> dict:
    """Images → features → FID, all by its own code; and its distance of full covariances."""
    import pytorch_fid.fid_score as theirs
    import pytorch_fid.inception as network

    network.load_state_dict_from_url = lambda *_, **__: state
    model = network.InceptionV3([network.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    files = [sorted(Path(folder).iterdir()) for folder in folders]
    pools = [theirs.get_activations(some, model, 8, 2048, "cpu", 0) for some in files]
    distance = theirs.calculate_fid_given_paths(folders, 8, "cpu", 2048, 0)
    a, b = (features(n, seed).astype(float) for n, seed in ((600, REAL_SEED), (500, SAMPLES_SEED)))
    moments = [part for x in (a, b) for part in (x.mean(0), np.cov(x, rowvar=False))]
    return {
        "pool": pools[0][:, :KEPT].tolist(),
        "pool_norms": np.linalg.norm(pools[0], axis=1).tolist(),
        "fid_of_images": float(distance),
        "fid_of_features": float(theirs.calculate_frechet_distance(*moments)),
    }


def from_torch_fidelity(weights_file: str, folders: list[str]) -> dict:
    """Scores of images, which it resizes as the TensorFlow graph does, and of features."""
    import torch
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    scores = calculate_metrics(
        input1=folders[1],
        input2=folders[0],
        fid=True,
        isc=True,
        isc_splits=1,
        samples_shuffle=False,
        feature_extractor_weights_path=weights_file,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=8,
    )
    a, b = (
        torch.from_numpy(features(n, seed)) for n, seed in ((600, REAL_SEED), (500, SAMPLES_SEED))
    )
    rows = logits(400)
    one = isc_features_to_metric(torch.from_numpy(rows), splits=1, shuffle=False)
    ten = isc_features_to_metric(torch.from_numpy(rows[permutation(400)]), splits=10, shuffle=False)
    kid = kid_features_to_metric(b, a[:500], kid_subsets=1, kid_subset_size=500, verbose=False)
    prc = prc_features_to_metric(b, a, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    return {"images": scores, "isc_of_one": one, "isc_of_ten": ten, "kid": kid, "prc": prc}


def main() -> None:
    import pytorch_fid.inception as network
    import torch
    from PIL import Image

    with (
        mock.patch.object(network, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        blank = network.fid_inception_v3().state_dict()
    shapes = {name: tuple(x.shape) for name, x in blank.items() if x.ndim}
    state = {name: torch.from_numpy(x) for name, x in weights(shapes.items()).items()}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [f"{temporary}/{name}" for name in ("real", "samples")]
        for folder, seed in zip(folders, (REAL_SEED, SAMPLES_SEED), strict=True):
            Path(folder).mkdir()
            for i, image in enumerate(images(6, seed)):
                Image.fromarray(image).save(f"{folder}/{i:02}.png")
        file = f"{temporary}/weights.pth"
        torch.save(state, file)
        golden = {
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "pytorch_fid": from_pytorch_fid(state, folders),
            "torch_fidelity": from_torch_fidelity(file, folders),
        }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
