"""Teachers: load them, train them, say what they are."""

from gddlab.teachers.card import TeacherCard
from gddlab.teachers.loading import bundled_teachers, load_teacher
from gddlab.teachers.training import TeacherConfig, edm_loss, train_teacher

__all__ = ["TeacherCard", "TeacherConfig", "bundled_teachers", "edm_loss", "load_teacher", "train_teacher"]
