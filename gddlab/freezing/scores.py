"""Scores of candidates, from a probe: a statistic, a combination of statistics, or a function of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.candidates import Network, Unit
from gddlab.probing import ProbeResult
from gddlab.probing.layers import owner_of

Score = str | Mapping[str, float] | Callable[[ProbeResult], Any]
"""A statistic's name, {statistic: weight}, or a function that returns {layer: number} or a Series of that."""


def score_units(
    result: ProbeResult, network: Network, units: Sequence[Unit], score: Score, at: float
) -> tuple[dict[str, float], float | None]:
    """Scores of the units that have one, and the sigma at which they were read (None for a function of the probe).

    A unit takes its own value; else the mean of its layers' weighted by their parameters; else that of the block around
    it. A combination is the weighted mean of the units' ranks, 0 for the lowest and 1 for the highest, reversed where
    the weight is negative, over the units that have every statistic.

    Raises:
        GddlabError: An unknown statistic or layer; a bad weight or sigma; a score that is not finite, or equal
            everywhere.
    """
    if isinstance(score, str):
        return _of_statistic(result, units, score, at)
    if isinstance(score, Mapping):
        return _combined(result, units, score, at)
    if callable(score):
        return _of_units(units, _called(result, network, score), "the function's score"), None
    raise GddlabError(
        f"score={score!r}: give a statistic's name, {{statistic: weight}}, or a function of the ProbeResult"
    )


def _of_statistic(result: ProbeResult, units: Sequence[Unit], stat: str, at: float) -> tuple[dict[str, float], float]:
    sigma = result.nearest(at, stat)
    what = f"score {stat!r} at sigma {sigma:g}"
    column = result.frame[(result.frame["stat"] == stat) & (result.frame["sigma"] == sigma)]
    scores = _of_units(units, dict(zip(column["layer"], column["value"].astype(float), strict=True)), what)
    low, high = min(scores.values()), max(scores.values())
    if len(scores) > 1 and high - low <= 1e-9 * max(abs(low), abs(high)):  # as the cosine with the noise level itself
        raise GddlabError(f"{what} is {low:g} for every layer: give another score or at=")
    return scores, sigma


def _combined(
    result: ProbeResult, units: Sequence[Unit], weights: Mapping[str, float], at: float
) -> tuple[dict[str, float], float]:
    import pandas as pd

    if not weights:
        raise GddlabError(f"score is an empty mapping: give weights of {', '.join(result.stats)}")
    sigma = math.nan
    terms = {}
    for stat, weight in weights.items():
        values, sigma = _of_statistic(result, units, stat, at)
        if not is_number(weight) or weight == 0:
            raise GddlabError(f"weight {weight!r} of score {stat!r}: give a number other than 0, negative reverses it")
        terms[stat] = pd.Series(values)
    common = [name for name in next(iter(terms.values())).index if all(name in values for values in terms.values())]
    if not common:
        raise GddlabError(
            f"no layer that may be frozen has all of {', '.join(weights)}: take statistics of the same layers"
        )
    total = sum(abs(weight) for weight in weights.values())
    mean = pd.Series(0.0, index=common)
    for stat, column in terms.items():
        rank = (column[common].rank() - 1) / max(1, len(common) - 1)
        mean += abs(weights[stat]) / total * (rank if weights[stat] > 0 else 1 - rank)
    return {str(name): float(value) for name, value in mean.round(12).items()}, sigma  # equal ranks stay ties


def _called(result: ProbeResult, network: Network, score: Callable[[ProbeResult], Any]) -> dict[str, float]:
    import pandas as pd

    values = score(result)
    if not isinstance(values, Mapping | pd.Series):
        raise GddlabError(f"the score function returned a {type(values).__name__}: return {{layer: number}}")
    known = dict.fromkeys((*network.names, *result.frame["layer"]))
    for name, value in values.items():
        if name not in known:
            raise unknown("layer of the score function", name, known)
        if not isinstance(value, Real):
            raise GddlabError(f"the score function returned {value!r} for {name}: return a number")
    return {str(name): float(value) for name, value in values.items()}


def _of_units(units: Sequence[Unit], column: Mapping[str, float], what: str) -> dict[str, float]:
    found = {u.name: _of_unit(u, column) for u in units}
    scores = {name: value for name, value in found.items() if value is not None}
    if not scores:
        raise GddlabError(
            f"{what} says nothing of the {len(found)} layers that may be frozen: probe these, or take others"
        )
    for name, value in scores.items():
        if not math.isfinite(value):
            raise GddlabError(f"{what} is {value} for {name}: give another score, or put it into always_train=")
    return scores


def _of_unit(unit: Unit, column: Mapping[str, float]) -> float | None:
    if unit.name in column:
        return column[unit.name]
    measured = [layer for layer in unit.layers if layer in column]
    if measured:
        sizes = [sum(n for p, n in unit.parameters.items() if owner_of(p) == layer) for layer in measured]
        return sum(column[layer] * n for layer, n in zip(measured, sizes, strict=True)) / sum(sizes)
    return column.get(unit.block)


def is_number(value: object) -> TypeGuard[float]:
    """A finite number, no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
