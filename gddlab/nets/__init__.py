"""Networks: EDM U-Nets, preconditionings, and the frozen image backbones that wheels carry."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.io import architecture, from_edm, load_network, save_network
from gddlab.nets.onestep import OneStepPrecond
from gddlab.nets.precond import Precond

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
