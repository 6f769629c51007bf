"""`preflight`: whether everything that a run needs exists, and its time, memory and disk space, before it starts."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import PositiveInt

from gddlab.datasets import ImageDataset
from gddlab.distill.checkpoints import training_state
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.graph import WARM
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, validated
from gddlab.files import nearest_existing
from gddlab.nets import Precond, build
from gddlab.progress import duration
from gddlab.runtime import peak_memory_mib
from gddlab.teachers import load_precond
from gddlab.teachers.catalog import PUBLISHED
from gddlab.workers import run_workers

if TYPE_CHECKING:
    import pandas as pd

CPU_SECONDS = 10.0
"""On a CPU, where a whole batch can take minutes, a step of the larger batch measured takes about this long at most."""


@dataclass(frozen=True)
class Check:
    """One thing that a run needs: its name, whether it exists, and what was found or what to do."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Preflight:
    """What was found. `str()` of it is a page for people.

    Attributes:
        checks: Teacher, data, discriminator, metric, disk.
        stand_in: Whether weights and images were random; time and memory are those of the real ones.
        nproc: Processes that the numbers are for; communication between them is not included.
        batch: Images per step over all processes.
        batch_per_device: Images that a process holds at once.
        measured: The batches measured, on one process.
        sec_per_kimg: Seconds per thousand images; from the larger batch measured, in proportion to the images.
        peak_mem_mib: Peak memory of a process, MiB (of the device, or of the process on a CPU), extrapolated linearly.
        hours: Of the whole run, without scores and probes.
        parameters, trained, discriminator: Number of the student's parameters, of those trained, and of the
            discriminator's trained.
        disk_gib: Of the whole run: checkpoints kept, one being written, snapshots.
        device, threads: Where it was measured.
    """

    checks: tuple[Check, ...]
    stand_in: bool
    nproc: int
    batch: int
    batch_per_device: int
    measured: tuple[dict[str, Any], ...] = ()
    sec_per_kimg: float | None = None
    peak_mem_mib: float | None = None
    hours: float | None = None
    parameters: int | None = None
    trained: int | None = None
    discriminator: int | None = None
    disk_gib: float | None = None
    device: str | None = None
    threads: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the run can start."""
        return all(c.ok for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON."""
        return asdict(self) | {"ok": self.ok}

    def to_frame(self) -> pd.DataFrame:
        """One row per check: name, ok, detail."""
        import pandas as pd

        return pd.DataFrame([asdict(c) for c in self.checks], columns=["name", "ok", "detail"])

    def __str__(self) -> str:
        lines = [f"{'ok     ' if c.ok else 'MISSING'}  {c.name:<14} {c.detail}" for c in self.checks]
        if self.sec_per_kimg is not None:
            assert self.parameters and self.trained is not None and self.peak_mem_mib is not None
            assert self.hours is not None and self.disk_gib is not None
            sizes = " and ".join(str(m["batch"]) for m in self.measured)
            where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else f"{self.device}"
            kind = ", stand-ins" if self.stand_in else ""
            rows = {
                "student": f"{self.parameters:,} parameters, {self.trained:,} trained "
                f"({self.trained / self.parameters:.1%})",
                "discriminator": f"{self.discriminator:,} trained",
                "time": f"{self.sec_per_kimg:,.1f} s/kimg on {self.nproc} process(es), "
                f"{duration(self.hours * 3600)} to the end",
                "memory": f"{self.peak_mem_mib:,.0f} MiB per process, {self.batch_per_device} images at once "
                f"of a batch of {self.batch}",
                "disk": f"{self.disk_gib:.2f} GiB",
            }
            lines.append(f"measured on {where}, one process, batch {sizes}{kind}")
            lines += [f"  {name:<14} {text}" for name, text in rows.items()]
        return "\n".join(lines)


@validated
def preflight(
    config: TrainConfig,
    *,
    nproc: PositiveInt = 1,
    steps: PositiveInt = 3,
    measure_batch: PositiveInt | None = None,
    stand_in: bool = False,
) -> Preflight:
    """Checks everything that a run needs, then measures some steps in fresh processes; writes nothing to its folder.

    Args:
        config: The run.
        nproc: Processes that the run would have on this machine.
        steps: Iterations timed at each of two batches, after one warm-up; and one iteration with R1.
        measure_batch: The larger of the two; None takes what a process would hold, on a CPU at most what takes 10 s.
        stand_in: Takes random weights for a published teacher and the backbones, and random images: time and memory
            without any download. Then only disk space can be missing.

    Returns:
        Checks and numbers; without numbers if something is missing.

    Raises:
        GddlabError: An argument is not positive, or the batch cannot be divided.
    """
    part = config.batch // nproc
    if config.batch % nproc or part % (config.batch_per_device or part):
        raise GddlabError(
            f"batch={config.batch} on {nproc} process(es), {config.batch_per_device} images at once: give a batch that "
            "these divide"
        )
    held = config.batch_per_device or part
    checks = [] if stand_in else _found(config, nproc)
    about: dict[str, Any] = {"stand_in": stand_in, "nproc": nproc, "batch": config.batch, "batch_per_device": held}
    if not all(c.ok for c in checks):
        return Preflight(tuple(checks), **about)
    large = min(held, measure_batch or held)

    def measured_with(batch: int) -> dict[str, Any]:
        entry = "gddlab.diagnosis.preflight:measure"
        return in_own_process(entry, config, batch, stand_in=stand_in, nproc=nproc, steps=steps)

    first = measured_with(max(1, min(large // 2, 2)))
    if measure_batch is None and first["device"] == "cpu":
        large = min(large, max(2, int(CPU_SECONDS / first["seconds"] * first["batch"])))
    measured = (first,) if large == first["batch"] else (first, measured_with(large))
    last = measured[-1]
    sec_per_kimg = last["seconds"] / last["batch"] * 1000 / nproc
    slope = 0.0
    if len(measured) > 1:
        slope = max(0.0, last["peak_mem_mib"] - first["peak_mem_mib"]) / (last["batch"] - first["batch"])
    disk = _disk_bytes(config, last)
    checks.append(_room(config, disk))
    return Preflight(
        tuple(checks),
        **about,
        measured=measured,
        sec_per_kimg=sec_per_kimg,
        peak_mem_mib=last["peak_mem_mib"] + slope * (held - last["batch"]),
        hours=sec_per_kimg * config.total_kimg / 3600,
        parameters=last["parameters"],
        trained=last["trained"],
        discriminator=last["discriminator"],
        disk_gib=disk / 2**30,
        device=last["device"],
        threads=last["threads"],
    )


def _found(config: TrainConfig, nproc: int) -> list[Check]:
    """Everything that is needed, one by one, so that a missing thing does not hide another."""
    from gddlab.distill.build import check_fit, open_data, weights_found
    from gddlab.evaluation import find_extractor

    there: dict[str, Any] = {}

    def teacher() -> str:
        net = there["teacher"] = load_precond(config.teacher)
        size = f"{net.img_resolution}x{net.img_resolution}"
        return f"{config.teacher}: {type(net.model).__name__}, {size}, {net.label_dim} classes"

    def data() -> str:
        found = there["data"] = open_data(config)
        return f"{found.name}: {len(found):,} images, {found.resolution}x{found.resolution}, {found.classes} classes"

    def losses() -> str:
        return weights_found(config)

    def fit() -> str:
        check_fit(config, there["teacher"], there["data"], world_size=nproc)
        return "teacher, data, mask and batch fit each other"

    def metric() -> str:
        spec = find_extractor(config.metric_extractor)
        if found := there.get("data"):
            spec.fitted(found.channels, found.resolution)
        return f"{spec.metric_name(config.metric)}: {spec.origin}, scored every {config.metric_kimg} kimg"

    wanted: list[tuple[str, Callable[[], str]]] = [("teacher", teacher), ("data", data), ("losses", losses)]
    if config.metric_kimg is not None:
        wanted.append(("metric", metric))
    checks = [_try(name, look) for name, look in wanted]
    if all(c.ok for c in checks):
        checks.append(_try("fit", fit))
    return checks


def _try(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (GddlabError, OSError) as e:
        return Check(name, False, str(e))


def in_own_process(
    entry: str, config: TrainConfig, batch: int, *, stand_in: bool, nproc: int = 1, **more: Any
) -> dict[str, Any]:
    """What MODULE:FUNCTION returns about steps of this batch, in a fresh process and a temporary folder.

    It is called with folder, batch, stand_in, `more` and report, and gets its trainer from `started`. The machine's
    cores are divided among `nproc` processes.

    Raises:
        GddlabError: A step failed; the message holds the process's own error.
    """
    with tempfile.TemporaryDirectory() as folder:
        update: dict[str, Any] = {"run_dir": Path(folder)}
        if stand_in:
            parts = {"discriminator": config.discriminator, "instance": config.instance}
            update |= {name: part and part.stand_in() for name, part in parts.items()}
        config.model_copy(update=update).write()
        job = {"folder": folder, "batch": batch, "stand_in": stand_in, **more}
        hint = f"it took steps of batch {batch}"
        found: list[dict[str, Any]] = run_workers(job, entry=entry, hint=hint, cores_for=nproc)
        return found[0]


def _disk_bytes(config: TrainConfig, measured: dict[str, Any]) -> float:
    """Checkpoints kept and the one being written, snapshots, the final student and the best one."""
    students = config.total_kimg / config.snapshot_kimg * (2 if config.snapshot_raw else 1) + 1
    students += 2 if config.metric_kimg is not None else 0
    return float(
        measured["checkpoint_bytes"] * (config.keep_checkpoints + 1 + (config.metric_kimg is not None))
        + (students + 1) * measured["snapshot_bytes"]
    )


def _room(config: TrainConfig, needed: float) -> Check:
    folder = nearest_existing(config.run_dir.resolve())
    free = shutil.disk_usage(folder).free
    detail = f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.1f} GiB free at {folder}"
    return Check("disk", free > needed, detail)


def stand_ins(config: TrainConfig) -> tuple[Precond, ImageDataset]:
    """Random images, and a published teacher's architecture with random weights; another teacher is taken as it is."""
    name = config.teacher
    torch.manual_seed(0)
    teacher = build(PUBLISHED[name].architecture).eval() if name in PUBLISHED else load_precond(name)
    rng = np.random.default_rng(0)
    side, classes = teacher.img_resolution, teacher.label_dim
    images = rng.integers(0, 256, (max(64, config.batch), side, side, teacher.img_channels), dtype=np.uint8)
    labels = rng.integers(0, classes, len(images)) if classes else None
    return teacher, ImageDataset(images, labels, classes=classes, name="random", source="numpy, seed 0")


def started(folder: str, batch: int, stand_in: bool) -> tuple[Trainer, float]:
    """The trainer of the run in a folder, with another batch, before its second iteration; memory before it, MiB."""
    config = TrainConfig.load(folder).model_copy(update={"batch": batch, "batch_per_device": None})
    world = World.start(config.device)
    before = peak_memory_mib(world.device)
    trainer = Trainer(config, world, given=stand_ins(config) if stand_in else None)
    trainer.cache_real()
    trainer.reader.position = batch  # the first iteration has no R1
    return trainer, before


def sizes(trainer: Trainer) -> dict[str, int]:
    """Number of the student's parameters, of those trained, and of the discriminator's trained."""
    params = list(trainer.step.g.parameters())
    return {
        "parameters": sum(p.numel() for p in params),
        "trained": sum(p.numel() for p in params if p.requires_grad),
        "discriminator": sum(p.numel() for p in trainer.step.d_params),
    }


def measure(folder: str, batch: int, stand_in: bool, steps: int, report: Callable[[int], Any]) -> dict[str, Any]:
    """Seconds per iteration and of R1, memory, and sizes, of the run in a folder, on one process.

    The first iteration is not timed. R1 is timed apart, since one iteration in `r1_interval` has it.
    """
    trainer, base = started(folder, batch, stand_in)
    config, device = trainer.config, trainer.world.device
    built = peak_memory_mib(device)

    def seconds(iteration: int = 1) -> float:
        trainer.iteration = iteration  # which says whether there is R1
        start = time.perf_counter()
        trainer.iterate()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    recording = WARM + 1 if config.cuda_graph else 0  # calls until a graph is there
    plain, lazy = [seconds() for _ in range(steps + max(1, recording))][-steps:], 0.0
    if config.has_r1:
        *_, last = (seconds(config.r1_interval) for _ in range(recording + 1))
        lazy = max(0.0, last - statistics.median(plain)) / config.r1_interval
    peak = peak_memory_mib(device)
    state = training_state(trainer.step, trainer.ema)
    tensors = [t for part in state.values() for t in part.values()]
    return {
        "batch": batch,
        "steps": steps,
        "seconds": statistics.median(plain) + lazy,
        "peak_mem_mib": peak,
        "built_mem_mib": built,
        "base_mem_mib": base,
        **sizes(trainer),
        "checkpoint_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "snapshot_bytes": sum(p.numel() * p.element_size() for p in trainer.step.g.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
