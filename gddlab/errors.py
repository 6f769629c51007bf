"""The one error that users meet: a refusal in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["GddlabError", "NotFound", "unknown"]


class GddlabError(ValueError):
    """Bad input or a refused action: what was wrong, its value, what is accepted, what to do."""


class NotFound(GddlabError, FileNotFoundError):
    """A path that does not exist."""


def unknown(kind: str, value: object, accepted: Iterable[str]) -> GddlabError:
    """The refusal of a name: `value` is not among `accepted`; near matches come first."""
    names = list(dict.fromkeys(accepted))
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        if len(names) <= 12:
            hint += " Accepted: " + ", ".join(names)
    elif len(names) <= 20:
        hint = "accepted: " + ", ".join(names)
    else:
        hint = f"accepted: {', '.join(names[:8])} ... ({len(names)} in all)"
    return GddlabError(f"unknown {kind} {value!r}: {hint}")
