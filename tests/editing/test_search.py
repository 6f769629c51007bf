"""The search for noise, spherical interpolation, and what the student's images are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from gddlab.editing.search import RAMP, Generator, Search, Styles, check_images, colour, on_shell, slerp
from gddlab.errors import GddlabError
from gddlab.nets.io import make_student
from gddlab.sampling import sample
from tests.conftest import tiny_net

SHAPE = (1, 16, 16)


def test_the_shell_has_length_sqrt_d() -> None:
    z = 3 * torch.randn(4, *SHAPE)
    assert_close(on_shell(z).flatten(1).norm(dim=1), torch.full((4,), 16.0))


def test_slerp_keeps_angles_even_and_meets_its_ends() -> None:
    a, b = torch.randn(3, *SHAPE, dtype=torch.float64), torch.randn(3, *SHAPE, dtype=torch.float64)
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1)).acos()

    assert_close(angle(a, slerp(a, b, 0.25)), angle(a, b) / 4)
    assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)  # on one ray: a straight line


@pytest.mark.parametrize("mids", [(), (0.8,)])
def test_a_generator_makes_what_sample_draws(mids: tuple[float, ...]) -> None:
    student = make_student(tiny_net(), mid_sigmas=mids).eval()
    make = Generator(student)
    z, later = make.noise(range(5, 8))
    with torch.no_grad():
        found = make(z, None, later).clamp(-1, 1)
    assert_close(found, sample(student, 3, seed=5), rtol=1e-5, atol=1e-6)
    assert make.calls == 1 + len(mids)


def test_adam_row_by_row_is_torchs() -> None:
    """With the shell left out of the loss; the rows do not know of each other."""
    torch.manual_seed(0)
    z = on_shell(torch.randn(2, *SHAPE))
    goal = on_shell(torch.randn(2, *SHAPE))
    search = Search(z, steps=60)
    alone = Search(z[1:], steps=60)
    search.run(lambda x: (x - goal).square().mean((1, 2, 3)), 60)
    alone.run(lambda x: (x - goal[1:]).square().mean((1, 2, 3)), 60)
    assert_close(search.z[1:], alone.z)
    assert (search.z - goal).square().mean() < 0.3 * (z - goal).square().mean()
    assert_close(search.z.flatten(1).norm(dim=1), torch.full((2,), 16.0))
    # one step of a fresh search moves each coordinate by the rate of that step
    one = Search(z, steps=100, lr=0.5)
    one.run(lambda x: (x - goal).square().mean((1, 2, 3)), 1)
    assert math.isclose((one.z - z).abs().median().item(), 0.5 / RAMP, rel_tol=0.1)


@pytest.mark.parametrize("labels", [0, 3])
def test_styles_are_vectors_that_each_row_adds_for_itself(labels: int) -> None:
    student = make_student(tiny_net(label_dim=labels)).eval()
    make, styles = Generator(student), Styles(student)
    z, _ = make.noise(range(3))
    rows = make.one_hot(torch.arange(3) if labels else None)
    with torch.no_grad():
        with styles.seen():
            plain = make(z, rows)
        names = {name for name, module in student.named_modules() if module in styles.units}
        assert {"model.map_layer0", "model.map_layer1", "model.dec.8x8_in0.affine"} <= names
        assert ("model.map_label" in names) == bool(labels) and not any("qkv" in name for name in names)
        own = styles.zeros(z)
        with styles.added(own):
            assert torch.equal(make(z, rows), plain)
        own[1] += torch.randn(own.shape[1], generator=torch.Generator().manual_seed(0))
        with styles.added(own):
            moved = make(z, rows)
        assert_close(moved[[0, 2]], plain[[0, 2]])
        assert (moved[1] - plain[1]).square().mean() > 1e-4
        assert torch.equal(make(z, rows), plain)


def test_images_are_refused_in_one_line() -> None:
    good = torch.zeros(2, *SHAPE)
    assert check_images("images", good[0], SHAPE).shape == (1, *SHAPE)
    for bad, text in (
        (good.repeat(1, 3, 1, 1), r"images is \(2, 3, 16, 16\): give \(B, 1, 16, 16\)"),
        (good + 2, "values from 2 to 2: give images in"),
        (good * math.nan, "give images in"),
        (good.byte(), "images is a torch.uint8: give a float tensor"),
        ("digits", "images is a str: give a float tensor"),
    ):
        with pytest.raises(GddlabError, match=text):
            check_images("images", bad, SHAPE)


def test_white_noise_has_no_colour() -> None:
    white = torch.randn(64, 3, 32, 32)
    assert colour(white).mean() < 0.1
    smooth = on_shell(torch.nn.functional.avg_pool2d(white, 3, 1, 1))
    assert (colour(smooth) > 0.2).all()
    coarse = on_shell(torch.nn.functional.avg_pool2d(white, 8).repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert (colour(coarse) > 1).all()
    striped = on_shell(white + torch.arange(32).remainder(2)[:, None].mul(2.0).sub(1))
    assert (colour(striped) > 0.2).all()
    assert colour(torch.randn(1, 1, 3, 5)).shape == (1,)
