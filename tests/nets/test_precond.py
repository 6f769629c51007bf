"""Preconditionings, construction, files of networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from gddlab.errors import GddlabError, NotFound
from gddlab.nets import OneStepPrecond, from_edm, load_network, save_network
from gddlab.nets.io import make_student
from tests.conftest import TINY, tiny_net


def test_student_coefficients_are_the_formulas() -> None:
    net = from_edm("OneStepPrecond", **TINY).double()
    sigma, sd, eps = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64), 0.5, 0.002
    c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    assert_close(c.c_skip.flatten(), sd**2 / ((sigma - eps) ** 2 + sd**2))
    assert_close(c.c_out.flatten(), (sigma - eps) * sd / (sigma**2 + sd**2).sqrt())
    assert_close(c.c_in.flatten(), 1 / (sigma**2 + sd**2).sqrt())
    assert_close(c.c_noise, sigma.log() / 4)
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    assert_close(net(x, 0.002), x)  # the identity at sigma = eps


def test_student_starts_as_the_teacher() -> None:
    teacher = tiny_net(label_dim=10)
    student = make_student(teacher)
    assert isinstance(student, OneStepPrecond)
    labels = torch.eye(10)[:3]
    z = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        # At sigma = 80 the two preconditionings differ by less than 1e-4 of the output's scale.
        assert_close(student.eval().generate(z, labels), teacher(80 * z, 80.0, labels), rtol=1e-3, atol=5e-3)
    assert student.init_kwargs["dropout"] == 0
    for name, p in student.state_dict().items():
        assert torch.equal(p, teacher.state_dict()[name])


def test_student_drops_the_augmentation_embedding() -> None:
    teacher = from_edm("EDMPrecond", **TINY, augment_dim=9)
    names = set(teacher.state_dict()) - set(make_student(teacher).state_dict())
    assert names == {"model.map_augment.weight"}


def test_other_preconditionings_have_no_student() -> None:
    with pytest.raises(GddlabError, match="VPPrecond"):
        make_student(from_edm("VPPrecond", **TINY))


def test_float64_stays_float64_and_sigma_may_be_scalar() -> None:
    net = tiny_net().double()
    x = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    assert net(x, 1.5).dtype == torch.float64
    assert_close(net(x, 1.5), net(x, torch.full((3,), 1.5, dtype=torch.float64)))


def test_network_file_round_trip(tmp_path: Path) -> None:
    net = tiny_net(label_dim=10)
    save_network(net, tmp_path / "net.safetensors", kimg=3.5)
    other, meta = load_network(tmp_path / "net.safetensors")
    assert meta == {"kimg": 3.5}
    assert other.init_kwargs == net.init_kwargs
    x, labels = torch.randn(2, 1, 16, 16), torch.eye(10)[:2]
    with torch.no_grad():
        assert torch.equal(net(x, 2.0, labels), other(x, 2.0, labels))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_network_beside_another_is_as_large_as_what_differs(tmp_path: Path) -> None:
    net, other = tiny_net(), tiny_net()
    other.load_state_dict(net.state_dict())
    file = tmp_path / "net.safetensors"
    with torch.no_grad():
        changed = next(iter(dict(net.named_parameters())))
        net.get_parameter(changed).add_(1)
    save_network(net, file, beside=("other", other.state_dict()))
    with safe_open(file, framework="pt") as f:
        assert list(f.keys()) == [changed]
    again, _ = load_network(file, beside=lambda name: {"other": other.state_dict()}[name])
    for own, theirs in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(own, theirs)
    with pytest.raises(GddlabError, match="holds what differs from 'other' alone"):
        load_network(file)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="did you mean 'EDMPrecond'"):
        from_edm("EDMPrecon", **TINY)
    with pytest.raises(GddlabError, match="model_type 'SongUnet'"):
        from_edm("EDMPrecond", **(TINY | {"model_type": "SongUnet"}))
    with pytest.raises(GddlabError, match="num_blcks"):
        from_edm("EDMPrecond", **TINY, num_blcks=3)
    with pytest.raises(NotFound):
        load_network(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    with pytest.raises(GddlabError, match="does not say its architecture"):
        load_network(tmp_path / "theirs.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(GddlabError, match="not a whole safetensors file"):
        load_network(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_kwargs": TINY | {"num_blocks": 10**6}}, r"num_blocks=1000000: accepted are whole numbers, 1 to 64"),
        ({"init_kwargs": TINY | {"num_blocks": 60}}, r"60 blocks in 2 levels, but only \d+ tensors"),
        ({"init_kwargs": TINY | {"M": 10**9}}, "M=1000000000"),
        ({"init_kwargs": TINY | {"img_channels": 0}}, "img_channels=0"),
        ({"init_kwargs": [1]}, "its metadata lacks precond, init_kwargs or meta"),
        ({"precond": None}, "its metadata lacks precond, init_kwargs or meta"),
        ({"precond": "EDMPrecon"}, "did you mean 'EDMPrecond'"),
        ({"meta": 3}, "its metadata lacks precond, init_kwargs or meta"),
        ({"format": "other"}, "does not say its architecture"),
    ],
)
def test_a_file_cannot_ask_for_endless_work(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = tiny_net()
    header = {"format": "gddlab-network-1", "precond": "EDMPrecond", "init_kwargs": TINY, "meta": {}} | changes
    metadata = {k: json.dumps(v) for k, v in header.items()}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(GddlabError, match=message) as e:
        load_network(tmp_path / "x.safetensors")
    assert "\n" not in str(e.value)


def test_iddpm_levels_are_the_published_ones() -> None:
    """Float32 arithmetic, step by step: in float64 the lowest level is off by 5e-4, and samplers lose it."""
    net = from_edm("iDDPMPrecond", img_resolution=16, img_channels=1, model_channels=16, channel_mult=[1], num_blocks=1)
    assert net.sigma_min == pytest.approx(0.006422337, rel=1e-6)
    assert net.round_sigma(torch.tensor([0.0064, 1e5])).tolist() == pytest.approx([net.sigma_min, net.sigma_max])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_low_precision_are_refused(dtype: torch.dtype) -> None:
    net = tiny_net().to(dtype)
    with pytest.raises(GddlabError, match=f"weights are {str(dtype).removeprefix('torch.')}, too coarse"):
        net(torch.zeros(1, 1, 16, 16), 1.0)


def test_levels_and_images_that_do_not_fit_are_refused() -> None:
    net, x = tiny_net(), torch.zeros(2, 1, 16, 16)
    assert_close(net(x, [1.0, 2.0]), net(x, torch.tensor([1.0, 2.0])))  # type: ignore[arg-type]
    for sigma in (torch.ones(3), [1.0, 2.0, 3.0]):
        with pytest.raises(GddlabError, match=r"sigma has shape \(3,\) for 2 images: give a number, or one each"):
            net(x, sigma)  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match="sigma='high': give a number"):
        net(x, "high")  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match=r"x has shape \(2, 3, 16, 16\): this network takes \(B, 1, H, W\)"):
        net(torch.zeros(2, 3, 16, 16), 1.0)
