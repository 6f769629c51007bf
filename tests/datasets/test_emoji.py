"""The colour data set that ships: what it holds, what is held out, and the script that made it."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.datasets.listing import Listing
from gddlab.datasets.open import emoji_zip, find_source

CLASSES = ["activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel"]
COUNTS = {
    "emoji": (3457, [169, 316, 269, 259, 524, 703, 334, 447, 436]),
    "emoji:train": (2320, [111, 210, 175, 173, 349, 499, 227, 318, 258]),
    "emoji:held-out": (1137, [58, 106, 94, 86, 175, 204, 107, 129, 178]),
}
# Pinned: another value means other images, and scores that cannot be compared.
SHA256 = {
    "emoji": "003352844a5cab511a5dc001714ec5d69c9c0f396d49df7357032f206a42e800",
    "emoji:train": "da09e015b6860b38a7e2243d08af956f308b84d5d616b2f3d257d3f1a7d56e2f",
    "emoji:held-out": "8733393865f02fb243bdec92d17ce7589f3b3ba8feebfc0ca1edceebdbff311e",
}


@pytest.fixture(scope="module")
def opened() -> dict[str, ImageDataset]:
    return {name: open_dataset(name) for name in COUNTS}


def listing(name: str) -> Listing:
    found = find_source(name)
    assert isinstance(found, Listing)
    return found


def subject(name: str) -> str:
    """ "smileys/1f600-noto.webp" is "1f600"."""
    return name.split("/")[1].rpartition("-")[0]


@pytest.mark.parametrize("name", list(COUNTS))
def test_what_it_holds(opened: dict[str, ImageDataset], name: str) -> None:
    data = opened[name]
    assert (data.resolution, data.channels, data.classes) == (32, 3, 9)
    assert (len(data), np.bincount(data.class_ids).tolist()) == COUNTS[name]  # type: ignore[arg-type]
    m = data.manifest
    assert m.sha256 == SHA256[name]
    assert m.name == name and m.extra == {"class_names": CLASSES}
    assert m.source.startswith("Noto Emoji (npm emoji-datasource-google 16.0.0), Fluent Emoji")
    assert m.lossy == frozenset()
    assert data.images([0]).shape == (1, 3, 32, 32)


def test_names_say_class_subject_and_style(opened: dict[str, ImageDataset]) -> None:
    whole = listing("emoji")
    assert whole.labels is not None
    for name, y in zip(whole.names, whole.labels, strict=True):
        assert re.fullmatch(rf"{CLASSES[y]}/[0-9a-f]+(-[0-9a-f]+)*-(noto|fluent)\.webp", name), name
        assert "fe0f" not in name
    assert sum("-noto" in name for name in whole.names) == 1892


def test_parts_share_no_subject(opened: dict[str, ImageDataset]) -> None:
    train, rest, whole = (listing(name) for name in ("emoji:train", "emoji:held-out", "emoji"))
    assert train.groups and rest.groups and whole.groups
    assert not {*train.groups} & {*rest.groups}
    assert len({*train.groups}) + len({*rest.groups}) == len({*whole.groups}) == 1498
    assert sorted([*train.names, *rest.names]) == list(whole.names)
    assert not {*map(subject, train.names)} & {*map(subject, rest.names)}
    person = {"1f468": "1f9d1", "1f469": "1f9d1", "2640": "", "2642": "", "200d": "", "27a1": ""}

    def base(name: str) -> str:
        return "".join(person.get(p, p) for p in subject(name).split("-")) or name

    bases = [{*map(base, part.names)} for part in (train, rest)]
    assert not bases[0] & bases[1]  # a woman that rows is held out with the man that rows


def test_held_out_pictures_are_no_copies(opened: dict[str, ImageDataset]) -> None:
    """README's numbers: the nearest picture of the training part, mirrored or not, in root mean square of 255."""
    held = opened["emoji:held-out"].uint8.reshape(1137, -1).astype(np.float32)
    nearest = np.full(1137, np.inf, dtype=np.float32)
    for x in (opened["emoji:train"].uint8, opened["emoji:train"].uint8[:, :, ::-1]):
        other = x.reshape(2320, -1).astype(np.float32)
        squared = (held**2).sum(1)[:, None] + (other**2).sum(1) - 2 * held @ other.T
        nearest = np.minimum(nearest, np.sqrt(squared.min(1) / 3072))
    assert nearest.min() > 9
    assert (nearest < 20).sum() == 18
    assert np.median(nearest) == pytest.approx(47.8, abs=0.1)


def test_no_picture_twice_none_empty_none_cut_off(opened: dict[str, ImageDataset]) -> None:
    x = opened["emoji"].uint8
    assert len({image.tobytes() for image in x}) == len(x)
    assert x.reshape(len(x), -1).mean(1).min() > 90  # the darkest: a black square on white
    from_white = np.sqrt(((255.0 - x) ** 2).mean((1, 2, 3)))
    assert from_white.min() > 11  # the palest: fog
    assert np.median(from_white) == pytest.approx(91, abs=1)
    corners = x[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 240).all(2).mean() > 0.98  # white
    seen = (x < 250).any(3)  # (N, 32, 32)
    sides = [np.array([np.ptp(np.flatnonzero(s)) + 1 for s in seen.any(axis)]) for axis in (1, 2)]
    longer = np.maximum(*sides)
    assert np.percentile(longer, [5, 50, 100]).tolist() == pytest.approx([29, 31, 32], abs=1)
    assert longer.min() >= 10  # a small square stays small
    colourful = np.ptp(x.astype(int), axis=3).max((1, 2)) > 40
    assert colourful.mean() > 0.9


def test_the_zip_is_small_and_lossless_and_what_stands_beside_it(opened: dict[str, ImageDataset]) -> None:
    path = emoji_zip()
    assert path.stat().st_size < 5_300_000
    with zipfile.ZipFile(path) as z:
        images = [name for name in z.namelist() if name.endswith(".webp")]
        assert len(images) == 3457 and all(z.read(name)[12:16] == b"VP8L" for name in images)
        assert json.loads(z.read("manifest.json"))["sha256"] == SHA256["emoji"]
    about = (path.parent / "README.md").read_text()
    assert SHA256["emoji"] in about
    rows = {c[0]: c[1:] for c in re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", about, re.MULTILINE)}
    counts = [COUNTS[name] for name in COUNTS]
    for i, name in enumerate(CLASSES):
        assert rows[name] == tuple(str(per_class[i]) for _, per_class in counts)
    assert rows["all"] == tuple(f"{n:,}" for n, _ in counts)
    assert "Copyright (c) Microsoft Corporation" in (path.parent / "LICENSE-fluent").read_text()
    assert "Copyright Google Inc." in (path.parent / "LICENSE-noto").read_text()


# The script.


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_emoji", emoji_zip().with_name("make.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(path: Path, box: tuple[int, int, int, int], colour: str, size: int = 64) -> None:
    """A rectangle on a transparent ground whose hidden colour is green."""
    im = Image.new("RGBA", (size, size), (0, 255, 0, 0))
    im.paste(Image.new("RGBA", (box[2] - box[0], box[3] - box[1]), colour), box[:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, lossless=True, exact=True)


def test_a_picture_is_centred_filled_and_has_clean_edges(script: ModuleType, tmp_path: Path) -> None:
    drawn(tmp_path / "a.png", (0, 20, 60, 60), "red")
    x = np.asarray(script.picture(tmp_path / "a.png")).astype(int)
    assert x.shape == (32, 32, 3)
    red = (x[..., 0] > 200) & (x[..., 1] < 50)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert np.ptp(columns) + 1 in (29, 30) and np.ptp(rows) + 1 in (19, 20)
    assert abs(rows.mean() - 15.5) <= 0.5 and abs(columns.mean() - 15.5) <= 0.5
    assert (x[..., 1] <= x[..., 0]).all()  # nothing of the hidden green at the edges
    drawn(tmp_path / "b.png", (30, 30, 34, 34), "red")
    small = np.asarray(script.picture(tmp_path / "b.png"))
    assert (small[..., 1] < 128).any(0).sum() in (2, 3)  # of 43 pixels 4 are seen: it is not enlarged more


def test_what_is_one_subject(script: ModuleType) -> None:
    assert script.subject_of("0031-FE0F-20E3") == "31-20e3"
    assert script.subject_of("1F468-200D-2695-FE0F") == "1f468-200d-2695"
    for variant in ("1f468-200d-2695", "1f469-200d-2695", "1f9d1-200d-2695"):
        assert script.base_of(variant, "person-role") == "1f9d1-2695"
    assert script.base_of("1f3c3-200d-2640-200d-27a1", "person-activity") == "1f3c3"
    assert script.base_of("2640", "gender") == "2640"  # a sign, not a variant of one
    assert script.base_of("1f468-200d-1f466", "family") == "family"


def test_what_is_alike_is_one_group(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 32, 32, 3))
    near = np.clip(a + rng.normal(0, 10, a.shape), 0, 255)
    images = np.stack([a, b, a[:, ::-1], near]).astype(np.uint8)
    assert script.groups_of(images, ["z", "y", "x", "w"]) == ["w", "y", "w", "w"]
    assert script.groups_of(images[:2], ["z", "z"]) == ["z", "z"]


def test_the_script_makes_a_data_set(script: ModuleType, tmp_path: Path) -> None:
    noto, fluent = tmp_path / "noto", tmp_path / "fluent"
    table = []
    for code, category, sub, colour in (
        ("1F600", "Smileys & Emotion", "face-smiling", "red"),
        ("1F1EB-1F1F7", "Flags", "country-flag", "blue"),
        ("1F1E8-1F1F5", "Flags", "country-flag", "blue"),  # the same picture
        ("1F4CE", "Objects", "office", "black"),
        ("1F3FB", "Component", "skin-tone", "brown"),
    ):
        image = f"{code.lower()}.png"
        about = {"unified": code, "category": category, "subcategory": sub, "image": image, "has_img_google": True}
        table.append(about)
        drawn(noto / "img/google/64" / image, (2, 2, 62, 42), colour)
        drawn(fluent / "assets" / f"{code.lower()}.webp", (20, 20, 220, 220), colour, size=256)
    (noto / "emoji.json").write_text(json.dumps(table))
    for folder in (noto, fluent):
        (folder / "package.json").write_text('{"version": "1.2.3"}')
    out = tmp_path / "emoji.zip"
    script.main(noto, fluent, out)
    found = listing(str(out))
    assert list(found.names) == [
        "flags/1f1e8-1f1f5-noto.webp",
        "objects/1f4ce-noto.webp",
        "smileys/1f600-fluent.webp",
        "smileys/1f600-noto.webp",
    ]
    assert found.groups is not None and found.groups[2] == found.groups[3] == "1f600"
    data = open_dataset(out)
    assert data.class_ids is not None and data.class_ids.tolist() == [2, 4, 6, 6] and data.classes == 9
    assert "1.2.3" in data.manifest.extra["from"]
    first = out.read_bytes()
    script.main(noto, fluent, out)
    assert out.read_bytes() == first
