"""One training iteration (method of GDD): generator, discriminator and lazy R1 step, whole or in micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gddlab.distill.augment import Augmentation
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import Gradients, World
from gddlab.distill.instance import InstanceLoss
from gddlab.distill.losses import constant, d_loss_fake, d_loss_real, g_loss, r1_penalty
from gddlab.distill.parts import Discriminator
from gddlab.distill.randomness import Batch, Draw, InstanceDraw
from gddlab.ema import local_shard
from gddlab.nets import OneStepPrecond

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float64": None}

Stats = dict[str, Tensor]
PLAIN = Draw()


def adam(
    params: Sequence[nn.Parameter], lr: float, *, interval: int | None = None, graph: bool = False
) -> torch.optim.Adam:
    """Adam with betas (0, 0.99), eps 1e-8; `interval` corrects both for a lazy regulariser (StyleGAN2, appendix B).

    One kernel makes the whole step; `graph` where a CUDA graph may hold it. The state exists from the start, so that a
    checkpoint always has the same form.
    """
    c = interval / (interval + 1) if interval else 1.0
    opt = torch.optim.Adam(params, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True, capturable=graph)
    for p in params:
        step = torch.zeros((), device=p.device)  # the kernel counts it there
        opt.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return opt


def update(opt: torch.optim.Optimizer, gradients: Gradients) -> Tensor:
    """Averages gradients over ranks, replaces values that are not finite (nan by 0, +-inf by +-1e5), steps.

    Returns:
        The number of gradient tensors that were not finite, (), without waiting for the device.
    """
    gradients.average()
    own = [p.grad for p in gradients.params if p.grad is not None]
    grads = [local_shard(g) for g in own]
    bad = (~torch.stack(torch._foreach_norm(grads)).isfinite()).sum()
    if any(isinstance(g, DTensor) for g in own):
        bad = gradients.world.greatest(bad)  # a shard does not see the others
    for g in grads:
        torch.nan_to_num_(g, nan=0.0, posinf=1e5, neginf=-1e5)
    opt.step()
    return bad


class GanStep:
    """Student, discriminator, both optimisers, and the updates; every batch is this rank's part of the global batch.

    With `batch_per_device`, no more images than that are held at once where memory is tight (student, backbones); the
    heads, whose BatchNorm sees the whole batch, get all features together. So gradients equal those of the whole batch:
    the generator step makes its images twice, first without a graph for the features, then a part at a time for the
    gradient that the heads ask for.

    Args:
        config: Losses, learning rates, weights, precision, R1, micro-batches.
        g: Student; its parameters with requires_grad are trained.
        d: Discriminator; None where only `instance` trains.
        world: The processes of the run.
        instance: The instance loss.
        augment: What images go through before the discriminator, not for R1.
    """

    def __init__(
        self,
        config: TrainConfig,
        g: OneStepPrecond,
        d: Discriminator | None,
        world: World,
        *,
        instance: InstanceLoss | None = None,
        augment: Augmentation | None = None,
    ):
        assert d is not None or instance is not None
        self.g, self.loss, self.weight = g, config.loss, config.adversarial_weight
        self.autocast, self.autocast_d = AUTOCAST[config.precision], AUTOCAST[config.precision_d]
        self.r1_gamma, self.r1_interval = config.r1_gamma, config.r1_interval
        self.batch, self.micro = config.batch, config.batch_per_device
        self.augment, self.instance = augment, instance
        self.instance_weight = 1.0 if config.instance is None else config.instance.weight
        self.g_params = [p for p in g.parameters() if p.requires_grad]
        self.opt_g = adam(self.g_params, config.lr_g, graph=config.cuda_graph)
        self.gradients_g = Gradients(self.g_params, world)
        self._d = d
        self.d_params: list[nn.Parameter] = []
        self.opt_d: torch.optim.Adam | None = None
        if d is not None:
            self.d_params = [p for p in d.parameters() if p.requires_grad]
            interval = self.r1_interval if self.r1_gamma else None
            self.opt_d = adam(self.d_params, config.lr_d, interval=interval, graph=config.cuda_graph)
            self.gradients_d = Gradients(self.d_params, world)
            self._features: Callable[[Tensor], list[Tensor]] = (
                torch.compile(d.features) if config.compile else d.features
            )

    @property
    def d(self) -> Discriminator:
        """The discriminator; there is one unless the instance loss trains alone."""
        assert self._d is not None
        return self._d

    @property
    def adversarial(self) -> bool:
        return self._d is not None

    def _cast(self, dtype: torch.dtype | None, like: Tensor) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if dtype is None else torch.autocast(like.device.type, dtype)

    def _parts(self, n: int) -> list[slice]:
        micro = self.micro or n
        return [slice(i, min(i + micro, n)) for i in range(0, n, micro)]

    def _judged(self, n: int) -> list[slice]:
        """What the heads get at once: the whole batch where its images depend on each other."""
        return [slice(0, n)] if self.d.coupled else self._parts(n)

    def generate(self, z: Tensor, labels: Tensor | None, draw: Draw = PLAIN) -> Tensor:
        with self._cast(self.autocast, z):
            if draw.exit:
                return self.g.generate_steps(z, labels, draw.noise, draw.exit)
            return self.g.generate(z, labels)

    def features(self, images: Tensor, u: Tensor | None = None) -> list[Tensor]:
        """Projected features of images in [-1, 1], augmented where the run augments."""
        if self.augment is not None:
            assert u is not None
            images = self.augment(images, u)
        with self._cast(self.autocast_d, images):
            return self._features(images)

    def logits(self, features: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
        with self._cast(self.autocast_d, features[0]):
            logits = self.d.logits(features, labels)
        return [x.float() if x.dtype == torch.bfloat16 else x for x in logits]

    @torch.no_grad()
    def real_features(self, images: Tensor, u: Tensor | None = None) -> list[Tensor]:
        """Features of real images, a part at a time."""
        return _cat([self.features(images[s], _at(u, s)) for s in self._parts(len(images))])

    @torch.no_grad()
    def fake_features(self, z: Tensor, labels: Tensor | None, draw: Draw = PLAIN) -> list[Tensor]:
        """Features of generated images, a part at a time."""
        return _cat([self._fakes(z, labels, draw, s) for s in self._parts(len(z))])

    def _fakes(self, z: Tensor, labels: Tensor | None, draw: Draw, s: slice) -> list[Tensor]:
        """Features of a part of the generated images."""
        return self.features(self.generate(z[s], _at(labels, s), draw.part(s)), _at(draw.u, s))

    def iteration(self, batch: Batch) -> Stats:
        """Generator and discriminator step."""
        instance = None
        if batch.instance is not None:
            assert batch.images is not None
            instance = batch.images, batch.instance
        stats, fakes = self.g_step(batch.z, batch.labels, batch.draw, instance)
        if not self.adversarial:
            return stats
        if batch.z_d is not None:
            del fakes
            fakes = self.fake_features(batch.z_d, batch.labels, batch.draw_d)
        reals = batch.features
        if reals is None:
            assert batch.images is not None
            reals = self.real_features(batch.images, batch.u)
        return stats | self.d_step(fakes, reals, batch.labels)

    def g_step(
        self,
        z: Tensor,
        labels: Tensor | None,
        draw: Draw = PLAIN,
        instance: tuple[Tensor, InstanceDraw] | None = None,
    ) -> tuple[Stats, list[Tensor]]:
        """Generator step; returns the features of the images it made too, which `d_step` can use again.

        Args:
            z, labels, draw: See `Batch`.
            instance: Real images, and what is random in the instance loss.
        """
        self.opt_g.zero_grad(set_to_none=True)
        passes = len(self._parts(len(z))) if self.adversarial else 0
        if instance is not None:
            passes += len(self._parts(len(instance[0])))
        self.gradients_g.expect(passes)
        stats: Stats = {}
        features: list[Tensor] = []
        if self.adversarial:
            with constant(self.d_params):
                stats, features = self._adversarial(z, labels, draw)
        if instance is not None:
            stats["loss/instance"] = self._instance(*instance, labels)
        return stats | {"nonfinite/g": update(self.opt_g, self.gradients_g)}, features

    def _adversarial(self, z: Tensor, labels: Tensor | None, draw: Draw) -> tuple[Stats, list[Tensor]]:
        parts, n = self._parts(len(z)), len(z)
        if self.d.coupled and len(parts) > 1:
            leaves = [f.requires_grad_(True) for f in self.fake_features(z, labels, draw)]
            logits = self.logits(leaves, labels)
            loss = g_loss(logits, self.loss)
            slopes = torch.autograd.grad(self.weight * loss, leaves)
            for s in parts:
                features = self._fakes(z, labels, draw, s)
                torch.autograd.backward(features, [g[s].to(f.dtype) for f, g in zip(features, slopes, strict=True)])
            kept, total, mean = [f.detach() for f in leaves], loss.detach(), _mean(logits)
        else:
            total, mean, made = torch.zeros((), device=z.device, dtype=z.dtype), torch.zeros_like(z[0, 0, 0, 0]), []
            for s in parts:
                features = self._fakes(z, labels, draw, s)
                logits = self.logits(features, _at(labels, s))
                share = len(z[s]) / n
                loss = share * g_loss(logits, self.loss)
                (self.weight * loss).backward()
                total, mean = total + loss.detach(), mean + share * _mean(logits)
                made.append([f.detach() for f in features])
            kept = _cat(made)
        return {"loss/g": total, "logits/g": mean}, kept

    def _instance(self, images: Tensor, drawn: InstanceDraw, labels: Tensor | None) -> Tensor:
        assert self.instance is not None
        n = len(images)
        total = torch.zeros((), device=images.device, dtype=images.dtype)
        for s in self._parts(n):
            with self._cast(self.autocast, images):
                losses = self.instance.loss(self.g, images[s], _at(labels, s), drawn.noise[s], drawn.at[:, s])
            loss = losses.sum() / n
            (self.instance_weight * loss).backward()
            total = total + loss.detach()
        return total

    def d_step(self, fakes: Sequence[Tensor], reals: Sequence[Tensor], labels: Tensor | None) -> Stats:
        """Discriminator step on features of generated and of real images, which share their labels."""
        assert self.opt_d is not None
        self.opt_d.zero_grad(set_to_none=True)
        self.gradients_d.expect(len(self._judged(len(fakes[0]))) + len(self._judged(len(reals[0]))))
        loss_fake, fake, _ = self._judge(fakes, labels, d_loss_fake)
        loss_real, real, signs = self._judge(reals, labels, d_loss_real)
        bad = update(self.opt_d, self.gradients_d)
        stats = {"loss/d": loss_fake + loss_real, "logits/fake": fake, "logits/real": real, "signs/real": signs}
        ada = {} if self.augment is None else self.augment.observe(signs, self.batch)
        return stats | ada | {"nonfinite/d": bad}

    def _judge(
        self, features: Sequence[Tensor], labels: Tensor | None, loss_of: Callable[[Sequence[Tensor], str], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward pass of one of the discriminator's losses; its value, and the means of logits and of their signs."""
        n = len(features[0])
        sums = [torch.zeros((), device=features[0].device, dtype=torch.float64) for _ in range(3)]
        for s in self._judged(n):
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
        n, penalty = len(images), torch.zeros((), device=images.device, dtype=images.dtype)
        self.gradients_d.expect(len(self._judged(n)))
        for s in self._judged(n):
            share, parts = len(images[s]) / n, self._parts(len(images[s]))
            part, surrogate = r1_penalty(self.d, images[s], _at(labels, s), parts=parts)
            (self.r1_gamma / 2 * self.r1_interval * share * surrogate).backward()
            penalty = penalty + share * part
        bad = update(self.opt_d, self.gradients_d)
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
