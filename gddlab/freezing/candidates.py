"""Lists what a mask may freeze (layers, blocks or tensors), orders it by a score, and takes as many as fit."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from gddlab.errors import GddlabError, shown
from gddlab.freezing.mask import FreezeMask, Parameters, parameters_of
from gddlab.freezing.strategies import AUTO
from gddlab.probing import ProbeResult
from gddlab.probing.layers import (
    Layer,
    LayerSelection,
    inventory,
    match_layers,
    owner_of,
    plain_name,
    role_of,
    select_layers,
    stage_and_resolution,
)

ENDS = ("first", "last")
"""First and last convolution of a network outside of MLPs: trained unless the call says otherwise."""

_WEIGHT = re.compile(r"weight|parametrizations\.weight\.")


class Network:
    """Layers of a network with what is known of each, from the network, its probe, or a parameter table alone.

    Attributes:
        parameters: Names and shapes.
        own: Sizes of each layer's own parameters, by layer and parameter.
        names: Modules with parameters of their own or inside, in the order of the network.
    """

    def __init__(self, source: ProbeResult | nn.Module | Parameters):
        self.model = source if isinstance(source, nn.Module) else None
        self.parameters: Parameters
        self._known: dict[str, Layer] = {}
        if isinstance(source, nn.Module):
            self.parameters, self._known = parameters_of(source), inventory(source)
        elif isinstance(source, ProbeResult):
            self.parameters = tuple((name, tuple(shape)) for name, shape in source.meta["parameters"])
            self._known = {plain_name(layer["name"]): Layer(**layer) for layer in source.meta["layers"]}
        else:
            self.parameters = source
        self._shapes = dict(self.parameters)
        self.own: dict[str, dict[str, int]] = {}
        names: dict[str, None] = {}
        for parameter, shape in self.parameters:
            layer = owner_of(parameter)
            self.own.setdefault(layer, {})[parameter] = prod(shape)
            names |= dict.fromkeys(reversed([*_around(layer)]))
        self.names = list(names)

    @property
    def n_params(self) -> int:
        return sum(prod(shape) for _, shape in self.parameters)

    def type(self, name: str) -> str:
        """ "block", "conv", "linear", "norm", or ""; a parameter table alone shows convolutions only."""
        if self._known:
            return self._known[name].type if name in self._known else ""
        weights = (p for p in self.own.get(name, ()) if _WEIGHT.match(p[len(name) + 1 :]))
        return "conv" if any(len(self._shapes[p]) == 4 for p in weights) else ""

    def role(self, name: str) -> str:
        """What a layer with parameters of its own, or a parameter, is there for; "" where nothing says."""
        if name in self._shapes:
            return self.role(owner_of(name)) or role_of(name)
        known = self._known[name].role if name in self._known else ""
        return known or (role_of(name) if name in self.own else "")

    def auto(self) -> set[str]:
        """Convolutions; where there are MLPs, so transformer blocks, projections of attention and MLPs too."""
        roles = {n: self.role(n) for n in self.own}
        more = AUTO if "mlp" in roles.values() else ()
        return {n for n, role in roles.items() if role in more or self.type(n) == "conv"}

    def block(self, name: str) -> str:
        """The residual block around a layer; "" outside of blocks."""
        return next((self._known[n].block for n in _around(name) if n in self._known), "")

    def resolution(self, name: str) -> int | None:
        known = self._known[name].resolution if name in self._known else None
        return stage_and_resolution(name)[1] if known is None else known

    def select(self, selection: LayerSelection, what: str) -> list[str]:
        """Names that a selection of layers means; `what` is the argument's name."""
        if callable(selection):
            if self.model is None:
                raise GddlabError(f"{what} is a function of modules: give the network as source, or names or globs")
            found = {layer.name for layer in select_layers(self.model, selection)}
        else:
            found, items = set(), [selection] if isinstance(selection, str) else selection
            if isinstance(items, Iterable) and "auto" in (items := list(items)):
                found, items = self.auto(), [item for item in items if item != "auto"]
            if items or not found:
                types, roles = {n: self.type(n) for n in self.names}, {n: self.role(n) for n in self.names}
                found |= match_layers(items, types, what, roles)
        return [n for n in self.names if n in found]

    def ends(self, always_train: str | Iterable[str]) -> set[str]:
        """Names that `always_train` means, "first" and "last" among them."""
        if not isinstance(always_train, Iterable):
            raise GddlabError(f"always_train={shown(always_train)}: give first, last, names, globs, or a list of these")
        convs = [n for n in self.own if self.type(n) == "conv" and self.role(n) != "mlp"]
        out: set[str] = set()
        for item in [always_train] if isinstance(always_train, str) else always_train:
            if item in ENDS:
                out |= set(convs[:1] if item == "first" else convs[-1:])
            else:
                out |= set(self.select([item], "always_train"))
        return out

    def unit(self, name: str, layers: Sequence[str]) -> Unit:
        """Some layers' own parameters, under the name of a layer or block."""
        resolutions = (self.resolution(n) for n in (name, *layers))
        return Unit(
            name=name,
            layers=tuple(layers),
            parameters={p: n for layer in layers for p, n in self.own[layer].items()},
            block=self.block(name),
            resolution=next((r for r in resolutions if r is not None), None),
        )


def _around(name: str) -> Iterator[str]:
    """A layer and the modules around it, from inside out, without the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]


@dataclass(frozen=True)
class Unit:
    """What is frozen together: parameters (name -> size) of some layers, under the name of a layer or block."""

    name: str
    layers: tuple[str, ...]
    parameters: dict[str, int]
    block: str = ""
    resolution: int | None = None

    def cost(self, unit: str) -> int:
        """What it takes from a budget: its "params", or 1 of the "layers"."""
        return sum(self.parameters.values()) if unit == "params" else 1


def choose(
    network: Network, candidates: LayerSelection, always_train: str | Iterable[str], granularity: str
) -> list[Unit]:
    """Units of the selected layers in the order of the network; a parameter goes to the innermost selected layer."""
    selected = set(network.select(candidates, "candidates"))
    trained = network.ends(always_train)
    groups: dict[str, list[str]] = {}
    for layer in network.own:
        path = [*_around(layer)]
        inside = next((n for n in path if n in selected), None)
        if inside is not None and trained.isdisjoint(path):
            block = network.block(layer) if granularity == "block" else ""
            groups.setdefault(block or inside, []).append(layer)
    if not groups:
        raise GddlabError(
            f"candidates={describe(candidates)!r} without always_train={describe(always_train)!r} leaves no layer to "
            'freeze: give candidates=, such as "linear", "all" or names'
        )
    return [network.unit(name, layers) for name, layers in groups.items()]


def recorded(mask: FreezeMask) -> list[Unit]:
    """What a mask was chosen among; for a rule on roles, the candidates by default, and what it freezes."""
    network = Network(mask.parameters)
    if mask.candidates is not None:
        groups = {name: list(layers) for name, layers in mask.candidates.items()}
    else:
        among = network.auto() - network.ends(ENDS)
        groups = {n: [n] for n in network.own if n in among}
    grouped = {layer for layers in groups.values() for layer in layers}
    frozen = {owner_of(name) for name in mask.frozen}
    groups |= {layer: [layer] for layer in network.own if layer in frozen - grouped}
    order = {layer: i for i, layer in enumerate(network.own)}
    units = [network.unit(name, layers) for name, layers in groups.items()]
    return sorted(units, key=lambda u: order[u.layers[0]])


def split(units: Sequence[Unit], granularity: str) -> list[Unit]:
    """One unit per tensor, where tensors are frozen separately; the same units otherwise."""
    if granularity != "tensor":
        return list(units)
    return [Unit(u.name, u.layers, {p: n}, u.block, u.resolution) for u in units for p, n in u.parameters.items()]


def shuffled(units: Sequence[Unit], seed: int) -> list[Unit]:
    out = list(units)
    random.Random(int(seed)).shuffle(out)
    return out


def fill(ordered: Iterable[Unit], room: int, unit: str = "params") -> list[Unit]:
    """Takes whole units in order, each that still fits into `room` numbers, or units."""
    chosen = []
    for u in ordered:
        if (cost := u.cost(unit)) <= room:
            chosen.append(u)
            room -= cost
    return chosen


def names_of(units: Iterable[Unit]) -> list[str]:
    return [p for u in units for p in u.parameters]


def describe(selection: object) -> Any:
    """A selection, score or strategy as JSON: a function by its name."""
    if isinstance(selection, Mapping):
        return {str(k): describe(v) for k, v in selection.items()}
    if isinstance(selection, str) or selection is None:
        return selection
    if isinstance(selection, Tensor):
        return selection.tolist()
    if isinstance(selection, Real):
        return int(selection) if isinstance(selection, Integral) else float(selection)
    if isinstance(selection, Iterable):
        return [describe(x) for x in selection]
    return getattr(selection, "__name__", type(selection).__name__)
