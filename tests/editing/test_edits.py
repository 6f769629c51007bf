"""`edit` and `directions`: ends of each edit, layers that see it, principal components."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gddlab.editing import Direction, directions, edit, invert
from gddlab.editing.search import Generator
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond
from gddlab.nets.io import make_student
from gddlab.probing.effects import keep, tapped
from gddlab.sampling import sample
from tests.conftest import tiny_net

LAYER = "model.dec.16x16_block0"


@pytest.fixture(scope="module")
def student() -> OneStepPrecond:
    return make_student(tiny_net()).eval()


def test_towards_others(student: OneStepPrecond) -> None:
    found = edit(student, [0, 1], towards=[8, 9], strength=[0, 0.5, 1], batch_size=1)
    assert found.images.shape == (2, 3, 1, 16, 16) and found.strengths == (0, 0.5, 1)
    a, b = sample(student, 2, seed=0), sample(student, 2, seed=8)
    assert_close(found.images[:, 0], a, rtol=1e-4, atol=1e-5)
    assert_close(found.images[:, 2], b, rtol=1e-4, atol=1e-5)
    assert_close(found.before, a, rtol=1e-4, atol=1e-5)
    assert_close(
        found.z[:, 1].flatten(1).norm(dim=1),
        0.5 * (found.z[:, 0] + 0 * found.z[:, 2]).flatten(1).norm(dim=1) + 0.5 * found.z[:, 2].flatten(1).norm(dim=1),
    )


def test_an_inversion_and_images_are_sources(student: OneStepPrecond) -> None:
    images = sample(student, 1, seed=4)
    inverted = invert(student, images, steps=5, restarts=1)
    found = edit(student, inverted, towards=[3], strength=0)
    assert_close(found.images[:, 0], inverted.images, rtol=1e-4, atol=1e-5)
    assert edit(student, images, towards=[3], strength=0, progress=False).images.shape == (1, 1, 1, 16, 16)


def test_layers_that_see_an_edit(student: OneStepPrecond) -> None:
    whole = edit(student, [0], towards=[9], layers=["model.dec.16x16_aux_conv"], strength=[0, 1])
    a, b = sample(student, 1, seed=0), sample(student, 1, seed=9)
    assert_close(whole.images[:, 0], a, rtol=1e-4, atol=1e-5)
    assert_close(whole.images[:, 1], b, rtol=0, atol=0.02)  # all but c_skip x comes from the last layer
    part = edit(student, [0], towards=[9], layers=[LAYER]).images[:, 0]
    assert not torch.allclose(part, a, atol=1e-3) and not torch.allclose(part, b, atol=1e-3)


def test_another_class_for_the_same_noise() -> None:
    student = make_student(tiny_net(label_dim=3)).eval()
    with torch.no_grad():
        student.model.map_label.weight.mul_(20)
    found = edit(student, [0, 1], class_labels=[2, 2], strength=[0, 1])
    assert_close(found.images[:, 0], sample(student, 2, seed=0), rtol=1e-4, atol=1e-5)
    assert_close(found.images[:, 1], sample(student, 2, seed=0, class_labels=2), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.z[:, 0], found.z[:, 1])
    assert torch.equal(found.images[:, 0], found.before)


def test_strokes_are_carried_into_what_the_student_makes(student: OneStepPrecond) -> None:
    before, goal = sample(student, 1, seed=0), sample(student, 1, seed=5)
    found = edit(student, [0], strokes=goal, strength=[0, 1])
    assert_close(found.images[:, 0], before, rtol=1e-4, atol=1e-5)
    assert (found.images[:, 1] - goal).square().mean() < 0.2 * (before - goal).square().mean()


def test_directions_are_principal_components(student: OneStepPrecond) -> None:
    found = directions(student, LAYER, k=3, n=24, batch_size=7)
    kept: dict[str, torch.Tensor] = {}
    with torch.no_grad(), tapped(student, {LAYER: keep(kept)}, 24):
        z = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(s)) for s in range(24)])
        student.generate(z)
    x = kept[LAYER].flatten(1).double()
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert_close(found.mean.flatten().double(), x.mean(0), rtol=1e-4, atol=1e-5)
    assert_close(found.std.double(), s[:3] / 23**0.5, rtol=1e-4, atol=1e-6)
    assert_close(found.share.double(), s[:3] ** 2 / (s**2).sum(), rtol=1e-4, atol=1e-6)
    assert_close((found.vectors.flatten(1).double() * v[:3]).sum(1).abs(), torch.ones(3).double(), rtol=1e-4, atol=1e-4)
    assert len(found) == 3 and "3 directions at 'model.dec.16x16_block0' from 24 images" in repr(found)
    with pytest.raises(IndexError, match="direction 3: there are 3"):
        found[3]


def test_along_a_direction(student: OneStepPrecond) -> None:
    one = directions(student, LAYER, k=1, n=8)[0]
    found = edit(student, [0, 1], direction=one, strength=[-1, 0, 1])
    assert_close(found.images[:, 1], sample(student, 2, seed=0), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), tapped(student, {LAYER: lambda x: x + one.vector}, 2):
        z = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(s)) for s in range(2)])
        expected = student.generate(z).clamp(-1, 1)
    assert_close(found.images[:, 2], expected, rtol=1e-4, atol=1e-5)
    own = edit(student, [0], direction=Direction(LAYER, torch.zeros(1, 1, 1)))
    assert_close(own.images[:, 0], own.before)


def test_a_student_of_two_steps() -> None:
    """A direction acts in the first step; layers that see an edit see it in both."""
    two = make_student(tiny_net(), mid_sigmas=(0.8,)).eval()
    a = sample(two, 1, seed=0)
    whole = edit(two, [0], towards=[9]).images[:, 0]  # with the later noise of the source
    last = edit(two, [0], towards=[9], layers=["model.dec.16x16_aux_conv"], strength=[0, 1]).images
    assert_close(last[:, 0], a, rtol=1e-4, atol=1e-5)
    assert_close(last[:, 1], whole, rtol=0, atol=0.02)
    assert (whole - a).abs().mean() > 0.02
    vector = torch.ones(1, 1, 1)
    found = edit(two, [0], direction=Direction(LAYER, vector)).images[:, 0]
    make = Generator(two)
    z, later = make.noise([0])
    with torch.no_grad():
        expected = make(z, None, later, [tapped(two, {LAYER: lambda x: x + 1})]).clamp(-1, 1)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, a, atol=1e-3)
    assert directions(two, LAYER, k=2, n=8).n == 8


def test_refusals(student: OneStepPrecond) -> None:
    images = torch.zeros(2, 1, 16, 16)
    for call, text in (
        (lambda: edit(student, [0]), "no edit given: give one of class_labels, towards, strokes, direction"),
        (lambda: edit(student, [0], towards=[1], strokes=images), "towards and strokes given: give one of"),
        (lambda: edit(student, [0], towards=[1, 2]), "towards has 2 images and source 1: give as many"),
        (lambda: edit(student, [0], strokes=images), "strokes has 2 images and source 1"),
        (lambda: edit(student, [0], class_labels=1), "with an unconditional network"),
        (lambda: edit(student, "digits", towards=[1]), "'digits' is no source: give a list of seeds"),
        (lambda: edit(student, [0], towards=[1], strength="much"), "strength='much': give a number"),
        (lambda: edit(student, [0], strokes=images[:1], layers=[LAYER]), "layers= with strokes"),
        (
            lambda: edit(student, [0], direction=Direction("model.dec.16x16_blok0", torch.zeros(1))),
            "model.dec.16x16_blo",
        ),
        (lambda: directions(student, "model.enc.*"), "give the name of one"),
        (
            lambda: directions(student, "model.map_layer0", k=2, n=4),
            "k=2 directions of 'model.map_layer0': its outputs for 4 images vary in 0 alone",
        ),
        (lambda: directions(student, LAYER, k=8, n=8), "n=8 images for k=8 directions: give more than 8"),
    ):
        with pytest.raises(GddlabError, match=text):
            call()
