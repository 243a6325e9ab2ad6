"""FID's Inception beside an independent one in torch, on random weights; pictures as other tools
prepare them; weights that are not its own.
"""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluate
from evaluate import EvaluateConfig
from evaluation import features
from evaluation.during_training import TrainingFID
from evaluation.features import gather, regrouped
from evaluation.metrics import frechet_distance
from networks import inception
from pretrained import inception as pretrained
from runtime import parallel
from runtime.errors import UserError

rng = np.random.default_rng(0)


def pictures(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth ones with some noise, so that they differ in more than a mean."""
    y, x = np.mgrid[:height, :width] / 8
    phase, rate = rng.uniform(0, 6, (n, 1, 1, channels)), rng.uniform(0.3, 2, (n, 1, 1, channels))
    waves = np.sin(rate * y[None, ..., None] + phase) * np.cos(rate * x[None, ..., None])
    noisy = 127.5 + 90 * waves + rng.normal(size=waves.shape) * 15
    return np.clip(noisy, 0, 255).astype(np.uint8)


# --- the network in torch, by torchvision's names -------------------------------------------------


class Peer:
    """Szegedy et al. 2016 with the changes of the graph of 2015, on a dictionary of weights."""

    def __init__(self, torch, state):
        self.torch, self.f, self.state = torch, torch.nn.functional, state

    def conv(self, name, x, stride=1, padding: int | tuple[int, int] = 0):
        s = self.state
        y = self.f.conv2d(x, s[f"{name}.conv.weight"], None, stride, padding)
        norm = (s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"])
        shift = (s[f"{name}.bn.weight"], s[f"{name}.bn.bias"])
        return self.f.batch_norm(y, *norm, *shift, training=False, eps=0.001).relu()

    def average(self, x):
        return self.f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(self, name, x):
        five = self.conv(f"{name}.branch5x5_1", x)
        three = self.conv(f"{name}.branch3x3dbl_1", x)
        three = self.conv(f"{name}.branch3x3dbl_2", three, padding=1)
        return self.torch.cat(
            [
                self.conv(f"{name}.branch1x1", x),
                self.conv(f"{name}.branch5x5_2", five, padding=2),
                self.conv(f"{name}.branch3x3dbl_3", three, padding=1),
                self.conv(f"{name}.branch_pool", self.average(x)),
            ],
            1,
        )

    def b(self, name, x):
        three = self.conv(f"{name}.branch3x3dbl_1", x)
        three = self.conv(f"{name}.branch3x3dbl_2", three, padding=1)
        three = self.conv(f"{name}.branch3x3dbl_3", three, stride=2)
        pooled = self.f.max_pool2d(x, 3, 2)
        return self.torch.cat([self.conv(f"{name}.branch3x3", x, stride=2), three, pooled], 1)

    def c(self, name, x):
        one = self.conv(f"{name}.branch1x1", x)
        seven = self.conv(f"{name}.branch7x7_1", x)
        seven = self.conv(f"{name}.branch7x7_2", seven, padding=(0, 3))
        seven = self.conv(f"{name}.branch7x7_3", seven, padding=(3, 0))
        twice = self.conv(f"{name}.branch7x7dbl_1", x)
        for i, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)]):
            twice = self.conv(f"{name}.branch7x7dbl_{i + 2}", twice, padding=padding)
        pooled = self.conv(f"{name}.branch_pool", self.average(x))
        return self.torch.cat([one, seven, twice, pooled], 1), one

    def d(self, name, x):
        three = self.conv(f"{name}.branch3x3_1", x)
        seven = self.conv(f"{name}.branch7x7x3_1", x)
        seven = self.conv(f"{name}.branch7x7x3_2", seven, padding=(0, 3))
        seven = self.conv(f"{name}.branch7x7x3_3", seven, padding=(3, 0))
        three = self.conv(f"{name}.branch3x3_2", three, stride=2)
        seven = self.conv(f"{name}.branch7x7x3_4", seven, stride=2)
        return self.torch.cat([three, seven, self.f.max_pool2d(x, 3, 2)], 1)

    def e(self, name, x, pooled):
        short = self.conv(f"{name}.branch3x3_1", x)
        long = self.conv(f"{name}.branch3x3dbl_1", x)
        long = self.conv(f"{name}.branch3x3dbl_2", long, padding=1)
        branches = [self.conv(f"{name}.branch1x1", x)]
        for start, end in ((short, "branch3x3_2"), (long, "branch3x3dbl_3")):
            branches.append(self.conv(f"{name}.{end}a", start, padding=(0, 1)))
            branches.append(self.conv(f"{name}.{end}b", start, padding=(1, 0)))
        return self.torch.cat([*branches, self.conv(f"{name}.branch_pool", pooled)], 1)

    def __call__(self, image):
        """uint8 NHWC → (pool, spatial, logits)."""
        with self.torch.no_grad():
            x = self.torch.from_numpy(np.array(image)).permute(0, 3, 1, 2) / 255
            x = self.f.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
            x = self.conv("Conv2d_1a_3x3", x, stride=2)
            x = self.conv("Conv2d_2b_3x3", self.conv("Conv2d_2a_3x3", x), padding=1)
            x = self.conv("Conv2d_3b_1x1", self.f.max_pool2d(x, 3, 2))
            x = self.f.max_pool2d(self.conv("Conv2d_4a_3x3", x), 3, 2)
            for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
                x = self.a(name, x)
            x = self.b("Mixed_6a", x)
            firsts = {}
            for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
                x, firsts[name] = self.c(name, x)
            x = self.d("Mixed_7a", x)
            x = self.e("Mixed_7b", x, self.average(x))
            x = self.e("Mixed_7c", x, self.f.max_pool2d(x, 3, 1, 1))
            pool, fc = x.mean((2, 3)), self.state["fc.weight"]
            spatial = firsts["Mixed_6d"][:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
            return pool.numpy(), spatial.numpy(), (pool @ fc.T).numpy()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def state(torch):
    """Random weights under which features keep their size from layer to layer."""
    torch.manual_seed(0)
    found = {}
    for name, shape in pretrained.published_shapes().items():
        if name.endswith("conv.weight"):
            found[name] = torch.randn(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            found[name] = torch.rand(shape) + 0.5
        else:
            found[name] = torch.randn(shape) * 0.1
        if name.endswith("running_mean"):
            found[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    return found


@pytest.fixture(scope="module")
def file(torch, state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def loaded(file):
    return pretrained.load(str(file))


@pytest.fixture(scope="module")
def two_sets():
    return pictures(8, 40, 56), np.concatenate([pictures(6, 40, 56), pictures(3, 40, 56) // 2])


@pytest.fixture(scope="module")
def of_torch(torch, state, two_sets):
    peer = Peer(torch, state)
    return [peer(image) for image in two_sets]


def extracted(loaded, images, *, n_devices: int, batch_size: int):
    mesh = parallel.make_mesh(devices=jax.devices()[:n_devices])
    extract = features.of_inception(loaded, mesh, preparation="pytorch_fid")
    for image in images:
        rows = extract(iter([image[:5], image[5:]]), batch_size=batch_size)
        yield gather(rows, len(image), n_features=len(image), keep_logits=True)


def nuclear_frechet(x, y):
    """From rows: tr (Σa Σb)^½ is the sum of the singular values of A Bᵀ, where Σ = AᵀA."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    p, q = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + (p**2).sum() + (q**2).sum() - 2 * cross


def test_the_network_has_as_many_weights_as_the_paper_s():
    kernels = list(pretrained.convolutions().values())
    assert len(kernels) == 94
    n_channels = sum(shape[-1] for shape in kernels)
    # Of torchvision's Inception-v3 without its classes and without its auxiliary head.
    assert sum(map(np.prod, kernels)) + 2 * n_channels == 21_785_568


@pytest.fixture(scope="module")
def ours(loaded, two_sets):
    return list(extracted(loaded, two_sets, n_devices=1, batch_size=3))


def test_features_are_those_of_torch(ours, of_torch):
    for found, (pool, spatial, logits) in zip(ours, of_torch):
        np.testing.assert_allclose(found.features, pool, atol=1e-4 * np.abs(pool).max(), rtol=1e-4)
        scale = np.abs(logits).max()
        np.testing.assert_allclose(found.logits, logits, atol=1e-4 * scale, rtol=1e-4)
        mean = spatial.mean(0)
        assert mean.shape == (2023,) and mean.max() > 0.1
        np.testing.assert_allclose(found.spatial.mean, mean, atol=1e-4 * mean.max(), rtol=1e-4)


@pytest.mark.slow
def test_distances_are_those_of_torch(ours, of_torch):
    (pool_a, spatial_a, _), (pool_b, spatial_b, _) = of_torch
    a, b = ours
    fid, sfid = nuclear_frechet(pool_a, pool_b), nuclear_frechet(spatial_a, spatial_b)
    found = frechet_distance(a.pool, b.pool)
    np.testing.assert_allclose(found, fid, rtol=1e-4)
    np.testing.assert_allclose(frechet_distance(a.spatial, b.spatial), sfid, rtol=1e-4)


@pytest.mark.slow
def test_fid_is_the_same_in_batches_of_any_size_on_any_devices(loaded, two_sets):
    """Most do not divide the sets: the last batch counts, and what fills it up does not. A batch of
    64 has all of so few pictures, as one of 5 has; on eight devices any is one of 8.
    """
    few = [two_sets[0][:5], two_sets[1][-4:]]

    def distance(n_devices, batch_size):
        how = {"n_devices": n_devices, "batch_size": batch_size}
        return frechet_distance(*(part.pool for part in extracted(loaded, few, **how)))

    expected = distance(1, 1)
    found = [distance(*how) for how in ((1, 5), (1, 7), (8, 8))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_command_measures_all_that_inception_can(file, two_sets, tmp_path):
    for name, image in zip(("real", "drawn"), two_sets):
        np.savez(tmp_path / f"{name}.npz", arr_0=image)
    how = {"inception": str(file), "batch_size": 8}
    real, out = tmp_path / "statistics.npz", tmp_path / "record"
    evaluate.main(EvaluateConfig(npz=tmp_path / "real.npz", make_reference=real, **how))
    judge = EvaluateConfig(npz=tmp_path / "drawn.npz", reference=real, out=out, **how)
    evaluate.main(judge)
    found = json.loads(out.read_text())
    names = {"fid", "sfid", "inception_score", "inception_score_std", "kid", "kid_std"}
    assert found.keys() == names | {"precision", "recall", "card"}
    assert found["fid"] > 0 and found["sfid"] > 0 and found["inception_score"] >= 1
    made_with = found["card"]["features"]
    assert made_with["preparation"] == "pytorch_fid" and len(made_with["weights"]) == 64
    # What a training run measures is the same.
    how = {"space": "inception", "weights": str(file), "n": 9, "shape": (40, 56, 3)}
    yardstick = TrainingFID.open(real, parallel.make_mesh(), **how)
    assert yardstick.name == "fid_9"
    assert yardstick.distance(iter([two_sets[1]])) == pytest.approx(found["fid"], rel=1e-5)
    with pytest.raises(UserError, match=r"statistics\.npz is of --preparation pytorch_fid"):
        evaluate.main(replace(judge, preparation="adm"))
    with np.load(real) as arrays:
        others: dict[str, Any] = dict(arrays)
    card = json.loads(str(others.pop("card")))
    card["features"]["weights"] = "0" * 64
    np.savez(real, **others, card=np.array(json.dumps(card)))
    with pytest.raises(UserError, match=r"made with other weights .* hash is 000000000000…, not"):
        evaluate.main(judge)


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_and_devices_change_no_statistics(n_devices, batch_size):
    image = pictures(50, 20, 24)
    mesh = parallel.make_mesh(devices=jax.devices()[:n_devices])
    rows = features.of_pixels(mesh)(iter([image[:3], image[3:]]), batch_size=batch_size)
    found = gather(rows, 50, n_features=20, keep_logits=True)
    whole = [features.Rows(next(features.of_pixels(mesh)(iter([image]), batch_size=56)).pool)]
    expected = gather(whole, 50, n_features=20, keep_logits=True)
    scale = np.trace(expected.pool.covariance)
    assert abs(frechet_distance(found.pool, expected.pool)) < 1e-6 * scale
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6)
    assert found.features.shape == (20, 16 * 16 * 3)


def test_regrouping_keeps_every_picture_in_order():
    image = pictures(20, 2, 2)
    parts = list(regrouped(iter([image[:1], image[1:9], image[9:9], image[9:]]), 6))
    assert [len(part) for part in parts] == [6, 6, 6, 2]
    np.testing.assert_array_equal(np.concatenate(parts), image)


# --- pictures as other tools prepare them ---------------------------------------------------------

SIZES = [(32, 32), (7, 12), (300, 640)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_for_pytorch_fid(torch, size):
    image = pictures(2, *size)
    x = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
    expected = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).numpy() * 2 - 1
    np.testing.assert_allclose(inception.as_pytorch_fid(jnp.asarray(image)), expected, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_for_the_graph_of_2015(size):
    image = pictures(1, *size).astype(np.float64)

    def line(x, axis):
        """TensorFlow 1: place i of the output is place i · n / 299 of the input."""
        n = x.shape[axis]
        place = np.arange(299) * n / 299
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, n - 1), (place - low).reshape([-1, *[1] * (3 - axis)])
        return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share

    expected = (line(line(image, 1), 2) - 128) / 128
    found = inception.as_adm(jnp.asarray(image.astype(np.uint8)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_for_clean_fid(size):
    image = pictures(1, *size)
    planes = [Image.fromarray(image[0, ..., i].astype(np.float32)) for i in range(3)]
    planes = [np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC)) for p in planes]
    expected = (np.clip(np.stack(planes, -1), 0, 255)[None] - 128) / 128
    found = inception.as_clean_fid(jnp.asarray(image))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_grey_pictures_are_shown_in_three_channels():
    grey = jnp.asarray(pictures(1, 9, 9, 1))
    np.testing.assert_array_equal(
        inception.as_adm(grey), inception.as_adm(jnp.repeat(grey, 3, axis=-1))
    )


def test_a_preparation_that_does_not_exist_is_named(loaded):
    with pytest.raises(UserError, match="unknown preparation 'clean'; did you mean 'clean_fid'"):
        features.of_inception(loaded, parallel.make_mesh(), preparation="clean")


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_the_same_from_every_file(state, loaded, tmp_path):
    from safetensors.torch import save_file

    counters = {name for name in state if name.endswith("tracked")}
    save_file({n: x for n, x in state.items() if n not in counters}, tmp_path / "x.safetensors")
    again = pretrained.load(str(tmp_path))
    assert again.hash == loaded.hash
    shapes = jax.tree.map(lambda x: x.shape, inception.shapes())
    assert jax.tree.map(np.shape, again.params) == shapes
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_weight_counts(state, loaded):
    tensors = {n: x.numpy() for n, x in state.items() if not n.endswith("tracked")}
    for name in ("Mixed_5b.branch_pool.bn.running_mean", "Mixed_7c.branch3x3_2b.bn.weight"):
        changed = pretrained.to_params(tensors | {name: tensors[name] + 1})
        differ = jax.tree.map(lambda a, b: bool((a != b).any()), changed, loaded.params)
        paths = [path for path, is_other in jax.tree_util.tree_leaves_with_path(differ) if is_other]
        places = {".".join(str(key.key) for key in path[:-1]) for path in paths}
        assert places == {name.rpartition(".bn.")[0]}


def test_weights_of_another_inception_are_refused_by_name(torch, state, tmp_path):
    path = tmp_path / "x.pth"

    def refused(tensors):
        torch.save(tensors, path)
        with pytest.raises(UserError, match="do not fit FID's Inception of 2015") as error:
            pretrained.load(str(path))
        return str(error.value)

    few = {n: x for n, x in state.items() if n.startswith(("fc", "Conv2d"))}
    theirs = {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    message = refused(few | theirs)
    assert "it has no place for AuxLogits.fc.bias" in message
    assert "fc.weight (1000, 2048), not (1008, 2048)" in message
    assert "it lacks Mixed_5b.branch1x1.bn.bias" in message
    with pytest.raises(UserError, match="Inception 'nobody/has-this' is no file or folder"):
        pretrained.load("nobody/has-this")
