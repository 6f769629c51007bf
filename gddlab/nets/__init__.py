"""Networks: EDM's U-Nets and preconditionings, one-step students, their files; and others' as denoisers."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.calls import Call
from gddlab.nets.codec import Codec
from gddlab.nets.conditioning import Conditioning
from gddlab.nets.denoiser import Denoiser
from gddlab.nets.io import architecture, from_edm, load_network, save_network
from gddlab.nets.path import PURE, Path
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN, OneStepPrecond, Precond

__all__ = [
    "PURE",
    "SIGMA_MAX",
    "SIGMA_MIN",
    "Call",
    "Codec",
    "Conditioning",
    "Denoiser",
    "OneStepPrecond",
    "Path",
    "Precond",
    "architecture",
    "architectures",
    "build",
    "from_edm",
    "load_network",
    "save_network",
]
