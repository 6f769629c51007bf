"""The purely distributional objective: non-saturating GAN loss and R1 (method of GDD; Mescheder et al. 2018).

Losses are means over the logits of an image and over images, summed over backbones: the authors' sum over the images of a device
is the caller's `adversarial_weight`, so that a result does not depend on the number of devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets import OneStepPrecond
from gddlab.sampling.schedules import karras_sigmas

if TYPE_CHECKING:
    from gddlab.distill.step import Discriminator

__all__ = [
    "KINDS",
    "Distance",
    "Draws",
    "InstanceLoss",
    "d_loss_fake",
    "d_loss_real",
    "g_loss",
    "needs_target_time",
    "r1_penalty",
]


def g_loss(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or -logits for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else -x).mean() for x in logits]).sum()


def d_loss_fake(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(logits), or relu(1 + logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(x) if kind == "ns" else F.relu(1 + x)).mean() for x in logits]).sum()


def d_loss_real(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or relu(1 - logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else F.relu(1 - x)).mean() for x in logits]).sum()


def r1_penalty(
    d: Discriminator, images: Tensor, labels: Tensor | None, *, parts: Sequence[slice] = (slice(None),)
) -> tuple[Tensor, Tensor]:
    """Squared norm of d sum(logits) / d image, mean over images: the image gradient, through resize, backbone and projection.

    The penalty P depends on the heads' parameters p only through f = d sum(logits) / d features, since everything before the features is frozen. With J the
    Jacobian of the features, d image gradient = J^T df, so dP / dp = <J (2/B) J^T f, df / dp>. The second derivative of the backbone, by far the
    dearest part (grouped convolutions have no fast one), is replaced by one forward-mode product: exact, not an approximation.

    Args:
        d: Discriminator.
        images: (B, C, H, W) in [-1, 1].
        labels: One-hot, (B, classes), or None.
        parts: Slices that divide the batch; the features' graph is held for one at a time (and made again for each, if there are several).

    Returns:
        The penalty, (), without a graph; and a surrogate, (), whose gradient with respect to the heads' parameters is the penalty's.
    """
    images = images.detach()
    x = [images[s].requires_grad_(True) for s in parts]
    with torch.enable_grad():
        made = [d.features(x[0])] if len(x) == 1 else None
    if made is None:
        with torch.no_grad():
            plain = [d.features(p) for p in x]
    features = [torch.cat([f.detach() for f in level]) for level in zip(*(made or plain), strict=True)]
    leaves = [f.requires_grad_(True) for f in features]
    with torch.enable_grad():
        total = torch.stack([y.sum() for y in d.logits(leaves, labels)]).sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        at = 0
        grads, tangents = [], []
        for i, p in enumerate(x):
            rows = slice(at, at + len(p))
            at += len(p)
            f = made[i] if made else d.features(p)
            (grad,) = torch.autograd.grad(f, p, [s.detach()[rows] for s in slopes])
            del f
            with torch.no_grad(), fwAD.dual_level():
                moved = d.features(fwAD.make_dual(p.detach(), 2 / len(images) * grad))
                tangents.append([fwAD.unpack_dual(m).tangent for m in moved])
            grads.append(grad)
    pushed = [torch.cat(level) for level in zip(*tangents, strict=True)]
    surrogate = torch.stack([(t * s).sum() for t, s in zip(pushed, slopes, strict=True)]).sum()
    return torch.cat(grads).square().sum((1, 2, 3)).mean(), surrogate


KINDS = ("pd", "cd", "ctm", "rcd")

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), each (B, C, H, W), to a distance an image, (B,); differentiable in the prediction."""


def needs_target_time(kind: str) -> bool:
    """Whether the student takes a second time.

    Raises:
        GddlabError: An unknown loss.
    """
    if kind not in KINDS:
        raise unknown("instance loss", kind, KINDS)
    return kind != "cd"


@dataclass(frozen=True)
class Draws:
    """Where each image starts, stops over, and goes to: indices of the grid, each (n,), int64; t > u >= s, and u > s but for "cd".

    They are best left on the CPU, where they decide which network moves an image; on another device each loss waits for it.
    """

    t: Tensor
    u: Tensor
    s: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.t[part], self.u[part], self.s[part])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.t.to(device), self.u.to(device), self.s.to(device))


class InstanceLoss:
    """Distance between what the student says of a noisy image and what a step of the teacher says of it.

    Noise levels are the Karras grid of indices 0 (`sigma_min`) to N = `steps` (`sigma_max`). x_t = image + sigma_t noise; a step of one grid interval is
    the teacher's, by Heun; a longer one is the student's own, by Euler, without gradient (but for "ctm"). g is the student's image, G its jump (`OneStepPrecond.jump`).

    - "pd", progressive distillation (Salimans & Ho 2022): a coarse grid of M steps, M a power of two below N drawn for each image, t and s neighbours on it, u in
      the middle. g(x_t; t, s) is to be the image from which one Euler step t -> s arrives where the two steps t -> u -> s do (their algorithm 2, with
      alpha = 1). One student learns all M at once, in place of one student after the other. No weight by t.
    - "cd", consistency distillation (Song et al. 2023, algorithm 2): u = t - 1, t in 1..N; g(x_t; t) is to be g(x_u; u).
    - "ctm", consistency trajectory models (Kim et al. 2023, section 3, soft consistency matching): t in 2..N, u in 1..t-1, s in 0..u-1; the jump
      t -> s is to be the jump u -> s. Both are compared at index 0, where the student, held constant, jumps with them. The teacher goes all the way from t to
      u by Heun's steps along the grid, as in the paper: with the student's own steps there, its errors feed themselves and it diverges. Twice t - u teacher
      calls an image, 9 in the mean for N = 16. Without the paper's denoising and adversarial losses.
    - "rcd": t = N, s in 0..N-2, u = s + 1; otherwise as "pd".

    Targets come from the student itself, not from an average over its past (Song & Dhariwal 2023, section 3.2, drop it too). All weights are 1.

    Args:
        kind: One of `KINDS`.
        teacher: Denoiser D(x; sigma, labels), in eval mode, on the images' device and in their precision.
        distance: (a, b) -> (B,).
        steps: N, at least 2; a power of two for "pd".
        sigma_min, sigma_max: Ends of the grid; the student's eps and sigma_g.
        rho: Exponent of the grid.

    Raises:
        GddlabError: An unknown kind, or `steps` that it cannot use.
    """

    def __init__(
        self,
        kind: str,
        teacher: nn.Module,
        distance: Distance,
        *,
        steps: int = 16,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        self.target_time = needs_target_time(kind)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise GddlabError(f"steps={steps!r} of an instance loss: give an integer, at least 2")
        if kind == "pd" and steps & (steps - 1):
            raise GddlabError(f"steps={steps} of progressive distillation: give a power of two")
        self.kind, self.teacher, self.distance, self.steps = kind, teacher, distance, steps
        self.sigmas = karras_sigmas(steps + 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).flip(0)
        """The grid, ascending, (steps + 1,), float64."""

    def draw(self, n: int, generator: torch.Generator) -> Draws:
        """Indices of `n` images, uniform in their ranges; of the global batch, whose parts are slices."""
        r = torch.rand(3, n, generator=generator, dtype=torch.float64)
        t = u = s = torch.zeros(n, dtype=torch.int64)
        if self.kind == "pd":
            width = 2 ** _pick(r[0], 1, self.steps.bit_length() - 1)
            s = width * _pick(r[1], 0, self.steps // width - 1)
            t, u = s + width, s + width // 2
        elif self.kind == "cd":
            t = _pick(r[0], 1, self.steps)
            u = t - 1
        elif self.kind == "ctm":
            t = _pick(r[0], 2, self.steps)
            u = _pick(r[1], 1, t - 1)
            s = _pick(r[2], 0, u - 1)
        else:
            t = torch.full((n,), self.steps)
            s = _pick(r[0], 0, self.steps - 2)
            u = s + 1
        return Draws(t, u, s)

    def loss(
        self, student: OneStepPrecond, images: Tensor, labels: Tensor | None, noise: Tensor, draws: Draws
    ) -> Tensor:
        """The loss of each image; its gradient reaches the student's parameters alone.

        Args:
            student: In eval mode; takes a target time where `needs_target_time`.
            images: Real, (B, C, H, W) in [-1, 1].
            labels: One-hot, (B, label_dim), or None.
            noise: Standard normal, (B, C, H, W).
            draws: Of these images.

        Returns:
            (B,).

        Raises:
            GddlabError: A student without target time, where one is needed.
        """
        if self.target_time and not student.target_time:
            raise GddlabError(
                f"instance={self.kind!r} with a student without target time: make it with target_time=True"
            )
        draws = draws.to("cpu")
        t, s = self._at(draws.t, images), self._at(draws.s, images)
        x = images + _wide(t) * noise
        # The prediction first: autocast keeps the low-precision weights of the first pass, which must be those with a gradient.
        if self.kind == "cd":
            prediction = student(x, t, labels)
        elif self.kind == "ctm":
            made = student.jump(x, t, s, labels)
            with _constant(student):
                prediction = self._to_end(student, made, labels, draws.s)
        else:
            prediction = student(x, t, labels, target=s)
        out = self.distance(prediction, self._target(student, x, labels, draws))
        assert out.shape == (len(images),)
        return out

    @torch.no_grad()
    def _target(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, draws: Draws) -> Tensor:
        t, u, s = (self._at(i, x) for i in (draws.t, draws.u, draws.s))
        if self.kind == "ctm":
            x_u = self._solve(x, labels, draws.t, draws.u)
            return self._to_end(student, student.jump(x_u, u, s, labels), labels, draws.s)
        x_u = self._step(student, x, labels, draws.t, draws.u)
        if self.kind == "cd":
            out: Tensor = student(x_u, u, labels)
            return out
        x_s = self._step(student, x_u, labels, draws.u, draws.s)
        return x + _wide(t / (t - s)) * (x_s - x)  # the image at sigma = 0 of the line through x_t and x_s

    def _step(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, start: Tensor, end: Tensor) -> Tensor:
        """From index to lower index along the ODE: the teacher's step for neighbours, else the student's."""
        near = start - end == 1
        x = self._move(self._heun, near, x, labels, start, end)
        return self._move(student.jump, ~near, x, labels, start, end)

    def _solve(self, x: Tensor, labels: Tensor | None, start: Tensor, end: Tensor) -> Tensor:
        """From index to lower index by the teacher's steps along the grid."""
        for k in range(int((start - end).max())):
            now = start - k
            x = self._move(self._heun, now > end, x, labels, now, now - 1)
        return x

    def _to_end(self, student: OneStepPrecond, x: Tensor, labels: Tensor | None, start: Tensor) -> Tensor:
        """The student's jump to index 0; what is there stays."""
        return self._move(student.jump, start > 0, x, labels, start, torch.zeros_like(start))

    def _move(
        self,
        move: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        which: Tensor,
        x: Tensor,
        labels: Tensor | None,
        start: Tensor,
        end: Tensor,
    ) -> Tensor:
        """`move`s those images that `which`, on the CPU, says; no other is computed."""
        if not which.any():
            return x
        t, u = self._at(start[which], x), self._at(end[which], x)
        if which.all():
            return move(x, t, u, labels)
        rows = which.nonzero().flatten().to(x.device)
        return x.index_copy(0, rows, move(x[rows], t, u, None if labels is None else labels[rows]))

    def _heun(self, x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        """The teacher's step from sigma t to u > 0 (Karras et al. 2022, algorithm 1)."""
        h = _wide(u - t)
        slope = (x - self.teacher(x, t, labels)) / _wide(t)
        ahead = x + h * slope
        return x + h * (slope + (ahead - self.teacher(ahead, u, labels)) / _wide(u)) / 2

    def _at(self, index: Tensor, like: Tensor) -> Tensor:
        """Noise levels at indices on the CPU, (B,)."""
        return self.sigmas[index].to(like)


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
