"""Students: from the teacher or from scratch, with a second time, with several steps; frozen, saved, sampled."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.freezing import select_freeze
from gddlab.nets import OneStepPrecond, Precond, from_edm, load_network, save_network, without_target
from gddlab.nets.io import make_student
from gddlab.sampling import ImageNoise, latents, multistep, sample
from gddlab.sampling.samplers import resolve, sampler_name
from tests.conftest import TINY, tiny_net

ADM = {k: TINY[k] for k in ("img_resolution", "img_channels", "channel_mult", "num_blocks", "attn_resolutions")}
ADM |= {"model_type": "DhariwalUNet", "model_channels": 64, "augment_dim": 9}
ADDED = {f"model.map_target{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}


def teacher_of(kind: str) -> Precond:
    kwargs = {"song": TINY, "positional": TINY | {"embedding_type": "positional", "augment_dim": 9}, "adm": ADM}[kind]
    torch.manual_seed(0)
    net = from_edm("EDMPrecond", **kwargs, label_dim=3).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def shaken(student: OneStepPrecond) -> OneStepPrecond:
    """The embedding of the target time does something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in sorted(ADDED):
            p = student.get_parameter(name)
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))
    return student


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return latents(range(n), (1, 16, 16)), torch.eye(3)[torch.arange(n) % 3]


# A second time.


@pytest.mark.parametrize("kind", ["song", "positional", "adm"])
def test_a_second_time_changes_nothing_at_first(kind: str) -> None:
    teacher = teacher_of(kind)
    plain, student = make_student(teacher).eval(), make_student(teacher, target_time=True).eval()
    assert set(student.state_dict()) - set(plain.state_dict()) == ADDED
    x, labels = inputs()
    sigma = torch.tensor([0.1, 3.0, 80.0])
    with torch.no_grad():
        for target in (None, 0.002, torch.tensor([0.05, 0.002, 20.0])):
            assert torch.equal(student(x, sigma, labels, target=target), plain(x, sigma, labels))
        assert torch.equal(student.generate(x, labels), plain.generate(x, labels))
        shaken(student)
        near, far = student(x, sigma, labels, target=0.05), student(x, sigma, labels)
        assert (near - far).abs().amax((1, 2, 3)).min() > 1e-4
        assert torch.equal(student(x, sigma, labels, target=student.eps), far)
        mixed = student.double()(x.double(), sigma, labels, target=torch.tensor([0.05, 0.002, 20.0]))
        assert mixed.dtype == torch.float64
        assert_close(mixed[:1], student(x[:1].double(), 0.1, labels[:1], target=0.05))
        assert_close(mixed[2:], student(x[2:].double(), 80.0, labels[2:], target=20.0))


def test_every_parameter_of_a_second_time_is_trained() -> None:
    student = make_student(teacher_of("adm"), target_time=True)
    x, labels = inputs()
    student(x, 3.0, labels, target=0.5).square().mean().backward()
    grads = {n: student.get_parameter(n).grad for n in ADDED}
    assert grads["model.map_target1.weight"] is not None and grads["model.map_target1.weight"].abs().sum() > 0
    student.zero_grad()
    shaken(student)(x, 3.0, labels, target=0.5).square().mean().backward()
    for name in ADDED:
        grad = student.get_parameter(name).grad
        assert grad is not None and grad.abs().sum() > 0


def test_jumps() -> None:
    """(s / t) x + (1 - s / t) g; going nowhere is the identity, whatever the network."""
    student = shaken(make_student(teacher_of("song"), target_time=True)).double().eval()
    x, labels = inputs()
    t, s = torch.tensor([80.0, 5.0, 0.3]).double(), torch.tensor([20.0, 0.002, 0.3]).double()
    with torch.no_grad():
        y = student.jump(x.double(), t, s, labels)
        g = student(x.double(), t, labels, target=s)
    for i in range(3):
        assert_close(y[i], x[i] * s[i] / t[i] + (1 - s[i] / t[i]) * g[i])
    assert torch.equal(y[2], x[2].double())
    assert not torch.allclose(y[1], x[1].double())


def test_a_target_is_refused_without_a_second_time() -> None:
    student = make_student(tiny_net())
    x = latents(range(2), (1, 16, 16))
    for call in (lambda: student(x, 1.0, target=0.5), lambda: student.jump(x, 1.0, 0.5)):
        with pytest.raises(GddlabError, match=r"takes no target: .* make it with target_time=True"):
            call()


# Freezing.


@pytest.mark.parametrize("kind", ["song", "adm"])
def test_a_teachers_mask_fits_a_student_with_a_second_time(kind: str) -> None:
    teacher = teacher_of(kind)
    mask = select_freeze(teacher, strategy="gdd-i")
    student = make_student(teacher, target_time=True)
    student.requires_grad_(False)
    assert mask.apply(student) == mask.apply(student, force=True) == ()
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == set(mask.frozen)
    assert {n for n, _ in mask.trainable(student)} >= ADDED
    with torch.no_grad():
        for _, p in mask.trainable(student):
            p.add_(1)
    mask.verify(student, teacher)
    with torch.no_grad():
        student.get_parameter(mask.frozen[0]).view(-1)[0].add_(1)
    with pytest.raises(GddlabError, match=r"1 of .* frozen tensors differ"):
        mask.verify(student, teacher)
    with pytest.raises(GddlabError, match="for another network"):
        mask.apply(make_student(tiny_net(), target_time=True))


def test_a_students_own_mask_stays_its_own() -> None:
    """One that knows the second time says so of a network without."""
    student = make_student(tiny_net(), target_time=True)
    mask = select_freeze(student, strategy="gdd-i")
    mask.apply(student)
    with pytest.raises(GddlabError, match=r"'model\.map_target0\.weight' is .* in the mask, missing in the network"):
        mask.apply(make_student(tiny_net()))


# From scratch.


@pytest.mark.parametrize("target_time", [False, True])
def test_from_scratch(target_time: bool) -> None:
    """Fresh weights of the teacher's architecture, from the global generator."""
    teacher = tiny_net(label_dim=3)

    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return make_student(teacher, init="scratch", target_time=target_time).state_dict()

    a, b, c = made(1), made(1), made(2)
    copied = make_student(teacher, target_time=target_time).state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in copied.items()}
    assert all(torch.equal(a[k], b[k]) for k in a)
    name = "model.enc.16x16_conv.weight"
    assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], copied[name])


# Several steps.


def few(sigmas: tuple[float, ...] = (5.0, 0.8), **options: Any) -> OneStepPrecond:
    return make_student(tiny_net(label_dim=3), mid_sigmas=sigmas, **options).eval()


@pytest.mark.parametrize("target_time", [False, True])
def test_generate_steps_are_the_samplers_steps(target_time: bool) -> None:
    student = few(target_time=target_time).double()
    assert student.sigmas == (80.0, 5.0, 0.8)
    _, labels = inputs()
    noise = ImageNoise(range(3), (1, 16, 16))
    z = noise().double()
    fresh = [noise() for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(student.generate_steps(z, labels, fresh, 0), student.generate(z, labels))
        y = student.generate(z, labels)
        for k, sigma in ((1, 5.0), (2, 0.8)):
            y = student(y + math.sqrt(sigma**2 - 0.002**2) * fresh[k - 1], sigma, labels)
            assert_close(student.generate_steps(z, labels, fresh, k), y)
        later = iter(fresh)
        assert_close(y, multistep(student, z, labels, sigmas=student.sigmas, noise=lambda: next(later)))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_last_step_alone_has_a_gradient(autocast: bool) -> None:
    """Earlier steps are its constant input; also in autocast, whose cache then holds weights cast without gradient."""
    student = few()
    z, labels = inputs()
    noise = [latents(range(10 * k, 10 * k + 3), z.shape[1:]) for k in (1, 2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        student.generate_steps(z, labels, noise, 2).square().mean().backward()
    grads = {n: p.grad for n, p in student.named_parameters()}
    twin = copy.deepcopy(student)
    twin.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            x = twin.generate_steps(z, labels, noise, 1) + math.sqrt(0.8**2 - 0.002**2) * noise[1]
        twin(x, 0.8, labels).square().mean().backward()
    for name, p in twin.named_parameters():
        assert p.grad is not None and grads[name] is not None, name
        assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6 + 1e-4 * p.grad.abs().max().item(), msg=name)


def test_exits_and_noise_are_checked() -> None:
    student = few()
    z, labels = inputs()
    for exit, noise, message in (
        (3, [z, z, z], "exit=3 of a student with 3 steps: give 0 to 2"),
        (-1, [], "exit=-1"),
        (2, [z], "exit=2 with 1 noise tensors"),
    ):
        with pytest.raises(GddlabError, match=message):
            student.generate_steps(z, labels, noise, exit)


def test_sampling_takes_the_students_own_steps() -> None:
    student = few((0.8,))
    assert resolve(student) == (80.0, 0.8)
    assert sampler_name(resolve(student)) == "consistency-2 sigmas=80,0.8"
    assert resolve(student, steps=1) == (80.0,)
    assert resolve(student, sigmas=(80.0, 5.0, 1.0)) == (80.0, 5.0, 1.0)
    own = sample(student, 4)
    assert torch.equal(own, sample(student, 4, sigmas=(80.0, 0.8)))
    assert (own - sample(student, 4, steps=1)).abs().max() > 0.01
    assert resolve(make_student(tiny_net())) == (80.0,)


def test_a_second_time_is_sampled_at_eps() -> None:
    student = shaken(make_student(tiny_net(label_dim=3), target_time=True)).eval()
    z, labels = inputs()
    with torch.no_grad():
        expected = student(80 * z, 80.0, labels, target=0.002).clamp(-1, 1)
    assert_close(sample(student, 3), expected, rtol=0, atol=1e-6)
    assert sample(student, 3, steps=2).isfinite().all()


@pytest.mark.parametrize("kind", ["song", "adm"])
def test_a_target_time_can_be_left_behind(kind: str) -> None:
    student = shaken(make_student(teacher_of(kind), target_time=True, mid_sigmas=(5.0,))).double().eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    own = without_target(student)
    assert not own.target_time and not ADDED & {*own.state_dict()} and own.sigmas == (80.0, 5.0)
    z, labels = inputs()
    with torch.no_grad():
        expected, found = student.generate(z.double(), labels), own.generate(z.double(), labels)
        assert_close(found, expected, rtol=0, atol=1e-12)
        unshaken = make_student(teacher_of(kind)).double().eval().generate(z.double(), labels)
        assert (found - unshaken).abs().max() > 0.01
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert without_target(own) is own


# Files.


@pytest.mark.parametrize("kind", ["song", "adm"])
def test_saved_students_rebuild_themselves(kind: str, tmp_path: Path) -> None:
    student = shaken(make_student(teacher_of(kind), target_time=True, mid_sigmas=(5.0, 0.8))).eval()
    save_network(student, tmp_path / "student.safetensors")
    again, _ = load_network(tmp_path / "student.safetensors")
    assert isinstance(again, OneStepPrecond)
    assert again.target_time and again.sigmas == (80.0, 5.0, 0.8)
    assert again.init_kwargs == student.init_kwargs
    assert torch.equal(sample(again, 3), sample(student, 3))
    once = make_student(again)  # a student as a teacher: what it had of its own is not carried over
    assert not once.target_time and once.sigmas == (80.0,)


def test_plain_students_are_described_as_before() -> None:
    student = make_student(tiny_net())
    assert not {"target_time", "mid_sigmas"} & set(student.init_kwargs)
    assert not ADDED & set(student.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mid_sigmas": (0.8, 5.0)}, r"mid_sigmas=\(0.8, 5.0\): give descending noise levels below 80 and above 0.002"),
        ({"mid_sigmas": (80.0,)}, "give descending noise levels below 80"),
        ({"mid_sigmas": (0.002,)}, "above 0.002"),
        ({"mid_sigmas": (1.0, math.nan)}, "give descending"),
        ({"mid_sigmas": ("a",)}, "give a list of noise levels"),
        ({"init": "scrach"}, "unknown init 'scrach': did you mean 'scratch'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GddlabError, match=message) as e:
        make_student(tiny_net(), **options)
    assert "\n" not in str(e.value)
