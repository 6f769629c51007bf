"""Samplers: seeds, batches, agreement with a plain integration."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gddlab.distill.student import make_student
from gddlab.errors import GddlabError
from gddlab.sampling import heun, karras_sigmas, latents, sample
from gddlab.sampling.grid import image_grid
from tests.conftest import tiny_net


def test_karras_grid() -> None:
    s = karras_sigmas(18)
    assert_close(s[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert_close(s ** (1 / 7), torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18, dtype=torch.float64))
    assert karras_sigmas(1).tolist() == [80.0]


def test_an_image_depends_on_its_seed_alone() -> None:
    student = make_student(tiny_net())
    whole = sample(student, 7, seed=10)
    assert_close(whole, sample(student, 7, seed=10, batch_size=3), rtol=1e-5, atol=1e-6)
    assert_close(whole[4:], sample(student, 3, seed=14), rtol=1e-5, atol=1e-6)
    assert whole.abs().max() <= 1
    teacher = tiny_net()
    assert_close(sample(teacher, 3, steps=3)[1:], sample(teacher, 2, steps=3, seed=1), rtol=1e-4, atol=1e-4)


def test_heun_calls_and_converges() -> None:
    """2n - 1 calls; on D(x) = x / (1 + sigma^2), the denoiser of N(0, 1) data, the ODE's solution is z sqrt(1 + s^2) scaled down."""
    net = tiny_net().double()
    calls = []

    class Gaussian(type(net)):  # type: ignore[misc]
        def forward(self, x, sigma, class_labels=None, augment_labels=None):  # type: ignore[no-untyped-def]
            calls.append(float(sigma))
            return x / (1 + sigma**2)

    net.__class__ = Gaussian
    z = latents(range(4), (1, 16, 16)).double()
    x = heun(net, z, num_steps=200)
    assert len(calls) == 399
    assert_close(x, z * 80 / (1 + 80**2) ** 0.5, rtol=1e-3, atol=1e-3)
    calls.clear()
    heun(net, z, num_steps=1)
    assert calls == [80.0]


def test_classes() -> None:
    net = make_student(tiny_net(label_dim=10))
    dealt = sample(net, 10, seed=3)
    assert_close(dealt, sample(net, 10, seed=3, class_labels=[(3 + i) % 10 for i in range(10)]))
    assert_close(sample(net, 2, class_labels=4), sample(net, 2, class_labels=torch.eye(10)[[4, 4]]))
    assert not torch.allclose(sample(net, 2, class_labels=4), sample(net, 2, class_labels=5))


def test_grid_pixels() -> None:
    x = torch.full((3, 1, 2, 2), -1.0)
    x[2] = 1.0
    grid = image_grid(x, columns=2, gap=0)
    assert grid.shape == (4, 4, 3)
    assert (grid[:2] == 0).all()
    assert (grid[2:, :2] == 255).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: sample(s, 0), "n=0"),
        (lambda s, t: sample(s, 2, steps=3), "steps=3"),
        (lambda s, t: sample(t, 2, steps=0), "steps=0"),
        (lambda s, t: sample(s, 2, class_labels=1), "unconditional"),
        (lambda s, t: karras_sigmas(4, sigma_min=0.0), "sigma_min=0.0"),
    ],
)
def test_refusals(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GddlabError, match=message):
        call(make_student(tiny_net()), tiny_net())
