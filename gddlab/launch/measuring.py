"""Some steps of a run in a process of their own, for `preflight`: their time and their memory.

`python -m gddlab.launch.measuring FOLDER BATCH STEPS STAND_IN` reads FOLDER's configuration and writes FOLDER/measured.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gddlab.datasets import ImageDataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.files import write_json
from gddlab.nets import Precond, build
from gddlab.teachers import load_teacher
from gddlab.teachers.catalog import PUBLISHED

__all__ = ["measure", "stand_ins"]


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
    base = world.peak_memory_mib()
    trainer = Trainer(config, world, given=stand_ins(config) if stand_in else None)
    if config.cache_real:
        trainer.cache_real()
    built = world.peak_memory_mib()
    trainer.reader.position = config.batch  # the first iteration has no R1
    trainer.iteration = 1
    plain, lazy = [_timed(trainer, world) for _ in range(steps + 1)][1:], 0.0
    if trainer.step.adversarial and config.r1_gamma:
        trainer.iteration = config.r1_interval
        lazy = max(0.0, _timed(trainer, world) - statistics.median(plain)) / config.r1_interval
    params = list(trainer.step.g.parameters())
    return {
        "batch": config.batch,
        "steps": steps,
        "seconds": statistics.median(plain) + lazy,
        "peak_mem_mib": world.peak_memory_mib(),
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
