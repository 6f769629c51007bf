"""Compiled reductions are those that they replace. Radial power: Parseval, single waves, white noise."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.probing import Probe, reductions
from gddlab.probing.reductions import activity, compiled, moments, one_reading, radial_power
from tests.probing.networks import tiny

compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="compiles for the CPU")
N, S = 3, 2
r = reductions


def exact(x: torch.Tensor) -> dict[reductions.Reduction, torch.Tensor]:
    d, c = x.double().reshape(N, S, -1), x.double().reshape(N, S, *x.shape[1:])
    c = c.mT if x.ndim == 3 else c  # channels of tokens are last
    c = c.reshape(N, S, c.shape[2], -1)
    return {
        moments: torch.stack([d.mean(-1), d.var(-1, correction=0), d.abs().mean(-1)], -1),
        activity: torch.cat([(d > 0).double().mean(-1, keepdim=True), c.square().mean(-1)], -1),
    }


@compiler
@pytest.mark.parametrize(
    ("shape", "by_compiled"),
    [
        ((8, 32, 32), {moments, activity}),
        ((8, 32, 32, "last"), {moments, activity}),
        ((16, 8, 8), {moments, activity}),
        ((64, 12), {moments, activity}),  # tokens
        ((3, 7, 5), {moments, activity}),
        ((3, 7, 5, "last"), {moments, activity}),
        ((64,), {moments}),
        ((1, 61, 67), set()),  # too long for one short sum, and not divisible
    ],
)
@torch.no_grad()
def test_compiled_reductions_are_those_that_they_replace(shape, by_compiled, monkeypatch):
    x = torch.randn(N * S, *(k for k in shape if k != "last"), generator=torch.Generator().manual_seed(0))
    if "last" in shape:
        x = x.contiguous(memory_format=torch.channels_last)
    for reduction in (moments, activity):
        for y in (x, x - 3, 100 + 0.1 * x):
            found, value = compiled(reduction)(y, N), exact(y)[reduction]
            assert found.dtype == torch.float64
            # of a mean the error is relative to that of absolute values
            scale = value[..., 2:].expand_as(value) if reduction is moments else value
            scale = torch.where(torch.arange(3) == 0, scale, value) if reduction is moments else value
            assert_close(found / scale, value / scale, rtol=0, atol=1e-6, equal_nan=True)
            assert_close(found, reduction(y, N), rtol=2e-5, atol=2e-6)
        spoilt = x.clone()
        spoilt[1], spoilt[2] = torch.nan, torch.inf
        found = compiled(reduction)(spoilt, N)[..., 1:].isfinite().flatten(0, 1).all(-1)  # a share may be finite
        assert found.tolist() == [True, False, False, True, True, True]
        assert_close(compiled(reduction)(x.double(), N), exact(x)[reduction], rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(reductions, "_blocks", lambda x: 1 / 0)  # what all eager ones begin with
    for reduction in (moments, activity):
        if reduction in by_compiled:
            compiled(reduction)(x, N)
        else:
            with pytest.raises(ZeroDivisionError):
                compiled(reduction)(x, N)


@compiler
@torch.no_grad()
@pytest.mark.parametrize("reduction", [moments, activity])
def test_compiled_reductions_make_no_temporary_of_the_activations_size(reduction):
    x = torch.randn(8, 64, 32, 32)
    run = compiled(reduction)
    run(x, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(x, 4)
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    assert max(sizes) < x.nbytes / 16


@compiler
@pytest.mark.parametrize("network_too", [False, True])
def test_a_compiled_probe_measures_the_same(network_too, monkeypatch):
    net = tiny()
    with torch.no_grad():
        net.model.enc["16x16_block0"].conv0.weight[0, 0, 0, 0] = torch.nan
    model = torch.compile(net, backend="eager") if network_too else net
    x, sigmas = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)), [2.0, 1.0]
    used, original = set(), reductions._compiled

    def spy(function):
        used.add((function.__name__, torch._dynamo.eval_frame._stance.stance))
        return original(function)

    monkeypatch.setattr(reductions, "_compiled", spy)
    probes = [Probe(model, sigmas, per_channel=True, compile=how) for how in (False, True)]
    for probe in probes:
        assert not used
        with torch.no_grad(), probe, probe.images(4):
            model(x, torch.tensor(sigmas).repeat(4))
    assert used == {("_moments", "default"), ("_activity", "default")}
    plain, fast = probes
    assert plain.nonfinite() == fast.nonfinite() != []
    for layer, by_stat in plain.statistics.items():
        for name, stat in by_stat.items():
            for key, sums in stat.sums.items():
                assert_close(fast.statistics[layer][name].sums[key], sums, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_without_a_compiler_one_line_says_so():
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    says = r"^compile=True needs a C\+\+ compiler, .*no-such-compiler.*\Z"  # one line: . matches no line's end
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(GddlabError, match=says):
        compiled(moments)(torch.zeros(4, 64, 16, 16), 2)
    torch.compiler.reset()


def test_one_reading_gives_all_that_is_wanted():
    for wanted, read in (
        ({r.mean, r.mean_square, r.moments}, (moments,)),
        ({r.mean, r.mean_square}, (r.mean, r.mean_square)),
        ({r.positive_share, r.channel_square}, (activity,)),
        ({r.positive_share}, (r.positive_share,)),
        ({r.gram, r.mean_square, r.hsic}, (r.gram, r.hsic)),
    ):
        assert one_reading(wanted) == read
        x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        found = {reduction: reduction(x, 3) for reduction in read}
        found |= r.follow(found)
        for reduction in wanted:
            assert_close(found[reduction], reduction(x, 3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [64, 77, 400])
def test_tokens_that_lie_channel_by_channel_are_read_as_they_lie(tokens: int) -> None:
    """As those of a patch embedding do, (B, C, H, W) to (B, T, C), and what is added to them."""
    x, y = torch.randn(2, 6, tokens, 96, generator=torch.Generator().manual_seed(0))
    turned, other = (z.mT.contiguous().mT for z in (x, y))
    assert not turned.is_contiguous() and reductions.flat(turned).data_ptr() == turned.data_ptr()
    for reduction in (r.mean, r.mean_square, r.mean_magnitude, moments, r.gram, r.pair_gram, activity):
        assert_close(reduction(turned, N), reduction(x, N), rtol=1e-5, atol=1e-7)
    exact = (x.double() - y.double()).square().mean((1, 2)).view(N, S)
    for a, b in ((x, y), (x, other), (turned, y), (turned, other)):
        for found in r.mean_square_between(a, [b, b], N):
            assert_close(found, exact, rtol=1e-6, atol=0)
    assert r.mean_square_between(turned, [turned, y], N)[0].eq(0).all()


@pytest.mark.parametrize("shape", [(64, 96), (384, 96), (4096,), (12289,)])
def test_however_many_blocks_are_read_at_once_numbers_are_the_same(shape, monkeypatch):
    x, y = torch.randn(2, N * S, *shape, generator=torch.Generator().manual_seed(0))

    def numbers():
        return torch.cat([moments(x, N), *(z[..., None] for z in r.mean_square_between(x, [y, 2 * y], N))], -1)

    once = numbers()
    for at_once in (1, 3, 5):
        monkeypatch.setattr(reductions, "_chunk", lambda x, width, k=at_once: k)
        assert torch.equal(numbers(), once)


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
