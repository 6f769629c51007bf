"""Arguments of samplers, checked: networks, seeds, class labels, noise levels, precisions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.nets import Precond

__all__ = ["module_of", "one_hot", "positive", "precision", "seed_list", "sigma_list"]

PRECISIONS = ("float32", "bfloat16", "float16")

MAX_SEED = 2**32 - 1  # PyTorch's CPU generator takes 32 bits


def precision(dtype: torch.dtype | str | None) -> str:
    """Name of what the network runs in: "float32" (its own precision, no autocast), "bfloat16" or "float16"."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise unknown("dtype", name, PRECISIONS)
    return name


def seed_list(n: int | None, seed: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """One seed an image; arguments as for `sample`."""
    if seeds is None:
        first, count = _integer("seed", seed), positive("n", 64 if n is None else n, "images")
        if not 0 <= first <= MAX_SEED - count + 1:
            raise GddlabError(f"seed={seed} for {count} images: seeds are 0..{MAX_SEED}")
        return range(first, first + count)
    try:
        listed = [_integer("seeds", s) for s in seeds]
    except TypeError:
        raise GddlabError(f"seeds={seeds!r}: give a list of integers, or seed={seeds!r} for the first") from None
    if not listed:
        raise GddlabError("seeds is empty: give one seed an image")
    if n is not None and n != len(listed):
        raise GddlabError(f"n={n} with {len(listed)} seeds: give one seed an image, or leave n away")
    for s in listed:
        if not 0 <= s <= MAX_SEED:
            raise GddlabError(f"seeds hold {s}: seeds are 0..{MAX_SEED}")
    return listed


def sigma_list(sigmas: Any) -> list[float]:
    """Noise levels as numbers."""
    try:
        return [float(s) for s in sigmas]
    except (TypeError, ValueError):
        raise GddlabError(f"sigmas={sigmas!r}: give noise levels, such as (80.0, 0.8)") from None


def one_hot(label_dim: int, n: int, seed: int, labels: Tensor | Sequence[int] | int | None) -> Tensor | None:
    """Class labels of `n` images, (n, label_dim), float32; None for an unconditional network. `labels` as for `sample`."""
    if not label_dim:
        if labels is not None:
            raise GddlabError("class_labels given to an unconditional network: leave them away")
        return None
    if labels is None:
        ids = (torch.arange(n) + seed) % label_dim
    else:
        try:
            ids = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise GddlabError(f"class_labels={labels!r}: give class ids or one-hot labels") from None
        if ids.ndim == 2:
            if ids.shape != (n, label_dim):
                raise GddlabError(f"class_labels are {tuple(ids.shape)}: give ({n}, {label_dim})")
            return ids.float()
        ids = ids.expand(n) if ids.ndim == 0 else ids
        if ids.shape != (n,) or ids.min() < 0 or ids.max() >= label_dim or (ids != ids.long()).any():
            raise GddlabError(f"class_labels {ids.tolist()[:4]}: give {n} ids in 0..{label_dim - 1}")
    return torch.nn.functional.one_hot(ids.long(), label_dim).float()


def module_of(net: Any) -> Precond:
    """The network itself, also when torch.compile has wrapped it."""
    module = getattr(net, "_orig_mod", net)
    if not isinstance(module, Precond):
        raise GddlabError(
            f"{type(net).__name__} is no network: give gddlab.load_teacher(...) or load_run(...).student()"
        )
    return module


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise GddlabError(f"{name}={value!r}: give an integer") from None


def positive(name: str, value: Any, what: str = "") -> int:
    """`value` as an integer of at least 1; `name` and `what` are for the message."""
    if _integer(name, value) < 1:
        raise GddlabError(f"{name}={value}{' ' + what if what else ''}: give at least 1")
    return int(value)
