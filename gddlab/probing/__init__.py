"""Probing: how active each layer of a diffusion network is at each noise level, and what it is needed for."""

from gddlab.probing.ablate import ablate
from gddlab.probing.attribute import attribute
from gddlab.probing.decode import decode
from gddlab.probing.gradients import Batch, grad_probe
from gddlab.probing.hooks import Probe
from gddlab.probing.layers import Layer, select_layers
from gddlab.probing.lens import Lens, lens
from gddlab.probing.null import null
from gddlab.probing.patch import patch
from gddlab.probing.probe import Estimate, estimate, probe
from gddlab.probing.result import ProbeResult
from gddlab.probing.statistics import DEFAULT, STATISTICS, PerImage, Statistic
from gddlab.probing.weights import weight_change
from gddlab.teachers.wrap import wrap

__all__ = [
    "DEFAULT",
    "STATISTICS",
    "Batch",
    "Estimate",
    "Layer",
    "Lens",
    "PerImage",
    "Probe",
    "ProbeResult",
    "Statistic",
    "ablate",
    "attribute",
    "decode",
    "estimate",
    "grad_probe",
    "lens",
    "null",
    "patch",
    "probe",
    "select_layers",
    "weight_change",
    "wrap",
]
