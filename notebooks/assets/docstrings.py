"""For the reference: docstrings are plain text, and gddlab.reporting has the names of its stub.

In docstrings, code is between backticks; what Markdown or HTML would read into the rest is escaped.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

from gddlab import reporting

__all__ = ["PlainText", "StubNames"]

CODE = re.compile(r"(`[^`]*`)")


class PlainText(Extension):
    """Of a griffe object, whatever it is."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


class StubNames(Extension):
    """Of a package whose names are imported when they are used."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        if pkg.name == "gddlab":
            pkg["reporting"].exports = reporting.__all__


def plain(text: str) -> str:
    """Escapes what is not code: links, tags, and stars but those of **arguments."""
    parts = CODE.split(text)
    for i, part in enumerate(parts[::2]):
        part = part.replace("[", "\\[").replace("<", "&lt;")
        parts[2 * i] = re.sub(r"(?<=[^\s*])( ?)\*", r"\1\\*", part)
    return "".join(parts)
