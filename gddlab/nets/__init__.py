"""Networks: EDM's U-Nets, transformers, their preconditionings, one-step students, their files."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.dit import DiTPrecond
from gddlab.nets.io import architecture, from_edm, load_network, save_network
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN, OneStepPrecond, Precond

__all__ = [
    "SIGMA_MAX",
    "SIGMA_MIN",
    "DiTPrecond",
    "OneStepPrecond",
    "Precond",
    "architecture",
    "architectures",
    "build",
    "from_edm",
    "load_network",
    "save_network",
]
