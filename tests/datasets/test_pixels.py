"""One image: what is accepted becomes the right pixels, what is not is refused for the right reason."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from gddlab.datasets.pixels import BadImage, array, decode, fit, header, png
from tests.datasets.conftest import bad_images, file_of, picture, raw_png

LATER = ("format not read", "not square", "size differs")  # of names and of sets, not of one image
BAD = {name: case for name, case in bad_images().items() if case[1] not in LATER}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_the_reason(name: str) -> None:
    content, kind = BAD[name]
    with pytest.raises(BadImage) as e:
        decode(content)
    assert e.value.kind == kind
    assert "\n" not in e.value.detail


def test_most_is_seen_in_the_header() -> None:
    seen = {}
    for name, (content, kind) in BAD.items():
        try:
            header(io.BytesIO(content))
        except BadImage as e:
            seen[name] = e.kind == kind
    assert all(seen.values())
    assert BAD.keys() - seen.keys() == {"half.png", "half.jpg", "flipped.png"}  # only decoding shows these


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF tags
@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_no_damage_escapes(cut: int) -> None:
    """Files cut or changed anywhere give an image or BadImage, nothing else."""
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        content = file_of(picture(12, 12), kind)
        at = cut % len(content)
        for broken in (content[:at], content[:at] + b"\xff" + content[at + 1 :], content[:at] + content[at + 3 :]):
            with contextlib.suppress(BadImage):
                assert decode(broken).mode in ("L", "RGB")


def test_lossless_kinds_keep_their_pixels() -> None:
    rgb, grey = picture(9, 7), picture(9, 7, channels=1)
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(array(decode(file_of(rgb, kind))), np.asarray(rgb))
        assert np.array_equal(array(decode(file_of(grey, kind))), np.asarray(grey)[..., None])
    assert np.array_equal(array(decode(file_of(rgb, "WEBP", lossless=True))), np.asarray(rgb))
    palette = rgb.convert("P")
    assert np.array_equal(array(decode(file_of(palette))), np.asarray(palette.convert("RGB")))
    assert np.array_equal(array(decode(file_of(palette, "GIF"))), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(array(decode(file_of(bits)))[..., 0], 255 * np.eye(8, dtype=np.uint8))
    assert np.array_equal(array(decode(file_of(grey)), channels=3), np.asarray(grey.convert("RGB")))
    two = raw_png(4, 2, 2, 0, b"\0\x1b\0\x1b")  # two bits a pixel: 0 1 2 3
    assert array(decode(two))[..., 0].tolist() == [[0, 85, 170, 255]] * 2


def test_png_gives_the_pixels_back() -> None:
    for channels in (1, 3):
        a = array(picture(8, 8, channels=channels))
        assert np.array_equal(array(decode(png(a))), a)
    assert b"iCCP" not in png(array(picture()))


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn: int) -> None:
    im = picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = turn
    a = np.asarray(im)
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1]]
    upright += [a.transpose(1, 0, 2), np.rot90(a, -1), a[::-1, ::-1].transpose(1, 0, 2), np.rot90(a)]
    content = file_of(im, exif=exif)
    assert np.array_equal(array(decode(content)), upright[turn - 1])
    h = header(io.BytesIO(content))
    assert (h.height, h.width) == upright[turn - 1].shape[:2]
    assert h.turned == (turn > 1)


def test_alpha_is_composed_when_asked() -> None:
    a = np.zeros((2, 2, 4), dtype=np.uint8)
    a[0, 0] = (10, 20, 30, 255)
    a[0, 1] = (10, 20, 30, 0)
    content = file_of(Image.fromarray(a))
    white, black = array(decode(content, alpha="white")), array(decode(content, alpha="black"))
    assert white[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert black[0].tolist() == [[10, 20, 30], [0, 0, 0]]
    grey = decode(file_of(Image.fromarray(a).convert("LA")), alpha="white")
    assert grey.mode == "L"
    assert grey.getpixel((1, 0)) == 255
    palette = file_of(picture().convert("P"), transparency=3)
    assert decode(palette, alpha="white").mode == "RGB"


def test_fit_takes_the_centre_square_and_resamples_once() -> None:
    im = picture(9, 14)
    a = np.asarray(im)
    assert np.array_equal(array(fit(im, resolution=9, crop="center", filter="box")), a[:, 2:11])
    assert np.array_equal(
        array(fit(picture(14, 9), resolution=9, crop="center", filter="box")), np.asarray(picture(14, 9))[2:11]
    )
    with pytest.raises(BadImage, match="14x9"):
        fit(im, resolution=9, crop="none", filter="box")
    even = picture(8, 12)
    means = np.asarray(even)[:, 2:10].reshape(4, 2, 4, 2, 3).mean((1, 3))
    boxed = array(fit(even, resolution=4, crop="center", filter="box"))
    assert np.abs(boxed - means).max() <= 1  # Pillow rounds after each of two passes
    every = np.asarray(even)[:, 2:10][1::2, 1::2]
    assert np.array_equal(array(fit(even, resolution=4, crop="center", filter="nearest")), every)
    results = {
        f: fit(even, resolution=4, crop="center", filter=f).tobytes() for f in ("lanczos", "bicubic", "bilinear", "box")
    }
    assert len(set(results.values())) == 4


def test_a_photograph_with_previews_is_no_animation() -> None:
    out = io.BytesIO()
    picture(16, 16).save(out, "MPO", save_all=True, append_images=[picture(8, 8)])
    assert decode(out.getvalue()).size == (16, 16)
