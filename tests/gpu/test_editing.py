"""Inversion, inpainting and edits of a card against the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.editing import directions, downscale, edit, inpaint, invert, restore
from gddlab.nets import OneStepPrecond
from gddlab.nets.io import make_student
from gddlab.sampling import sample
from tests.conftest import tiny_net

pytestmark = pytest.mark.gpu


def students() -> tuple[OneStepPrecond, OneStepPrecond]:
    return make_student(tiny_net()).eval(), make_student(tiny_net()).eval().cuda()


def test_searches_of_a_card_are_the_cpus() -> None:
    cpu, card = students()
    images = sample(cpu, 3, seed=5)
    how: dict[str, Any] = {"steps": 5, "restarts": 2}
    assert_close(invert(card, images, **how).images, invert(cpu, images, **how).images, rtol=0.01, atol=0.01)
    assert_close(
        inpaint(card, images, "top", steps=5).images, inpaint(cpu, images, "top", steps=5).images, rtol=0.01, atol=0.01
    )
    small = downscale(4).apply(images)
    ours, theirs = (restore(net, small, downscale(4), n=2, steps=5).images for net in (card, cpu))
    assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_precisions_and_compiled_students() -> None:
    _, card = students()
    images = sample(card, 3, seed=5)
    exact = invert(card, images, steps=20, restarts=1)
    rough = invert(card, images, steps=20, restarts=1, dtype=torch.bfloat16)
    compiled = invert(torch.compile(card), images, steps=20, restarts=1)
    assert rough.distance.mean() < 3 * exact.distance.mean() + 0.02
    assert_close(compiled.distance, exact.distance, rtol=0.05, atol=0.01)


def test_edits_of_a_card_are_the_cpus() -> None:
    cpu, card = students()
    found = [edit(net, [0, 1], towards=[8, 9], strength=[0.5, 1]).images for net in (card, cpu)]
    assert_close(*found, rtol=0.01, atol=0.01)
    layer = "model.dec.16x16_block0"
    ours, theirs = (directions(net, layer, k=2, n=16) for net in (card, cpu))
    assert_close(ours.std, theirs.std, rtol=0.01, atol=1e-4)
    found = [edit(net, [0], direction=d[0], strength=2).images for net, d in ((card, ours), (cpu, theirs))]
    assert_close(*found, rtol=0.02, atol=0.02)
