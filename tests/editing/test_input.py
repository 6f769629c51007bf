"""What searches and edits are given: bad input is one line, and the caller's modes of torch do no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gddlab
from gddlab.editing import Direction, Operator, blur, downscale
from gddlab.errors import GddlabError
from gddlab.files import write_json
from gddlab.nets.io import make_student
from tests.conftest import tiny_net

STUDENT = make_student(tiny_net()).eval()
IMAGES = gddlab.sample(STUDENT, 2, seed=5, progress=False)
LAYER = "model.dec.8x8_in0"
SAME = Operator(lambda x: x, lambda y: y)


def moved(vector: Any) -> Any:
    return gddlab.edit(STUDENT, [0, 1], direction=Direction(LAYER, vector))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "seed": (lambda: gddlab.inpaint(STUDENT, IMAGES, "top", seed=2**63), "seed=9223372036854775808: input should be"),
    "last seed": (lambda: gddlab.inpaint(STUDENT, IMAGES, "top", seed=2**32 - 2), "seed=4294967294 for 8 images"),
    "seed of an inversion": (lambda: gddlab.invert(STUDENT, IMAGES, seed=2**32 - 2), "seed=4294967294 for 4 images"),
    "lr": (lambda: gddlab.invert(STUDENT, IMAGES, lr=float("inf")), "lr=inf: input should be less"),
    "perceptual": (lambda: gddlab.invert(STUDENT, IMAGES, perceptual=1e300), r"perceptual=1e\+300: input should be"),
    "measured": (lambda: gddlab.restore(STUDENT, IMAGES * 1e30, SAME), r"or above 1e\+15: give finite float"),
    "strength": (lambda: gddlab.edit(STUDENT, [0], towards=[1], strength=1e30), r"1e\+30: give numbers of at most"),
    "large strength": (lambda: gddlab.edit(STUDENT, [0], towards=[1], strength=10**400), "strength=.*: give a number"),
    "one seed": (lambda: gddlab.edit(STUDENT, torch.tensor(3), towards=[1]), r"tensor\(3\) is one number"),
    "vector": (lambda: moved(torch.zeros(7)), r"direction.vector is \(7,\): the output of 'model.dec.8x8_in0' is \("),
    "no vector": (lambda: moved(None), "direction.vector is None: give a float tensor"),
    "NaN": (lambda: moved(torch.full((1,), float("nan"))), "give a float tensor of finite numbers"),
    "writes": (lambda: Operator(lambda v: v.mul_(0.5), lambda y: y.mul_(7)).check((1, 8, 8)), "adjoint .* is none"),
    "no gradient": (lambda: Operator(lambda v: v.detach(), lambda y: y).check((1, 8, 8)), "has no gradient"),
    "mixed rows": (lambda: Operator(lambda v: v.flip(0), lambda y: y.flip(0)).check((1, 8, 8)), "treat each row alone"),
    "blur": (lambda: blur(float("inf")), "std=inf: input should be"),
    "downscale": (lambda: downscale(3).apply(IMAGES), r"downscale 3 of images \(16, 16\): give a factor"),
    "small": (lambda: gddlab.editing.operators.check_keep("border", 1, (1, 1, 1)), "nothing is known of image 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(GddlabError, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_rows_of_labels_that_are_not_one_hot() -> None:
    net = make_student(tiny_net(label_dim=3)).eval()
    for rows in (torch.zeros(2, 3), torch.full((2, 3), 1 / 3)):
        with pytest.raises(GddlabError, match="not one-hot: give one class an image"):
            gddlab.inpaint(net, IMAGES, "top", class_labels=rows)
    with pytest.raises(GddlabError, match="class_labels are not finite"):
        gddlab.directions(net, LAYER, k=1, n=2, class_labels=torch.full((2, 3), float("nan")))


def test_a_folder_of_another_inversion(tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 1, "restarts": 1}
    first, second = (make_student(tiny_net(), mid_sigmas=(x,)).eval() for x in (0.8, 2.0))
    second.load_state_dict(first.state_dict())
    gddlab.invert(first, IMAGES, out=tmp_path, **how)
    with pytest.raises(GddlabError, match="holds another inversion"):
        gddlab.invert(second, IMAGES, out=tmp_path, **how)  # of the same weights
    (tmp_path / "inversion.json").unlink()
    with pytest.raises(GddlabError, match=r"holds batches, but no inversion.json"):
        gddlab.invert(first, IMAGES, out=tmp_path, **how)
    write_json(tmp_path / "inversion.json", [])
    with pytest.raises(GddlabError, match="holds another inversion"):
        gddlab.invert(first, IMAGES, out=tmp_path, **how)


def test_the_scale_of_a_measurement_changes_nothing() -> None:
    half = torch.ones(16, 16)
    half[8:] = 0
    found = []
    for scale in (1.0, 0.01):
        op = Operator(lambda v, s=scale: v * half * s, lambda y, s=scale: y * half * s)
        found.append(gddlab.restore(STUDENT, op.apply(IMAGES), op, n=1, steps=5).images)
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        student = make_student(tiny_net()).eval()
    with pytest.raises(GddlabError, match=r"was loaded in torch\.inference_mode"):
        gddlab.inpaint(student, IMAGES, "top", n=1, steps=1)


def test_the_error_told_is_of_the_images_told() -> None:
    op = blur(1.0)  # not exact: nothing is put back
    found = gddlab.restore(tiny_net(), op.apply(IMAGES), op, n=1, method="teacher", steps=3)
    own = op.error(found.images[:, 0], op.apply(IMAGES)).sqrt()
    assert torch.allclose(found.error[:, 0], own)


def test_completions_of_a_conditional_student_are_of_one_class_each() -> None:
    """Each search of a completion is of the class that its first seed draws, so that the best tells no other class."""
    net = make_student(tiny_net(label_dim=3)).eval()
    labels: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda module, args: labels.append(args[2]))
    gddlab.inpaint(net, IMAGES, "top", n=2, restarts=2, steps=1, seed=4)
    assert labels[0].argmax(1).tolist() == [4 % 3, 4 % 3, 5 % 3, 5 % 3, 6 % 3, 6 % 3, 7 % 3, 7 % 3]


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_in_a_mode_of_the_callers(mode: Callable[[], Any]) -> None:
    with mode():
        images, keep = gddlab.sample(STUDENT, 2, progress=False), torch.eye(16)
        assert gddlab.inpaint(STUDENT, images, keep, n=1, steps=1).images.shape == (2, 1, 1, 16, 16)
        assert len(gddlab.invert(STUDENT, images, steps=1, restarts=1)) == 2
        gddlab.restore(STUDENT, blur(1.0).apply(images).float(), blur(1.0), n=1, steps=1)
        gddlab.edit(STUDENT, [0, 1], towards=[2, 3], strength=np.float32(0.5))
        gddlab.edit(STUDENT, [0, 1], strokes=images)


def test_edits_of_a_compiled_student() -> None:
    compiled = torch.compile(make_student(tiny_net()).eval(), backend="eager")
    plain = compiled._orig_mod
    gddlab.invert(compiled, IMAGES, steps=1, restarts=1)  # is compiled by now
    completed = [gddlab.inpaint(net, IMAGES, "top", n=1, steps=3).images for net in (compiled, plain)]
    assert torch.equal(*completed)
    axes = gddlab.directions(compiled, LAYER, k=2, n=8)
    for how in ({"direction": axes[0]}, {"towards": [2, 3], "layers": "block"}):
        found = gddlab.edit(compiled, [0, 1], **how).images
        assert torch.allclose(found, gddlab.edit(plain, [0, 1], **how).images, atol=1e-5)
