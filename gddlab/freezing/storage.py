"""A mask as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError

if TYPE_CHECKING:
    from gddlab.freezing.mask import FreezeMask

__all__ = ["FORMAT", "from_dict", "to_dict"]

FORMAT = "gddlab-mask-1"


def to_dict(mask: FreezeMask) -> dict[str, Any]:
    candidates = mask.candidates
    return {
        "format": FORMAT,
        "strategy": mask.strategy,
        "arguments": mask.arguments,
        "fraction": mask.fraction,
        "hash": mask.hash,
        "fingerprint": mask.fingerprint,
        "probe_hash": mask.probe_hash,
        "frozen": list(mask.frozen),
        "scores": mask.scores,
        "candidates": None if candidates is None else {name: list(layers) for name, layers in candidates.items()},
        "parameters": [[name, list(shape)] for name, shape in mask.parameters],
    }


def from_dict(make: Callable[..., FreezeMask], value: Any) -> FreezeMask:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise GddlabError("this is no freeze mask: give what FreezeMask.save wrote")
    try:
        mask = make(
            frozen=tuple(value["frozen"]),
            parameters=tuple((name, tuple(shape)) for name, shape in value["parameters"]),
            strategy=value["strategy"],
            arguments=value["arguments"],
            scores=value["scores"],
            probe_hash=value["probe_hash"],
            candidates=value.get("candidates"),  # files of older versions have none
        )
        fits = (mask.hash, mask.fingerprint) == (value["hash"], value["fingerprint"])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, GddlabError):
            raise
        raise GddlabError(f"this freeze mask is incomplete ({e!r}): give what FreezeMask.save wrote") from None
    if not fits:
        raise GddlabError("this freeze mask was edited: its hash does not fit its names; select it again")
    return mask
