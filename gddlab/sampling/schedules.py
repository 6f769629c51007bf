"""Noise levels, and noise levels as functions of time (Karras et al. 2022, table 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.nets import SIGMA_MAX, SIGMA_MIN


@dataclass(frozen=True)
class Schedule:
    """sigma(t), its derivative, and its inverse."""

    sigma: Callable[[float], float]
    slope: Callable[[float], float]
    time: Callable[[float], float]


def karras_sigmas(
    n: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """Noise levels from `sigma_max` down to `sigma_min`, float64, (n,) (Karras et al. 2022, equation 5)."""
    if n < 1:
        raise GddlabError(f"{n} noise levels: give at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise GddlabError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: give 0 < sigma_min <= sigma_max")
    if n == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
    hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (hi + ramp * (lo - hi)) ** rho


def iddpm_sigmas(*, C_1: float, C_2: float, M: int) -> Float[Tensor, " M"]:
    """The M noise levels of iDDPM's cosine schedule, highest first, float64, (M,) (Karras et al. 2022, appendix C.3).

    The cosines are float32, as in the networks that were trained on these levels.
    """
    alpha_bar = ((0.5 * math.pi * torch.arange(M + 1)) / M / (C_2 + 1)).sin() ** 2
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=C_1).tolist()
    u = [0.0]
    for ratio in reversed(ratios):
        u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))
    return torch.tensor(u[:0:-1], dtype=torch.float64)


def nearest_level(sigmas: Iterable[float], sigma: float, name: str = "at") -> float:
    """The one of `sigmas` that is nearest to `sigma` on a log scale; the first of two.

    Raises:
        GddlabError: `sigma` is no noise level.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not (math.isfinite(sigma) and sigma > 0):
        raise GddlabError(f"{name}={sigma!r}: give a noise level above 0, such as 80")
    return min(sigmas, key=lambda s: abs(math.log(s / sigma)))


def schedule(name: str, sigma_min: float, sigma_max: float, *, epsilon_s: float = 1e-3) -> Schedule:
    """sigma(t): "linear" is t, "ve" sqrt(t), "vp" the VP process with sigma_min at t = epsilon_s and sigma_max at 1."""
    if name == "linear":
        return Schedule(lambda t: t, lambda t: 1.0, lambda sigma: sigma)
    if name == "ve":
        return Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)
    assert name == "vp"
    return fit_vp(sigma_min, sigma_max, epsilon_s)


def vp_schedule(beta_d: float = 19.9, beta_min: float = 0.1) -> Schedule:
    def sigma(t: float) -> float:
        return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def slope(t: float) -> float:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def time(s: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s**2)) - beta_min) / beta_d

    return Schedule(sigma, slope, time)


def fit_vp(sigma_min: float, sigma_max: float, epsilon_s: float) -> Schedule:
    lo, hi = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (lo / epsilon_s - hi) / (epsilon_s - 1)
    beta_min = hi - 0.5 * beta_d
    if not (beta_d > 0 and beta_min + beta_d * epsilon_s > 0):
        raise GddlabError(
            f"no VP process has sigma {sigma_min:g} at t={epsilon_s:g} and {sigma_max:g} at t=1: "
            "lower sigma_min, raise epsilon_s, or use another schedule and discretization"
        )
    return vp_schedule(beta_d, beta_min)
