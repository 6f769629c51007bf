"""What a mask is chosen among: layers, blocks, or single tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.network import Network, Selection, around
from gddlab.probing.layers import owner_of

__all__ = ["DEFAULT", "GRANULARITIES", "Unit", "choose", "describe", "recorded", "split"]

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
