"""Closed forms of the flow and the SDE of Gaussian data, of numbers or arrays of any library.

Data are N(mean, std²) in each pixel; the path is x_t = (1 − t)·data + t·noise. Each form follows
from the joint Gaussian of data and x_t, and solves its differential equation.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

Number = Any


def path_std(t: Number, std: float) -> Number:
    """σ_t, the standard deviation of x_t."""
    return ((1 - t) ** 2 * std**2 + t**2) ** 0.5


def rate(t: Number, std: float) -> Number:
    """σ′/σ: how fast the flow's deviations from its mean grow with t."""
    return (t - (1 - t) * std**2) / path_std(t, std) ** 2


def velocity(x: Number, t: Number, mean: float, std: float) -> Number:
    """E[noise − data | x_t = x]."""
    return -mean + rate(t, std) * (x - (1 - t) * mean)


def clean_image(x: Number, t: Number, mean: float, std: float) -> Number:
    """E[data | x_t = x] = x − t·v."""
    return mean + (1 - t) * std**2 / path_std(t, std) ** 2 * (x - (1 - t) * mean)


def score(x: Number, t: Number, mean: float, std: float) -> Number:
    """∇ log p_t(x) = −(x + (1 − t)·v) / t."""
    return -(x - (1 - t) * mean) / path_std(t, std) ** 2


def flow_map(x: Number, t: Number, r: Number, mean: float, std: float) -> Number:
    """Where the flow leads from x at time t, at time r."""
    return (1 - r) * mean + path_std(r, std) / path_std(t, std) * (x - (1 - t) * mean)


def mean_velocity(x: Number, t: Number, r: Number, mean: float, std: float) -> Number:
    """The mean of the velocity along the flow from r to t: (x_t − x_r) / (t − r)."""
    return (x - flow_map(x, t, r, mean, std)) / (t - r)


def guided_euler(
    x: Number,
    times: Iterable[float],
    scale: float,
    interval: tuple[float, float],
    *,
    mean: float,
    weak_std: float,
    strong_std: float,
) -> Number:
    """What Euler's steps make of noise x under guidance by the model of data of another spread,
    around the same mean: the deviation is multiplied by 1 + (s − t)·c(t) in each step, with c the
    guided rate.
    """
    for t, s in pairwise(times):
        # A time of the grid may be a rounding error outside of the interval it is meant to be in.
        w = scale if interval[0] - 1e-6 <= t <= interval[1] + 1e-6 else 1.0
        guided_rate = (1 - w) * rate(t, weak_std) + w * rate(t, strong_std)
        x = x + (s - t) * (-mean + guided_rate * (x - (1 - t) * mean))
    return x


def guided_ratio(scale: float, interval: tuple[float, float], weak: float, strong: float) -> float:
    """The guidance law, of exact steps: the standard deviation of samples around the mean, guided
    between the two times; for 0 … 1 it is strong^scale · weak^(1 − scale).
    """
    a, b = interval
    of_strong = path_std(a, strong) / path_std(b, strong)
    of_weak = path_std(a, weak) / path_std(b, weak)
    return strong * (of_strong / of_weak) ** (scale - 1)


def euler_maruyama_variance(times: Iterable[float], std: float) -> float:
    """The variance of samples of the SDE with diffusion 2t, by Euler–Maruyama's steps from noise of
    variance 1: V ← (1 + dt·a)²·V + 2t·|dt|, a = 1 + (2 − t)·σ′/σ, and no noise in the last step.
    """
    variance = 1.0
    for t, s in pairwise(times):
        variance *= (1 + (s - t) * (1 + (2 - t) * rate(t, std))) ** 2
        variance += 2 * t * (t - s) if s > 0 else 0.0
    return variance
