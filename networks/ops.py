"""Operations with hand-written derivatives: linear maps and attention, and the precision and memory
of both.

They are functions of arrays. Products take operands in the precision of x and sum in float32,
forward and backward. Modules with weights are in `networks/layers.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

# --- memory and precision -------------------------------------------------------------------------

SAVED = "saved"  # any name does: `runtime.parallel` saves all named values


@jax.custom_jvp
def save_for_backward(x: Array) -> Array:
    """Save x for the backward pass instead of rematerialising it.

    Half precision is saved as bits: of numbers XLA for CPUs would save a copy in float32.
    """
    return name_for_saving(x)


def name_for_saving(x: Array) -> Array:
    """Give x a name, which rematerialisation policies see: `save_for_backward` for functions with
    a derivative of their own.
    """
    if x.dtype.itemsize > 2:
        return checkpoint_name(x, SAVED)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), SAVED)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


# Not `save_for_backward` itself: inside a function with its own derivative a name is not seen.
save_for_backward.defjvp(lambda primals, tangents: (name_for_saving(*primals), *tangents))


def in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """Compute a function of arrays in float32, and round its result to the precision of the first
    array once, at the end. This is exact, and on a CPU several times as fast as rounding every
    step. Nothing inside is saved for the backward pass.
    """

    @functools.wraps(function)
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def exact(*arrays: Array) -> Array:
        return function(*(x.astype(jnp.float32) for x in arrays)).astype(arrays[0].dtype)

    return exact


# --- linear maps ----------------------------------------------------------------------------------


@jax.custom_vjp
def affine(
    x: Float[Array, "*b i"], w: Float[Array, "i o"], bias: Float[Array, "o"]
) -> Float[Array, "*b o"]:
    """x W + bias with operands in x's precision and sums in float32, forward and backward.

    With y's gradient g: dx = g Wᵀ, dW = Σ xᵀ g, dbias = Σ g. JAX's own rule would multiply in
    float32 wherever a gradient is.
    """
    y = _product("...i,io->...o", x, w.astype(x.dtype))
    return (y + bias.reshape([1] * (y.ndim - 1) + [-1])).astype(x.dtype)


def _affine_forward(x: Any, w: Any, bias: Any) -> Any:
    return affine(x, w, bias), (x, w)


def _affine_backward(saved: Any, g: Any) -> Any:
    return *_matmul_backward(saved, g), g.sum(tuple(range(g.ndim - 1)), dtype=jnp.float32)


@jax.custom_vjp
def matmul(x: Float[Array, "*b i"], w: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """`affine` without a bias."""
    return _product("...i,io->...o", x, w.astype(x.dtype)).astype(x.dtype)


def _matmul_forward(x: Any, w: Any) -> Any:
    return matmul(x, w), (x, w)


def _matmul_backward(saved: Any, g: Any) -> Any:
    x, w = saved
    dx = _product("...o,io->...i", g, w.astype(x.dtype)).astype(x.dtype)
    if x.shape[-1] > g.shape[-1]:
        # On a CPU the first operand is transposed before it is multiplied, and the operation that
        # made it runs column by column: better on the narrow one. Without the barrier XLA would
        # put the outer transpose into the product, which then cannot take bfloat16.
        dw = jax.lax.optimization_barrier(_product("...o,...i->oi", g, x)).T
    else:
        dw = _product("...i,...o->io", x, g)
    return dx, dw.astype(w.dtype)  # a frozen base's may be in half precision


def _product(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


affine.defvjp(_affine_forward, _affine_backward)
matmul.defvjp(_matmul_forward, _matmul_backward)


# --- eight bits -----------------------------------------------------------------------------------

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2  # of operands forward, and of gradients
# The largest number of each is 0.875 times this power of two.
EXPONENTS = {E4M3: 9, E5M2: 16}


@jax.custom_vjp
def affine_in_fp8(
    x: Float[Array, "*b i"], w: Float[Array, "i o"], bias: Float[Array, "o"]
) -> Float[Array, "*b o"]:
    """`affine` with operands in eight bits: x and W in e4m3, the gradient of y in e5m2; sums in
    float32 (Micikevicius et al. 2022, §3 and §4).

    Each operand is scaled by the power of two that brings its largest number just below what the
    format holds. Such a scale moves no number to another rounding but those below 2⁻¹⁵ of the
    largest, so that the result hardly depends on what else is in the batch, or on this device.
    """
    return _affine_in_fp8_forward(x, w, bias)[0]


def _affine_in_fp8_forward(x: Any, w: Any, bias: Any) -> Any:
    y = _product_in_fp8("...i,io->...o", quantize(x, E4M3), quantize(w, E4M3))
    return (y + bias.reshape([1] * (y.ndim - 1) + [-1])).astype(x.dtype), (x, w)


def _affine_in_fp8_backward(saved: Any, g: Any) -> Any:
    x, w = saved
    g8 = quantize(g, E5M2)
    dx = _product_in_fp8("...o,io->...i", g8, quantize(w, E4M3)).astype(x.dtype)
    dw = _product_in_fp8("...i,...o->io", quantize(x, E4M3), g8)
    # Frozen weights may be in half precision.
    return dx, dw.astype(w.dtype), g.sum(tuple(range(g.ndim - 1)), dtype=jnp.float32)


affine_in_fp8.defvjp(_affine_in_fp8_forward, _affine_in_fp8_backward)


def quantize(x: Float[Array, "*s"], dtype: Any) -> tuple[Float[Array, "*s"], Float[Array, ""]]:
    """Round x · 2ᵏ to eight bits; returns that and 2⁻ᵏ. What is not finite stays so."""
    largest = jnp.abs(x).max().astype(jnp.float32)
    fraction, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1.0))
    k = EXPONENTS[dtype] - exponent - (fraction > 0.875)
    k = jnp.clip(k, -126, 126)  # where 2ᵏ and 2⁻ᵏ are normal numbers
    return (x * jnp.ldexp(1.0, k)).astype(dtype), jnp.ldexp(1.0, -k)


def _product_in_fp8(pattern: str, a: Any, b: Any) -> Array:
    return _product(pattern, a[0], b[0]) * a[1] * b[1]


# --- attention ------------------------------------------------------------------------------------


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h*k"]:
    """softmax(q kᵀ / √k) v per head, softmax in float32, heads side by side (Vaswani et al. 2017,
    eq. 1).

    Keys where `mask` is False have weight 0; each row needs one that is True. Half precision on a
    new enough NVIDIA GPU goes through cuDNN's kernel, all else through `recomputing_attention`.
    """
    h, width = q.shape[2:]
    if has_cudnn_attention() and q.dtype != jnp.float32 and width % 8 == 0 and width <= 128:
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
        q, k, v = save_for_backward(q), save_for_backward(k), save_for_backward(v)
        y = save_for_backward(
            jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        )
        return rearrange(y, "b n h k -> b n (h k)")
    bias = None if mask is None else jnp.where(jnp.repeat(mask, h, axis=0), 0.0, MASKED_SCORE)
    q, k, v = (save_for_backward(rearrange(x, "b n h k -> (b h) n k")) for x in (q, k, v))
    # The power of two next to 1/√k is exact in any precision; the rest, if any, is for the scores.
    power = 2.0 ** round(np.log2(width) / -2)
    y: Any = recomputing_attention(
        q * jnp.asarray(power, q.dtype), k, v, bias, float(width**-0.5 / power)
    )
    return rearrange(y, "(b h) n k -> b n (h k)", h=h)


@functools.cache
def has_cudnn_attention() -> bool:
    """Tell if the GPUs are NVIDIA's of Ampere or later, which cuDNN's flash attention needs."""
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


MASKED_SCORE = float(jnp.finfo(jnp.float32).min) / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recomputing_attention(
    q: Float[Array, "z n k"],
    k: Float[Array, "z m k"],
    v: Float[Array, "z m k"],
    bias: Float[Array, "z m"] | None,
    scale: float,
) -> Float[Array, "z n k"]:
    """softmax(scale · q kᵀ + bias) v for each of z heads. The bias gets no gradient.

    The backward pass computes the scores again instead of saving them: they are n · m numbers a
    head, and the rest is n · k (Dao et al. 2022, §3.1 and B.4).
    """
    return _attend_forward(q, k, v, bias, scale)[0]


def _attend_forward(q: Any, k: Any, v: Any, bias: Any, scale: Any) -> Any:
    scores = _add_bias(scale * _product("znk,zmk->znm", q, k), bias, axis=1)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    y = name_for_saving(
        (_product("znm,zmk->znk", weights.astype(v.dtype), v) / total).astype(v.dtype)
    )
    log_sum = name_for_saving((peak + jnp.log(total))[..., 0])
    return y, (q, k, v, bias, y, log_sum)


def _attend_backward(scale: Any, saved: Any, g: Any) -> Any:
    """With weights p = exp(s − log Σ exp s): dv = pᵀ g, ds = scale · p ∘ (g vᵀ − rowsum(g ∘ y)),
    dq = ds k, dk = dsᵀ q. All of it is transposed, keys before queries, as dv and dk need it.
    """
    q, k, v, bias, y, log_sum = saved
    scores = _add_bias(scale * _product("zmk,znk->zmn", k, q), bias, axis=2)
    p = jnp.exp(scores - log_sum[:, None])
    row_sum = (g.astype(jnp.float32) * y).sum(-1)
    ds = (scale * p * (_product("zmk,znk->zmn", v, g) - row_sum[:, None])).astype(q.dtype)
    dv = _product("zmn,znk->zmk", p.astype(g.dtype), g)
    dk, dq = _product("zmn,znk->zmk", ds, q), _product("zmn,zmk->znk", ds, k)
    dbias = None if bias is None else jnp.zeros_like(bias)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


def _add_bias(scores: Any, bias: Any, *, axis: int) -> Any:
    return scores if bias is None else scores + jnp.expand_dims(bias, axis)


recomputing_attention.defvjp(_attend_forward, _attend_backward)
