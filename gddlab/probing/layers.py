"""Which layers there are in a network, what is known about each, and how they are named in a call."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets.layers import UNetBlock
from gddlab.nets.unets import DhariwalUNet, SongUNet

__all__ = [
    "Layer",
    "LayerSelection",
    "inventory",
    "is_conv",
    "kind_of",
    "parameter_table",
    "place",
    "plain_name",
    "select_layers",
]

LayerSelection = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A preset ("conv", "block", "all"), a name, a glob, "re:" and a pattern, a list of names and globs, or a function of name and module."""

_EDM_NAME = re.compile(r"(?:^|\.)(?P<stage>enc|dec)\.(?P<resolution>\d+)x\d+_(?P<rest>\w+)$")


@dataclass(frozen=True)
class Layer:
    """A module that can be probed or frozen.

    Attributes:
        name: Its `named_modules()` path, verbatim.
        block: Path of the U-Net block that it lies in (or is); "" outside of blocks.
        kind: Its role: "conv0", "conv1", "skip", "qkv", "proj", "block", "aux_conv" and so on: the last part of its name
            without the resolution.
        stage: "enc" or "dec"; "" where the name does not say.
        resolution: Nominal resolution in its name, pixels; None where the name does not say.
        depth: Number of convolutions before it, in the order of `named_modules()`.
        n_params: Parameters, its own and its children's.
        activated_input: True where its input is known to be the output of an activation: `conv0` and `conv1` of a
            `UNetBlock`, and the last convolution of a gddlab U-Net, follow SiLU. False for anything else, known or not.
        candidate: True where a freezing strategy may choose it: convolutions in U-Net blocks; in a network without
            such blocks every convolution but the first and the last.
    """

    name: str
    block: str
    kind: str
    stage: str
    resolution: int | None
    depth: int
    n_params: int
    activated_input: bool
    candidate: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_conv(module: nn.Module) -> bool:
    """A layer with a 4-d weight: EDM's own classes and users' need not be `nn.Conv2d`; resampling has no weight."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 4


def plain_name(name: str) -> str:
    """A parameter's or module's name without what DistributedDataParallel and torch.compile put in."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name.replace("_orig_mod.", "")


def parameter_table(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters in the order of the network, without `map_augment`, which a student drops."""
    named = ((plain_name(name), tuple(p.shape)) for name, p in model.named_parameters())
    return tuple((name, shape) for name, shape in named if "map_augment" not in name.split("."))


def inventory(model: nn.Module) -> dict[str, Layer]:
    """Every module of `model` but the root, by name, in the order of `named_modules()`."""
    modules = dict(model.named_modules())
    blocks = [n for n, m in modules.items() if isinstance(m, UNetBlock)]
    convs = [n for n, m in modules.items() if is_conv(m)]
    inside = {n: _block_of(n, blocks) for n in modules}
    if blocks:
        candidates = {n for n in convs if inside[n]}
    else:
        candidates = set(convs[1:-1])
    out: dict[str, Layer] = {}
    depth = 0
    for name, module in modules.items():
        if name:
            stage, resolution = place(name)
            out[name] = Layer(
                name=name,
                block=inside[name],
                kind="block" if isinstance(module, UNetBlock) else kind_of(name),
                stage=stage,
                resolution=resolution,
                depth=depth,
                n_params=sum(p.numel() for p in module.parameters()),
                activated_input=_activated(name, modules),
                candidate=name in candidates,
            )
        depth += is_conv(module)
    return out


def select_layers(model: nn.Module, layers: LayerSelection) -> list[Layer]:
    """The layers that `layers` names, in the order of the network.

    Raises:
        GddlabError: Nothing matches, or one name or glob of a list does not.
    """
    modules = {n: m for n, m in model.named_modules() if n}
    if isinstance(layers, str):
        chosen = _match(layers, modules)
    elif callable(layers):
        chosen = {n for n, m in modules.items() if layers(n, m)}
        if not chosen:
            raise GddlabError(f"layers={layers!r} accepts none of {len(modules)} modules: return True for some")
    elif isinstance(layers, Iterable):
        chosen = {n for item in layers for n in _match(item, modules)}
        if not chosen:
            raise GddlabError("layers is an empty list: give names, a glob or one of 'conv', 'block', 'all'")
    else:
        raise GddlabError(
            f"layers={layers!r}: give a name, a glob, 're:...', a list, a function, or 'conv', 'block', 'all'"
        )
    return [layer for name, layer in inventory(model).items() if name in chosen]


_PRESETS: Mapping[str, Callable[[nn.Module], bool]] = {
    "conv": is_conv,
    "block": lambda m: isinstance(m, UNetBlock),
    "all": lambda m: is_conv(m) or isinstance(m, UNetBlock),
}


def _match(pattern: object, modules: Mapping[str, nn.Module]) -> set[str]:
    if not isinstance(pattern, str):
        raise GddlabError(f"layer {pattern!r} is no name: give strings, names or globs")
    if pattern in _PRESETS:
        found = {n for n, m in modules.items() if _PRESETS[pattern](m)}
        if not found:
            raise GddlabError(f"layers={pattern!r}: this network has none; give names, a glob or a function instead")
        return found
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as e:
            raise GddlabError(f"layers={pattern!r} is no regular expression ({e})") from None
        found = {n for n in modules if regex.search(n)}
    else:
        found = {n for n in modules if n == pattern or fnmatch.fnmatchcase(n, pattern)}
    if not found:
        raise unknown("layer", pattern, [*modules, *_PRESETS])
    return found


def _block_of(name: str, blocks: Iterable[str]) -> str:
    return max((b for b in blocks if name == b or name.startswith(b + ".")), key=len, default="")


def place(name: str) -> tuple[str, int | None]:
    """Stage and resolution that a gddlab name says, its own or its block's."""
    while name:
        if found := _EDM_NAME.search(name):
            return found["stage"], int(found["resolution"])
        name = name.rpartition(".")[0]
    return "", None


def kind_of(name: str) -> str:
    """Role that a gddlab name says: its last part without the resolution."""
    return re.sub(r"^\d+x\d+_", "", name.rpartition(".")[2])


def _activated(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    if isinstance(modules.get(parent), UNetBlock):
        return leaf in ("conv0", "conv1")
    if isinstance(modules.get(parent), DhariwalUNet):
        return leaf == "out_conv"
    grandparent = parent.rpartition(".")[0]
    return isinstance(modules.get(grandparent), SongUNet) and leaf.endswith("_aux_conv")
