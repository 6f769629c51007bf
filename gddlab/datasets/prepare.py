"""Makes EDM zips of images of any kind: checked, cropped and resampled in parallel; interrupted work continues."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from gddlab.datasets.base import ContentHash, ImageDataset, Manifest
from gddlab.datasets.listing import HINTS, Listing, Problem, Reader, choose, refusal
from gddlab.datasets.open import find_source
from gddlab.datasets.packing import (
    Entry,
    Workers,
    assemble,
    image_name,
    missing_parts,
    open_parts,
    read_part,
    write_part,
)
from gddlab.datasets.pixels import ALPHA, CROPS, FILTERS, BadImage, Header, array, decode, fit, header, png
from gddlab.datasets.store import cores, problem
from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json
from gddlab.progress import progress_bar

_SCAN = 256  # headers per task
_PART_BYTES = 8 << 20  # of pixels per part: held by a process, lost if it is killed


@dataclass(frozen=True)
class Recipe:
    """How each image is made."""

    resolution: int
    channels: int
    crop: str
    filter: str
    alpha: str


def scan(pool: Workers, listing: Listing, *, alpha: str, progress: bool) -> tuple[dict[str, Header], list[Problem]]:
    """Reads all headers, to know the sizes and to find most problems before hours of work."""
    headers: dict[str, Header] = {}
    problems: list[Problem] = []
    tasks = ((listing.reader.part(names), names, alpha) for names in _chunks(listing.names, _SCAN))
    with progress_bar(total=len(listing), desc="scanning", unit="img", enabled=progress) as bar:
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
    """The format of all images: three channels if any has colour; by default the most frequent size."""
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
    """How many images are changed in which way; only those above 0."""
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
    """Makes the zip, or continues with it; returns the hash of its content.

    Raises:
        GddlabError: Images are damaged, the disk is full, or another process is making it.
    """
    from PIL import __version__ as pillow

    n, r, c = len(listing), recipe.resolution, recipe.channels
    per_part = max(1, min(max(16, n // 128), 512, _PART_BYTES // (r * r * c)))  # independent of the number of workers
    parts = list(_chunks(range(n), per_part))
    files = hash_json([listing.fingerprint, list(listing.names)])[:16]
    settings = {"files": files, "images": n, "per_part": per_part, **asdict(recipe), "pillow": pillow}
    content = ContentHash((n, r, r, c))
    problems: list[Problem] = []
    try:
        folder = open_parts(out, settings)
        with FileLock(folder / "lock", timeout=0):
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
    except Timeout:
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
    """Writes one part, or reads a finished one; returns its pixels for the hash."""
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
    """Processing of the images, according to their own manifest and now."""
    if now is None:
        return before
    return now if before in ("none", "unknown") else f"{before}, {now}"


def _chunks(items: Sequence[Any], n: int) -> Iterator[Any]:
    for i in range(0, len(items), n):
        yield items[i : i + n]


_MAX_SIDE = 8192
_ALONE = 128  # images that one process makes in the time that a second one takes to start
_LISTED = 20  # problems of one kind that a report prints by name
_NOTES = {
    "turned": "images turned as their EXIF orientation says",
    "cropped": "images cropped to the square around their centre",
    "enlarged": "images smaller than the resolution, enlarged",
    "grey_to_rgb": "images that are grey among colour, repeated to RGB",
    "composed": "images with an alpha channel, composed",
}


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made or, in a dry run, would make.

    Attributes:
        source, out: Source and target; out is None in a dry run.
        images: Number of images in the source.
        classes: Number of classes; 0 without labels.
        resolution, channels: Of the images made; None if none can be made.
        problems: Only in a dry run; otherwise they are refused.
        notes: Counts of images rotated, enlarged or repeated to RGB, and of files skipped.
        sha256: Hash of images and labels as in the manifest; None in a dry run.
    """

    source: str
    out: Path | None
    images: int
    classes: int
    resolution: int | None
    channels: int | None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.out or self.source}: {self.images:,} images"]
        if self.resolution:
            lines[0] += f", {self.resolution}x{self.resolution}, {'RGB' if self.channels == 3 else 'grey'}"
        lines[0] += f", {self.classes:,} classes" if self.classes else ", no labels"
        if self.sha256:
            lines[0] += f", sha256 {self.sha256[:16]}"
        elif self.ok:
            lines[0] += ", nothing wrong"
        lines += [f"  note: {note}" for note in self.notes]
        kinds: dict[str, list[Problem]] = {}
        for p in self.problems:
            kinds.setdefault(p.kind, []).append(p)
        for kind, found in kinds.items():
            hint = HINTS.get(kind)
            lines.append(f"  {kind}: {len(found):,}" + (f" ({hint})" if hint else ""))
            lines += ["    " + str(replace(p, kind=p.detail or kind, detail="")) for p in found[:_LISTED]]
            if len(found) > _LISTED:
                lines.append(f"    and {len(found) - _LISTED:,} more")
        return "\n".join(lines)


def prepare(
    source: str | Path | ImageDataset,
    out: str | Path | None = None,
    *,
    resolution: int | None = None,
    crop: Literal["none", "center"] = "none",
    filter: Literal["lanczos", "box", "bicubic", "bilinear", "hamming", "nearest"] = "lanczos",
    alpha: Literal["refuse", "white", "black"] = "refuse",
    classes: Sequence[int] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    download: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Makes an EDM zip: PNG files of one size, not compressed, dataset.json, and a manifest.

    After an interruption the same call continues: finished parts are kept in OUT.parts. OUT appears when complete.

    Args:
        source: As for `open_dataset`, with images of any size and shape, grey and colour mixed.
        out: The zip to make; not needed in a dry run.
        resolution: Side of the images made, pixels; by default that of the source, if all its images have one size.
        crop: "center" takes the largest square around the centre; "none" refuses images that are not square.
        filter: Resampling: lanczos, box, bicubic, bilinear, hamming or nearest (Pillow's, on 8-bit values).
        alpha: Background of transparent pixels, "white" or "black"; "refuse" refuses images with an alpha channel.
        classes, max_images, seed: As for `open_dataset`.
        workers: Number of processes; by default the number of usable cores, or fewer for few images.
        overwrite: Replaces OUT if it exists, when the new one is complete.
        dry_run: Reads every image, writes nothing, and reports all problems.
        download: Downloads CIFAR-10 into the cache if it is not found.
        progress: Shows a bar at a terminal.

    Returns:
        The report; `print` it.

    Raises:
        NotFound: No such source.
        GddlabError: An option or an image cannot be used, OUT is there already, or another process is making it.
    """
    for name, value, accepted in (("crop", crop, CROPS), ("filter", filter, FILTERS), ("alpha", alpha, ALPHA)):
        if value not in accepted:
            raise unknown(name, value, accepted)
    for name, number in (("resolution", resolution), ("workers", workers)):
        if number is not None and (type(number) is not int or number < 1):
            raise GddlabError(f"{name}={number!r}: give a whole number from 1 up")
    if resolution is not None and resolution > _MAX_SIDE:
        raise GddlabError(f"resolution={resolution}: give 1..{_MAX_SIDE} pixels")
    target = None if dry_run else _target(source, out, overwrite)
    listing = choose(find_source(source, download=download), classes=classes, max_images=max_images, seed=seed)
    with Workers(workers or min(cores(), max(1, len(listing) // _ALONE))) as pool:
        headers, found = scan(pool, listing, alpha=alpha, progress=progress)
        recipe, more = plan(headers, resolution=resolution, crop=crop, filter=filter, alpha=alpha)
        problems = [*listing.problems, *found, *more]
        bad = {p.name for p in problems}
        changes = count_changes((h for n, h in headers.items() if n not in bad), recipe) if recipe else {}
        sha256 = None
        if target is None:
            if recipe:
                seen = {(p.name, p.kind) for p in problems}
                more = check(pool, listing, list(headers), recipe, progress=progress)
                problems += [p for p in more if (p.name, p.kind) not in seen]
        elif problems or recipe is None:
            raise refusal(listing, problems, preparing=True)
        else:
            extra: dict[str, Any] = {}
            if listing.class_names:
                extra["class_names"] = list(listing.class_names)
            if classes is not None:
                extra["options"] = {"classes": sorted(set(classes))}
            if max_images is not None:
                extra["options"] = extra.get("options", {}) | {"max_images": max_images, "seed": seed}
            if changes:
                extra["changed"] = changes
            sha256 = make(pool, listing, recipe, target, changes=changes, extra=extra, progress=progress)
    notes = [f"{_NOTES[key]}: {n:,}" for key, n in changes.items() if key in _NOTES]
    notes += [f"files skipped, no images by name ({suffix}): {n:,}" for suffix, n in listing.ignored.items()]
    return PrepareReport(
        source=listing.source,
        out=target,
        images=len(listing),
        classes=listing.classes,
        resolution=recipe.resolution if recipe else None,
        channels=recipe.channels if recipe else None,
        problems=tuple(problems),
        notes=tuple(notes),
        sha256=sha256,
    )


def _target(source: str | Path | ImageDataset, out: str | Path | None, overwrite: bool) -> Path:
    if out is None:
        raise GddlabError("out=None: give the zip to make, or dry_run=True to check the source only")
    path = Path(out).expanduser()
    if path.suffix.lower() != ".zip" or path.is_dir():
        raise GddlabError(f"out={str(out)!r}: give a file named .zip")
    if path.exists() and not overwrite:
        raise GddlabError(f"{path} exists: give overwrite=True, or another name")
    if not isinstance(source, ImageDataset) and Path(source).is_dir():
        folder = Path(source).resolve()
        if path.resolve().is_relative_to(folder):
            raise GddlabError(f"{path} is inside the source {source}: choose another folder")
    return path
