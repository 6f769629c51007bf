"""One iteration: the optimiser's formula, micro-batches, augmentation, fast paths; the parameter average."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gddlab.datasets import ImageDataset
from gddlab.distill.distributed import Gradients, World
from gddlab.distill.step import adam, update
from gddlab.distill.trainer import Trainer
from gddlab.ema import Average, ema_beta
from tests.conftest import tiny_config
from tests.distill.test_trainer import by, tensors, trained

ALONE = World(0, 1, torch.device("cpu"))
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "projected": {},
    "stylegan2": {"discriminator": {"kind": "stylegan2"}},
    "lpips": {"discriminator": {"kind": "lpips"}},
}


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
        assert update(opt, Gradients(ps, ALONE)) == 0
        for p, e in zip(ps, expected, strict=True):
            assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)


def test_adam_state_has_one_form() -> None:
    """It exists before the first step, keeps its names, dtypes and shapes, and survives a checkpoint."""
    ps = params((3, 4), (5,))
    opt = adam(ps, 0.01)
    form = {k: {n: (t.shape, t.dtype) for n, t in s.items()} for k, s in opt.state_dict()["state"].items()}
    assert set(form) == {0, 1}
    ps[0].grad, ps[1].grad = torch.ones(3, 4).double(), None  # the second one has no part in this step
    update(opt, Gradients(ps, ALONE))
    state = opt.state_dict()
    assert {k: {n: (t.shape, t.dtype) for n, t in s.items()} for k, s in state["state"].items()} == form
    assert [s["step"].item() for s in state["state"].values()] == [1, 0]
    others = params((3, 4), (5,))
    again = adam(others, 0.01)
    again.load_state_dict(copy.deepcopy(state))  # a state dict shares its tensors
    for p, q in zip(ps, others, strict=True):
        q.data.copy_(p.data)
        p.grad, q.grad = torch.full_like(p, 0.3), torch.full_like(q, 0.3)
    update(opt, Gradients(ps, ALONE))
    update(again, Gradients(others, ALONE))
    assert_close([p.detach() for p in others], [p.detach() for p in ps], rtol=0, atol=0)


def test_what_is_not_finite_is_replaced_and_counted() -> None:
    ps = params((4,), (2,), (3,))
    before = [p.detach().clone() for p in ps]
    ps[0].grad = torch.tensor([math.nan, math.inf, -math.inf, 2.0], dtype=torch.float64)
    ps[1].grad = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    ps[2].grad = torch.ones(3, dtype=torch.float64)
    bad = update(torch.optim.SGD(ps, lr=1.0), Gradients(ps, ALONE))
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
    Average(ema, net).update(0.9)
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


def same(a: Trainer, b: Trainer, *, tolerance: float = 1e-8) -> None:
    x, y = tensors(a), tensors(b)
    for name in x:
        # Adam with beta1 = 0 turns rounding noise into steps where the true gradient is 0: a bias before BatchNorm.
        if ".main.0.bias" not in name and "opt_" not in name:
            assert_close(x[name], y[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def gradients(path: Path, teacher: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """Gradients of the three steps, and the state of BatchNorm and spectral norm; no optimiser steps."""
    t = Trainer(tiny_config(path, teacher, precision="float64", augment={"ops": ("color", "geom")}, **fields), ALONE)
    step, drawer, out = t.step, t.drawer, {}
    place = drawer.place
    images = place(t.data.images(t.reader.indices()))
    for opt in (step.opt_g, step.opt_d):
        opt.step = lambda: None  # type: ignore[assignment, method-assign, union-attr]

    def keep(name: str, stats: dict[str, torch.Tensor], net: torch.nn.Module) -> None:
        out.update({f"{name}/{k}": v for k, v in stats.items()})
        out.update({f"{name}/{k}": p.grad for k, p in net.named_parameters() if p.grad is not None})

    keep("g", step.g_step(place(drawer.latents(0, 0)), None, place(drawer.draw(0, 0)))[0], step.g)
    fakes = step.fake_features(place(drawer.latents(0, 1)), None, place(drawer.draw(0, 1)))
    keep("d", step.d_step(fakes, step.real_features(images, place(drawer.real(0))), None), step.d)
    keep("r1", step.r1_step(images, None), step.d)
    return {k: v.clone() for k, v in out.items()} | {f"state/{k}": v for k, v in step.d.state_dict().items()}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, tiny_teacher: Path, kind: str) -> None:
    whole = gradients(tmp_path / "a", tiny_teacher, **DISCRIMINATORS[kind])
    parts = gradients(tmp_path / "b", tiny_teacher, batch_per_device=4, **DISCRIMINATORS[kind])
    assert whole.keys() == parts.keys()
    assert any(k.startswith("r1/") and v.ndim == 4 and v.abs().sum() > 0 for k, v in whole.items())
    for name, value in whole.items():
        assert_close(value, parts[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_with_reused_fakes_and_the_instance_loss(tmp_path: Path, tiny_teacher: Path) -> None:
    fields = {"precision": "float64", "reuse_fakes": True, "instance": by("ctm")}
    whole = trained(tmp_path / "a", tiny_teacher, 3, **fields)
    same(whole, trained(tmp_path / "b", tiny_teacher, 3, batch_per_device=2, **fields))
    assert whole.meter.sums["loss/instance"] > 0


def test_augmentation_changes_what_the_discriminator_sees_but_not_r1(tmp_path: Path, tiny_teacher: Path) -> None:
    plain = trained(tmp_path / "a", tiny_teacher, 1)
    augmented = trained(tmp_path / "b", tiny_teacher, 1, augment={"ops": ("cutout",)})
    assert plain.meter.sums["logits/real"] != augmented.meter.sums["logits/real"]
    seen: list[torch.Tensor] = []
    features = augmented.step.d.features
    augmented.step.d.features = lambda x: (seen.append(x.detach().clone()), features(x))[1]
    images = augmented.data.images(slice(0, 8))
    augmented.step.r1_step(images, None)
    assert torch.equal(seen[0], images)


def test_adas_probability_rises_and_is_written(tmp_path: Path, tiny_teacher: Path) -> None:
    """Up by 32 of 100 images where the mean sign of real logits is above the target, and not below 0."""
    fields = {"augment": {"ops": ("blit",), "ada_target": 0.001, "ada_kimg": 0.1}}
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, **fields), ALONE)
    augment = t.step.augment
    assert augment is not None
    signs = []
    for _ in range(4):
        t.iterate()
        signs.append(t.meter.sums["signs/real"].item())
    assert "ada/p" in t.meter.sums
    assert float(augment.p) == pytest.approx(0.32 if signs[-1] / 4 > 0.001 else 0.0)
    for sign, expected in ((1.0, 0.32), (-1.0, 0.0)):
        augment.p.zero_()
        for _ in range(4):
            augment.observe(torch.tensor(sign), 8)
        assert float(augment.p) == pytest.approx(expected)


@pytest.mark.parametrize("fields", [{"precision": "bfloat16", "precision_d": "bfloat16"}, {"channels_last": True}])
def test_fast_options_train_like_the_plain_step(tmp_path: Path, tiny_teacher: Path, fields: dict[str, Any]) -> None:
    """First iteration's losses agree as far as the precision goes."""
    plain = trained(tmp_path / "a", tiny_teacher, 1)
    fast = trained(tmp_path / "b", tiny_teacher, 1, **fields)
    for name in ("loss/g", "loss/d", "logits/real"):
        assert_close(plain.meter.sums[name], fast.meter.sums[name], rtol=0.02, atol=0.02)
    if "precision" in fields:
        assert plain.meter.sums["loss/g"] != fast.meter.sums["loss/g"]
    assert all(p.dtype == torch.float32 for p in fast.step.g.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_equals_plain_training(
    backend: str, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler always; its C++, which takes minutes to build, in slow tests only."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small = {"backbones": ("resnet10t",), "weights": {"resnet10t": "random"}}  # fewer layers to trace
    fields = {"precision": "float64", "total_kimg": 0.024, "discriminator": small}
    plain = trained(tmp_path / "a", tiny_teacher, 3, **fields)
    same(plain, trained(tmp_path / "b", tiny_teacher, 3, compile=True, **fields))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # of the student, of the features


def test_gradients_that_are_not_finite_are_replaced_and_counted(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "a", tiny_teacher), ALONE)
    p = t.step.g_params[0]
    p.register_hook(lambda g: torch.full_like(g, float("inf")))
    before = p.detach().clone()
    t.iterate()
    assert torch.isfinite(p).all()
    assert (p < before).all()  # +inf became 1e5, and Adam's step has its sign
    assert t.meter.sums["nonfinite/g"] == 1
    assert t.meter.sums["sanitised/g"] == 1


def test_hinge_loss_and_a_fixed_probability_of_augmentation(tmp_path: Path, tiny_teacher: Path) -> None:
    """The losses are those of the logits: hinge's generator loss is minus their mean."""
    t = trained(tmp_path / "a", tiny_teacher, 1, loss="hinge", augment={"ops": ("cutout",), "p": 0.5})
    sums = t.meter.sums
    assert_close(sums["loss/g"], -sums["logits/g"])
    assert t.step.augment is not None and t.step.augment.p == 0.5
    whole = trained(tmp_path / "b", tiny_teacher, 1, loss="hinge", augment={"ops": ("cutout",)})
    assert whole.meter.sums["logits/real"] != sums["logits/real"]


def test_cached_real_features_change_nothing(tmp_path: Path, tiny_teacher: Path) -> None:
    states = []
    for cached in (False, True):
        config = tiny_config(
            tmp_path / str(cached), tiny_teacher, discriminator={"cache_real": cached}, precision="float64"
        )
        t = Trainer(config, ALONE)
        few = t.data.uint8[:24]
        t.data = t.reader.dataset = ImageDataset(few, name="few", source="test")
        if cached:
            t.cache_real()
        for _ in range(3):
            t.iterate()
        states.append(tensors(t))
    for name in states[0]:
        # Adam with beta1 = 0 turns rounding noise into steps where the true gradient is 0: a bias before BatchNorm.
        if ".main.0.bias" not in name and "opt_" not in name:
            assert_close(states[0][name], states[1][name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_reused_fakes_are_those_of_the_generator_step(tmp_path: Path, tiny_teacher: Path) -> None:
    """The first D step on reused fakes equals one on fresh fakes of the same noise and the previous generator."""
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, precision="float64"), ALONE)
    z, images = t.drawer.place(t.drawer.latents(0, 0)), t.data.images(slice(0, 8)).double()
    with torch.no_grad():
        expected = t.step.d.features(t.step.g.generate(z))
    fresh = copy.deepcopy(t.step)
    _, features = t.step.g_step(z, None)
    assert_close(features, expected)
    a = t.step.d_step(features, t.step.real_features(images), None)
    b = fresh.d_step(expected, fresh.real_features(images), None)
    assert_close(a["loss/d"], b["loss/d"])
    for p, q in zip(t.step.d.parameters(), fresh.d.parameters(), strict=True):
        assert_close(p, q)
