"""The images of a source by name, and the class of each; nothing is decoded here."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import numpy as np
import torch

from gddlab.datasets.pixels import OTHER_SUFFIXES, SUFFIXES, BadImage, Header, header
from gddlab.errors import GddlabError
from gddlab.runtime import generator

if TYPE_CHECKING:
    from PIL import Image

LABELS = "dataset.json"
MANIFEST = "manifest.json"
MAX_CLASSES = 100_000
GIVEN = ("array", "images")
"""Sources of what is given as an array or a list."""

TRAIN, HELD_OUT = PARTS = ("train", "held-out")
"""Parts of a data set, named after it: "digits:train", "faces.zip:held-out"."""

# What to do about each kind of problem; otherwise replace or remove the file.
HINTS = {
    "not square": "give crop='center'",
    "size differs": "give resolution=",
    "colours differ": "run gddlab.prepare, which makes all of them RGB",
    "alpha channel": "give alpha='white' or alpha='black'",
    "CMYK colours": "convert to RGB",
    "colour space": "convert to RGB",
    "more than 8 bits a channel": "convert to 8 bits",
    "animated": "save one frame of each",
    "format not read": "convert to PNG",
    "class folder without images": "remove the folder",
    "path not accepted": "make the zip anew",
    "name used twice": "make the zip anew",
    "encrypted": "make the zip anew",
    "no label": "correct the labels",
    "labelled twice": "correct the labels",
    "no such image": "correct the labels",
    "class id is no integer": "correct the labels",
    "class id out of range": "correct the labels",
    "damaged labels": "correct the labels",
}

_DAMAGED = "damaged labels"

# 00000/img00000000.png as EDM's dataset tool writes, 001000/001234.png as its samplers do.
_SHARDED = re.compile(r"(\d{5,})/(?:img)?(\d{5,})\.\w+")

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Why an image, or the file of labels, cannot be used."""

    name: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        name = self.name if self.name.isprintable() else repr(self.name)
        return f"{name}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


def attempt(make: Callable[[str], T], names: Iterable[str]) -> Iterator[T | Problem]:
    """make(name) for each image, or why it cannot be used."""
    for name in names:
        try:
            yield make(name)
        except BadImage as e:
            yield Problem(name, e.kind, e.detail)
        except OSError as e:
            yield Problem(name, "cannot be read", e.strerror or type(e).__name__)


@dataclass(frozen=True)
class Listing:
    """The images of a source, in order.

    Attributes:
        name: Of the dataset.
        source: Where it is, for messages and manifests.
        names: Of the images; file names relative to the source, or numbers.
        open: Gives the file of a name, pixels, uint8 (H, W, C), or a Pillow image; from any thread, and in a forked
            process.
        labels: Class ids, int64 (N,), or None.
        classes: Number of classes; 0 without labels.
        fingerprint: JSON that changes when the content does.
        about: `crop`, `filter`, `codec` of the manifest.
        extra: Of the manifest; `class_names` in the order of ids, where known.
        sha256: What the manifest records.
        groups: A name for each image; images of one group are held out together. None: each image is its own.
        problems: Found without opening an image.
        ignored: Number of skipped files by suffix.
        options: What `choose` was asked for.
    """

    name: str
    source: str
    names: Sequence[str]
    open: Callable[[str], BinaryIO | np.ndarray | Image.Image]
    labels: np.ndarray | None = None
    classes: int = 0
    fingerprint: str = ""
    about: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    groups: Sequence[str] | None = None
    problems: Sequence[Problem] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> bytes | np.ndarray | Image.Image:
        """The whole of what `open` gives."""
        content = self.open(name)
        return read_all(cast(BinaryIO, content)) if isinstance(content, io.IOBase) else cast(Any, content)

    def header(self, name: str, *, alpha: str = "refuse") -> Header:
        """Size and kind of an image; raises BadImage."""
        return header(self.open(name), alpha=alpha)


def read_all(content: BinaryIO) -> bytes:
    """What an open file holds."""
    try:
        with content as f:
            return f.read()
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise BadImage("damaged", str(e)[:120] or "the zip is cut off") from None


def refusal(listing: Listing, problems: Sequence[Problem], *, preparing: bool = False) -> GddlabError:
    """The one line about a source with problems."""
    shown = problems[:3]
    advice = [HINTS.get(p.kind, "replace or remove the file") for p in shown]
    if not preparing:
        advice = [hint.replace("give ", "run gddlab.prepare with ") for hint in advice]
    same = len({*advice}) == 1
    text = "; ".join(str(p) if same else f"{p}: {hint}" for p, hint in zip(shown, advice, strict=True))
    if len(problems) > len(shown):
        again = f"gddlab.prepare({listing.source}, dry_run=True)" if listing.source in GIVEN else None
        again = again or f"gddlab prepare {listing.source} --dry-run"
        text += f"; and {len(problems) - len(shown):,} more ({again} lists all)"
    images = "1 image" if len(listing) == 1 else f"{len(listing):,} images"
    many = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    return GddlabError(f"{listing.source} ({images}) has {many}: {text}{f': {advice[0]}' if same else ''}")


def image_files(names: Sequence[str]) -> tuple[list[str], list[Problem], dict[str, int]]:
    """Sorts files by name: images in order, images of kinds that are not read, and the number of others by suffix.

    Hidden files and those that macOS adds to zips are skipped.
    """
    images, problems, ignored = [], [], Counter[str]()
    for name in names:
        parts = name.split("/")
        if any(p.startswith(".") or p == "__MACOSX" for p in parts) or name in (LABELS, MANIFEST):
            continue
        stem, dot, suffix = parts[-1].rpartition(".")
        suffix = f"{dot}{suffix}".lower() if stem else ""
        if suffix in SUFFIXES:
            images.append(name)
        elif suffix in OTHER_SUFFIXES:
            problems.append(Problem(name, "format not read", f"{suffix}; accepted: {', '.join(sorted(SUFFIXES))}"))
        else:
            ignored[suffix or "no suffix"] += 1
    return sorted(images), problems, dict(ignored)


@dataclass(frozen=True)
class Classes:
    """Class ids of images, int64 (N,), or None; the number of classes, their names, and what is wrong with them.

    `groups`: as in a Listing.
    """

    ids: np.ndarray | None = None
    count: int = 0
    names: list[str] | None = None
    problems: Sequence[Problem] = ()
    groups: Sequence[str] | None = None


def classes_by_folder(names: Sequence[str], empty: Sequence[str] = ()) -> Classes:
    """The first folder of a name is its class; ids count the folders by number if all are numbers, else by name.

    There are no classes if all images are in the source itself or in one folder, or if the folders are shards
    (00000/img00000000.png, 001000/001234.png). `empty`: folders without images.
    """
    if all((m := _SHARDED.fullmatch(n)) and int(m[1]) in (int(m[2]) // 1000, int(m[2]) // 1000 * 1000) for n in names):
        return Classes()
    folder = [n.split("/", 1)[0] if "/" in n else "" for n in names]
    found = set(folder) - {""}
    if not found or (len(found) == 1 and "" not in folder and not empty):
        return Classes()
    problems = [Problem(e, "class folder without images") for e in empty]
    lost = [n for n, f in zip(names, folder, strict=True) if not f]
    problems += [Problem(n, "no label", "it is in no class folder") for n in lost]
    if problems:
        return Classes(problems=problems)
    numbers = all(f.isascii() and f.isdigit() for f in found)
    ordered = sorted(found, key=(lambda f: (int(f), f)) if numbers else None)
    ids = {f: i for i, f in enumerate(ordered)}
    return Classes(np.array([ids[f] for f in folder], dtype=np.int64), len(ordered), ordered)


def classes_of_table(names: Sequence[str], content: bytes, classes: int | None = None) -> Classes:
    """Classes and groups from a dataset.json; `classes`: their number, if recorded.

    `{"labels": [[name, class], ...]}`, or null; and, if any, `"groups": [[name, group], ...]`, where a group is text,
    and an image without one is alone.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        return Classes(problems=[Problem(LABELS, _DAMAGED, f"no JSON: {e}")])
    pairs = value.get("labels", 0) if isinstance(value, dict) else 0
    if pairs is not None and not isinstance(pairs, list):
        why = 'it is not {"labels": [[name, class], ...]} or {"labels": null}'
        return Classes(problems=[Problem(LABELS, _DAMAGED, why)])
    there = set(names)
    group, problems = _by_name(value.get("groups") or [], there, "group")
    problems += [
        Problem(LABELS, _DAMAGED, f"the group of {name} is {str(g)[:40]}, accepted is text")
        for name, g in group.items()
        if not isinstance(g, str)
    ]
    groups = [group.get(name, name) for name in names] if group else None
    if pairs is None:
        return Classes(groups=groups, problems=problems)
    label, more = _by_name(pairs, there, "class")
    problems += more
    problems += [Problem(name, "no label", f"in {LABELS}") for name in names if name not in label]
    limit = MAX_CLASSES if classes is None else classes
    for name, y in label.items():
        if name not in there:
            continue
        if type(y) is not int:
            problems.append(Problem(name, "class id is no integer", str(y)[:40]))
        elif not 0 <= y < limit:
            problems.append(Problem(name, "class id out of range", f"{str(y)[:20]}, accepted are 0..{limit - 1}"))
    if problems:
        return Classes(problems=problems)
    ids = np.array([label[n] for n in names], dtype=np.int64)
    return Classes(ids, int(ids.max(initial=-1)) + 1 if classes is None else classes, groups=groups)


def _by_name(pairs: Any, there: Collection[str], what: str) -> tuple[dict[str, Any], list[Problem]]:
    """What the pairs [name, class or group] say of each name, and what is wrong with the names."""
    if not isinstance(pairs, list):
        return {}, [Problem(LABELS, _DAMAGED, f"its {what}s are {str(pairs)[:40]}, accepted is [[name, {what}], ...]")]
    found: dict[str, Any] = {}
    problems = []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            problems.append(Problem(LABELS, _DAMAGED, f"entry {i} is {str(pair)[:60]}, accepted is [name, {what}]"))
            continue
        name = pair[0].replace("\\", "/").removeprefix("./")
        if name in found:
            problems.append(Problem(name, "labelled twice", f"in {LABELS}"))
        elif name not in there:
            problems.append(Problem(name, "no such image", f"it has a {what} in {LABELS}"))
        found[name] = pair[1]
    return found, problems


def name_and_part(name: str) -> tuple[str, str | None]:
    """The name or path of a data set, and the part of it that is asked for: "digits:train" is ("digits", "train")."""
    whole, colon, part = name.rpartition(":")
    return (whole, part) if colon and whole and part in PARTS and not whole.startswith("hf:") else (name, None)


def part_of(listing: Listing, part: str) -> Listing:
    """The images that are trained on, two thirds, or those held out; the choice never changes.

    A third of each class is held out, by groups, chosen at random with seed 0.
    """
    if listing.problems:
        return listing  # reported when the images are read
    labels = np.zeros(len(listing), dtype=np.int64) if listing.labels is None else listing.labels
    groups = listing.groups or listing.names
    held: set[str] = set()
    for y in np.unique(labels).tolist():
        own = list(dict.fromkeys(groups[i] for i in np.flatnonzero(labels == y).tolist()))
        drawn = torch.randperm(len(own), generator=generator(0, y))[: round(len(own) / 3)]
        held.update(own[i] for i in drawn.tolist())
    index = np.flatnonzero([(g in held) == (part == HELD_OUT) for g in groups])
    if not len(index):
        raise GddlabError(f"{listing.source} has {len(listing)} images, none of them is in the part {part!r}")
    name, source = f"{listing.name}:{part}", f"{listing.source}:{part}"
    return replace(_subset(listing, index), name=name, source=source, sha256=None)


def _subset(listing: Listing, index: np.ndarray) -> Listing:
    return replace(
        listing,
        names=[listing.names[i] for i in index.tolist()],
        labels=None if listing.labels is None else listing.labels[index],
        groups=None if listing.groups is None else [listing.groups[i] for i in index.tolist()],
    )


def choose(listing: Listing, classes: Collection[int] | None, max_images: int | None, seed: int) -> Listing:
    """Images of some classes, at most `max_images`, chosen by `seed`; order, ids and number of classes do not change.

    Raises:
        GddlabError: No labels, unknown ids, or no image of these classes.
    """
    if (classes is None and max_images is None) or (listing.problems and listing.labels is None):
        return listing  # unreadable labels are reported with the images
    options: dict[str, Any] = {}
    index = np.arange(len(listing))
    if classes is not None:
        options["classes"] = sorted(set(classes))
        if listing.labels is None:
            raise GddlabError(f"classes={list(classes)}, but {listing.source} has no labels: omit classes")
        if not classes or not all(0 <= y < listing.classes for y in classes):
            raise GddlabError(f"classes={list(classes)}: give some of 0..{listing.classes - 1}")
        index = index[np.isin(listing.labels, list(classes))]
        if not len(index):
            raise GddlabError(f"classes={list(classes)}: {listing.source} has no image of them")
    if max_images is not None:
        options |= {"max_images": max_images, "seed": seed}
        if max_images < len(index):
            drawn = torch.randperm(len(index), generator=generator(seed, 0))[:max_images]
            index = index[drawn.sort().values.numpy()]
    return replace(_subset(listing, index), options=options)
