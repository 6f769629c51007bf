"""Combinations of options that cannot work, or where one would do nothing: refused when a configuration is made."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from gddlab.distill.augment import Augment
from gddlab.errors import GddlabError, unknown

if TYPE_CHECKING:
    from gddlab.distill.config import TrainConfig

__all__ = ["check_combination"]


def check_combination(c: TrainConfig) -> None:
    """Refuses fields that contradict each other.

    Raises:
        GddlabError: In one sentence, with the values.
    """
    _student(c)
    _objective(c)
    _discriminator(c)
    if c.precision == "float64" and c.precision_d == "bfloat16":
        raise GddlabError("precision='float64' with precision_d='bfloat16': give float32, which float64 replaces")
    if c.batch_per_device is not None and c.batch % c.batch_per_device:
        raise GddlabError(f"batch={c.batch}, batch_per_device={c.batch_per_device}: give a divisor of the batch")
    if c.metric_kimg is None and c.metric_n is not None:
        raise GddlabError(f"metric_n={c.metric_n} without metric_kimg: nothing is scored, give metric_kimg too")
    if "jump" in c.stop_on and c.metric_kimg is None:
        raise GddlabError("stop_on='jump' without metric_kimg: no metric is there to jump, give metric_kimg too")


def _student(c: TrainConfig) -> None:
    levels = (80.0, *c.mid_sigmas, 0.002)
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise GddlabError(f"mid_sigmas={c.mid_sigmas}: give descending noise levels between 80 and 0.002")
    if c.mid_sigmas and c.instance:
        raise GddlabError(
            f"mid_sigmas={c.mid_sigmas} with instance={c.instance!r}: a baseline's student takes one step"
        )
    if c.shard and c.instance:
        raise GddlabError(
            f"shard=True with instance={c.instance!r}: its passes hold parts of the student constant, leave one away"
        )
    if c.shard and c.compile:
        raise GddlabError("shard=True with compile=True: the two were never tried together, leave one away")
    if c.student == "scratch" and c.mask is not None:
        raise GddlabError("student='scratch' with a mask: frozen layers would stay random, give mask=None")


def _objective(c: TrainConfig) -> None:
    if c.instance is None:
        if not c.adversarial_weight:
            raise GddlabError("adversarial_weight=0 without instance: nothing is trained, give one of them")
        if c.distance_weights is not None:
            raise GddlabError("distance_weights without instance: no distance is measured, give instance too")
    if c.instance == "pd" and c.instance_steps & (c.instance_steps - 1):
        raise GddlabError(f"instance_steps={c.instance_steps} with instance='pd': give a power of two")
    if c.distance_weights is not None and c.distance != "lpips":
        raise GddlabError(f"distance_weights with distance={c.distance!r}: only lpips takes them")
    if not c.adversarial_weight:
        for name in ("reuse_fakes", "cache_real", "augment", "ada_target", "sync_batchnorm", "embedding_file"):
            if getattr(c, name):
                raise GddlabError(f"{name} with adversarial_weight=0: there is no discriminator, leave it away")


def _discriminator(c: TrainConfig) -> None:
    projected = c.discriminator == "projected"
    if projected and not c.backbones:
        raise GddlabError("backbones=(): give at least one")
    if len(set(c.backbones)) < len(c.backbones):
        raise GddlabError(f"backbones={c.backbones}: give each once")
    for name in c.backbone_weights:
        if name not in c.backbones:
            raise unknown("backbone in backbone_weights", name, c.backbones)
    if projected and c.discriminator_weights is not None:
        raise GddlabError("discriminator_weights with a projected discriminator: give backbone_weights")
    if c.lpips_net != "vgg" and c.discriminator != "lpips":
        raise GddlabError(f"lpips_net={c.lpips_net!r} with discriminator={c.discriminator!r}: only lpips has a trunk")
    if not projected:
        for name in ("cache_real", "sync_batchnorm", "embedding_file", "backbone_weights"):
            if getattr(c, name):
                raise GddlabError(f"{name} with discriminator={c.discriminator!r}: only the projected one has it")
    Augment(c.augment)  # refuses unknown names and repetitions
    if c.cache_real and c.augment:
        raise GddlabError("cache_real with augment: augmented images have other features each time, leave one away")
    if c.ada_target is not None and not c.augment:
        raise GddlabError(f"ada_target={c.ada_target} without augment: give augment=('bgc',) or others")
    if c.ada_target is not None and c.augment_p != 1.0:
        raise GddlabError(f"ada_target={c.ada_target} with augment_p={c.augment_p}: the target moves the probability")
    if c.augment_p != 1.0 and not c.augment:
        raise GddlabError(f"augment_p={c.augment_p} without augment: give augment too")
