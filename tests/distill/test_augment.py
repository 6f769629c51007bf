"""Augmentations: against plain per-image arithmetic; identity, independence, gradients, no waiting for the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gddlab.distill.augment import OPS, AugmentPipe
from gddlab.errors import GddlabError

ALL = ("color", "translation", "cutout", "bgc")


def images(n: int, channels: int = 3, size: int = 16, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1


def numbers(a: AugmentPipe, n: int, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, a.width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def normal(u: float) -> float:
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(u, dtype=torch.float64)).item()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_at_zero_and_change_at_one(name: str, channels: int, dtype: torch.dtype) -> None:
    a = AugmentPipe([name])
    x, u = images(32, channels, dtype=dtype), numbers(a, 32, dtype=dtype)
    for p in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert torch.equal(a(x, u, p), x)
    y = a(x, u)
    assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all()
    assert (y - x).abs().flatten(1).amax(1).count_nonzero() > 16


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_images_are_treated_alone(name: str, p: float) -> None:
    a = AugmentPipe([name])
    x, u = images(12), numbers(a, 12)
    whole = a(x, u, p)
    for cut in (1, 6):
        assert_close(torch.cat([a(x[:cut], u[:cut], p), a(x[cut:], u[cut:], p)]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients(name: str, channels: int) -> None:
    a = AugmentPipe([name])
    x, u = images(4, channels, 8).requires_grad_(True), numbers(a, 4, 2)
    assert torch.autograd.gradcheck(lambda x: a(x, u, 0.8), (x,))


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24, 1.0])
def test_extreme_numbers_give_finite_images_and_gradients(edge: float) -> None:
    a = AugmentPipe(ALL)
    x = images(2, dtype=torch.float32).requires_grad_(True)
    y = a(x, torch.full((2, a.width), edge))
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_color() -> None:
    a = AugmentPipe(["color"])
    x, u = images(8), numbers(a, 8)
    for image, (_, b, s, c), found in zip(x, u.tolist(), a(x, u), strict=True):
        y = image + b - 0.5
        grey = y.sum(0) / 3
        y = torch.stack([grey + 2 * s * (channel - grey) for channel in y])
        assert_close(found, (c + 0.5) * y + (0.5 - c) * y.mean())


def test_color_does_not_saturate_grey_images() -> None:
    a = AugmentPipe(["color"])
    x, u = images(4, 1), numbers(a, 4)
    other = u.clone()
    other[:, 2] = 1 - other[:, 2]
    assert_close(a(x, u), a(x, other))


def test_translation_shifts_by_whole_pixels_with_zeros_behind() -> None:
    a = AugmentPipe(["translation"])
    x, u = images(400), numbers(a, 400)
    seen = set()
    for image, (_, h, v), found in zip(x, u.tolist(), a(x, u), strict=True):
        dx, dy = math.floor(h * 5) - 2, math.floor(v * 5) - 2  # 16 / 8 = 2 pixels
        seen.add((dx, dy))
        assert torch.equal(found, F.pad(image, (2, 2, 2, 2))[:, 2 - dy : 18 - dy, 2 - dx : 18 - dx])
    assert len(seen) == 25


def test_numbers_rounded_to_one_stay_in_range() -> None:
    for name in ("translation", "cutout"):
        a = AugmentPipe([name])
        assert torch.equal(a(images(1), row(0, 1, 1)), a(images(1), row(0, 0.999, 0.999)))


@pytest.mark.parametrize("size", [16, 14])
def test_cutout_removes_a_square_of_half_the_size(size: int) -> None:
    a = AugmentPipe(["cutout"])
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
    a = AugmentPipe(["blit"])
    x, u = images(200), numbers(a, 200)
    for image, (_, flip, _, turn, _, h, v), found in zip(x, u.tolist(), a(x, u), strict=True):
        y = image.flip(2) if flip < 0.5 else image
        y = torch.rot90(y, -math.floor(4 * turn), (1, 2))
        dx, dy = math.floor(h * 5) - 2, math.floor(v * 5) - 2
        y = F.pad(y, (2, 2, 2, 2), mode="reflect")[:, 2 - dy : 18 - dy, 2 - dx : 18 - dx]
        assert torch.equal(found, y)


@pytest.mark.parametrize("size", [32, 256])
def test_blit_copies_pixels_in_float32(size: int) -> None:
    a = AugmentPipe(["blit"])
    x, u = images(4, 1, size, dtype=torch.float32), numbers(a, 4)
    assert torch.equal(a(x, u.float()).double(), a(x.double(), u.float().double()))


def test_geom_is_one_affine_map_in_the_papers_order() -> None:
    """On a linear ramp the warp must give the ramp at the place each pixel comes from, if that is well inside."""
    a = AugmentPipe(["geom"])
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
    a = AugmentPipe(["geom"])
    x = images(1)
    two = (
        torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([1.0, -0.5], dtype=torch.float64)).tolist()
    )  # 2, -1 pixels
    y = a(x, row(1, 0, 1, 0, 1, 0, 1, 0, 0, *two), 0.5)
    assert_close(y, F.pad(x, (2, 2, 2, 2), mode="reflect")[..., 3:19, 0:16], rtol=0, atol=1e-9)


def test_each_operation_has_its_own_probability() -> None:
    x = images(1)
    for name, gates in {"blit": (0, 2, 4), "geom": (0, 2, 4, 6, 8), "ada-color": (0, 2, 4, 6, 8)}.items():
        a = AugmentPipe([name])
        for gate in gates:
            u = torch.full((1, a.width), 0.3, dtype=torch.float64)
            u[:, list(gates)] = 0.9
            assert torch.equal(a(x, u, 0.75), x)
            u[:, gate] = 0.6  # rotations: 1 - sqrt(1 - 0.75) = 0.5
            assert torch.equal(a(x, u, 0.75), x) == (name == "geom" and gate in (2, 6))
            u[:, gate] = 0.45
            assert not torch.equal(a(x, u, 0.75), x)


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
    a = AugmentPipe(["ada-color"])
    x, u = images(8), numbers(a, 8)
    for image, values, found in zip(x, u[:, 1::2].tolist(), a(x, u), strict=True):
        m = matrices(*values)
        y = (m[:3, :3] @ image.flatten(1).numpy() + m[:3, 3:]).reshape(3, 16, 16)
        assert_close(found, torch.from_numpy(y))


def test_grey_images_are_treated_as_equal_channels() -> None:
    a = AugmentPipe(["bgc"])
    x, u = images(8, 1), numbers(a, 8)
    assert_close(a(x, u).expand(-1, 3, -1, -1), a(x.expand(-1, 3, -1, -1).contiguous(), u))


def test_operations_follow_the_given_order() -> None:
    x = images(8)
    first, second = AugmentPipe(["cutout"]), AugmentPipe(["color"])
    both, other = AugmentPipe(["cutout", "color"]), AugmentPipe(["color", "cutout"])
    u = numbers(both, 8)
    assert both.width == first.width + second.width
    chained = second(first(x, u[:, : first.width]), u[:, first.width :])
    assert torch.equal(both(x, u), chained)
    assert not torch.equal(other(x, u.roll(second.width, 1)), chained)
    assert AugmentPipe(["bgc"]).ops == ("blit", "geom", "ada-color")


def test_autocast_does_not_reach_in() -> None:
    a = AugmentPipe(ALL)
    x, u = images(4, dtype=torch.float32), numbers(a, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = a(x, u)
    assert torch.equal(found, a(x, u))


def test_the_host_never_waits() -> None:
    """A fake tensor has no values: reading one on the host raises."""
    import kornia.geometry.transform  # noqa: F401 - outside, or its constants would be fake too
    from torch._subclasses.fake_tensor import FakeTensorMode

    a = AugmentPipe(ALL)
    with FakeTensorMode():
        x, u = torch.empty(4, 3, 16, 16), torch.empty(4, a.width)
        assert a(x, u, torch.empty((), dtype=torch.float64)).shape == x.shape


def test_bad_input_is_refused() -> None:
    a = AugmentPipe(["color"])
    x, u = images(2), numbers(a, 2)
    with pytest.raises(GddlabError, match="unknown augmentation 'colour': did you mean 'color'"):
        AugmentPipe(["colour"])
    with pytest.raises(GddlabError, match="'blit' is there twice"):
        AugmentPipe(["blit", "bgc"])
    with pytest.raises(GddlabError, match=r"\(2, 3, 16, 8\).*square"):
        a(x[..., :8], u)
    with pytest.raises(GddlabError, match=r"2 images need \(2, 4\)"):
        a(x, u[:, :3])
    with pytest.raises(GddlabError, match="float64"):
        a(x, u.float())
    with pytest.raises(GddlabError, match=r"p=1\.5"):
        a(x, u, 1.5)
