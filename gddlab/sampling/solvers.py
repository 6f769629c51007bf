"""From noise to images: the generalised sampler of EDM, and the n-step sampler of consistency models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.nets import OneStepPrecond, Precond
from gddlab.sampling.schedules import SCALINGS, SCHEDULES, Schedule, default_range, noise_levels, schedule

__all__ = ["Sampler", "check_sigmas", "heun", "integrate", "multistep", "time_steps"]

_CHOICES = {
    "solver": ("heun", "euler"),
    "discretization": ("edm", "vp", "ve", "iddpm"),
    "schedule": SCHEDULES,
    "scaling": SCALINGS,
}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a diffusion teacher is sampled (Karras et al. 2022, table 1); the defaults are EDM's own choices.

    Raises:
        GddlabError: An unknown choice (near matches are given) or a number out of range.
    """

    steps: int = 18
    """Noise levels before 0; Heun makes 2 * steps - 1 network calls, Euler `steps`."""
    solver: Literal["heun", "euler"] = "heun"
    discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    """Which noise levels are visited."""
    schedule: Literal["linear", "vp", "ve"] = "linear"
    """sigma(t)."""
    scaling: Literal["none", "vp"] = "none"
    """s(t): 1, or 1 / sqrt(1 + sigma^2)."""
    sigma_min: float | None = None
    """Lowest noise level but 0; None: that of the discretisation. Clipped to the network's range, like sigma_max."""
    sigma_max: float | None = None
    """Highest noise level; None: that of the discretisation."""
    rho: float = 7.0
    """Exponent of discretisation edm."""
    alpha: float = 1.0
    """Where Heun takes its second slope, as a share of the step; 1 is Heun's, 1/2 the midpoint method."""
    epsilon_s: float = 1e-3
    """Lowest time of the VP process."""
    C_1: float = 0.001
    """Bound in iDDPM's noise levels."""
    C_2: float = 0.008
    """Offset in iDDPM's noise levels."""
    M: int = 1000
    """Number of iDDPM's noise levels."""
    S_churn: float = 0.0
    """Noise added anew over the whole way; 0 is the deterministic sampler."""
    S_min: float = 0.0
    """Lowest sigma at which noise is added."""
    S_max: float = math.inf
    """Highest sigma at which noise is added."""
    S_noise: float = 1.0
    """Standard deviation of the added noise, slightly above 1 against a loss of detail."""

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise unknown(name, getattr(self, name), accepted)
        for name in ("steps", "M"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GddlabError(f"{name}={value!r}: give an integer, at least 1")
        for name in ("sigma_min", "sigma_max", "rho", "C_2", "C_1", "S_noise"):
            self._check(name, lambda x: 0 < x < math.inf, "a number above 0")
        for name in ("alpha", "epsilon_s"):
            self._check(name, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        for name in ("S_churn", "S_min"):
            self._check(name, lambda x: 0 <= x < math.inf, "a number, at least 0")
        self._check("S_max", lambda x: x >= self.S_min, f"a number, at least S_min={self.S_min:g}")
        if self.epsilon_s == 1:
            raise GddlabError("epsilon_s=1: give a number above 0, below 1")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min > self.sigma_max:
            raise GddlabError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: give 0 < sigma_min <= sigma_max"
            )

    def _check(self, name: str, ok: Callable[[float], bool], accepted: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("sigma_min", "sigma_max"):
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not ok(value):
            raise GddlabError(f"{name}={value!r}: give {accepted}")

    def sigma_range(self, net: Precond) -> tuple[float, float]:
        """sigma_min and sigma_max for a network: as given, or the discretisation's, clipped to what the network knows."""
        lo, hi = default_range(self.discretization, epsilon_s=self.epsilon_s)
        lo = max(lo if self.sigma_min is None else self.sigma_min, net.sigma_min)
        hi = min(hi if self.sigma_max is None else self.sigma_max, net.sigma_max)
        if lo > hi:
            raise GddlabError(
                f"noise levels from {hi:g} down to {lo:g}: the network knows {net.sigma_min:g} to {net.sigma_max:g}, "
                f"give sigma_min and sigma_max inside that"
            )
        return lo, hi

    def to_dict(self) -> dict[str, Any]:
        """The settings as strict JSON knows them; an infinite S_max is None."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}


def integrate(
    net: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    sampler: Sampler = Sampler(),
    *,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Solves the probability flow ODE, or its stochastic variant, from noise to images.

    Algorithms 1 and 2 of Karras et al. 2022 in one: a step goes from t to t_next; with S_churn > 0, noise first lifts the state from t to
    t_hat > t. Where s(t) = 1 and sigma(t) = t this is EDM's own sampler.

    Args:
        net: Denoiser.
        z: Standard normal noise, (B, C, H, W).
        class_labels: One-hot, (B, label_dim).
        sampler: How.
        noise: Gives standard normal noise, (B, C, H, W), once a step when S_churn > 0; an `ImageNoise` after its latents.

    Returns:
        (B, C, H, W), float64: the state is kept in float64, the network runs in its own precision.

    Raises:
        GddlabError: The noise levels do not fit the network; S_churn without `noise`.
    """
    if sampler.S_churn and noise is None:
        raise GddlabError(f"S_churn={sampler.S_churn:g} needs noise: give noise=ImageNoise(seeds, shape)")
    course, times = time_steps(net, sampler)
    dtype = next(net.parameters()).dtype

    def scale(t: float) -> float:
        return 1.0 if sampler.scaling == "none" else 1 / math.sqrt(1 + course.sigma(t) ** 2)

    def slope(x: Tensor, t: float) -> Tensor:
        """dx/dt (equation 4, with the score as (D - x) / sigma^2)."""
        sigma, dsigma, s = course.sigma(t), course.slope(t), scale(t)
        ds_s = 0.0 if sampler.scaling == "none" else -sigma * dsigma * s**2
        image = x / s
        denoised = net(image.to(dtype), torch.tensor(sigma, dtype=dtype), class_labels).double()
        return ds_s * x + dsigma * s * ((image - denoised) / sigma)

    x = z.double() * (course.sigma(times[0]) * scale(times[0]))
    for t, t_next in itertools.pairwise(times):
        sigma = course.sigma(t)
        if noise is not None and sampler.S_churn:
            fresh = noise().to(x)  # drawn at every step, so that S_min and S_max do not change which noise a step gets
            if sampler.S_min <= sigma <= sampler.S_max:
                raised = _rounded(net, sigma * (1 + min(sampler.S_churn / sampler.steps, math.sqrt(2) - 1)))
                t_hat = course.time(raised)
                added = sampler.S_noise * math.sqrt(max(raised**2 - sigma**2, 0))
                x = scale(t_hat) / scale(t) * x + scale(t_hat) * added * fresh
                t = t_hat
        h = t_next - t
        d = slope(x, t)
        if sampler.solver == "euler" or t_next == 0:
            x = x + h * d
        else:
            weight = 1 / (2 * sampler.alpha)
            t_prime = t_next if sampler.alpha == 1 else t + sampler.alpha * h
            d_prime = slope(x + sampler.alpha * h * d, t_prime)
            x = x + h * ((1 - weight) * d + weight * d_prime)
    return x


def time_steps(net: Precond, sampler: Sampler) -> tuple[Schedule, list[float]]:
    """sigma(t), and the times t_0 > ... > t_N = 0 of a sampler's steps with a network.

    Raises:
        GddlabError: The sampler's noise levels do not fit the network or each other.
    """
    s = sampler
    lo, hi = s.sigma_range(net)
    course = schedule(s.schedule, lo, hi, epsilon_s=s.epsilon_s)
    sigmas = noise_levels(
        s.discretization, s.steps, lo, hi, rho=s.rho, epsilon_s=s.epsilon_s, C_1=s.C_1, C_2=s.C_2, M=s.M
    )
    return course, [course.time(_rounded(net, sigma)) for sigma in sigmas.tolist()] + [0.0]


def _rounded(net: Precond, sigma: float) -> float:
    return float(net.round_sigma(torch.tensor(sigma, dtype=torch.float64)))


def heun(
    net: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """EDM's deterministic sampler, 2 * num_steps - 1 network calls: `integrate` with its defaults; z, labels and result as there."""
    return integrate(net, z, class_labels, Sampler(steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho))


def multistep(
    net: OneStepPrecond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    sigmas: Sequence[float],
    noise: Callable[[], Tensor],
) -> Tensor:
    """n-step sampling of a student: G, then again and again noise and G (Song et al. 2023, algorithm 1).

    Args:
        net: Student.
        z: Standard normal noise, (B, C, H, W).
        class_labels: One-hot, (B, label_dim).
        sigmas: Descending noise levels above eps, a step each; the first is the one that the student starts from, 80.
        noise: Gives standard normal noise, (B, C, H, W), for each step but the first; an `ImageNoise` after its latents.

    Returns:
        (B, C, H, W), float32.

    Raises:
        GddlabError: Noise levels that do not descend, or not above eps.
    """
    check_sigmas(net, sigmas)
    x: Tensor = net(sigmas[0] * z, sigmas[0], class_labels)
    for sigma in sigmas[1:]:
        x = net(x + math.sqrt(sigma**2 - net.eps**2) * noise().to(x), sigma, class_labels)
    return x


def check_sigmas(net: OneStepPrecond, sigmas: Sequence[float]) -> None:
    """Raises: GddlabError: Noise levels that a student cannot be run at."""
    levels = [*sigmas, net.eps]
    if len(levels) < 2 or not all(a > b for a, b in itertools.pairwise(levels)) or not math.isfinite(levels[0]):
        raise GddlabError(
            f"sigmas={tuple(sigmas)}: give descending noise levels above {net.eps:g}, such as ({net.sigma_g:g}, 0.8)"
        )
