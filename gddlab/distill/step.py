"""One training iteration: generator step, discriminator step, lazy R1 step (method of GDD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gddlab.distill.discriminators import ProjectedDiscriminator
from gddlab.distill.distributed import World
from gddlab.distill.objectives import d_loss_fake, d_loss_real, g_loss, r1_penalty
from gddlab.nets import OneStepPrecond

__all__ = ["GanStep", "adam"]


def adam(params: Sequence[nn.Parameter], lr: float, *, interval: int | None = None) -> torch.optim.Adam:
    """Adam with betas (0, 0.99), eps 1e-8; `interval` corrects lr and betas for a lazy regulariser (StyleGAN2, appendix B).

    The state exists from the start, so that a checkpoint has the same form at every step.
    """
    c = interval / (interval + 1) if interval else 1.0
    opt = torch.optim.Adam(params, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, foreach=True)
    for p in params:
        opt.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return opt


class GanStep:
    """Student, discriminator, both optimisers, and the three updates; every batch is this rank's part of the global batch.

    Args:
        g: Student; only its parameters with requires_grad are trained, by `trainable`.
        d: Discriminator.
        trainable: Parameters of the student that are trained.
        lr_g, lr_d: Adam's learning rates.
        adversarial_weight: Factor of the adversarial losses (means over images).
        r1_gamma, r1_interval: R1's weight, and iterations between two R1 steps; gamma 0 for none.
        loss: "ns" or "hinge".
        world: The processes of the run.
        autocast: dtype of the student's forward pass under autocast; None for its own.
    """

    def __init__(
        self,
        g: OneStepPrecond,
        d: ProjectedDiscriminator,
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
    ):
        self.g, self.d, self.world, self.loss, self.autocast = g, d, world, loss, autocast
        self.weight, self.r1_gamma, self.r1_interval = adversarial_weight, r1_gamma, r1_interval
        self.g_params = list(trainable)
        self.d_params = [p for p in d.parameters() if p.requires_grad]
        self.opt_g = adam(self.g_params, lr_g)
        self.opt_d = adam(self.d_params, lr_d, interval=r1_interval if r1_gamma else None)

    def generate(self, z: Tensor, labels: Tensor | None) -> Tensor:
        if self.autocast is None:
            return self.g.generate(z, labels)
        with torch.autocast(z.device.type, self.autocast):
            return self.g.generate(z, labels)

    def _update(self, opt: torch.optim.Adam, params: Sequence[nn.Parameter]) -> Tensor:
        """Averages gradients over ranks, replaces what is not finite, steps; returns the number of tensors that were not finite."""
        self.world.average_gradients(params)
        grads = [p.grad for p in params if p.grad is not None]
        bad = (~torch.stack(torch._foreach_norm(grads)).isfinite()).sum()
        for g in grads:
            torch.nan_to_num_(g, nan=0.0, posinf=1e5, neginf=-1e5)
        opt.step()
        return bad

    def g_step(self, z: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Generator step; `fake_features` are those of the images it made, for `d_step` to use again if wanted."""
        for p in self.d_params:
            p.requires_grad_(False)
        self.opt_g.zero_grad(set_to_none=True)
        features = self.d.features(self.generate(z, labels))
        logits = self.d.logits(features, labels)
        loss = g_loss(logits, self.loss)
        (self.weight * loss).backward()
        bad = self._update(self.opt_g, self.g_params)
        for p in self.d_params:
            p.requires_grad_(True)
        return {"loss/g": loss.detach(), "logits/g": _mean(logits), "nonfinite/g": bad} | {
            f"fake_features/{i}": f.detach() for i, f in enumerate(features)
        }

    def d_step(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        z: Tensor | None = None,
        fake_features: Sequence[Tensor] | None = None,
        real_features: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Discriminator step on fresh fakes from `z`, or on `fake_features`; `real_features` spares the backbone on real images."""
        self.opt_d.zero_grad(set_to_none=True)
        with torch.no_grad():
            if fake_features is None:
                assert z is not None
                fake_features = self.d.features(self.generate(z, labels))
            if real_features is None:
                real_features = self.d.features(images)
        fake = self.d.logits(fake_features, labels)
        loss_fake = d_loss_fake(fake, self.loss)
        (self.weight * loss_fake).backward()
        real = self.d.logits(real_features, labels)
        loss_real = d_loss_real(real, self.loss)
        (self.weight * loss_real).backward()
        bad = self._update(self.opt_d, self.d_params)
        return {
            "loss/d": (loss_fake + loss_real).detach(),
            "logits/fake": _mean(fake),
            "logits/real": _mean(real),
            "signs/real": torch.cat([x.detach().sign().flatten() for x in real]).mean(),
            "nonfinite/d": bad,
        }

    def r1_step(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Lazy R1 on real images: gamma / 2 * |grad|^2 times the interval, its own backward pass and optimiser step."""
        self.opt_d.zero_grad(set_to_none=True)
        penalty, surrogate = r1_penalty(self.d, images, labels)
        loss = self.r1_gamma / 2 * penalty
        (self.r1_gamma / 2 * self.r1_interval * surrogate).backward()
        bad = self._update(self.opt_d, self.d_params)
        return {"r1": penalty, "loss/r1": loss, "nonfinite/d": bad}

    def due_r1(self, iteration: int) -> bool:
        """Every `r1_interval`-th iteration; not the first."""
        return bool(self.r1_gamma) and iteration % self.r1_interval == 0 and iteration > 0


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in logits]).mean()
