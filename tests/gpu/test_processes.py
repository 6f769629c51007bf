"""Processes on a card: NCCL and FSDP2 with one, gloo with two, and launching from a process that has used CUDA."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gddlab.distill.distributed import World
from gddlab.errors import GddlabError
from gddlab.files import read_json
from gddlab.launch import train
from tests.conftest import tiny_config
from tests.gpu import rank

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


def together(
    kind: str, backend: str, size: int, device: torch.device, teacher: Path, out: Path
) -> dict[str, torch.Tensor]:
    """Runs `tests.gpu.rank` in processes of one group; what the first has saved."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    about = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.gpu.rank", kind, backend, str(device), str(teacher), str(out)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | about | {"RANK": str(i), "LOCAL_RANK": "0", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(size)
    ]
    try:
        for process in started:
            text = process.communicate(timeout=120)[0]
            assert process.returncode == 0, text[-3000:]
    finally:
        for process in started:
            process.kill()
    found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
    return found


def backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def test_nccl_with_one_process(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """all_reduce, all_gather and broadcast of one process through NCCL return what they were given, to the bit."""
    found = together("collectives", backend(cuda), 1, cuda, tiny_teacher, tmp_path / "out.pt")
    assert torch.equal(found["given"], found["reduced"]) and torch.equal(found["given"], found["gathered"])


def test_fsdp_with_one_process(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """A step of Adam of a student that FSDP2 shards over one process against the plain student's: 1e-6."""
    found = together("sharded", backend(cuda), 1, cuda, tiny_teacher, tmp_path / "out.pt")
    names = [k.removeprefix("whole/") for k in found if k.startswith("whole/")]
    assert len(names) > 30
    for name in names:
        torch.testing.assert_close(found[f"parts/{name}"], found[f"whole/{name}"], rtol=0, atol=1e-6, msg=name)


def test_two_processes_on_one_card(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Three float64 iterations of two processes on one card, through gloo, against one process there: 1e-7.

    Half a batch each rounds sums in another order, 1e-16, which Adam raises where a gradient is nearly 0.
    """
    found = together("trained", "gloo", 2, cuda, tiny_teacher, tmp_path / "out.pt")
    expected = rank.trained(tmp_path / "one", str(tiny_teacher), World(0, 1, cuda))
    assert found.keys() == expected.keys() and len(found) > 100
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=name)


def test_more_processes_than_cards_are_refused(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of more processes than cards is refused in one line, before NCCL fails with a number."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    with pytest.raises(GddlabError, match="each needs one of its own"):
        World.start("cuda")


def test_launch_after_cuda_was_used(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """A run launched by a process that holds a CUDA context, as a kernel does, trains on the card to its end.

    A forked child of such a process could not use CUDA; the run's device and what it leaves are compared.
    """
    assert (torch.ones(8, device=cuda) * 2).sum().item() == 16
    run = train(tiny_config(tmp_path / "run", tiny_teacher, device=cuda.type), nproc=1).wait(150)
    assert run.status == "done"
    assert read_json(run.run_dir / "status.json")["nimg"] == 48
    assert (run.run_dir / "student.safetensors").is_file()
    if cuda.type == "cuda":  # what a process on a CPU takes is more than the networks by far
        assert run.metrics["peak_mem_mib"].iloc[-1] < 1000
    assert (torch.ones(8, device=cuda) * 2).sum().item() == 16
