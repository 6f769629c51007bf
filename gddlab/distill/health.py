"""Alarms of a training run: not finite, saturated discriminator, collapse, too much fine detail, jump of a metric."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gddlab.distill.parts import Settings
from gddlab.errors import GddlabError

SIDE = 16
"""Images are averaged down to this side before they are compared: noise in pixels would make copies look different."""


def _distances(images: Tensor) -> Tensor:
    """Root mean square differences of pixels between all pairs, float64.  (N, C, H, W) -> (N, N)

    Raises:
        GddlabError: Fewer than two images.
    """
    if images.ndim != 4 or len(images) < 2:
        raise GddlabError(f"images are {tuple(images.shape)}: give at least 2, (N, C, H, W)")
    x = images.detach().double().cpu()
    if max(x.shape[2:]) > SIDE:
        x = torch.nn.functional.adaptive_avg_pool2d(x, SIDE)
    x = x.flatten(1)
    # By a matrix product, distances of near copies would be lost in rounding.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])


def neighbor_distance(images: Tensor) -> float:
    """Mean distance of an image to the nearest other one: root mean square of pixels, at a side of 16 at most.

    Images are in [-1, 1], (N, C, H, W), N at least 2.
    """
    return _distances(images).fill_diagonal_(math.inf).min(1).values.mean().item()


def distinct_images(images: Tensor, scale: float) -> float:
    """Effective number of distinct images: diversity of order 2 with similarity exp(-(d / scale)^2).

    Equally many copies of m images count as m, however far the m are apart; the mean distance between images, 30 %
    lower for four digits than for 64, would hardly show it. Images closer than about `scale` count as one, so that
    noise does not hide copies.
    Leinster & Cobbold 2012 ("Measuring diversity: the importance of species similarity"), q = 2.

    Args:
        images: [-1, 1], (N, C, H, W), N at least 2.
        scale: Distance at which images begin to differ, such as half the `neighbor_distance` of real ones.

    Returns:
        From 1, all alike, to N.
    """
    d = _distances(images)
    return len(d) ** 2 / torch.exp(-((d / scale) ** 2)).sum().item()


def fine_share(images: Tensor) -> float:
    """Share of the power, without the means, above 3/8 of a cycle per pixel in either direction: from 0 to 1.

    Checkerboards and stripes of one pixel have it there; real images have little. Images are (N, C, H, W).
    """
    x = images.detach().float().cpu()
    x = x - x.mean((2, 3), keepdim=True)
    power = torch.stack([torch.fft.fft2(image).abs().square().sum(0) for image in x]).double().sum(0)
    down, across = (torch.fft.fftfreq(side).abs() > 3 / 8 for side in power.shape)
    return (power[down[:, None] | across].sum() / power.sum().clamp_min(1e-12)).item()


FEW = 200
"""Training images; with fewer, students of the digits were twice as far from the data, and no alarm says why."""
PLAIN = 0.002
"""The least `fine_share` of real images: of enlarged ones, which have none, no multiple means anything."""
RISING = ("precision", "recall")
"""Metrics, by the start of their names, of which more is better."""


class Thresholds(Settings):
    """When to alarm. Healthy runs below are 36 digits runs that ship with gddlab, 1,692 ticks.

    Raises:
        GddlabError: A threshold that can never, or must always, be passed.
    """

    nonfinite: float = Field(default=0.01, ge=0, le=1)
    """Share of iterations whose gradients may be sanitised; a rare overflow does no harm. Healthy runs had none."""
    signs: float = Field(default=0.99, ge=0, le=1)
    """Mean sign of real logits from which D is sure of every real image. Healthy runs stay below 0.65; ADA's target is
    0.6."""
    loss_d: float = Field(default=0.1, ge=0)
    """Loss of D below which it has nothing left to learn; guessing costs 1.39 (ns) or 2 (hinge). Healthy runs stay
    above 0.93; with G held constant and no R1, D falls below within 40 iterations."""
    logits_fake: float = Field(default=-10.0, le=0)
    """Mean fake logit below which D rejects everything, even if a few patches keep its loss up. Healthy runs stay above
    -0.8."""
    patience: int = Field(default=5, ge=1)
    """Ticks in a row with a saturated D: D tells the first students, one grey image, from real ones at once, and they
    recover."""
    collapse: float = Field(default=0.25, ge=0, le=0.5)
    """Distinct images in a grid, relative to as many real ones. Healthy runs end at 0.9 to 1.05; four modes of 64
    images have 0.07, or 0.13 with noise."""
    diverse: float = Field(default=0.5, ge=0.5, le=1)
    """Share from which a grid counts as diverse, so that it can collapse, and from which a collapse is over."""
    grace_kimg: float = Field(default=200.0, ge=0)
    """Thousands of images after which a grid that never was diverse has collapsed; students begin with 0.06, and GDD
    works by 200 kimg."""
    fine: float = Field(default=4.0, ge=1)
    """Factor between the fine shares of grid and real images. Healthy runs end at 0.9 to 1.4, the worst that ships at
    3.4; twenty times the learning rates give 3 to 25."""
    settled_kimg: float = Field(default=1.0, ge=0)
    """Thousands of images before which fine detail is not judged: where a grey student becomes diverse, within some ten
    iterations, healthy ones reach 7."""
    jump: float = Field(default=1.5, ge=1)
    """Factor of the best value so far beyond which a metric has jumped; neighbouring snapshots differ by less."""


@dataclass(frozen=True)
class Alarm:
    """Something is wrong with a run.

    Attributes:
        kind: nan, saturated, collapse, detail or jump.
        kimg: Thousands of images seen.
        message: One line: what, how much, what to do.
        value: What was measured; not finite where that is the alarm.
        threshold: What it passed.
    """

    kind: str
    kimg: float
    message: str
    value: float
    threshold: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON: numbers that are not finite are None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass
class Past:
    """What later alarms depend on, beside the real images and thresholds.

    Attributes:
        raised: Causes that were told and have not gone away.
        saturated_ticks: Ticks in a row with a saturated D.
        diverse: Whether a grid was diverse.
        widest: The greatest diversity, and its kimg.
        best: By metric, the best value and its kimg.
    """

    raised: list[str] = field(default_factory=list)
    saturated_ticks: int = 0
    diverse: bool = False
    widest: list[float] | None = None
    best: dict[str, list[float]] = field(default_factory=dict)


class Health:
    """Watches a run and says what is wrong with it.

    Each `observe_*` returns its new alarms. An alarm is repeated only after its cause went away. Nothing is read or
    written; `state_dict` continues it exactly.

    Args:
        real: Real images to compare grids with, [-1, 1], (N, C, H, W): at most as many as a grid has, drawn at random
            (the first of a sorted dataset are all of one class). If they are all alike, or a single one, that is an
            alarm, and grids are only checked for finite values.
        thresholds: When to alarm.
        images: How many images the run trains on, for the advice; by default those of `real`.
    """

    def __init__(self, real: Tensor, thresholds: Thresholds | None = None, *, images: int | None = None):
        self.thresholds, self.past = thresholds or Thresholds(), Past()
        self.images = len(real) if images is None else images
        self.n, self.scale, self.reference = 0, 1.0, 1.0
        scale = neighbor_distance(real) / 2 if len(real) > 1 else 0.0
        if scale > 0:
            self.n, self.scale, self.reference = len(real), scale, distinct_images(real, scale)
        self.fine = max(PLAIN, fine_share(real))

    def diversity(self, images: Tensor) -> float:
        """Distinct images among the first N of a grid, relative to the N real ones: 1 is as diverse as real."""
        if len(images) < self.n:
            raise GddlabError(f"{len(images)} images to compare with {self.n} real ones: give at least as many")
        return distinct_images(images[: self.n], self.scale) / self.reference

    def observe_tick(self, line: Mapping[str, float]) -> list[Alarm]:
        """Judges a line of metrics.jsonl: means over the iterations of a tick.

        It reads `loss/...`; `nonfinite/loss`, the share of iterations whose loss is not finite; `sanitised/g` and
        `sanitised/d`, the share with gradients that are not finite, or in their place `nonfinite/g` and `nonfinite/d`,
        such gradient tensors per iteration; `signs/real`, `logits/fake` and `loss/d`. Each may be missing.
        """
        t, kimg = self.thresholds, line["kimg"]
        bad = {k: v for k, v in line.items() if k.startswith("loss/") and not math.isfinite(v)}
        share = line.get("nonfinite/loss", 0.0)
        what = ", ".join(f"{k} is {v}" for k, v in bad.items()) or f"{_percent(share)} of the losses are not finite"
        why = f"{what} at {kimg:g} kimg: lower lr_g and lr_d in a new run"
        out = self._judge("nan/loss", kimg, next(iter(bad.values()), share), 0.0, why, on=bool(bad) or share > 0)
        for net in ("g", "d"):
            share = line.get(f"sanitised/{net}", min(1.0, line.get(f"nonfinite/{net}", 0.0)))
            why = (
                f"gradients of {net.upper()} were not finite, and set to finite ones, in up to {_percent(share)} of "
                f"the iterations at {kimg:g} kimg: lower lr_{net}, or use precision='float32'"
            )
            out += self._judge(f"nan/{net}", kimg, share, t.nonfinite, why, on=not share <= t.nonfinite)
        if {"signs/real", "logits/fake", "loss/d"} <= line.keys():
            signs, fake, loss = line["signs/real"], line["logits/fake"], line["loss/d"]
            now = signs >= t.signs and (loss <= t.loss_d or fake <= t.logits_fake)
            ticks = self.past.saturated_ticks = self.past.saturated_ticks + 1 if now else 0
            why = (
                f"D is saturated, {ticks} ticks in a row at {kimg:g} kimg (signs of real logits {signs:.3f}, loss D "
                f"{loss:.2g}, fake logits {fake:.1f}): lower lr_d, raise r1_gamma or augment"
            )
            out += self._judge("saturated", kimg, signs, t.signs, why, on=ticks >= t.patience, off=not now)
        return out

    def observe_images(self, images: Tensor, kimg: float) -> list[Alarm]:
        """Judges a grid of the averaged student from noise that never changes, [-1, 1], (N or more, C, H, W).

        Collapse is judged once a grid was diverse, or after `grace_kimg`: a student starts from one grey image.
        """
        t, past = self.thresholds, self.past
        lost = 1 - images.isfinite().flatten(1).all(1).double().mean().item()
        why = f"{_percent(lost)} of the images are not finite at {kimg:g} kimg: lower lr_g in a new run"
        out = self._judge("nan/images", kimg, lost, 0.0, why, on=lost > 0)
        if lost:
            return out
        if not self.n:
            why = f"the training images are all alike, {self.images} in all: give others, no student can vary more"
            return out + self._judge("collapse/data", kimg, 1.0, 1.0, why, on=True)
        rough = fine_share(images[: self.n]) / self.fine
        why = (
            f"checkerboard, stripes or noise at {kimg:g} kimg, the grid has {rough:.1f} times the power of real images "
            "in its finest detail: lower lr_g and lr_d"
        )
        on = rough > t.fine and kimg >= t.settled_kimg
        out += self._judge("detail", kimg, rough, t.fine, why, on=on, off=rough < t.fine / 2)
        share = self.diversity(images)
        past.diverse = past.diverse or share >= t.diverse
        if past.widest is None or share > past.widest[0]:
            past.widest = [share, kimg]
        why = (
            f"collapse at {kimg:g} kimg, the grid has {share * self.reference:.1f} distinct images, as many real ones "
            f"{self.reference:.1f}: "
        )
        if self.images < FEW:
            why += f"{self.images} training images are few, give more or augment; else "
        why += "lower lr_g or raise r1_gamma"
        on = share < t.collapse and (past.diverse or kimg >= t.grace_kimg)
        return out + self._judge("collapse", kimg, share, t.collapse, why, on=on, off=share >= t.diverse)

    def observe_metric(self, name: str, value: float, kimg: float, *, std: float | None = None) -> list[Alarm]:
        """Judges a score of the averaged student; less is better, but for precision and recall.

        A rise by less than three times `std`, the spread, is no jump. A kernel distance of 0 or less, where a factor
        means nothing, is judged by its spread only.
        """
        key, known = f"jump/{name}", self.past.best
        if not math.isfinite(value):
            why = f"{name} is {value} at {kimg:g} kimg: look at the images, lower lr_g"
            return self._judge(key, kimg, value, math.inf, why, on=True)
        rising = name.startswith(RISING)
        sign = -1 if rising else 1
        if name not in known or sign * value < sign * known[name][0]:
            known[name] = [value, kimg]
        best, factor = known[name][0], self.thresholds.jump
        margin = max(best * (1 - 1 / factor if rising else factor - 1), 3 * (std or 0.0))
        rise, limit = sign * (value - best), best + sign * margin
        why = f"{name} jumped to {value:.4g} at {kimg:g} kimg, beyond {limit:.4g}: lower lr_g or raise r1_gamma"
        on = margin > 0 and rise > margin
        return self._judge(key, kimg, value, limit, why, on=on, off=rise <= max(0.0, margin / 2))

    def _judge(
        self, key: str, kimg: float, value: float, threshold: float, why: str, *, on: bool, off: bool | None = None
    ) -> list[Alarm]:
        """Raises an alarm that is not raised yet; between `on` and `off` (not `on` by default) nothing changes."""
        raised = self.past.raised
        if (not on if off is None else off) and key in raised:
            raised.remove(key)
        if not on or key in raised:
            return []
        raised.append(key)
        return [Alarm(key.partition("/")[0], kimg, f"{why}{self._return()}", value, threshold)]

    def _return(self) -> str:
        """Where to return to, if anywhere: the best student by the first metric, else the most diverse snapshot."""
        for name, (value, kimg) in self.past.best.items():
            return f"; the best student is best.safetensors, of {kimg:g} kimg ({name} {value:.4g})"
        if self.past.diverse and self.past.widest is not None:
            return f"; the most diverse snapshot is that of {self.past.widest[1]:g} kimg"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """All that later alarms depend on, as JSON."""
        return asdict(self.past)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of a Health with the same real images and thresholds."""
        self.past = Past(**copy.deepcopy(dict(state)))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
