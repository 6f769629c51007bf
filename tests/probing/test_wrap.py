import math
import re

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch._dynamo.utils import counters

from gddlab.errors import GddlabError
from gddlab.probing import probe
from gddlab.probing.guard import eager
from gddlab.probing.inputs import Inputs
from gddlab.probing.layers import named_layers
from gddlab.teachers.wrap import Denoiser, wrap
from tests.probing.networks import tiny

SIGMAS = [80.0, 1.0, 0.01]


class Convolutions(nn.Module):
    """A network that is no denoiser: another signature, another answer, names of its own, noise levels as a channel."""

    def __init__(self, channels=1, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels + 1, 4, 3, padding=1)
        self.label = nn.Embedding(classes, 4) if classes else None
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(4, channels, 3, padding=1))

    def forward(self, log_sigma, x, ids=None):
        level = log_sigma.to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.first(torch.cat([x, level], 1))
        if self.label is not None:
            h = h + self.label(ids)[:, :, None, None]
        return {"noise": self.last(h)}


def denoise(net, x, sigma, labels):
    s = sigma[:, None, None, None]
    ids = None if labels is None else labels.argmax(1)
    scaled = (x / (1 + s**2).sqrt()).to(next(net.parameters()).dtype)
    return x - s * net(sigma.log(), scaled, ids)["noise"]


def rms(result):
    return torch.tensor(result.frame[result.frame.stat == "rms"].value.to_numpy())


def test_any_network_can_be_probed_under_its_own_names(pictures):
    net = Convolutions()
    model = wrap(net, denoise, img_channels=1, img_resolution=16)
    result = probe(model, SIGMAS, data=pictures, n=4, progress=False)
    assert list(dict.fromkeys(result.frame.layer)) == ["first", "last.1"]

    seen = []
    handle = net.first.register_forward_hook(lambda *a: seen.append(a[2]))
    x, sigma, labels = Inputs(model, SIGMAS, data=pictures, n=4).rows(0, 4, device=torch.device("cpu"))
    with torch.no_grad():
        denoise(net, x, sigma, labels)
    handle.remove()
    by_hand = seen[0].double().reshape(4, len(SIGMAS), -1).square().mean((0, 2)).sqrt()
    first = result.frame[(result.frame.layer == "first") & (result.frame.stat == "rms")]
    torch.testing.assert_close(torch.tensor(first.value.to_numpy()), by_hand)


def test_it_is_called_as_a_denoiser():
    net = Convolutions(classes=3)
    seen = {}

    def spy(net, x, sigma, labels):
        seen.update(net=net, x=x, sigma=sigma, labels=labels)
        return denoise(net, x, sigma, labels)

    model = wrap(net, spy, label_dim=3)
    x, one_hot = torch.randn(2, 1, 8, 8), torch.eye(3)[:1]
    out = model(x.bfloat16(), 2.0, one_hot.bool())
    assert seen["net"] is net
    assert (out.dtype, out.shape) == (torch.float32, x.shape)
    assert seen["x"].dtype == seen["sigma"].dtype == seen["labels"].dtype == torch.float32
    assert torch.equal(seen["sigma"], torch.tensor([2.0, 2.0]))
    assert torch.equal(seen["labels"], one_hot.expand(2, 3))
    for levels in (torch.tensor([1.0, 2.0]), [1.0, 2.0], np.array([1.0, 2.0])):
        model(x, levels, one_hot)
        assert torch.equal(seen["sigma"], torch.tensor([1.0, 2.0]))
    assert model.double()(x.double(), 1.0, one_hot).dtype == torch.float64


def test_an_unconditional_network_gets_no_labels():
    seen = []
    model = wrap(nn.Identity(), lambda net, x, sigma, labels: seen.append(labels) or net(x))
    model(torch.zeros(1, 1, 2, 2), 1.0, torch.eye(3)[:1])
    assert seen == [None]


def test_what_the_probe_reads():
    model = wrap(
        nn.Identity(),
        lambda net, x, s, c: x,
        img_channels=3,
        img_resolution=32,
        label_dim=10,
        sigma_min=0.1,
        data="digits",
    )
    assert isinstance(model, Denoiser)
    assert (model.img_channels, model.img_resolution, model.label_dim) == (3, 32, 10)
    assert (model.sigma_min, model.sigma_max, model.card.data) == (0.1, math.inf, "digits")
    bare = wrap(nn.Identity(), lambda net, x, s, c: x)
    assert (bare.img_channels, bare.img_resolution, bare.label_dim, bare.card) == (None, None, 0, None)
    assert (bare.sigma_min, bare.sigma_max) == (0.0, math.inf)


def test_the_data_that_it_names_is_probed(pictures):
    model = wrap(Convolutions(), denoise, data=pictures)
    assert probe(model, SIGMAS, n=2, progress=False).meta["data"]["name"] == "pictures"
    with pytest.raises(GddlabError, match='states="trajectory"'):
        probe(wrap(Convolutions(), denoise), SIGMAS, n=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "how a Identity is called is not known: give path= and call="),
        ({"denoise": 3}, "denoise=3: give a function"),
        ({"denoise": denoise, "prediction": "epsilon"}, "prediction= has no use with denoise="),
        ({"denoise": denoise, "label_dim": -1}, "label_dim=-1: input should be greater than or equal to 0"),
        ({"denoise": denoise, "img_channels": 1.5}, "img_channels=1.5: input should be a valid integer"),
        ({"denoise": denoise, "sigma_min": 2, "sigma_max": 1}, "sigma_min=2, sigma_max=1: give a range within 0 and"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(arguments, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        wrap(nn.Identity(), **arguments)


def test_a_function_is_no_network():
    with pytest.raises(GddlabError, match="the network is of type function: give"):
        wrap(lambda x: x, denoise)


@pytest.mark.parametrize(
    ("sigma", "labels", "says"),
    [
        (81.0, None, "sigma 81: this network accepts 0.1 to 80"),
        (torch.tensor([1.0, 0.01]), None, "sigma 0.01: this network accepts 0.1 to 80"),
        (1.0, torch.eye(4)[:2], "class_labels are (2, 4): give one-hot rows, (2, 3)"),
        (1.0, torch.tensor([0, 1]), "class_labels are (2,): give one-hot rows, (2, 3)"),
    ],
)
def test_what_cannot_be_denoised_is_refused(sigma, labels, says):
    model = wrap(nn.Identity(), lambda net, x, s, c: x, label_dim=3, sigma_min=0.1, sigma_max=80)
    with pytest.raises(GddlabError, match=re.escape(says)):
        model(torch.zeros(2, 1, 4, 4), sigma, labels)
    assert model(torch.zeros(2, 1, 4, 4), torch.tensor([0.1, 80.0])).shape == (2, 1, 4, 4)  # 0.1 is less in float32


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: x[:1], "denoise= gave (1, 1, 4, 4): return the denoised images, (2, 1, 4, 4)"),
        (lambda x: (x,), "denoise= gave a tuple: return the denoised images"),
    ],
)
def test_an_answer_that_is_no_image_is_refused(answer, says):
    model = wrap(nn.Identity(), lambda net, x, s, c: answer(x))
    with pytest.raises(GddlabError, match=re.escape(says)):
        model(torch.zeros(2, 1, 4, 4), 1.0)


def test_a_wrapped_denoiser_is_probed_as_the_denoiser_itself():
    net = tiny()
    plain = probe(net, SIGMAS, states="prior", n=3, progress=False)
    inner = wrap(net, lambda net, x, sigma, labels: net(x, sigma, labels), img_channels=1, img_resolution=16)
    outer = wrap(inner, lambda net, x, sigma, labels: net(x, sigma), img_channels=1, img_resolution=16)
    for model in (inner, outer, nn.DataParallel(outer)):
        result = probe(model, SIGMAS, states="prior", n=3, progress=False)
        assert result.frame.equals(plain.frame)
        assert result.meta["parameters"] == plain.meta["parameters"]


def test_distributed_data_parallel_is_probed_as_the_network_itself(tmp_path):
    plain = probe(tiny(), SIGMAS, states="prior", n=3, progress=False)
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny())
        result = probe(model, SIGMAS, states="prior", n=3, progress=False)
    finally:
        distributed.destroy_process_group()
    assert result.frame.equals(plain.frame)


def whole(net):
    return torch.compile(wrap(net, denoise, img_channels=1, img_resolution=16), backend="eager")


def in_place(net):
    net.compile(backend="eager")
    return wrap(net, denoise, img_channels=1, img_resolution=16)


def inside(net):
    return wrap(torch.compile(net, backend="eager"), denoise, img_channels=1, img_resolution=16)


def part(net):
    net.last = torch.compile(net.last, backend="eager")
    return wrap(net, denoise, img_channels=1, img_resolution=16)


def part_in_place(net):
    net.last.compile(backend="eager")
    return wrap(net, denoise, img_channels=1, img_resolution=16)


def forward_only(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return wrap(net, denoise, img_channels=1, img_resolution=16)


def in_the_function(net):
    return wrap(net, torch.compile(denoise, backend="eager"), img_channels=1, img_resolution=16)


@pytest.mark.parametrize(
    "compile_it",
    [whole, in_place, inside, part, part_in_place, forward_only, in_the_function],
    ids=lambda f: f.__name__,
)
def test_a_compiled_network_is_probed_as_the_plain_one_and_stays_compiled(compile_it):
    torch._dynamo.reset()
    counters.clear()
    model = compile_it(Convolutions())
    plain_model = wrap(Convolutions(), denoise, img_channels=1, img_resolution=16)
    plain = probe(plain_model, SIGMAS, states="prior", n=3, progress=False)
    assert probe(model, SIGMAS, states="prior", n=3, progress=False).frame.equals(plain.frame)
    assert not counters["stats"]

    x, sigma = torch.randn(2, 1, 16, 16), torch.tensor([80.0, 1.0])
    calls = []
    with torch.no_grad():
        before = model(x, sigma)
        assert counters["stats"]["unique_graphs"] > 0
        handle = named_layers(model)["last.1"].register_forward_hook(lambda *a: calls.append(1))
        model(x, sigma)
        assert calls == []  # which is why the probe runs it eagerly
        with eager(model):
            model(x, sigma)
        handle.remove()
        assert calls == [1]
        again = probe(model, SIGMAS, states="prior", n=3, progress=False)
        with torch.compiler.set_stance("fail_on_recompile"):
            after = model(x, sigma)
    assert again.frame.equals(plain.frame)
    assert torch.equal(before, after)


def test_a_compiled_teacher_is_probed_as_the_plain_one():
    torch._dynamo.reset()
    net = tiny()
    net.model = torch.compile(net.model, backend="eager")
    with torch.no_grad():
        net(torch.randn(2, 1, 16, 16), torch.ones(2))
    plain = probe(tiny(), SIGMAS, states="prior", layers="all", n=3, progress=False)
    assert probe(net, SIGMAS, states="prior", layers="all", n=3, progress=False).frame.equals(plain.frame)


def test_low_precision(pictures):
    exact = probe(wrap(Convolutions(), denoise), SIGMAS, data=pictures, n=4, progress=False)
    autocast = probe(wrap(Convolutions(), denoise), SIGMAS, data=pictures, n=4, dtype="bfloat16", progress=False)
    converted = probe(wrap(Convolutions().bfloat16(), denoise), SIGMAS, data=pictures, n=4, progress=False)
    for result in (autocast, converted):
        torch.testing.assert_close(rms(result), rms(exact), rtol=0.02, atol=0)
        assert not torch.equal(rms(result), rms(exact))


def test_gradients_pass_through():
    net = Convolutions()
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    wrap(net, denoise)(x, 2.0).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in net.parameters())
