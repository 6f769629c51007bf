"""Starts training in fresh processes, and watches, stops and finds runs again."""

from gddlab.launch.handle import RunFailed, RunHandle, attach
from gddlab.launch.train import train

__all__ = ["RunFailed", "RunHandle", "attach", "train"]
