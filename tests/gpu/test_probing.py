"""Measurements on a card against the CPU's: statistics, crossed levels, null models, likeness, readouts, traces.

A float32 layer is off by about 1e-6 of its size per layer before it, since sums are taken in another order; ten layers
and a mean over pixels leave 1e-4 where nothing amplifies it. Sums of statistics are float64 on both.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset
from gddlab.evaluation.trace import trace
from gddlab.files import hash_tensors
from gddlab.probing import STATISTICS, ProbeResult, ablate, null, probe
from gddlab.probing.decode import decode
from gddlab.probing.gradients import grad_probe
from gddlab.probing.guard import exactly
from gddlab.probing.null import Kind
from tests.gpu.conftest import tf32
from tests.probing.networks import tiny

pytestmark = pytest.mark.gpu

SIGMAS = [80.0, 1.0, 0.01]
COUNTED = ("active_fraction", "dead_channels")
"""Counts: rounding may move a value across 0."""


def assert_alike(found: ProbeResult, expected: ProbeResult, *, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """The same rows, and values to `rtol` of the value and `atol`; counts to 1e-2."""
    keys = [k for k in ("layer", "sigma", "told", "stat", "n_images") if k in expected.frame]
    assert found.frame[keys].equals(expected.frame[keys]) and len(found.frame)
    counted = expected.frame["stat"].isin(COUNTED)
    for column in ("value", "sem"):
        a, b = found.frame[column], expected.frame[column]
        np.testing.assert_allclose(a[~counted], b[~counted], rtol=rtol, atol=atol)
        np.testing.assert_allclose(a[counted], b[counted], rtol=0, atol=1e-2)


def probed(where: torch.device | str, data: ImageDataset, **more: Any) -> ProbeResult:
    settings = {"data": data, "n": 16, "batch_size": 24, "device": where, "progress": False}
    return probe(tiny(), SIGMAS, **(settings | more))


def test_every_statistic(cuda: torch.device, pictures: ImageDataset) -> None:
    """Each statistic, of all layers: value and standard error on the card against the CPU, 1e-3 and 1e-4 absolute."""
    stats = [name for name in STATISTICS if name not in ("rel_update_cross", "rel_update_mlp")]  # of transformers
    found, expected = (probed(where, pictures, layers="all", stats=stats) for where in (cuda, "cpu"))
    assert set(found.frame["stat"]) >= {"rms", "correlation", "cosine", "cka"}
    assert_alike(found, expected)


def test_statistics_by_compiled_code(cuda: torch.device, pictures: ImageDataset) -> None:
    """`compile=True`, which is Triton on a card, against the CPU without it: 1e-3 and 1e-4 absolute."""
    assert_alike(probed(cuda, pictures, layers="all", compile=True), probed("cpu", pictures, layers="all"))


def test_statistics_by_channel(cuda: torch.device, pictures: ImageDataset) -> None:
    """Mean and variance of each channel on the card against the CPU, 1e-3 and 1e-4 absolute."""
    tables = [probed(where, pictures, per_channel=True, stats="rms").channels for where in (cuda, "cpu")]
    assert tables[0].keys() == tables[1].keys() and tables[0]
    for name, expected in tables[1].items():
        for moment in ("mean", "var"):
            np.testing.assert_allclose(tables[0][name][moment], expected[moment], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stat", ["correlation", "cosine", "cka"])
def test_likeness_of_noise_levels(stat: str, cuda: torch.device, pictures: ImageDataset) -> None:
    """Matrices of noise levels against each other on the card against the CPU, 1e-4; 1 on their diagonals to 1e-5."""
    found, expected = (probed(where, pictures, stats=stat).matrices[stat] for where in (cuda, "cpu"))
    assert found.keys() == expected.keys() and len(found) > 3
    for layer, matrix in expected.items():
        np.testing.assert_allclose(found[layer], matrix, rtol=0, atol=1e-4, err_msg=layer)
        np.testing.assert_allclose(np.diagonal(found[layer]), 1, rtol=0, atol=1e-5)


def test_crossed_probe(cuda: torch.device, pictures: ImageDataset) -> None:
    """Each level told for each input: values, and shares of input and level (`effects`), against the CPU, 1e-3."""
    found, expected = (probed(where, pictures, told="cross", stats=["rms", "cosine"]) for where in (cuda, "cpu"))
    assert_alike(found, expected)
    for stat in ("rms", "cosine"):
        ours, theirs = found.effects(stat), expected.effects(stat)
        columns = ["input", "told", "both"]
        np.testing.assert_allclose(ours[columns], theirs[columns], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["init", "shuffled", "spectrum"])
def test_null_models(kind: Kind, cuda: torch.device) -> None:
    """Null models of a network on the card are those of the CPU to the bit, on the card; its generator is untouched.

    They are drawn on the CPU; "init" scales by a root mean square, taken where the network is, hence 1e-6.
    """
    state = torch.cuda.get_rng_state(cuda) if cuda.type == "cuda" else torch.get_rng_state()
    found, expected = null(tiny().to(cuda), kind, seed=3), null(tiny(), kind, seed=3)
    after = torch.cuda.get_rng_state(cuda) if cuda.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert a.device.type == cuda.type
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6 if kind == "init" else 0, atol=0, msg=name)


def test_null_models_are_measured(cuda: torch.device, pictures: ImageDataset) -> None:
    """A probe with null models: each draw on the card against the CPU, 1e-3."""
    found, expected = (probed(where, pictures, nulls="shuffled", null_draws=2, stats="rms") for where in (cuda, "cpu"))
    assert_alike(found, expected)
    for a, b in zip(found.nulls["shuffled"], expected.nulls["shuffled"], strict=True):
        assert_alike(a, b)


def test_readouts(cuda: torch.device, pictures: ImageDataset) -> None:
    """Linear readouts on the card against the CPU: R² to 2e-2, accuracies to one of the held-out images.

    Sums are float64, but a strength is chosen among 49 by a score that may be equal to rounding.
    """
    settings: dict[str, Any] = {"data": pictures, "layers": "block", "n": 32, "held_out": 16, "dims": 8}
    found, expected = (
        decode(tiny(), [80.0, 0.02], device=where, progress=False, **settings).frame for where in (cuda, "cpu")
    )
    assert found[["layer", "sigma", "stat"]].equals(expected[["layer", "sigma", "stat"]])
    classes = expected["stat"].str.startswith("decode_class")
    np.testing.assert_allclose(found["value"][~classes], expected["value"][~classes], rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(found["value"][classes], expected["value"][classes], rtol=0, atol=1.01 / 16)


@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
def test_trace(mode: Any, cuda: torch.device) -> None:
    """Effect of each block in each of three steps on the final pixels, on the card against the CPU, 1e-3."""
    found, expected = (
        trace(tiny(), [80.0, 5.0, 0.5], mode=mode, n=4, extractor=None, device=where, progress=False)
        for where in (cuda, "cpu")
    )
    assert_alike(found, expected)


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_ablation(mode: Any, cuda: torch.device, pictures: ImageDataset) -> None:
    """Effect of each block's removal on output and loss, on the card against the CPU, 1e-3 and 1e-4 absolute."""
    settings: dict[str, Any] = {"layers": "block", "mode": mode, "data": pictures, "n": 8, "progress": False}
    assert_alike(*(ablate(tiny(), SIGMAS, device=where, **settings) for where in (cuda, "cpu")))


def test_gradients(cuda: torch.device, pictures: ImageDataset) -> None:
    """Statistics of each layer's gradients on the card against the CPU, 1e-2: signal is a difference of squares."""
    settings: dict[str, Any] = {"data": pictures, "n": 16, "batch_size": 4, "progress": False}
    found, expected = (grad_probe(tiny(), timesteps=[5.0, 0.5], device=where, **settings) for where in (cuda, "cpu"))
    assert_alike(found, expected, rtol=1e-2)


def test_probe_under_autocast(cuda: torch.device, pictures: ImageDataset) -> None:
    """bfloat16 autocast on the card against float32 on the CPU: rms to 3e-2, ten layers of 2^-9 each."""
    low = probed(cuda, pictures, stats="rms", dtype="bfloat16").pivot("rms")
    full = probed("cpu", pictures, stats="rms").pivot("rms")
    np.testing.assert_allclose(low, full, rtol=3e-2)
    assert not np.allclose(low, full, rtol=1e-5)


def test_own_products_are_exact_where_tf32_is_allowed(cuda: torch.device) -> None:
    """`exactly`: a product of 1024 x 1024 against float64, 1e-5 of its size, though TF32 (5e-4) is allowed."""
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(cuda)
    with tf32(True), exactly(cuda):
        off = ((a @ a).double() - a.double() @ a.double()).abs().max().item()
    assert off < 1e-5 * 32  # the root of 1024 is the size of an entry


def test_a_network_goes_to_the_card_and_back(cuda: torch.device, pictures: ImageDataset) -> None:
    """device= takes a network of the CPU to the card for the probe; then bits, device and hooks are as before."""
    net = tiny()
    before, seen = hash_tensors(net.state_dict()), []
    net.register_forward_pre_hook(lambda m, a: seen.append(a[0].device.type))
    probe(net, SIGMAS, data=pictures, n=2, device=cuda, progress=False)
    assert set(seen) == {cuda.type}
    assert hash_tensors(net.state_dict()) == before
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    assert not any(m._forward_hooks for m in net.modules())


def test_memory_after_a_hundred_probes(cuda: torch.device, pictures: ImageDataset) -> None:
    """A hundred probes leave no byte allocated on the card beyond what one leaves; on a CPU, ten no tensor more."""

    def held() -> int:
        gc.collect()
        if cuda.type == "cuda":
            return torch.cuda.memory_allocated(cuda)
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    net = tiny().to(cuda)
    settings: dict[str, Any] = {"data": pictures, "n": 2, "stats": ["rms", "correlation"], "progress": False}
    probe(net, SIGMAS, **settings)
    before = held()
    for _ in range(100 if cuda.type == "cuda" else 10):
        probe(net, SIGMAS, **settings)
    assert held() <= before
