"""Which layers are frozen: what is measured of a teacher, the masks chosen from it, and an experiment for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gddlab.distill import presets
from gddlab.distill.augment import Augment
from gddlab.distill.config import TrainConfig
from gddlab.distill.instance import Consistency, FromNoise, InstancePart, Progressive, Trajectory
from gddlab.experiments.experiment import Experiment, Measured, feeds_of
from gddlab.freezing import FreezeMask, controls, select_freeze
from gddlab.freezing.select import Score
from gddlab.nets import Precond
from gddlab.probing import DEFAULT, ProbeResult, ablate, probe
from gddlab.runtime import chosen_device
from gddlab.teachers import load_precond

MAIN = ("gdd-i", "gdd")
CHOOSING, ABLATION = "02_choosing_a_mask", "17_freezing"
SCORES = {
    "rel_update": "what a block adds to its skip path at sigma 80",
    "ablation": "how much the output at sigma 80 changes when a layer's output is replaced by its channel means",
    "sigma_specific": "1 - mean cosine between a layer's output at sigma 80 and at the other noise levels",
}
"""Measured scores by the name that experiments carry."""

Chooser = Callable[[Measured, int], FreezeMask | None]


def measure(teacher: str, data: str) -> Measured:
    """Probes and ablates a teacher: 64 and 16 images at 18 noise levels, seed 0."""
    net = load_precond(teacher).to(chosen_device())
    probed = probe(net, 18, data=data, stats=(*DEFAULT, "cosine"), n=64, seed=0)  # the cosine is a score of masks
    return Measured(probed.join(ablate(net, 18, data=data, n=16, seed=0)), rule(net))


def rule(source: Precond | ProbeResult) -> FreezeMask:
    return select_freeze(source, strategy="gdd-i")


def sigma_specific(result: ProbeResult) -> dict[str, float]:
    """1 - mean cosine between a layer's output at sigma 80 and at the other noise levels."""
    cosines = result.pivot("cosine")
    others = cosines.drop(columns=result.nearest(80.0, "cosine")).mean(axis=1)
    return {str(k): 1.0 - float(v) for k, v in others.items()}


SCORE_OF: Mapping[str, Score] = {
    "rel_update": "rel_update",
    "ablation": "ablation_output_mean",
    "sigma_specific": sigma_specific,
}


def measured_mask(measured: Measured, name: str, *, inverse: bool = False, share: float = 1.0) -> FreezeMask:
    """Freezes the layers with the lowest score, up to the rule's budget times `share`; or the inverse of that mask."""
    budget = share * measured.rule.fraction
    mask = select_freeze(measured.result, strategy="budget", score=SCORE_OF[name], budget=budget)
    return controls(mask, seeds=())["inverse"] if inverse else mask


def ruled(measured: Measured, seed: int) -> FreezeMask | None:
    return measured.rule


def free(measured: Measured, seed: int) -> FreezeMask | None:
    return None


def by_rule(strategy: str) -> Chooser:
    """A rule that needs names alone."""
    return lambda measured, seed: select_freeze(measured.result, strategy=strategy)


def chosen_by(name: str, *, inverse: bool, share: float = 1.0) -> Chooser:
    return lambda measured, seed: measured_mask(measured, name, inverse=inverse, share=share)


def at_random(share: float = 1.0) -> Chooser:
    """Another random mask for each training seed."""
    return lambda m, seed: select_freeze(m.result, strategy="random", budget=share * m.rule.fraction, seed=seed)


class Rows:
    """Makes the experiments of a list: those that all lists have, and others one by one.

    Args:
        preset: What they have in common.
        seconds: One run, roughly; None if unknown.
        snapshots: How often a student is scored during its training, unless a row has its own `snapshot_kimg`.
        first_seed: Seed s trains with `first_seed` + s.
    """

    def __init__(self, preset: str, seconds: float | None, *, snapshots: int, first_seed: int = 0):
        self.preset, self.seconds, self.snapshots, self.first_seed = preset, seconds, snapshots, first_seed
        self.base = presets.preset(preset, run_dir="runs")

    def __call__(
        self,
        name: str,
        what: str,
        *,
        mask: Chooser = ruled,
        feeds: tuple[str, ...] = (),
        seconds: float | None = None,
        **fields: Any,
    ) -> Experiment:
        """An experiment whose configurations differ from the preset in `fields`."""
        snapshot_kimg = fields.get("total_kimg", self.base.total_kimg) / self.snapshots
        given: dict[str, Any] = {"snapshot_kimg": snapshot_kimg} | fields

        def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
            return presets.preset(self.preset, run_dir=run_dir, seed=self.first_seed + seed, mask=mask, **given)

        return Experiment(name, what, feeds + feeds_of(name), mask, configure, seconds or self.seconds)

    def masks(self, *, seconds: float | None = None, **others: Any) -> tuple[Experiment, ...]:
        """GDD-I, GDD, the rule's other options, norms alone, measured masks with their inverses, random ones.

        `others` are fields of all but GDD-I and GDD.
        """

        def row(name: str, what: str, mask: Chooser, feeds: tuple[str, ...] = (CHOOSING, ABLATION)) -> Experiment:
            fields = {} if name in MAIN else others
            return self(name, what, mask=mask, feeds=feeds, seconds=seconds, **fields)

        rows = [
            row("gdd-i", "GDD-I: the authors' rule on names", ruled),
            row("gdd", "GDD: everything is trained", free),
            row("random", "random masks of the rule's share, another one for each seed", at_random()),
        ]
        for name, what in SCORES.items():
            for inverse, word in ((False, "low"), (True, "high")):
                chosen = chosen_by(name, inverse=inverse)
                rows.append(row(f"{name}-{word}", f"freezes {word} values of: {what}", chosen))
        rows.append(row("half-random", "random masks of half the rule's share", at_random(0.5)))
        for inverse, word in ((False, "low"), (True, "high")):
            what = f"as ablation-{word}, at half the share, where the two freeze different layers"
            rows.append(row(f"half-ablation-{word}", what, chosen_by("ablation", inverse=inverse, share=0.5)))
        for name, what, strategy in (
            ("option-2", "the authors' option 2: attention's qkv is frozen too", "gdd-i-2"),
            ("option-3", "the authors' option 3: skip convolutions too", "gdd-i-3"),
            ("norms-only", "norms alone are trained", "norms-only"),
        ):
            rows.append(row(name, what, by_rule(strategy), (ABLATION,)))
        return tuple(rows)

    def controls(self) -> tuple[Experiment, ...]:
        """Without the teacher's weights, without R1, with a second step."""
        return (
            self("scratch", "GDD from random weights in place of the teacher's", mask=free, student="scratch"),
            self("no-r1", "GDD-I without R1", r1_gamma=0),
            self("two-step", "GDD-I with a second step at sigma 0.8", mid_sigmas=(0.8,)),
        )

    def augmented(self, *, ada_kimg: float, **fields: Any) -> tuple[Experiment, ...]:
        """With augmentation, fixed and adaptive; ADA's probability can go from 0 to 1 in `ada_kimg` thousand images."""
        fixed, adaptive = Augment(ops=("color", "translation", "cutout")), Augment(ada_target=0.6, ada_kimg=ada_kimg)
        what = f"GDD-I with ADA, target 0.6, at most from 0 to 1 in {ada_kimg:g} kimg"
        return (
            self("augment", "GDD-I with differentiable colour, translation, cutout", augment=fixed, **fields),
            self("ada", what, augment=adaptive, **fields),
        )

    def baselines(
        self,
        *,
        distance: Literal["lpips", "l2", "lite0"],
        steps: int,
        seconds: Mapping[str, float] | None = None,
        **alone: Any,
    ) -> tuple[Experiment, ...]:
        """The instance-based losses alone, with the fields `alone`, and consistency distillation with the GAN loss."""

        def row(name: str, what: str, part: Callable[..., InstancePart], **fields: Any) -> Experiment:
            instance, longer = part(steps=steps, distance=distance), (seconds or {}).get(name)
            return self(name, what, mask=free, seconds=longer, instance=instance, **fields)

        rows = [
            row(name, f"{what} alone, by the {distance} distance", part, discriminator=None, **alone)
            for name, what, part in (
                ("pd", "progressive distillation", Progressive),
                ("cd", "consistency distillation", Consistency),
                ("ctm", "consistency trajectory distillation", Trajectory),
                ("rcd", "distillation from pure noise to a random level", FromNoise),
            )
        ]
        return (*rows, row("gdd-cd", "GDD with consistency distillation added", Consistency))

    def few_images(self, counts: Iterable[int], **fields: Any) -> tuple[Experiment, ...]:
        """Trained on some of the images."""
        return tuple(self(f"images-{n}", f"GDD-I with {n} distinct images", max_images=n, **fields) for n in counts)
