"""Pages in one file: jinja2 templates with their figures and images inside."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from gddlab.errors import GddlabError

SHORT = 36
"""Table cells of at most this many letters are not broken."""
WIDEST = 640
"""Pixels of an image in a page: twice its width in CSS, for fine screens."""


@dataclass(frozen=True)
class Picture:
    """A PNG for a template.

    Attributes:
        src: The image as a data URI.
        alt: What it shows.
        style: Its size, CSS.
        caption: Below it, if any.
        width: Of the image with its caption, CSS.
    """

    src: str
    alt: str
    style: str = ""
    caption: str = ""
    width: str = "auto"


def render(template: str, **context: Any) -> str:
    """A page from a template of this package; all text is escaped."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    settings: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=folder, undefined=jinja2.StrictUndefined, **settings)
    environment.filters["cell_class"] = _cell_class
    return environment.get_template(template).render(context)


def of_figure(drawn: Axes | Figure, alt: str, caption: str = "", *, dpi: int = 130) -> Picture:
    """A figure, or that of some axes; it is freed."""
    figure, buffer = drawn.figure.canvas.figure, io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    width = round(figure.get_size_inches()[0] * 88)
    return Picture(_uri(buffer.getvalue()), alt, f"max-width:100%;width:{width}px", caption)


def of_pixels(pixels: np.ndarray, alt: str, *, scale: int = 2) -> Picture:
    """uint8 (H, W, 3), enlarged without smoothing; `alt` is its caption too."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Picture(_uri(buffer.getvalue()), alt, f"width:{pixels.shape[1] * scale}px;image-rendering:pixelated", alt)


def of_file(path: Path, alt: str, *, width: str) -> Picture:
    """A PNG file as it is, or smaller where it has more pixels than a page shows; `alt` is its caption too."""
    content = path.read_bytes()
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, SyntaxError) as e:  # what Pillow raises for damaged files
        raise GddlabError(f"{path} is no image ({e.__class__.__name__}): remove it") from None
    if image.width > WIDEST:
        buffer = io.BytesIO()
        size = WIDEST, round(image.height * WIDEST / image.width)
        image.convert("RGB").resize(size, Image.Resampling.BOX).save(buffer, format="PNG")
        content = buffer.getvalue()
    return Picture(_uri(content), alt, caption=alt, width=width)


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell_class(text: object, column: int) -> str:
    """Below a head, numbers ("n") are set to the right and short cells ("s") in one line."""
    cell = str(text)
    number = cell[:1].isdigit() or (cell[:1] == "-" and cell[1:2].isdigit())
    return "n" if number and column else "s" if len(cell) <= SHORT else ""
