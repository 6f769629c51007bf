"""The discriminator made of an LPIPS trunk: its logits, its gradients and R1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.distill.losses import d_loss_real, r1_penalty
from gddlab.distill.lpips import LPIPS, LPIPSDiscriminator
from gddlab.pretrained.trunks import TRUNKS

SMALL = {"vgg": 16, "alex": 31, "squeeze": 17}
THEIRS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet"}


def batch(n: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def made(net: Any, input_size: int, *, classes: int = 0) -> LPIPSDiscriminator:
    return LPIPSDiscriminator(LPIPS(net=net, input_size=input_size, weights="random"), classes=classes)


@pytest.mark.parametrize("net", TRUNKS)
@pytest.mark.parametrize("classes", [0, 3])
def test_logits_are_maps_of_every_level(net: str, classes: int) -> None:
    torch.manual_seed(0)
    d = made(net, SMALL[net], classes=classes).double()
    x, y = batch(channels=1), torch.tensor([2, 0])
    logits = torch.cat(d(x, F.one_hot(y, 3) if classes else None), 1)
    expected = []
    for level, head in zip(d.trunk(x), d.heads, strict=True):
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        f = level / level.norm(dim=1, keepdim=True).clamp_min(1e-4)
        for b in range(2):
            w = head.weight[0, :, 0, 0]
            if d.embeds is not None:
                w = w + d.embeds[len(expected) // 2].weight[y[b]]  # type: ignore[index, operator]
            expected.append((f[b] * w[:, None, None]).sum(0).flatten() + head.bias)
    wanted = torch.stack([torch.cat(expected[b::2]) for b in range(2)])
    assert logits.shape == wanted.shape
    assert_close(logits, wanted, rtol=1e-3, atol=1e-6)  # eps inside the root, not a clamp
    assert d.features(x)[0] is x


@pytest.mark.parametrize("net", TRUNKS)
def test_every_parameter_is_trained(net: str) -> None:
    torch.manual_seed(0)
    d = made(net, SMALL[net] + 8, classes=2)
    d_loss_real(d(batch(4).float(), F.one_hot(torch.arange(4) % 2, 2))).backward()
    for name, p in d.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("net", TRUNKS)
def test_r1_is_that_of_plain_double_backward(net: str) -> None:
    torch.manual_seed(0)
    d, x = made(net, SMALL[net]).double(), batch(size=12)
    penalty, surrogate = r1_penalty(d, x, None)  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(torch.cat(d(leaf), 1).sum(), leaf, create_graph=True)
    expected = g.square().sum((1, 2, 3)).mean()
    assert_close(penalty, expected.detach())
    params = [p for n, p in d.named_parameters() if "weight" in n]
    found, wanted = torch.autograd.grad(surrogate, params), torch.autograd.grad(expected, params)
    assert all(w.abs().sum() > 0 for w in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    step = 1e-5  # and along one direction, as finite differences have it
    head = d.heads[2].weight
    assert isinstance(head, nn.Parameter)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            head.add_(sign * step)
        values.append(r1_penalty(d, x, None)[0])  # type: ignore[arg-type]
        with torch.no_grad():
            head.sub_(sign * step)
    slope = torch.autograd.grad(r1_penalty(d, x, None)[1], head)[0].sum()  # type: ignore[arg-type]
    assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [-1e3, 0.0], ids=["dead", "faint"])
def test_pixels_without_features_leave_r1_finite(bias: float) -> None:
    torch.manual_seed(0)
    d = made("squeeze", 17)
    first = d.trunk.features.get_submodule("0")
    with torch.no_grad():
        first.get_parameter("bias").fill_(bias)
        first.get_parameter("weight").mul_(1e-16)
    penalty, surrogate = r1_penalty(d, batch().float(), None)  # type: ignore[arg-type]
    grads = torch.autograd.grad(surrogate, list(d.parameters()), allow_unused=True)
    assert (penalty == 0) == (bias < 0)
    assert penalty < 1
    assert all(g is None or g.isfinite().all() for g in grads)
