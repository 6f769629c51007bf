"""The cost model: counts are those of layers that can be worked out by hand, and times follow from them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gddlab.diagnosis.scaling import A100, Counted, Counter, count, counted, scaling
from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError
from tests.benchmarks.counts import PRESETS, configured
from tests.conftest import tiny_config

COUNTS = Counted(
    student=60e9,
    rest=40e9,
    r1=16e9,
    kernels=2000,
    kernels_r1=1600,
    parameters=56_000_000,
    trained=9_000_000,
    discriminator=20_000_000,
)


def config(**fields: object) -> TrainConfig:
    return presets.cifar10(run_dir="unused", **{"precision": "float32", "tf32": True} | fields)


def test_counts_by_hand() -> None:
    """A convolution of 3 to 5 channels, 3x3, on 8x8: 2 * 64 * 27 * 5 per pass, twice that backward, more for R1."""
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 64 * 27 * 5
    with Counter() as counter:
        y = conv(x)
    assert counter.flops == forward and counter.kernels == 1
    with counter:
        y.sum().backward()
    assert counter.flops == 3 * forward
    with Counter() as counter:
        (slope,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert counter.flops > 4 * forward


def test_counts_of_a_run(tmp_path: Path, tiny_teacher: Path) -> None:
    """They are in proportion to images, and fresh images in the discriminator step cost one more forward pass."""
    fresh = tiny_config(tmp_path / "a", tiny_teacher)
    reusing = tiny_config(tmp_path / "b", tiny_teacher, reuse_fakes=True)
    one = counted(fresh, batch=4, stand_in=False)
    for c in (fresh, reusing):
        c.write()
    two, reused = (
        Counted(**count(str(c.run_dir), batch, False, print)) for c, batch in ((fresh, 8), (reusing, 4))
    )  # as a fresh process does it
    assert one.student == pytest.approx(two.student) and one.rest == pytest.approx(two.rest, rel=0.01)
    assert one.parameters == one.trained > 0 and one.r1 > 0 and one.kernels_r1 > 0
    assert 0.2 * one.student < one.student - reused.student < 0.3 * one.student  # of four passes' worth: 1 + 2 + 1
    with pytest.raises(GddlabError, match="batch=0"):
        counted(fresh, batch=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_counts_of_presets_are_those_on_file(name: str) -> None:
    file = Path(__file__).parent / "benchmarks" / "counts.json"
    assert asdict(counted(configured(name), batch=1)) == json.loads(file.read_text())[name]


def test_times_follow_from_counts() -> None:
    table = scaling(config(), COUNTS, gpus=(1, 8, 64)).set_index("gpus")
    whole = 256 * (60e9 + 40e9 + 1e9) / (0.2 * 156e12)
    assert table.loc[1, "arithmetic_ms"] == pytest.approx(1e3 * whole)
    assert table.loc[8, "arithmetic_ms"] == pytest.approx(1e3 * whole / 8)
    assert table.loc[64, "kernels_ms"] == pytest.approx(2100 * 8e-3)
    ring = 2 * 7 / 8 * 4 * (9e6 + 20e6 * 17 / 16) / (0.7 * 300e9) + (2 + 1 / 16) * 2 * 7 * 10e-6
    assert table.loc[8, "all_reduce_ms"] == pytest.approx(1e3 * ring)
    assert table.loc[1, "all_reduce_ms"] == 0 and table.loc[1, "efficiency"] == 1
    step = max(whole / 8, 2100 * 8e-6) + ring
    assert table.loc[8, "step_ms"] == pytest.approx(1e3 * step)
    assert table.loc[8, "hours"] == pytest.approx(5e6 / 256 * step / 3600)
    assert table.loc[8, "images_s"] == pytest.approx(256 / step)
    assert table["limit"].tolist() == ["arithmetic", "arithmetic", "kernels"]
    state = 4 * (2 * 56e6 + 3 * 9e6)
    assert table.loc[8, "ddp_gib"] == pytest.approx((state + 16 * 20e6) / 2**30)
    assert table.loc[8, "fsdp_gib"] == pytest.approx((state / 8 + 16 * 20e6) / 2**30)
    slow = scaling(config(), COUNTS, hardware=replace(A100, network_gb_s=0.01), gpus=(8, 64)).set_index("gpus")
    assert slow.loc[64, "limit"] == "all-reduce" and slow.loc[8, "limit"] == "arithmetic"


def test_parts_of_a_batch_start_their_own_kernels() -> None:
    table = scaling(config(batch_per_device=8), COUNTS, gpus=(8,))
    assert table["kernels_ms"][0] == pytest.approx(4 * 2100 * 8e-3)


def test_precision_and_graph_set_the_rates() -> None:
    def row(**fields: object) -> object:
        return scaling(config(**fields), COUNTS, gpus=(1,)).iloc[0]

    exact = 256 * (60e9 + 40e9 + 1e9) / (0.5 * 19.5e12)
    assert row(tf32=False)["arithmetic_ms"] == pytest.approx(1e3 * exact)
    student = 256 * 60e9 * (1 / (0.2 * 312e12) - 1 / (0.5 * 19.5e12))
    low = row(tf32=False, precision="bfloat16")["arithmetic_ms"]
    assert low == pytest.approx(1e3 * (exact + student))
    assert row(cuda_graph=True)["kernels_ms"] == pytest.approx(2100 * 1.5e-3)


def test_refusals() -> None:
    with pytest.raises(GddlabError, match="batch=256 on 3 GPUs"):
        scaling(config(), COUNTS, gpus=(3,))
