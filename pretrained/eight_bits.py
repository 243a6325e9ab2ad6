"""Weights in eight bits, and the scales that some files hold beside them.

A file of plain eight-bit floats is read like one of any other precision. In others a weight is a
tensor times a number for all of it or for each of its outputs, `X.scale_weight` (ComfyUI) or
`X.weight_scale` (diffusers) beside `X.weight`. Scales of inputs, by which products in eight bits
would be rounded, have no effect on products in more.
"""

from collections.abc import Mapping, MutableMapping

import ml_dtypes
import numpy as np

from runtime.errors import UserError

DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
MARKER = "scaled_fp8"  # an empty tensor of files that have scales


def apply_scales(tensors: MutableMapping[str, np.ndarray], where: str) -> tuple[str, ...]:
    """Multiply weights by the scales beside them, and remove these from `tensors`.

    Returns a notice if there were any.

    Raises:
        UserError: a scale without a weight in eight bits, or one of another shape; or a weight
            without a scale, where others have one or should.
    """
    scales = [name for name in tensors if _leaf(name) in SCALES]
    inputs = [name for name in tensors if _leaf(name) in INPUT_SCALES]
    markers = [name for name in tensors if _leaf(name) == MARKER]
    if not scales + inputs + markers:
        return ()
    if not scales:
        raise UserError(f"'{where}': it has {(inputs + markers)[0]}, but no scales of weights")
    for scale in scales:
        name = f"{scale.rpartition('.')[0]}.weight"
        if not _is_eight_bits(tensors.get(name)):
            raise UserError(f"'{where}': {scale} has no weight in eight bits beside it")
        tensors[name] = _multiply(tensors[name], tensors.pop(scale), f"'{where}': {scale}")
    for name in inputs + markers:
        del tensors[name]
    _refuse_unscaled(tensors, where)
    return (f"{len(scales)} weights in eight bits are multiplied by the scales beside them",)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_eight_bits(x: np.ndarray | None) -> bool:
    return x is not None and x.dtype in [np.dtype(dtype) for dtype in DTYPES.values()]


def _multiply(weight: np.ndarray, scale: np.ndarray, subject: str) -> np.ndarray:
    """Multiply a weight by one number, or by one for each of its outputs."""
    n_outputs = len(weight)
    if scale.size == 1:
        scale = scale.reshape(())
    elif scale.shape in ((n_outputs,), (n_outputs, 1)):
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        raise UserError(f"{subject} is of shape {scale.shape}, beside a weight of {weight.shape}")
    return weight.astype(np.float32) * scale.astype(np.float32)


def _refuse_unscaled(tensors: Mapping[str, np.ndarray], where: str) -> None:
    for name, x in tensors.items():
        if x.ndim > 1 and _is_eight_bits(x) and _leaf(name) == "weight":
            raise UserError(
                f"'{where}': {name} is in eight bits without the scale that others have"
            )
