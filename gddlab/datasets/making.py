"""The stages of `prepare`: look at headers, decide the format, then decode, fit and write in parts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gddlab.datasets.base import ContentHash, Manifest
from gddlab.datasets.listing import Listing, Problem, Reader, refusal
from gddlab.datasets.packing import Entry, assemble, image_name, missing_parts, open_parts, read_part, write_part
from gddlab.datasets.pixels import BadImage, Header, array, decode, fit, header, png
from gddlab.datasets.store import locked, problem
from gddlab.datasets.workers import Workers
from gddlab.errors import GddlabError
from gddlab.files import hash_json
from gddlab.progress import progress_bar

__all__ = ["Recipe", "check", "count_changes", "make", "plan", "scan"]

_SCAN = 256  # headers a task
_PART_BYTES = 8 << 20  # pixels of a part: what a process holds, and what a kill may lose


@dataclass(frozen=True)
class Recipe:
    """How each image is made."""

    resolution: int
    channels: int
    crop: str
    filter: str
    alpha: str


def scan(pool: Workers, listing: Listing, *, alpha: str, progress: bool) -> tuple[dict[str, Header], list[Problem]]:
    """Reads all headers, so that most of what is wrong shows before hours of work, and sizes are known."""
    headers: dict[str, Header] = {}
    problems: list[Problem] = []
    tasks = ((listing.reader.part(names), names, alpha) for names in _chunks(listing.names, _SCAN))
    with progress_bar(total=len(listing), desc="looking", unit="img", enabled=progress) as bar:
        for good, bad in pool.run(_scan, tasks):
            headers |= good
            problems += bad
            bar.update(len(good) + len(bad))
    return headers, problems


def _scan(reader: Reader, names: Sequence[str], alpha: str) -> tuple[dict[str, Header], list[Problem]]:
    good, bad = {}, []
    for name in names:
        try:
            file = reader.open(name)
            try:
                good[name] = header(file, alpha=alpha)
            finally:
                if not isinstance(file, np.ndarray):
                    file.close()
        except (BadImage, OSError) as e:
            bad.append(problem(name, e))
    return good, bad


def plan(
    headers: dict[str, Header], *, resolution: int | None, crop: str, filter: str, alpha: str
) -> tuple[Recipe | None, list[Problem]]:
    """The one format of all images: three channels if any has colour; the most frequent size where none is asked."""
    problems = []
    sides: dict[str, int] = {}
    for name, h in headers.items():
        if crop == "none" and h.width != h.height:
            problems.append(Problem(name, "not square", f"{h.width}x{h.height}"))
        else:
            sides[name] = min(h.width, h.height)
    if not sides:
        return None, problems
    if resolution is None:
        resolution = Counter(sides.values()).most_common(1)[0][0]
        for name, side in sides.items():
            if side != resolution:
                problems.append(Problem(name, "size differs", f"{side}x{side}, most are {resolution}x{resolution}"))
    return Recipe(resolution, max(h.channels for h in headers.values()), crop, filter, alpha), problems


def count_changes(headers: Iterable[Header], recipe: Recipe) -> dict[str, int]:
    """How many images are changed in which way; ways that no image needs are left out."""
    changes = Counter[str]()
    for h in headers:
        side = min(h.width, h.height)
        changes["turned"] += h.turned
        changes["cropped"] += h.width != h.height
        changes["reduced"] += side > recipe.resolution
        changes["enlarged"] += side < recipe.resolution
        changes["grey_to_rgb"] += h.channels < recipe.channels
        changes["composed"] += h.alpha
    return {key: n for key, n in changes.items() if n}


def check(pool: Workers, listing: Listing, names: Sequence[str], recipe: Recipe, *, progress: bool) -> list[Problem]:
    """Makes all images as `make` does, and keeps none."""
    problems: list[Problem] = []
    tasks = ((listing.reader.part(some), some, recipe) for some in _chunks(names, 64))
    with progress_bar(total=len(names), desc="checking", unit="img", enabled=progress) as bar:
        for n, found in pool.run(_check, tasks):
            problems += found
            bar.update(n)
    return problems


def _check(reader: Reader, names: Sequence[str], recipe: Recipe) -> tuple[int, list[Problem]]:
    return len(names), [p for p, _ in _images(reader, names, recipe) if p]


def _images(
    reader: Reader, names: Sequence[str], recipe: Recipe
) -> Iterator[tuple[Problem, None] | tuple[None, np.ndarray]]:
    for name in names:
        try:
            im = decode(reader.read(name), alpha=recipe.alpha)
            im = fit(im, resolution=recipe.resolution, crop=recipe.crop, filter=recipe.filter)
        except (BadImage, OSError) as e:
            yield problem(name, e), None
        else:
            yield None, array(im, recipe.channels)


def make(
    pool: Workers,
    listing: Listing,
    recipe: Recipe,
    out: Path,
    *,
    changes: dict[str, int],
    extra: dict[str, Any],
    progress: bool,
) -> str:
    """Makes the zip, or goes on with it; returns the hash of its content.

    Raises:
        GddlabError: Images are damaged, the disk is full, or another process is making it.
    """
    from PIL import __version__ as pillow

    n, r, c = len(listing), recipe.resolution, recipe.channels
    per_part = max(1, min(max(16, n // 128), 512, _PART_BYTES // (r * r * c)))  # not of the number of workers
    parts = list(_chunks(range(n), per_part))
    files = hash_json([listing.fingerprint, list(listing.names)])[:16]
    settings = {"files": files, "images": n, "per_part": per_part, **asdict(recipe), "pillow": pillow}
    content = ContentHash((n, r, r, c))
    problems: list[Problem] = []
    try:
        folder = open_parts(out, settings)
        with locked(folder / "lock", wait=False):
            done = set(range(len(parts))) - set(missing_parts(folder, len(parts)))
            tasks = (_task(listing, part, recipe, folder, k, k in done) for k, part in enumerate(parts))
            with progress_bar(total=n, desc=f"preparing {out.name}", unit="img", enabled=progress) as bar:
                for images, found in pool.run(_make, tasks):
                    problems += found
                    content.add(images)
                    bar.update(per_part)
            if problems:  # the source has to change, and the parts with it
                shutil.rmtree(folder)
                raise refusal(listing, problems, preparing=True)
            sha256 = content.digest(listing.labels)
            manifest = Manifest(
                name=out.stem,
                source=listing.source,
                resolution=r,
                channels=c,
                count=n,
                classes=listing.classes,
                crop=_steps(listing.about["crop"], recipe.crop if changes.get("cropped") else None),
                filter=_steps(
                    listing.about["filter"], recipe.filter if changes.keys() & {"reduced", "enlarged"} else None
                ),
                codec=f"{listing.about['codec']} to png by Pillow {pillow}".removeprefix("none to "),
                sha256=sha256,
                extra=extra,
            )
            assemble(folder, len(parts), out, lambda _: manifest.to_dict())
    except BlockingIOError:
        raise GddlabError(f"{out} is being made by another process: wait for it") from None
    except OSError as e:
        raise GddlabError(
            f"{out} cannot be made ({e}): make room or choose another folder, then run it again"
        ) from None
    return sha256


def _task(
    listing: Listing, part: range, recipe: Recipe, folder: Path, k: int, done: bool
) -> tuple[Reader, Sequence[str], list[int] | None, int, Recipe, Path, int, bool]:
    names = listing.names[part.start : part.stop]
    labels = None if listing.labels is None else listing.labels[part.start : part.stop].tolist()
    return listing.reader.part(names), names, labels, part.start, recipe, folder, k, done


def _make(
    reader: Reader,
    names: Sequence[str],
    labels: list[int] | None,
    first: int,
    recipe: Recipe,
    folder: Path,
    k: int,
    done: bool,
) -> tuple[np.ndarray, list[Problem]]:
    """Writes one part, and returns its pixels for the hash; a part that is done is read."""
    out = np.zeros((len(names), recipe.resolution, recipe.resolution, recipe.channels), dtype=np.uint8)
    if done:
        for i, entry in enumerate(read_part(folder, k)):
            out[i] = array(decode(entry.png))
        return out, []
    problems = []
    entries = []
    for i, (wrong, image) in enumerate(_images(reader, names, recipe)):
        if image is None:
            problems.append(wrong)
            continue
        out[i] = image
        entries.append(Entry(image_name(first + i), png(image), None if labels is None else labels[i]))
    if not problems:
        write_part(folder, k, entries)
    return out, [p for p in problems if p]


def _steps(before: str, now: str | None) -> str:
    """What was done to the images, by their own manifest and now."""
    if now is None:
        return before
    return now if before in ("none", "unknown") else f"{before}, {now}"


def _chunks(items: Sequence[Any], n: int) -> Iterator[Any]:
    for i in range(0, len(items), n):
        yield items[i : i + n]
