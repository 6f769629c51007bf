"""Golden networks, samplers and training cases on a card; float64, float32 with and without TF32, bfloat16.

Rounding of one product: 2^-53 in float64, 2^-24 in float32, 2^-11 in TF32, 2^-9 in bfloat16.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gddlab.sampling import ImageNoise, Sampler, integrate
from tests.golden import test_networks, test_training
from tests.golden.conftest import ROOT, Case
from tests.gpu.conftest import tf32

pytestmark = pytest.mark.gpu

NETWORKS, SAMPLERS, TRAINING = (sorted((ROOT / kind).glob("*.npz")) for kind in ("networks", "samplers", "training"))
CPU = torch.device("cpu")


def within(found: Tensor, expected: Tensor, share: float, what: str = "") -> None:
    """Compares with the largest number of `expected`."""
    worst = ((found.double().cpu() - expected.double().cpu()).abs().max() / expected.abs().max().cpu()).item()
    assert worst <= share, f"{what}: off by {worst:.2g} of the largest number"


def denoised(case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Output of a network case."""
    net, case = test_networks.build(case).to(device, dtype), case.to(device, dtype)
    with torch.no_grad():
        y: Tensor = net(case["x"], case["sigma"], case.get("class_labels"), case.get("augment_labels"))
    assert y.device.type == device.type
    return y


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_network_in_float64(path: Path, cuda: torch.device) -> None:
    """Golden networks: the card's float64 is the CPU's to 1e-6, and the golden float32 numbers to their 1e-4.

    Float64 would give 1e-12; embeddings of the noise level are float32 in both.
    """
    case = Case(path)
    found = denoised(case, cuda, torch.float64)
    assert found.dtype == torch.float64
    within(found, denoised(case, CPU, torch.float64), 1e-6)
    within(found, case["y"], 1e-4)


# Of the largest number. Float32: as on a CPU. TF32 and bfloat16: 20 to 50 layers add up the rounding of one product.
LOW = {"float32": (False, None, 1e-4), "tf32": (True, None, 1e-2), "bfloat16": (False, torch.bfloat16, 5e-2)}


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_network_in_low_precision(path: Path, precision: str, cuda: torch.device) -> None:
    """Golden networks against the golden numbers: float32 1e-4, with TF32 1e-2, bfloat16 autocast 5e-2 of the largest.

    With TF32 and bfloat16 numbers that equal float32's would mean that the setting did nothing; on a card they differ.
    """
    allowed, dtype, share = LOW[precision]
    case = Case(path)
    with tf32(allowed), autocast(cuda, dtype):
        found = denoised(case, cuda, torch.float32)
    within(found, case["y"], share)
    if precision == "bfloat16" or (allowed and cuda.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)):
        assert not torch.equal(found, denoised(case, cuda, torch.float32))


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_sampler(path: Path, cuda: torch.device) -> None:
    """Golden samplers: float64 networks on both devices to 1e-6; a float32 network to the golden numbers' 1e-3.

    A CPU has 1e-4 there; each step divides a rounding difference by sigma, and cuDNN rounds in another order.
    """
    case = Case(path)
    for name, call in case.meta["cases"].items():
        arguments = {"steps" if k == "num_steps" else k: v for k, v in call["arguments"].items()}

        def images(device: torch.device, dtype: torch.dtype, how: Sampler) -> Tensor:
            net = test_networks.build(Case(ROOT / "networks" / case.meta["network"])).to(device, dtype)
            noise = ImageNoise(case["seeds"].tolist(), case["latents"].shape[1:])
            z, labels = noise(torch.float32).to(device), case.get("class_labels")
            with torch.inference_mode():
                return integrate(net, z, None if labels is None else labels.to(device), how, noise=noise)

        sampler = Sampler(**arguments)
        double = images(cuda, torch.float64, sampler)
        assert double.dtype == torch.float64
        within(double, images(CPU, torch.float64, sampler), 1e-6, name)
        within(images(cuda, torch.float32, sampler), case[f"y/{name}"], 1e-3, name)


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_training_in_float64(path: Path, cuda: torch.device) -> None:
    """Golden training cases, two iterations of GDD and GDD-I with R1: losses, norms of gradients, parameters, 1e-6.

    As on a CPU; images to 1e-5.
    """
    test_training.check_training(Case(path), cuda)


# Of the norm of all gradients. With the random heads of the case a CPU's bfloat16 is off by 0.21; TF32's rounding is a
# quarter of it.
STEPS = {"float32": (False, "float32", 1e-3), "tf32": (True, "float32", 1e-1), "bfloat16": (False, "bfloat16", 4e-1)}


@pytest.mark.parametrize("precision", STEPS)
def test_training_in_low_precision(precision: str, cuda: torch.device) -> None:
    """The conditional GDD-I case's first two steps: norm of all gradients, and mean logit, against the golden numbers.

    float32 1e-3, with TF32 1e-1, bfloat16 autocast of student and discriminator 4e-1; relative, logits to a tenth of it
    absolutely, since they are about 1 and their mean nearly cancels.
    """
    allowed, number, share = STEPS[precision]
    case = Case(ROOT / "training" / "gdd_i_cond_step.npz")
    frozen, records = set(case.meta["frozen"]), case.meta["records"]
    s = test_training.build(case, cuda, precision="float32")
    s.autocast = s.autocast_d = None if number == "float32" else torch.bfloat16
    case = case.to(cuda, torch.float32)

    def check(stats: dict[str, Tensor], record: dict[str, dict[str, float]], module: torch.nn.Module, key: str) -> None:
        names = [k for k in record["grad_norm"] if k not in frozen and not test_training.before_batchnorm(k)]
        grads = {k: p.grad for k, p in module.named_parameters()}
        norms = [0.0 if (g := grads[k]) is None else g.double().norm().item() for k in names if k in grads]
        expected = math.hypot(*(record["grad_norm"][k] for k in names if k in grads))
        assert len(norms) > 30 and all(map(math.isfinite, norms))
        assert math.hypot(*norms) == pytest.approx(expected, rel=share)
        assert stats[f"logits/{key}"].item() == pytest.approx(
            record["stats"][f"Loss/logits/{key.replace('g', 'fake')}"], abs=share / 10, rel=share / 10
        )

    with tf32(allowed):
        stats, _ = s.g_step(case["z0_0"], case["lab0"])
        check(stats, records[0], s.g, "g")
        stats = s.d_step(s.fake_features(case["z0_1"], case["lab0"]), s.real_features(case["img0"]), case["lab0"])
        check(stats, records[1], s.d, "real")
