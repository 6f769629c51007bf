"""A self-contained HTML page: sections with text, tables and pictures inside the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Page", "table_html"]

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1b1b1b;max-width:1080px;margin:2.2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
p{max-width:46rem} .note{color:#555;font-size:.92rem}
table{border-collapse:collapse;margin:.6rem 0} td,th{padding:.22rem .8rem .22rem 0;text-align:left;vertical-align:top;font-size:.92rem}
th{font-weight:600} td.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:.8rem 1.4rem .4rem 0;display:inline-block;vertical-align:top} figcaption{font-size:.88rem;color:#555;max-width:30rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.number{border:1px solid #ddd;border-radius:.5rem;padding:.6rem 1rem;min-width:8.5rem} .number b{display:block;font-size:1.5rem}
.number span{font-size:.85rem;color:#555} code,pre{font-size:.88rem;background:#f5f5f5;border-radius:.25rem}
code{padding:.05rem .3rem} pre{padding:.7rem;overflow-x:auto}
"""


def table_html(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as a table; numbers to the right."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = ""
    for row in rows:
        cells = (
            f'<td class="n">{escape(str(c))}</td>' if i and str(c)[:1].isdigit() else f"<td>{escape(str(c))}</td>"
            for i, c in enumerate(row)
        )
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


@dataclass
class Page:
    """Collects sections; `html()` gives the whole document."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """A heading and a paragraph; the text is plain, not markup."""
        self.parts.append(f"<h2>{escape(title)}</h2>")
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
