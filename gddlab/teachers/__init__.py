"""Teachers: load them, convert them, say what they are."""

from gddlab.teachers.catalog import PUBLISHED, TeacherCard, bundled_teachers, load_precond, load_teacher
from gddlab.teachers.convert import Converted, convert
from gddlab.teachers.ideal import ideal_denoiser
from gddlab.teachers.wrap import wrap

__all__ = [
    "PUBLISHED",
    "Converted",
    "TeacherCard",
    "bundled_teachers",
    "convert",
    "ideal_denoiser",
    "load_precond",
    "load_teacher",
    "wrap",
]
