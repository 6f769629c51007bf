"""Teachers."""
from gddlab.teachers.training import TeacherConfig, train_teacher
