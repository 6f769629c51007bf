"""Networks: U-Nets of EDM and EDM2, transformers, their preconditionings, one-step students; others' as denoisers."""

from gddlab.nets.architectures import architectures, build
from gddlab.nets.calls import Call
from gddlab.nets.codec import Codec
from gddlab.nets.conditioning import Conditioning
from gddlab.nets.denoiser import Denoiser
from gddlab.nets.dit import DiTPrecond
from gddlab.nets.edm2 import EDM2Precond
from gddlab.nets.io import architecture, from_edm, load_network, save_network, without_labels, without_target
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
    "DiTPrecond",
    "EDM2Precond",
    "OneStepPrecond",
    "Path",
    "Precond",
    "architecture",
    "architectures",
    "build",
    "from_edm",
    "load_network",
    "save_network",
    "without_labels",
    "without_target",
]
