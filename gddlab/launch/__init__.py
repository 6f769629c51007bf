"""Training in fresh processes, and handles on it."""

from gddlab.launch.handle import RunFailed, RunHandle, attach
from gddlab.launch.train import train

__all__ = ["RunFailed", "RunHandle", "attach", "train"]
