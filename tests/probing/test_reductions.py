"""Radial power: Parseval, single waves, white noise."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.probing.reductions import radial_power


@pytest.mark.parametrize("h", [15, 16])
def test_a_wave_is_found_at_its_frequency(h: int) -> None:
    t = 2 * torch.pi * torch.arange(h, dtype=torch.float64) / h
    wave = torch.cos(3 * t)[None, :].expand(h, h)
    frequency, power = radial_power(wave.expand(2, 1, h, h))
    assert frequency.tolist() == list(range(h // 2 + 1))
    assert power.shape == (2, h // 2 + 1)
    assert power.argmax(1).tolist() == [3, 3]
    f = torch.fft.fftfreq(h, 1 / h)
    in_ring = int(((f[:, None] ** 2 + f[None] ** 2).sqrt().round() == 3).sum())
    assert_close(power[0, 3].item() * in_ring, h * h / 2, rtol=1e-12, atol=0)  # all of the wave's energy
    assert power[0, [0, 1, 2, 4, 5]].max() < 1e-20


def test_power_is_the_mean_square_of_the_coefficients_by_hand() -> None:
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    _, power = radial_power(x)
    for r in range(5):
        found = []
        for u in range(8):
            for v in range(8):
                du, dv = min(u, 8 - u), min(v, 8 - v)
                if round((du * du + dv * dv) ** 0.5) == r:
                    phase = (u * torch.arange(8.0).double()[:, None] + v * torch.arange(8.0).double()[None]) / 8
                    wave = torch.exp(-2j * torch.pi * phase)
                    found.append(((x.double() * wave).sum((2, 3)) / 8).abs().square().mean(1))
        assert_close(power[:, r], torch.stack(found).mean(0), rtol=1e-9, atol=1e-12)


def test_white_noise_is_flat() -> None:
    x = 0.5 * torch.randn(512, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    _, power = radial_power(x)
    assert_close(power.mean(0), torch.full((9,), 0.25, dtype=torch.float64), rtol=0.15, atol=0)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(GddlabError, match=r"\(1, 8, 8\): give square images"):
        radial_power(torch.zeros(1, 8, 8))
    with pytest.raises(GddlabError, match=r"\(1, 1, 8, 9\): give square images"):
        radial_power(torch.zeros(1, 1, 8, 9))
