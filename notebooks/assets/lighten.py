"""Makes the pictures of executed notebooks smaller: 256 colours, where nobody sees the difference.

python notebooks/assets/lighten.py notebooks/17_freezing.ipynb
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

MEAN, MOST = 4, 64
"""How far a pixel may be from the original, of 255: on average, and anywhere, as at the edge of a letter. Plots change
by less than 0.4 on average, pictures in colour by 2 to 4."""


def lighter(png: bytes) -> bytes:
    """The picture with a palette of its own; as it was where that is no smaller, or not the same to look at."""
    given = Image.open(io.BytesIO(png))
    if given.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return png  # a palette has no transparency here
    image = given.convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    change = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(image, int))
    out = io.BytesIO()
    few.save(out, "png", optimize=True)
    return out.getvalue() if change.mean() < MEAN and change.max() < MOST and out.tell() < len(png) else png


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = nbformat.read(path, 4)
        before = path.stat().st_size
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    data["image/png"] = base64.b64encode(lighter(base64.b64decode(data["image/png"]))).decode()
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: {before / 1000:.0f} kB -> {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
