"""The generalised sampler and the n-step sampler, against known solutions and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets import Precond, from_edm
from gddlab.nets.io import make_student
from gddlab.sampling import ImageNoise, Sampler, heun, integrate, karras_sigmas, latents, multistep
from gddlab.sampling.schedules import iddpm_sigmas, schedule
from tests.conftest import TINY, tiny_net

SOLVERS = ("euler", "heun")
DISCRETIZATIONS = ("edm", "vp", "ve", "iddpm")
SCHEDULES = ("linear", "vp", "ve")
SCALINGS = ("none", "vp")


class Gaussian(Precond):
    """The exact denoiser of N(0, sd^2) data.

    A path of its ODE is z sigma_max sqrt((sd^2 + sigma^2) / (sd^2 + sigma_max^2)).
    """

    sigma_min, sigma_max, sd = 0.0, math.inf, 0.5

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.sigmas: list[float] = []

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.sigmas.append(float(sigma))
        return x * self.sd**2 / (self.sd**2 + sigma**2)


def error(**options: object) -> float:
    """Largest error of an image, against the known solution from the first noise level."""
    net, z = Gaussian(), latents(range(2), (1, 4, 4)).double()
    x = integrate(net, z, None, Sampler(sigma_min=0.002, sigma_max=80.0, **options))  # type: ignore[arg-type]
    top = net.sigmas[0]
    exact = z * top * net.sd / math.sqrt(net.sd**2 + top**2)
    return float((x - exact).abs().max())


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_combination_converges(solver: str, discretization: str) -> None:
    """Twice the steps: half of Euler's error, a quarter of Heun's, in every schedule and scaling."""
    low, high = {"euler": (1.6, 2.7), "heun": (3.0, 5.6)}[solver]
    for course, scaling in itertools.product(SCHEDULES, SCALINGS):
        options = {"solver": solver, "discretization": discretization, "schedule": course, "scaling": scaling}
        coarse, fine = error(steps=32, **options), error(steps=64, **options)
        assert low < coarse / fine < high, (options, coarse, fine)


@pytest.mark.parametrize("alpha", [2 / 3, 0.9])
def test_other_second_order_solvers(alpha: float) -> None:
    assert 3.0 < error(steps=32, alpha=alpha) / error(steps=64, alpha=alpha) < 5.6


def test_heun_is_the_plain_loop() -> None:
    """Bit by bit EDM's algorithm 1, with 2n - 1 network calls."""
    net, z = tiny_net(), latents(range(3), (1, 16, 16))
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    sigmas = [*karras_sigmas(6).tolist(), 0.0]
    with torch.inference_mode():
        fast = heun(net, z, num_steps=6)
        assert len(calls) == 11

        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - net(x.float(), torch.tensor(sigma).float()).double()) / sigma

        x = z.double() * sigmas[0]
        for s, s_next in itertools.pairwise(sigmas):
            d = slope(x, s)
            y = x + (s_next - s) * d
            x = x + (s_next - s) * (d + slope(y, s_next)) / 2 if s_next else y
    assert torch.equal(fast, x)


def test_calls() -> None:
    net, z = Gaussian(), latents(range(2), (1, 4, 4)).double()
    integrate(net, z, None, Sampler(steps=9, solver="euler"))
    assert net.sigmas == karras_sigmas(9).tolist()
    net.sigmas.clear()
    integrate(net, z, None, Sampler(steps=1))
    assert net.sigmas == [80.0]


def noise_levels(discretization: Any, steps: int, low: float, high: float) -> Tensor:
    return Sampler(discretization=discretization, steps=steps).noise_levels(low, high)


def test_noise_levels() -> None:
    vp = noise_levels("vp", 5, 0.01, 100.0)
    fit = schedule("vp", 0.01, 100.0)
    assert_close(vp[[0, -1]], torch.tensor([100.0, 0.01], dtype=torch.float64))
    assert_close(fit.time(float(vp[2])), (1 + 1e-3) / 2)
    assert_close(noise_levels("ve", 3, 0.01, 100.0), torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))
    u = iddpm_sigmas(C_1=0.001, C_2=0.008, M=1000)
    assert len(u) == 1000 and (u.diff() < 0).all()
    some = noise_levels("iddpm", 7, 0.002, 81.0)
    assert set(some.tolist()) <= set(u.tolist()) and some[0] == u[u <= 81][0] and some[-1] == u[u >= 0.002][-1]
    for name in DISCRETIZATIONS:
        assert noise_levels(name, 1, 0.01, 50.0)[0] == pytest.approx(50.0, rel=0.02)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    """Slope and inverse belong to sigma(t)."""
    s = schedule(name, 0.002, 80.0)
    for t in (0.01, 0.4, 0.9):
        assert s.slope(t) == pytest.approx((s.sigma(t + 1e-7) - s.sigma(t - 1e-7)) / 2e-7, rel=1e-4)
        assert s.time(s.sigma(t)) == pytest.approx(t)


def test_iddpm_network_is_asked_at_its_own_levels() -> None:
    net = from_edm("iDDPMPrecond", img_resolution=8, img_channels=1, model_channels=32, channel_mult=[1], num_blocks=1)
    _, times = Sampler(steps=6).time_steps(net)
    assert set(times[:-1]) <= set(net.u.double().tolist()) and len(set(times)) == 7


def test_churn_by_hand() -> None:
    """One step raises sigma by min(S_churn / steps, sqrt(2) - 1), and adds that much noise (algorithm 2)."""
    net, seeds, shape = Gaussian(), [3, 8], (1, 4, 4)
    noise = ImageNoise(seeds, shape)
    z = noise(torch.float32)
    x = integrate(net, z, None, Sampler(steps=1, S_churn=0.3, S_noise=1.01), noise=noise)
    for i, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        start = 80 * torch.randn(shape, generator=g).double()
        raised = start + 1.01 * 80 * math.sqrt(1.3**2 - 1) * torch.randn(shape, generator=g, dtype=torch.float64)
        assert_close(x[i], raised * 0.25 / (0.25 + (80 * 1.3) ** 2))
    assert net.sigmas == [80 * 1.3]


@pytest.mark.parametrize("options", [{}, {"schedule": "vp", "scaling": "vp"}, {"schedule": "ve", "alpha": 0.5}])
def test_churn_keeps_the_distribution(options: dict[str, str]) -> None:
    """With the exact denoiser, images stay N(0, sd^2), whatever noise comes on the way."""
    noise = ImageNoise(range(4), (1, 64, 64))
    z = noise(torch.float32).double()
    sampler = Sampler(steps=128, S_churn=30, S_min=0.05, S_max=20, **options)  # type: ignore[arg-type]
    x = integrate(Gaussian(), z, None, sampler, noise=noise)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    plain = integrate(Gaussian(), z, None, Sampler(steps=128, **options))  # type: ignore[arg-type]
    assert not torch.allclose(x, plain, atol=0.1)


def test_no_churn_outside_its_range() -> None:
    noise = ImageNoise(range(2), (1, 4, 4))
    z = noise(torch.float32)
    x = integrate(Gaussian(), z, None, Sampler(S_churn=30, S_min=100), noise=noise)
    assert torch.equal(x, integrate(Gaussian(), z))


def test_multistep_by_hand() -> None:
    """G at 80; then noise up to sigma again, less eps, and once more the student (Song et al. 2023, algorithm 1)."""
    net, shape = make_student(tiny_net()), (1, 16, 16)
    noise = ImageNoise([5, 6], shape)
    with torch.no_grad():
        x = multistep(net, noise(torch.float32), sigmas=(80.0, 2.0, 0.8), noise=noise)
        g = torch.Generator().manual_seed(6)
        y = net.generate(torch.randn(1, *shape, generator=g))
        for sigma in (2.0, 0.8):
            fresh = torch.randn(shape, generator=g, dtype=torch.float64).float()
            y = net(y + math.sqrt(sigma**2 - 0.002**2) * fresh, sigma)
    assert_close(x[1:], y, rtol=1e-5, atol=1e-5)
    for sigmas in [(), (80.0, 80.0), (0.8, 80.0), (80.0, 0.002), (math.inf, 1.0), (80.0, math.nan)]:
        with pytest.raises(GddlabError, match="descending"):
            multistep(net, latents([5], shape), sigmas=sigmas, noise=noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "huen"}, "unknown solver 'huen': did you mean 'heun'"),
        ({"discretization": "edn"}, "did you mean 'edm'"),
        ({"schedule": "cosine"}, "accepted: vp, ve, linear"),
        ({"scaling": 1}, "unknown scaling 1"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"sigma_min": 0.0}, "sigma_min=0.0"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"sigma_max": "80"}, "sigma_max='80'"),
        ({"rho": -7}, "rho=-7"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"epsilon_s": 1}, "epsilon_s=1"),
        ({"S_churn": -1}, "S_churn=-1"),
        ({"S_churn": math.nan}, "S_churn=nan"),
        ({"S_min": 2.0, "S_max": 1.0}, "S_max=1.0"),
        ({"S_noise": 0}, "S_noise=0"),
        ({"M": -1}, "M=-1"),
    ],
)
def test_sampler_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(GddlabError, match=message):
        Sampler(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 90.0}, "noise levels from 80 down to 90"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "noise levels from 2 down to 3"),
        ({"schedule": "vp", "sigma_min": 1.0}, "no VP process has sigma 1 at t=0.001 and 80 at t=1"),
        ({"discretization": "iddpm", "sigma_min": 5.0, "sigma_max": 5.001}, "no iDDPM noise level in 5..5.001"),
        ({"S_churn": 10.0}, "S_churn=10 needs noise"),
    ],
)
def test_integrate_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(GddlabError, match=message):
        integrate(Gaussian(), latents([0], (1, 4, 4)), None, Sampler(**options))  # type: ignore[arg-type]


def test_range_is_the_network_s() -> None:
    """VE runs from 100 to 0.02, and so do the noise levels that are asked of it."""
    net = from_edm("VEPrecond", **TINY)
    assert Sampler().sigma_range(net) == (0.02, 80.0)
    assert Sampler(discretization="ve").sigma_range(net) == (0.02, 100.0)
    assert Sampler(sigma_min=0.001, sigma_max=500.0).sigma_range(net) == (0.02, 100.0)
