"""A two-level factorial over groups of layers: which groups, when trained, bring a student nearer to the data?"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np
from torch import nn

from gddlab.freezing import FreezeMask, select_freeze
from gddlab.freezing.candidates import Network
from gddlab.probing import ProbeResult

RUNS = 48
SHARES = (0.4, 0.6)
"""Least and greatest frozen share of the parameters of a run."""
ROUNDS = 20
CANDIDATES = 4096
"""Rows among which a design is searched."""
_LAYER = re.compile(r"\.(enc|dec)\.(\d+)x\d+_\w+\.(conv0|conv1|qkv|proj|skip|affine)$")
_KINDS = {"qkv": "attention", "proj": "attention", "affine": "embedding"}


def groups(source: ProbeResult | nn.Module) -> dict[str, list[str]]:
    """Layers in blocks of a U-Net by stage, resolution and kind, such as "dec 8x8 conv0".

    Kinds are the two convolutions, attention, the convolution of the skip path, and the embedding of the noise level.
    Norms and what is outside of blocks are in no group: they are always trained.
    """
    out: dict[str, list[str]] = {}
    for layer in Network(source).own:
        if found := _LAYER.search(layer):
            stage, side, kind = found.groups()
            out.setdefault(f"{stage} {side}x{side} {_KINDS.get(kind, kind)}", []).append(layer)
    return out


def design(sizes: Mapping[str, float], *, runs: int = RUNS, seed: int = 0) -> np.ndarray:
    """Which groups each run freezes, so that all main effects are estimated as well as possible.

    Rows are drawn among those that freeze between 40 and 60 % of the parameters, then exchanged one by one while that
    raises the determinant of the information matrix (D-optimal; Fedorov 1972; Atkinson & Donev 1992, section 15).

    Args:
        sizes: Share of all parameters of each group.
        runs: Number of rows.
        seed: Of the first rows.

    Returns:
        bool, (runs, groups); True is frozen.
    """
    return _design(tuple(sizes.values()), runs, seed)


@functools.cache
def _design(sizes: tuple[float, ...], runs: int, seed: int) -> np.ndarray:
    n, draw = len(sizes), np.random.default_rng(seed)
    levels = (np.arange(2**n)[:, None] >> np.arange(n)) & 1  # every choice of groups, (2^n, n)
    share = levels @ np.asarray(sizes)
    levels = levels[(share >= SHARES[0]) & (share <= SHARES[1])]
    levels = levels[np.sort(draw.choice(len(levels), min(CANDIDATES, len(levels)), replace=False))]
    x = np.hstack([np.ones((len(levels), 1)), 2.0 * levels - 1])  # (candidates, 1 + n)
    rows = draw.choice(len(x), runs, replace=False)
    for _ in range(ROUNDS):
        before = rows.copy()
        for i in range(runs):
            others = np.delete(rows, i)
            inverse = np.linalg.inv(x[others].T @ x[others])
            gain = np.einsum("ij,jk,ik->i", x, inverse, x)  # det(X'X + xx') = det(X'X) (1 + x' (X'X)^-1 x)
            gain[others] = -1  # each row once
            rows[i] = int(gain.argmax()) if gain.max() > gain[rows[i]] * (1 + 1e-9) else rows[i]
        if (rows == before).all():
            break
    return levels[np.sort(rows)].astype(bool)


def shares(result: ProbeResult) -> dict[str, float]:
    """Share of all parameters of each group."""
    network = Network(result)
    sizes = {name: sum(sum(network.own[m].values()) for m in layers) for name, layers in groups(result).items()}
    return {name: size / network.n_params for name, size in sizes.items()}


def mask_of(result: ProbeResult, row: int) -> FreezeMask:
    """The mask of a row of the design."""
    frozen = [
        layer
        for layers, on in zip(groups(result).values(), design(shares(result))[row], strict=True)
        if on
        for layer in layers
    ]

    def factorial(source: object) -> list[str]:
        return frozen

    return select_freeze(result, strategy=factorial)
