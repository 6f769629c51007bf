"""What makes an iteration fast on a GPU, as far as a CPU shows it: no waiting, fixed places, drawn ahead, graphs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gddlab.distill.trainer as trainer
from gddlab.distill.distributed import World
from gddlab.distill.graph import WARM, Graphed
from gddlab.distill.randomness import Ahead, Batch
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from gddlab.runtime import tf32
from tests.benchmarks.loops import Waits
from tests.conftest import tiny_config
from tests.distill.test_trainer import by, tensors

ALONE = World(0, 1, torch.device("cpu"))
KINDS: dict[str, dict[str, Any]] = {
    "gdd": {},
    "fast": {"precision": "bfloat16", "precision_d": "bfloat16", "channels_last": True, "reuse_fakes": True},
    "parts": {"batch_per_device": 2},
    "kept features": {"discriminator": {"cache_real": True}},
    "stylegan2": {"discriminator": {"kind": "stylegan2"}},
}


def new(path: Path, teacher: Path, **fields: Any) -> Trainer:
    t = Trainer(tiny_config(path, teacher, r1_interval=2, **fields), ALONE)
    t.cache_real()
    return t


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_does_not_wait(kind: str, tmp_path: Path, tiny_teacher: Path) -> None:
    """No value reaches Python, and nothing is made from Python's numbers, from the batch to the average."""
    t = new(tmp_path / "run", tiny_teacher, **KINDS[kind])
    t.iteration = 2  # with R1
    batch = t.drawer.place(t.draw(2, t.nimg))
    if t.real is not None:
        batch = batch._replace(features=[f[:8] for f in t.real])
    with Waits("convolution.") as ran, Waits("lift_fresh") as waits:  # which copies Python's numbers
        t.meter.add(t.run(batch) | t.run_r1((batch.images, batch.labels)))
    assert ran.seen and not waits.seen


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_keeps_its_memory(kind: str, tmp_path: Path, tiny_teacher: Path) -> None:
    """A CUDA graph reads and writes where it was recorded: parameters, buffers, optimisers, averages stay in place."""
    t = new(tmp_path / "run", tiny_teacher, **KINDS[kind])
    before = {name: (x.data_ptr(), x.clone()) for name, x in tensors(t).items()}
    for _ in range(3):
        t.iterate()
    after = tensors(t)
    assert {n: x.data_ptr() for n, x in after.items()} == {n: place for n, (place, _) in before.items()}
    moved = [n for n, (_, x) in before.items() if not torch.equal(x, after[n])]
    assert len(moved) > len(before) / 2


class OnCPU(Graphed[Any]):
    """What is recorded runs again on the tensors that were held, as a graph does."""

    def _aside(self, given: Any) -> dict[str, Tensor]:
        return self.run(given)

    def _recorded(self) -> Callable[[], object]:
        self.out = {}
        return lambda: self.out.update(self.run(self.given))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_iterations_are_the_same(
    kind: str, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, recorded = (new(tmp_path / name, tiny_teacher, **KINDS[kind]) for name in "ab")
    device = torch.device("cpu")
    recorded.run, recorded.run_r1 = OnCPU(recorded.run, device), OnCPU(recorded.run_r1, device)
    for _ in range(2 * WARM + 4):
        plain.iterate()
        recorded.iterate()
    assert recorded.run.calls > WARM and recorded.run_r1.calls > WARM
    a, b = tensors(plain), tensors(recorded)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert plain.tick().items() >= {k: v for k, v in recorded.tick().items() if "/" in k}.items()


@pytest.mark.parametrize("fields", [{}, {"mid_sigmas": (0.8,)}, {"instance": by("cd")}], ids=["gdd", "two", "cd"])
def test_drawn_ahead_is_the_same(fields: dict[str, Any], tmp_path: Path, tiny_teacher: Path) -> None:
    plain, ahead = (new(tmp_path / name, tiny_teacher, **fields) for name in "ab")
    ahead.ahead.pool = ThreadPoolExecutor(1)
    for _ in range(3):
        plain.iterate()
        ahead.iterate()
    a, b = tensors(plain), tensors(ahead)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_jump_is_drawn_anew() -> None:
    made = []

    def make(iteration: int, position: int) -> Batch:
        made.append((iteration, position))
        return Batch(torch.tensor([iteration, position]))

    ahead = Ahead(make, 8, torch.device("cpu"))
    ahead.pool = ThreadPoolExecutor(1)
    assert [ahead(i, p).z.tolist() for i, p in ((0, 0), (1, 8), (5, 8))] == [[0, 0], [1, 8], [5, 8]]
    assert made[:2] == [(0, 0), (1, 8)]


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"mid_sigmas": (0.8,)}, 1, "cuda_graph=True with mid_sigmas"),
        ({"instance": by("cd")}, 1, "cuda_graph=True with instance"),
        ({"augment": {"ops": ("blit",)}}, 1, "cuda_graph=True with augment"),
        ({}, 2, "cuda_graph=True on 2 processes"),
        ({}, 1, "cuda_graph=True on the CPU"),
    ],
)
def test_where_there_is_no_graph(
    fields: dict[str, Any], size: int, message: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    if size == 1 and not fields and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(GddlabError, match=message):
        trainer.check(tiny_config(tmp_path / "run", tiny_teacher, cuda_graph=True, **fields), world_size=size)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_and_set_back(allowed: bool) -> None:
    """Afterwards torch's older settings can be read again: they raise where they differ from the newer ones."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [s.fp32_precision for s in settings]
    with tf32(allowed):
        assert [s.fp32_precision for s in settings] == 2 * ["tf32" if allowed else "ieee"]
    assert [s.fp32_precision for s in settings] == before
    assert torch.backends.cudnn.allow_tf32 is True and torch.backends.cuda.matmul.allow_tf32 is False


def test_tf32_is_not_compiled(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(GddlabError, match="tf32=True with compile=True"):
        tiny_config(tmp_path / "run", tiny_teacher, tf32=True, compile=True)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_says_what_float32_is(
    allowed: bool, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = new(tmp_path / "run", tiny_teacher, tf32=allowed)
    seen, run = [], t.run
    monkeypatch.setattr(t, "run", lambda b: (seen.append(torch.backends.cudnn.conv.fp32_precision), run(b))[1])
    t.iterate()
    assert seen == ["tf32" if allowed else "ieee"]
