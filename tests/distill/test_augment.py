"""Augmentations: against plain per-image arithmetic; identity, independence, gradients, no waiting for the device."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gddlab.distill.augment import OPS, Augment, Augmentation
from gddlab.errors import GddlabError

ALL = ("color", "translation", "cutout", "bgc")


def made(*ops: str) -> Augmentation:
    return Augmentation(Augment(ops=ops))


def at(a: Augmentation, p: float | Tensor) -> Augmentation:
    b = copy.copy(a)
    b.p = p
    return b


def images(n: int, channels: int = 3, size: int = 16, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1


def numbers(a: Augmentation, n: int, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, a.width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def normal(u: float) -> float:
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(u, dtype=torch.float64)).item()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_at_zero_and_change_at_one(name: str, channels: int, dtype: torch.dtype) -> None:
    a = made(name)
    x, u = images(32, channels, dtype=dtype), numbers(a, 32, dtype=dtype)
    for p in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert torch.equal(at(a, p)(x, u), x)
    y = a(x, u)
    assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all()
    assert (y - x).abs().flatten(1).amax(1).count_nonzero() > 16


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_images_are_treated_alone(name: str, p: float) -> None:
    a = made(name)
    x, u = images(12), numbers(a, 12)
    whole = at(a, p)(x, u)
    for cut in (1, 6):
        assert_close(torch.cat([at(a, p)(x[:cut], u[:cut]), at(a, p)(x[cut:], u[cut:])]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients(name: str, channels: int) -> None:
    a = made(name)
    x, u = images(4, channels, 8).requires_grad_(True), numbers(a, 4, 2)
    assert torch.autograd.gradcheck(lambda x: at(a, 0.8)(x, u), (x,))


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24, 1.0])
def test_extreme_numbers_give_finite_images_and_gradients(edge: float) -> None:
    a = made(*ALL)
    x = images(2, dtype=torch.float32).requires_grad_(True)
    y = a(x, torch.full((2, a.width), edge))
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_color() -> None:
    a = made("color")
    x, u = images(8), numbers(a, 8)
    for image, (_, b, s, c), found in zip(x, u.tolist(), a(x, u), strict=True):
        y = image + b - 0.5
        grey = y.sum(0) / 3
        y = torch.stack([grey + 2 * s * (channel - grey) for channel in y])
        assert_close(found, (c + 0.5) * y + (0.5 - c) * y.mean())


def test_color_does_not_saturate_grey_images() -> None:
    a = made("color")
    x, u = images(4, 1), numbers(a, 4)
    other = u.clone()
    other[:, 2] = 1 - other[:, 2]
    assert_close(a(x, u), a(x, other))


def test_translation_shifts_by_whole_pixels_with_zeros_behind() -> None:
    a = made("translation")
    x, u = images(400), numbers(a, 400)
    seen = set()
    for image, (_, h, v), found in zip(x, u.tolist(), a(x, u), strict=True):
        dx, dy = math.floor(h * 5) - 2, math.floor(v * 5) - 2  # 16 / 8 = 2 pixels
        seen.add((dx, dy))
        assert torch.equal(found, F.pad(image, (2, 2, 2, 2))[:, 2 - dy : 18 - dy, 2 - dx : 18 - dx])
    assert len(seen) == 25


def test_numbers_rounded_to_one_stay_in_range() -> None:
    for name in ("translation", "cutout"):
        a = made(name)
        assert torch.equal(a(images(1), row(0, 1, 1)), a(images(1), row(0, 0.999, 0.999)))


@pytest.mark.parametrize("size", [16, 14])
def test_cutout_removes_a_square_of_half_the_size(size: int) -> None:
    a = made("cutout")
    x, u = images(600, size=size), numbers(a, 600)
    hole = (a(x, u) == 0).all(1)  # (B, R, R)
    assert torch.equal(a(x, u), x.masked_fill(hole[:, None], 0))
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert side.sum(1).max() == size // 2
        assert side.sum(1).min() == size // 4 + (size // 2) % 2  # centred on the border
        often = side.double().mean(0)
        assert_close(often, often.flip(0), rtol=0, atol=0.1)
        assert 0.2 < often[0] < 0.4 and often[size // 2] > 0.4


def test_blit_copies_pixels() -> None:
    a = made("blit")
    x, u = images(200), numbers(a, 200)
    for image, (_, flip, _, turn, _, h, v), found in zip(x, u.tolist(), a(x, u), strict=True):
        y = image.flip(2) if flip < 0.5 else image
        y = torch.rot90(y, -math.floor(4 * turn), (1, 2))
        dx, dy = math.floor(h * 5) - 2, math.floor(v * 5) - 2
        y = F.pad(y, (2, 2, 2, 2), mode="reflect")[:, 2 - dy : 18 - dy, 2 - dx : 18 - dx]
        assert torch.equal(found, y)


@pytest.mark.parametrize("size", [32, 256])
def test_blit_copies_pixels_in_float32(size: int) -> None:
    a = made("blit")
    x, u = images(4, 1, size, dtype=torch.float32), numbers(a, 4)
    assert torch.equal(a(x, u.float()).double(), a(x.double(), u.float().double()))


def test_geom_is_one_affine_map_in_the_papers_order() -> None:
    """On a linear ramp the warp must give the ramp at the place each pixel comes from, if that is well inside."""
    a = made("geom")
    size, k = 64, 31.5
    x = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")).double()  # x, y of pixels
    ramp = torch.stack([x[0], x[1], x[1]])[None]
    u = numbers(a, 20, 3)
    found = a(ramp.expand(20, -1, -1, -1), u)
    compared = 0
    for (_, s, _, r1, _, an, _, r2, _, h, v), y in zip(u.tolist(), found, strict=True):
        scale, stretch = 2 ** (0.2 * normal(s)), 2 ** (0.2 * normal(an))

        def rotate(u: float) -> np.ndarray:
            t = (2 * u - 1) * math.pi
            return np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])

        m = rotate(r2) @ np.diag([stretch, 1 / stretch]) @ rotate(r1) * scale
        shift = np.array([normal(h), normal(v)]) * size / 8
        inverse = np.linalg.inv(m)
        origin = torch.from_numpy(inverse @ (x.numpy().reshape(2, -1) - k - shift[:, None]) + k).reshape(2, size, size)
        inside = ((origin > 2) & (origin < size - 3)).all(0)
        compared += int(inside.sum())
        assert_close(y[:2, inside], origin[:, inside], rtol=0, atol=0.06)  # torch's cubic bends a ramp that much
    assert compared > 20 * 1000


def test_geom_reflects_about_the_border_pixels() -> None:
    a = made("geom")
    x = images(1)
    two = (
        torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([1.0, -0.5], dtype=torch.float64)).tolist()
    )  # 2, -1 pixels
    y = at(a, 0.5)(x, row(1, 0, 1, 0, 1, 0, 1, 0, 0, *two))
    assert_close(y, F.pad(x, (2, 2, 2, 2), mode="reflect")[..., 3:19, 0:16], rtol=0, atol=1e-9)


def test_each_operation_has_its_own_probability() -> None:
    x = images(1)
    for name, gates in {"blit": (0, 2, 4), "geom": (0, 2, 4, 6, 8), "ada-color": (0, 2, 4, 6, 8)}.items():
        a = made(name)
        for gate in gates:
            u = torch.full((1, a.width), 0.3, dtype=torch.float64)
            u[:, list(gates)] = 0.9
            assert torch.equal(at(a, 0.75)(x, u), x)
            u[:, gate] = 0.6  # rotations: 1 - sqrt(1 - 0.75) = 0.5
            assert torch.equal(at(a, 0.75)(x, u), x) == (name == "geom" and gate in (2, 6))
            u[:, gate] = 0.45
            assert not torch.equal(at(a, 0.75)(x, u), x)


def matrices(b: float, c: float, f: float, h: float, s: float) -> np.ndarray:
    """The product of appendix B's 4x4 colour matrices, brightness first."""
    axis = np.ones(3) / math.sqrt(3)
    grey = np.outer(axis, axis)
    cross = np.cross(axis, np.eye(3)).T
    t = (2 * h - 1) * math.pi
    parts = [np.eye(4) for _ in range(5)]
    parts[0][:3, 3] = 0.2 * normal(b)
    parts[1][:3, :3] *= 2 ** (0.5 * normal(c))
    parts[2][:3, :3] -= 2 * grey * (f < 0.5)
    parts[3][:3, :3] = math.cos(t) * np.eye(3) + math.sin(t) * cross + (1 - math.cos(t)) * grey
    parts[4][:3, :3] = grey + (np.eye(3) - grey) * 2 ** normal(s)
    out = np.eye(4)
    for part in parts:
        out = part @ out
    return out


def test_ada_color_is_the_product_of_the_papers_matrices() -> None:
    a = made("ada-color")
    x, u = images(8), numbers(a, 8)
    for image, values, found in zip(x, u[:, 1::2].tolist(), a(x, u), strict=True):
        m = matrices(*values)
        y = (m[:3, :3] @ image.flatten(1).numpy() + m[:3, 3:]).reshape(3, 16, 16)
        assert_close(found, torch.from_numpy(y))


def test_grey_images_are_treated_as_equal_channels() -> None:
    a = made("bgc")
    x, u = images(8, 1), numbers(a, 8)
    assert_close(a(x, u).expand(-1, 3, -1, -1), a(x.expand(-1, 3, -1, -1).contiguous(), u))


def test_operations_follow_the_given_order() -> None:
    x = images(8)
    first, second = made("cutout"), made("color")
    both, other = made("cutout", "color"), made("color", "cutout")
    u = numbers(both, 8)
    assert both.width == first.width + second.width
    chained = second(first(x, u[:, : first.width]), u[:, first.width :])
    assert torch.equal(both(x, u), chained)
    assert not torch.equal(other(x, u.roll(second.width, 1)), chained)
    assert made("bgc").ops == ("blit", "geom", "ada-color")


def test_autocast_does_not_reach_in() -> None:
    a = made(*ALL)
    x, u = images(4, dtype=torch.float32), numbers(a, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = a(x, u)
    assert torch.equal(found, a(x, u))


def test_the_host_never_waits() -> None:
    """A fake tensor has no values: reading one on the host raises."""
    import kornia.geometry.transform  # noqa: F401 - outside, or its constants would be fake too
    from torch._subclasses.fake_tensor import FakeTensorMode

    a = made(*ALL)
    with FakeTensorMode():
        x, u = torch.empty(4, 3, 16, 16), torch.empty(4, a.width)
        assert at(a, torch.empty((), dtype=torch.float64))(x, u).shape == x.shape
        controlled(0.6).observe(torch.empty(()), 64)


def test_bad_input_is_refused() -> None:
    with pytest.raises(GddlabError, match="unknown augmentation 'colour': did you mean 'color'"):
        Augment(ops=("colour",))
    with pytest.raises(GddlabError, match="'blit' is there twice"):
        Augment(ops=("blit", "bgc"))
    with pytest.raises(GddlabError, match="give at least one operation"):
        Augment(ops=())


# ADA's controller: its speed, its bounds, where it settles, and its state.


def controlled(target: float, kimg: float = 500, **how: Any) -> Augmentation:
    return Augmentation(Augment(ada_target=target, ada_kimg=kimg), **how)


def run(c: Augmentation, values: list[float], batch: int = 256) -> list[float]:
    """Probabilities after each iteration with these mean signs."""
    seen = []
    for v in values:
        c.observe(torch.tensor(v, dtype=torch.float32), batch)
        seen.append(float(c.p))
    return seen


def test_p_goes_from_zero_to_one_in_the_given_number_of_images_and_back() -> None:
    c = controlled(0.6)
    up = run(c, [1.0] * 500, batch=1000)
    assert_close(up[3::4], [(i + 1) * 0.008 for i in range(125)])
    assert_close(up[249], 0.496)  # 248 of the 250 iterations were counted by a step
    assert up[498] < 1 and up[499] == 1
    assert run(c, [1.0] * 8, batch=1000)[-1] == 1
    down = run(c, [0.0] * 504, batch=1000)
    assert down[0] == 1 and down[3] == pytest.approx(0.992) and down[-1] == 0


def test_a_step_every_interval_by_the_mean_of_the_signs() -> None:
    c = controlled(0.6, 1.024)
    assert run(c, [1.0, 1.0, 0.3, 0.2], 64) == [0, 0, 0, 0.25]  # mean 0.625
    assert run(c, [1.0, 1.0, 0.3, 0.0], 64) == [0.25, 0.25, 0.25, 0]  # mean 0.575: the last interval is forgotten
    assert run(controlled(0.5), [0.5] * 8) == [0] * 8


def test_p_settles_where_the_signs_meet_the_target() -> None:
    c = controlled(0.6)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.05
    seen = []
    for n in noise:
        c.observe(0.9 - 0.75 * c.p + n, 1000)  # meets 0.6 at p = 0.4
        seen.append(float(c.p))
    assert all(abs(p - 0.4) < 0.06 for p in seen[400:])
    assert sum(seen[400:]) / 1600 == pytest.approx(0.4, abs=0.01)


def test_state_in_mid_interval_continues_bit_for_bit() -> None:
    values = torch.rand(203, generator=torch.Generator().manual_seed(1)).tolist()
    whole, first, second = (controlled(0.5, 20) for _ in range(3))
    p = second.p
    expected = run(whole, values)
    run(first, values[:102])
    assert first.count.item() == 2
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert sorted(state) == ["count", "p", "sum"]
    second.load_state_dict(state)
    assert run(second, values[102:]) == expected[102:]
    assert second.p is p  # the same tensor throughout
    assert len(set(expected)) > 5
    for k, v in controlled(0.5).state_dict().items():  # the same form at every step
        assert v.shape == state[k].shape == () and v.dtype == state[k].dtype == torch.float64
    assert not made("color").state_dict()


def test_means_over_processes_are_taken_by_the_given_function() -> None:
    for target, p in ((0.6, 0.0), (0.4, 0.4)):
        c = controlled(target, 1, mean=lambda t: (t + 0.0) / 2)  # the other process saw zeros
        assert run(c, [1.0] * 4, 100)[-1] == p


def test_signs_that_are_no_number_leave_p_as_it_stands() -> None:
    c = controlled(0.6, 1)
    assert run(c, [1.0] * 4 + [float("nan")] * 4 + [1.0] * 4, 100)[3::4] == [0.4, 0.4, 0.8]
