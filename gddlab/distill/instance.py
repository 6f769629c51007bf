"""Instance-based losses: progressive, consistency, trajectory and relative-to-noise distillation.

The student's prediction from a noisy image is compared with what a step of the teacher predicts from it. Noise levels
are the Karras grid of indices 0 (sigma 0.002) to N = `steps` (80). x_t = image + sigma_t noise. A step of one grid
interval is the teacher's, by Heun; a longer one is the student's own, by Euler, without gradient (but for
trajectories). g is the student's image, G its jump (`OneStepPrecond.jump`). Targets come from the student itself, not
from an average over its past (Song & Dhariwal 2023, section 3.2, drop it too). All weights by noise level are 1.

Each image has three indices of the grid, t > u >= s: where it starts, stops over, and ends. Those of a batch are one
tensor (3, n), int64, on the CPU, where they decide which network moves an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from tyro.conf import Suppress

from gddlab.distill.distances import LITE0, Lite0Distance, LPIPSDistance, SquaredDistance, linear_layers
from gddlab.distill.losses import constant
from gddlab.distill.parts import FileName, Part
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond, Precond
from gddlab.pretrained.backbones import lite_weights
from gddlab.pretrained.trunks import check_trunk
from gddlab.sampling.samplers import heun_step
from gddlab.sampling.schedules import karras_sigmas

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), each (B, C, H, W), to one distance per image, (B,); differentiable in the prediction."""


@dataclass(frozen=True)
class Moves:
    """How noisy images move along the ODE, from index to lower index of the grid.

    Attributes:
        teacher: Denoiser D(x; sigma, labels).
        student: In eval mode.
        labels: One-hot, (B, label_dim), or None.
        sigmas: The grid, ascending, (steps + 1,), float64.
    """

    teacher: nn.Module
    student: OneStepPrecond
    labels: Tensor | None
    sigmas: Tensor

    def level(self, index: Tensor, like: Tensor) -> Tensor:
        """Noise levels at indices, (B,), on the device of the images and in their precision."""
        return self.sigmas[index].to(like)

    def step(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The teacher's step for neighbours, else the student's."""
        near = start - end == 1
        return self.jump(~near, self.heun(near, x, start, end), start, end)

    def jump(self, which: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The student's step of the images that `which`, on the CPU, selects; no other is computed."""
        return self._move(self.student.jump, which, x, start, end)

    def heun(self, which: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The teacher's step of those images, to a level above 0 (Karras et al. 2022, algorithm 1)."""

        def step(x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
            return heun_step(lambda x, s: (x - self.teacher(x, s.flatten(), labels)) / s, x, _wide(t), _wide(u))

        return self._move(step, which, x, start, end)

    def _move(self, step: Callable[..., Tensor], which: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        if not which.any():
            return x
        t, u = self.level(start[which], x), self.level(end[which], x)
        if which.all():
            return step(x, t, u, self.labels)
        rows = which.nonzero().flatten().to(x.device)
        return x.index_copy(0, rows, step(x[rows], t, u, None if self.labels is None else self.labels[rows]))


class InstanceLoss:
    """The distance between the student's prediction and its target, one per image.

    Args:
        part: Which indices are drawn, what is predicted, what it is compared with.
        teacher: Denoiser D(x; sigma, labels), in eval mode, on the images' device and in their precision.
        distance: (a, b) -> (B,).
    """

    def __init__(self, part: InstancePart, teacher: nn.Module, distance: Distance):
        self.part, self.teacher, self.distance = part, teacher, distance
        self.sigmas = karras_sigmas(part.steps + 1).flip(0)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Indices of `n` images, uniform in their ranges; of the global batch, whose parts are slices.  -> (3, n)"""
        return self.part.indices(torch.rand(3, n, generator=generator, dtype=torch.float64))

    def loss(self, student: OneStepPrecond, images: Tensor, labels: Tensor | None, noise: Tensor, at: Tensor) -> Tensor:
        """The loss of each image; its gradient reaches the student's parameters alone.

        Args:
            student: In eval mode; takes a target time where `part.target_time` says so.
            images: Real, (B, C, H, W) in [-1, 1].
            labels: One-hot, (B, label_dim), or None.
            noise: Standard normal, (B, C, H, W).
            at: Indices of these images, (3, B).

        Returns:
            (B,).
        """
        moves = Moves(self.teacher, student, labels, self.sigmas)
        x = images + _wide(moves.level(at[0], images)) * noise
        # The prediction first: autocast keeps the low-precision weights of the first pass, which must be those with a
        # gradient.
        prediction = self.part.predict(moves, x, at)
        with torch.no_grad():
            target = self.part.target(moves, x, at)
        return self.distance(prediction, target)


def _pick(r: Tensor, low: int, high: int | Tensor) -> Tensor:
    """Integers from `low` to `high`, both included, by uniform numbers in [0, 1)."""
    return low + (r * (high - low + 1)).long()


def _wide(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1)


class InstancePart(Part):
    """The part of a configuration that chooses an instance-based loss."""

    target_time: ClassVar[bool] = True
    """Whether the student takes a second time, the one at which its jump ends."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of the instance loss, which is a mean over images."""
    steps: int = Field(default=16, ge=2)
    """Steps of the Karras grid from sigma 80 to 0.002; a power of two for progressive distillation."""
    distance: Literal["lpips", "l2", "lite0"] = "lpips"
    """Distance between prediction and target; lite0 is LPIPS's formula on EfficientNet-lite0, without its weights."""
    distance_weights: FileName | None = None
    """Weights of the LPIPS trunk: a path, or "random"; None looks for them."""

    @model_validator(mode="after")
    def _fields_fit(self) -> InstancePart:
        if self.distance_weights is not None and self.distance != "lpips":
            raise GddlabError(f"instance.distance_weights with distance={self.distance!r}: only lpips takes them")
        return self

    def indices(self, r: Tensor) -> Tensor:
        """Indices by three uniform numbers in [0, 1) per image.  (3, n) -> (3, n)"""
        raise NotImplementedError

    def predict(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        """The student's image from x_t, with a gradient to its parameters."""
        return moves.student(x, moves.level(at[0], x), moves.labels, target=moves.level(at[2], x))

    def target(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        """What the prediction is compared with; called without gradients.

        Here the image at sigma = 0 of the line through x_t and x_s, where x_s is reached by two steps, t -> u -> s.
        """
        x_s = moves.step(moves.step(x, at[0], at[1]), at[1], at[2])
        t, s = moves.level(at[0], x), moves.level(at[2], x)
        return x + _wide(t / (t - s)) * (x_s - x)

    def build(self, teacher: Precond, *, device: torch.device, dtype: torch.dtype) -> InstanceLoss:
        """The loss, with copies of the teacher and the distance on a device."""
        teacher = copy.deepcopy(teacher).to(device=device, dtype=dtype).eval().requires_grad_(False)
        distance: nn.Module
        if self.distance == "lpips":
            distance = LPIPSDistance(self.distance_weights)
        else:
            distance = SquaredDistance() if self.distance == "l2" else Lite0Distance()
        return InstanceLoss(self, teacher, distance.to(device=device, dtype=dtype))

    def find(self) -> str:
        if self.distance == "lpips":
            linear_layers()
            check_trunk("vgg", self.distance_weights)
        elif self.distance == "lite0":
            lite_weights(LITE0)
        return f"{self.kind} by {self.distance}"

    def describe(self) -> str:
        return f"{self.kind}, factor {self.weight:g}, {self.steps} steps, distance {self.distance}"

    def stand_in(self) -> InstancePart:
        return self.model_copy(update={"distance_weights": "random" if self.distance == "lpips" else None})


class Progressive(InstancePart):
    """Progressive distillation: one step of the student is to arrive where two steps do.

    A coarse grid of M steps, M a power of two below N drawn for each image; t and s are neighbours on it, u lies in the
    middle. The target of g(x_t; t, s) is the image from which one Euler step t -> s arrives where the two steps
    t -> u -> s do (Salimans & Ho 2022, algorithm 2, with alpha = 1). One student learns all M at once, in place of a
    series of students.
    """

    kind: Suppress[Literal["pd"]] = "pd"
    """Name of this kind."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Progressive:
        if self.steps & (self.steps - 1):
            raise GddlabError(f"steps={self.steps} of progressive distillation: give a power of two")
        return self

    def indices(self, r: Tensor) -> Tensor:
        width = 2 ** _pick(r[0], 1, self.steps.bit_length() - 1)
        s = width * _pick(r[1], 0, self.steps // width - 1)
        return torch.stack([s + width, s + width // 2, s])


class FromNoise(InstancePart):
    """Distillation relative to pure noise: from the highest level to any lower one.

    t = N, s in 0..N-2, u = s + 1; the target as in progressive distillation.
    """

    kind: Suppress[Literal["rcd"]] = "rcd"
    """Name of this kind."""

    def indices(self, r: Tensor) -> Tensor:
        s = _pick(r[0], 0, self.steps - 2)
        return torch.stack([torch.full_like(s, self.steps), s + 1, s])


class Consistency(InstancePart):
    """Consistency distillation: the student is to give the same image from neighbouring noise levels.

    t in 1..N, u = t - 1; the target of g(x_t; t) is g(x_u; u) (Song et al. 2023, algorithm 2).
    """

    kind: Suppress[Literal["cd"]] = "cd"
    """Name of this kind."""
    target_time: ClassVar[bool] = False

    def indices(self, r: Tensor) -> Tensor:
        t = _pick(r[0], 1, self.steps)
        return torch.stack([t, t - 1, torch.zeros_like(t)])

    def predict(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        return moves.student(x, moves.level(at[0], x), moves.labels)

    def target(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        return moves.student(moves.step(x, at[0], at[1]), moves.level(at[1], x), moves.labels)


class Trajectory(InstancePart):
    """Consistency trajectory distillation: the student's jumps from any level to any lower one are to agree.

    t in 2..N, u in 1..t-1, s in 0..u-1; the target of the jump t -> s is the jump u -> s (Kim et al. 2023, section 3,
    soft consistency matching). Both are compared at index 0, where the student, held constant, jumps with them. The
    teacher goes all the way from t to u by Heun's steps along the grid, as in the paper: with the student's own steps
    there, its errors feed themselves and it diverges. That is twice t - u teacher calls per image, 9 on average for
    N = 16. The paper's denoising and adversarial losses are not included.
    """

    kind: Suppress[Literal["ctm"]] = "ctm"
    """Name of this kind."""

    def indices(self, r: Tensor) -> Tensor:
        t = _pick(r[0], 2, self.steps)
        u = _pick(r[1], 1, t - 1)
        return torch.stack([t, u, _pick(r[2], 0, u - 1)])

    def predict(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        t, _, s = at
        made = moves.student.jump(x, moves.level(t, x), moves.level(s, x), moves.labels)
        with constant(moves.student.parameters()):
            return self._to_end(moves, made, s)

    def target(self, moves: Moves, x: Tensor, at: Tensor) -> Tensor:
        t, u, s = at
        for k in range(int((t - u).max())):  # the teacher's steps along the grid
            x = moves.heun(t - k > u, x, t - k, t - k - 1)
        made = moves.student.jump(x, moves.level(u, x), moves.level(s, x), moves.labels)
        return self._to_end(moves, made, s)

    @staticmethod
    def _to_end(moves: Moves, x: Tensor, start: Tensor) -> Tensor:
        """The student's jump to index 0; an image that is already there stays."""
        return moves.jump(start > 0, x, start, torch.zeros_like(start))
