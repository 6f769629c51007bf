"""Instance-based losses: progressive, consistency, trajectory and relative-to-noise distillation.

The student's prediction from a noisy image is compared with what a step of the teacher predicts from it. Noise levels
are the Karras grid of indices 0 (`sigma_min`) to N = `steps` (`sigma_max`). x_t = image + sigma_t noise. A step of one
grid interval is the teacher's, by Heun; a longer one is the student's own, by Euler, without gradient (but for
trajectories). g is the student's image, G its jump (`OneStepPrecond.jump`). Targets come from the student itself, not
from an average over its past (Song & Dhariwal 2023, section 3.2, drop it too). All weights by noise level are 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from tyro.conf import Suppress

from gddlab.distill.distances import check_distance, perceptual_distance
from gddlab.distill.parts import Settings
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond, Precond
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN
from gddlab.sampling.samplers import heun_step
from gddlab.sampling.schedules import karras_sigmas

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), each (B, C, H, W), to one distance per image, (B,); differentiable in the prediction."""


@dataclass(frozen=True)
class Indices:
    """Where each image starts, stops over, and ends: indices of the grid, each (n,), int64, with t > u >= s.

    Keep them on the CPU, where they decide which network moves an image; on another device each loss waits for it.
    """

    t: Tensor
    u: Tensor
    s: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice) -> Indices:
        return Indices(self.t[part], self.u[part], self.s[part])

    def to(self, device: torch.device | str) -> Indices:
        return Indices(self.t.to(device), self.u.to(device), self.s.to(device))


class InstanceLoss:
    """The distance between the student's prediction and its target, one per image.

    Args:
        teacher: Denoiser D(x; sigma, labels), in eval mode, on the images' device and in their precision.
        distance: (a, b) -> (B,).
        steps: N, at least 2.
        sigma_min, sigma_max: Ends of the grid; the student's eps and sigma_g.
        rho: Exponent of the grid.

    Raises:
        GddlabError: `steps` that the loss cannot use.
    """

    target_time: ClassVar[bool] = True
    """Whether the student takes a second time, the one at which its jump ends."""

    def __init__(
        self,
        teacher: nn.Module,
        distance: Distance,
        *,
        steps: int = 16,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        rho: float = 7.0,
    ):
        self.check_steps(steps)
        self.teacher, self.distance, self.steps = teacher, distance, steps
        self.sigmas = karras_sigmas(steps + 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).flip(0)
        """The grid, ascending, (steps + 1,), float64."""

    @classmethod
    def check_steps(cls, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise GddlabError(f"steps={steps!r} of an instance loss: give an integer, at least 2")

    def draw(self, n: int, generator: torch.Generator) -> Indices:
        """Indices of `n` images, uniform in their ranges; of the global batch, whose parts are slices."""
        return self.indices(torch.rand(3, n, generator=generator, dtype=torch.float64))

    def indices(self, r: Tensor) -> Indices:
        """Indices by three uniform numbers in [0, 1) per image, (3, n)."""
        raise NotImplementedError

    def predict(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        """The student's image from x_t, with a gradient to its parameters."""
        return student(x, self._at(at.t, x), labels, target=self._at(at.s, x))

    def target(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        """What the prediction is compared with; called without gradients.

        Here the image at sigma = 0 of the line through x_t and x_s, where x_s is reached by two steps, t -> u -> s.
        """
        x_u = self._step(student, x, labels, at.t, at.u)
        x_s = self._step(student, x_u, labels, at.u, at.s)
        t, s = self._at(at.t, x), self._at(at.s, x)
        return x + _wide(t / (t - s)) * (x_s - x)

    def loss(
        self, student: OneStepPrecond, images: Tensor, labels: Tensor | None, noise: Tensor, at: Indices
    ) -> Tensor:
        """The loss of each image; its gradient reaches the student's parameters alone.

        Args:
            student: In eval mode; takes a target time where `target_time` says so.
            images: Real, (B, C, H, W) in [-1, 1].
            labels: One-hot, (B, label_dim), or None.
            noise: Standard normal, (B, C, H, W).
            at: Indices of these images.

        Returns:
            (B,).

        Raises:
            GddlabError: A student without target time, where one is needed.
        """
        if self.target_time and not student.target_time:
            raise GddlabError(
                f"{type(self).__name__} with a student without target time: make it with target_time=True"
            )
        at = at.to("cpu")
        x = images + _wide(self._at(at.t, images)) * noise
        # The prediction first: autocast keeps the low-precision weights of the first pass, which must be those with a
        # gradient.
        prediction = self.predict(student, x, labels, at)
        with torch.no_grad():
            target = self.target(student, x, labels, at)
        out = self.distance(prediction, target)
        assert out.shape == (len(images),)
        return out

    def _step(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, start: Tensor, end: Tensor) -> Tensor:
        """From index to lower index along the ODE: the teacher's step for neighbours, else the student's."""
        near = start - end == 1
        x = self._move(self._heun, near, x, labels, start, end)
        return self._move(student.jump, ~near, x, labels, start, end)

    def _move(
        self,
        move: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        which: Tensor,
        x: Tensor,
        labels: Tensor | None,
        start: Tensor,
        end: Tensor,
    ) -> Tensor:
        """Moves the images that `which`, on the CPU, selects; no other is computed."""
        if not which.any():
            return x
        t, u = self._at(start[which], x), self._at(end[which], x)
        if which.all():
            return move(x, t, u, labels)
        rows = which.nonzero().flatten().to(x.device)
        return x.index_copy(0, rows, move(x[rows], t, u, None if labels is None else labels[rows]))

    def _heun(self, x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        """The teacher's step from sigma t to u > 0 (Karras et al. 2022, algorithm 1)."""

        def slope(x: Tensor, sigma: Tensor) -> Tensor:
            return (x - self.teacher(x, sigma.flatten(), labels)) / sigma

        return heun_step(slope, x, _wide(t), _wide(u))

    def _at(self, index: Tensor, like: Tensor) -> Tensor:
        """Noise levels at indices on the CPU, (B,)."""
        return self.sigmas[index].to(like)


class ProgressiveLoss(InstanceLoss):
    """Progressive distillation (Salimans & Ho 2022).

    A coarse grid of M steps, M a power of two below N drawn for each image; t and s are neighbours on it, u lies in the
    middle. The target of g(x_t; t, s) is the image from which one Euler step t -> s arrives where the two steps
    t -> u -> s do (their algorithm 2, with alpha = 1). One student learns all M at once, in place of a series of
    students.
    """

    @classmethod
    def check_steps(cls, steps: int) -> None:
        super().check_steps(steps)
        if steps & (steps - 1):
            raise GddlabError(f"steps={steps} of progressive distillation: give a power of two")

    def indices(self, r: Tensor) -> Indices:
        width = 2 ** _pick(r[0], 1, self.steps.bit_length() - 1)
        s = width * _pick(r[1], 0, self.steps // width - 1)
        return Indices(s + width, s + width // 2, s)


class FromNoiseLoss(InstanceLoss):
    """From pure noise: t = N, s in 0..N-2, u = s + 1; the target as in progressive distillation."""

    def indices(self, r: Tensor) -> Indices:
        s = _pick(r[0], 0, self.steps - 2)
        return Indices(torch.full_like(s, self.steps), s + 1, s)


class ConsistencyLoss(InstanceLoss):
    """Consistency distillation (Song et al. 2023, algorithm 2).

    t in 1..N, u = t - 1; the target of g(x_t; t) is g(x_u; u).
    """

    target_time = False

    def indices(self, r: Tensor) -> Indices:
        t = _pick(r[0], 1, self.steps)
        return Indices(t, t - 1, torch.zeros_like(t))

    def predict(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        out: Tensor = student(x, self._at(at.t, x), labels)
        return out

    def target(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        out: Tensor = student(self._step(student, x, labels, at.t, at.u), self._at(at.u, x), labels)
        return out


class TrajectoryLoss(InstanceLoss):
    """Consistency trajectory models (Kim et al. 2023, section 3, soft consistency matching).

    t in 2..N, u in 1..t-1, s in 0..u-1; the target of the jump t -> s is the jump u -> s. Both are compared at index 0,
    where the student, held constant, jumps with them. The teacher goes all the way from t to u by Heun's steps along
    the grid, as in the paper: with the student's own steps there, its errors feed themselves and it diverges. That is
    twice t - u teacher calls per image, 9 on average for N = 16. The paper's denoising and adversarial losses are not
    included.
    """

    def indices(self, r: Tensor) -> Indices:
        t = _pick(r[0], 2, self.steps)
        u = _pick(r[1], 1, t - 1)
        return Indices(t, u, _pick(r[2], 0, u - 1))

    def predict(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        made = student.jump(x, self._at(at.t, x), self._at(at.s, x), labels)
        with _constant(student):
            return self._to_end(student, made, labels, at.s)

    def target(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, at: Indices) -> Tensor:
        for k in range(int((at.t - at.u).max())):  # the teacher's steps along the grid
            now = at.t - k
            x = self._move(self._heun, now > at.u, x, labels, now, now - 1)
        made = student.jump(x, self._at(at.u, x), self._at(at.s, x), labels)
        return self._to_end(student, made, labels, at.s)

    def _to_end(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, start: Tensor) -> Tensor:
        """The student's jump to index 0; an image that is already there stays."""
        return self._move(student.jump, start > 0, x, labels, start, torch.zeros_like(start))


def _pick(r: Tensor, low: int, high: int | Tensor) -> Tensor:
    """Integers from `low` to `high`, both included, by uniform numbers in [0, 1)."""
    return low + (r * (high - low + 1)).long()


def _wide(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1)


@contextlib.contextmanager
def _constant(net: nn.Module) -> Iterator[None]:
    """Gradients pass through the network to its input, and none reaches its parameters."""
    trained = [p for p in net.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class InstancePart(Settings):
    """The part of a configuration that chooses an instance-based loss; a subclass per kind."""

    kind: str
    loss_type: ClassVar[type[InstanceLoss]]
    weight: float = Field(default=1.0, gt=0)
    """Factor of the instance loss, which is a mean over images."""
    steps: int = Field(default=16, ge=2)
    """Steps of the Karras grid from sigma 80 to 0.002; a power of two for progressive distillation."""
    distance: Literal["lpips", "l2", "lite0"] = "lpips"
    """Distance between prediction and target; lite0 is LPIPS's formula on EfficientNet-lite0, without its weights."""
    distance_weights: str | None = None
    """Weights of the LPIPS trunk: a path, or "random"; None looks for them."""

    @model_validator(mode="after")
    def _fields_fit(self) -> InstancePart:
        self.loss_type.check_steps(self.steps)
        if self.distance_weights is not None and self.distance != "lpips":
            raise GddlabError(f"instance.distance_weights with distance={self.distance!r}: only lpips takes them")
        return self

    @property
    def target_time(self) -> bool:
        """Whether the student takes a second time."""
        return self.loss_type.target_time

    def build(self, teacher: Precond, *, device: torch.device, dtype: torch.dtype) -> InstanceLoss:
        """The loss, with the teacher and the distance on a device."""
        teacher = teacher.to(device=device, dtype=dtype).eval().requires_grad_(False)
        distance = perceptual_distance(self.distance, weights=self.distance_weights)
        return self.loss_type(teacher, distance.to(device=device, dtype=dtype), steps=self.steps)

    def find(self) -> str:
        """Says what the loss needs.

        Raises:
            GddlabError: The weights of the distance are not there, or do not fit.
        """
        check_distance(self.distance, self.distance_weights)
        return f"{self.kind} by {self.distance}"

    def describe(self) -> str:
        """A few words for a report."""
        return f"{self.kind}, factor {self.weight:g}, {self.steps} steps, distance {self.distance}"

    def stand_in(self) -> InstancePart:
        """The same with random weights of the distance, for measurements without a download."""
        return self.model_copy(update={"distance_weights": "random" if self.distance == "lpips" else None})


class Progressive(InstancePart):
    """Progressive distillation: one step of the student is to arrive where two steps do."""

    kind: Suppress[Literal["pd"]] = "pd"
    """Name of this kind."""
    loss_type = ProgressiveLoss


class Consistency(InstancePart):
    """Consistency distillation: the student is to give the same image from neighbouring noise levels."""

    kind: Suppress[Literal["cd"]] = "cd"
    """Name of this kind."""
    loss_type = ConsistencyLoss


class Trajectory(InstancePart):
    """Consistency trajectory distillation: the student's jumps from any level to any lower one are to agree."""

    kind: Suppress[Literal["ctm"]] = "ctm"
    """Name of this kind."""
    loss_type = TrajectoryLoss


class FromNoise(InstancePart):
    """Distillation relative to pure noise: from the highest level to any lower one."""

    kind: Suppress[Literal["rcd"]] = "rcd"
    """Name of this kind."""
    loss_type = FromNoiseLoss
