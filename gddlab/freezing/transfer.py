"""A mask for another architecture: decisions go to the same place in the network."""

from __future__ import annotations

import math

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.freezing.mask import FreezeMask, Parameters
from gddlab.freezing.places import NOWHERE, numel
from gddlab.probing.layers import kind_of, owner_of, parameter_table, place

__all__ = ["transfer"]

Key = tuple[str, int | None, str, str]
"""Stage, resolution or level, kind of layer, last part of the parameter's name."""


def transfer(mask: FreezeMask, model: nn.Module, by: str) -> FreezeMask:
    if by not in ("resolution", "level"):
        raise unknown("by", by, ("resolution", "level"))
    parameters = parameter_table(model)
    theirs, ours = _groups(mask.parameters, by), _groups(parameters, by)
    decided = set(mask.frozen)
    sizes = {name: numel(shape) for name, shape in parameters}
    frozen: list[str] = []
    unmapped: dict[str, int] = {}
    for key, names in ours.items():
        if key not in theirs:
            whole = key[:3] not in {k[:3] for k in theirs}
            label = "/".join(str(part or NOWHERE) if part != 0 else "0" for part in key[: 3 if whole else 4])
            unmapped[label] = unmapped.get(label, 0) + len(names)
            continue
        twins = theirs[key]
        frozen += [n for i, n in enumerate(names) if twins[_nearest(i, len(names), len(twins))] in decided]
    lost = sum(sizes[n] for key, names in ours.items() if key not in theirs for n in names)
    if lost == sum(sizes.values()):
        raise GddlabError(f"no parameter of this network has a counterpart by {by} in the mask's: select a mask for it")
    out = FreezeMask(
        tuple(frozen),
        parameters,
        "transfer",
        {
            "strategy": mask.strategy,
            "mask": mask.hash,
            "by": by,
            "mapped": 1 - lost / sum(sizes.values()),
            "n_unmapped": sum(unmapped.values()),
            "unmapped": list(unmapped),
        },
    )
    out.arguments["reached"] = out.fraction
    return out


def _groups(parameters: Parameters, by: str) -> dict[Key, list[str]]:
    """Names by place, in the order of the network."""
    names = [name for name, _ in parameters]
    top = max((r for name in names if (r := place(owner_of(name))[1]) is not None), default=0)
    out: dict[Key, list[str]] = {}
    for name in names:
        layer = owner_of(name)
        stage, where = place(layer)
        if by == "level" and where is not None:
            where = round(math.log2(top / where))
        out.setdefault((stage, where, kind_of(layer), name[len(layer) :].strip(".")), []).append(name)
    return out


def _nearest(i: int, n: int, m: int) -> int:
    """Index among `m` layers of the one whose relative position is nearest to that of layer `i` of `n`; the earlier of two."""
    position = i / (n - 1) if n > 1 else 0.5
    return math.ceil(position * (m - 1) - 0.5)
