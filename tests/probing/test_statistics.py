"""Each statistic against float64 arithmetic on cloned activations."""

import pytest
import torch
from torch.testing import assert_close

from gddlab.nets.layers import UNetBlock
from gddlab.probing import DEFAULT, STATISTICS, Probe
from gddlab.probing.layers import is_conv
from gddlab.probing.reductions import REDUCTIONS
from tests.probing.networks import tiny, tiny_adm

SIGMAS = [80.0, 2.0, 0.3, 0.01]
N, S = 5, len(SIGMAS)


def run(net, n=N, seed=0, **kwargs):
    """A probed pass, and every module's output and first input in float64, (n, S, D)."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            if args and isinstance(output, torch.Tensor):
                seen[name, "output"] = output.detach().double().reshape(n, S, -1).clone()

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
        return run(tiny(), layers="all")
    net = tiny_adm()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return run(net.eval(), layers="all")


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


@pytest.mark.parametrize("stat", DEFAULT)
def test_merge_equals_one_pass_over_all(stat):
    net = tiny()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, S, 1, 16, 16, generator=g)
    probes = []
    for parts in ([x], [x[:4]], [x[4:]]):
        with torch.no_grad(), Probe(net, SIGMAS, stats=stat) as p:
            for part in parts:
                with p.images(len(part)):
                    net(part.flatten(0, 1), torch.tensor(SIGMAS).repeat(len(part)))
        probes.append(p)
    whole, first, second = probes
    for name in whole.statistics:
        mine = first.statistics[name][stat]
        mine.merge(second.statistics[name][stat])
        assert mine.n_images == 6
        for a, b in zip(mine.result(), whole.statistics[name][stat].result(), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_reductions_of_large_rows_keep_their_digits():
    x = torch.randn(4, 64, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    d = x.double().reshape(2, 2, -1)
    expected = {
        "mean_square": d.square().mean(-1),
        "mean_magnitude": d.abs().mean(-1),
        "positive_share": (d > 0).double().mean(-1),
        "gram": torch.einsum("nsd,ntd->nst", d, d) / d.shape[-1],
    }
    for name, reduce in REDUCTIONS.items():
        assert_close(reduce(x, 2), expected[name], rtol=1e-6, atol=0)


def test_half_precision_and_channels_last_are_measured_in_float32():
    conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 9, 9).to(memory_format=torch.channels_last)
    p = Probe(torch.nn.Sequential(conv), [2.0, 1.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), p, p.images(3):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    d = y.double().reshape(3, 2, -1)
    assert_close(p.statistics["0"]["rms"].result()[0], d.square().mean(-1).mean(0).sqrt(), rtol=1e-6, atol=0)
    flat = d.transpose(0, 1).flatten(1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert_close(p.statistics["0"]["cosine"].matrix(), expected, rtol=0, atol=1e-6)


def test_every_statistic_says_what_it_is():
    for name, stat in STATISTICS.items():
        assert stat.name == name
        assert all(stat.describe().values())
