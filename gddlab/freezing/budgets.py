"""Filling a budget: units in order, each that still fits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.candidates import Unit
from gddlab.freezing.network import Network
from gddlab.freezing.scores import is_number

__all__ = ["MEASURES", "Budget", "fill", "fill_resolutions", "fill_share", "reached", "reached_by_resolution"]

MEASURES = ("params", "layers")
Budget = float | Mapping[int, float]


def fill(ordered: Iterable[Unit], room: int, unit: str = "params") -> list[Unit]:
    """Takes whole units in order, each that still fits into `room` numbers, or units."""
    chosen = []
    for u in ordered:
        if (cost := _cost(u, unit)) <= room:
            chosen.append(u)
            room -= cost
    return chosen


def fill_share(
    ordered: Sequence[Unit], budget: object, *, units: Sequence[Unit], network: Network, unit: str
) -> list[Unit]:
    """Fills a share of all parameters, or of the number of candidate `units`, of which `ordered` may be frozen.

    Raises:
        GddlabError: A budget that is no share, or cannot be reached.
    """
    whole, what = (network.n_params, "parameters") if _measure(unit) == "params" else (len(units), "candidates")
    if not is_number(budget) or not 0 < budget < 1:
        raise GddlabError(f"budget={budget!r}: give a share of all {what} above 0 and below 1")
    return fill(ordered, _room(ordered, float(budget), whole, unit, f"all {what}"), unit)


def fill_resolutions(ordered: Sequence[Unit], budget: object, *, units: Sequence[Unit], unit: str) -> list[Unit]:
    """Fills a share of the candidates' parameters, or number, at each resolution. What has no resolution is left out.

    Raises:
        GddlabError: A budget that is no share, or cannot be reached; an unknown resolution; no candidate has one.
    """
    _measure(unit)
    known = sorted({u.resolution for u in units if u.resolution is not None}, reverse=True)
    if not known:
        raise GddlabError('no candidate has a resolution, in its name or from its probe: take strategy="budget"')
    budgets = budget if isinstance(budget, Mapping) else dict.fromkeys(known, budget)
    if not budgets:
        raise GddlabError("budget={}: give a share for at least one resolution, such as {16: 0.8}")
    chosen = []
    for key, share in budgets.items():
        resolution = int(key) if str(key).isdecimal() else key  # JSON has strings
        if resolution not in known:
            raise unknown("resolution in budget", key, map(str, known))
        if not is_number(share) or not 0 <= share <= 1:
            raise GddlabError(f"budget {share!r} at resolution {resolution}: give a share of its candidates, 0 to 1")
        whole = sum(_cost(u, unit) for u in units if u.resolution == resolution)
        here = [u for u in ordered if u.resolution == resolution]
        chosen += fill(here, _room(here, float(share), whole, unit, f"the candidates at resolution {resolution}"), unit)
    return chosen


def reached(chosen: Iterable[Unit], units: Sequence[Unit], unit: str, network: Network) -> float:
    """The share that was filled, as in `fill_share`."""
    whole = network.n_params if unit == "params" else len(units)
    return sum(_cost(u, unit) for u in chosen) / whole


def reached_by_resolution(chosen: Iterable[Unit], units: Sequence[Unit], unit: str) -> dict[str, float]:
    """The shares that were filled, as in `fill_resolutions`."""
    cost: Counter[int] = Counter()
    taken: Counter[int] = Counter()
    for sums, some in ((cost, units), (taken, chosen)):
        for u in some:
            if u.resolution is not None:
                sums[u.resolution] += _cost(u, unit)
    return {str(r): taken[r] / cost[r] for r in sorted(cost, reverse=True)}


def _measure(unit: str) -> str:
    if unit not in MEASURES:
        raise unknown("unit", unit, MEASURES)
    return unit


def _cost(u: Unit, unit: str) -> int:
    return u.size if unit == "params" else 1


def _room(ordered: Sequence[Unit], budget: float, whole: int, unit: str, what: str) -> int:
    reachable = sum(_cost(u, unit) for u in ordered) / whole
    if budget > reachable:
        raise GddlabError(
            f"budget={budget:g}: the {len(ordered)} layers that may be frozen hold {reachable:.4f} of {what}, "
            f"give at most {math.floor(reachable * 1e4) / 1e4:.4f}"
        )
    return math.floor(budget * whole + 1e-3)  # another mask's share comes back whole
