"""Masks to compare a mask with: the opposite choice, and random ones, of equal budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from gddlab.errors import GddlabError
from gddlab.freezing.budgets import fill
from gddlab.freezing.candidates import Unit, recorded, split
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.scores import direction
from gddlab.freezing.strategies import names_of, shuffled

__all__ = ["controls"]


def controls(mask: FreezeMask, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, FreezeMask]:
    """Masks of equal budget over the same candidates: "inverse", "random-0", "random-1", ...

    The budget is the share of all parameters that `mask` freezes; it is not exceeded. The inverse freezes the candidates that `mask`
    trains, and then, where room is left, those that it froze last: both in the opposite order of the scores, unscored ones after scored;
    without scores in random order (seed 0). For a mask that records no candidates, as the rules on names, these are the
    convolutions but the first and the last, and whatever it freezes.

    Args:
        mask: What to compare with.
        seeds: Of the random masks.

    Raises:
        GddlabError: `mask` freezes nothing, or all of its candidates, so that there is no other choice; bad seeds.
    """
    if not isinstance(mask, FreezeMask):
        raise GddlabError(f"mask is a {type(mask).__name__}: give a FreezeMask")
    if not isinstance(seeds, Iterable) or not _distinct(seeds := [*seeds]):
        raise GddlabError(f"seeds={seeds!r}: give whole numbers, each once")
    units = recorded(mask)
    candidates = {u.name: u.layers for u in units}
    granularity = mask.arguments.get("granularity", "layer")
    parts = split(units, granularity)
    frozen = set(mask.frozen)
    trained = [u for u in parts if not frozen.issuperset(u.parameters)]
    if not frozen or not trained:
        what = "nothing" if not frozen else f"all of its {len(units)} candidates"
        raise GddlabError(f"this mask freezes {what}: no other choice has its budget, select one among more candidates")

    def of_equal_budget(ordered: Sequence[Unit], name: str, **arguments: Any) -> FreezeMask:
        chosen = names_of(fill(ordered, mask.n_frozen))
        about = {
            "mask": mask.hash,
            "of": mask.strategy,
            "granularity": granularity,
            **arguments,
            "budget": mask.fraction,
        }
        out = FreezeMask(tuple(chosen), mask.parameters, name, about, candidates=candidates)
        out.arguments["reached"] = out.fraction
        return out

    later = {id(u) for u in parts} - {id(u) for u in trained}
    order, about = _opposite(mask, parts)
    out = {"inverse": of_equal_budget(sorted(order, key=lambda u: id(u) in later), "inverse", **about)}
    return out | {f"random-{s}": of_equal_budget(shuffled(parts, s), "random", seed=int(s)) for s in seeds}


def _distinct(seeds: Sequence[object]) -> bool:
    return all(isinstance(s, Integral) and not isinstance(s, bool) for s in seeds) and len({*seeds}) == len(seeds)


def _opposite(mask: FreezeMask, parts: Sequence[Unit]) -> tuple[list[Unit], dict[str, Any]]:
    """Units in the opposite order of the mask's scores, or in random order; and what is to be said of it."""
    scores = mask.scores
    if not scores:
        return shuffled(parts[::-1], 0), {"seed": 0}  # reversed: not the order of "random-0"
    freeze = mask.arguments.get("freeze", "low")
    sign = -direction(freeze)
    about = {"score": mask.arguments.get("score"), "freeze": "high" if freeze == "low" else "low"}
    return sorted(parts, key=lambda u: sign * scores[u.name] if u.name in scores else math.inf), about
