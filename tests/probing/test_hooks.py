"""The probe leaves networks as they were, and says what it cannot measure."""

import contextlib

import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import Probe, Statistic, probe
from gddlab.probing.hooks import STATISTICS
from tests.probing.networks import tiny


def hooks(net):
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()]


def feed(net, n=1, s=2):
    return net(torch.ones(n * s, 1, 16, 16), torch.tensor([2.0, 1.0]).repeat(n))


def test_outputs_modes_and_gradients_flags_are_the_same_after(net, pictures):
    net.train()
    net.model.map_layer0.eval()
    net.model.map_layer1.weight.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    probe(net, [2.0, 1.0], data=pictures, n=3)
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_outputs_and_gradients_are_bit_identical_while_probed(net):
    plain = feed(net)
    plain.sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with Probe(net, [2.0, 1.0], layers="all") as p, p.images(1):
        probed = feed(net)
    probed.sum().backward()
    assert torch.equal(plain, probed)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))


def test_own_hooks_go_and_others_stay(net):
    calls = []
    conv = net.model.enc["16x16_conv"]
    conv.register_forward_hook(lambda *a: calls.append("out"))
    conv.register_forward_pre_hook(lambda *a: calls.append("in"))
    before = hooks(net)
    with Probe(net, [2.0, 1.0]) as p:
        assert hooks(net) != before
        with p.images(1):
            feed(net)
    assert hooks(net) == before
    assert calls == ["in", "out"]


def test_hooks_go_when_the_network_raises(net, pictures):
    before = hooks(net)
    broken = net.model.dec["16x16_aux_conv"]
    broken.forward = lambda x: (_ for _ in ()).throw(RuntimeError("no memory"))
    net.train()
    with pytest.raises(RuntimeError, match="no memory"):
        probe(net, [2.0, 1.0], data=pictures, n=2)
    assert hooks(net) == before
    assert net.training


def test_hooks_go_when_a_statistic_raises(net, pictures, monkeypatch):
    class Broken(STATISTICS["rms"]):
        def update(self, **reduced):
            raise ZeroDivisionError

    assert issubclass(Broken, Statistic)
    monkeypatch.setattr("gddlab.probing.hooks.STATISTICS", {**STATISTICS, "rms": Broken})
    before = hooks(net)
    with pytest.raises(ZeroDivisionError):
        probe(net, [2.0, 1.0], data=pictures, n=2)
    assert hooks(net) == before


def test_hooks_go_when_a_reduction_raises(net, pictures, monkeypatch):
    def broken(x, n):
        raise ZeroDivisionError

    monkeypatch.setattr("gddlab.probing.hooks.REDUCTIONS", dict.fromkeys(("gram", "mean_square"), broken))
    before = hooks(net)
    with pytest.raises(ZeroDivisionError):
        probe(net, [2.0, 1.0], data=pictures, n=2, stats="rms")
    assert hooks(net) == before


def test_a_failed_pass_counts_nothing(net):
    with torch.no_grad(), Probe(net, [2.0, 1.0]) as p:
        with p.images(1):
            feed(net)
        first = p.statistics["model.enc.16x16_conv"]["rms"].result()[0]
        with contextlib.suppress(KeyError), p.images(1):
            feed(net)
            raise KeyError
        feed(net)  # outside of images()
        assert p.n_images == 1
    torch.testing.assert_close(p.statistics["model.enc.16x16_conv"]["rms"].result()[0], first, rtol=0, atol=0)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        self.pair = nn.RNN(4, 4, batch_first=True)

    def forward(self, x):
        self.pair(x[:, 0])
        return self.twice(self.twice(x))


@pytest.mark.parametrize(
    ("layer", "says"), [("twice", "ran twice"), ("never", "did not run"), ("pair", "is a tuple, no tensor")]
)
def test_a_layer_that_cannot_be_measured_is_named(layer, says):
    net = Odd()
    with pytest.raises(GddlabError, match=f"'{layer}' {says}"), Probe(net, [1.0], layers=[layer]) as p, p.images(2):
        net(torch.ones(2, 1, 4, 4))
    assert all(h == (0, 0) for _, *h in hooks(net) for h in [tuple(h)])


def test_a_wrong_number_of_rows_is_refused(net):
    with Probe(net, [2.0, 1.0]) as p:
        with pytest.raises(GddlabError, match=r"'model.enc.16x16_conv' is \(2, .*3 images .* are 6 rows"), p.images(3):
            feed(net)
        with pytest.raises(GddlabError, match="n=0"), p.images(0):
            pass
        with pytest.raises(GddlabError, match="already in use"):
            p.__enter__()
    with pytest.raises(GddlabError, match="inside `with"), p.images(1):
        pass


@pytest.mark.parametrize("sigmas", [[], [1.0, 2.0], [1.0, 1.0]])
def test_noise_levels_must_descend(net, sigmas):
    with pytest.raises(GddlabError, match="largest first"):
        Probe(net, sigmas)


def test_unknown_statistics_are_refused(net):
    with pytest.raises(GddlabError, match="did you mean 'rms'"):
        Probe(net, [1.0], stats=["rmss"])
    with pytest.raises(GddlabError, match="stats is empty"):
        Probe(net, [1.0], stats=[])
    with pytest.raises(GddlabError, match="'rel_update' exists for none of the 1 selected"):
        Probe(net, [1.0], layers="model.enc.16x16_conv", stats=["rms", "rel_update"])


def test_activations_that_are_not_finite_are_reported():
    net = tiny()
    conv = net.model.enc["16x16_block0"].conv0
    conv.register_forward_hook(lambda m, a, y: y.index_put((torch.tensor([1]),), torch.tensor(torch.nan)))
    with pytest.warns(RuntimeWarning, match=r"model.enc.16x16_block0.conv0 \(output\) at sigma 1"):
        result = probe(net, [2.0, 1.0], states="prior", n=2, batch_size=4)
    first = result.meta["nonfinite"][0]
    assert (first["sigma"], first["images"]) == (1.0, 1)
    table = result.pivot("rms")
    assert table.loc["model.enc.16x16_block0.conv0"].isna().tolist() == [False, True]
    assert table.loc["model.enc.16x16_conv"].notna().all()


def test_a_share_alone_does_not_hide_nan(net):
    net.model.enc["16x16_block0"].norm0.bias.data[0] = torch.nan
    with torch.no_grad(), Probe(net, [2.0, 1.0], stats="active_fraction") as p, p.images(1):
        feed(net)
    assert {"layer": "model.enc.16x16_block0.conv0", "side": "input", "sigma": 2.0, "images": 1} in p.nonfinite()
