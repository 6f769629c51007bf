"""`invert`: finds images that the student made, classes too; continues; leaves the student alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gddlab.editing import Inversion, invert
from gddlab.errors import GddlabError, NotFound
from gddlab.nets import OneStepPrecond
from gddlab.nets.io import make_student
from gddlab.sampling import sample
from gddlab.teachers import load_teacher
from tests.conftest import tiny_net


@pytest.fixture(scope="module")
def student() -> OneStepPrecond:
    return make_student(tiny_net()).eval()


def test_its_own_images_are_found_again(student: OneStepPrecond) -> None:
    images = sample(student, 4, seed=100)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = invert(student, images, steps=80, restarts=2)
    assert (found.distance.square() < 0.1 * images.var()).all()
    assert_close(found.distance, (found.images - images).square().mean((1, 2, 3)).sqrt(), rtol=1e-3, atol=1e-4)
    assert_close(found.z.flatten(1).norm(dim=1), torch.full((4,), 16.0))
    assert found.calls == 2 * 80 + 2 and found.seconds > 0 and (found.class_ids == -1).all()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    # what the noise gives is the image, and more steps bring it nearer
    with torch.no_grad():
        assert_close(student.generate(found.z).clamp(-1, 1), found.images, rtol=1e-4, atol=1e-5)
    assert invert(student, images, steps=10, restarts=2).distance.mean() > found.distance.mean()


def test_neither_batches_nor_other_images_change_a_result(student: OneStepPrecond) -> None:
    images = sample(student, 3, seed=7)
    whole = invert(student, images, steps=8, restarts=2)
    small = invert(student, images, steps=8, restarts=2, batch_size=2)
    first = invert(student, images[:1], steps=8, restarts=2)
    assert_close(small.z, whole.z, rtol=1e-3, atol=1e-3)
    assert_close(first.z, whole.z[:1], rtol=1e-3, atol=1e-3)
    assert torch.equal(whole.seeds // 2, torch.arange(3))
    assert not torch.allclose(invert(student, images, steps=8, restarts=2, seed=50).z, whole.z)


def test_a_class_is_found() -> None:
    student = make_student(load_teacher("digits-cond")).eval()  # its images are near the means of their classes
    images = sample(student, 3, seed=3, class_labels=[0, 7, 1])
    found = invert(student, images, steps=12, restarts=1)
    assert found.class_ids.tolist() == [0, 7, 1]
    assert found.calls == 10 * 3 + 10 + 9 + 1
    given = invert(student, images, steps=4, restarts=1, class_labels=1)
    assert given.class_ids.tolist() == [1] * 3 and given.calls == 5
    with pytest.raises(GddlabError, match="class_labels"):
        invert(student, images, class_labels=50)


def test_a_perceptual_distance_joins(student: OneStepPrecond) -> None:
    images = sample(student, 2, seed=1)
    found = invert(student, images, steps=4, restarts=1, perceptual=0.5)
    assert (found.perceptual > 0).all()
    assert invert(student, images, steps=4, restarts=1).perceptual.isnan().all()
    with pytest.raises(GddlabError, match=r"perceptual=-1: .*greater than or equal to 0"):
        invert(student, images, perceptual=-1)


def test_it_continues_in_its_folder(student: OneStepPrecond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sample(student, 3, seed=7)
    how = {"steps": 4, "restarts": 1, "batch_size": 1, "out": tmp_path / "z"}
    whole = invert(student, images, **how)
    (tmp_path / "z" / "000001.safetensors").unlink()
    made: list[int] = []
    module = __import__("gddlab.editing.inversion", fromlist=["_inverted"])
    inverted = module._inverted

    def counted(*args, **kwargs):
        made.append(kwargs["first"])
        return inverted(*args, **kwargs)

    monkeypatch.setattr(module, "_inverted", counted)
    again = invert(student, images, **how)
    assert made == [1] and torch.equal(again.z, whole.z)
    with pytest.raises(GddlabError, match="holds another inversion"):
        invert(student, images, **(how | {"steps": 5}))


def test_a_result_is_saved_and_shown(student: OneStepPrecond, tmp_path: Path) -> None:
    found = invert(student, sample(student, 2, seed=7), steps=2, restarts=1)
    found.save(tmp_path / "z.safetensors")
    read = Inversion.load(tmp_path / "z.safetensors")
    assert torch.equal(read.z, found.z) and read.calls == found.calls and read.seconds == found.seconds
    assert found.to_frame().columns.tolist() == ["distance", "perceptual", "class_ids", "seeds", "calls", "seconds"]
    assert "Inversion of 2 images: distance" in repr(found)
    with pytest.raises(NotFound):
        Inversion.load(tmp_path / "none.safetensors")
    found.save(tmp_path / "z.safetensors")  # again
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(GddlabError, match="is there and no inversion: give another name"):
        found.save(tmp_path / "bad.safetensors")
    assert (tmp_path / "bad.safetensors").read_bytes() == b"x"
    with pytest.raises(GddlabError, match="holds no inversion"):
        Inversion.load(tmp_path / "bad.safetensors")


def test_refusals(student: OneStepPrecond) -> None:
    images = torch.zeros(1, 1, 16, 16)
    with pytest.raises(GddlabError, match="EDMPrecond is no one-step student: give load_run"):
        invert(tiny_net(), images)
    with pytest.raises(GddlabError, match="class_labels=1 with an unconditional network"):
        invert(student, images, class_labels=1)
    with pytest.raises(GddlabError, match="steps=0"):
        invert(student, images, steps=0)
    many = make_student(tiny_net(label_dim=40)).eval()
    with pytest.raises(GddlabError, match="the student has 40 classes, too many to search: give class_labels="):
        invert(many, images)
