"""Noise levels and schedules: properties that hold for every number of levels, range and exponent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.sampling import Sampler, karras_sigmas, nearest_level
from gddlab.sampling.schedules import schedule

ranges = st.tuples(st.floats(1e-3, 1.0), st.floats(2.0, 1e3))  # sigma_min, sigma_max
counts = st.integers(2, 200)
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@quick
@given(n=counts, span=ranges, rho=st.floats(1.0, 100.0))
def test_karras_levels_descend_between_their_end_points(n: int, span: tuple[float, float], rho: float) -> None:
    low, high = span
    s = karras_sigmas(n, sigma_min=low, sigma_max=high, rho=rho)
    assert s.shape == (n,) and s.dtype == torch.float64
    assert (s.diff() < 0).all()
    assert_close(s[[0, -1]], torch.tensor([high, low], dtype=torch.float64), rtol=1e-9, atol=0)


@quick
@given(n=st.integers(3, 50), span=ranges)
def test_rho_leads_from_equal_steps_to_equal_ratios(n: int, span: tuple[float, float]) -> None:
    """rho = 1 is a linear grid; as rho grows, the grid becomes geometric; a larger rho has more low levels."""
    low, high = span
    linear = torch.linspace(high, low, n, dtype=torch.float64)
    assert_close(karras_sigmas(n, sigma_min=low, sigma_max=high, rho=1.0), linear)
    geometric = torch.logspace(math.log10(high), math.log10(low), n, dtype=torch.float64)
    assert_close(karras_sigmas(n, sigma_min=low, sigma_max=high, rho=1e6), geometric, rtol=1e-4, atol=0)
    some, more = (karras_sigmas(n, sigma_min=low, sigma_max=high, rho=rho) for rho in (3.0, 7.0))
    assert (more[1:-1] < some[1:-1]).all()


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
@quick
@given(n=counts, low=st.floats(2e-3, 0.01), high=st.floats(10.0, 80.0))
def test_discretisations_descend_within_the_range(name: Any, n: int, low: float, high: float) -> None:
    s = Sampler(discretization=name, steps=n).noise_levels(low, high)
    assert s.shape == (n,) and (s.diff() < 0).all()
    assert s[-1] >= low * (1 - 1e-6) and s[0] <= high * (1 + 1e-6)
    if name != "iddpm":  # which has levels of its own
        assert s.tolist()[:: n - 1] == pytest.approx([high, low], rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
@quick
@given(low=st.floats(1e-3, 0.01), high=st.floats(10.0, 200.0), t=st.floats(0.01, 1.0), step=st.floats(1e-3, 0.5))
def test_schedules_grow_and_are_inverted(name: str, low: float, high: float, t: float, step: float) -> None:
    s = schedule(name, low, high)
    assert s.sigma(t) < s.sigma(t + step) and s.slope(t) > 0
    assert s.time(s.sigma(t)) == pytest.approx(t, rel=1e-6)
    if name == "vp":
        assert (s.sigma(1e-3), s.sigma(1.0)) == pytest.approx((low, high), rel=1e-6)


@quick
@given(levels=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), sigma=st.floats(1e-3, 1e3))
def test_the_nearest_level_is_nearest_in_ratio(levels: list[float], sigma: float) -> None:
    near = nearest_level(levels, sigma)
    assert near in levels
    assert all(max(near / sigma, sigma / near) <= max(s / sigma, sigma / s) * (1 + 1e-12) for s in levels)


def test_nearest_is_not_nearest_in_difference() -> None:
    assert nearest_level([0.1, 80.0], 10.0) == 80.0
    assert abs(10 - 0.1) < abs(10 - 80)


@pytest.mark.parametrize("n", [0, -3])
def test_no_levels_are_refused(n: int) -> None:
    with pytest.raises(GddlabError, match="give at least 1"):
        karras_sigmas(n)
