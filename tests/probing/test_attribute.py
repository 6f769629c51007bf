"""Attributions are captum's, add up where they must, and leave nothing behind."""

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import probe
from gddlab.probing.attribute import METHODS, attribute
from gddlab.probing.inputs import Inputs
from tests.probing.networks import tiny

CONV, BLOCK = "model.enc.16x16_block0.conv0", "model.dec.8x8_in0"
SIGMAS = [5.0, 0.2]


def rows(net, data, n=3, **kwargs):
    """States and their noise, image by image, as the network sees them; sigmas; labels; images."""
    seen = Inputs(net, SIGMAS, data=data, n=n, **kwargs)
    clean, noise = seen.clean(0, n).repeat_interleave(2, 0).double(), seen.noise(0, n).repeat_interleave(2, 0).double()
    sigma = torch.tensor(SIGMAS, dtype=torch.float64).repeat(n)
    labels = None if seen.labels is None else seen.labels.repeat_interleave(2, 0)
    start = sigma[:, None, None, None] * noise
    return clean + start, start, sigma, labels, clean


def edm(net):
    def loss(x, sigma, labels, clean):
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return weight * (net(x, sigma, labels) - clean).square().mean((1, 2, 3))

    return loss


def per_image(attributions, how):
    """Mean and standard error over images.  (n * 2, ...) -> (2,), (2,)"""
    x = how(attributions.detach().flatten(1)).reshape(-1, 2)
    return x.mean(0), x.std(0) / len(x) ** 0.5


def check(result, layer, stat, attributions, how):
    for column, expected in zip(("value", "sem"), per_image(attributions, how), strict=True):
        np.testing.assert_allclose(result.pivot(stat, column).loc[layer], expected, rtol=1e-9, atol=1e-15)


def mean_abs(x):
    return x.abs().mean(1)


@pytest.mark.parametrize("layer", [CONV, BLOCK, "model.map_layer1"])
def test_conductance_is_captums_there_and_back(pictures, layer):
    net = tiny(label_dim=3).double()
    result = attribute(net, SIGMAS, [layer], data=pictures, n=3, steps=4)
    x, start, *rest = rows(net, pictures)
    by_hand = captum.attr.LayerConductance(edm(net), net.get_submodule(layer))
    settings = {"additional_forward_args": tuple(rest), "n_steps": 4, "method": "riemann_trapezoid"}
    c = (by_hand.attribute(x, start, **settings) - by_hand.attribute(start, x, **settings)) / 2
    check(result, layer, "conductance", c, mean_abs)
    check(result, layer, "conductance_sum", c, lambda x: x.sum(1))


def test_integrated_gradients_are_captums(pictures):
    net = tiny(label_dim=3).double()
    result = attribute(net, SIGMAS, [CONV, BLOCK], method="LayerIntegratedGradients", data=pictures, n=3, steps=4)
    x, start, *rest = rows(net, pictures)
    for layer in (CONV, BLOCK):
        by_hand = captum.attr.LayerIntegratedGradients(edm(net), net.get_submodule(layer))
        c = by_hand.attribute(x, start, additional_forward_args=tuple(rest), n_steps=4)
        check(result, layer, "integrated_gradients", c, mean_abs)
        check(result, layer, "integrated_gradients_sum", c, lambda x: x.sum(1))


def test_activations_are_those_of_probe(net, pictures):
    result = attribute(net, SIGMAS, "all", method="LayerActivation", data=pictures, n=3)
    other = probe(net, SIGMAS, layers="all", stats="mean_abs", data=pictures, n=3)
    for column in ("value", "sem"):
        found, expected = result.pivot("captum_activation", column), other.pivot("mean_abs", column)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert result.layers == other.layers
    joined = other.join(result)
    assert set(joined.stats) == {"captum_activation", "mean_abs"}


def test_conductance_follows_from_the_chain_rule_despite_in_place_sums(pictures):
    """The loss's slope at each unit times the unit's change, added up along a fine path: no captum."""
    net = tiny().double()
    result = attribute(net, SIGMAS, [CONV], data=pictures, n=1, steps=32)
    x, start, sigma, labels, clean = rows(net, pictures, n=1)
    units, slopes = [], []

    def hook(module, args, output):
        units.append(output.detach().clone())
        output = output.detach().requires_grad_(True)
        slopes.append(output)
        return output * 1

    net.get_submodule(CONV).register_forward_hook(hook)
    for alpha in torch.linspace(0, 1, 129, dtype=torch.float64):
        value = edm(net)(start + alpha * (x - start), sigma, labels, clean).sum()
        slopes[-1] = torch.autograd.grad(value, slopes[-1])[0]
    c = sum((a + b) / 2 * (v - u) for a, b, u, v in zip(slopes, slopes[1:], units, units[1:], strict=False))
    np.testing.assert_allclose(result.pivot("conductance").loc[CONV], mean_abs(c.flatten(1)), rtol=5e-3, atol=0)


class Straight(nn.Module):
    """A denoiser whose every layer cuts the graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 4), (4, 1))]
        self.first, self.middle, self.last = convs

    def forward(self, x, sigma, class_labels=None):
        return self.last(nn.functional.silu(self.middle(nn.functional.silu(self.first(x)))))


def test_attributions_add_up_to_the_change_of_the_loss(pictures):
    net = Straight().double()
    result = attribute(net, SIGMAS, "conv", data=pictures, n=3, steps=16)
    np.testing.assert_allclose(result.pivot("conductance_share"), 1, rtol=0, atol=2e-3)
    x, start, *rest = rows(net, pictures)
    change = (edm(net)(x, *rest) - edm(net)(start, *rest)).reshape(-1, 2).mean(0).detach()
    for stats, settings in (
        ("conductance_sum", {}),
        ("integrated_gradients_sum", {"method": "LayerIntegratedGradients"}),
    ):
        found = attribute(net, SIGMAS, "middle", data=pictures, n=3, **settings).pivot(stats).loc["middle"]
        np.testing.assert_allclose(found, change, rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_do_not_depend_on_the_batch_size(pictures, method):
    net = tiny().double()
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    settings = {"method": method, "data": pictures, "n": 3, "steps": 4}
    whole = attribute(net, SIGMAS, [CONV], batch_size=1000, **settings)
    assert max(seen) == {"LayerConductance": 30, "LayerIntegratedGradients": 24, "LayerActivation": 6}[method]
    for batch_size in (3, 12):
        seen.clear()
        part = attribute(net, SIGMAS, [CONV], batch_size=batch_size, **settings)
        assert max(seen) <= batch_size
        for column in ("value", "sem"):
            np.testing.assert_allclose(part.frame[column], whole.frame[column], rtol=1e-9, atol=1e-15)


def test_results_of_other_images_merge(net, pictures):
    settings = {"data": pictures, "steps": 2}
    parts = [attribute(net, SIGMAS, [CONV], n=2, start=start, **settings) for start in (0, 2)]
    whole = attribute(net, SIGMAS, [CONV], n=4, **settings)
    merged = parts[0].merge(parts[1])
    for column in ("value", "sem", "n_images"):
        np.testing.assert_allclose(merged.frame[column], whole.frame[column], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "states"), [("OneStepPrecond", "student"), ("EDMPrecond", "prior"), ("EDMPrecond", "trajectory")]
)
def test_without_images_it_is_the_mean_square_from_zero(kind, states):
    net = tiny(kind)
    timesteps = None if states == "student" else SIGMAS
    result = attribute(net, timesteps, [CONV], states=states, method="LayerIntegratedGradients", n=2, steps=4)
    assert result.sigmas == ([80.0] if states == "student" else SIGMAS)
    seen = Inputs(net, timesteps, states=states, n=2)
    x, sigma, _ = seen.rows(0, 2, device=torch.device("cpu"), sigmas=result.sigmas)
    by_hand = captum.attr.LayerIntegratedGradients(lambda *a: net(*a).square().mean((1, 2, 3)), net.get_submodule(CONV))
    c = by_hand.attribute(x, additional_forward_args=(sigma,), n_steps=4).detach().abs().mean((1, 2, 3))
    expected = c.reshape(2, -1).mean(0)
    np.testing.assert_allclose(result.pivot("integrated_gradients").loc[CONV], expected, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_works_where_the_caller_has_no_gradients(net, pictures, method):
    expected = attribute(net, SIGMAS, [CONV], method=method, data=pictures, n=2, steps=2)
    with torch.no_grad():
        found = attribute(net, SIGMAS, [CONV], method=method, data=pictures, n=2, steps=2)
    assert found.hash == expected.hash


def hooks(net):
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("passes", [None, 0, 1, 3])
def test_nothing_is_left_behind(pictures, method, passes):
    """Without an error, and with one in the first pass (the check), in the second, or in captum's."""
    net = tiny().train()
    net.get_submodule(CONV).weight.requires_grad_(False)
    net.model.map_layer0.eval()
    net.model.map_layer1.bias.grad = torch.ones(32)
    calls = []

    def fails(module, args):
        if len(calls) == passes:
            raise RuntimeError("no memory")
        calls.append(1)

    net.model.dec["16x16_aux_conv"].register_forward_pre_hook(fails)
    before, modes = hooks(net), [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    settings = {"method": method, "data": pictures, "n": 2, "steps": 2, "batch_size": 4}
    if passes is None:
        attribute(net, SIGMAS, [CONV, BLOCK], **settings)
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            attribute(net, SIGMAS, [CONV, BLOCK], **settings)
    assert hooks(net) == before
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()]
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["model.map_layer1.bias"]


def test_attributions_that_are_not_finite_are_reported(pictures):
    net = tiny()
    net.get_submodule(CONV).register_forward_hook(lambda m, a, y: y * torch.nan)
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = attribute(net, SIGMAS, [CONV], data=pictures, n=2, steps=2)
    assert {"layer": CONV, "side": "attribution", "sigma": 5.0, "images": 2} in result.meta["nonfinite"]
    assert result.frame["value"].isna().all()


class Twice(Straight):
    def forward(self, x, sigma, class_labels=None):
        return self.first(x).mean(1, keepdim=True) + self.first(x * 2).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"method": "LayerConductanc"}, "did you mean 'LayerConductance'"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n": 13}, "give n=12 or less"),
        ({"layers": "firs"}, "did you mean 'first'"),
        ({"layers": "first"}, "'first' ran twice"),
        ({"layers": "last"}, "'last' did not run"),
    ],
)
def test_bad_input_is_refused(pictures, kwargs, says):
    with pytest.raises(GddlabError, match=says):
        attribute(Twice(), **({"timesteps": [1.0], "layers": "conv", "data": pictures, "n": 2} | kwargs))


def test_every_statistic_says_what_it_is():
    for kinds in METHODS.values():
        assert all(all(kind.describe().values()) for kind in kinds)
