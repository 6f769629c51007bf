"""The optimiser against Adam's formula, sanitised gradients, and the parameter average."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gddlab.distill.distributed import World
from gddlab.distill.optim import adam, update
from gddlab.ema import ema_beta, ema_update

ALONE = World(0, 1, torch.device("cpu"))


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


@pytest.mark.parametrize("interval", [None, 16])
def test_adam_is_the_formula(interval: int | None) -> None:
    """Kingma & Ba 2015, algorithm 1, in float64; with a lazy regulariser, lr and betas to the power of k / (k + 1)."""
    ps, lr = params((3, 4), (5,)), 0.01
    expected = [p.detach().clone() for p in ps]
    c = 1.0 if interval is None else interval / (interval + 1)
    beta2, second = 0.99**c, [torch.zeros_like(p) for p in ps]
    opt = adam(ps, lr, interval=interval)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 5):
        for p, e, v in zip(ps, expected, second, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            v.mul_(beta2).add_((1 - beta2) * p.grad**2)
            e -= lr * c * p.grad / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        assert update(opt, ps, ALONE) == 0
        for p, e in zip(ps, expected, strict=True):
            assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)


def test_adam_state_has_one_form() -> None:
    """It exists before the first step, keeps its names, dtypes and shapes, and survives a checkpoint."""
    ps = params((3, 4), (5,))
    opt = adam(ps, 0.01)
    form = {k: {n: (t.shape, t.dtype) for n, t in s.items()} for k, s in opt.state_dict()["state"].items()}
    assert set(form) == {0, 1}
    ps[0].grad, ps[1].grad = torch.ones(3, 4).double(), None  # the second one has no part in this step
    update(opt, ps, ALONE)
    state = opt.state_dict()
    assert {k: {n: (t.shape, t.dtype) for n, t in s.items()} for k, s in state["state"].items()} == form
    assert [s["step"].item() for s in state["state"].values()] == [1, 0]
    others = params((3, 4), (5,))
    again = adam(others, 0.01)
    again.load_state_dict(copy.deepcopy(state))  # a state dict shares its tensors
    for p, q in zip(ps, others, strict=True):
        q.data.copy_(p.data)
        p.grad, q.grad = torch.full_like(p, 0.3), torch.full_like(q, 0.3)
    update(opt, ps, ALONE)
    update(again, others, ALONE)
    assert_close([p.detach() for p in others], [p.detach() for p in ps], rtol=0, atol=0)


def test_what_is_not_finite_is_replaced_and_counted() -> None:
    ps = params((4,), (2,), (3,))
    before = [p.detach().clone() for p in ps]
    ps[0].grad = torch.tensor([math.nan, math.inf, -math.inf, 2.0], dtype=torch.float64)
    ps[1].grad = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    ps[2].grad = torch.ones(3, dtype=torch.float64)
    bad = update(torch.optim.SGD(ps, lr=1.0), ps, ALONE)
    assert bad == 2 and bad.shape == ()
    assert_close(ps[0].grad, torch.tensor([0, 1e5, -1e5, 2], dtype=torch.float64))
    for p, b in zip(ps, before, strict=True):
        assert p.grad is not None
        assert_close(p.detach(), b - p.grad)


def test_average_moves_what_is_trained_and_copies_buffers() -> None:
    torch.manual_seed(0)
    ema, net = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double() for _ in range(2))
    net[0].bias.requires_grad_(False)
    net(torch.randn(8, 3, dtype=torch.float64))
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    ema_update(ema, net, 0.9)
    after, given = ema.state_dict(), net.state_dict()
    for name in ("0.weight", "1.weight", "1.bias"):
        assert_close(after[name], 0.9 * before[name] + 0.1 * given[name], rtol=1e-12, atol=1e-14)
    assert_close(after["0.bias"], before["0.bias"], rtol=0, atol=0)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert not torch.equal(before[name], given[name])
        assert_close(after[name], given[name], rtol=0, atol=0)


def test_average_has_the_half_life() -> None:
    assert ema_beta(1000, 10, None, 0) ** 10 == pytest.approx(0.5)
    assert ema_beta(100, 500, 0.05, 20_000) ** 10 == pytest.approx(0.5)  # bounded by 5 % of the images seen: 1000
    assert ema_beta(100, 500, 0.05, 0) == 0
