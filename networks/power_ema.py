"""Averages of weights by power functions, from which others are made after training (Karras et al.
2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", §3 and appendix C).

The average after t updates weighs the weights at time τ ≤ t by its profile

    p_{t,γ}(τ) = (γ + 1) τ^γ / t^(γ + 1).

The standard deviation of the profile, as a share of t, is the relative width σ_rel by which people
name it. Nothing here knows a model, a file or devices.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int


class Profiles(NamedTuple):
    """Profiles of averages.

    Args:
        t: updates that each average is over.
        gamma: exponents.
    """

    t: Float64[np.ndarray, "n"]
    gamma: Float64[np.ndarray, "n"]


def std_of_gamma(gamma: float) -> float:
    """σ_rel of the exponent γ (eq. 123)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


MAX_STD = std_of_gamma(0.0)  # of the average of all weights alike


def gamma_of_std(std: float) -> float:
    """The exponent γ > 0 of 0 < σ_rel < `MAX_STD`: the largest root of
    γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²) (eq. 126).
    """
    precision = std**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def share_at(t: Int[Array, ""], gamma: float) -> Float[Array, ""]:
    """The share of the new weights in the average after t ≥ 1 updates, 1 − β_t with the decay
    β_t = (1 − 1/t)^(γ + 1) (eq. 127).

    The average is then exactly that of the profile if weights stay the same between updates:
    update i has the profile's integral from i − 1 to i. The first one replaces what was before.
    """
    # Not 1 − β: a float32 near 1 has too few digits of it after a million updates.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t.astype(jnp.float32)))


def inner_products(a: Profiles, b: Profiles) -> Float64[np.ndarray, "n m"]:
    """The integral of the product of each two profiles (eq. 151):
    (γ₁ + 1)(γ₂ + 1) / (γ₁ + γ₂ + 1) · min(t₁, t₂)^(γ₁ + γ₂ + 1) / (t₁^(γ₁ + 1) t₂^(γ₂ + 1)).
    """
    t1, gamma1 = a.t[:, None], a.gamma[:, None]
    t2, gamma2 = b.t[None], b.gamma[None]
    both = np.minimum(t1, t2)
    # Powers of ratios: those of the times themselves would overflow.
    overlap = (both / t1) ** gamma1 * (both / t2) ** gamma2 / np.maximum(t1, t2)
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * overlap


def solve_weights(tracked: Profiles, wanted: Profiles) -> tuple[Float64[np.ndarray, "n"], float]:
    """The weights w for which Σ wᵢ·(average i) comes nearest to the wanted average: the least
    squares of the profiles' difference (§3.2), among weights whose sum is 1.

    The paper leaves the sum free, and it then misses 1 by up to a hundredth for widths outside
    those tracked. That scales the network, whose weights are much larger than what an average
    changes in them.

    Args:
        tracked: profiles of the averages that there are, no two of them the same.
        wanted: a single one.

    Returns the weights, and the error of the profile relative to its norm.
    """
    products = inner_products(tracked, tracked)
    target = inner_products(tracked, wanted)[:, 0]
    n = len(target)
    system = np.ones((n + 1, n + 1))  # with a Lagrange multiplier for the sum
    system[:n, :n] = products
    system[n, n] = 0
    weights = np.linalg.solve(system, np.append(target, 1))[:n]
    norm = inner_products(wanted, wanted)[0, 0]
    square = norm - 2 * target @ weights + weights @ products @ weights
    return weights, float(np.sqrt(max(0, square) / norm))
