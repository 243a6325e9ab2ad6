"""Losses of an autoencoder have their closed forms; LPIPS equals an independent one in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from perceptual_cases import (
    folder,  # noqa: F401
    random_images,
    states,  # noqa: F401
    torch,  # noqa: F401
)

from networks import perceptual
from pretrained import lpips


def on_device(folder) -> Any:
    return jax.tree.map(jnp.asarray, lpips.load_lpips(str(folder)))


def lpips_in_torch(torch, states, a, b):
    """Zhang et al. 2018, written from the paper."""
    layers, n_in, groups = [], 3, []
    for i, widths in enumerate(perceptual.VGG16):
        layers += [torch.nn.MaxPool2d(2)] if i else []
        for n_out in widths:
            layers += [torch.nn.Conv2d(n_in, n_out, 3, padding=1), torch.nn.ReLU()]
            n_in = n_out
        groups.append(len(layers))
    network = torch.nn.Sequential(*layers)
    network.load_state_dict({n.removeprefix("features."): v for n, v in states[0].items()})
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y = (torch.from_numpy(np.array(image)).permute(0, 3, 1, 2) for image in (a, b))
    x, y, distance = (x - shift) / scale, (y - shift) / scale, torch.zeros(len(a), 1)
    with torch.no_grad():
        for i, (first, last) in enumerate(zip([0, *groups], groups)):
            x, y = network[first:last](x), network[first:last](y)
            unit_x, unit_y = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (x, y))
            weight = states[1][f"lin{i}.model.1.weight"]
            distance += torch.nn.functional.conv2d((unit_x - unit_y) ** 2, weight).mean((2, 3))
    return distance[:, 0].numpy()


def test_lpips_is_that_of_torch(torch, states, folder):
    a, b = random_images(2, 32), random_images(2, 32)
    weights = on_device(folder)
    expected = lpips_in_torch(torch, states, a, b)
    assert expected.min() > 0.1
    found = jax.jit(perceptual.lpips)(weights, a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    grey = random_images(1, 16, channels=1)
    colour = jnp.repeat(grey, 3, axis=-1)
    np.testing.assert_allclose(
        perceptual.lpips(weights, grey, -grey),
        perceptual.lpips(weights, colour, -colour),
        rtol=1e-5,
    )


def test_lpips_of_an_image_and_itself_is_0_and_so_is_its_gradient(folder):
    weights, a = on_device(folder), random_images(1, 16)
    weights["vgg16"][0][0]["bias"] -= 100.0  # no feature is above 0: a length of 0 must not be NaN
    value, gradient = jax.value_and_grad(lambda x: perceptual.lpips(weights, x, a).sum())(a + 0.1)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert perceptual.lpips(weights, a, a)[0] == 0
