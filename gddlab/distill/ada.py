"""The controller of adaptive discriminator augmentation (Karras et al. 2020, "Training generative adversarial networks with limited data")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError

__all__ = ["AdaController"]


class AdaController(nn.Module):
    """Holds the augmentation probability `p` at which the discriminator overfits to a set degree (section 3.2).

    Overfitting is measured by r_t = E[sign(D(real))], between 0 (none) and 1. Every `interval` iterations p takes a step up where the mean of r_t is above the
    target, down where it is below. Steps are such that p could go from 0 to 1 in `speed_kimg` thousand images; it stays within [0, 1].

    All its state is three buffers of fixed form on the device (`p`, `sum`, `count`: 0-d, float64), changed in place; the host reads none of them. Where r_t is
    not a number, p stands.

    Args:
        target: r_t to hold, in (-1, 1).
        interval: Iterations between two steps of p.
        speed_kimg: Thousands of images that p takes from 0 to 1 at the fastest.
        mean: Mean of a tensor over processes (`World.mean`), for signs that are those of one process; None where they are of all.

    Raises:
        GddlabError: A value out of range.
    """

    p: Tensor
    """Augmentation probability now."""
    sum: Tensor
    count: Tensor

    def __init__(
        self,
        target: float = 0.6,
        *,
        interval: int = 4,
        speed_kimg: float = 500.0,
        mean: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        if not -1 < target < 1:
            raise GddlabError(f"target={target}: ADA's target is a mean of signs, in (-1, 1); the paper's is 0.6")
        if interval < 1:
            raise GddlabError(f"interval={interval}: give the iterations between two steps of p, 1 or more")
        if not speed_kimg > 0:
            raise GddlabError(f"speed_kimg={speed_kimg}: give thousands of images, more than 0; the paper's is 500")
        self.target, self.interval, self.speed_kimg, self.mean = target, interval, speed_kimg, mean
        for name in ("p", "sum", "count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, signs_mean: Tensor) -> None:
        """Takes the mean sign of the discriminator's logits on this iteration's real images, 0-d, in [-1, 1]."""
        self.sum += signs_mean if self.mean is None else self.mean(signs_mean)
        self.count += 1

    @torch.no_grad()
    def update(self, batch: int) -> None:
        """Steps p where `interval` iterations were observed since its last step; call it after each one.

        Args:
            batch: Images an iteration, over all processes.
        """
        due = self.count >= self.interval
        step = torch.sign(self.sum / self.count - self.target) * self.count * (batch / (self.speed_kimg * 1000))
        self.p.copy_(torch.where(due, (self.p + step).clamp(0, 1), self.p))
        self.sum.masked_fill_(due, 0)
        self.count.masked_fill_(due, 0)
