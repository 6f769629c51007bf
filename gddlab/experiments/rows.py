"""Experiments that several lists share, in groups: what is frozen, where the student begins, baselines, few images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gddlab.distill import presets
from gddlab.distill.augment import Augment
from gddlab.distill.config import TrainConfig
from gddlab.distill.instance import Consistency, FromNoise, InstancePart, Progressive, Trajectory
from gddlab.experiments.experiment import Experiment
from gddlab.experiments.masks import Chooser, at_share, by_rule, free, ruled
from gddlab.freezing import FreezeMask

INSTANCE: Mapping[str, tuple[str, Callable[..., InstancePart]]] = {
    "pd": ("progressive distillation", Progressive),
    "cd": ("consistency distillation", Consistency),
    "ctm": ("consistency trajectory distillation", Trajectory),
    "rcd": ("distillation from pure noise to a random level", FromNoise),
}
"""Instance-based losses by the name that experiments carry."""
ALL_TRAINED: Mapping[str, tuple[str, Chooser]] = {
    "gdd": ("GDD: everything is trained", free),
    "gdd-i": ("GDD-I: the authors' rule, which freezes four fifths", ruled),
    "random-50": ("half of the parameters frozen, at random", at_share(0.5)),
}
"""The three masks that are followed through other settings."""


class Rows:
    """Makes the experiments of a list.

    Args:
        preset: What they have in common.
        at: Thousands of images after which students are scored.
        long: The same of the first seeds of an experiment with `longer`.
        seeds: Training seeds of an experiment that does not say.
        counted: `seeds` and `longer` of experiments by name, for those that do not say.
        snapshots: How often a student is kept during its training, unless `long` has more.
        first_seed: Seed s trains with `first_seed` + s.
        sec_per_kimg: Seconds per thousand images of one run; None if unknown.
        sec_scores: Seconds for all scores of a student.
    """

    def __init__(
        self,
        preset: str,
        *,
        at: tuple[float, ...] = (),
        long: tuple[float, ...] = (),
        seeds: int = 3,
        counted: Mapping[str, Mapping[str, int]] | None = None,
        snapshots: int = 4,
        first_seed: int = 0,
        sec_per_kimg: float | None = None,
        sec_scores: float = 0.0,
    ):
        self.preset, self.at, self.long, self.seeds, self.first_seed = preset, at, long, seeds, first_seed
        self.counted = counted or {}
        self.base = presets.preset(preset, run_dir="runs")
        self.snapshot_kimg = self.base.total_kimg / snapshots
        self.sec_per_kimg, self.sec_scores = sec_per_kimg, sec_scores

    def __call__(
        self,
        name: str,
        what: str,
        *,
        mask: Chooser = ruled,
        seeds: int | tuple[int, ...] | None = None,
        longer: int | None = None,
        teacher: str | None = None,
        start: tuple[str, float] | None = None,
        after: tuple[str, ...] = (),
        slower: float = 1.0,
        **fields: Any,
    ) -> Experiment:
        """An experiment whose configurations differ from the list's in `fields`.

        Args:
            name, what, mask, teacher, start, after: As in `Experiment`.
            seeds: Their number, or the seeds.
            longer: How many of the seeds, the first ones, train as long as the list's `long` says; none if not given.
            slower: Its time over that of an ordinary one.
            **fields: Of `TrainConfig`.
        """
        given: dict[str, Any] = {"snapshot_kimg": self.snapshot_kimg} | fields
        counted = self.counted.get(name, {})
        chosen = counted.get("seeds", self.seeds) if seeds is None else seeds
        longer = counted.get("longer", 0) if longer is None else longer
        chosen = tuple(range(chosen)) if isinstance(chosen, int) else chosen

        def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
            own: dict[str, Any] = {"seed": self.first_seed + seed, "subset_seed": seed}
            if seed in chosen[:longer]:
                own["total_kimg"] = max(self.long)
            return presets.preset(self.preset, run_dir=run_dir, mask=mask, **(given | own))

        seconds, at = None, tuple(sorted({*self.at, *(self.long if longer else ())}))
        if self.sec_per_kimg is not None:
            total = given.get("total_kimg", self.base.total_kimg)
            shares = [max(self.long) if seed in chosen[:longer] else total for seed in chosen]
            scored = sum(1 + sum(x < kimg for x in at) for kimg in shares)
            seconds = (slower * self.sec_per_kimg * sum(shares) + self.sec_scores * scored) / len(chosen)
        return Experiment(name, what, mask, configure, chosen, at, teacher, start, after, seconds)

    def central(self) -> tuple[Experiment, ...]:
        """GDD, GDD-I, half of the parameters and the rule's share frozen at random; from random weights."""
        return (
            *(self(name, what, mask=mask) for name, (what, mask) in ALL_TRAINED.items()),
            self("random-80", "four fifths of the parameters frozen, at random", mask=at_share(0.8)),
            self("scratch", "GDD from random weights in place of the teacher's", mask=free, student="scratch"),
        )

    def dose(self, random: Iterable[float], ordered: Iterable[float]) -> tuple[Experiment, ...]:
        """Shares of the parameters frozen, in per cent: at random, and in the rule's order."""
        return (
            *(
                self(f"random-{p:g}", f"{p:g} % of the parameters frozen, at random", mask=at_share(p / 100))
                for p in random
            ),
            *(
                self(
                    f"ordered-{p:g}",
                    f"{p:g} % frozen in the rule's order",
                    mask=at_share(p / 100, ordered=True),
                )
                for p in ordered
            ),
            self("option-2", "the authors' option 2: attention's qkv is frozen too", mask=by_rule("gdd-i-2")),
            self("option-3", "the authors' option 3: skip convolutions too", mask=by_rule("gdd-i-3")),
            self("norms-only", "norms alone are trained", mask=by_rule("norms-only")),
        )

    def step_sizes(self, factors: Iterable[float], names: Iterable[str] = ALL_TRAINED) -> tuple[Experiment, ...]:
        """Other learning rates of the student, as multiples of the preset's, with everything trained, half, a fifth."""
        lr = self.base.lr_g
        return tuple(
            self(f"{name}-lr-{lr * f:g}", f"{what}; learning rate {lr * f:g}", mask=mask, lr_g=lr * f)
            for f in factors
            for name, (what, mask) in ((name, ALL_TRAINED[name]) for name in names)
        )

    def controls(self, mids: Iterable[float] = (0.8,)) -> tuple[Experiment, ...]:
        """Without R1; with a second step at other noise levels."""
        return (
            self("no-r1", "GDD-I without R1", r1_gamma=0),
            *(
                self(f"second-step-{mid:g}", f"GDD-I with a second step at sigma {mid:g}", mid_sigmas=(mid,))
                for mid in mids
            ),
        )

    def augmented(self, *, ada_kimg: float, **fields: Any) -> tuple[Experiment, ...]:
        """With augmentation, fixed and adaptive; ADA's probability can go from 0 to 1 in `ada_kimg` thousand images."""
        fixed, adaptive = Augment(ops=("color", "translation", "cutout")), Augment(ada_target=0.6, ada_kimg=ada_kimg)
        what = f"GDD-I with ADA, target 0.6, at most from 0 to 1 in {ada_kimg:g} kimg"
        return (
            self("augment", "GDD-I with differentiable colour, translation, cutout", augment=fixed, **fields),
            self("ada", what, augment=adaptive, **fields),
        )

    def copying(
        self,
        name: str,
        *,
        distance: Literal["lpips", "l2", "lite0"],
        steps: int,
        called: str | None = None,
        what: str = "",
        **fields: Any,
    ) -> Experiment:
        """One of the instance-based losses alone."""
        title, part = INSTANCE[name]
        instance = part(steps=steps, distance=distance)
        told = f"{title} alone, by the {distance} distance{what}"
        return self(called or name, told, mask=free, instance=instance, discriminator=None, **fields)

    def baselines(
        self, *, distance: Literal["lpips", "l2", "lite0"], steps: int, slower: Mapping[str, float], **alone: Any
    ) -> tuple[Experiment, ...]:
        """The instance-based losses alone, with the fields `alone`, and consistency distillation with the GAN loss."""
        copying = (
            self.copying(name, distance=distance, steps=steps, slower=slower.get(name, 1.0), **alone)
            for name in INSTANCE
        )
        added: Callable[..., InstancePart] = Consistency
        what = "GDD with consistency distillation added"
        both: dict[str, Any] = {"instance": added(steps=steps, distance=distance), "slower": slower.get("gdd-cd", 1.0)}
        return (*copying, self("gdd-cd", what, mask=free, **both))

    def few_images(self, counts: Iterable[int], *, gdd: Mapping[str, Any] | None = None) -> tuple[Experiment, ...]:
        """GDD-I and GDD, with fields of its own, trained on some of the images, other ones for each training seed."""
        return tuple(
            self(
                f"{name}-images-{n}",
                f"{name.upper()} with {n:,} distinct images",
                max_images=n,
                **own,
            )
            for n in counts
            for name, own in (("gdd-i", {"mask": ruled}), ("gdd", {"mask": free, **(gdd or {})}))
        )
