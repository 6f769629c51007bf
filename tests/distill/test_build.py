"""What a run is made of: teacher, data, mask, student and discriminator fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.datasets import ImageDataset
from gddlab.distill.build import check
from gddlab.distill.distributed import World
from gddlab.distill.instance import FromNoise
from gddlab.distill.presets import digits
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.freezing import select_freeze
from gddlab.launch import train
from gddlab.nets import from_edm, load_network, save_network
from gddlab.teachers import load_teacher
from gddlab.teachers.catalog import load_student
from tests.conftest import TINY, tiny_config, tiny_net
from tests.distill.test_trainer import trained

ALONE = World(0, 1, torch.device("cpu"))


def test_a_conditional_teacher_needs_labels(tmp_path: Path) -> None:
    path = tmp_path / "cond.safetensors"
    save_network(tiny_net(label_dim=10), path, name="cond", data="digits")
    folder = tmp_path / "flat"
    folder.mkdir()
    from PIL import Image

    digits = ImageDataset(torch.randint(256, (8, 16, 16, 1), dtype=torch.uint8).numpy(), name="x", source="test").uint8
    for i, x in enumerate(digits):
        Image.fromarray(x[..., 0]).save(folder / f"{i}.png")
    with pytest.raises(GddlabError, match=r"conditional with 10 classes, data .* has no labels"):
        Trainer(tiny_config(tmp_path / "run", path, data=str(folder)), ALONE)


def test_a_teacher_without_a_student_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="a DiTPrecond teacher has no one-step student: give an EDMPrecond network"):
        train(digits(run_dir=tmp_path / "run", teacher="digits-dit"))
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch_hold_whole_groups_of_stylegan2s_deviation(tmp_path: Path, tiny_teacher: Path) -> None:
    fields = {"discriminator": {"kind": "stylegan2", "channel_max": 8}}
    check(tiny_config(tmp_path / "run", tiny_teacher, batch_per_device=4, **fields))
    check(tiny_config(tmp_path / "run", tiny_teacher, batch=6, batch_per_device=3, **fields))
    with pytest.raises(GddlabError, match=r"2 of 8 images at once .* give a multiple of 4"):
        check(tiny_config(tmp_path / "run", tiny_teacher, batch_per_device=2, **fields))
    with pytest.raises(GddlabError, match=r"2 of 8 images at once .* give a multiple of 4"):
        check(tiny_config(tmp_path / "run", tiny_teacher, **fields), world_size=4)


def test_a_stylegan2_discriminator_begins_with_weights(tmp_path: Path, tiny_teacher: Path) -> None:
    first = trained(tmp_path / "a", tiny_teacher, 1, discriminator={"kind": "stylegan2"})
    torch.save(first.step.d.state_dict(), tmp_path / "d.pt")
    fields = {"discriminator": {"kind": "stylegan2", "weights": str(tmp_path / "d.pt")}}
    second = Trainer(tiny_config(tmp_path / "b", tiny_teacher, **fields), ALONE)
    theirs = second.step.d.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in first.step.d.state_dict().items())


def test_the_class_embedding_begins_as_its_file_and_is_learned(tmp_path: Path, tiny_teacher: Path) -> None:
    cond, table = tmp_path / "cond.safetensors", torch.randn(12, 320)
    save_network(tiny_net(label_dim=10), cond, name="cond", data="digits")
    torch.save(table, tmp_path / "table.pt")
    t = Trainer(
        tiny_config(tmp_path / "run", cond, discriminator={"embedding_file": str(tmp_path / "table.pt")}), ALONE
    )
    embeds = [p for n, p in t.step.d.named_parameters() if n.endswith("embed.weight")]
    assert len(embeds) == 4
    assert all(torch.equal(p, table[:10]) for p in embeds)
    t.iterate()
    assert not any(torch.equal(p, table[:10]) for p in embeds)
    with pytest.raises(NotFound, match=r"class embedding nowhere.npy: no such file"):
        check(tiny_config(tmp_path / "run", cond, discriminator={"embedding_file": "nowhere.npy"}))
    with pytest.raises(GddlabError, match="unconditional teacher"):
        Trainer(
            tiny_config(tmp_path / "run", tiny_teacher, discriminator={"embedding_file": str(tmp_path / "table.pt")}),
            ALONE,
        )


def test_a_student_from_scratch_shares_no_weights_with_the_teacher(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, student="scratch"), ALONE)
    again = Trainer(tiny_config(tmp_path / "run", tiny_teacher, student="scratch"), ALONE)
    theirs = t.teacher.state_dict()
    for name, p in t.step.g.named_parameters():
        assert name.endswith(("bias", "norm0.weight", "norm1.weight", "norm2.weight")) or not torch.equal(
            p, theirs[name]
        ), name
        assert torch.equal(p, again.step.g.get_parameter(name))


def test_some_of_the_data_mirrored(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, classes=(3, 5), max_images=40, xflip=True), ALONE)
    assert len(t.data) == 80
    assert set(t.data.class_ids.tolist()) == {3, 5}
    assert torch.equal(t.data.images([0]).flip(-1), t.data.images([40]))


def test_a_student_begins_where_another_ended_with_or_without_a_target_time(tmp_path: Path, tiny_teacher: Path) -> None:
    copying: dict[str, Any] = {"instance": FromNoise(distance="l2", steps=4), "discriminator": None}
    kinds: dict[str, dict[str, Any]] = {"gan": {}, "copy": copying}
    z = torch.randn(4, 1, 16, 16)
    for first, then in (("gan", "copy"), ("copy", "gan"), ("copy", "copy")):
        Trainer(tiny_config(tmp_path / first, tiny_teacher, **kinds[first]), ALONE).train()
        ended = load_student(tmp_path / first)
        goes_on = tiny_config(tmp_path / "next", tiny_teacher, student=str(tmp_path / first), **kinds[then])
        begins = Trainer(goes_on, ALONE).step.g
        assert begins.target_time == (then == "copy")
        with torch.no_grad():
            assert_close(begins.generate(z), ended.generate(z), rtol=0, atol=1e-5)


def test_mask_of_another_network_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:

    mask = select_freeze(from_edm("EDMPrecond", **(TINY | {"num_blocks": 2})), strategy="gdd-i")
    with pytest.raises(GddlabError, match="another network"):
        train(tiny_config(tmp_path / "run", tiny_teacher, mask=mask))
    assert not (tmp_path / "run").exists()


def test_frozen_parameters_are_the_teachers_and_in_no_optimiser(tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    mask = select_freeze(teacher, strategy="gdd-i")
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, mask=mask), ALONE)
    t.train()
    for net in (t.step.g, t.ema, load_network(tmp_path / "run" / "student.safetensors")[0]):
        mask.verify(net, teacher)
    by_tensor = {p: n for n, p in t.step.g.named_parameters()}
    optimised = {by_tensor[p] for group in t.step.opt_g.param_groups for p in group["params"]}
    assert optimised == {n for n, _ in t.step.g.named_parameters()} - set(mask.frozen)
    start = teacher.state_dict()
    moved = [n for n in optimised if not torch.equal(start[n], t.step.g.state_dict()[n])]
    assert len(moved) == len(optimised)


def test_without_mask_everything_moves(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher), ALONE)
    start = {n: p.detach().clone() for n, p in t.step.g.named_parameters()}
    t.iterate()
    assert all(not torch.equal(start[n], p) for n, p in t.step.g.named_parameters())
