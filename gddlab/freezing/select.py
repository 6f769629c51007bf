"""`select_freeze`: ways of choosing a freeze mask, from names or from measurements."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.candidates import (
    DEFAULT,
    ENDS,
    Network,
    Selection,
    Source,
    Unit,
    choose,
    describe,
    recorded,
    split,
)
from gddlab.freezing.mask import FreezeMask, fingerprint
from gddlab.probing import ProbeResult
from gddlab.probing.layers import owner_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MEASURES",
    "PLACES",
    "RULES",
    "STRATEGIES",
    "USES",
    "Budget",
    "Score",
    "all_conv",
    "by_function",
    "checked",
    "direction",
    "fill",
    "fill_resolutions",
    "fill_share",
    "in_order",
    "is_number",
    "names_of",
    "norms_only",
    "published",
    "reached",
    "reached_by_resolution",
    "score_units",
    "select_freeze",
    "shuffled",
]

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


Score = str | Mapping[str, float] | Callable[[ProbeResult], "Mapping[str, float] | pd.Series"]


def score_units(
    result: ProbeResult, network: Network, units: Sequence[Unit], score: Score, at: float
) -> tuple[dict[str, float], float | None]:
    """Scores of the units that have one, and the sigma at which they were read (None for a function of the probe).

    A unit takes its own value; else the mean of its layers' weighted by their parameters; else that of the block it lies in.
    A combination is the weighted mean of the units' ranks, 0 for the lowest and 1 for the highest, turned round where the weight is
    negative, over the units that have every statistic.

    Raises:
        GddlabError: An unknown statistic or layer; a bad weight or sigma; a score that is not finite, or equal everywhere.
    """
    if isinstance(score, str):
        column, sigma = _column(result, score, at)
        return _of_statistic(units, column, score, sigma), sigma
    if isinstance(score, Mapping):
        return _combined(result, units, score, at)
    if callable(score):
        return _of_units(units, _called(result, network, score), "the function's score"), None
    raise GddlabError(
        f"score={score!r}: give a statistic's name, {{statistic: weight}}, or a function of the ProbeResult"
    )


def in_order(units: Sequence[Unit], scores: Mapping[str, float], freeze: str) -> list[Unit]:
    """Units with a score, those to freeze first; ties by depth."""
    sign = direction(freeze)
    return sorted((u for u in units if u.name in scores), key=lambda u: sign * scores[u.name])


def direction(freeze: str) -> int:
    if freeze not in ("low", "high"):
        raise unknown("freeze", freeze, ("low", "high"))
    return 1 if freeze == "low" else -1


def _column(result: ProbeResult, stat: str, at: float) -> tuple[dict[str, float], float]:
    """Values of a statistic by layer at the sigma nearest to `at` (log scale) of those it was measured at, and that sigma."""
    if not is_number(at) or not at > 0:
        raise GddlabError(f"at={at!r}: give a sigma above 0")
    sigma = min((float(s) for s in result.pivot(stat).columns), key=lambda s: abs(math.log(s / at)))
    rows = result.frame[(result.frame["stat"] == stat) & (result.frame["sigma"] == sigma)]
    return {str(name): float(value) for name, value in zip(rows["layer"], rows["value"], strict=True)}, sigma


def _combined(
    result: ProbeResult, units: Sequence[Unit], weights: Mapping[str, float], at: float
) -> tuple[dict[str, float], float]:
    import pandas as pd

    if not weights:
        raise GddlabError(f"score is an empty mapping: give weights of {', '.join(result.stats)}")
    sigma = math.nan
    terms = []
    for stat, weight in weights.items():
        column, sigma = _column(result, stat, at)
        if not is_number(weight) or weight == 0:
            raise GddlabError(
                f"weight {weight!r} of score {stat!r}: give a number other than 0, negative turns it round"
            )
        values = pd.Series(_of_statistic(units, column, stat, sigma))
        terms.append((values, float(weight)))
    common = terms[0][0].index
    for values, _ in terms[1:]:
        common = common[common.isin(values.index)]
    if not len(common):
        raise GddlabError(
            f"no layer that may be frozen has all of {', '.join(weights)}: take statistics of the same layers"
        )
    total = sum(abs(weight) for _, weight in terms)
    mean = pd.Series(0.0, index=common)
    for values, weight in terms:
        rank = (values[common].rank() - 1) / max(1, len(common) - 1)
        mean += abs(weight) / total * (rank if weight > 0 else 1 - rank)
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


def _of_statistic(units: Sequence[Unit], column: Mapping[str, float], stat: str, sigma: float) -> dict[str, float]:
    what = f"score {stat!r} at sigma {sigma:g}"
    scores = _of_units(units, column, what)
    low, high = min(scores.values()), max(scores.values())
    if len(scores) > 1 and high - low <= 1e-9 * max(abs(low), abs(high)):  # as the cosine with the noise level itself
        raise GddlabError(f"{what} is {low:g} for every layer: give another score or at=")
    return scores


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
        return _mask(network, by_function(network, source, strategy), describe(strategy))
    if strategy == "none":
        return _mask(network, (), strategy)
    if strategy == "norms-only":
        return _mask(network, norms_only(network), strategy)
    if strategy in RULES:
        return _mask(network, published(network, strategy), strategy)

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
        return _mask(network, all_conv(network, units), strategy, arguments, candidates=record)
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
