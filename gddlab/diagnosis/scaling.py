"""A cost model of a training step: operations are counted, and their time follows for a kind of GPU, one or many."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from gddlab.diagnosis.preflight import in_own_process, sizes, started
from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, validated

FLOAT = 4
"""Bytes of a parameter, gradient or moment."""


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU and its connections. Peaks, link and network are from data sheets, the others are assumptions.

    Attributes:
        name: For people.
        bf16, tf32, float32: Peaks of dense matrix products, TFLOP/s; what is not bfloat16 takes TF32 where the
            configuration allows it.
        link_gb_s: Between the GPUs of a machine, GB/s in one direction.
        network_gb_s: Between machines, GB/s in one direction.
        gpus: Per machine.
        achieved: Share of the peak of bfloat16 and TF32 that these networks reach when arithmetic is the limit.
        achieved_float32: Of the peak of float32, which is lower and easier to reach.
        bus: Share of link and network that an all-reduce reaches.
        kernel_us, graph_us: Time to start a kernel from Python, and within a CUDA graph, microseconds.
        latency_us: Of one hop of an all-reduce, microseconds.
    """

    name: str
    bf16: float
    tf32: float
    float32: float
    link_gb_s: float
    network_gb_s: float
    gpus: int = 8
    achieved: float = 0.2
    achieved_float32: float = 0.5
    bus: float = 0.7
    kernel_us: float = 8.0
    graph_us: float = 1.5
    latency_us: float = 10.0


A100 = Hardware("A100 SXM", bf16=312, tf32=156, float32=19.5, link_gb_s=300, network_gb_s=200)
H100 = Hardware("H100 SXM", bf16=989, tf32=495, float32=67, link_gb_s=450, network_gb_s=400)


@dataclass(frozen=True)
class Counted:
    """What an iteration of a configuration does; from `counted`.

    Attributes:
        student, rest, r1: Floating-point operations per image: the student forward and backward; discriminator (and
            teacher where it is asked); R1, in an iteration that has it.
        kernels, kernels_r1: Kernels per iteration, and those that R1 adds, whatever the number of images.
        parameters, trained, discriminator: Number of the student's parameters, of those trained, and of the
            discriminator's trained.
    """

    student: float
    rest: float
    r1: float
    kernels: int
    kernels_r1: int
    parameters: int
    trained: int
    discriminator: int


@validated
def counted(config: TrainConfig, *, batch: PositiveInt = 2, stand_in: bool = True) -> Counted:
    """Counts an iteration in a fresh process.

    Args:
        config: The run.
        batch: Images counted.
        stand_in: Random weights and images, without any download: they cost the same.

    Raises:
        GddlabError: The iteration failed; the message holds the process's own error.
    """
    found = in_own_process("gddlab.diagnosis.scaling:count", config, batch, stand_in=stand_in)
    return Counted(**found)


@validated
def scaling(
    config: TrainConfig,
    counts: Counted | None = None,
    *,
    hardware: Hardware = A100,
    gpus: Sequence[int] = (1, 8, 64),
) -> pd.DataFrame:
    """Predicts the time of a step: the longer of arithmetic and starting kernels, and the all-reduce in full.

    Gradients of all trained parameters are averaged in buckets that are sent during the backward pass; none of that is
    taken to be hidden behind it. A ring moves 2 (N - 1) / N of the bytes through the slowest connection.

    Args:
        config: The run; its batch is over all GPUs.
        counts: From `counted`, which is called if None.
        hardware: The GPUs.
        gpus: Numbers of GPUs.

    Returns:
        One row per number of GPUs: gpus, images (per GPU and step), arithmetic_ms, kernels_ms, all_reduce_ms, step_ms,
        images_s (images per second, all GPUs), efficiency (relative to the images per second and GPU of the first row),
        hours (of the whole run), ddp_gib and fsdp_gib (weights, average, gradients and moments on each GPU, whole or
        with the student sharded; without activations), limit (what takes longest).

    Raises:
        GddlabError: The batch does not divide.
    """

    def rate(precision: str = "float32") -> float:
        if precision != "bfloat16" and not config.tf32:
            return hardware.achieved_float32 * hardware.float32 * 1e12
        return hardware.achieved * (hardware.bf16 if precision == "bfloat16" else hardware.tf32) * 1e12

    if wrong := [n for n in gpus if n < 1 or config.batch % n]:
        raise GddlabError(f"batch={config.batch} on {wrong[0]} GPUs: give numbers that divide it")
    c = counts or counted(config)
    lazy = 1 / config.r1_interval if config.has_r1 else 0.0
    n = np.array(gpus)
    part = config.batch // n
    start = hardware.graph_us if config.cuda_graph else hardware.kernel_us
    passes = part // np.minimum(part, config.batch_per_device or part)
    per_image = c.student / rate(config.precision) + c.rest / rate(config.precision_d) + lazy * c.r1 / rate()
    messages = [(c.trained, 1.0), (c.discriminator, 1.0 + lazy)]
    seconds = pd.DataFrame(
        {
            "arithmetic": part * per_image,
            "kernels": passes * (c.kernels + lazy * c.kernels_r1) * start * 1e-6,
            "all-reduce": sum(times * _all_reduce(FLOAT * size, n, hardware) for size, times in messages if size),
        }
    )
    step = seconds[["arithmetic", "kernels"]].max(axis=1) + seconds["all-reduce"]
    rate_of_all = config.batch / step
    alone = rate_of_all / n
    table = pd.DataFrame(
        {
            "gpus": n,
            "images": part,
            "arithmetic_ms": 1e3 * seconds["arithmetic"],
            "kernels_ms": 1e3 * seconds["kernels"],
            "all_reduce_ms": 1e3 * seconds["all-reduce"],
            "step_ms": 1e3 * step,
            "images_s": rate_of_all,
            "efficiency": alone / alone.iloc[0],
            "hours": config.total_kimg * 1000 / config.batch * step / 3600,
            "ddp_gib": _state_bytes(c, 1) / 2**30,
            "fsdp_gib": _state_bytes(c, n) / 2**30,
            "limit": seconds.idxmax(axis=1),
        }
    )
    table.attrs = {"hardware": hardware.name, "batch": config.batch, "counted": c}
    return table


def _all_reduce(size: float, n: np.ndarray, hardware: Hardware) -> np.ndarray:
    """Seconds of an all-reduce of `size` bytes in rings of n."""
    between = min(hardware.network_gb_s, hardware.link_gb_s)
    bandwidth = 1e9 * hardware.bus * np.where(n > hardware.gpus, between, hardware.link_gb_s)
    return 2 * (n - 1) / n * size / bandwidth + 2 * (n - 1) * hardware.latency_us * 1e-6


def _state_bytes(c: Counted, shards: int | np.ndarray) -> Any:
    """Weights, average, gradients and moments; the student's spread over shards, the discriminator's on every GPU."""
    return FLOAT * ((2 * c.parameters + 3 * c.trained) / shards + 4 * c.discriminator)


VIEWS = re.compile(
    r"(_unsafe_view|alias|as_strided|chunk|detach|expand|permute|select|slice|split|squeeze|t\.|transpose|unbind|unfold"
    r"|unsqueeze|view)"
)
"""Operations that only describe the same memory in another way; they start no kernel."""


class Counter(TorchDispatchMode):
    """Counts floating-point operations (convolutions and matrix products, two per multiply-add) and kernels started.

    The formulas are torch's own; its FlopCounterMode cannot follow R1's second derivative. What they count is not
    computed: its result is zeros, which have the same cost, so that counting takes a fraction of an iteration's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            out = func(*args, **kwargs)
        else:
            device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
            shapes = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            out = tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=device), func(*shapes[0], **shapes[1]))
            self.flops += formula(*args, **kwargs, out_val=out)
        self.kernels += not VIEWS.match(str(func).removeprefix("aten."))
        return out


def count(folder: str, batch: int, stand_in: bool, report: Callable[[int], Any]) -> dict[str, Any]:
    """`Counted` of the run in a folder, on one process."""
    trainer, _ = started(folder, batch, stand_in)
    config, step, drawer = trainer.config, trainer.step, trainer.drawer

    def iteration(number: int) -> Counter:
        trainer.iteration = number
        with Counter() as counter:
            trainer.iterate()
        return counter

    labels = None
    if step.g.label_dim:
        device = trainer.world.device
        labels = torch.eye(step.g.label_dim, device=device)[torch.arange(batch) % step.g.label_dim]
    student_pass = drawer.place(drawer.latents(0, 0)), labels, drawer.place(drawer.draw(0, 0))
    with Counter() as student:
        step.generate(*student_pass).sum().backward()
    if step.adversarial and not config.reuse_fakes:
        with torch.no_grad(), student:
            step.generate(*student_pass)
    plain = iteration(1)
    lazy = iteration(config.r1_interval) if step.due_r1(config.r1_interval) else plain
    counted = Counted(
        student=student.flops / batch,
        rest=(plain.flops - student.flops) / batch,
        r1=(lazy.flops - plain.flops) / batch,
        kernels=plain.kernels,
        kernels_r1=lazy.kernels - plain.kernels,
        **sizes(trainer),
    )
    return asdict(counted)
