"""Probing: how active each layer of a diffusion network is at each noise level."""

from gddlab.probing.hooks import Probe
from gddlab.probing.layers import Layer, select_layers
from gddlab.probing.result import ProbeResult
from gddlab.probing.run import probe
from gddlab.probing.statistics import DEFAULT, STATISTICS, Statistic

__all__ = ["DEFAULT", "STATISTICS", "Layer", "Probe", "ProbeResult", "Statistic", "probe", "select_layers"]
