"""Networks: the U-Nets and preconditionings of EDM and EDM2, one-step students, their files."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.edm2 import EDM2Precond
from gddlab.nets.io import architecture, from_edm, load_network, save_network
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN, OneStepPrecond, Precond

__all__ = [
    "SIGMA_MAX",
    "SIGMA_MIN",
    "EDM2Precond",
    "OneStepPrecond",
    "Precond",
    "architecture",
    "architectures",
    "build",
    "from_edm",
    "load_network",
    "save_network",
]
