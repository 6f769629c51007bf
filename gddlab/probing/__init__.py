"""Probing: how active each layer of a diffusion network is at each noise level, and what it does there."""

from gddlab.probing.ablation import ablate
from gddlab.probing.attribution import attribute
from gddlab.probing.estimate import Estimate
from gddlab.probing.gradients import Batch, grad_probe
from gddlab.probing.hooks import Probe
from gddlab.probing.layers import Layer, select_layers
from gddlab.probing.patching import patch
from gddlab.probing.result import ProbeResult
from gddlab.probing.run import probe
from gddlab.probing.statistics import DEFAULT, STATISTICS, PerImage, Statistic
from gddlab.probing.weights import weight_change
from gddlab.probing.wrapping import wrap

__all__ = [
    "DEFAULT",
    "STATISTICS",
    "Batch",
    "Estimate",
    "Layer",
    "PerImage",
    "Probe",
    "ProbeResult",
    "Statistic",
    "ablate",
    "attribute",
    "grad_probe",
    "patch",
    "probe",
    "select_layers",
    "weight_change",
    "wrap",
]
