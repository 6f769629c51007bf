"""The strategies by which a mask is chosen: their names, the rules on roles of layers among them, and their options."""

from __future__ import annotations

_FIRST = ("res.conv", "resample", "mlp", "attn.out", "attn.io")
RULES = {"gdd-i": _FIRST, "gdd-i-2": (*_FIRST, "attn.qkv"), "gdd-i-3": (*_FIRST, "attn.qkv", "skip")}
"""GDD-I's options 1, 2 and 3 (Zheng & Yang 2024): roles of which a frozen parameter has one.

The released code looks for words in names, conv and proj, then qkv, then skip, together with block, up, down or in. For
EDM's networks both choose the same parameters; roles mean the same in others.
"""

UNDERSTOOD = 0.95
"""Share of the parameters that must have a role for a rule to mean anything."""

USUAL = (0.01, 0.995)
"""Frozen shares outside of these are worth a warning."""

AUTO = ("attn.qkv", "attn.out", "attn.io", "mlp")
"""Roles that are candidates beside convolutions where there are transformer blocks."""

AMONG = ("candidates", "always_train")
"""Options of those that choose among candidates."""
_MEASURED = ("score", "at", "freeze", "granularity", *AMONG)

USES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(RULES, ()),
    "none": (),
    "norms-only": (),
    "all-conv": AMONG,
    "budget": ("budget", "unit", *_MEASURED),
    "per-resolution": ("budget", "unit", *_MEASURED),
    "threshold": ("threshold", *_MEASURED),
    "random": ("budget", "unit", "granularity", "seed", "mask", *AMONG),
    "invert": ("mask", *AMONG),
}
"""Options of each strategy."""

STRATEGIES = tuple(USES)
