"""Networks as safetensors files: weights, and the architecture in the file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gddlab.errors import GddlabError, NotFound
from gddlab.files import atomic_path
from gddlab.nets.arguments import refusal
from gddlab.nets.making import from_edm
from gddlab.nets.precond import Precond

__all__ = ["FORMAT", "architecture", "load_network", "save_network"]

FORMAT = "gddlab-network-1"


def architecture(net: Precond) -> dict[str, Any]:
    """Class name and keyword arguments from which `from_edm` builds `net` again."""
    return {"precond": type(net).__name__, "init_kwargs": net.init_kwargs}


def save_network(net: Precond, path: str | Path, **meta: Any) -> None:
    """Writes weights and architecture atomically; `meta` is JSON and comes back from `load_network`."""
    from safetensors.torch import save_file

    header = {"format": FORMAT, **architecture(net), "meta": meta}
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata={k: json.dumps(v, allow_nan=False) for k, v in header.items()})


def load_network(path: str | Path) -> tuple[Precond, dict[str, Any]]:
    """Reads a file written by `save_network`.

    Returns:
        The network in eval mode on the CPU, and the metadata given when it was saved.

    Raises:
        NotFound: No such file.
        GddlabError: Not a safetensors file of gddlab, or its weights do not fit its architecture.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as f:
            header = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            if header.get("format") != FORMAT:
                raise GddlabError(f"{path} does not say its architecture: give a .safetensors file that gddlab wrote")
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, RecursionError) as e:
        raise GddlabError(f"{path} is not a whole safetensors file ({e})") from None
    precond, kwargs, meta = (header.get(k) for k in ("precond", "init_kwargs", "meta"))
    if not (isinstance(precond, str) and isinstance(kwargs, dict) and isinstance(meta, dict)):
        raise GddlabError(f"{path}: its metadata lacks precond, init_kwargs or meta: give a file that gddlab wrote")
    if reason := refusal(kwargs, len(state)):
        raise GddlabError(f"{path}: {precond[:40]!r} has {reason}")
    try:
        with torch.device("meta"):
            net = from_edm(precond, **kwargs)
    except (ValueError, RuntimeError, ArithmeticError, LookupError) as e:
        raise GddlabError(f"{path}: {precond[:40]!r} cannot be built: {str(e).splitlines()[0]}") from None
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as e:
        raise GddlabError(
            f"{path}: weights do not fit {header['precond']}: {str(e).splitlines()[-1].strip()}"
        ) from None
    return net.eval(), meta
