"""What a mask is chosen among: layers, blocks, or single tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.mask import FreezeMask, Parameters, numel
from gddlab.probing import ProbeResult
from gddlab.probing.layers import (
    PRESETS,
    inventory,
    match_layers,
    owner_of,
    parameter_table,
    place,
    plain_name,
    select_layers,
)

__all__ = [
    "DEFAULT",
    "ENDS",
    "GRANULARITIES",
    "Network",
    "Selection",
    "Source",
    "Unit",
    "around",
    "choose",
    "describe",
    "recorded",
    "split",
]

Source = ProbeResult | nn.Module
Selection = str | Iterable[str] | Callable[[str, nn.Module], bool]

ENDS = ("first", "last")
"""First and last convolution of a network: trained unless the call says otherwise."""

_WEIGHT = re.compile(r"weight|parametrizations\.weight\.")


class Network:
    """Layers of a network with what is known of each, from the network, its probe, or a parameter table alone."""

    def __init__(self, source: Source | Parameters):
        self.model = source if isinstance(source, nn.Module) else None
        self.parameters: Parameters
        self._known: dict[str, dict[str, Any]] = {}
        if isinstance(source, nn.Module):
            self.parameters = parameter_table(source)
            self._known = {name: layer.to_dict() for name, layer in inventory(source).items()}
        elif isinstance(source, ProbeResult):
            self.parameters = tuple((name, tuple(shape)) for name, shape in source.meta["parameters"])
            self._known = {plain_name(layer["name"]): layer for layer in source.meta["layers"]}
        else:
            self.parameters = source
        self.own: dict[str, dict[str, int]] = {}
        self._shapes = dict(self.parameters)
        names: dict[str, None] = {}
        for parameter, shape in self.parameters:
            layer = owner_of(parameter)
            self.own.setdefault(layer, {})[parameter] = numel(shape)
            names |= dict.fromkeys(reversed([*around(layer)]))
        self.names = list(names)
        """Modules with parameters of their own or inside, in the order of the network."""

    @property
    def n_params(self) -> int:
        return sum(numel(shape) for _, shape in self.parameters)

    def type(self, name: str) -> str:
        """ "block", "conv", "linear", "norm", or ""; a parameter table alone shows convolutions only."""
        if self._known:
            return str(self._known[name]["type"]) if name in self._known else ""
        weights = (p for p in self.own.get(name, ()) if _WEIGHT.match(p[len(name) + 1 :]))
        return "conv" if any(len(self._shapes[p]) == 4 for p in weights) else ""

    def block(self, name: str) -> str:
        """The residual block around a layer; "" outside of blocks."""
        known = next((self._known[n] for n in around(name) if n in self._known), None)
        return "" if known is None else str(known["block"])

    def resolution(self, name: str) -> int | None:
        known = self._known.get(name)
        return place(name)[1] if known is None or known["resolution"] is None else int(known["resolution"])

    def select(self, selection: Selection, what: str) -> list[str]:
        """Names that a selection of layers means; `what` is the argument's name.

        Raises:
            GddlabError: Nothing matches, or one item of a list does not; a function, and there is no network to call it on.
        """
        types = {n: self.type(n) for n in self.names}
        if isinstance(selection, str):
            found = match_layers(selection, types, what)
        elif callable(selection):
            if self.model is None:
                raise GddlabError(f"{what} is a function of modules: give the network as source, or names or globs")
            found = {layer.name for layer in select_layers(self.model, selection)}
        elif isinstance(selection, Iterable):
            found = {n for item in selection for n in match_layers(item, types, what)}
        else:
            raise GddlabError(
                f"{what}={selection!r}: give a name, a glob, 're:...', a list of these, or one of {', '.join(PRESETS)}"
            )
        return [n for n in self.names if n in found]

    def ends(self, always_train: str | Iterable[str]) -> set[str]:
        """Names that `always_train` means, "first" and "last" among them."""
        if not isinstance(always_train, str | Iterable):
            raise GddlabError(f"always_train={always_train!r}: give first, last, names or globs, or a list of these")
        items = [always_train] if isinstance(always_train, str) else list(always_train)
        convs = [n for n in self.own if self.type(n) == "conv"]
        out: set[str] = set()
        for item in items:
            if item in ENDS:
                out |= set(convs[:1] if item == "first" else convs[-1:])
            else:
                out |= set(self.select([item], "always_train"))
        return out


def around(name: str) -> Iterator[str]:
    """A layer and the modules around it, from inside out, without the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]


DEFAULT = "conv"
GRANULARITIES = ("layer", "block", "tensor")


@dataclass(frozen=True)
class Unit:
    """What is frozen together: parameters (name -> size) of some layers, under the name of a layer or block."""

    name: str
    layers: tuple[str, ...]
    parameters: dict[str, int]
    block: str = ""
    resolution: int | None = None

    @property
    def size(self) -> int:
        return sum(self.parameters.values())


def choose(network: Network, candidates: Selection, always_train: str | Iterable[str], granularity: str) -> list[Unit]:
    """Units of the selected layers in the order of the network; each parameter goes to the innermost selected layer around it.

    Raises:
        GddlabError: A selection matches nothing; nothing is left.
    """
    if granularity not in GRANULARITIES:
        raise unknown("granularity", granularity, GRANULARITIES)
    selected = set(network.select(candidates, "candidates"))
    trained = network.ends(always_train)
    groups: dict[str, list[str]] = {}
    for layer in network.own:
        path = [*around(layer)]
        inside = next((n for n in path if n in selected), None)
        if inside is not None and trained.isdisjoint(path):
            block = network.block(layer) if granularity == "block" else ""
            groups.setdefault(block or inside, []).append(layer)
    if not groups:
        raise GddlabError(
            f"candidates={describe(candidates)!r} without always_train={describe(always_train)!r} leaves no layer to freeze"
        )
    return [_unit(network, name, layers) for name, layers in groups.items()]


def recorded(mask: FreezeMask) -> list[Unit]:
    """What a mask was chosen among; for a rule on names, the convolutions without the ends, and what it freezes."""
    network = Network(mask.parameters)
    if mask.candidates is not None:
        groups = {name: list(layers) for name, layers in mask.candidates.items()}
    else:
        convs = [n for n in network.own if network.type(n) == "conv"]
        groups = {n: [n] for n in convs[1:-1]}
    grouped = {layer for layers in groups.values() for layer in layers}
    frozen = {owner_of(name) for name in mask.frozen}
    groups |= {layer: [layer] for layer in network.own if layer in frozen - grouped}
    order = {layer: i for i, layer in enumerate(network.own)}
    units = [_unit(network, name, layers) for name, layers in groups.items()]
    return sorted(units, key=lambda u: order[u.layers[0]])


def split(units: Sequence[Unit], granularity: str) -> list[Unit]:
    """One unit a tensor, where tensors are frozen separately; the same units otherwise."""
    if granularity != "tensor":
        return list(units)
    return [Unit(u.name, u.layers, {p: n}, u.block, u.resolution) for u in units for p, n in u.parameters.items()]


def describe(selection: object) -> Any:
    """A selection, score or strategy as JSON: a function by its name."""
    if isinstance(selection, Mapping):
        return {str(k): describe(v) for k, v in selection.items()}
    if isinstance(selection, str) or selection is None:
        return selection
    if isinstance(selection, Real):
        return int(selection) if isinstance(selection, Integral) else float(selection)
    if isinstance(selection, Iterable):
        return [describe(x) for x in selection]
    return getattr(selection, "__name__", type(selection).__name__)


def _unit(network: Network, name: str, layers: Sequence[str]) -> Unit:
    resolutions = (network.resolution(n) for n in (name, *layers))
    return Unit(
        name=name,
        layers=tuple(layers),
        parameters={p: n for layer in layers for p, n in network.own[layer].items()},
        block=network.block(name),
        resolution=next((r for r in resolutions if r is not None), None),
    )
