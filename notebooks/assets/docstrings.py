"""Docstrings are plain text with code between backticks; what Markdown or HTML would read into the rest is escaped."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["PlainText"]

CODE = re.compile(r"(`[^`]*`)")


class PlainText(Extension):
    """Of a griffe object, whatever it is."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Escapes what is not code: links, tags, and stars but those of **arguments."""
    parts = CODE.split(text)
    for i, part in enumerate(parts[::2]):
        part = part.replace("[", "\\[").replace("<", "&lt;")
        parts[2 * i] = re.sub(r"(?<=[^\s*])( ?)\*", r"\1\\*", part)
    return "".join(parts)
