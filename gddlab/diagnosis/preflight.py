"""`preflight`: what a run needs and whether it is there, and how long and how large it will be, before it starts."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gddlab.datasets import ImageDataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from gddlab.files import read_json, write_json
from gddlab.nets import Precond, build
from gddlab.progress import duration
from gddlab.runtime import fresh_environment, peak_memory_mib
from gddlab.teachers import load_teacher
from gddlab.teachers.catalog import PUBLISHED

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Check", "Preflight", "in_own_process", "measure", "preflight", "stand_ins", "with_stand_ins"]

CPU_SECONDS = 10.0
"""A step of the larger of the two batches measured takes about so long at most on a CPU, where a whole batch can take minutes."""


@dataclass(frozen=True)
class Check:
    """One thing that a run needs: its name, whether it is there, and what was found or what to do."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Preflight:
    """What was found. `str()` of it is a page for people.

    Attributes:
        checks: Teacher, data, discriminator, metric, disk.
        stand_in: Whether teacher and backbones had random weights and the images were random: time and memory are those of the real ones.
        nproc: Processes that the numbers are for; communication between them is not in them.
        batch: Images a step over all processes.
        batch_per_device: Images that a process holds at once.
        measured: Batches measured, on one process.
        sec_per_kimg: Seconds per thousand images; from the larger batch measured, in proportion to the images.
        peak_mem_mib: Peak memory of a process, MiB: of the device, or of the process on a CPU; in a straight line through the batches measured.
        hours: Of the whole run, without scores and probes.
        parameters, trained, discriminator: Of the student, of it those trained, and trained of the discriminator.
        disk_gib: Of the whole run: checkpoints kept and one being written, snapshots.
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
        """A row a check: name, ok, detail."""
        import pandas as pd

        return pd.DataFrame([asdict(c) for c in self.checks], columns=["name", "ok", "detail"])

    def __str__(self) -> str:
        lines = [f"{'ok     ' if c.ok else 'MISSING'}  {c.name:<14} {c.detail}" for c in self.checks]
        if self.sec_per_kimg is not None:
            assert self.parameters and self.trained is not None and self.peak_mem_mib is not None
            assert self.hours is not None and self.disk_gib is not None
            sizes = " and ".join(str(m["batch"]) for m in self.measured)
            where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else f"{self.device}"
            lines += [
                f"measured on {where}, one process, batch {sizes}{', stand-ins' if self.stand_in else ''}",
                f"  student        {self.parameters:,} parameters, {self.trained:,} trained ({self.trained / self.parameters:.1%})",
                f"  discriminator  {self.discriminator:,} trained",
                f"  time           {self.sec_per_kimg:,.1f} s/kimg on {self.nproc} process(es), {duration(self.hours * 3600)} to the end",
                f"  memory         {self.peak_mem_mib:,.0f} MiB a process, {self.batch_per_device} images at once of a batch of {self.batch}",
                f"  disk           {self.disk_gib:.2f} GiB",
            ]
        return "\n".join(lines)


def preflight(
    config: TrainConfig, *, nproc: int = 1, steps: int = 3, measure_batch: int | None = None, stand_in: bool = False
) -> Preflight:
    """Checks everything that a run needs, then makes some steps of it in processes of their own; nothing is written to its folder.

    Args:
        config: The run.
        nproc: Processes that the run would have on this machine.
        steps: Iterations timed at each of two batches, after one that is not, and one R1 step.
        measure_batch: The larger of the two; None is what a process would hold, on a CPU at most what takes ten seconds.
        stand_in: Takes random weights for a published teacher and the backbones, and random images: time and memory without any download.
            Then nothing is missing but disk.

    Returns:
        Checks and numbers; without numbers where something is missing.

    Raises:
        GddlabError: `steps`, `nproc` or `measure_batch` is not positive, or the batch is not divisible.
    """
    for name, value in (("nproc", nproc), ("steps", steps), ("measure_batch", measure_batch)):
        if value is not None and value < 1:
            raise GddlabError(f"{name}={value}: give at least 1")
    part = config.batch // nproc
    if config.batch % nproc or part % (config.batch_per_device or part):
        raise GddlabError(
            f"batch={config.batch} on {nproc} process(es), {config.batch_per_device} images at once: give a batch that divides"
        )
    held = config.batch_per_device or part
    checks = [] if stand_in else _found(config, nproc)
    about: dict[str, Any] = {"stand_in": stand_in, "nproc": nproc, "batch": config.batch, "batch_per_device": held}
    if not all(c.ok for c in checks):
        return Preflight(tuple(checks), **about)
    large = min(held, measure_batch or held)
    first = _measure(config, nproc, max(1, min(large // 2, 2)), steps, stand_in)
    if measure_batch is None and first["device"] == "cpu":
        large = min(large, max(2, int(CPU_SECONDS / first["seconds"] * first["batch"])))
    measured = (first,) if large == first["batch"] else (first, _measure(config, nproc, large, steps, stand_in))
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
    """Every thing that is needed, each by itself, so that one missing does not hide another."""
    from gddlab.distill.build import check_fit, find_weights, open_data
    from gddlab.evaluation import find_extractor
    from gddlab.teachers import load_teacher

    loaded: dict[str, Any] = {}

    def teacher() -> str:
        net = loaded["teacher"] = load_teacher(config.teacher)
        size = f"{net.img_resolution}x{net.img_resolution}"
        return f"{config.teacher}: {type(net.model).__name__}, {size}, {net.label_dim} classes"

    def data() -> str:
        found = loaded["data"] = open_data(config)
        return f"{found.name}: {len(found):,} images, {found.resolution}x{found.resolution}, {found.classes} classes"

    def losses() -> str:
        return find_weights(config)

    def fit() -> str:
        check_fit(config, loaded["teacher"], loaded["data"], world_size=nproc)
        return "teacher, data, mask and batch fit each other"

    def metric() -> str:
        spec = find_extractor(config.metric_extractor)
        return f"{spec.metric_name(config.metric)}: weights at {spec.weights}, scored every {config.metric_kimg} kimg"

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


def _measure(config: TrainConfig, nproc: int, batch: int, steps: int, stand_in: bool) -> dict[str, Any]:
    return in_own_process("preflight", "measured.json", config, batch, str(steps), stand_in=stand_in, nproc=nproc)


def in_own_process(
    module: str, result: str, config: TrainConfig, batch: int, *words: str, stand_in: bool, nproc: int = 1
) -> dict[str, Any]:
    """What a module of `gddlab.launch` writes of some steps of a run, in a folder that is thrown away.

    Args:
        module, result: Its name, and the file that it writes.
        config: The run.
        batch: Images of a step.
        *words: Further arguments of the module.
        stand_in: Random weights and images, without any download.
        nproc: Processes that share the machine's cores.

    Raises:
        GddlabError: A step failed; with what its process says.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (with_stand_ins(config, folder) if stand_in else config.model_copy(update={"run_dir": folder})).write()
        out = subprocess.run(
            [sys.executable, "-m", f"gddlab.diagnosis.{module}", name, str(batch), *words, str(int(stand_in))],
            env=fresh_environment(nproc),
            capture_output=True,
            text=True,
        )
        if out.returncode:
            tail = "\n".join(out.stderr.splitlines()[-15:])
            raise GddlabError(f"a step of batch {batch} failed; its process says:\n{tail}")
        found: dict[str, Any] = read_json(folder / result)
        return found


def with_stand_ins(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The configuration in another folder, with random weights wherever it names some that must be found."""
    parts = {"discriminator": config.discriminator, "instance": config.instance}
    update = {name: None if part is None else part.stand_in() for name, part in parts.items()}
    return config.model_copy(update={"run_dir": run_dir, **update})


def _disk_bytes(config: TrainConfig, measured: dict[str, Any]) -> float:
    """Checkpoints kept and the one being written, snapshots, the final student and the best one."""
    students = config.total_kimg / config.snapshot_kimg * (2 if config.snapshot_raw else 1) + 1
    students += 2 if config.metric_kimg is not None else 0
    return float(
        measured["checkpoint_bytes"] * (config.keep_checkpoints + 1 + (config.metric_kimg is not None))
        + (students + 1) * measured["snapshot_bytes"]
    )


def _room(config: TrainConfig, needed: float) -> Check:
    folder = config.run_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.1f} GiB free at {folder}"
    return Check("disk", free > needed, detail)


def stand_ins(config: TrainConfig) -> tuple[Precond, ImageDataset]:
    """A teacher of the right architecture with random weights, and random images of its shape; what is on this machine is taken as it is."""
    name = config.teacher
    torch.manual_seed(0)
    teacher = build(PUBLISHED[name].architecture).eval() if name in PUBLISHED else load_teacher(name)
    rng = np.random.default_rng(0)
    side, classes = teacher.img_resolution, teacher.label_dim
    images = rng.integers(0, 256, (max(64, config.batch), side, side, teacher.img_channels), dtype=np.uint8)
    labels = rng.integers(0, classes, len(images)) if classes else None
    return teacher, ImageDataset(images, labels, classes=classes, name="random", source="numpy, seed 0")


def measure(config: TrainConfig, *, steps: int, stand_in: bool) -> dict[str, Any]:
    """Seconds of an iteration and of R1, memory, and sizes, of a run of this batch on one process.

    One iteration is made before the clock runs. Iterations with R1 are timed by themselves, since one in `r1_interval` has it.
    """
    world = World.start(config.device)
    base = peak_memory_mib(world.device)
    trainer = Trainer(config, world, given=stand_ins(config) if stand_in else None)
    trainer.cache_real()
    built = peak_memory_mib(world.device)
    trainer.reader.position = config.batch  # the first iteration has no R1
    trainer.iteration = 1
    plain, lazy = [_timed(trainer, world) for _ in range(steps + 1)][1:], 0.0
    if config.has_r1:
        trainer.iteration = config.r1_interval
        lazy = max(0.0, _timed(trainer, world) - statistics.median(plain)) / config.r1_interval
    params = list(trainer.step.g.parameters())
    return {
        "batch": config.batch,
        "steps": steps,
        "seconds": statistics.median(plain) + lazy,
        "peak_mem_mib": peak_memory_mib(world.device),
        "built_mem_mib": built,
        "base_mem_mib": base,
        "parameters": sum(p.numel() for p in params),
        "trained": sum(p.numel() for p in params if p.requires_grad),
        "discriminator": sum(p.numel() for p in trainer.step.d_params),
        "checkpoint_bytes": _checkpoint_bytes(trainer),
        "snapshot_bytes": sum(p.numel() * p.element_size() for p in params),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _timed(trainer: Trainer, world: World) -> float:
    start = time.perf_counter()
    trainer.iterate()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _checkpoint_bytes(trainer: Trainer) -> int:
    from gddlab.distill.checkpoints import training_state

    state = training_state(trainer.step, trainer.ema, trainer.ada)
    return sum(t.numel() * t.element_size() for part in state.values() for t in part.values())


def main(folder: Path, batch: int, steps: int, stand_in: bool) -> None:
    config = TrainConfig.load(folder).model_copy(update={"batch": batch, "batch_per_device": None})
    write_json(folder / "measured.json", measure(config, steps=steps, stand_in=stand_in))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
