"""Losses of an autoencoder of images: pixels, their gradients, KL of the latents, deep features
(LPIPS), and a critic of patches (PatchGAN).

Each loss is one number for each image, or a mean over many. Images are in −1 … 1. The trainer
chooses and weighs the losses; `pretrained/lpips.py` loads LPIPS' weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

# --- pixels and latents ---------------------------------------------------------------------------


def l2(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Mean squared difference of each image."""
    return jnp.square(a - b).mean((1, 2, 3))


def l1(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Mean absolute difference of each image."""
    return jnp.abs(a - b).mean((1, 2, 3))


PIXEL_LOSSES = {"l1": l1, "l2": l2}


def gradient_l2(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Mean squared difference of the images' gradients, by finite differences down and across.
    Blurred edges cost more than in `l2` (after Mathieu et al. 2016, eq. 6, with signs).
    """
    error = a - b
    down, across = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
    return jnp.square(down).mean((1, 2, 3)) + jnp.square(across).mean((1, 2, 3))


def kl_to_standard_normal(
    mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
    """KL(N(mean, variance) ‖ N(0, 1)) = ½ Σ (mean² + variance − 1 − log variance) in nats, summed
    over an image's latents (Kingma & Welling 2014, appendix B).
    """
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum((1, 2, 3))


def psnr(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio of each image in dB: −10 log₁₀ of the mean squared error on a
    scale of 0 … 1; at most 100 dB, for equal images.
    """
    return -10 * jnp.log10(jnp.maximum(l2(a, b) / 4, 1e-10))  # −1 … 1 is twice as wide as 0 … 1


# --- LPIPS: distance in the features of VGG-16 (Zhang et al. 2018) --------------------------------

# Widths of VGG-16's 3 × 3 convolutions (Simonyan & Zisserman 2015, table 1, D). After each group
# its features are compared, then halved in size.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LPIPS_MIN_SIZE = 2 ** (len(VGG16) - 1)  # pixels to a side: the last features are 1 × 1
# Mean and deviation of VGG-16's training images, on our scale of −1 … 1.
VGG16_MEAN, VGG16_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def lpips(
    weights: PyTree[Array], a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
    """Perceptual distance Σ_l mean_hw Σ_c w_lc (â_lc − b̂_lc)², where â_l are the features of layer
    l with unit length at each position (Zhang et al. 2018, eq. 1).

    Args:
        weights: a tree as `lpips_shapes`; w is not negative.
        a, b: grey or RGB, at least `LPIPS_MIN_SIZE` pixels to a side.
    """
    layers = zip(vgg16(weights["vgg16"], a), vgg16(weights["vgg16"], b), weights["linear"])
    distance = jnp.zeros(len(a))
    for features_a, features_b, weight in layers:
        difference = jnp.square(unit_length(features_a) - unit_length(features_b))
        distance += (difference @ weight).mean((1, 2))
    return distance


def vgg16(
    convolutions: list[list[dict[str, Array]]], image: Float[Array, "b h w c"]
) -> list[Float[Array, "b _h _w _c"]]:
    """Compute the features that LPIPS compares: those after the last convolution of each group."""
    x = jnp.broadcast_to(image, (*image.shape[:3], 3))
    x = (x - jnp.asarray(VGG16_MEAN).reshape(1, 1, 1, 3)) / jnp.asarray(VGG16_STD).reshape(
        1, 1, 1, 3
    )
    features = []
    for group in convolutions:
        if features:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        for weight in group:
            y = convolve_same(x, weight["kernel"]) + weight["bias"].reshape(1, 1, 1, -1)
            x = jax.nn.relu(y)
        features.append(x)
    return features


def convolve_same(
    x: Float[Array, "b h w i"], kernel: Float[Array, "p q i o"]
) -> Float[Array, "b h w o"]:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def unit_length(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale to unit length over channels. Lengths below 1e-5 count as 1e-5: where all features are
    0 they stay 0, and so does their gradient.
    """
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)


def lpips_shapes() -> PyTree[jax.ShapeDtypeStruct]:
    """The tree of LPIPS' weights: the convolutions of VGG-16 by groups, and one weight for each
    compared channel.
    """

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    groups = []
    n_in = 3
    for widths in VGG16:
        groups.append([])
        for n_out in widths:
            groups[-1].append({"kernel": float32(3, 3, n_in, n_out), "bias": float32(n_out)})
            n_in = n_out
    return {"vgg16": groups, "linear": [float32(widths[-1]) for widths in VGG16]}


# --- PatchGAN: a critic that judges patches (Isola et al. 2017, §3.2.2; Esser et al. 2021) --------


class PatchDiscriminator(nnx.Module):
    """An image → one logit for each of its overlapping patches, above 0 for real.

    4 × 4 convolutions, of which `n_layers` halve the image, as in the paper except for the norm:
    GroupNorm in place of BatchNorm, so that the logits of an image do not depend on the rest of the
    batch or on how rows are spread over devices.
    """

    def __init__(
        self, channels: int, *, width: int = 64, n_layers: int = 3, dtype: str, rngs: nnx.Rngs
    ):
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        strides = [2] * n_layers + [1]
        self.first = patch_conv(channels, width, stride=2, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            PatchLayer(n_in, n_out, stride=stride, dtype=dtype, rngs=rngs)
            for n_in, n_out, stride in zip(widths, widths[1:], strides[1:])
        )
        self.last = patch_conv(widths[-1], 1, stride=1, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b p q 1"]:
        x = jax.nn.leaky_relu(self.first(image), 0.2)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).astype(jnp.float32)


class PatchLayer(nnx.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, dtype: str, rngs: nnx.Rngs):
        self.conv = patch_conv(n_in, n_out, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(n_out, num_groups=min(32, n_out // 4), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        return jax.nn.leaky_relu(self.norm(self.conv(x)), 0.2)


def patch_conv(n_in: int, n_out: int, *, stride: int, dtype: str, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        n_in,
        n_out,
        (4, 4),
        strides=stride,
        padding=1,
        dtype=dtype,
        kernel_init=jax.nn.initializers.normal(0.02),
        rngs=rngs,
    )


def hinge_critic(real: Float[Array, "*n"], fake: Float[Array, "*n"]) -> Float[Array, ""]:
    """The critic's loss: ½ (E max(0, 1 − D(real)) + E max(0, 1 + D(fake))) (Lim & Ye 2017, eq. 2;
    half of it, as Esser et al. 2021).
    """
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def hinge_generator(fake: Float[Array, "*n"]) -> Float[Array, ""]:
    """The autoencoder's adversarial loss: −E D(fake) (Lim & Ye 2017, eq. 3)."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_grads: PyTree[Array], gan_grads: PyTree[Array], *, max_weight: float = 1e4
) -> Float[Array, ""]:
    """λ = ‖∇ L_rec‖ / (‖∇ L_gan‖ + 10⁻⁴), at most `max_weight`: it makes the critic's gradient at
    the decoder's last layer as large as the reconstruction's (Esser et al. 2021, eq. 7).

    Args:
        reconstruction_grads, gan_grads: gradients of the two losses in the weights of that layer.
    """
    ratio = tree_norm(reconstruction_grads) / (tree_norm(gan_grads) + 1e-4)
    return jnp.minimum(ratio, max_weight)


def tree_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree)))
