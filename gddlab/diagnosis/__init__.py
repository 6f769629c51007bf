"""What this machine has, what is missing, and what gddlab can therefore do."""

from gddlab.diagnosis.doctor import doctor
from gddlab.diagnosis.findings import SECTIONS, Doctor, Finding

__all__ = ["SECTIONS", "Doctor", "Finding", "doctor"]
