"""`inpaint` and `restore`: known pixels stay, measurements are met, seeds reproduce, methods take their networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gddlab.editing import Operator, Restoration, downscale, inpaint, restoration, restore
from gddlab.editing.restoration import TRIED
from gddlab.editing.search import Search, colour
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond
from gddlab.nets.io import make_student
from gddlab.sampling import sample
from tests.conftest import tiny_net
from tests.nets.test_dit import tiny_dit

HALF = torch.ones(16, 16)
HALF[8:] = 0


@pytest.fixture(scope="module")
def student() -> OneStepPrecond:
    return make_student(tiny_net()).eval()


@pytest.fixture(scope="module")
def images(student: OneStepPrecond) -> torch.Tensor:
    return sample(student, 2, seed=30)


@pytest.mark.parametrize("method", ["optimise", "rounds", "teacher"])
def test_known_pixels_stay_and_completions_differ(method: str, images: torch.Tensor) -> None:
    net = tiny_net() if method == "teacher" else make_student(tiny_net(), mid_sigmas=(0.8,)).eval()
    found = inpaint(net, images, HALF, n=3, method=method, steps=4)
    assert found.images.shape == (2, 3, 1, 16, 16) and found.error.shape == (2, 3)
    assert all(torch.equal(found.images[:, k, :, :8], images[:, :, :8]) for k in range(3))
    assert (found.images[:, 0, :, 8:] - found.images[:, 1, :, 8:]).abs().mean() > 1e-4
    again = inpaint(net, images, HALF, n=3, method=method, steps=4, batch_size=2)
    assert_close(again.images, found.images, rtol=1e-3, atol=2e-3)
    other = inpaint(net, images, HALF, n=3, method=method, steps=4, seed=99)
    assert not torch.allclose(other.images, found.images)
    calls = {"optimise": 2 * (TRIED + 5), "rounds": 5, "teacher": 1 + 4 + 4 + 1}
    assert found.calls == calls[method]


def test_a_search_meets_what_is_known(student: OneStepPrecond, images: torch.Tensor) -> None:
    few, many = (inpaint(student, images, HALF, n=2, steps=steps) for steps in (3, 60))
    assert many.error.mean() < 0.5 * few.error.mean()
    masked = Operator(lambda x: x * HALF, lambda y: y * HALF)  # not put back into the result
    found = restore(student, masked.apply(images), masked, n=2, steps=60)
    expected = (found.images * HALF - (images * HALF)[:, None]).square().mean((2, 3, 4)).sqrt()
    assert_close(found.error, expected)
    assert_close(found.error * 2**0.5, many.error, rtol=0.02, atol=1e-3)  # of half as many
    assert_close(found.images[..., 8:, :], many.images[..., 8:, :], rtol=0.02, atol=0.02)


def test_a_search_begins_at_the_nearest_of_some_noise_and_stays_white(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_student(tiny_net(), mid_sigmas=(0.8,)).eval()
    tried = sample(net, 4 * TRIED, seed=8 * 7)  # of two images in two ways, with the noise of later steps
    away = (tried.unflatten(0, (2, 2, TRIED)) - images[:, None, None])[..., :8, :].square().mean((3, 4, 5)).sqrt()
    start = inpaint(net, images, HALF, n=2, steps=1, seed=7)
    assert_close(start.error, away.min(2).values, rtol=0.2, atol=0.02)  # one small step from there
    searches: list[Search] = []
    monkeypatch.setattr(restoration, "Search", lambda *a, **k: searches.append(Search(*a, **k)) or searches[-1])
    free = torch.ones(16, 16)
    free[1:] = 0  # little holds the search
    inpaint(net, images, free, n=8, steps=60)
    z, styles = searches[0].rows
    assert colour(z).mean() < 2 * colour(torch.randn(16, 1, 16, 16)).mean()
    assert 0.05 < styles.square().mean().sqrt() < 1


def test_styles_bring_a_search_nearer(
    student: OneStepPrecond, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inpaint(student, images, HALF, n=2, steps=20)
    monkeypatch.setattr(nn, "Linear", nn.Bilinear)  # a network that has no such layers
    assert found.error.mean() < 0.95 * inpaint(student, images, HALF, n=2, steps=20).error.mean()


def test_fewer_pixels_are_met_by_all_methods(images: torch.Tensor, student: OneStepPrecond) -> None:
    small = downscale(4).apply(images)
    found = restore(student, small, downscale(4), n=2, steps=60)
    away = downscale(4).apply(found.images.flatten(0, 1)).unflatten(0, (2, 2)) - small[:, None]
    assert found.error.mean() < 0.15 and away.abs().median() < 1e-5 and away.square().mean().sqrt() < 0.02
    loose = Operator(downscale(4).apply, downscale(4).adjoint, "downscale 4")
    found = restore(student, small, loose, n=2, steps=60)
    away = loose.apply(found.images.flatten(0, 1)).unflatten(0, (2, 2)) - small[:, None]
    assert_close(away.square().mean((2, 3, 4)).sqrt(), found.error, rtol=1e-3, atol=1e-5)
    assert found.operator == "downscale 4" and "Restoration of 2 x 2 images by 'optimise'" in repr(found)
    by_teacher = restore(tiny_net(), small, downscale(4), n=1, method="teacher", steps=6)
    assert by_teacher.images.shape == (2, 1, 1, 16, 16)


def test_a_mask_of_each_image(student: OneStepPrecond) -> None:
    images = sample(student, 3, seed=30)
    keep = torch.stack([HALF, 1 - HALF, HALF])[:, None]
    found = inpaint(student, images, keep, n=2, steps=2)
    whole = keep.bool()[:, None].expand_as(found.images)
    assert torch.equal(found.images[whole], images[:, None].expand_as(found.images)[whole])


def test_a_teacher_by_flow_matching(images: torch.Tensor) -> None:
    """Its levels are those of the sampler, which ends below pure noise."""
    pictures = images[..., :8, :8].repeat(1, 2, 1, 1)
    found = inpaint(tiny_dit(), pictures, torch.ones(8, 8).tril(), n=1, method="teacher", steps=3)
    assert found.images.isfinite().all() and found.calls == 1 + 4 + 1


def test_scores(student: OneStepPrecond, images: torch.Tensor) -> None:
    same = Restoration(images[:, None].repeat(1, 2, 1, 1, 1), torch.zeros(2, 2), "optimise", "pixels", 5, 0.1)
    row = same.scores(images).iloc[0]
    assert row["diversity"] == row["perceptual"] == row["pixels"] == row["pixels_best"] == 0
    assert row["images"] == 4 and row["calls"] == 5
    other = Restoration(torch.stack([images, -images], 1), torch.zeros(2, 2), "optimise", "pixels", 5, 0.1)
    row = other.scores(images).iloc[0]
    assert row["pixels_best"] == 0 and row["pixels"] == pytest.approx(
        images.square().mean((1, 2, 3)).sqrt().mean().item()
    )
    assert row["diversity"] > 0 and row["perceptual"] == pytest.approx(row["diversity"] / 2, rel=1e-3)
    assert "pixels" not in other.scores()
    with pytest.raises(GddlabError, match="truth has 1 images: give 2"):
        other.scores(images[:1])


def test_classes_are_kept(images: torch.Tensor) -> None:
    student = make_student(tiny_net(label_dim=3)).eval()
    with torch.no_grad():
        student.model.map_label.weight.mul_(20)
    a, b = (inpaint(student, images, HALF, n=1, steps=2, class_labels=c).images for c in (0, 2))
    assert not torch.allclose(a, b)
    assert inpaint(student, images, HALF, n=1, steps=2).images.shape == (2, 1, 1, 16, 16)


def test_refusals(student: OneStepPrecond, images: torch.Tensor) -> None:
    for call, text in (
        (lambda: inpaint(tiny_net(), images, HALF), "method='optimise' with a teacher: give a one-step student"),
        (lambda: inpaint(student, images, HALF, method="teacher"), "method='teacher' with a student: give a teacher"),
        (lambda: inpaint(student, images, HALF, method="rounds"), "student of one step: give one of several"),
        (lambda: inpaint(student, images, HALF, method="optimize"), "did you mean 'optimise'"),
        (lambda: inpaint(student, images, torch.ones(16, 16)), "nothing is missing of image 0"),
        (lambda: inpaint(student, images * 3, HALF), "give images in"),
        (lambda: inpaint(student, images, HALF, n=0), "n=0"),
        (lambda: inpaint(student, images, HALF, class_labels=1), "with an unconditional network"),
        (lambda: restore(student, images, downscale(4)), r"measured is \(2, 1, 16, 16\): give \(B, 1, 4, 4\)"),
        (lambda: restore(student, images[:, :, :4, :4] / 0, downscale(4)), "not finite"),
        (lambda: restore(student, images, Operator(lambda x: x, lambda y: 2 * y)), "is none"),
    ):
        with pytest.raises(GddlabError, match=text):
            call()
