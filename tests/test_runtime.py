"""The device that a process takes, with GPUs that are only pretended, its limits, and its random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gddlab.distill.distributed import World
from gddlab.errors import GddlabError
from gddlab.limits import Limits, container_limits, usable_cores
from gddlab.lock import OWNED
from gddlab.provenance import hardware
from gddlab.runtime import beside_runs, chosen_device, generator

GIB = 1 << 30


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


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    """The tightest limit on the way up counts; cached files are not in use."""
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/box\n")
    write(tmp_path / "fs" / "pod" / "box", cpu__max="max 100000", memory__max="max")
    write(
        tmp_path / "fs" / "pod",
        cpu__max="150000 100000",
        memory__max=str(2 * GIB),
        memory__current=str(GIB),
        memory__stat=f"anon 5\ninactive_file {GIB // 4}",
    )
    limits = container_limits(own, tmp_path / "fs")
    assert limits == Limits(1.5, 2 * GIB, GIB * 3 // 4)


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    """A container sees its own group as the root, under a path that is the host's; a limit near 2^63 is none."""
    own = tmp_path / "cgroup"
    own.write_text("9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
    write(tmp_path / "fs" / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(tmp_path / "fs" / "memory", memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(GIB))
    assert container_limits(own, tmp_path / "fs") == Limits(3.0, 3 * GIB, GIB)
    write(tmp_path / "fs" / "memory", memory__limit_in_bytes="9223372036854771712")
    write(tmp_path / "fs" / "cpu", cpu__cfs_quota_us="-1")
    assert container_limits(own, tmp_path / "fs") == Limits()
    assert container_limits(tmp_path / "none", tmp_path / "fs") == Limits()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on GPUs leave the cores to others")
def test_cores_are_left_to_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before, cores = torch.get_num_threads(), int(usable_cores())
    script = [sys.executable, "-c", "print('on', flush=True); input()", "gddlab.launch.rank"]
    for threads in (1, 64):
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        run = subprocess.Popen(script, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None and run.stdout.readline() == "on\n"
        time.sleep(1)  # runs are looked up once a second
        with beside_runs():
            assert torch.get_num_threads() == max(1, min(before, cores - threads))
        assert torch.get_num_threads() == before
        with monkeypatch.context() as patch:
            patch.setenv(OWNED, "1")  # a run's own process
            with beside_runs():
                assert torch.get_num_threads() == before
        run.communicate("")
    time.sleep(1)
    with beside_runs():
        assert torch.get_num_threads() == before


def test_the_processor_is_named() -> None:
    """And the instructions that torch uses on it: where they differ, one seed gives other numbers."""
    name, instructions = str(hardware()["cpu"]).rsplit(", ", 1)
    assert name and instructions == torch.backends.cpu.get_cpu_capability()
    cpuinfo = Path("/proc/cpuinfo")
    assert not cpuinfo.exists() or "model name" not in cpuinfo.read_text() or f": {name}\n" in cpuinfo.read_text()
