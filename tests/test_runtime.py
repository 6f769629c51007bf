"""The device that a process takes, with GPUs that are only pretended, and its random numbers."""

from __future__ import annotations

import pytest
import torch

from gddlab.distill.distributed import World
from gddlab.errors import GddlabError
from gddlab.runtime import chosen_device, generator


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device() == chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(GddlabError, match="torch sees no CUDA device"):
        chosen_device("cuda")
    with pytest.raises(GddlabError, match="device='gpu': give auto, cpu or cuda"):
        chosen_device("gpu")


@pytest.mark.usefixtures("two_gpus")
def test_each_process_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    for local, index in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert chosen_device() == chosen_device("cuda") == torch.device("cuda", index)


@pytest.mark.usefixtures("two_gpus")
def test_training_wants_a_gpu_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(GddlabError, match="3 processes on a machine of 2 GPUs"):
        World.start()


def test_seeds_and_positions_differ() -> None:
    draws = {float(torch.rand((), generator=generator(s, p))) for s in range(20) for p in range(20)}
    assert len(draws) == 400
    assert torch.equal(torch.rand(3, generator=generator(7, 5)), torch.rand(3, generator=generator(7, 5)))
