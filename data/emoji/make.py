"""Makes emoji.zip of two npm packages; README.md says what it holds.

`npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0` fetches them. Each unpacked in a folder of its
own, `python data/emoji/make.py NOTO/package FLUENT/package` takes about two minutes.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import __version__ as pillow

from gddlab.datasets import ImageDataset
from gddlab.files import atomic_path

CLASSES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
"""Unicode's groups; "Component", five patches of skin colour, is omitted."""
SIZE, SUBJECT = 32, 30
"""Pixels: side of a picture, and the longer side of what it shows."""
SMALLEST = 2 / 3
"""What is smaller than this share of the frame stays smaller, so that a small square is not a large one."""
ALIKE = 0.25
"""Two pictures are held out together if their difference is less than this share of that of either from white."""
NOT_FLUENT = {"country-flag", "family", "1f46a", "1f4ce", "1f3ae"} | {f"1f{n}-200d-1f4bb" for n in (468, 469, "9d1")}
"""Subcategories and subjects that the Fluent package has and Microsoft did not publish as Fluent Emoji, or not in this
form: its flags are Noto's; families; a paperclip, a gamepad and technologists with trademarks."""
TOGETHER = ("family", "keycap")
"""Subcategories that are held out as one: the same figures or the same key, again and again."""
PERSON = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3"}
"""Man and woman are variants of the person; boy and girl of the child; and so the old ones."""
VARIANTS = {"200d", "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
"""Joiner, genders, facing right, hair."""


def subject_of(name: str) -> str:
    """The code points of an emoji without variation selectors: "0031-FE0F-20E3" is "31-20e3"."""
    return "-".join(p.lstrip("0") for p in re.split("[-_]", name.lower()) if p != "fe0f")


def base_of(subject: str, subcategory: str) -> str:
    """What the variants of a subject have in common."""
    if subcategory in TOGETHER:
        return subcategory
    return "-".join(PERSON.get(p, p) for p in subject.split("-") if p not in VARIANTS) or subject


def picture(path: Path) -> Image.Image:
    """An emoji on white, its visible part in the centre; resampled once."""
    im = Image.open(path).convert("RGBA")
    left, top, right, bottom = im.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    side = round(max(max(right - left, bottom - top) * SIZE / SUBJECT, SMALLEST * min(im.size)))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    im = im.crop((x, y, x + side, y + side))
    # Filters are linear: on white first, no colour of a transparent pixel counts, as with premultiplied alpha.
    im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    return im.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def pictures(noto: Path, fluent: Path) -> dict[str, tuple[Image.Image, str]]:
    """Each picture and its subject's base, by name, in order; of equal pictures only the first."""
    drawn = {subject_of(path.stem): path for path in (fluent / "assets").glob("*.webp")}
    found = {}
    for emoji in json.loads((noto / "emoji.json").read_text()):
        if emoji["category"] not in CLASSES:
            continue
        subject = subject_of(emoji["unified"])
        base = base_of(subject, emoji["subcategory"])
        paths = {"noto": noto / "img/google/64" / emoji["image"] if emoji["has_img_google"] else None}
        if not NOT_FLUENT & {subject, emoji["subcategory"]}:
            paths["fluent"] = drawn.get(subject)
        for style, path in paths.items():
            if path is not None:
                found[f"{CLASSES[emoji['category']]}/{subject}-{style}.webp"] = picture(path), base
    once = {im.tobytes(): name for name, (im, _) in sorted(found.items(), reverse=True)}
    return {name: found[name] for name in sorted(once.values())}


def groups_of(images: np.ndarray, bases: list[str]) -> list[str]:
    """The pictures of a base, and those alike or alike when mirrored, are one group, named after its first base."""
    group = {base: base for base in bases}

    def root(base: str) -> str:
        while group[base] != base:
            base = group[base]
        return base

    x, mirrored = (255 - a.reshape(len(a), -1).astype(np.float32) for a in (images, images[:, :, ::-1]))
    squares = (x**2).sum(1)
    for other in (x, mirrored):
        difference = squares[:, None] + squares - 2 * x @ other.T  # squared, summed over pixels
        alike = difference < ALIKE**2 * np.minimum(squares[:, None], squares)
        for i, j in np.argwhere(np.triu(alike, 1)).tolist():
            first, second = sorted((root(bases[i]), root(bases[j])))
            group[second] = first
    return [root(base) for base in bases]


def webp(im: Image.Image) -> bytes:
    out = io.BytesIO()
    im.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def main(noto: Path, fluent: Path, out: Path) -> None:
    found = pictures(noto, fluent)
    images = np.stack([np.asarray(im) for im, _ in found.values()])
    classes = sorted(CLASSES.values())
    labels = [classes.index(name.split("/")[0]) for name in found]
    groups = groups_of(images, [base for _, base in found.values()])
    versions = [json.loads((folder / "package.json").read_text())["version"] for folder in (noto, fluent)]
    data = ImageDataset(
        images,
        labels,
        classes=len(classes),
        name="emoji",
        source="Noto Emoji (npm emoji-datasource-google {}), Fluent Emoji (npm @lobehub/fluent-emoji-3d {})".format(
            *versions
        ),
        crop="square around the subject",
        filter="lanczos",
        codec=f"lossless WebP by Pillow {pillow}",
        extra={"class_names": classes},
    )
    tables = {
        "dataset.json": {
            "labels": list(zip(found, labels, strict=True)),
            "groups": list(zip(found, groups, strict=True)),
        },
        "manifest.json": data.manifest.to_dict(),
    }
    with atomic_path(out) as tmp, zipfile.ZipFile(tmp, "w") as z:
        for name, (im, _) in found.items():
            z.writestr(zipfile.ZipInfo(name), webp(im))  # without a time: the same pictures make the same zip
        for name, table in tables.items():
            z.writestr(zipfile.ZipInfo(name), json.dumps(table), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).with_name("emoji.zip"))
