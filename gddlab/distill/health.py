"""Alarms of a training run: not finite, saturated discriminator, collapse, jump of a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gddlab.errors import GddlabError

SIDE = 16
"""Images are averaged down to this side before they are compared: noise in pixels would make copies look different."""


def _distances(images: Tensor) -> Tensor:
    """Root mean square differences of pixels between all pairs, float64.  (N, C, H, W) -> (N, N)"""
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

    Args:
        images: [-1, 1], (N, C, H, W), N at least 2.

    Raises:
        GddlabError: Fewer than two images.
    """
    d = _distances(images)
    return d.fill_diagonal_(math.inf).min(1).values.mean().item()


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

    Raises:
        GddlabError: Fewer than two images.
    """
    d = _distances(images)
    return len(d) ** 2 / torch.exp(-((d / scale) ** 2)).sum().item()


KINDS = ("nan", "saturated", "collapse", "jump")
RISING = ("precision", "recall")
"""Metrics, by the start of their names, of which more is better."""


@dataclass(frozen=True)
class Thresholds:
    """When to alarm. Healthy runs below are 36 digits runs that ship with gddlab, 1,692 ticks.

    Raises:
        GddlabError: A threshold that can never, or must always, be passed.
    """

    nonfinite: float = 0.01
    """Share of iterations whose gradients may be sanitised; a rare overflow does no harm. Healthy runs had none."""
    signs: float = 0.99
    """Mean sign of real logits from which D is sure of every real image. Healthy runs stay below 0.65; ADA's target is
    0.6."""
    loss_d: float = 0.1
    """Loss of D below which it has nothing left to learn; guessing costs 1.39 (ns) or 2 (hinge). Healthy runs stay
    above 0.93; with G held constant and no R1, D falls below within 40 iterations."""
    logits_fake: float = -10.0
    """Mean fake logit below which D rejects everything, even if a few patches keep its loss up. Healthy runs stay above
    -0.8."""
    patience: int = 5
    """Ticks in a row with a saturated D: D tells the first students, one grey image, from real ones at once, and they
    recover."""
    collapse: float = 0.25
    """Distinct images in a grid, relative to as many real ones. Healthy runs end at 0.9 to 1.05; four modes of 64
    images have 0.07, or 0.13 with noise."""
    diverse: float = 0.5
    """Share from which a grid counts as diverse, so that it can collapse, and from which a collapse is over."""
    grace_kimg: float = 200.0
    """Thousands of images after which a grid that never was diverse has collapsed; students begin with 0.06, and GDD
    works by 200 kimg."""
    jump: float = 1.5
    """Factor of the best value so far beyond which a metric has jumped; neighbouring snapshots differ by less."""

    def __post_init__(self) -> None:
        limits = {
            "nonfinite": (0, 1),
            "signs": (0, 1),
            "loss_d": (0, math.inf),
            "logits_fake": (-math.inf, 0),
            "patience": (1, math.inf),
            "collapse": (0, 1),
            "diverse": (self.collapse, 1),
            "grace_kimg": (0, math.inf),
            "jump": (1, math.inf),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise GddlabError(f"threshold {name}={getattr(self, name)!r}: give a number from {low} to {high}")


@dataclass(frozen=True)
class Alarm:
    """Something is wrong with a run.

    Attributes:
        kind: One of `KINDS`.
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


class Health:
    """Watches a run and says what is wrong with it.

    Each `observe_*` returns its new alarms. An alarm is repeated only after its cause went away. Nothing is read or
    written; `state_dict` continues it exactly.

    Args:
        real: Real images to compare grids with, [-1, 1], (N, C, H, W): at most as many as a grid has, drawn at random
            (the first of a sorted dataset are all of one class). None: grids are only checked for finite values.
        thresholds: When to alarm.

    Raises:
        GddlabError: Real images that are all alike or not finite, or fewer than two.
    """

    def __init__(self, real: Tensor | None, thresholds: Thresholds | None = None):
        self.thresholds = thresholds or Thresholds()
        self.n, self.scale, self.reference = 0, 1.0, 1.0
        self._raised: set[str] = set()
        self._saturated_ticks = 0
        self._diverse = False
        self._widest: tuple[float, float] | None = None
        self._best: dict[str, tuple[float, float]] = {}
        if real is None:
            return
        self.n = len(real)
        self.scale = neighbor_distance(real) / 2
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise GddlabError(f"the {self.n} real images are all alike or not finite: give images that differ")
        self.reference = distinct_images(real, self.scale)

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
        message = f"{what} at {kimg:g} kimg: lower lr_g and lr_d in a new run; {self._return()}"
        wrong = bool(bad) or share > 0
        found = Alarm("nan", kimg, message, next(iter(bad.values()), share), 0.0)
        out = self._switch("nan/loss", found, on=wrong, off=not wrong)
        for net in ("g", "d"):
            share = line.get(f"sanitised/{net}", min(1.0, line.get(f"nonfinite/{net}", 0.0)))
            message = (
                f"gradients of {net.upper()} were not finite, and set to finite ones, in up to {_percent(share)} of "
                f"the iterations at {kimg:g} kimg: lower lr_{net}, or use precision='float32'; {self._return()}"
            )
            wrong = not share <= t.nonfinite
            found = Alarm("nan", kimg, message, share, t.nonfinite)
            out += self._switch(f"nan/{net}", found, on=wrong, off=not wrong)
        if {"signs/real", "logits/fake", "loss/d"} <= line.keys():
            out += self._saturation(kimg, line["signs/real"], line["logits/fake"], line["loss/d"])
        return out

    def _saturation(self, kimg: float, signs: float, fake: float, loss: float) -> list[Alarm]:
        t = self.thresholds
        now = signs >= t.signs and (loss <= t.loss_d or fake <= t.logits_fake)
        self._saturated_ticks = self._saturated_ticks + 1 if now else 0
        message = (
            f"D is saturated, {self._saturated_ticks} ticks in a row at {kimg:g} kimg (signs of real logits "
            f"{signs:.3f}, loss D {loss:.2g}, fake logits {fake:.1f}): lower lr_d, raise r1_gamma or augment; "
            f"{self._return()}"
        )
        found = Alarm("saturated", kimg, message, signs, t.signs)
        return self._switch("saturated", found, on=self._saturated_ticks >= t.patience, off=not now)

    def observe_images(self, images: Tensor, kimg: float) -> list[Alarm]:
        """A grid of the averaged student from noise that never changes.

        Collapse is judged once a grid was diverse, or after `grace_kimg`: a student starts from one grey image.

        Args:
            images: [-1, 1], (M, C, H, W), at least as many as the real ones.
            kimg: Thousands of images seen.
        """
        t = self.thresholds
        lost = 1 - images.isfinite().flatten(1).all(1).double().mean().item()
        message = (
            f"{_percent(lost)} of the images are not finite at {kimg:g} kimg: lower lr_g in a new run; {self._return()}"
        )
        out = self._switch("nan/images", Alarm("nan", kimg, message, lost, 0.0), on=lost > 0, off=lost == 0)
        if lost or not self.n:
            return out
        share = self.diversity(images)
        message = (
            f"collapse at {kimg:g} kimg, the grid has {share * self.reference:.1f} distinct images, as many real ones "
            f"{self.reference:.1f}: lower lr_g or raise r1_gamma; {self._return()}"
        )
        self._diverse = self._diverse or share >= t.diverse
        if self._widest is None or share > self._widest[0]:
            self._widest = (share, kimg)
        on = share < t.collapse and (self._diverse or kimg >= t.grace_kimg)
        found = Alarm("collapse", kimg, message, share, t.collapse)
        return out + self._switch("collapse", found, on=on, off=share >= t.diverse)

    def observe_metric(self, name: str, value: float, kimg: float, *, std: float | None = None) -> list[Alarm]:
        """A score of the averaged student; less is better, but for precision and recall.

        Args:
            name: Name of the metric, such as "fd-lite2@1797".
            value: The score.
            kimg: Thousands of images seen.
            std: Its spread, if known: a rise by less than three of them is no jump. A kernel distance of 0 or less,
                where a factor means nothing, is judged by its spread only.
        """
        t, key = self.thresholds, f"jump/{name}"
        if not math.isfinite(value):
            message = f"{name} is {value} at {kimg:g} kimg: look at the images, lower lr_g; {self._return()}"
            return self._switch(key, Alarm("jump", kimg, message, value, math.inf), on=True, off=False)
        rising = name.startswith(RISING)
        sign = -1 if rising else 1
        if name not in self._best or sign * value < sign * self._best[name][0]:
            self._best[name] = (value, kimg)
        best = self._best[name][0]
        margin = max(best * (1 - 1 / t.jump if rising else t.jump - 1), 3 * (std or 0.0))
        rise, limit = sign * (value - best), best + sign * margin
        where = f"{name} jumped to {value:.4g} at {kimg:g} kimg, beyond {limit:.4g}"
        message = f"{where}: lower lr_g or raise r1_gamma; {self._return()}"
        found = Alarm("jump", kimg, message, value, limit)
        return self._switch(key, found, on=margin > 0 and rise > margin, off=rise <= max(0.0, margin / 2))

    def _return(self) -> str:
        """Where to return to: the best snapshot by the first metric, else the most diverse one."""
        for name, (value, kimg) in self._best.items():
            return f"the best snapshot is that of {kimg:g} kimg ({name} {value:.4g})"
        if self._diverse and self._widest is not None:
            return f"the most diverse snapshot is that of {self._widest[1]:g} kimg"
        return "the last checkpoint stands"

    def _switch(self, key: str, found: Alarm, *, on: bool, off: bool) -> list[Alarm]:
        """Raises an alarm that is not raised yet; between `on` and `off` nothing changes."""
        if off:
            self._raised.discard(key)
        if not on or key in self._raised:
            return []
        self._raised.add(key)
        return [found]

    def state_dict(self) -> dict[str, Any]:
        """All that later alarms depend on, as JSON."""
        return {
            "raised": sorted(self._raised),
            "saturated_ticks": self._saturated_ticks,
            "diverse": self._diverse,
            "widest": self._widest and list(self._widest),
            "best": {name: list(b) for name, b in self._best.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict` of a Health with the same real images and thresholds."""
        self._raised = set(state["raised"])
        self._saturated_ticks = state["saturated_ticks"]
        self._diverse = state["diverse"]
        self._widest = (state["widest"][0], state["widest"][1]) if state["widest"] else None
        self._best = {name: (b[0], b[1]) for name, b in state["best"].items()}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
