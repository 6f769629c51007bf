"""Experiments that every list has beside its masks: controls, augmentation, students, baselines, few images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gddlab.experiments.experiment import Experiment
from gddlab.experiments.feeds import feeds_of
from gddlab.experiments.masks import Chooser, Configure, free, ruled

__all__ = ["Configure", "Rows"]


class Rows:
    """Makes the experiments of a list.

    Args:
        configured: From fields that differ from the list's preset, the configuration of a run by its folder, seed and mask.
        seconds: One run, roughly; None where nobody knows.
    """

    def __init__(self, configured: Callable[..., Configure], seconds: float | None):
        self.configured, self.seconds = configured, seconds

    def __call__(
        self,
        name: str,
        what: str,
        *,
        mask: Chooser = ruled,
        seconds: float | None = None,
        **fields: Any,
    ) -> Experiment:
        return Experiment(name, what, feeds_of(name), mask, self.configured(**fields), seconds or self.seconds)

    def controls(self) -> tuple[Experiment, ...]:
        """Without the teacher's weights, without R1, with a second step."""
        return (
            self("scratch", "GDD from random weights in place of the teacher's", mask=free, student="scratch"),
            self("no-r1", "GDD-I without R1", r1_gamma=0),
            self("two-step", "GDD-I with a second step at sigma 0.8", mid_sigmas=(0.8,)),
        )

    def augmented(self, *, ada_kimg: float, **fields: Any) -> tuple[Experiment, ...]:
        """With augmentation, fixed and adaptive.

        Args:
            ada_kimg: In which ADA's probability can go from 0 to 1.
            **fields: That go with it.
        """
        what = f"GDD-I with ADA, target 0.6, at most from 0 to 1 in {ada_kimg:g} kimg"
        return (
            self(
                "augment",
                "GDD-I with differentiable colour, translation, cutout",
                augment=("color", "translation", "cutout"),
                **fields,
            ),
            self("ada", what, augment=("bgc",), ada_target=0.6, ada_kimg=ada_kimg, **fields),
        )

    def baselines(
        self, *, distance: str, instance_steps: int, seconds: Mapping[str, float] | None = None, **alone: Any
    ) -> tuple[Experiment, ...]:
        """The instance-based losses alone, and consistency distillation with the GAN loss.

        Args:
            distance, instance_steps: As in a configuration.
            seconds: Of those that take longer than others.
            **alone: Fields that go with a loss alone, which has no discriminator.
        """
        names = {
            "pd": "progressive distillation",
            "cd": "consistency distillation",
            "ctm": "consistency trajectory distillation",
            "rcd": "distillation from pure noise to a random level",
        }
        shared: dict[str, Any] = {"mask": free, "distance": distance, "instance_steps": instance_steps}
        longer = seconds or {}
        rows = [
            self(
                name,
                f"{what} alone, by the {distance} distance",
                seconds=longer.get(name),
                instance=name,
                adversarial_weight=0,
                **shared,
                **alone,
            )
            for name, what in names.items()
        ]
        added = "GDD with consistency distillation added"
        return (*rows, self("gdd-cd", added, seconds=longer.get("gdd-cd"), instance="cd", **shared))

    def few_images(self, counts: Iterable[int], **fields: Any) -> tuple[Experiment, ...]:
        """Trained on some of the images."""
        return tuple(self(f"images-{n}", f"GDD-I with {n} distinct images", max_images=n, **fields) for n in counts)
