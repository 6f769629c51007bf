"""Experiments on the embedded digits: which layers are frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.experiments.experiment import Experiment, Measured
from gddlab.freezing import FreezeMask, controls, select_freeze
from gddlab.freezing.scores import Score
from gddlab.nets import Precond
from gddlab.probing import ProbeResult, ablate, probe
from gddlab.teachers import load_teacher

__all__ = ["MASKS", "configure", "measure", "rule"]

FEEDS = ("02_choosing_a_mask",)
SCORES = {
    "rel_update": "what a block adds to its skip path at sigma 80",
    "ablation": "how much the output at sigma 80 changes when a layer's output is replaced by its channel means",
    "sigma_specific": "1 - mean cosine between a layer's output at sigma 80 and at the other noise levels",
}
"""Measured scores by the name that experiments carry."""


def measure() -> Measured:
    """Probes and ablates the digits teacher: 64 and 16 images at 18 noise levels, seed 0."""
    teacher = load_teacher("digits")
    result = probe(teacher, 18, n=64, seed=0).join(ablate(teacher, 18, n=16, seed=0))
    return Measured(result, rule(teacher))


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
    """The layers with the lowest score are frozen, up to the rule's budget times `share`; or the inverse of that, of equal budget."""
    budget = share * measured.rule.fraction
    mask = select_freeze(measured.result, strategy="budget", score=SCORE_OF[name], budget=budget)
    return controls(mask, seeds=())["inverse"] if inverse else mask


def chosen_by(name: str, *, inverse: bool, share: float = 1.0) -> Callable[[Measured, int], FreezeMask]:
    return lambda measured, seed: measured_mask(measured, name, inverse=inverse, share=share)


def at_random(share: float = 1.0) -> Callable[[Measured, int], FreezeMask]:
    """Another random mask for each training seed."""
    return lambda m, seed: select_freeze(m.result, strategy="random", budget=share * m.rule.fraction, seed=seed)


def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
    """The digits preset, scored half way and at the end."""
    return presets.digits(run_dir=run_dir, seed=seed, mask=mask, snapshot_kimg=6)


MASKS: tuple[Experiment, ...] = (
    Experiment("gdd-i", "GDD-I: the authors' rule on names", FEEDS, lambda m, seed: m.rule, configure),
    Experiment("gdd", "GDD: everything is trained", FEEDS, lambda m, seed: None, configure, seconds=260.0),
    Experiment(
        "random",
        "random masks of the rule's share, another one for each seed",
        FEEDS,
        at_random(),
        configure,
    ),
    *(
        Experiment(
            f"{name}-{'high' if inverse else 'low'}",
            f"freezes {'high' if inverse else 'low'} values of: {what}",
            FEEDS,
            chosen_by(name, inverse=inverse),
            configure,
        )
        for name, what in SCORES.items()
        for inverse in (False, True)
    ),
    Experiment("half-random", "random masks of half the rule's share", FEEDS, at_random(0.5), configure),
    *(
        Experiment(
            f"half-ablation-{'high' if inverse else 'low'}",
            f"as ablation-{'high' if inverse else 'low'}, at half the share, where the two freeze different layers",
            FEEDS,
            chosen_by("ablation", inverse=inverse, share=0.5),
            configure,
        )
        for inverse in (False, True)
    ),
)
