"""`sample`: seeds, batches, classes, settings, precision, and grids."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets import Precond
from gddlab.nets.io import make_student
from gddlab.sampling import Sampler, integrate, karras_sigmas, latents, multistep, sample
from gddlab.sampling.grid import image_grid
from gddlab.sampling.samplers import ImageNoise, resolve, sampler_name
from gddlab.teachers import load_teacher, wrap
from tests.conftest import tiny_net


def test_karras_grid() -> None:
    s = karras_sigmas(18)
    assert_close(s[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert_close(s ** (1 / 7), torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18, dtype=torch.float64))
    assert karras_sigmas(1).tolist() == [80.0]


def test_an_image_depends_on_its_seed_alone() -> None:
    student = make_student(tiny_net()).double()
    whole = sample(student, 7, seed=10)
    assert_close(whole, sample(student, 7, seed=10, batch_size=3), rtol=1e-5, atol=1e-6)
    assert_close(whole[4:], sample(student, 3, seed=14), rtol=1e-5, atol=1e-6)
    assert_close(whole[[5, 0]], sample(student, seeds=[15, 10]), rtol=1e-5, atol=1e-6)
    assert whole.abs().max() <= 1
    teacher = tiny_net().double()
    assert_close(sample(teacher, 3, steps=3)[1:], sample(teacher, 2, steps=3, seed=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student", [True, False])
def test_added_noise_depends_on_the_seed_alone(student: bool) -> None:
    """Noise on the way comes from each image's own generator, after its latents."""
    net = (make_student(tiny_net()) if student else tiny_net()).double()  # batches differ in float32 rounding
    options = {"sigmas": (80.0, 5.0, 0.8)} if student else {"steps": 4, "S_churn": 2.0, "S_noise": 1.01}
    whole = sample(net, 5, **options)
    assert_close(whole, sample(net, 5, batch_size=2, **options), rtol=0, atol=1e-6)
    assert_close(whole[3:], sample(net, 2, seed=3, **options), rtol=0, atol=1e-6)
    changed = {"sigmas": (80.0,)} if student else {"steps": 4}
    assert (whole - sample(net, 5, **changed)).abs().max() > 0.01


def test_settings_reach_the_sampler() -> None:
    net, z = tiny_net(), latents(range(2), (1, 16, 16))
    options = {"solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp", "sigma_max": 40.0}
    with torch.no_grad():
        expected = integrate(net, z, None, Sampler(steps=3, **options)).float().clamp(-1, 1)  # type: ignore[arg-type]
    assert torch.equal(sample(net, 2, steps=3, **options), expected)
    assert resolve(net) == Sampler(steps=18)
    assert resolve(net, steps=5, rho=5) == Sampler(steps=5, rho=5)


def test_students() -> None:
    """One step is G(z); steps=3 the first three levels of the four-level Karras grid that ends at eps."""
    net = make_student(tiny_net())
    noise = ImageNoise(range(2), (1, 16, 16))
    with torch.no_grad():
        z = noise(torch.float32)
        assert torch.equal(sample(net, 2), net.generate(z).clamp(-1, 1))
        expected = multistep(net, z, sigmas=karras_sigmas(4)[:3].tolist(), noise=noise).clamp(-1, 1)
    assert_close(sample(net, 2, steps=3), expected, rtol=0, atol=1e-6)
    assert resolve(net, steps=1) == resolve(net) == (80.0,)


def test_sid_students() -> None:
    """A plain network run once at 2.5 gives D(2.5 z; 2.5)."""
    net, z = tiny_net(), latents(range(4), (1, 16, 16))
    with torch.no_grad():
        expected = net(2.5 * z, 2.5)
    assert torch.equal(sample(net, 4, steps=1, sigma_max=2.5), expected.clamp(-1, 1))


def test_names() -> None:
    student, teacher = make_student(tiny_net()), tiny_net()
    assert sampler_name(resolve(student)) == "one-step"
    assert sampler_name(resolve(student, sigmas=(80, 0.8))) == "consistency-2 sigmas=80,0.8"
    assert sampler_name(resolve(teacher, steps=5)) == "heun-5"
    assert sampler_name(resolve(teacher, solver="euler", S_churn=4.0)) == "euler-18 S_churn=4.0"
    assert json.dumps(Sampler(steps=np.int64(4)).to_dict()) == json.dumps(Sampler(steps=4).to_dict())


def test_classes() -> None:
    net = make_student(tiny_net(label_dim=10))
    dealt = sample(net, 10, seed=3)
    assert_close(dealt, sample(net, 10, seed=3, class_labels=[(3 + i) % 10 for i in range(10)]))
    assert_close(dealt[[7, 1]], sample(net, seeds=[10, 4]))
    assert_close(sample(net, 2, class_labels=4), sample(net, 2, class_labels=torch.eye(10)[[4, 4]]))
    assert_close(sample(net, 2, class_labels=4), sample(net, 2, class_labels=np.array([4, 4])))
    assert not torch.allclose(sample(net, 2, class_labels=4), sample(net, 2, class_labels=5))


def test_precision_is_autocast() -> None:
    net, z = make_student(tiny_net()), latents(range(3), (1, 16, 16))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net.generate(z).clamp(-1, 1)
    assert torch.equal(sample(net, 3, dtype=torch.bfloat16), expected)


class Spy(torch.overrides.TorchFunctionMode):
    """Notes types and memory formats of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.conv2d and args[1].shape[1] > 1 and args[1].shape[2] > 1:
            last = args[1].is_contiguous(memory_format=torch.channels_last)
            self.seen.append((out.dtype, last, torch.is_inference_mode_enabled()))
        return out


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_precision_and_memory_format(kind: str) -> None:
    """They reach the convolutions, change little, and leave the network as it was."""
    net: Precond = make_student(tiny_net()) if kind == "student" else tiny_net()
    net.train()
    options = {} if kind == "student" else {"steps": 3}
    before = {k: (v.clone(), v.stride(), v.data_ptr()) for k, v in net.state_dict().items()}
    plain = sample(net, 3, **options)
    with Spy() as spy:
        fast = sample(net, 3, dtype=torch.bfloat16, channels_last=True, **options)
    assert set(spy.seen) == {(torch.bfloat16, True, True)}
    assert fast.dtype == torch.float32 and 0 < (fast - plain).abs().max() < 0.2
    with Spy() as spy:
        assert_close(sample(net, 3, dtype="float32", channels_last=True, **options), plain, rtol=0, atol=1e-4)
    assert set(spy.seen) == {(torch.float32, True, True)}
    with Spy() as spy:
        assert torch.equal(sample(net, 3, **options), plain)
    assert set(spy.seen) == {(torch.float32, False, True)}
    assert net.training
    for k, v in net.state_dict().items():
        value, stride, pointer = before[k]
        assert torch.equal(v, value) and v.stride() == stride and v.data_ptr() == pointer


def test_each_part_keeps_its_mode() -> None:
    net = make_student(tiny_net()).train()
    net.model.enc.eval()  # frozen, as a part of a training
    before = {name: module.training for name, module in net.named_modules()}
    sample(net, 1)
    assert {name: module.training for name, module in net.named_modules()} == before and len({*before.values()}) == 2


def test_a_network_without_parameters_is_sampled() -> None:
    def nothing(model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, class_labels: object) -> torch.Tensor:
        return 0.5 * torch.ones_like(x)

    net = wrap(nn.Identity(), nothing, img_channels=1, img_resolution=4)
    assert_close(sample(net, 2, steps=3), torch.full((2, 1, 4, 4), 0.5))


def test_churn_stays_in_the_range_of_a_wrapped_network() -> None:
    seen = []

    def half(model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, class_labels: object) -> torch.Tensor:
        seen.append(float(sigma.max()))
        return 0.5 * x / (1 + sigma.reshape(-1, 1, 1, 1))

    net = wrap(nn.Identity(), half, img_channels=1, img_resolution=4, sigma_min=0.03, sigma_max=7.0)
    assert sample(net, 2, steps=4, S_churn=10).isfinite().all()
    assert max(seen) == 7.0 and len({*seen}) > 4


def test_the_network_comes_back_after_an_error() -> None:
    net = make_student(tiny_net()).train()
    stride = net.state_dict()["model.enc.16x16_block0.conv0.weight"].stride()

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    net.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        sample(net, 1, channels_last=True)
    assert net.training and not torch.is_inference_mode_enabled()
    assert net.state_dict()["model.enc.16x16_block0.conv0.weight"].stride() == stride


def test_a_compiled_student_is_a_student() -> None:
    net = make_student(tiny_net())
    assert torch.equal(sample(torch.compile(net, backend="eager"), 2), sample(net, 2))  # type: ignore[arg-type]


def test_grid_pixels() -> None:
    x = torch.full((3, 1, 2, 2), -1.0)
    x[2] = 1.0
    grid = image_grid(x, columns=2, gap=0)
    assert grid.shape == (4, 4, 3)
    assert (grid[:2] == 0).all()
    assert (grid[2:, :2] == 255).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: sample(s, 0), "n=0 images: give at least 1"),
        (lambda s, t: sample(s, 2.5), "n=2.5: give an integer"),
        (lambda s, t: sample(s, 2, batch_size=0), "batch_size=0"),
        (lambda s, t: sample(s, 2, seed=-1), "seed=-1 for 2 images: seeds are 0..4294967295"),
        (lambda s, t: sample(s, 2, seed=2**32 - 1), "seed=4294967295 for 2 images"),
        (lambda s, t: sample(s, seeds=5), "seeds=5: give a list of integers, or seed=5"),
        (lambda s, t: sample(s, seeds=[]), r"seeds=\[\]: give one seed"),
        (lambda s, t: sample(s, 3, seeds=[1, 2]), "n=3 with 2 seeds"),
        (lambda s, t: sample(s, seeds=[1, -2]), "seeds hold -2"),
        (lambda s, t: sample(s, seeds=[0.5]), "seeds=0.5"),
        (lambda s, t: sample(s, 2, steps=0), "steps=0"),
        (lambda s, t: sample(s, 2, S_churn=3), "S_churn=3 with a one-step student"),
        (lambda s, t: sample(s, 2, sigmas=80.0), "sigmas=80.0: give a list of noise levels"),
        (lambda s, t: sample(s, 2, sigmas=(0.8, 80)), "give descending noise levels above 0.002"),
        (lambda s, t: sample(s, 2, steps=2, sigmas=(80, 1)), "give one of them"),
        (lambda s, t: sample(s, 2, sigmas=[90]), r"sigmas=\(90.0,\): give descending noise levels from 80 at most"),
        *(
            (lambda s, t, wrong=wrong: sample(s, 2, sigmas=wrong), "sigmas=.*: give a list of noise levels")
            for wrong in ([True], ["80"], "8", b"P", bytearray(b"P"))
        ),
        (lambda s, t: sample(s, seeds=b"12"), "seeds=b'12': give a list of integers"),
        (
            lambda s, t: sample(load_teacher("digits"), 2, sigma_max=1e9),
            r"sigma_max=1e\+09: this network accepts 0",
        ),
        (lambda s, t: sample(t, 2, steps=0), "steps=0"),
        (lambda s, t: sample(t, 2, steps=18.0), "steps=18.0"),
        (lambda s, t: sample(t, 2, sigmas=(80, 1)), "only a one-step student takes sigmas"),
        (lambda s, t: sample(t, 2, s_churn=3), "unknown option of sample 's_churn': did you mean 'S_churn'"),
        (lambda s, t: sample(t, 2, sigma_min=100), "noise levels from 80 down to 100"),
        (lambda s, t: sample(s, 2, class_labels=1), "unconditional"),
        (lambda s, t: sample(make_student(tiny_net(label_dim=3)), 2, class_labels=[0, 3]), "give 2 ids in 0..2"),
        (lambda s, t: sample(make_student(tiny_net(label_dim=3)), 2, class_labels=0.5), "give 2 ids in 0..2"),
        (lambda s, t: sample(make_student(tiny_net(label_dim=3)), 2, class_labels="cat"), "class_labels='cat'"),
        (lambda s, t: sample(s, 2, dtype=torch.int8), "unknown dtype 'int8'"),
        (lambda s, t: sample(s, 2, dtype="bf16"), "unknown dtype 'bf16'"),
        (lambda s, t: sample(s.double(), 2, dtype="bfloat16"), "autocast wants float32 weights"),
        (lambda s, t: sample("digits"), "str is no network: give gddlab.load_teacher"),
        (lambda s, t: karras_sigmas(4, sigma_min=0.0), "sigma_min=0.0"),
        (lambda s, t: karras_sigmas(4, sigma_max=math.nan), "sigma_max=nan"),
    ],
)
def test_refusals(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GddlabError, match=message) as e:
        call(make_student(tiny_net()), tiny_net())
    assert "\n" not in str(e.value)
