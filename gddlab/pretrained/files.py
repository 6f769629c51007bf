"""Weights of networks that others trained: where their files lie, and how they are read and fitted, each refusal in one line."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound
from gddlab.files import cache_dir

__all__ = ["SUFFIXES", "ask_hub", "find_weights", "fit_state", "load_fitting", "read_state"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def find_weights(*stems: str) -> Path | None:
    """The first file STEM.safetensors, .pth, .pt or .bin in the working folder, `$GDDLAB_HOME`, `$GDDLAB_HOME/backbones`, the cache's `backbones`; else None."""
    home = os.environ.get("GDDLAB_HOME")
    folders = [
        Path.cwd(),
        *([Path(home).expanduser(), Path(home).expanduser() / "backbones"] if home else []),
        cache_dir() / "backbones",
    ]
    for folder in folders:
        for stem in stems:
            for suffix in SUFFIXES:
                if (folder / f"{stem}{suffix}").is_file():
                    return folder / f"{stem}{suffix}"
    return None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors, .pth, .pt or .bin file, also one under "state_dict" or "model", on the CPU; nothing in the file is run.

    Raises:
        NotFound: No such file.
        GddlabError: Another kind of file, or it holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise GddlabError(f"{path}: give a state dict as {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:  # torch maps only files that are zips; those before 1.6 are read
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise GddlabError(
            f"{path} is no state dict of tensors alone, or is damaged; nothing in it was run: give what torch.save(net.state_dict(), ...) wrote"
        ) from None
    except Exception as e:  # safetensors, zip and pickle readers each have their own
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise GddlabError(f"{path} cannot be read ({reason}): fetch it again") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise GddlabError(f"{path} holds no state dict, tensors by name: give what torch.save(net.state_dict()) wrote")
    return state


def ask_hub(address: str) -> str | None:
    """Asks whether a file is at its address, without fetching it; what went wrong, or None."""
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(address, method="HEAD"), timeout=10).close()
    except OSError as e:
        return f"{type(e).__name__} at the hub"
    return None


def fit_state(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: object, *, optional: Sequence[str] = ()
) -> None:
    """Checks that `given` fits the state dict `own` of a network, name by name.

    Args:
        own: State dict of the network; the meta device will do.
        given: What the file holds.
        path: Named in the refusal.
        optional: Endings of names that the file may leave out.

    Raises:
        GddlabError: The first name that is missing, has another shape, is not finite, or is not the network's.
    """
    for name, t in own.items():
        if name not in given:
            if name.endswith(tuple(optional)) and optional:
                continue
            raise GddlabError(f"{path} does not fit: it lacks {name}, {tuple(t.shape)}")
        if given[name].shape != t.shape:
            raise GddlabError(f"{path} does not fit: {name} is {tuple(given[name].shape)}, not {tuple(t.shape)}")
        if not given[name].is_floating_point() or not given[name].isfinite().all():
            raise GddlabError(f"{path} is refused: {name} holds something else than finite floating point numbers")
    for name in given:
        if name not in own:
            raise GddlabError(f"{path} does not fit: it holds {name}, which the network does not have")


def load_fitting(net: nn.Module, given: Mapping[str, Tensor], path: object, *, optional: Sequence[str] = ()) -> None:
    """Copies `given` into `net` after `fit_state`."""
    own = net.state_dict()
    fit_state(own, given, path, optional=optional)
    net.load_state_dict({**own, **given})
