"""`select_freeze`: ways of choosing a freeze mask, from names or from measurements."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.mask import FreezeMask, Parameters, fingerprint
from gddlab.probing import ProbeResult
from gddlab.probing.layers import inventory, parameter_table, plain_name

__all__ = ["RULES", "STRATEGIES", "select_freeze"]

RULES = {"gdd-i": ("conv", "proj"), "gdd-i-2": ("conv", "proj", "qkv"), "gdd-i-3": ("conv", "proj", "qkv", "skip")}
"""GDD-I's options 1, 2 and 3 (Zheng & Yang 2024): words of which a frozen parameter's name contains one."""

PLACES = ("block", "up", "down", "in")
"""... and words of which it contains another: the released code looks for substrings of the whole name."""

STRATEGIES = (*RULES, "budget", "random", "invert", "none")


class Candidate(NamedTuple):
    """A layer that may be frozen: all of its own parameters or none."""

    name: str
    block: str
    depth: int
    parameters: tuple[str, ...]
    size: int


def select_freeze(
    source: ProbeResult | nn.Module,
    *,
    strategy: str,
    score: str | None = None,
    at: float = 80.0,
    freeze: str = "low",
    budget: float = 0.85,
    seed: int = 0,
    mask: FreezeMask | None = None,
) -> FreezeMask:
    """Chooses which parameters to freeze.

    Strategies:
        "gdd-i", "gdd-i-2", "gdd-i-3": The published rules on names, options 1 to 3.
        "budget": Candidate layers in the order of a measured `score`, lowest or highest first, ties by depth. Each
            is frozen whole if it still fits into the budget. Layers without the score are trained.
        "random": The same with candidates in random order; with `mask`, its frozen share is the budget.
        "invert": Candidates that `mask` trains are frozen, those it freezes are trained, and nothing else is frozen. (The
            opposite choice of equal budget is "budget" with the other `freeze`.)
        "none": Nothing is frozen: GDD.

    Candidates are the convolutions inside U-Net blocks: not the first convolution, nor auxiliary or last ones.

    Args:
        source: A probe's result, or a network where nothing measured is needed.
        strategy: One of the above.
        score: For "budget": a statistic of the result. A block's statistic, such as "rel_update", counts for each
            convolution of the block that has none of its own.
        at: For "budget": sigma at which the score is read, the nearest one probed (log scale).
        freeze: For "budget": "low" or "high" scores first.
        budget: For "budget" and "random": share of all parameters to freeze, not exceeded, between 0 and 1.
        seed: For "random".
        mask: For "invert", and for "random" if wished.

    Returns:
        The mask; its arguments say what was asked and reached.

    Raises:
        GddlabError: Unknown strategy or score; a budget out of reach; something missing that the strategy needs, or
            given that it does not use.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if not isinstance(source, ProbeResult | nn.Module):
        raise GddlabError(f"source is a {type(source).__name__}: give a ProbeResult or a network")
    if score is not None and strategy != "budget":
        raise GddlabError(f'score={score!r} has no meaning for strategy="{strategy}": leave it away, or take "budget"')
    if mask is not None and strategy not in ("invert", "random"):
        raise GddlabError(
            f'mask= has no meaning for strategy="{strategy}": leave it away, or take "invert" or "random"'
        )
    parameters, candidates = _open(source)
    if mask is not None and mask.fingerprint != fingerprint(parameters):
        raise GddlabError(f"mask= ({mask.n_params:,} parameters) is for another network than source")

    arguments: dict[str, Any] = {}
    scores: dict[str, float] | None = None
    if strategy in RULES:
        frozen = [n for n, _ in parameters if _contains(n, PLACES) and _contains(n, RULES[strategy])]
    elif strategy == "invert":
        if mask is None:
            raise GddlabError('strategy="invert" turns a mask round: give mask=')
        chosen = [c for c in candidates if not set(c.parameters) <= set(mask.frozen)]
        frozen = [p for c in chosen for p in c.parameters]
        arguments = {"mask": mask.hash}
    elif strategy in ("budget", "random"):
        if strategy == "random":
            budget = budget if mask is None else mask.fraction
            ordered = candidates.copy()
            random.Random(seed).shuffle(ordered)
            arguments = {"seed": seed, "mask": None if mask is None else mask.hash}
        else:
            if not isinstance(source, ProbeResult):
                raise GddlabError(
                    'strategy="budget" orders layers by a measurement: give the ProbeResult of probe(...)'
                )
            scores, sigma = _scores(source, candidates, score, at)
            if freeze not in ("low", "high"):
                raise unknown("freeze", freeze, ("low", "high"))
            sign = 1 if freeze == "low" else -1
            by_score = scores
            ordered = sorted(
                (c for c in candidates if c.name in by_score), key=lambda c: (sign * by_score[c.name], c.depth)
            )
            unscored = len(candidates) - len(ordered)
            arguments = {"score": score, "at": at, "sigma": sigma, "freeze": freeze, "unscored": unscored}
        chosen = _fill(ordered, budget, parameters)
        frozen = [p for c in chosen for p in c.parameters]
        arguments |= {"budget": budget}
    else:
        frozen = []
    out = FreezeMask(
        frozen=tuple(frozen),
        parameters=parameters,
        strategy=strategy,
        arguments=arguments,
        scores=scores,
        probe_hash=source.hash if isinstance(source, ProbeResult) and scores is not None else None,
    )
    out.arguments["reached"] = out.fraction
    return out


def _contains(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def _open(source: ProbeResult | nn.Module) -> tuple[Parameters, list[Candidate]]:
    """The network's parameters, and the layers that may be frozen, in its order."""
    if isinstance(source, ProbeResult):
        parameters: Parameters = tuple((name, tuple(shape)) for name, shape in source.meta["parameters"])
        layers = source.meta["layers"]
    else:
        parameters = parameter_table(source)
        layers = [layer.to_dict() for layer in inventory(source).values()]
    own: dict[str, list[tuple[str, int]]] = {}
    for name, shape in parameters:
        own.setdefault(name.rpartition(".")[0], []).append((name, math.prod(shape)))
    out = []
    for layer in layers:
        parts = own.get(plain_name(layer["name"]), [])
        if layer["candidate"] and parts:
            names, sizes = zip(*parts, strict=True)
            out.append(Candidate(layer["name"], layer["block"], layer["depth"], names, sum(sizes)))
    return parameters, out


def _scores(
    result: ProbeResult, candidates: list[Candidate], score: str | None, at: float
) -> tuple[dict[str, float], float]:
    """Scores of candidates at the probed sigma nearest to `at`, and that sigma."""
    if score is None:
        raise GddlabError(f'strategy="budget" needs score=: accepted are {", ".join(result.stats)}')
    table = result.pivot(score)
    if isinstance(at, bool) or not isinstance(at, int | float) or not (math.isfinite(at) and at > 0):
        raise GddlabError(f"at={at!r}: give a sigma above 0")
    sigma = min((float(s) for s in table.columns), key=lambda s: abs(math.log(s / at)))
    column = {str(name): float(value) for name, value in table[sigma].items()}
    found = {c.name: column.get(c.name, column.get(c.block)) for c in candidates}
    scores = {name: value for name, value in found.items() if value is not None}
    if not scores:
        raise GddlabError(f"score {score!r} was measured for no layer that may be frozen: probe layers='conv'")
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        raise GddlabError(
            f"score {score!r} is {scores[bad[0]]} for {bad[0]} at sigma {sigma:g}: give another score or at="
        )
    low, high = min(scores.values()), max(scores.values())
    if len(scores) > 1 and high - low <= 1e-9 * max(abs(low), abs(high)):
        raise GddlabError(f"score {score!r} is {low:g} for every layer at sigma {sigma:g}: give another score or at=")
    return scores, sigma


def _fill(ordered: list[Candidate], budget: float, parameters: Parameters) -> list[Candidate]:
    """Takes whole layers in order, each that still fits."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < 1:
        raise GddlabError(f"budget={budget!r}: give a share of all parameters above 0 and below 1")
    total = sum(math.prod(shape) for _, shape in parameters)
    reachable = sum(c.size for c in ordered) / total
    if budget > reachable:
        raise GddlabError(
            f"budget={budget:g}: the {len(ordered)} layers that may be frozen hold {reachable:.4f} of all parameters, "
            f"give at most {math.floor(reachable * 1e4) / 1e4:.4f}"
        )
    chosen, room = [], math.floor(budget * total + 1e-3)  # another mask's share comes back whole
    for c in ordered:
        if c.size <= room:
            chosen.append(c)
            room -= c.size
    return chosen
