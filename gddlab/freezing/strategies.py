"""`select_freeze`: ways of choosing a freeze mask, from names or from measurements."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gddlab.errors import GddlabError
from gddlab.freezing import rules
from gddlab.freezing.budgets import Budget, fill_resolutions, fill_share, reached, reached_by_resolution
from gddlab.freezing.candidates import DEFAULT, Unit, choose, describe, recorded, split
from gddlab.freezing.mask import FreezeMask, fingerprint
from gddlab.freezing.network import ENDS, Network, Selection, Source
from gddlab.freezing.options import USES, checked
from gddlab.freezing.rules import RULES
from gddlab.freezing.scores import Score, direction, in_order, score_units
from gddlab.probing import ProbeResult

__all__ = ["names_of", "select_freeze", "shuffled"]


@checked
def select_freeze(
    source: Source,
    *,
    strategy: str | Callable[[Any], Iterable[str]],
    score: Score | None = None,
    at: float = 80.0,
    freeze: str = "low",
    budget: Budget = 0.85,
    unit: str = "params",
    granularity: str = "layer",
    candidates: Selection | None = None,
    always_train: str | Iterable[str] = ENDS,
    seed: int = 0,
    mask: FreezeMask | None = None,
    threshold: float | None = None,
) -> FreezeMask:
    """Chooses which parameters to freeze.

    Strategies:
        "gdd-i", "gdd-i-2", "gdd-i-3": The published rules on names, options 1 to 3 (Zheng & Yang 2024).
        "none": Nothing is frozen: GDD.
        "all-conv": Every candidate convolution is frozen.
        "norms-only": Norm layers are trained, all else is frozen.
        "budget": Candidates in the order of a measured `score`, ties by depth; each is frozen whole if it still fits.
        "per-resolution": The same within each resolution.
        "threshold": Candidates with a score of at most (at least, for `freeze="high"`) `threshold` are frozen.
        "random": Candidates in random order fill the budget; with `mask`, its share is the budget.
        "invert": Candidates that `mask` trains are frozen, those it freezes are trained, nothing else is frozen. (For the
            opposite choice of equal budget see `controls`.)
        A function of `source` that returns names of parameters or layers to freeze.

    Args:
        source: A probe's result, or a network where nothing measured is needed.
        strategy: One of the above.
        score: A statistic's name; {statistic: weight}, the weighted mean of ranks among candidates, 0 to 1, turned round by a negative
            weight; or a function of the probe's result that returns {layer: number}. A block's value counts for its layers
            that have none. Candidates without a score are trained, and counted as "unscored".
        at: Sigma at which statistics are read, the nearest one probed (log scale).
        freeze: "low" or "high" scores first.
        budget: Share to freeze, not exceeded: of all parameters, between 0 and 1. For "per-resolution": of the candidates' at each
            resolution, or {resolution: share}, others trained.
        unit: "params", or "layers": the budget is a share of the number of candidates.
        granularity: What is frozen together: "layer"; "block", its candidates, by the block's own value or else their mean
            weighted by parameters; "tensor", weight and bias apart.
        candidates: Layers that may be frozen, "conv" if not given: a preset ("conv", "linear", ...), names, globs, "re:..."; with a network as source
            also a function of name and module. A block or container stands for all that is inside.
        always_train: Candidates to leave out: "first" and "last" convolution of the network, names, globs.
        seed: Of "random".
        mask: For "invert", and for "random" if wished; its candidates are kept if none are given.
        threshold: On the scale of the score.

    Returns:
        The mask; its arguments say what was asked and reached.

    Raises:
        GddlabError: Unknown strategy, score, layer; a budget out of reach; a score that is not finite; something missing that the
            strategy needs, or given that it does not use.
    """
    network = Network(source)
    if mask is not None and mask.fingerprint != fingerprint(network.parameters):
        raise GddlabError(f"mask= ({mask.n_params:,} parameters) is for another network than source")
    if not isinstance(strategy, str):
        return _mask(network, rules.by_function(network, source, strategy), describe(strategy))
    if strategy == "none":
        return _mask(network, (), strategy)
    if strategy == "norms-only":
        return _mask(network, rules.norms_only(network), strategy)
    if strategy in RULES:
        return _mask(network, rules.published(network, strategy), strategy)

    if mask is not None and candidates is None:
        units = recorded(mask)
        granularity = mask.arguments.get("granularity", "layer")
    else:
        candidates, always_train = _kept(DEFAULT if candidates is None else candidates), _kept(always_train)
        units = choose(network, candidates, always_train, granularity)
    given = {
        **{"score": score, "at": None if callable(score) else at, "freeze": freeze, "threshold": threshold},
        **{"budget": budget, "unit": unit, "granularity": granularity, "seed": seed},
        **{"candidates": candidates, "always_train": None if candidates is None else always_train},
        "mask": None if mask is None else mask.hash,
    }
    arguments = {name: describe(given[name]) for name in USES[strategy] if given[name] is not None}
    record = {u.name: u.layers for u in units}
    if strategy == "all-conv":
        return _mask(network, rules.all_conv(network, units), strategy, arguments, candidates=record)
    if strategy == "invert":
        assert mask is not None
        still = set(mask.frozen)
        turned = [p for u in units for p in u.parameters if p not in still]
        return _mask(network, turned, strategy, arguments, candidates=record)
    if strategy == "random":
        parts = shuffled(split(units, granularity), seed)
        arguments["budget"] = share = budget if mask is None else mask.fraction
        chosen = fill_share(parts, share, units=parts, network=network, unit=unit)
        arguments["reached"] = reached(chosen, parts, unit, network)
        return _mask(network, names_of(chosen), strategy, arguments, candidates=record)

    assert isinstance(source, ProbeResult) and score is not None
    scores, sigma = score_units(source, network, units, score, at)
    parts = split(units, granularity)
    ordered = in_order(parts, scores, freeze)
    arguments |= {"sigma": sigma, "unscored": len(units) - len(scores)}
    if strategy == "threshold":
        assert threshold is not None
        sign = direction(freeze)
        chosen = [u for u in ordered if sign * scores[u.name] <= sign * threshold]
    elif strategy == "budget":
        chosen = fill_share(ordered, budget, units=parts, network=network, unit=unit)
        arguments["reached"] = reached(chosen, parts, unit, network)
    else:
        chosen = fill_resolutions(ordered, budget, units=parts, unit=unit)
        arguments["reached"] = reached_by_resolution(chosen, parts, unit)
        arguments["unplaced"] = sum(u.resolution is None for u in units)
    return _mask(network, names_of(chosen), strategy, arguments, scores, source.hash, record)


def _kept(selection: Any) -> Any:
    """A generator would be empty when it is read again."""
    return selection if isinstance(selection, str) or not isinstance(selection, Iterable) else tuple(selection)


def shuffled(units: Sequence[Unit], seed: int) -> list[Unit]:
    out = list(units)
    random.Random(int(seed)).shuffle(out)
    return out


def names_of(units: Iterable[Unit]) -> list[str]:
    return [p for u in units for p in u.parameters]


def _mask(
    network: Network,
    frozen: Iterable[str],
    strategy: str,
    arguments: dict[str, Any] | None = None,
    scores: dict[str, float] | None = None,
    probe_hash: str | None = None,
    candidates: dict[str, tuple[str, ...]] | None = None,
) -> FreezeMask:
    """The mask; where no budget was asked, what it reached is its share of all parameters."""
    out = FreezeMask(tuple(frozen), network.parameters, strategy, arguments or {}, scores, probe_hash, candidates)
    out.arguments.setdefault("reached", out.fraction)
    return out
