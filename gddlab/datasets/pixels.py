"""One image file: refuses, with the reason, what cannot become 8-bit grey or RGB pixels without a choice."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gddlab.files import describe_start

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
LOSSY = dict.fromkeys((s[1:] for s in JPEG_SUFFIXES), "JPEG") | {"webp": "WebP"}
SUFFIXES = JPEG_SUFFIXES | {".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Images too, but not read: skipping them silently would lose data.
OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".svg", ".exr"}
    | {".dib", ".ico", ".dcm", ".npy"}
)

_GREY = ("1", "L", "LA", "La")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112  # EXIF tag
_TURNING = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow looks for an orientation


class BadImage(Exception):
    """Why an image cannot be used: a kind of problem and a detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Header:
    """An image's properties before it is decoded; width and height are those after its EXIF rotation."""

    width: int
    height: int
    channels: int
    mode: str
    turned: bool = False
    alpha: bool = False


def header(file: BinaryIO | np.ndarray | Image.Image, *, alpha: str = "refuse") -> Header:
    """Reads the header of an image, and refuses what `decode` would, as far as the header tells; closes a file."""
    if isinstance(file, np.ndarray):
        return Header(file.shape[1], file.shape[0], file.shape[2], "L" if file.shape[2] == 1 else "RGB")
    with file if isinstance(file, io.IOBase) else contextlib.nullcontext():
        im = _open(file, alpha)
        turn = _orientation(im)
        w, h = im.size if turn < 5 else im.size[::-1]
        return Header(w, h, 1 if im.mode in _GREY else 3, im.mode, turned=turn > 1, alpha=_has_alpha(im))


def decode(content: bytes | np.ndarray | Image.Image, *, alpha: str = "refuse") -> Image.Image:
    """A Pillow image of mode "L" or "RGB", rotated by its EXIF orientation, as viewers show it.

    Args:
        content: A PNG, JPEG, WebP, BMP, GIF or TIFF file; pixels, uint8, (H, W, 1 or 3); or a Pillow image.
        alpha: Background of transparent pixels, "white" or "black"; "refuse" refuses alpha channels.

    Raises:
        BadImage: Not an image, damaged, animated, too large, or of a kind that 8-bit grey or RGB cannot hold.
    """
    from PIL import Image, ImageOps

    if isinstance(content, np.ndarray):
        return Image.fromarray(content[..., 0] if content.shape[-1] == 1 else content)
    im = _open(io.BytesIO(content) if isinstance(content, bytes) else content, alpha)
    try:
        im.load()
        if _orientation(im) > 1:
            im = ImageOps.exif_transpose(im)
        if _has_alpha(im):
            mode = "L" if im.mode in _GREY else "RGB"
            im = Image.alpha_composite(Image.new("RGBA", im.size, alpha), im.convert("RGBA")).convert(mode)
        elif im.mode not in ("L", "RGB"):
            im = im.convert("L" if im.mode == "1" else "RGB")
    except Exception as e:  # Pillow's decoders raise whatever comes, from struct.error to SyntaxError
        raise BadImage("damaged", _first_line(e)) from None
    return im


def fit(im: Image.Image, *, resolution: int, crop: str, filter: str) -> Image.Image:
    """A square image of side `resolution`: the largest square around the centre if cropped, then resampled once."""
    from PIL import Image

    w, h = im.size
    if w != h:
        if crop == "none":
            raise BadImage("not square", f"{w}x{h}")
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        # Cropped first, since with resize(box=) the filter uses pixels outside the box.
        im = im.crop((left, top, left + side, top + side))
    if im.width != resolution:
        im = im.resize((resolution, resolution), Image.Resampling[filter.upper()])
    return im


def array(im: Image.Image, channels: int | None = None) -> np.ndarray:
    """Pixels, uint8, (H, W, C); grey is repeated if `channels` is 3."""
    if channels == 3 and im.mode == "L":
        im = im.convert("RGB")
    a = np.asarray(im)
    return a[..., None] if a.ndim == 2 else a


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 (H, W, 1 or 3), not compressed: fast to read, and equal bytes with any build of zlib."""
    out = io.BytesIO()
    decode(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


def _open(file: BinaryIO | Image.Image, alpha: str) -> Image.Image:
    """A Pillow image, not yet decoded, of a kind that can become 8-bit grey or RGB."""
    from PIL import Image

    im = file if isinstance(file, Image.Image) else _identify(file)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and im.width * im.height > limit:
        raise BadImage("too many pixels", f"{im.width}x{im.height}, accepted are {limit / 1e6:.0f} million")
    try:
        animated = im.format != "MPO" and getattr(im, "is_animated", False)  # MPO: a JPEG with previews behind it
    except Exception as e:
        raise BadImage("damaged", _first_line(e)) from None
    if animated:
        raise BadImage("animated", im.format or "")
    # A 16-bit RGB file has mode "RGB": Pillow drops the low bytes; only the raw mode of its tiles tells.
    if im.mode[0] in "IF" or any(";16" in str(t[3]) for t in getattr(im, "tile", ())):
        raise BadImage("more than 8 bits a channel", f"mode {im.mode}")
    if im.mode == "CMYK":
        raise BadImage("CMYK colours")
    if im.mode not in ("1", "L", "P", "RGB", *_ALPHA_MODES):
        raise BadImage("colour space", im.mode)
    if alpha == "refuse" and _has_alpha(im):
        raise BadImage("alpha channel", f"mode {im.mode}")
    return im


def _identify(file: BinaryIO) -> Image.Image:
    from PIL import Image

    try:
        start = file.read(64)
        file.seek(0)
    except Exception as e:  # a damaged zip: zlib.error, BadZipFile, EOFError
        raise BadImage("damaged", _first_line(e)) from None
    if not start:
        raise BadImage("empty file", "0 bytes")
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadImage("too many pixels", _first_line(e)) from None
    except Image.UnidentifiedImageError:
        if start.startswith(_MAGIC):
            raise BadImage("damaged", "its header cannot be read") from None
        raise BadImage("no image", describe_start(start)) from None
    except Exception as e:
        raise BadImage("damaged", _first_line(e)) from None


def _has_alpha(im: Image.Image) -> bool:
    return im.mode in _ALPHA_MODES or "transparency" in im.info  # the latter: one colour, or palette entries


def _orientation(im: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none."""
    if im.format != "TIFF" and not any(key in im.info for key in _TURNING):
        return 1  # getexif() alone costs more than opening a small PNG
    try:
        turn = im.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data does not spoil the pixels
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:120]
