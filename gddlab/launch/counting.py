"""What an iteration does, counted and not timed: floating-point operations by network, kernels, and bytes that ranks exchange.

`python -m gddlab.launch.counting FOLDER BATCH STAND_IN` reads FOLDER's configuration and writes FOLDER/counted.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.files import write_json
from gddlab.launch.measuring import stand_ins

__all__ = ["Counter", "count"]

VIEWS = (
    "view",
    "_unsafe_view",
    "expand",
    "permute",
    "transpose",
    "slice",
    "select",
    "split",
    "detach",
    "t.",
    "alias",
    "unsqueeze",
    "squeeze",
    "unbind",
    "as_strided",
    "chunk",
    "unfold",
)
"""Operations that only describe the same memory in another way start no kernel."""


class Counter(TorchDispatchMode):
    """Counts floating-point operations (torch's own formulas: convolutions and products of matrices, two a multiply-add), and operations that start
    a kernel. torch's FlopCounterMode cannot follow R1's second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        self.kernels += not str(func).removeprefix("aten.").startswith(VIEWS)
        return out


def count(config: TrainConfig, *, stand_in: bool) -> dict[str, Any]:
    """Counts a plain iteration, and what R1 adds to one, of a run of this batch on one process.

    Returns:
        batch; flops of a plain iteration: "student" (its images forward, and backward to what is trained), "rest" (discriminator, and the teacher where
        it is asked); flops_r1, kernels, kernels_r1; parameters, trained, discriminator: numbers of the student's parameters, of those trained, and of the
        discriminator's trained.
    """
    world = World.start(config.device)
    trainer = Trainer(config, world, given=stand_ins(config) if stand_in else None)
    if config.cache_real:
        trainer.cache_real()
    step, drawer = trainer.step, trainer.drawer

    def iteration(number: int) -> Counter:
        trainer.iteration = number
        with Counter() as counter:
            trainer.iterate()
        return counter

    labels = None
    if step.g.label_dim:
        labels = torch.eye(step.g.label_dim, device=world.device)[torch.arange(config.batch) % step.g.label_dim]
    with Counter() as student:
        step.generate(drawer.latents(0, 0), labels, drawer.draw(0, 0)).sum().backward()
    if step.adversarial and not config.reuse_fakes:
        with torch.no_grad(), student:
            step.generate(drawer.latents(0, 0), labels, drawer.draw(0, 0))
    trainer.reader.position = config.batch
    plain = iteration(1)
    lazy = iteration(config.r1_interval) if step.due_r1(config.r1_interval) else plain
    params = list(step.g.parameters())
    return {
        "batch": config.batch,
        "flops": {"student": student.flops, "rest": plain.flops - student.flops},
        "flops_r1": lazy.flops - plain.flops,
        "kernels": plain.kernels,
        "kernels_r1": lazy.kernels - plain.kernels,
        "parameters": sum(p.numel() for p in params),
        "trained": sum(p.numel() for p in params if p.requires_grad),
        "discriminator": sum(p.numel() for p in step.d_params),
    }


def main(folder: Path, batch: int, stand_in: bool) -> None:
    config = TrainConfig.load(folder).model_copy(update={"batch": batch, "batch_per_device": None})
    write_json(folder / "counted.json", count(config, stand_in=stand_in))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
