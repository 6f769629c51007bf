"""The student: the teacher's U-Net and weights, run once at sigma = 80, or a few times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gddlab.errors import GddlabError, unknown
from gddlab.nets import OneStepPrecond, Precond, from_edm
from gddlab.nets.precond import EDMPrecond

__all__ = ["make_student"]

INITS = ("teacher", "scratch")


def make_student(
    teacher: Precond, *, target_time: bool = False, mid_sigmas: Sequence[float] = (), init: str = "teacher"
) -> OneStepPrecond:
    """A one-step generator with the teacher's weights (method of GDD, section 2 of its paper).

    The augmentation embedding is not carried over and dropout is 0. A freeze mask made for the teacher fits.

    Args:
        teacher: An EDM network.
        target_time: The student takes a second, target noise level; at first it changes nothing.
        mid_sigmas: Noise levels of further steps, descending between 80 and 0.002.
        init: "teacher", or "scratch": fresh weights from torch's global generator, the control.

    Raises:
        GddlabError: The teacher has another preconditioning than EDM's, whose noise embedding a student could not use; `mid_sigmas` do
            not descend; an unknown `init`.
    """
    if not isinstance(teacher, EDMPrecond):
        raise GddlabError(f"a {type(teacher).__name__} teacher has no one-step student: give an EDMPrecond network")
    if init not in INITS:
        raise unknown("init", init, INITS)
    dropped = ("augment_dim", "eps", "sigma_g", "target_time", "mid_sigmas")
    kwargs: dict[str, Any] = {k: v for k, v in teacher.init_kwargs.items() if k not in dropped}
    kwargs |= {"dropout": 0.0, "model_type": type(teacher.model).__name__}
    if target_time:
        kwargs["target_time"] = True
    if mid_sigmas:
        kwargs["mid_sigmas"] = list(mid_sigmas)
    student = from_edm("OneStepPrecond", **kwargs)
    assert isinstance(student, OneStepPrecond)
    if init == "teacher":
        own = {k: v for k, v in student.state_dict().items() if k.startswith("model.map_target")}
        given = {
            k: v
            for k, v in teacher.state_dict().items()
            if not k.startswith(("model.map_augment.", "model.map_target"))
        }
        student.load_state_dict(own | given, strict=True)
    return student
