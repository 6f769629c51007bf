"""A self-contained HTML page: sections with text, tables and pictures inside the file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Page", "table_html"]

SHORT = 36
"""Cells with at most so many letters are not broken."""

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1b1b1b;max-width:1080px;margin:2.2rem auto;padding:0 1.2rem;overflow-wrap:break-word}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .2rem} p{max-width:46rem} .note{color:#555;font-size:.92rem}
.scroll{overflow-x:auto} table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.22rem .8rem .22rem 0;text-align:left;vertical-align:top;font-size:.92rem} td+td{overflow-wrap:anywhere}
th{font-weight:600;border-bottom:1px solid #bbb} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums} td.n,td.s,th{white-space:nowrap}
img{max-width:100%;height:auto}
figure{margin:.8rem 1.4rem .4rem 0;display:inline-block;vertical-align:top;max-width:100%}
figcaption{font-size:.88rem;color:#555;max-width:30rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.number{border:1px solid #ddd;border-radius:.5rem;padding:.6rem 1rem;min-width:8.5rem} .number b{display:block;font-size:1.5rem}
.number span{font-size:.85rem;color:#555} code,pre{font-size:.88rem;background:#f5f5f5;border-radius:.25rem}
code{padding:.05rem .3rem} pre{padding:.7rem;overflow-x:auto}
@media (max-width:40rem){body{margin-top:1rem;padding:0 .8rem} figure{margin-right:.5rem} .number{min-width:6rem;padding:.4rem .7rem} .number b{font-size:1.2rem}}
"""


def table_html(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as a table, which scrolls by itself where it is too wide; below a head, numbers stand to the right and short cells in one line."""
    cells = [[str(c) for c in row] for row in rows]
    top = ""
    for i, name in enumerate(head):
        numbers = i > 0 and all(c[:1].isdigit() or c[:1] in "-" for c in (row[i] for row in cells))
        top += f"<th{' class=n' if numbers else ''}>{escape(name)}</th>"
    body = "".join(f"<tr>{''.join(_cell(c, bool(head), i) for i, c in enumerate(row))}</tr>" for row in cells)
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if head else ""}{body}</table></div>'


def _cell(text: str, headed: bool, column: int) -> str:
    number = column > 0 and (text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit()))
    kind = ' class="n"' if headed and number else ' class="s"' if headed and len(text) <= SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


@dataclass
class Page:
    """Collects sections; `html()` gives the whole document."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "", *, level: int = 2) -> None:
        """A heading and a paragraph; the text is plain, not markup."""
        self.parts.append(f"<h{level}>{escape(title)}</h{level}>")
        if text:
            self.text(text)

    def text(self, text: str, *, note: bool = False) -> None:
        self.parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def numbers(self, values: dict[str, str]) -> None:
        """Headline numbers, label -> value."""
        boxes = (f'<div class="number"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values.items())
        self.parts.append(f'<div class="numbers">{"".join(boxes)}</div>')

    def figure(self, image: str, caption: str = "") -> None:
        """An <img> of `figures`, with a caption."""
        under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self.parts.append(f"<figure>{image}{under}</figure>")

    def picture(self, png: bytes, alt: str, *, width: str) -> None:
        """A PNG, put into the page as it is and shown at a CSS width, with its description below it."""
        data = base64.b64encode(png).decode()
        image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        self.parts.append(f'<figure style="width:{width}">{image}<figcaption>{escape(alt)}</figcaption></figure>')

    def table(self, rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> None:
        self.parts.append(table_html(rows, head))

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{escape(self.title)}</h1>{''.join(self.parts)}</body></html>\n"
        )
