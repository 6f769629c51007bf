"""Statistics of gradients equal their definitions, and the network is left as it was."""

import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import edm_loss
from gddlab.probing import ProbeResult, probe
from gddlab.probing.gradients import Batch, grad_probe
from gddlab.probing.inputs import Inputs
from tests.probing.networks import tiny

FOUR = ["grad_norm_ratio", "grad_snr", "fisher", "taylor"]
CONV = "model.enc.16x16_block0.conv1"


def cell(result, layer, stat, sigma, column="value"):
    return result.pivot(stat, column).loc[layer, sigma]


def flat(layer, gradients):
    return torch.cat([gradients[p].flatten() for p in layer.parameters()])


@pytest.mark.parametrize(("layer", "labels"), [(CONV, 0), ("model.enc.8x8_block0", 3), ("model.map_layer0", 3)])
def test_values_equal_their_definitions_in_float64(pictures, layer, labels):
    net = tiny(label_dim=labels).double()
    result = grad_probe(net, layers=layer, timesteps=[5.0, 0.1], data=pictures, n=6, batch_size=2, seed=3)
    module = net.get_submodule(layer)
    seen = Inputs(net, [5.0, 0.1], data=pictures, n=6, seed=3)
    for sigma in (5.0, 0.1):
        g, effect = [], []
        for i in (0, 2, 4):
            one_hot = seen.labels[i : i + 2] if labels else None
            level = torch.full((2,), sigma, dtype=torch.float64)
            net.zero_grad()
            clean = seen.clean(i, i + 2).double()
            edm_loss(net(clean + sigma * seen.noise(i, i + 2).double(), level, one_hot), clean, level).mean().backward()
            g.append(flat(module, {p: p.grad for p in module.parameters()}))
            rows = []
            for part in (m for m in module.modules() if list(m.parameters(recurse=False))):
                rows.append(sum((p.grad * p).reshape(len(p), -1).sum(1) for p in part.parameters(recurse=False)))
            effect.append(torch.cat(rows).detach().square().mean())
        g, effect, w = torch.stack(g), torch.stack(effect), flat(module, {p: p.detach() for p in module.parameters()})
        pairs = torch.stack([a @ b for a, b in itertools.permutations(g, 2)]).mean()  # |E g|^2, without bias
        trace = g.var(0).sum()
        expected = {
            "grad_norm_ratio": (g.mean(0).norm() / w.norm(), (trace / 3).sqrt() / w.norm()),
            "grad_snr": (pairs / trace, math.nan),
            "fisher": (g.square().mean(), g.square().mean(1).std() / 3**0.5),
            "taylor": (effect.mean(), effect.std() / 3**0.5),
        }
        for stat, (value, sem) in expected.items():
            assert cell(result, layer, stat, sigma) == pytest.approx(float(value), rel=1e-10)
            assert cell(result, layer, stat, sigma, "sem") == pytest.approx(float(sem), rel=1e-10, nan_ok=True)


def test_taylor_is_the_squared_gradient_of_a_gate_on_each_channel(pictures):
    net = tiny().double()
    result = grad_probe(net, layers=CONV, timesteps=[2.0], data=pictures, n=4, batch_size=4)
    gate = torch.ones(8, dtype=torch.float64, requires_grad=True)
    net.get_submodule(CONV).register_forward_hook(lambda m, a, y: y * gate[:, None, None])
    seen = Inputs(net, [2.0], data=pictures, n=4)
    level = torch.full((4,), 2.0, dtype=torch.float64)
    clean = seen.clean(0, 4).double()
    edm_loss(net(clean + 2 * seen.noise(0, 4).double(), level), clean, level).mean().backward()
    assert cell(result, CONV, "taylor", 2.0) == pytest.approx(float(gate.grad.square().mean()), rel=1e-10)


class Lines(nn.Module):
    """Its loss on x is w x, so that the gradient is x."""

    def __init__(self, width=50):
        super().__init__()
        self.line = nn.Linear(width, 1, bias=False)


def product(net, x):
    return net.line(x).mean()


def test_signal_to_noise_is_not_inflated_by_few_batches():
    net, draw = Lines().double(), torch.Generator().manual_seed(0)
    for mean, expected in ((0.0, 0.0), (0.3, 0.09)):
        found = []
        for _ in range(40):
            x = mean + torch.randn(6, 50, dtype=torch.float64, generator=draw)
            found.append(grad_probe(net, product, [Batch(1.0, v[None]) for v in x], layers="line").frame)
        snr = torch.tensor([f.set_index("stat").loc["grad_snr", "value"] for f in found])
        assert abs(snr.mean() - expected) < 4 * snr.std() / 40**0.5 + 0.01  # |mean g|^2 / trace would be 1/6 larger
        assert snr.std() < 0.1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_batch_has_no_spread(pictures, layout):
    for seed in range(4):
        net = tiny(seed=seed).to(memory_format=layout)
        found = grad_probe(net, timesteps=[1.0], data=pictures, n=2, batch_size=2, layers="conv", progress=False)
        assert found.pivot("grad_norm_ratio", "sem").isna().all().all() and found.pivot("grad_snr").isna().all().all()


def test_a_loss_of_ones_own_at_some_sigmas():
    net = Lines()
    x = torch.arange(300.0).reshape(6, 50)
    batches = [Batch(0.5, x[:2], 2), (80.0, x[2:3]), (80.0, x[3:4]), (80.0, x[4:6], 2)]
    result = grad_probe(net, product, batches, layers="line")
    assert result.sigmas == [80.0, 0.5]
    assert result.stats == FOUR
    assert cell(result, "line", "fisher", 0.5) == pytest.approx(float(x[:2].mean(0).square().mean()))
    assert math.isnan(cell(result, "line", "grad_snr", 0.5))  # one batch has no spread
    assert cell(result, "line", "fisher", 0.5, "sem") != cell(result, "line", "fisher", 0.5, "sem")
    images = result.frame.set_index(["stat", "sigma"])["n_images"]
    assert images["taylor", 80.0] == 4
    assert images["taylor", 0.5] == 2
    assert result.meta["settings"] == {"loss": "product", "batches": [3, 1]}


def test_batches_come_one_by_one_and_go():
    net, alive, most = Lines(), [], []

    def batches():
        for sigma in (2.0, 1.0):
            for _ in range(5):
                x = torch.randn(1, 50)
                alive.append(weakref.ref(x))
                yield Batch(sigma, x)
                del x

    def loss(net, x):
        most.append(sum(r() is not None for r in alive))
        return product(net, x)

    grad_probe(net, loss, batches(), layers="line")
    assert len(most) == 10
    assert max(most) <= 2


def state(net):
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    return flags, [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}


def untouched(before, net):
    after = state(net)
    assert [f for f, _ in before[0]] == [f for f, _ in after[0]]
    assert all((a is b) or torch.equal(a, b) for (_, a), (_, b) in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert all(torch.equal(v, after[2][k]) for k, v in before[2].items())


def test_modes_flags_and_gradients_are_the_same_after(pictures):
    net = tiny().train()
    net.model.map_layer0.eval()
    net.get_submodule(CONV).weight.requires_grad_(False)
    net.model.map_layer1.bias.grad = torch.ones_like(net.model.map_layer1.bias)
    before = state(net)
    result = grad_probe(net, layers="conv", timesteps=[1.0], data=pictures, n=2, batch_size=1)
    assert cell(result, CONV, "fisher", 1.0) > 0  # frozen ones, too
    untouched(before, net)
    net.get_submodule("model.dec.16x16_aux_conv").forward = lambda x: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        grad_probe(net, layers="conv", timesteps=[1.0], data=pictures, n=2, batch_size=1)
    untouched(before, net)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_has_none(net, pictures, mode):
    expected = grad_probe(net, layers=CONV, timesteps=[1.0], data=pictures, n=2, batch_size=2)
    with mode():
        found = grad_probe(net, layers=CONV, timesteps=[1.0], data=pictures, n=2, batch_size=2)
    assert found.hash == expected.hash


def test_gradients_that_are_not_finite_are_reported(net, pictures):
    conv, calls = net.get_submodule(CONV), []

    def hook(module, args, output):
        calls.append(len(calls))
        return output * torch.nan if len(calls) == 4 else output  # second batch at the second sigma

    conv.register_forward_hook(hook)
    with pytest.warns(RuntimeWarning, match=rf"{CONV} \(gradient\) at sigma 1"):
        result = grad_probe(
            net, layers=[CONV, "model.enc.16x16_conv"], timesteps=[2.0, 1.0], data=pictures, n=6, batch_size=3
        )
    assert {"layer": CONV, "side": "gradient", "sigma": 1.0, "images": 3} in result.meta["nonfinite"]
    for stat in FOUR:
        assert result.pivot(stat).loc[CONV].isna().tolist() == [False, True]


def test_results_are_saved_and_joined_but_not_merged(net, pictures, tmp_path):
    result = grad_probe(net, layers=CONV, timesteps=[2.0, 1.0], data=pictures, n=4, batch_size=2)
    result.save(tmp_path)
    assert ProbeResult.load(tmp_path).hash == result.hash
    both = probe(net, [2.0, 1.0], layers=CONV, stats="rms", data=pictures, n=4).join(result)
    assert set(both.stats) == {"rms", *FOUR}
    other = grad_probe(net, layers=CONV, timesteps=[2.0, 1.0], data=pictures, n=4, batch_size=2, start=4)
    with pytest.raises(GddlabError, match="does not merge"):
        result.merge(other)
    assert all(a["definition"] and a["axes"] and a["unit"] for a in result.meta["stats"].values())


def test_presets_leave_out_layers_without_parameters():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4, affine=False), nn.GroupNorm(2, 4))
    batches = [Batch(1.0, torch.randn(2, 1, 4, 4))]
    assert grad_probe(net, lambda net, x: net(x).square().mean(), batches, layers="norm").layers == ["2"]
    with pytest.raises(GddlabError, match="'1' has no parameters"):
        grad_probe(net, product, batches, layers=["1", "2"])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"loss": "denoise"}, "did you mean 'denoising'"),
        ({"loss": "denoising", "batches": [Batch(1.0, None)]}, "makes its own batches"),
        ({"loss": "denoising", "batches": None, "n": 5, "batch_size": 2}, "n=5 images in batches of 2"),
        ({"loss": "denoising", "batches": None, "batch_size": 0}, "batch_size=0"),
        ({"batches": None}, "batches=None"),
        ({"batches": []}, "batches is empty"),
        ({"timesteps": 3}, "timesteps= has no use"),
        ({"batches": [Batch(1.0, 0), Batch(2.0, 0), Batch(1.0, 0)]}, "sigma 1 are not in succession"),
        ({"batches": [Batch(-1.0, 0)]}, "sigma -1"),
        ({"batches": [3.0]}, "a batch is a float"),
        ({"batches": [Batch("high", 0)]}, "a batch is a Batch: give Batch"),
        ({"loss": lambda net, x: net.line.weight}, r"loss gave \(1, 50\)"),
        ({"loss": lambda net, x: 3.0}, "loss gave a float"),
        ({"loss": lambda net, x: torch.zeros(())}, "depends on none of the layers"),
        ({"layers": ["line", "other"]}, "layer 'other': leave it out"),
    ],
)
def test_bad_input_is_refused(kwargs, says):
    net = Lines()
    net.other = nn.Linear(2, 2)
    settings = {"loss": lambda net, x: net.line.weight.sum(), "batches": [Batch(1.0, 0)], "layers": "line"}
    with pytest.raises(GddlabError, match=says):
        grad_probe(net, **(settings | kwargs))


def test_what_does_not_fit_is_refused_as_in_probe(net, pictures):
    with pytest.raises(GddlabError, match="give n=12 or less"):
        grad_probe(net, data=pictures, timesteps=[1.0], n=16)
    with pytest.raises(GddlabError, match="did you mean"):
        grad_probe(net, data=pictures, timesteps=[1.0], n=4, batch_size=4, layers="model.enc.16x16_con")
