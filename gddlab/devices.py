"""Which device a process takes."""

from __future__ import annotations

import os

import torch

from gddlab.errors import GddlabError

__all__ = ["chosen_device"]


def chosen_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (CUDA where there is one, else the CPU), "cpu" or "cuda". Of several GPUs a process takes that of its LOCAL_RANK, which torchrun sets;
            where there are more processes than GPUs, they share.

    Raises:
        GddlabError: Another name, or CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise GddlabError(f"device={name!r}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise GddlabError("device='cuda', but torch sees no CUDA device: use device='auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
