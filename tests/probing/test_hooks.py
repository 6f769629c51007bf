"""The probe leaves networks as they were, and says what it cannot measure."""

import contextlib
import inspect

import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import STATISTICS, Probe, Statistic, probe, reductions
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


class Breaks(STATISTICS["rms"]):
    """Raises when it adds a pass up."""

    name = "breaks"

    def update(self, **reduced):
        raise ZeroDivisionError


class BreaksInside(Statistic):
    """Raises inside the hook."""

    name, definition, axes, unit = "breaks_inside", "none", "none", "1"

    @staticmethod
    def reduce(x):
        raise ZeroDivisionError


@pytest.mark.parametrize("stat", [Breaks, BreaksInside])
def test_hooks_go_when_a_statistic_raises(net, pictures, stat):
    before = hooks(net)
    modes = [m.training for m in net.train().modules()]
    with pytest.raises(ZeroDivisionError):
        probe(net, [2.0, 1.0], data=pictures, n=2, stats=["rms", stat])
    assert hooks(net) == before
    assert modes == [m.training for m in net.modules()]


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


@pytest.mark.parametrize(("layer", "says"), [("never", "did not run"), ("pair", "is a tuple, no tensor")])
def test_a_layer_that_cannot_be_measured_is_named(layer, says):
    net = Odd()
    with pytest.raises(GddlabError, match=f"'{layer}' {says}"), Probe(net, [1.0], layers=[layer]) as p, p.images(2):
        net(torch.ones(2, 1, 4, 4))
    assert all(h == (0, 0) for _, *h in hooks(net) for h in [tuple(h)])


def test_a_second_call_of_the_network_in_one_pass_is_refused():
    net = Odd()
    with pytest.raises(GddlabError, match="'twice' ran twice"), Probe(net, [1.0], layers="twice") as p, p.images(2):
        net(net(torch.ones(2, 1, 4, 4)))


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
    with pytest.raises(GddlabError, match="statistic 3: give names"):
        Probe(net, [1.0], stats=[3])
    with pytest.raises(GddlabError, match="statistic 5: give names"):
        Probe(net, [1.0], stats=5)
    with pytest.raises(GddlabError, match="sigmas="):
        Probe(net, [float("nan")])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unit": None}, "does not say its unit"),
        ({"name": "a/b"}, "is called 'a/b': give a name without a slash"),
        ({"target": "blok"}, "has target 'blok'"),
        ({"side": "out"}, "side 'out'"),
        ({"reduce": None}, "reads nothing: define reduce"),
        ({"name": "rms"}, "two statistics are called 'rms'"),
    ],
)
def test_a_users_statistic_is_checked_before_anything_runs(net, changes, says):
    own = {
        "name": "odd",
        "definition": "d",
        "axes": "a",
        "unit": "1",
        "reduce": staticmethod(lambda x: x.flatten(1).sum(1)),
    }
    fields = {k: v for k, v in (own | changes).items() if v is not None}
    with pytest.raises(GddlabError, match=says):
        Probe(net, [1.0], stats=["rms", type("Odd", (Statistic,), fields)])


@pytest.mark.parametrize(("columns", "parts"), [(2, ()), (2, ("a", "b", "c")), (3, ("a", "b"))])
def test_a_users_statistic_names_as_many_parts_as_it_gives(net, pictures, columns, parts):
    reduce = staticmethod(lambda x: x.flatten(1)[:, :columns])
    odd = type("Odd", (Clipped,), {"name": "odd", "parts": parts, "reduce": reduce})
    with pytest.raises(GddlabError, match=f"'odd' gives {columns} numbers per row and names {len(parts)} parts"):
        probe(net, [2.0, 1.0], data=pictures, n=2, stats=odd)
    right = type(
        "Right",
        (Clipped,),
        {"name": "right", "parts": ("a", "b"), "reduce": staticmethod(lambda x: x.flatten(1)[:, :2])},
    )
    assert probe(net, [2.0, 1.0], data=pictures, n=2, stats=right).stats == ["right_a", "right_b"]


def test_a_statistic_that_writes_into_an_activation_is_refused(net, pictures):
    greedy = type(
        "Greedy", (Clipped,), {"name": "greedy", "reduce": staticmethod(lambda x: x.mul_(0).flatten(1).mean(1))}
    )
    with pytest.raises(GddlabError, match="writes into what it is given"):
        probe(net, [2.0, 1.0], data=pictures, n=2, stats=greedy)


def test_what_is_not_finite_is_no_share(net, pictures):
    with torch.no_grad():
        net.model.enc["16x16_block0"].conv0.weight[0, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        table = probe(net, [2.0, 1.0], data=pictures, n=2, stats=["active_fraction", "dead_channels", Clipped])
    for stat in table.stats:
        assert table.pivot(stat).loc["model.enc.16x16_block0.conv1"].isna().all()
    assert table.pivot("active_fraction").loc["model.enc.16x16_block0.conv0"].notna().all()


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


class Clipped(Statistic):
    """A statistic as a user writes one."""

    name = "clipped"
    definition = "share of the layer's output above 1 in size"
    axes = "channels, pixels; mean over images"
    unit = "share"

    @staticmethod
    def reduce(x):
        return (x.abs() > 1).double().flatten(1).mean(1)


def test_a_users_statistic_stands_beside_the_others(net, pictures, tmp_path):
    seen = {}
    conv = net.model.enc["16x16_block0"].conv0
    own = conv.register_forward_hook(lambda m, a, y: seen.update(y=y.detach().clone()))
    result = probe(net, [2.0, 1.0], data=pictures, n=4, batch_size=100, stats=["rms", Clipped])
    own.remove()
    expected = (seen["y"].abs() > 1).double().flatten(1).mean(1).reshape(4, 2)
    row = result.pivot("clipped").loc["model.enc.16x16_block0.conv0"]
    assert row.tolist() == pytest.approx(expected.mean(0).tolist())
    sem = result.pivot("clipped", "sem").loc["model.enc.16x16_block0.conv0"]
    assert sem.tolist() == pytest.approx((expected.std(0) / 2).tolist())
    assert result.meta["stats"]["clipped"]["definition"] == Clipped.definition
    result.save(tmp_path)
    parts = [probe(net, [2.0, 1.0], data=pictures, n=2, start=i, stats=["rms", Clipped]) for i in (0, 2)]
    merged = parts[0].merge(parts[1])
    assert merged.pivot("clipped").loc["model.enc.16x16_block0.conv0"].tolist() == pytest.approx(row.tolist())


class Counted(Clipped):
    """Adds up by itself, and so layer by layer."""

    name = "counted"

    def update(self, **reduced):
        super().update(**reduced)
        self.add(0, passes=torch.ones(2))


def test_layers_are_counted_together_and_a_users_own_count_by_layer(net, pictures, monkeypatch):
    asked, totals = [], Statistic.totals

    def spy(self, layers, **reduced):
        asked.append((self.name, layers))
        return totals(self, layers, **reduced)

    monkeypatch.setattr(Statistic, "totals", spy)
    result = probe(net, [2.0, 1.0], data=pictures, n=4, batch_size=4, stats=["rms", Clipped, Counted])
    layers = len(result.layers)
    assert asked.count(("rms", layers)) == asked.count(("clipped", layers)) == 2  # passes; all outputs are alike
    assert asked.count(("counted", 1)) == 2 * layers
    assert len(asked) == 4 + 2 * layers
    assert result.pivot("counted").equals(result.pivot("clipped"))
    assert all(by["counted"].sums["passes"].tolist() == [2, 2] for by in result.statistics.values())


def test_what_a_users_function_gives_is_checked(net, pictures):
    wrong = type("Wrong", (Clipped,), {"name": "wrong", "reduce": staticmethod(lambda x: x.sum())})
    with pytest.raises(GddlabError, match=r"layer 'model.enc.16x16_conv': reduce gave \(\) for 4 rows"):
        probe(net, [2.0, 1.0], data=pictures, n=2, stats=wrong)


def test_probes_of_other_images_add_up(net):
    x = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([2.0, 1.0])
    found = []
    for parts in ([x], [x[:4], x[4:]]):
        probes = []
        for part in parts:
            with torch.no_grad(), Probe(net, [2.0, 1.0]) as p, p.images(len(part) // 2):
                net(part, sigma.repeat(len(part) // 2))
            probes.append(p)
        for other in probes[1:]:
            probes[0].merge(other)
        found.append(probes[0])
    whole, added = found
    assert added.n_images == 3
    for name, by_stat in whole.statistics.items():
        for stat, s in by_stat.items():
            for a, b in zip(s.result(), added.statistics[name][stat].result(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)  # one pair has no error
    with pytest.raises(GddlabError, match="measure different layers"):
        whole.merge(Probe(net, [2.0, 0.5]))


REDUCTIONS = [
    name
    for name, found in inspect.getmembers(reductions, inspect.isfunction)
    if found.__module__ == reductions.__name__ and list(inspect.signature(found).parameters) == ["x", "n"]
]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_reduction_waits_for_the_device(name):
    """On the meta device nothing can be read back, so that a reduction that asked for a value would raise."""
    found = getattr(reductions, name)(torch.empty(16, 4, 8, 8, device="meta"), 8)
    assert found.is_meta
    assert found.dtype == torch.float64
