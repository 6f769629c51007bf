"""What this machine has, what is missing, and what gddlab can therefore do."""

from gddlab.diagnosis.doctor import SECTIONS, Doctor, Finding, doctor

__all__ = ["SECTIONS", "Doctor", "Finding", "doctor"]
