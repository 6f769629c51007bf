"""Rules on names and types of layers: what they freeze needs no measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.candidates import Unit
from gddlab.freezing.network import Network, Source

__all__ = ["PLACES", "RULES", "all_conv", "by_function", "norms_only", "published"]

RULES = {"gdd-i": ("conv", "proj"), "gdd-i-2": ("conv", "proj", "qkv"), "gdd-i-3": ("conv", "proj", "qkv", "skip")}
"""GDD-I's options 1, 2 and 3 (Zheng & Yang 2024): words of which a frozen parameter's name contains one."""

PLACES = ("block", "up", "down", "in")
"""... and words of which it contains another: the released code looks for substrings of the whole name."""


def published(network: Network, rule: str) -> list[str]:
    names = [name for name, _ in network.parameters]
    return [n for n in names if _contains(n, PLACES) and _contains(n, RULES[rule])]


def all_conv(network: Network, units: Sequence[Unit]) -> list[str]:
    layers = [layer for u in units for layer in u.layers if network.type(layer) == "conv"]
    if not layers:
        raise GddlabError('no candidate is a convolution: give candidates="conv", or another strategy')
    return [p for layer in layers for p in network.own[layer]]


def norms_only(network: Network) -> list[str]:
    norms = {n for n in network.own if network.type(n) == "norm"}
    if not norms:
        raise GddlabError("this network has no norm layer with parameters: nothing would be left to train")
    return [p for layer, own in network.own.items() if layer not in norms for p in own]


def by_function(network: Network, source: Source, function: Callable[[Any], Iterable[str]]) -> list[str]:
    """Names of parameters, or of layers for all parameters inside, that a function of the source returns."""
    names = function(source)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise GddlabError(f"the strategy returned a {type(names).__name__}: return names of parameters or layers")
    parameters = [name for name, _ in network.parameters]
    known = {*parameters, *network.names}
    out = []
    for name in names:
        if name not in known:
            raise unknown("parameter or layer of the strategy", name, [*network.names, *parameters])
        out += [p for p in parameters if p == name or p.startswith(f"{name}.")]
    return out


def _contains(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)
