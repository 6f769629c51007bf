"""The student: the teacher's U-Net and weights, run once at sigma = 80."""

from __future__ import annotations

from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond, Precond, from_edm
from gddlab.nets.precond import EDMPrecond

__all__ = ["make_student"]


def make_student(teacher: Precond) -> OneStepPrecond:
    """A one-step generator with the teacher's weights (method of GDD, section 2 of its paper).

    The augmentation embedding is not carried over and dropout is 0.

    Raises:
        GddlabError: The teacher has another preconditioning than EDM's, whose noise embedding a student could not use.
    """
    if not isinstance(teacher, EDMPrecond):
        raise GddlabError(f"a {type(teacher).__name__} teacher has no one-step student: give an EDMPrecond network")
    kwargs = {k: v for k, v in teacher.init_kwargs.items() if k not in ("augment_dim", "eps", "sigma_g")}
    kwargs |= {"dropout": 0.0, "model_type": type(teacher.model).__name__}
    student = from_edm("OneStepPrecond", **kwargs)
    assert isinstance(student, OneStepPrecond)
    state = {k: v for k, v in teacher.state_dict().items() if not k.startswith("model.map_augment.")}
    student.load_state_dict(state, strict=True)
    return student
