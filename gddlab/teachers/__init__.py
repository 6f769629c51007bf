"""Teachers: load them, train them, convert them, say what they are."""

from gddlab.teachers.card import TeacherCard
from gddlab.teachers.catalog import PUBLISHED
from gddlab.teachers.convert import Converted, convert
from gddlab.teachers.loading import bundled_teachers, load_teacher
from gddlab.teachers.training import TeacherConfig, edm_loss, train_teacher

__all__ = [
    "PUBLISHED",
    "Converted",
    "TeacherCard",
    "TeacherConfig",
    "bundled_teachers",
    "convert",
    "edm_loss",
    "load_teacher",
    "train_teacher",
]
