"""The strategies by which a mask is chosen: their names, the rules on names among them, and the options of each."""

from __future__ import annotations

RULES = {"gdd-i": ("conv", "proj"), "gdd-i-2": ("conv", "proj", "qkv"), "gdd-i-3": ("conv", "proj", "qkv", "skip")}
"""GDD-I's options 1, 2 and 3 (Zheng & Yang 2024): words of which a frozen parameter's name contains one."""

PLACES = ("block", "up", "down", "in")
"""... and words of which it contains another: the released code looks for substrings of the whole name."""

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
