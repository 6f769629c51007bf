"""Networks from the class name and keyword arguments that an EDM pickle holds."""

from __future__ import annotations

from typing import Any

from gddlab.errors import GddlabError, unknown
from gddlab.nets.onestep import OneStepPrecond
from gddlab.nets.precond import EDMPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond

__all__ = ["PRECONDS", "from_edm"]

PRECONDS: dict[str, type[Precond]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
    "OneStepPrecond": OneStepPrecond,
}


def from_edm(class_name: str, **init_kwargs: Any) -> Precond:
    """Builds a network from the class name and keyword arguments found in an EDM pickle.

    Args:
        class_name: "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond" or "OneStepPrecond".
        **init_kwargs: As in the pickle; `use_fp16` is accepted and has no meaning here (autocast decides).

    Returns:
        The network with fresh parameters; its state-dict keys equal the reference's.

    Raises:
        GddlabError: Unknown class, U-Net or argument.
    """
    if class_name not in PRECONDS:
        raise unknown("network class", class_name, PRECONDS)
    kwargs = {k: v for k, v in init_kwargs.items() if k != "use_fp16"}
    try:
        net = PRECONDS[class_name](**kwargs)
    except TypeError as e:
        raise GddlabError(f"{class_name} cannot be built from {sorted(kwargs)}: {e}") from None
    net.init_kwargs = kwargs
    return net
