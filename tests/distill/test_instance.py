"""Instance-based losses: against exact ODE solutions, an image at a time by hand, and in training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.distill.instance import (
    Consistency,
    FromNoise,
    InstanceLoss,
    InstancePart,
    Moves,
    Progressive,
    Trajectory,
)
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond
from gddlab.nets.io import make_student
from gddlab.nets.precond import levels_of
from gddlab.runtime import generator
from tests.conftest import TINY, tiny_net

SCALES = torch.tensor([0.3, 1.0], dtype=torch.float64)
"""Standard deviations of two classes of Gaussian images."""
PARTS: dict[str, type[InstancePart]] = {"pd": Progressive, "cd": Consistency, "ctm": Trajectory, "rcd": FromNoise}


def l2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


def loss_of(kind: str, teacher: nn.Module, *, steps: int = 8, distance: Any = None) -> InstanceLoss:
    return InstanceLoss(PARTS[kind](steps=steps), teacher, distance or l2)


def scales(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return (labels.double() @ SCALES).reshape(-1, 1, 1, 1)


class Gaussian(nn.Module):
    """The exact denoiser of images N(0, c^2 I), with c by class."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        c2 = scales(labels).to(x.dtype) ** 2
        return x * c2 / (c2 + sigma.reshape(-1, 1, 1, 1) ** 2)


class Point(nn.Module):
    """The exact denoiser of a single image: its trajectories are straight."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 0.3)


class Exact(OneStepPrecond):
    """A student whose jumps follow the ODE of `Gaussian` or `Point` exactly, but for the factor `gain` (1 is exact)."""

    def __init__(self, teacher: nn.Module, *, target_time: bool = True):
        super().__init__(**TINY, target_time=target_time)
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def end(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        if isinstance(self.teacher[0], Point):
            return 0.3 + s / t * (x - 0.3)
        c2 = scales(labels) ** 2
        return x * ((c2 + s**2) / (c2 + t**2)).sqrt()

    def forward(
        self, x: Any, sigma: Any, class_labels: Any = None, augment_labels: Any = None, target: Any = None
    ) -> Tensor:
        t = levels_of(sigma, x)
        target = self.default_target if target is None else target
        if target is None:  # a consistency function, right at eps
            off = (self.gain - 1) * (1 - self.eps / t)
            return (1 + off) * self.end(x, t, torch.as_tensor(self.eps), class_labels)
        s = levels_of(target, x)
        return self.gain * (self.end(x, t, s, class_labels) - s / t * x) / (1 - s / t)


def batch(n: int, *, seed: int = 0, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian images of two classes, labels, noise; float64."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.eye(2, dtype=torch.float64)[torch.arange(n) % 2]
    images = scales(labels) * torch.randn(n, 1, side, side, generator=g, dtype=torch.float64)
    return images, labels, torch.randn(n, 1, side, side, generator=g, dtype=torch.float64)


def evaluate(kind: str, teacher: nn.Module, student: OneStepPrecond, steps: int, n: int = 256) -> tuple[Tensor, Tensor]:
    images, labels, noise = batch(n)
    loss = loss_of(kind, teacher, steps=steps)
    draws = loss.draw(n, generator(0, 0))
    return loss.loss(student, images, labels, noise, draws), draws


# Exact solutions.


@pytest.mark.parametrize("kind", PARTS)
def test_straight_trajectories_have_no_loss(kind: str) -> None:
    """Heun and Euler are exact on them: the target is the teacher's image, whatever t, u, s."""
    student = Exact(Point(), target_time=PARTS[kind].target_time)
    out, _ = evaluate(kind, Point(), student, 8)
    assert out.dtype == torch.float64 and out.shape == (256,)
    assert out.max() < 1e-20
    student.gain.data.fill_(1.1)
    wrong, _ = evaluate(kind, Point(), student, 8)
    assert wrong.max() > 1e-7


@pytest.mark.parametrize("kind", PARTS)
def test_the_true_student_has_the_solvers_error(kind: str) -> None:
    """Loss of the exact student falls as Heun's squared error does, h^6; a student off by a tenth has more."""
    student = Exact(Gaussian(), target_time=PARTS[kind].target_time)
    coarse, fine = (evaluate(kind, Gaussian(), student, steps)[0].mean().item() for steps in (32, 64))
    assert 0 < fine < coarse / 10
    student.gain.data.fill_(1.1)
    assert evaluate(kind, Gaussian(), student, 64)[0].mean() > 10 * fine


@pytest.mark.parametrize("kind", PARTS)
def test_only_neighbours_take_the_teachers_step(kind: str) -> None:
    """Where no step is the teacher's, the true student's loss is that of rounding alone."""
    out, (t, u, s) = evaluate(kind, Gaussian(), Exact(Gaussian(), target_time=PARTS[kind].target_time), 16)
    solver = t - u == 1
    if kind in ("pd", "rcd"):
        solver |= u - s == 1
    if kind == "ctm":  # whose teacher goes all the way
        solver |= True
    assert (out[solver] > 1e-20).all()
    assert (kind == "pd") != bool(solver.all())
    assert (out[~solver] < 1e-20).all()


def test_targets_have_the_right_sign() -> None:
    """pd's target lies on the line through x_t and x_s, at sigma 0; the student's jump with it arrives at x_s."""
    seen: list[Tensor] = []

    def keep(a: Tensor, b: Tensor) -> Tensor:
        seen.append(b)
        return l2(a, b)

    images, labels, noise = batch(4)
    student, loss = Exact(Gaussian()), loss_of("pd", Gaussian(), distance=keep)
    loss.loss(student, images, labels, noise, torch.tensor([[8, 4, 0]]).T.expand(3, 4))
    t, s = loss.sigmas[8], loss.sigmas[0]
    x_t = images + t * noise
    assert_close(s / t * x_t + (1 - s / t) * seen[0], student.end(x_t, t, s, labels))


# By hand.


def nets(*, target_time: bool = True) -> tuple[nn.Module, OneStepPrecond]:
    """A conditional teacher and a student that differ, in float64."""
    teacher = tiny_net(label_dim=2).double()
    student = make_student(teacher, target_time=target_time).double().eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return teacher, student


def by_hand(
    kind: str, loss: InstanceLoss, student: OneStepPrecond, x: Tensor, label: Tensor, i: tuple[int, int, int]
) -> Tensor:
    """The loss of one image from x_t, written from the papers with plain numbers."""
    t, u, s = (float(loss.sigmas[k]) for k in i)

    def g(x: Tensor, t: float, s: float) -> Tensor:
        return student(x, t, label, target=s)

    def jump(x: Tensor, t: float, s: float) -> Tensor:
        return x if s == t else s / t * x + (t - s) / t * g(x, t, s)

    def step(x: Tensor, a: int, b: int) -> Tensor:
        t, u = float(loss.sigmas[a]), float(loss.sigmas[b])
        if a - b > 1:
            return x - (t - u) * (x - g(x, t, u)) / t
        d = (x - loss.teacher(x, t, label)) / t
        y = x + (u - t) * d
        return x + (u - t) * (d / 2 + (y - loss.teacher(y, u, label)) / u / 2)

    x_u = x
    for k in range(i[0], i[1], -1) if kind == "ctm" else (i[0],):  # ctm: the teacher's steps along the grid
        x_u = step(x_u, k, k - 1 if kind == "ctm" else i[1])
    if kind == "cd":
        return l2(student(x, t, label), student(x_u, u, label))
    if kind == "ctm":
        return l2(jump(jump(x, t, s), s, 0.002), jump(jump(x_u, u, s), s, 0.002))
    x_s = step(x_u, i[1], i[2])
    return l2(g(x, t, s), (t * x_s - s * x) / (t - s))


DRAWS = {
    "pd": ((8, 8, 4, 2), (4, 7, 3, 1), (0, 6, 2, 0)),
    "cd": ((8, 1, 5, 2), (7, 0, 4, 1), (0, 0, 0, 0)),
    "ctm": ((8, 5, 3, 2), (7, 2, 1, 1), (3, 1, 0, 0)),
    "rcd": ((8, 8, 8, 8), (7, 1, 5, 3), (6, 0, 4, 2)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_values_an_image_at_a_time(kind: str) -> None:
    """Values of a batch of mixed times are those of each image alone, by hand; so they don't depend on the batch."""
    teacher, student = nets(target_time=PARTS[kind].target_time)
    images, labels, noise = batch(4, side=16)
    loss = loss_of(kind, teacher)
    draws = torch.tensor(DRAWS[kind])
    with torch.no_grad():
        out = loss.loss(student, images, labels, noise, draws)
        for k, i in enumerate(zip(*DRAWS[kind], strict=True)):
            x = images[k : k + 1] + loss.sigmas[i[0]] * noise[k : k + 1]
            assert_close(out[k : k + 1], by_hand(kind, loss, student, x, labels[k : k + 1], i), rtol=1e-9, atol=1e-12)
        halves = [loss.loss(student, images[p], labels[p], noise[p], draws[:, p]) for p in (slice(0, 1), slice(1, 4))]
        assert_close(out, torch.cat(halves), rtol=1e-9, atol=1e-12)
        other = loss.loss(student, images, labels.flip(1), noise, draws)
    assert ((out - other).abs() > 1e-9 * out).all()  # classes reach every part


def test_unconditional_float32_networks() -> None:
    teacher = tiny_net()
    images, _, noise = batch(4, side=16)
    for kind in PARTS:
        student = make_student(teacher, target_time=PARTS[kind].target_time).eval()
        loss = loss_of(kind, teacher)
        draws = torch.tensor(DRAWS[kind])
        out = loss.loss(student, images.float(), None, noise.float(), draws)
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
        wide = copy.deepcopy(student).double()
        exact = loss_of(kind, copy.deepcopy(teacher).double())
        assert_close(out.double(), exact.loss(wide, images, None, noise, draws), rtol=1e-2, atol=1e-5)


# Gradients.


@pytest.mark.parametrize("kind", PARTS)
def test_gradients_reach_the_student_alone(kind: str) -> None:
    """Its parameters get those of the prediction; targets, and ctm's way to index 0, are constant."""
    teacher, student = nets(target_time=PARTS[kind].target_time)
    images, labels, noise = batch(4, side=16)
    loss = loss_of(kind, teacher)
    draws = torch.tensor(DRAWS[kind])
    student.model.map_layer0.requires_grad_(False)
    loss.loss(student, images, labels, noise, draws).mean().backward()
    assert not [n for n, p in teacher.named_parameters() if p.grad is not None]
    frozen = {"model.map_layer0.weight", "model.map_layer0.bias"}
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == frozen

    constant = copy.deepcopy(student).requires_grad_(False)
    t, s = loss.sigmas[draws[0]], loss.sigmas[draws[2]]
    x = images + t.reshape(-1, 1, 1, 1) * noise
    with torch.no_grad():
        target = loss.part.target(Moves(teacher, constant, labels, loss.sigmas), x, draws)
    if kind == "ctm":
        made = student.jump(x, t, s, labels)
        ended = constant.jump(made, s, 0.002, labels)
        prediction = torch.where((draws[2] > 0).reshape(-1, 1, 1, 1), ended, made)
    else:
        prediction = student(x, t, labels, **({"target": s} if kind != "cd" else {}))
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(l2(prediction, target).mean(), list(trained.values()))
    for (name, p), g in zip(trained.items(), expected, strict=True):
        assert p.grad is not None, name
        assert_close(p.grad, g, rtol=1e-7, atol=1e-12 + 1e-9 * g.abs().max().item(), msg=name)
        assert g.abs().max() > 0, name


def test_flags_come_back_after_an_error() -> None:
    teacher, student = nets()
    images, labels, noise = batch(2, side=16)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # the pass in which the student is constant
            assert not any(p.requires_grad for p in student.parameters())
            raise RuntimeError("inside")

    student.model.register_forward_hook(fail)
    loss = loss_of("ctm", teacher)
    with pytest.raises(RuntimeError, match="inside"):
        loss.loss(student, images, labels, noise, torch.tensor([[5, 4, 3]]).T.expand(3, 2))
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("kind", PARTS)
def test_autocast_keeps_the_gradient(kind: str) -> None:
    """Weights that autocast casts in a pass without gradient must not serve the pass with one."""
    teacher, student = (net.float() for net in nets(target_time=PARTS[kind].target_time))
    images, labels, noise = (x.float() for x in batch(4, side=16))
    loss = loss_of(kind, teacher)
    assert isinstance(student, OneStepPrecond)
    with torch.autocast("cpu", torch.bfloat16):
        out = loss.loss(student, images, labels, noise, torch.tensor(DRAWS[kind]))
    assert out.dtype == torch.float32
    out.mean().backward()
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("kind", PARTS)
def test_training_leads_to_the_teachers_images(kind: str) -> None:
    """A student from scratch learns to make in one step what the ODE makes of the same noise."""
    torch.manual_seed(0)
    student = make_student(tiny_net(label_dim=2), target_time=PARTS[kind].target_time, init="scratch").eval()
    loss = loss_of(kind, Gaussian())
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    _, labels, z = (x.float() for x in batch(64, seed=999, side=16))
    ends = (scales(labels) * z).float()  # sqrt((c^2 + eps^2) / (c^2 + 80^2)) 80 z, to one part in 1e4

    def error() -> float:
        with torch.no_grad():
            return l2(student.generate(z, labels), ends).mean().item()

    before = error()
    for i in range(80):
        images, classes, noise = (x.float() for x in batch(8, seed=i, side=16))
        value = loss.loss(student, images, classes, noise, loss.draw(8, generator(7, i))).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert error() < 0.4 * before


# Indices.


def counts(x: Tensor) -> dict[int, int]:
    values, n = x.unique(return_counts=True)
    return dict(zip(values.tolist(), n.tolist(), strict=True))


def uniform(x: Tensor, low: int, high: int) -> bool:
    """Whether every integer occurs as often as chance allows, five standard deviations."""
    found, k = counts(x), high - low + 1
    expected = len(x) / k
    slack = 5 * math.sqrt(expected * (1 - 1 / k)) if k > 1 else 0
    return set(found) == set(range(low, high + 1)) and all(abs(n - expected) <= slack for n in found.values())


def test_draws_are_uniform_in_their_ranges() -> None:
    n = 40_000

    def drawn(kind: str) -> Tensor:
        return loss_of(kind, Point()).draw(n, generator(0, 1))

    t, u, s = drawn("cd")
    assert uniform(t, 1, 8) and torch.equal(u, t - 1) and not s.any()
    t, u, s = drawn("rcd")
    assert (t == 8).all() and uniform(s, 0, 6) and torch.equal(u, s + 1)
    t, u, s = drawn("ctm")
    assert uniform(t, 2, 8)
    for i in range(2, 9):
        assert uniform(u[t == i], 1, i - 1)
    for i in range(1, 8):
        assert uniform(s[u == i], 0, i - 1)
    t, u, s = drawn("pd")
    width = t - s
    assert {w: round(c / n * 3, 1) for w, c in counts(width).items()} == {2: 1.0, 4: 1.0, 8: 1.0}
    assert torch.equal(u * 2, t + s)
    for w in (2, 4, 8):
        assert uniform(s[width == w] // w, 0, 8 // w - 1) and not (s[width == w] % w).any()


@pytest.mark.parametrize("kind", PARTS)
def test_draws_come_from_the_generator(kind: str) -> None:
    loss = loss_of(kind, Point(), steps=16)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    a, b, c = (loss.draw(64, generator(0, k)) for k in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert a.shape == (3, 64) and a.dtype == torch.int64 and a.device.type == "cpu"
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_grid_ascends_from_sigma_min() -> None:
    loss = loss_of("cd", Point(), steps=16)
    assert loss.sigmas[0].item() == pytest.approx(0.002) and loss.sigmas[-1].item() == pytest.approx(80)
    root = loss.sigmas ** (1 / 7)
    assert_close(root.diff(), (root[-1] - root[0]).div(16).expand(16))


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        ("pd", 12, "steps=12 of progressive distillation: give a power of two"),
        ("cd", 1, "steps=1: input should be greater than or equal to 2"),
        ("ctm", 8.5, "steps=8.5"),
    ],
)
def test_refusals(kind: str, steps: Any, message: str) -> None:
    with pytest.raises(GddlabError, match=message) as e:
        PARTS[kind](steps=steps)
    assert "\n" not in str(e.value)


def test_the_teacher_given_stays_in_its_precision() -> None:
    """Its hash says later whether a run is continued with the same one."""
    teacher = tiny_net()
    loss = Progressive(distance="l2").build(teacher, device=torch.device("cpu"), dtype=torch.float64)
    assert next(loss.teacher.parameters()).dtype == torch.float64
    assert next(teacher.parameters()).dtype == torch.float32
