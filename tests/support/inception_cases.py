"""Inputs and helpers shared by the tests of networks.inception."""

import jax
import numpy as np
import pytest

from evaluation import features
from evaluation.features import summarize_features
from pretrained import inception as pretrained
from runtime import parallel

rng = np.random.default_rng(0)


def wave_images(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth images with some noise, so that they differ in more than a mean."""
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
    return pretrained.load_inception(str(file))


@pytest.fixture(scope="module")
def two_sets():
    return wave_images(8, 40, 56), np.concatenate(
        [wave_images(6, 40, 56), wave_images(3, 40, 56) // 2]
    )


@pytest.fixture(scope="module")
def of_torch(torch, state, two_sets):
    peer = Peer(torch, state)
    return [peer(image) for image in two_sets]


def extracted(loaded, images, *, n_devices: int, batch_size: int):
    mesh = parallel.make_mesh(devices=jax.devices()[:n_devices])
    extract = features.build_inception_extractor(loaded, mesh, preparation="pytorch_fid")
    for image in images:
        rows = extract(iter([image[:5], image[5:]]), batch_size=batch_size)
        yield summarize_features(rows, len(image), n_features=len(image), keep_logits=True)


@pytest.fixture(scope="module")
def ours(loaded, two_sets):
    return list(extracted(loaded, two_sets, n_devices=1, batch_size=3))
