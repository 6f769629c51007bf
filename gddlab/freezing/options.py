"""Options of each strategy, and refusals of those that have no meaning for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any, ParamSpec

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.candidates import describe
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.rules import RULES
from gddlab.freezing.scores import is_number
from gddlab.probing import ProbeResult

__all__ = ["STRATEGIES", "USES", "checked"]

_AMONG = ("candidates", "always_train")
_MEASURED = ("score", "at", "freeze", "granularity", *_AMONG)

USES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(RULES, ()),
    "none": (),
    "norms-only": (),
    "all-conv": _AMONG,
    "budget": ("budget", "unit", *_MEASURED),
    "per-resolution": ("budget", "unit", *_MEASURED),
    "threshold": ("threshold", *_MEASURED),
    "random": ("budget", "unit", "granularity", "seed", "mask", *_AMONG),
    "invert": ("mask", *_AMONG),
}
"""Options of each strategy."""

STRATEGIES = tuple(USES)

Select = ParamSpec("Select")


def checked(select: Callable[Select, FreezeMask]) -> Callable[Select, FreezeMask]:
    """`select_freeze` behind a check of the options that its caller gave; None counts as not given."""
    signature = inspect.signature(select)

    @functools.wraps(select)
    def call(*args: Select.args, **kwargs: Select.kwargs) -> FreezeMask:
        given = signature.bind(*args, **kwargs).arguments
        source, strategy = given.pop("source"), given.pop("strategy")
        _check(source, strategy, {name: value for name, value in given.items() if value is not None})
        for name in [n for n, value in kwargs.items() if value is None]:
            del kwargs[name]
        return select(*args, **kwargs)

    return call


def _check(source: object, strategy: object, given: dict[str, Any]) -> None:
    """Refuses options that the strategy does not use, and misses those that it needs."""
    if not isinstance(source, ProbeResult | nn.Module):
        raise GddlabError(f"source is a {type(source).__name__}: give a ProbeResult or a network")
    if isinstance(source, nn.Module) and next(source.parameters(), None) is None:
        raise GddlabError(f"this {type(source).__name__} has no parameters: there is nothing to freeze")
    if not callable(strategy) and strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    shown = f'strategy="{strategy}"' if isinstance(strategy, str) else "a function as strategy"
    used = USES[strategy] if isinstance(strategy, str) else ()
    for name in (n for n in given if n not in used):
        others = " or ".join(f'"{s}"' for s in STRATEGIES if name in USES[s])
        raise GddlabError(
            f"{name}={describe(given[name])!r} has no meaning for {shown}: leave it away, or take {others}"
        )
    if "mask" in given:
        _check_mask(given)
    elif strategy == "invert":
        raise GddlabError('strategy="invert" turns a mask round: give mask=')
    seed = given.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise GddlabError(f"seed={seed!r}: give a whole number")
    if "score" in used:
        if not isinstance(source, ProbeResult):
            raise GddlabError(f"{shown} orders layers by a measurement: give the ProbeResult of probe(...)")
        if "score" not in given:
            raise GddlabError(f"{shown} needs score=: accepted are {', '.join(source.stats)}, combinations, functions")
        if "at" in given and callable(given["score"]):
            raise GddlabError(f"at={given['at']!r} has no meaning for a score function: leave it away")
    threshold = given.get("threshold")
    if "threshold" in used and not is_number(threshold):
        raise GddlabError(f"threshold={threshold!r}: give a number on the scale of the score")


def _check_mask(given: dict[str, Any]) -> None:
    mask = given["mask"]
    if not isinstance(mask, FreezeMask):
        raise GddlabError(f"mask is a {type(mask).__name__}: give a FreezeMask, or FreezeMask.load(path)")
    for name in (n for n in ("budget", "unit") if n in given):
        raise GddlabError(f"{name}={given[name]!r} and mask=: the mask's share is the budget, leave one away")
    for kept in (n for n in ("granularity", "always_train") if n in given and "candidates" not in given):
        raise GddlabError(f"{kept}={describe(given[kept])!r} and mask=: the mask's are kept, or give candidates= too")
