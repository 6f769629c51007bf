"""One training iteration: generator step, discriminator step, lazy R1 step (method of GDD), whole or in micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from gddlab.distill.distributed import World
from gddlab.distill.losses import d_loss_fake, d_loss_real, g_loss, r1_penalty
from gddlab.distill.optim import adam, update
from gddlab.nets import OneStepPrecond

if TYPE_CHECKING:
    from gddlab.distill.augment import Augment
    from gddlab.distill.losses import Draws, InstanceLoss

__all__ = ["Discriminator", "Draw", "GanStep", "InstancePart"]

Stats = dict[str, Tensor]


class Discriminator(Protocol):
    """What the steps ask of a discriminator.

    `features`: everything before the first trained parameter; the images themselves for a network that is trained whole.
    `coupled`: whether `logits` of an image depend on the others of its batch through more than groups of consecutive ones (BatchNorm).
    """

    coupled: bool

    def features(self, images: Tensor) -> list[Tensor]: ...

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Draw:
    """What is random in a pass beside the latents; this rank's part of the global batch.

    Attributes:
        noise: Of a few-step student's later steps, each (B, C, H, W).
        exit: Which of its steps makes the images, from 0.
        u: Uniforms of the augmentation, (B, width).
    """

    noise: tuple[Tensor, ...] = ()
    exit: int = 0
    u: Tensor | None = None

    def part(self, s: slice) -> Draw:
        return Draw(tuple(x[s] for x in self.noise), self.exit, None if self.u is None else self.u[s])


PLAIN = Draw()


@dataclass(frozen=True)
class InstancePart:
    """What the instance loss needs of an iteration: real images, noise, and times, this rank's part."""

    images: Tensor
    noise: Tensor
    draws: Draws


class GanStep:
    """Student, discriminator, both optimisers, and the updates; every batch is this rank's part of the global batch.

    With `micro`, no more images than that are held at once where images are dear (student, backbones); the heads, whose BatchNorm sees the
    whole batch, get all features together. So gradients equal those of the whole batch: the generator step makes its images twice, first without
    a graph for the features, then a part at a time for the gradient that the heads ask for.

    Args:
        g: Student; only its parameters with requires_grad are trained, by `trainable`.
        d: Discriminator; None where only `instance` trains.
        trainable: Parameters of the student that are trained.
        lr_g, lr_d: Adam's learning rates.
        adversarial_weight: Factor of the adversarial losses (means over images).
        r1_gamma, r1_interval: R1's weight, and iterations between two R1 steps; gamma 0 for none.
        loss: "ns" or "hinge".
        world: The processes of the run.
        autocast, autocast_d: dtype of the student's and the discriminator's passes under autocast; None for their own. R1 has none.
        micro: Images held at once; None for all.
        augment, augment_p: What images go through before the discriminator, not for R1, and its probability.
        instance, instance_weight: The instance loss and its factor.
        compiled: Compiles the frozen features.
    """

    def __init__(
        self,
        g: OneStepPrecond,
        d: Discriminator | None,
        *,
        trainable: Sequence[nn.Parameter],
        lr_g: float,
        lr_d: float,
        adversarial_weight: float,
        r1_gamma: float,
        r1_interval: int,
        world: World,
        loss: str = "ns",
        autocast: torch.dtype | None = None,
        autocast_d: torch.dtype | None = None,
        micro: int | None = None,
        augment: Augment | None = None,
        augment_p: Tensor | float = 1.0,
        instance: InstanceLoss | None = None,
        instance_weight: float = 1.0,
        compiled: bool = False,
    ):
        assert d is not None or instance is not None
        self.g, self.world, self.loss, self.autocast, self.autocast_d = g, world, loss, autocast, autocast_d
        self.weight, self.r1_gamma, self.r1_interval, self.micro = adversarial_weight, r1_gamma, r1_interval, micro
        self.augment, self.augment_p = augment, augment_p
        self.instance, self.instance_weight = instance, instance_weight
        self.g_params = list(trainable)
        self.opt_g = adam(self.g_params, lr_g)
        self._d = d
        self.d_params: list[nn.Parameter] = []
        self.opt_d: torch.optim.Adam | None = None
        if d is not None:
            self.d_params = [p for p in d.parameters() if p.requires_grad]
            self.opt_d = adam(self.d_params, lr_d, interval=r1_interval if r1_gamma else None)
            self._features: Callable[[Tensor], list[Tensor]] = torch.compile(d.features) if compiled else d.features

    @property
    def d(self) -> Any:
        """The discriminator; there is one unless the instance loss trains alone."""
        assert self._d is not None
        return self._d

    @property
    def adversarial(self) -> bool:
        return self._d is not None

    # Parts of the steps.

    def _cast(self, dtype: torch.dtype | None, like: Tensor) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if dtype is None else torch.autocast(like.device.type, dtype)

    def _parts(self, n: int) -> list[slice]:
        micro = self.micro or n
        return [slice(i, min(i + micro, n)) for i in range(0, n, micro)]

    def generate(self, z: Tensor, labels: Tensor | None, draw: Draw = PLAIN) -> Tensor:
        with self._cast(self.autocast, z):
            if draw.exit:
                return self.g.generate_steps(z, labels, draw.noise, draw.exit)
            return self.g.generate(z, labels)

    def features(self, images: Tensor, u: Tensor | None = None) -> list[Tensor]:
        """Projected features of images in [-1, 1], augmented where the run augments."""
        if self.augment is not None:
            assert u is not None
            images = self.augment(images, u, self.augment_p)
        with self._cast(self.autocast_d, images):
            return self._features(images)

    def logits(self, features: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
        with self._cast(self.autocast_d, features[0]):
            logits: list[Tensor] = self.d.logits(features, labels)
        return [x.float() if x.dtype == torch.bfloat16 else x for x in logits]

    @torch.no_grad()
    def real_features(self, images: Tensor, u: Tensor | None = None) -> list[Tensor]:
        """Features of real images, a part at a time."""
        return _cat([self.features(images[s], _at(u, s)) for s in self._parts(len(images))])

    @torch.no_grad()
    def fake_features(self, z: Tensor, labels: Tensor | None, draw: Draw = PLAIN) -> list[Tensor]:
        """Features of generated images, a part at a time."""
        parts = self._parts(len(z))
        return _cat([self.features(self.generate(z[s], _at(labels, s), draw.part(s)), _at(draw.u, s)) for s in parts])

    # The steps.

    def g_step(
        self, z: Tensor, labels: Tensor | None, draw: Draw = PLAIN, instance: InstancePart | None = None
    ) -> Stats:
        """Generator step; `fake_features` are those of the images it made, for `d_step` to use again if wanted."""
        self.opt_g.zero_grad(set_to_none=True)
        out: Stats = {}
        if self.adversarial:
            for p in self.d_params:
                p.requires_grad_(False)
            out |= self._adversarial(z, labels, draw)
            for p in self.d_params:
                p.requires_grad_(True)
        if instance is not None:
            out["loss/instance"] = self._instance(instance, labels)
        return out | {"nonfinite/g": update(self.opt_g, self.g_params, self.world)}

    def _adversarial(self, z: Tensor, labels: Tensor | None, draw: Draw) -> Stats:
        parts, n = self._parts(len(z)), len(z)
        if self.d.coupled and len(parts) > 1:
            leaves = [f.requires_grad_(True) for f in self.fake_features(z, labels, draw)]
            logits = self.logits(leaves, labels)
            loss = g_loss(logits, self.loss)
            slopes = torch.autograd.grad(self.weight * loss, leaves)
            for s in parts:
                images = self.generate(z[s], _at(labels, s), draw.part(s))
                features = self.features(images, _at(draw.u, s))
                torch.autograd.backward(features, [g[s].to(f.dtype) for f, g in zip(features, slopes, strict=True)])
            kept, total, mean = leaves, loss.detach(), _mean(logits)
        else:
            total, mean, made = torch.zeros((), device=z.device, dtype=z.dtype), torch.zeros_like(z[0, 0, 0, 0]), []
            for s in parts:
                images = self.generate(z[s], _at(labels, s), draw.part(s))
                features = self.features(images, _at(draw.u, s))
                logits = self.logits(features, _at(labels, s))
                share = len(z[s]) / n
                loss = share * g_loss(logits, self.loss)
                (self.weight * loss).backward()
                total, mean = total + loss.detach(), mean + share * _mean(logits)
                made.append([f.detach() for f in features])
            kept = _cat(made)
        return {"loss/g": total, "logits/g": mean} | {f"fake_features/{i}": f.detach() for i, f in enumerate(kept)}

    def _instance(self, part: InstancePart, labels: Tensor | None) -> Tensor:
        assert self.instance is not None
        n = len(part.images)
        total = torch.zeros((), device=part.images.device, dtype=part.images.dtype)
        for s in self._parts(n):
            with self._cast(self.autocast, part.images):
                losses = self.instance.loss(
                    self.g, part.images[s], _at(labels, s), noise=part.noise[s], draws=part.draws[s]
                )
            loss = losses.sum() / n
            (self.instance_weight * loss).backward()
            total = total + loss.detach()
        return total

    def d_step(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        z: Tensor | None = None,
        draw: Draw = PLAIN,
        u: Tensor | None = None,
        fake_features: Sequence[Tensor] | None = None,
        real_features: Sequence[Tensor] | None = None,
    ) -> Stats:
        """Discriminator step on fresh fakes from `z`, or on `fake_features`; `real_features` spares the backbone on real images.

        `u` are the augmentation's uniforms of the real images.
        """
        assert self.opt_d is not None
        self.opt_d.zero_grad(set_to_none=True)
        if fake_features is None:
            assert z is not None
            fake_features = self.fake_features(z, labels, draw)
        if real_features is None:
            real_features = self.real_features(images, u)
        loss_fake, fake, _ = self._judge(fake_features, labels, d_loss_fake)
        loss_real, real, signs = self._judge(real_features, labels, d_loss_real)
        bad = update(self.opt_d, self.d_params, self.world)
        return {
            "loss/d": loss_fake + loss_real,
            "logits/fake": fake,
            "logits/real": real,
            "signs/real": signs,
            "nonfinite/d": bad,
        }

    def _judge(
        self, features: Sequence[Tensor], labels: Tensor | None, loss_of: Callable[[Sequence[Tensor], str], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward pass of one of the discriminator's losses; its value, and the means of logits and of their signs."""
        n = len(features[0])
        sums = [torch.zeros((), device=features[0].device, dtype=torch.float64) for _ in range(3)]
        for s in [slice(0, n)] if self.d.coupled else self._parts(n):
            logits = self.logits([f[s] for f in features], _at(labels, s))
            share = len(features[0][s]) / n
            loss = loss_of(logits, self.loss)
            (self.weight * share * loss).backward()
            signs = torch.cat([x.detach().sign().flatten() for x in logits]).mean()
            for total, value in zip(sums, (loss.detach(), _mean(logits), signs), strict=True):
                total += share * value
        return sums[0], sums[1], sums[2]

    def r1_step(self, images: Tensor, labels: Tensor | None) -> Stats:
        """Lazy R1 on real images: gamma / 2 * |grad|^2 times the interval, its own backward pass and optimiser step."""
        assert self.opt_d is not None
        self.opt_d.zero_grad(set_to_none=True)
        n, parts = len(images), self._parts(len(images))
        factor = self.r1_gamma / 2 * self.r1_interval
        if self.d.coupled:
            penalty, surrogate = r1_penalty(self.d, images, labels, parts=parts)
            (factor * surrogate).backward()
        else:
            penalty = torch.zeros((), device=images.device, dtype=images.dtype)
            for s in parts:
                share = len(images[s]) / n
                part, surrogate = r1_penalty(self.d, images[s], _at(labels, s))
                (factor * share * surrogate).backward()
                penalty = penalty + share * part
        bad = update(self.opt_d, self.d_params, self.world)
        return {"r1": penalty, "loss/r1": self.r1_gamma / 2 * penalty, "nonfinite/d": bad}

    def due_r1(self, iteration: int) -> bool:
        """Every `r1_interval`-th iteration; not the first."""
        return self.adversarial and bool(self.r1_gamma) and iteration % self.r1_interval == 0 and iteration > 0


def _at(x: Tensor | None, s: slice) -> Tensor | None:
    return None if x is None else x[s]


def _cat(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Lists of features of parts of a batch -> features of the batch."""
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in logits]).mean()
