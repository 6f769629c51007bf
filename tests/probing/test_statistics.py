"""Each statistic against float64 arithmetic on cloned activations."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from gddlab.nets.blocks import UNetBlock
from gddlab.probing import STATISTICS, Probe, Statistic, reductions
from gddlab.probing.layers import is_conv
from gddlab.probing.statistics import ChannelMoments
from tests.probing.networks import tiny, tiny_adm

OF_TRANSFORMERS = ("rel_update_cross", "rel_update_mlp")
STATS = (*(s for name, s in STATISTICS.items() if name not in OF_TRANSFORMERS), ChannelMoments)
SIGMAS = [80.0, 2.0, 0.3, 0.01]
N, S = 8, len(SIGMAS)


raw = {}


def run(net, n=N, seed=0, **kwargs):
    """A probed pass, and every module's output and first input in float64, (n, S, D); `raw` has (n, S, C, H, W)."""
    seen = {}
    raw.clear()

    def keep(name):
        def hook(module, args, output):
            if args and isinstance(output, torch.Tensor):
                seen[name, "output"] = output.detach().double().reshape(n, S, -1).clone()
                raw[name] = output.detach().double().unflatten(0, (n, S)).clone()

        return hook

    def keep_input(name):
        return lambda module, args: seen.update({(name, "input"): args[0].detach().double().reshape(n, S, -1).clone()})

    handles = []
    for name, m in net.named_modules():
        if is_conv(m) or isinstance(m, UNetBlock) or name.endswith(("norm2", "skip")):
            handles += [m.register_forward_hook(keep(name)), m.register_forward_pre_hook(keep_input(name))]
    g = torch.Generator().manual_seed(seed)
    sigma = torch.tensor(SIGMAS).repeat(n)
    x = torch.randn(n, 1, 1, 16, 16, generator=g).expand(n, S, 1, 16, 16) * torch.tensor(SIGMAS)[:, None, None, None]
    with torch.no_grad(), Probe(net, SIGMAS, **kwargs) as p, p.images(n):
        net(x.flatten(0, 1), sigma)
    for h in handles:
        h.remove()
    return p, seen


def sem(values):
    return values.std(0, correction=1) / len(values) ** 0.5


@pytest.fixture(scope="module", params=["ncsnpp", "adm"])
def probed(request):
    if request.param == "ncsnpp":
        return run(tiny(), layers=["conv", "block"], stats=STATS)
    net = tiny_adm()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return run(net.eval(), layers=["conv", "block"], stats=STATS)


def check(found, value, error):
    assert_close(found[0], value, rtol=1e-6, atol=1e-6)
    assert_close(found[1], error, rtol=1e-4, atol=1e-6)


def test_rms(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        square = seen[name, "output"].square().mean(-1)
        rms = square.mean(0).sqrt()
        check(stats["rms"].result(), rms, sem(square) / (2 * rms))


def test_mean_abs(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        value = seen[name, "output"].abs().mean(-1)
        check(stats["mean_abs"].result(), value.mean(0), sem(value))


def test_active_fraction_where_the_input_is_an_activation(probed):
    p, seen = probed
    names = {n for n, stats in p.statistics.items() if "active_fraction" in stats}
    last = ("conv0", "conv1", "16x16_aux_conv", "out_conv")
    assert names == {n for n in p.statistics if n.endswith(last)}
    for name in names:
        value = (seen[name, "input"] > 0).double().mean(-1)
        assert (seen[name, "input"] > -0.2785).all()  # SiLU's minimum
        check(p.statistics[name]["active_fraction"].result(), value.mean(0), sem(value))


def test_rel_update(probed):
    p, seen = probed
    blocks = [n for n in p.statistics if p.statistics[n].keys() & {"rel_update"}]
    assert len(blocks) >= 4
    for name in blocks:
        base = seen.get((f"{name}.skip", "output"), seen[name, "input"])
        value = seen[f"{name}.conv1", "output"].norm(dim=-1) / base.norm(dim=-1)
        check(p.statistics[name]["rel_update"].result(), value.mean(0), sem(value))


def test_rel_update_attn_is_relative_to_what_attention_adds_to(probed):
    p, seen = probed
    net = p.model
    blocks = [n for n, stats in p.statistics.items() if "rel_update_attn" in stats]
    assert blocks == [n for n, m in net.named_modules() if isinstance(m, UNetBlock) and m.num_heads]
    for name in blocks:
        block = net.get_submodule(name)
        skip = seen.get((f"{name}.skip", "output"), seen[name, "input"])
        base = (seen[f"{name}.conv1", "output"] + skip) * block.skip_scale
        value = seen[f"{name}.proj", "output"].norm(dim=-1) / base.norm(dim=-1)
        check(p.statistics[name]["rel_update_attn"].result(), value.mean(0), sem(value))


def test_cosine(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        a = seen[name, "output"]
        flat = a.transpose(0, 1).flatten(1).double()  # (S, n * D)
        expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        assert_close(stats["cosine"].matrix().double(), expected, rtol=0, atol=2e-6)  # sums in float32
        value, error = stats["cosine"].result()
        assert_close(value.double(), expected[:, 0], rtol=0, atol=2e-6)
        g = torch.einsum("nsd,ntd->nst", a, a)

        def ratio(keep, g=g):
            t = g[keep].sum(0)
            return t[:, 0] / (t.diagonal() * t[0, 0]).sqrt()

        rest = torch.stack([ratio([j for j in range(N) if j != i]) for i in range(N)])  # the jackknife's error
        jackknife = ((N - 1) / N * (rest - rest.mean(0)).square().sum(0)).sqrt()
        assert error[0] == 0
        assert (error[1:] < 3 * jackknife[1:] + 1e-6).all()
        assert (error[1:] > jackknife[1:] / 3 - 1e-6).all()


def test_correlation(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        a = seen[name, "output"]
        a = a - a.mean(0)  # changes no difference, and leaves float64 the digits that matter here
        pairs = torch.stack([a[i : i + 2] - a[i : i + 2].mean(0) for i in range(0, N, 2)])  # (4, 2, S, D)
        c = torch.einsum("gisd,gitd->gst", pairs, pairs)  # the unbiased covariance of each pair: its divisor is 1

        def ratio(keep, c=c):
            t = c[keep].sum(0)
            return t / t.diagonal().outer(t.diagonal()).sqrt()

        expected = ratio(list(range(N // 2)))
        assert_close(stats["correlation"].matrix(), expected, rtol=0, atol=2e-6)  # sums in float32
        value, error = stats["correlation"].result()
        assert_close(value, expected[:, 0], rtol=0, atol=2e-6)
        rest = torch.stack([ratio([j for j in range(N // 2) if j != i])[:, 0] for i in range(N // 2)])
        jackknife = ((N // 2 - 1) * (rest - rest.mean(0)).square().mean(0)).sqrt()
        assert error[0] == 0
        assert (error[1:] < 3 * jackknife[1:] + 1e-6).all()
        assert (error[1:] > jackknife[1:] / 3 - 1e-6).all()
        assert stats["correlation"].n_images == N


def correlated(x, n, **parts):
    stat = STATISTICS["correlation"]()
    for i in range(0, n, parts.get("step", n)):
        rows = x[i : i + parts.get("step", n)].flatten(0, 1)
        count = len(rows) // x.shape[1]
        stat.update(x=reductions.pair_gram(rows, count), level=reductions.mean_square(rows, count))
    return stat


def test_correlation_is_of_what_images_change_and_cosine_of_the_mean():
    g = torch.Generator().manual_seed(0)
    n, own, other = 400, torch.randn(400, 200, generator=g), torch.randn(400, 200, generator=g)
    x = torch.stack([own, 0.3 * own + (1 - 0.3**2) ** 0.5 * other, -own], 1)  # correlations 0.3 and -1 with the first
    x = x + 20 * torch.randn(200, generator=g)  # the same for all images and noise levels
    value, error = correlated(x, n).result()
    assert_close(value[1:], torch.tensor([0.3, -1.0], dtype=torch.float64), rtol=0, atol=4 * float(error[1]) + 1e-4)
    assert 0.001 < error[1] < 0.02
    cosine = STATISTICS["cosine"]()
    cosine.update(x=reductions.gram(x.flatten(0, 1), n))
    assert (cosine.result()[0] > 0.99).all()
    # over many pairs it is the correlation that all images together give, without bias by the number of images
    d = (x - x.mean(0)).double()
    whole = torch.einsum("nsd,ntd->st", d, d)
    expected = whole[:, 0] / (whole.diagonal() * whole[0, 0]).sqrt()
    assert_close(value, expected, rtol=0, atol=4 * float(error[1]))
    few = torch.stack([correlated(x[i : i + 2], 2).sums["matrix"] for i in range(0, n, 2)]).mean(0)
    assert_close(few, whole / (n - 1) / 200, rtol=0.02, atol=0.02)


def test_an_image_without_a_partner_has_no_covariance():
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    odd, even = correlated(x, 5), correlated(x[:4], 4)
    assert_close(odd.result(), even.result(), rtol=0, atol=0)
    assert odd.n_images == 4
    assert_close(correlated(x, 5, step=2).matrix(), even.matrix(), rtol=1e-6, atol=1e-6)
    one = correlated(x[:1], 1)
    assert one.n_images == 0
    assert torch.stack(one.result()).isnan().all() and one.matrix().isnan().all()
    assert correlated(x[:2], 2).result()[1][1:].isnan().all()  # one pair has no error


def test_what_does_not_depend_on_the_image_has_no_correlation():
    x = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0)).expand(6, 3, 40)
    rounding = x * (1 + 1e-7 * torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(1)))
    for same in (x, rounding):
        assert torch.stack(correlated(same, 6).result()).isnan().all()
    little = x * (1 + 1e-4 * torch.randn(6, 1, 40, generator=torch.Generator().manual_seed(1)))
    assert torch.stack(correlated(little, 6).result()).isfinite().all()
    mixed = x.clone()
    mixed[:, 1] += torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    assert correlated(mixed, 6).matrix().isfinite().tolist() == [[False] * 3, [False, True, False], [False] * 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_spoil_their_own_correlations_alone(bad):
    x = torch.randn(6, 4, 50, generator=torch.Generator().manual_seed(0))
    x[3, 2, 7] = bad
    stat = correlated(x, 6)
    assert stat.result()[0].isnan().tolist() == [False, False, True, False]
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[2] = where[:, 2] = True
    assert torch.equal(stat.matrix().isnan(), where)
    assert_close(stat.matrix()[~where], correlated(x[:, [0, 1, 3]], 6).matrix().flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64, 64), (3, 299, 31), (1, 7, 5), (5,)])
def test_differences_of_pairs_keep_their_digits(shape):
    x = 100 + torch.randn(15, *shape, generator=torch.Generator().manual_seed(0))
    d = x.double().reshape(5, 3, -1)
    away = d[0:4:2] - d[1:4:2]
    expected = torch.einsum("psd,ptd->pst", away, away) / (2 * d.shape[-1])
    for form in (x, x.contiguous(memory_format=torch.channels_last)) if len(shape) == 3 else (x,):
        assert_close(reductions.pair_gram(form, 5), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stat", STATS)
def test_merge_equals_one_pass_over_all(stat):
    net = tiny()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, S, 1, 16, 16, generator=g)
    probes = []
    for parts in ([x], [x[:8]], [x[8:]]):
        with torch.no_grad(), Probe(net, SIGMAS, stats=stat) as p:
            for part in parts:
                with p.images(len(part)):
                    net(part.flatten(0, 1), torch.tensor(SIGMAS).repeat(len(part)))
        probes.append(p)
    whole, first, second = probes
    for name in whole.statistics:
        mine = first.statistics[name][stat.name]
        mine.merge(second.statistics[name][stat.name])
        assert mine.n_images == 16
        for key, total in whole.statistics[name][stat.name].sums.items():
            assert_close(mine.sums[key], total, rtol=1e-5, atol=1e-5)


def test_reductions_of_large_rows_keep_their_digits():
    x = torch.randn(16, 64, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    d = x.double().reshape(8, 2, -1)
    c = x.double().reshape(8, 2, 64, -1)
    expected = {
        "mean": d.mean(-1),
        "mean_square": d.square().mean(-1),
        "mean_magnitude": d.abs().mean(-1),
        "positive_share": (d > 0).double().mean(-1),
        "gram": torch.einsum("nsd,ntd->nst", d, d) / d.shape[-1],
        "channel_mean": c.mean(-1),
        "channel_square": c.square().mean(-1),
        "moments": torch.stack([d.mean(-1), d.var(-1, correction=0), d.abs().mean(-1)], -1),
        "channel_variance": c.var(-1, correction=0),
    }
    for name, value in expected.items():
        for form in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_close(getattr(reductions, name)(form, 8), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "spread"), [(1, 0.1), (10, 0.1), (100, 0.1), (100, 0.01)])
def test_spreads_beside_large_means_keep_their_digits(mean, spread):
    x = mean + spread * torch.randn(16, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    d = x.double().unflatten(0, (8, 2))
    std, channel = STATISTICS["std"](), ChannelMoments()
    std.update(x=reductions.moments(x, 8))
    channel.update(x=reductions.channel_mean(x, 8), within=reductions.channel_variance(x, 8))
    # the activation itself is float32: a mean of 100 leaves it five digits of a spread of 0.01
    assert_close(std.result()[0], d.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-6, atol=0)
    loss = 1e-6 if mean < 1000 * spread else 1e-4  # of the channel's means, which are sums of float32
    assert_close(channel.channels()["var"], d.var((0, 3, 4), correction=0), rtol=loss, atol=0)


def test_channels_of_tokens_are_the_last_dimension():
    x = torch.randn(6, 10, 4, dtype=torch.float64)
    assert_close(reductions.channel_mean(x, 3), x.mean(1).unflatten(0, (3, 2)))
    v = torch.randn(6, 4, dtype=torch.float64)
    assert_close(reductions.channel_square(v, 3), v.square().unflatten(0, (3, 2)))
    assert_close(reductions.channel_variance(x, 3), x.var(1, correction=0).unflatten(0, (3, 2)))
    assert_close(reductions.channel_variance(v, 3), torch.zeros(3, 2, 4, dtype=torch.float64))


def test_half_precision_and_channels_last_are_measured_in_float32():
    conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 9, 9).to(memory_format=torch.channels_last)
    p = Probe(torch.nn.Sequential(conv), [2.0, 1.0], stats=("rms", "cosine"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), p, p.images(3):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    d = y.double().reshape(3, 2, -1)
    assert_close(p.statistics["0"]["rms"].result()[0], d.square().mean(-1).mean(0).sqrt(), rtol=1e-6, atol=0)
    flat = d.transpose(0, 1).flatten(1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert_close(p.statistics["0"]["cosine"].matrix(), expected, rtol=0, atol=1e-6)


def test_mean_and_std(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        a = seen[name, "output"]
        check(stats["mean"].result(), a.mean((0, 2)), sem(a.mean(-1)))
        value, error = stats["std"].result()
        assert_close(value, a.transpose(0, 1).flatten(1).std(-1, correction=0), rtol=1e-6, atol=1e-6)
        rest = torch.stack([a[[j for j in range(N) if j != i]].transpose(0, 1).flatten(1).std(-1) for i in range(N)])
        jackknife = ((N - 1) / N * (rest - rest.mean(0)).square().sum(0)).sqrt()
        assert_close(error, jackknife, rtol=0.5, atol=1e-6)


def test_dead_channels(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        if "dead_channels" not in stats:
            assert "active_fraction" not in stats
            continue
        channels = p.model.get_submodule(name).in_channels
        square = seen[name, "input"].unflatten(-1, (channels, -1)).square().mean(-1)
        near = square.sqrt() < 0.01 * square.mean(-1, keepdim=True).sqrt()
        check(stats["dead_channels"].result(), near.double().mean((0, 2)), sem(near.double().mean(-1)))


def test_dead_channels_are_found():
    conv = torch.nn.Conv2d(4, 4, 1)
    x = torch.rand(6, 4, 5, 5) + 0.5
    x[:2, 1] *= 1e-3  # dead in one image of three, at both noise levels
    x[:, 2] = 0
    stat = STATISTICS["dead_channels"]()
    stat.update(x=reductions.channel_square(x, 3))
    assert conv(x).shape == x.shape
    assert_close(stat.result()[0], torch.full((2,), (2 + 1 + 1) / 12, dtype=torch.float64))
    stat = type("Near", (STATISTICS["dead_channels"],), {"threshold": 10.0})()
    stat.update(x=reductions.channel_square(x, 3))
    assert stat.result()[0].tolist() == [1, 1]


def test_spectral_share(probed):
    p, _ = probed
    for name, stats in p.statistics.items():
        a = raw[name]
        h, w = a.shape[-2:]
        power = torch.fft.fft2(a).abs().square().sum(2)  # (n, S, H, W)
        radius = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.fftfreq(w) ** 2).sqrt() * 2
        edges = [0, 0.25, 0.5, 1, 9]
        bands = [(radius >= a) & (radius < b) for a, b in itertools.pairwise(edges)]
        share = torch.stack([(power * band).sum((-1, -2)) for band in bands], -1) / power.sum((-1, -2))[..., None]
        value, error = stats["spectral_share"].result()
        assert_close(value, share.mean(0), rtol=1e-6, atol=1e-6)
        assert_close(value.sum(-1), torch.ones(S, dtype=torch.float64))
        assert_close(error, share.std(0) / N**0.5, rtol=1e-4, atol=1e-6)


def test_a_wave_lies_in_its_band():
    t = torch.arange(32) / 32
    for cycles, band in ((0, 0), (3, 0), (6, 1), (12, 2), (16, 3)):
        x = torch.cos(2 * torch.pi * cycles * t).expand(2, 3, 32, 32)
        share = reductions.band_share(x, 1)[0, 0]
        assert share.argmax() == band
        assert share[band] == pytest.approx(1, abs=1e-5)


def test_channel_moments(probed):
    p, _ = probed
    for name, stats in p.statistics.items():
        found = stats["channel_moments"].channels()
        a = raw[name].flatten(3)  # (n, S, C, HW)
        assert_close(found["mean"], a.mean((0, 3)), rtol=1e-6, atol=1e-6)
        assert_close(found["var"], a.var((0, 3), correction=0), rtol=1e-5, atol=1e-6)


def test_cka_is_unbiased_hsic_as_its_formula_says(probed):
    p, seen = probed
    for name, stats in p.statistics.items():
        a = seen[name, "output"]  # one group of 8 images
        a = a - a.mean(0)  # changes no HSIC, and leaves float64 the digits that matter here
        k = torch.einsum("isd,jsd->sij", a, a) * (1 - torch.eye(8, dtype=torch.float64))
        one = torch.ones(8, dtype=torch.float64)

        def hsic(x, y, one=one):  # Song et al. 2012, equation 5
            m = 8
            return (
                torch.trace(x @ y)
                + (one @ x @ one) * (one @ y @ one) / ((m - 1) * (m - 2))
                - 2 / (m - 2) * (one @ x @ y @ one)
            ) / (m * (m - 3))

        table = torch.stack([torch.stack([hsic(x, y) for y in k]) for x in k])
        norm = table.diagonal().sqrt()
        assert_close(stats["cka"].matrix(), table / norm[:, None] / norm, rtol=0, atol=1e-6)
        assert_close(stats["cka"].result()[0], stats["cka"].matrix()[:, 0], rtol=1e-9, atol=0)
        assert stats["cka"].n_images == 8


def test_cka_is_1_for_equal_and_small_for_unrelated_layers():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(64, 1, 2000, generator=g)
    b = torch.randn(64, 1, 2000, generator=g)
    for second, low, high in ((a * 3 + 5, 0.999, 1.001), (b, -0.2, 0.2)):
        stat = STATISTICS["cka"]()
        stat.update(x=reductions.hsic(torch.cat([a, second], 1).flatten(0, 1), 64))
        assert low < stat.result()[0][1] < high
        assert stat.samples == 8


def test_every_statistic_says_what_it_is():
    for name, stat in STATISTICS.items():
        assert stat.name == name
        assert all(stat.describe().values())
        assert Statistic.registry[name] is stat
