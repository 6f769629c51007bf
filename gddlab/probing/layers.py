"""Which layers there are in a network, what is known about each, and how they are named in a call."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.probing.anatomy import (
    Anatomy,
    anatomy,
    follows_activation,
    is_conv,
    kind_of,
    place,
    type_of,
)
from gddlab.probing.naming import denoiser_of, named_layers, owner_of, parameter_table, plain_name, unwrap

__all__ = [
    "PRESETS",
    "Anatomy",
    "Layer",
    "LayerSelection",
    "anatomy",
    "denoiser_of",
    "inventory",
    "is_conv",
    "kind_of",
    "match_layers",
    "named_layers",
    "owner_of",
    "parameter_table",
    "place",
    "plain_name",
    "select_layers",
    "type_of",
    "unwrap",
]

LayerSelection = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A preset ("conv", "block", "attention", "norm", "linear", "all"), a name, a glob, "re:" and a pattern, a list of these, or a
function of name and module."""

PRESETS = ("conv", "block", "attention", "norm", "linear", "all")

_ATTENTION = {"qkv": ("qkv", "proj", "proj_out"), "to_q": ("to_q", "to_k", "to_v", "to_out.0")}
"""Projections of self-attention that lie beside one of that name."""


@dataclass(frozen=True)
class Layer:
    """A module that can be probed or frozen.

    Attributes:
        name: Its `named_modules()` path in the bare network, verbatim.
        block: Path of the residual block that it lies in (or is); "" outside of blocks.
        kind: Its role: "conv0", "conv1", "skip", "qkv", "proj", "block", "aux_conv" and so on: the last part of its name
            without the resolution.
        stage: "enc", "mid" or "dec"; "" where the name does not say.
        resolution: Nominal resolution in its name, pixels; where the name does not say, that of its output when it was probed; None
            before that, or without pixels.
        depth: Number of convolutions before it, in the order of `named_modules()`.
        n_params: Parameters, its own and its children's.
        type: "block", "conv" (a 4-d weight), "linear", "norm", or "" for anything else.
        activated_input: True where its input is known to be the output of an activation: the convolutions of a residual block
            of gddlab or diffusers, but for one behind its resampling, and the last convolution of a U-Net of theirs. False for
            anything else, known or not.
    """

    name: str
    block: str
    kind: str
    stage: str
    resolution: int | None
    depth: int
    n_params: int
    type: str
    activated_input: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _middle_first(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    names = list(modules)
    middle = [n for n in names if n.split(".")[0] == "mid_block"]
    up = next((i for i, n in enumerate(names) if n.split(".")[0] == "up_blocks"), None)
    if up is None or not middle:
        return modules
    rest = [n for n in names if n not in set(middle)]
    up = rest.index(names[up])
    return {n: modules[n] for n in (*rest[:up], *middle, *rest[up:])}


def inventory(model: nn.Module) -> dict[str, Layer]:
    """Every module of the bare network by name, in the order of `named_modules()`, without the root and the inside of
    parametrizations; the middle of a diffusers network, which lists it last, stands before its decoder, as it runs."""
    modules = _middle_first(_modules(model))
    blocks = [n for n, m in modules.items() if anatomy(m) is not None]
    out: dict[str, Layer] = {}
    depth = 0
    for name, module in modules.items():
        if name:
            stage, resolution = place(name)
            kind = type_of(module)
            out[name] = Layer(
                name=name,
                block=_block_of(name, blocks),
                kind="block" if kind == "block" else kind_of(name),
                stage=stage,
                resolution=resolution,
                depth=depth,
                n_params=sum(p.numel() for p in module.parameters()),
                type=kind,
                activated_input=follows_activation(name, modules),
            )
        depth += is_conv(module)
    return out


def select_layers(model: nn.Module, layers: LayerSelection) -> list[Layer]:
    """The layers that `layers` names, in the order of the network.

    Raises:
        GddlabError: Nothing matches, or one name or glob of a list does not.
    """
    modules = {n: m for n, m in _modules(model).items() if n}
    types = {n: type_of(m) for n, m in modules.items()}
    if isinstance(layers, str):
        chosen = match_layers(layers, types)
    elif callable(layers):
        chosen = {n for n, m in modules.items() if layers(n, m)}
        if not chosen:
            raise GddlabError(f"layers={layers!r} accepts none of {len(modules)} modules: return True for some")
    elif isinstance(layers, Iterable):
        chosen = {n for item in layers for n in match_layers(item, types)}
        if not chosen:
            raise GddlabError(f"layers is an empty list: give names, a glob, or one of {', '.join(PRESETS)}")
    else:
        raise GddlabError(
            f"layers={layers!r}: give a name, a glob, 're:...', a list, a function, or one of {', '.join(PRESETS)}"
        )
    return [layer for name, layer in inventory(model).items() if name in chosen]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in named_layers(model).items() if "parametrizations" not in n.split(".")}


def _preset(name: str, types: Mapping[str, str]) -> set[str]:
    """ "attention" is the projections of self-attention; "all" is every convolution, linear layer, norm and block. The embedding of EDM's augmentation
    labels is in none: it runs only while a teacher is trained."""
    if name != "attention":
        chosen = {n for n, kind in types.items() if kind and name in (kind, "all")}
        return {n for n in chosen if "map_augment" not in n.split(".")}
    found = set()
    for n in types:
        parent, dot, leaf = n.rpartition(".")
        found |= {parent + dot + beside for beside in _ATTENTION.get(leaf, ())}
    return {n for n in found if types.get(n) in ("conv", "linear", "")}  # "": a convolution over tokens, say


def match_layers(pattern: object, types: Mapping[str, str], what: str = "layers") -> set[str]:
    """Names that one preset, name, glob or "re:..." means.

    Args:
        pattern: What the user gave.
        types: `Layer.type` of each name that there is.
        what: The user's argument, for errors.

    Raises:
        GddlabError: Nothing matches, near matches are given; or it is no string.
    """
    if not isinstance(pattern, str):
        raise GddlabError(f"{what}: {pattern!r} is no name of a layer; give strings, names or globs")
    if pattern in PRESETS:
        found = _preset(pattern, types)
        if not found:
            raise GddlabError(f"{what}={pattern!r}: this network has none; give names or globs instead")
        return found
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as e:
            raise GddlabError(f"{what}={pattern!r} is no regular expression ({e})") from None
        found = {n for n in types if regex.search(n)}
    else:
        plain = plain_name(pattern)  # as a wrapped network's own named_modules() gives it
        found = {n for n in types if n == plain or fnmatch.fnmatchcase(n, plain)}
    if not found:
        raise unknown("layer", pattern, [*types, *PRESETS])
    return found


def _block_of(name: str, blocks: Iterable[str]) -> str:
    return max((b for b in blocks if name == b or name.startswith(b + ".")), key=len, default="")
