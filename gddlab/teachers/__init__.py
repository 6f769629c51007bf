"""Teachers: load them, convert them, say what they are."""

from gddlab.teachers.catalog import PUBLISHED, TeacherCard, bundled_teachers, load_teacher
from gddlab.teachers.convert import Converted, convert
from gddlab.teachers.ideal import ideal_denoiser

__all__ = [
    "PUBLISHED",
    "Converted",
    "TeacherCard",
    "bundled_teachers",
    "convert",
    "ideal_denoiser",
    "load_teacher",
]
