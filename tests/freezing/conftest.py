"""A tiny network, what a probe finds in it, and helpers to read masks."""

from __future__ import annotations

import pytest

from gddlab.freezing import FreezeMask
from gddlab.nets import Precond
from gddlab.probing import ProbeResult, probe
from gddlab.probing.layers import Layer, inventory
from tests.probing.networks import tiny


@pytest.fixture(scope="session")
def result() -> ProbeResult:
    return probe(tiny(), [80.0, 1.0, 0.01], states="prior", n=3)


@pytest.fixture
def net() -> Precond:
    return tiny()


@pytest.fixture
def rule(net: Precond) -> FreezeMask:
    from gddlab.freezing import select_freeze

    return select_freeze(net, strategy="gdd-i")


def frozen_layers(mask: FreezeMask) -> list[str]:
    return list(dict.fromkeys(n.rpartition(".")[0] for n in mask.frozen))


def convs(net: Precond) -> dict[str, Layer]:
    """Convolutions between the first and the last: what may be frozen by default."""
    found = [(n, layer) for n, layer in inventory(net).items() if layer.type == "conv"]
    return dict(found[1:-1])


def with_values(result: ProbeResult, stat: str, values: dict[str, float]) -> ProbeResult:
    """The result with these values of a statistic at every sigma in place of those measured; other rows are dropped."""
    frame = result.frame[(result.frame["stat"] != stat) | result.frame["layer"].isin(list(values))].copy()
    rows = frame["stat"] == stat
    frame.loc[rows, "value"] = frame.loc[rows, "layer"].map(values)
    return result.copy(frame=frame)
