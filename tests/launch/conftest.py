"""Runs that start in little time, and one that nobody disturbs, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.launch import train
from tests.launch.faults import ended_with, lines

Quick = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Quick:
    """A configuration whose processes import neither timm nor scikit-learn: `quick(run_dir, **fields)`, 40 iterations
    of 8.
    """
    data = tmp_path_factory.mktemp("data")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(data / f"{i:02}.png")
    settings: dict[str, Any] = {
        "teacher": str(tiny_teacher),
        "data": str(data),
        "discriminator": {"kind": "stylegan2", "channel_max": 8},
        "batch": 8,
        "r1_interval": 2,
        "r1_gamma": 1e-3,
        "reuse_fakes": False,
        "total_kimg": 0.32,
        "tick_kimg": 0.016,
        "checkpoint_kimg": 0.032,
        "snapshot_kimg": 0.32,
    }

    def make(run_dir: Path, **fields: Any) -> TrainConfig:
        return presets.digits(run_dir=run_dir, **(settings | fields))

    return make


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """A process of two machines would take more threads than one of two on this machine, and round sums in another
    order.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, quick: Quick, one_thread: None) -> TrainConfig:
    """A finished run of two processes."""
    config = quick(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("TORCHELASTIC_RESTART_COUNT", "1")):
            patch.setenv(name, value)  # as in a notebook that a cluster started: the run is none of that job's
        assert train(config, nproc=2).wait(300).status == "done"
    return config


def assert_same(config: TrainConfig, undisturbed: TrainConfig) -> None:
    """Parameters and metrics are the same to the bit."""
    own, whole = ended_with(config), ended_with(undisturbed)
    assert own.keys() == whole.keys()
    assert all((own[k] == v).all() for k, v in whole.items())
    assert lines(config.run_dir) == lines(undisturbed.run_dir)
