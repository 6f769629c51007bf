"""Training on a card: losses against the CPU's, frozen stays frozen, continued equals uninterrupted, memory."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gddlab.diagnosis import doctor
from gddlab.diagnosis.preflight import preflight
from gddlab.distill.distributed import World
from gddlab.distill.teacher import TeacherConfig, train_teacher
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from gddlab.files import read_jsonl
from gddlab.freezing import select_freeze
from gddlab.runs import load_run
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config
from tests.distill.test_graph import KINDS
from tests.distill.test_trainer import assert_continued, by, tensors
from tests.gpu.conftest import deterministic

pytestmark = pytest.mark.gpu

Losses = dict[str, float]

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    # Fields, and what losses and logits may be off by, relative and absolute. They are sums over some ten layers and
    # about 1 in size; Adam's first steps have the sign of each gradient, so the second iteration's could be more.
    "plain": ({}, 1e-3),
    "float64": ({"precision": "float64"}, 1e-6),
    "channels_last": ({"channels_last": True}, 1e-3),
    "parts of a batch": ({"batch_per_device": 2}, 1e-3),
    "bfloat16": ({"precision": "bfloat16", "precision_d": "bfloat16"}, 5e-2),
    "fast": ({"precision": "bfloat16", "precision_d": "bfloat16", "channels_last": True, "reuse_fakes": True}, 5e-2),
    "stylegan2": ({"discriminator": {"kind": "stylegan2"}}, 1e-3),
    "augmented": ({"augment": {"ops": ("blit", "geom", "color"), "ada_target": 0.6, "ada_kimg": 0.1}}, 1e-3),
    "consistency": ({"instance": by("cd")}, 1e-3),
    "progressive": ({"instance": by("pd"), "discriminator": None}, 1e-3),
    "two steps": ({"mid_sigmas": (0.8,)}, 1e-3),
}


def alone(device: torch.device) -> World:
    return World(0, 1, device)


def losses(path: Path, teacher: Path, device: torch.device, **fields: Any) -> Losses:
    """Losses and logits of an iteration with R1, the first after start."""
    t = Trainer(tiny_config(path, teacher, **fields), alone(device))
    t.iteration = 2
    t.iterate()
    line = t.tick()
    return {k: v for k, v in line.items() if k.startswith(("loss/", "logits/", "nonfinite/")) or k == "r1"}


@pytest.mark.parametrize("way", WAYS)
def test_losses(way: str, cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Losses, logits and R1 of an iteration on the card against a float32 (float64) iteration on the CPU.

    Tolerances are those of `WAYS`: float64 1e-6, float32 1e-3, bfloat16 5e-2, each of a loss of about 1.
    """
    fields, share = WAYS[way]
    plain = fields | {"precision": "float32", "precision_d": "float32"} if "bfloat16" in fields.values() else fields
    found = losses(tmp_path / "card", tiny_teacher, cuda, **fields)
    expected = losses(tmp_path / "cpu", tiny_teacher, torch.device("cpu"), **plain)
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in expected.items():
        # R1 is a square of a gradient through the whole backbone, and small
        assert found[name] == pytest.approx(value, rel=10 * share if "r1" in name else share, abs=share), name


def test_losses_with_tf32(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Losses and logits of an iteration with tf32=True on the card against the CPU's float32, 2e-2 of about 1."""
    found = losses(tmp_path / "card", tiny_teacher, cuda, tf32=True)
    exact = losses(tmp_path / "exact", tiny_teacher, cuda)
    assert cuda.type == "cpu" or found != exact
    expected = losses(tmp_path / "cpu", tiny_teacher, torch.device("cpu"))
    for name in ("loss/g", "loss/d", "logits/fake", "logits/real"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2, abs=2e-2), name


def test_losses_of_a_compiled_run(card: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Losses of a run with compile=True against the eager run on the same card, 1e-3: fused kernels round elsewhere."""
    found = losses(tmp_path / "compiled", tiny_teacher, card, compile=True)
    assert found == pytest.approx(losses(tmp_path / "eager", tiny_teacher, card), rel=1e-3, abs=1e-3)


GRAPHS: dict[str, dict[str, Any]] = KINDS | {"compiled": {"compile": True}}


@pytest.mark.parametrize("kind", GRAPHS)
def test_cuda_graph_of_an_iteration(kind: str, card: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Ten iterations, R1 in every second one, as a CUDA graph against launched ones: metrics to 1e-2 of about 1.

    The first three of each kind are launched, so most are replayed; spectral norm's vectors move on in replays.
    """
    lines, vectors = [], []
    with deterministic(warn_only=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for graph in (False, True):
            config = tiny_config(tmp_path / str(graph), tiny_teacher, cuda_graph=graph, **GRAPHS[kind])
            t = Trainer(config, alone(card))
            t.cache_real()
            for i in range(10):
                if i == 8:
                    before = {n: x.clone() for n, x in tensors(t).items() if n.endswith("weight_u")}
                t.iterate()
            lines.append({k: v for k, v in t.tick().items() if "/" in k or k == "r1"})
            vectors.append({n: x for n, x in tensors(t).items() if n in before})
            assert all(not torch.equal(x, before[n]) for n, x in vectors[-1].items() if len(x) > 1)
    assert lines[0].keys() == lines[1].keys()
    for name, value in lines[0].items():
        assert lines[1][name] == pytest.approx(value, rel=1e-2, abs=1e-2), name


def test_an_iteration_on_the_card_does_not_wait(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """Iterations with R1, average and metrics, without a synchronisation of CPU and card once the kernels are chosen.

    Torch raises at each one under `set_sync_debug_mode("error")`.
    """
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher), alone(cuda))
    for _ in range(4):
        t.iterate()
    if cuda.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            t.iterate()
    finally:
        if cuda.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert t.iteration == 6


def test_frozen_stays_frozen(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """After six iterations on the card frozen parameters and buffers are the teacher's to the bit; others moved."""
    teacher = load_teacher(tiny_teacher)
    mask = select_freeze(teacher, strategy="gdd-i")
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, mask=mask), alone(cuda))
    assert t.train() == "done"
    for net in (t.step.g, t.ema):
        assert {p.device.type for p in net.parameters()} == {cuda.type}
        mask.verify(net.cpu(), teacher)
    before = dict(teacher.named_parameters())
    moved = [n for n, p in t.step.g.named_parameters() if n not in mask.frozen and not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * (len(before) - len(mask.frozen))


def test_probes_and_images_of_a_run(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """A run on the card probes its average, compares it with the teacher and writes images; frozen layers stay."""
    mask = select_freeze(load_teacher(tiny_teacher), strategy="gdd-i")
    config = tiny_config(tmp_path / "run", tiny_teacher, mask=mask, probe_kimg=0.048)
    config.write()
    assert Trainer(config, alone(cuda)).train() == "done"
    frame = load_run(config.run_dir).probes
    assert sorted(set(frame["kimg"])) == [0.0, 0.048]
    moved = frame[frame["stat"] == "weight_change"].pivot(index="layer", columns="kimg", values="value")
    frozen = {n.rpartition(".")[0] for n in mask.frozen} & set(moved.index)
    assert frozen and (moved.loc[sorted(frozen)] == 0).all(axis=None) and (moved[0.048] > 0).any()
    assert any((config.run_dir / "samples").iterdir())


CONTINUED: dict[str, dict[str, Any]] = {
    "gdd": {},
    "ada": {"augment": {"ops": ("bgc",), "ada_target": 0.6, "ada_kimg": 0.1}},
    "two steps": {"mid_sigmas": (0.8,)},
    "gan and cd": {"instance": by("cd")},
    "stylegan2": {"discriminator": {"kind": "stylegan2"}},
    "bfloat16": {"precision": "bfloat16", "precision_d": "bfloat16", "channels_last": True},
}

WITHOUT_DETERMINISTIC_KERNELS: set[str] = set()
"""Operations of a training iteration that torch has no deterministic CUDA kernel for; of two equal runs, those that use
them may differ. None is known: `F.interpolate` takes another way under deterministic algorithms."""


def operations(caught: list[warnings.WarningMessage]) -> set[str]:
    """Names in torch's warnings of operations without a deterministic kernel."""
    found = (re.match(r"(.+?) (does not have a deterministic|defaults to a non-det)", str(w.message)) for w in caught)
    return {m[1] for m in found if m}


@pytest.mark.parametrize("kind", CONTINUED)
def test_continued_equals_uninterrupted(kind: str, cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """A run stopped after three of six iterations and continued equals the whole one to the bit, on the same card.

    With deterministic kernels; parameters, averages, both optimisers' states and metrics. An operation without such a
    kernel is named, and the run may differ only if it is in `WITHOUT_DETERMINISTIC_KERNELS`.
    """
    with deterministic(warn_only=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        different = None
        try:
            assert_continued(tmp_path, tiny_teacher, alone(cuda), **CONTINUED[kind])
        except AssertionError as e:
            different = e
    named = operations(caught)
    assert named <= WITHOUT_DETERMINISTIC_KERNELS, f"not known as not deterministic: {sorted(named)}"
    assert different is None or named, f"differs, and torch names no operation: {different}"


def test_repeated_iteration_without_deterministic_kernels(
    cuda: torch.device, tmp_path: Path, tiny_teacher: Path
) -> None:
    """Two iterations from one seed on the card with any kernels: gradients of the student to 1e-3 of the largest.

    Atomic sums round in the order in which threads come, 1e-6 each; more would be a race of streams.
    """
    runs = []
    for name in "ab":
        t = Trainer(tiny_config(tmp_path / name, tiny_teacher), alone(cuda))
        t.step.g_step(t.drawer.place(t.drawer.latents(0, 0)), None)
        runs.append([p.grad.clone() for p in t.step.g_params if p.grad is not None])
    largest = max(g.abs().max().item() for g in runs[0])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * largest)


def test_a_checkpoint_of_the_card_is_read_on_the_cpu(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """A checkpoint written on the card and read on the CPU holds the same numbers to the bit."""
    config = tiny_config(tmp_path / "run", tiny_teacher)
    t = Trainer(config, alone(cuda))
    t.iterate()
    t.checkpoint()
    t.checkpoints.close()
    other = Trainer(config, alone(torch.device("cpu")))
    assert other.restore() is not None and other.iteration == 1
    ours, theirs = tensors(t), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.cpu(), theirs[name].cpu()), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_teacher(precision: str, cuda: torch.device, tmp_path: Path) -> None:
    """Losses of a teacher that is trained on the card against the CPU's float32: 1e-2, bfloat16 5e-2, of about 1."""
    small = {"model_channels": 8, "num_blocks": 1, "batch": 8, "total_kimg": 0.32, "tick_kimg": 0.08}
    small |= {"lr": 3e-3, "lr_rampup_kimg": 0}  # forty steps in which the loss falls
    runs = []
    for device, kind in ((cuda.type, precision), ("cpu", "float32")):
        config = TeacherConfig(run_dir=tmp_path / (device + kind), device=device, precision=kind, **small)
        runs.append([m["loss"] for m in read_jsonl(train_teacher(config).parent / "metrics.jsonl")])
    assert runs[0] == pytest.approx(runs[1], rel=1e-2 if precision == "float32" else 5e-2)


# Memory and diagnosis.


def test_memory_of_an_iteration_does_not_grow(card: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """What is allocated after two iterations with R1 is what is allocated after ten, to the byte."""
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, r1_interval=1), alone(card))
    held = []
    for _ in range(10):
        t.iterate()
        held.append(torch.cuda.memory_allocated(card))
    assert held[-1] <= held[2]


def test_out_of_memory_says_which_field_to_change(
    cuda: torch.device, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory (on a card, of a share of it that holds nothing more) is one line that names batch_per_device."""
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, batch=8), alone(cuda))
    if cuda.type == "cuda":
        t.iterate()
        t.step.opt_g.zero_grad()
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(cuda).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(cuda) / whole, cuda)
        hog = []  # what is reserved and free
        try:
            while True:
                hog.append(torch.empty(1 << 18, dtype=torch.uint8, device=cuda))
        except torch.OutOfMemoryError:
            pass
    else:

        def refuse(*args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(t.step, "g_step", refuse)
    try:
        with pytest.raises(GddlabError, match="out of memory with 8 images at once: give batch_per_device=4") as e:
            t._loop(None)
        assert "\n" not in str(e.value)
    finally:
        if cuda.type == "cuda":
            del hog
            torch.cuda.set_per_process_memory_fraction(1.0, cuda)
            torch.cuda.empty_cache()


def test_preflight(cuda: torch.device, tmp_path: Path, tiny_teacher: Path) -> None:
    """`preflight` measures on the card: its name, a time per 1000 images, and a peak above what the networks take."""
    config = tiny_config(tmp_path / "run", tiny_teacher, device=cuda.type)
    found = preflight(config, steps=1, measure_batch=4)
    assert found.ok, str(found)
    assert found.device == (torch.cuda.get_device_name(cuda) if cuda.type == "cuda" else "cpu")
    assert found.sec_per_kimg is not None and found.sec_per_kimg > 0
    last = found.measured[-1]
    assert last["peak_mem_mib"] >= last["built_mem_mib"] > 0


def test_doctor(cuda: torch.device) -> None:
    """`doctor` names the card, its memory and bfloat16, and training takes it."""
    found = doctor()
    training = found["training"]
    assert training.details["device"] == cuda.type
    if cuda.type == "cuda":
        about = found["cuda:0"]
        assert torch.cuda.get_device_name(cuda) in about.value and about.details["built_for"]
        assert about.details["bf16"] == torch.cuda.is_bf16_supported()
