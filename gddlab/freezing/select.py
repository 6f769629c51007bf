"""`select_freeze`: a mask by a rule on roles of layers, or from candidates, their scores and a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard

from pydantic import Field, SkipValidation
from torch import nn

from gddlab.errors import GddlabError, check_takes, unknown, validated, warn
from gddlab.freezing.candidates import ENDS, Network, Unit, choose, describe, fill, names_of, recorded, shuffled, split
from gddlab.freezing.mask import FreezeMask, fingerprint
from gddlab.freezing.strategies import AMONG, RULES, STRATEGIES, UNDERSTOOD, USES, USUAL
from gddlab.nets.bare import unwrap
from gddlab.probing import ProbeResult
from gddlab.probing.layers import LayerSelection, owner_of
from gddlab.probing.sites import layer_of

if TYPE_CHECKING:
    import pandas as pd

Score = str | Mapping[str, float] | Callable[[ProbeResult], Any]
"""A statistic's name, {statistic: weight}, or a function that returns {layer: number} or a Series of that."""


FAR = 10
"""By which factor the noise level asked for may differ from the nearest one measured."""


@dataclass(frozen=True)
class Options:
    """The options of a strategy and their defaults."""

    score: Score | None = None
    at: float = 80.0
    freeze: str = "low"
    budget: float | Mapping[int, float] = 0.85
    unit: str = "params"
    granularity: str = "layer"
    candidates: LayerSelection = "auto"
    always_train: str | Iterable[str] = ENDS
    seed: int = 0
    mask: FreezeMask | None = None
    threshold: float | None = None

    @property
    def sign(self) -> int:
        """Factor of scores: what is frozen first has the lowest product."""
        return 1 if self.freeze == "low" else -1


@validated
def select_freeze(
    source: Any,
    *,
    strategy: Any,
    score: SkipValidation[Score | None] = None,
    at: SkipValidation[float | None] = None,
    freeze: Literal["low", "high"] | None = None,
    budget: SkipValidation[float | Mapping[int, float] | None] = None,
    unit: Literal["params", "layers"] | None = None,
    granularity: Literal["layer", "block", "tensor"] | None = None,
    candidates: LayerSelection | None = None,
    always_train: SkipValidation[str | Iterable[str] | None] = None,
    seed: int | None = None,
    mask: SkipValidation[FreezeMask | None] = None,
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None,
) -> FreezeMask:
    """Chooses which parameters to freeze.

    Strategies:
        "gdd-i", "gdd-i-2", "gdd-i-3": The published rules, options 1 to 3 (Zheng & Yang 2024), by what layers are there
            for: 1 freezes the convolutions of residual blocks, MLPs, and projections out of and around attention; 2 the
            projections into attention too; 3 those on skip paths too. Norms, modulation, embeddings, gains, first and
            last layers are trained. In EDM's networks these are the parameters that the released code freezes.
        "none": Nothing is frozen: GDD.
        "all-conv": Every candidate convolution is frozen.
        "norms-only": Norm layers are trained, all else is frozen.
        "budget": Candidates in the order of a measured `score`, ties by depth; each is frozen whole if it still fits.
        "per-resolution": The same within each resolution.
        "threshold": Candidates with a score of at most (at least, for `freeze="high"`) `threshold` are frozen.
        "random": Candidates in random order fill the budget; with `mask`, its share is the budget.
        "invert": Candidates that `mask` trains are frozen, those it freezes are trained, nothing else is frozen. (For
            the opposite choice of equal budget see `controls`.)
        A function of `source` that returns names of parameters or layers to freeze.

    A warning says where less than 1 % or more than 99.5 % of the parameters are frozen, unless by "none".

    Args:
        source: A probe's result, or a network where nothing measured is needed.
        strategy: One of the above.
        score: A statistic's name. In Python also {statistic: weight}, the weighted mean of ranks among candidates, 0 to
            1, reversed by a negative weight, or a function of the probe's result that returns {layer: number}. A
            block's value counts for its layers that have none. Where a layer was measured in several streams or
            branches of guidance, the image's and the condition's count; where it ran several times, the mean.
            Candidates without a score are trained, and counted as "unscored".
        at: Sigma at which statistics are read, the nearest one probed (log scale); 80 by default.
        freeze: "low" (the default) or "high" scores first.
        budget: Share to freeze, not exceeded; 0.85 by default: of all parameters, between 0 and 1. For
            "per-resolution": of the candidates' at each resolution. In Python also {resolution: share}, others trained.
        unit: "params" (the default), or "layers": the budget is a share of the number of candidates.
        granularity: What is frozen together: "layer" (the default); "block", its candidates, by the block's own value
            or else their mean weighted by parameters; "tensor", weight and bias separately.
        candidates: Layers that may be frozen: a preset ("conv", "attention", "mlp", ...), names, globs, "re:...". By
            default "auto": the convolutions, and where there are transformer blocks their attention and MLPs too. In
            Python, with a network as source, also a function of name and module. A block or container includes all that
            is inside.
        always_train: Candidates to omit, "first" and "last" convolution of the network by default, those in MLPs not
            counted; names, globs.
        seed: Of "random"; 0 by default.
        mask: Required by "invert", optional for "random"; its candidates are kept if none are given.
        threshold: On the scale of the score.

    Returns:
        The mask; its arguments say what was asked and reached.

    Raises:
        GddlabError: Unknown strategy, score, layer; a budget out of reach; a score that is not finite; an option that
            the strategy needs is missing, or one is given that it does not use; a rule for a network less than 95 % of
            which has a role; quantised weights.
    """
    options: dict[str, Any] = {"score": score, "at": at, "freeze": freeze, "budget": budget, "unit": unit}
    options |= {"granularity": granularity, "candidates": candidates, "always_train": always_train}
    options |= {"seed": seed, "mask": mask, "threshold": threshold}
    # a generator would be empty when it is read again
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, Iterator) else v for k, v in options.items() if v is not None}
    _check(source, strategy, given)
    network = Network(source)
    if mask is not None and mask.fingerprint != fingerprint(network.parameters):
        raise GddlabError(f"mask= ({mask.n_params:,} parameters) is for another network than source")
    chosen = _chosen(source, network, strategy, Options(**given), "candidates" in given)
    if strategy != "none" and not USUAL[0] <= chosen.fraction <= USUAL[1]:
        text = f'strategy="{chosen.strategy}" freezes {chosen.fraction:.2%} of this network: see mask.summary()'
        warn(text)
    return chosen


def _chosen(source: Any, network: Network, strategy: Any, o: Options, chosen_anew: bool) -> FreezeMask:
    if not isinstance(strategy, str):
        return _mask(network, _by_function(network, source, strategy), describe(strategy))
    if strategy in RULES:
        return _mask(network, _by_role(network, strategy), strategy, {"roles": list(RULES[strategy])})
    if strategy == "norms-only":
        return _mask(network, _norms_only(network), strategy)
    if strategy == "none":
        return _mask(network, (), strategy)
    return _among_candidates(source, network, strategy, o, chosen_anew)


def _among_candidates(source: Any, network: Network, strategy: str, o: Options, chosen_anew: bool) -> FreezeMask:
    """The mask of a strategy that orders candidates; those of `o.mask` are kept unless they are `chosen_anew`."""
    mask = o.mask
    if mask is not None and not chosen_anew:
        units, together = recorded(mask), mask.arguments.get("granularity", "layer")
        among: dict[str, Any] = dict.fromkeys(AMONG)
    else:
        units, together = choose(network, o.candidates, o.always_train, o.granularity), o.granularity
        among = {"candidates": o.candidates, "always_train": o.always_train}
    parts = split(units, together)
    values = vars(o) | among | {"granularity": together, "mask": mask.hash if mask else None}
    values["at"] = None if callable(o.score) else o.at
    arguments = {name: describe(values[name]) for name in USES[strategy] if values[name] is not None}
    scores: dict[str, float] | None = None
    if strategy == "all-conv":
        frozen = _all_conv(network, units)
    elif strategy == "invert":
        assert mask is not None
        still = set(mask.frozen)
        frozen = [p for u in units for p in u.parameters if p not in still]
    else:
        # In random order, or in that of their scores,
        if strategy == "random":
            ordered = shuffled(parts, o.seed)
        else:
            assert o.score is not None
            scores, sigma = score_units(source, network, units, o.score, o.at)
            ordered = sorted((u for u in parts if u.name in scores), key=lambda u: o.sign * scores[u.name])
            arguments |= {"sigma": sigma, "unscored": len(units) - len(scores)}
        # they are taken up to a budget or a threshold.
        if strategy == "threshold":
            assert o.threshold is not None and scores is not None
            chosen = [u for u in ordered if o.sign * scores[u.name] <= o.sign * o.threshold]
            if not chosen:
                low, high = min(scores.values()), max(scores.values())
                raise GddlabError(
                    f"threshold={o.threshold:g} freezes nothing: scores are {low:.3g} to {high:.3g}, "
                    f'give one among them, or strategy="none"'
                )
        elif strategy == "per-resolution":
            chosen, arguments["reached"] = _fill_resolutions(ordered, o.budget, units=parts, unit=o.unit)
            arguments["unplaced"] = sum(u.resolution is None for u in units)
        else:
            share = o.budget if mask is None else mask.fraction
            arguments["budget"] = describe(share)
            whole = network.n_params if o.unit == "params" else len(parts)
            chosen, arguments["reached"] = _fill_share(ordered, share, whole=whole, unit=o.unit)
        frozen = names_of(chosen)
    probe_hash = None if scores is None else source.hash
    return _mask(network, frozen, strategy, arguments, scores, probe_hash, {u.name: u.layers for u in units})


def _mask(network: Network, frozen: Iterable[str], strategy: str, arguments: Any = None, *rest: Any) -> FreezeMask:
    return FreezeMask(tuple(frozen), network.parameters, strategy, arguments or {}, *rest).with_reached()


def _check(source: object, strategy: Any, given: dict[str, Any]) -> None:
    """Refuses options that the strategy does not use, and the lack of those that it needs."""
    if not isinstance(source, ProbeResult | nn.Module):
        raise GddlabError(f"source is a {type(source).__name__}: give a ProbeResult or a network")
    if isinstance(source, nn.Module) and next(source.parameters(), None) is None:
        raise GddlabError(f"this {type(source).__name__} has no parameters: there is nothing to freeze")
    if not callable(strategy) and not (isinstance(strategy, str) and strategy in STRATEGIES):
        raise unknown("strategy", strategy, STRATEGIES)
    for name, function in (("strategy", strategy), ("score", given.get("score"))):
        if callable(function):
            check_takes(name, function, "source")
    shown = f'strategy="{strategy}"' if isinstance(strategy, str) else "a function as strategy"
    used = USES[strategy] if isinstance(strategy, str) else ()
    for name in (n for n in given if n not in used):
        others = " or ".join(f'"{s}"' for s in STRATEGIES if name in USES[s])
        value = "" if name == "mask" else repr(describe(given[name]))
        raise GddlabError(f"{name}={value} has no meaning for {shown}: omit it, or take {others}")
    if "mask" in given:
        _check_mask(given)
    elif strategy == "invert":
        raise GddlabError('strategy="invert" inverts a mask: give mask=')
    if "score" in used:
        if not isinstance(source, ProbeResult):
            raise GddlabError(f"{shown} orders layers by a measurement: give the result of a probe")
        if "score" not in given:
            raise GddlabError(f"{shown} needs score=: accepted are {', '.join(source.stats)}, combinations, functions")
        if "at" in given and callable(given["score"]):
            raise GddlabError(f"at={given['at']!r} has no meaning for a score function: omit it")
        if "at" in given and not 1 / FAR < given["at"] / source.nearest(given["at"]) < FAR:
            low, high = min(source.sigmas), max(source.sigmas)
            raise GddlabError(f"at={given['at']:g}: the probe measured sigma {low:g} to {high:g}, give such a level")
    if "threshold" in used and "threshold" not in given:
        raise GddlabError("threshold=None: give a number on the scale of the score")


def _check_mask(given: dict[str, Any]) -> None:
    mask = given["mask"]
    if not isinstance(mask, FreezeMask):
        raise GddlabError(f"mask is a {type(mask).__name__}: give a FreezeMask, or FreezeMask.load(path)")
    for name in (n for n in ("budget", "unit") if n in given):
        raise GddlabError(f"{name}={given[name]!r} and mask=: the mask's share is the budget, omit one")
    for kept in (n for n in ("granularity", "always_train") if n in given and "candidates" not in given):
        raise GddlabError(f"{kept}={describe(given[kept])!r} and mask=: the mask's are kept, or give candidates= too")


# Rules.


def _by_role(network: Network, rule: str) -> list[str]:
    """Parameters of the roles that a rule freezes; refuses a network whose layers are not understood."""
    roles = {name: network.role(name) for name, _ in network.parameters}
    sizes = {name: math.prod(shape) for name, shape in network.parameters}
    odd = [name for name, role in roles.items() if not role]
    understood = 1 - sum(sizes[name] for name in odd) / network.n_params
    if understood < UNDERSTOOD:
        names = sorted(odd, key=lambda name: -sizes[name])
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise GddlabError(
            f'strategy="{rule}" goes by what layers are there for, known of {understood:.1%} of this network, not of '
            f'{", ".join(names[:5])}{more}: give names by a function as strategy, or strategy="budget"'
        )
    frozen = [name for name, role in roles.items() if role in RULES[rule]]
    if not frozen:
        raise GddlabError(
            f'strategy="{rule}" freezes nothing: this network has neither residual blocks nor transformer blocks'
        )
    return frozen


def _norms_only(network: Network) -> list[str]:
    norms = {n for n in network.own if network.type(n) == "norm"}
    if not norms:
        raise GddlabError("this network has no norm layer with parameters: nothing would be left to train")
    return [p for layer, own in network.own.items() if layer not in norms for p in own]


def _all_conv(network: Network, units: Sequence[Unit]) -> list[str]:
    layers = [layer for u in units for layer in u.layers if network.type(layer) == "conv"]
    if not layers:
        raise GddlabError('no candidate is a convolution: give candidates="conv", or another strategy')
    return [p for layer in layers for p in network.own[layer]]


def _by_function(network: Network, source: Any, function: Callable[[Any], Iterable[str]]) -> list[str]:
    """Names of parameters, or of layers for all parameters inside, that a function of the source returns.

    Of a network it is given the bare one, whose names are those of the mask.
    """
    names = function(unwrap(source) if isinstance(source, nn.Module) else source)
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


# Scores.


def score_units(
    result: ProbeResult, network: Network, units: Sequence[Unit], score: Score, at: float
) -> tuple[dict[str, float], float | None]:
    """Scores of the units that have one, and the sigma at which they were read (None for a function of the probe).

    A unit takes its own value; else the mean of its layers' weighted by their parameters; else that of the block around
    it.
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
    scores = _of_units(units, _by_layer(result.frame, stat, sigma), what)
    low, high = min(scores.values()), max(scores.values())
    if len(scores) > 1 and high - low <= 1e-9 * max(abs(low), abs(high)):  # as the cosine with the noise level itself
        raise GddlabError(f"{what} is {low:g} for every layer: give another score or at=")
    return scores, sigma


def _by_layer(frame: pd.DataFrame, stat: str, sigma: float) -> dict[str, float]:
    """One value per layer: of the image's stream and the condition's branch where it has these, the mean over calls."""
    rows = frame[(frame["stat"] == stat) & (frame["sigma"] == sigma)]
    layers = rows["layer"].map(functools.partial(layer_of, known=()))
    far = 0 * rows["sigma"]
    for column, wanted in (("branch", ("cond",)), ("stream", ("", "image"))):
        if column in rows:
            far = 2 * far + ~rows[column].isin(wanted)
    nearest = far == far.groupby(layers).transform("min")
    means = rows["value"].astype(float)[nearest].groupby(layers[nearest], sort=False).mean()
    return {str(layer): float(value) for layer, value in means.items()}


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
    values = score(result)
    if not hasattr(values, "items"):
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


# Budgets.


def _fill_share(ordered: Sequence[Unit], budget: object, *, whole: int, unit: str) -> tuple[list[Unit], float]:
    """Fills a share of `whole`, all parameters or the number of candidates; the units, and the share they hold."""
    what = "all parameters" if unit == "params" else "all candidates"
    if not is_number(budget) or not 0 < budget < 1:
        raise GddlabError(f"budget={budget!r}: give a share of {what} above 0 and below 1")
    chosen, reached = _filled(ordered, float(budget), whole, unit, what)
    if not chosen:
        raise _too_small(budget, min(u.cost(unit) for u in ordered) / whole)
    return chosen, reached


def _too_small(budget: object, least: float) -> GddlabError:
    return GddlabError(
        f'budget={budget!r} freezes nothing: the smallest candidate takes {least:.3g}, give more, or strategy="none"'
    )


def _fill_resolutions(
    ordered: Sequence[Unit], budget: object, *, units: Sequence[Unit], unit: str
) -> tuple[list[Unit], dict[str, float]]:
    """Fills a share of the candidates at each resolution; the units, and the share they hold of each resolution."""
    known = sorted({u.resolution for u in units if u.resolution is not None}, reverse=True)
    if not known:
        raise GddlabError('no candidate has a resolution, in its name or from its probe: take strategy="budget"')
    budgets = budget if isinstance(budget, Mapping) else dict.fromkeys(known, budget)
    if not budgets:
        raise GddlabError("budget={}: give a share for at least one resolution, such as {16: 0.8}")
    chosen: list[Unit] = []
    least = math.inf
    reached = dict.fromkeys(map(str, known), 0.0)
    for key, share in budgets.items():
        resolution = int(key) if str(key).isdecimal() else key  # JSON has strings
        if resolution not in known:
            raise unknown("resolution in budget", key, map(str, known))
        if not is_number(share) or not 0 <= share <= 1:
            raise GddlabError(f"budget {share!r} at resolution {resolution}: give a share of its candidates, 0 to 1")
        whole = sum(u.cost(unit) for u in units if u.resolution == resolution)
        here = [u for u in ordered if u.resolution == resolution]
        what = f"the candidates at resolution {resolution}"
        taken, reached[str(resolution)] = _filled(here, float(share), whole, unit, what)
        chosen += taken
        least = min([least, *(u.cost(unit) / whole for u in here if share)])
    if not chosen and math.isfinite(least):
        raise _too_small(budget, least)
    return chosen, reached


def _filled(ordered: Sequence[Unit], budget: float, whole: int, unit: str, what: str) -> tuple[list[Unit], float]:
    """Whole units in order up to a share of `whole`, and the share that they hold."""
    reachable = sum(u.cost(unit) for u in ordered) / whole
    if budget > reachable:
        raise GddlabError(
            f"budget={budget:g}: the {len(ordered)} layers that may be frozen hold {reachable:.4f} of {what}, "
            f"give at most {math.floor(reachable * 1e4) / 1e4:.4f}"
        )
    room = math.floor(budget * whole + 1e-3)  # a share taken from another mask gives the whole number again
    chosen = fill(ordered, room, unit)
    return chosen, sum(u.cost(unit) for u in chosen) / whole
