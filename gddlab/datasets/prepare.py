"""Makes EDM zips of images of any kind: checked, cropped and resampled in parallel; interrupted work continues."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import Field, PositiveInt

from gddlab.datasets.base import ContentHash, Manifest
from gddlab.datasets.listing import HINTS, MANIFEST, Listing, Problem, attempt, choose, name_and_part, refusal
from gddlab.datasets.open import Source, find_source, listed
from gddlab.datasets.packing import (
    Entry,
    assemble,
    image_name,
    in_workers,
    missing_parts,
    open_parts,
    read_part,
    write_part,
)
from gddlab.datasets.pixels import Header, array, decode, fit, png
from gddlab.errors import GddlabError, validated
from gddlab.files import as_text, check_free, hash_json, path_of
from gddlab.limits import usable_cores
from gddlab.progress import progress_bar
from gddlab.runtime import Seed

_MAX_SIDE = 8192
_PART_BYTES = 8 << 20  # of pixels per part: held by a process, lost if it is killed
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
class Recipe:
    """How each image is made."""

    resolution: int
    channels: int
    crop: str
    filter: str
    alpha: str

    def make(self, content: Any) -> np.ndarray:
        """Pixels, uint8 (R, R, C), of an image; raises BadImage."""
        im = decode(content, alpha=self.alpha)
        return array(fit(im, resolution=self.resolution, crop=self.crop, filter=self.filter), self.channels)


@dataclass(frozen=True)
class Pool:
    """Passes over images by several processes, with or without a bar."""

    count: int
    progress: bool

    def run(self, title: str, function: Callable[[range], Any], n: int, per_task: int) -> Iterator[Any]:
        """function(range) of consecutive ranges of 0..n - 1, in order."""
        tasks = [range(i, min(i + per_task, n)) for i in range(0, n, per_task)]
        with progress_bar(total=n, desc=title, unit="img", enabled=self.progress) as bar:
            for task, result in zip(tasks, in_workers(function, tasks, self.count), strict=True):
                yield result
                bar.update(len(task))


def scan(pool: Pool, listing: Listing, alpha: str) -> tuple[dict[str, Header], list[Problem]]:
    """Reads all headers, to know the sizes and to find most problems before hours of work."""

    def part(index: range) -> list[Header | Problem]:
        return list(attempt(lambda name: listing.header(name, alpha=alpha), listing.names[index.start : index.stop]))

    found = [f for some in pool.run("scanning", part, len(listing), 256) for f in some]
    headers = {name: f for name, f in zip(listing.names, found, strict=True) if isinstance(f, Header)}
    return headers, [f for f in found if isinstance(f, Problem)]


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


def check(pool: Pool, listing: Listing, names: Sequence[str], recipe: Recipe) -> list[Problem]:
    """Makes all images as `make` does, and keeps none."""

    def part(index: range) -> list[Problem]:
        made = attempt(lambda name: recipe.make(listing.read(name)), names[index.start : index.stop])
        return [p for p in made if isinstance(p, Problem)]

    return [p for some in pool.run("checking", part, len(names), 64) for p in some]


def make_part(
    listing: Listing, recipe: Recipe, folder: Path, k: int, index: range, done: bool
) -> np.ndarray | list[Problem]:
    """Writes part `k`, the images of `index`, or reads a finished one; returns its pixels, or the problems."""
    if done:
        return np.stack([array(decode(entry.png)) for entry in read_part(folder, k)])
    made: list[np.ndarray] = []
    problems: list[Problem] = []
    for x in attempt(lambda name: recipe.make(listing.read(name)), listing.names[index.start : index.stop]):
        problems.append(x) if isinstance(x, Problem) else made.append(x)
    if problems:
        return problems
    none = [None] * len(made)
    labels = none if listing.labels is None else listing.labels[index].tolist()
    groups = none if listing.groups is None else listing.groups[index.start : index.stop]
    entries = zip(index, made, labels, groups, strict=True)
    write_part(folder, k, [Entry(image_name(i), png(x), y, group) for i, x, y, group in entries])
    return np.stack(made)


def settings_of(listing: Listing, recipe: Recipe) -> dict[str, Any]:
    """What determines the zip; parts made by other settings are of another one."""
    from PIL import __version__ as pillow

    n, r, c = len(listing), recipe.resolution, recipe.channels
    per_part = max(1, min(max(16, n // 128), 512, _PART_BYTES // (r * r * c)))  # independent of the number of workers
    files = hash_json([listing.fingerprint, list(listing.names)])[:16]
    return {"files": files, "images": n, "per_part": per_part, **asdict(recipe), "pillow": pillow}


def make(pool: Pool, listing: Listing, recipe: Recipe, out: Path, changes: dict[str, int]) -> str:
    """Makes the zip, or continues with it; returns the hash of its content.

    Raises:
        GddlabError: Images are damaged, the disk is full, or another process is making it.
    """
    from PIL import __version__ as pillow

    n, r, c = len(listing), recipe.resolution, recipe.channels
    settings = settings_of(listing, recipe)
    per_part = settings["per_part"]
    parts = -(-n // per_part)
    content = ContentHash((n, r, r, c))
    problems: list[Problem] = []
    try:
        folder = open_parts(out, settings)
        with FileLock(folder / "lock", timeout=0):
            missing = set(missing_parts(folder, parts))

            def part(index: range) -> np.ndarray | list[Problem]:
                k = index.start // per_part
                return make_part(listing, recipe, folder, k, index, k not in missing)

            for made in pool.run(f"preparing {out.name}", part, n, per_part):
                if isinstance(made, list):
                    problems += made
                else:
                    content.add(made)
            if problems:  # the source has to change, and the parts with it
                shutil.rmtree(folder)
                raise refusal(listing, problems, preparing=True)
            sha256 = content.digest(listing.labels)
            names = listing.extra.get("class_names")
            extra = {
                "class_names": names,
                "options": listing.options,
                "changed": changes,
                "made_by": hash_json(settings),
            }
            resized = changes.keys() & {"reduced", "enlarged"}
            manifest = Manifest(
                name=out.stem,
                source=listing.source,
                resolution=r,
                channels=c,
                count=n,
                classes=listing.classes,
                crop=_steps(listing.about["crop"], recipe.crop if "cropped" in changes else None),
                filter=_steps(listing.about["filter"], recipe.filter if resized else None),
                codec=f"{listing.about['codec']} to png by Pillow {pillow}".removeprefix("none to "),
                sha256=sha256,
                extra={key: value for key, value in extra.items() if value},
            )
            assemble(folder, parts, out, lambda _: manifest.to_dict())
    except Timeout:
        raise GddlabError(f"{out} is being made by another process: wait for it") from None
    except OSError as e:
        raise GddlabError(
            f"{out} cannot be made ({e}): make room or choose another folder, then run it again"
        ) from None
    return sha256


def _steps(before: str, now: str | None) -> str:
    """Processing of the images, according to their own manifest and now."""
    if now is None:
        return before
    return now if before in ("none", "unknown") else f"{before}, {now}"


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made or, in a dry run, would make.

    Attributes:
        source, out: Source and target; out is None in a dry run.
        images: Number of images in the source; `unusable` of them have problems.
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
    unusable: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        usable = f"{self.images:,} files, {self.images - self.unusable:,} usable" if self.unusable else ""
        lines = [f"{self.out or self.source}: {usable or f'{self.images:,} images'}"]
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


@validated
def prepare(
    source: Source,
    out: str | Path | None = None,
    *,
    resolution: Annotated[int, Field(ge=1, le=_MAX_SIDE)] | None = None,
    crop: Literal["none", "center"] = "none",
    filter: Literal["lanczos", "box", "bicubic", "bilinear", "hamming", "nearest"] = "lanczos",
    alpha: Literal["refuse", "white", "black"] = "refuse",
    classes: Sequence[int] | Set[int] | None = None,
    max_images: PositiveInt | None = None,
    seed: Seed = 0,
    workers: PositiveInt | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    download: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Makes an EDM zip: PNG files of one size, not compressed, dataset.json, and a manifest; groups are kept.

    After an interruption the same call continues: finished parts are kept in OUT.parts. OUT appears when complete; the
    same call then returns its report.

    Args:
        source: As for `open_dataset`, with images of any size and shape, grey and colour mixed.
        out: The zip to make; not needed in a dry run.
        resolution: Side of the images made, pixels; by default that of the source, if all its images have one size.
        crop: "center" takes the largest square around the centre; "none" refuses images that are not square.
        filter: Resampling: lanczos, box, bicubic, bilinear, hamming or nearest (Pillow's, on 8-bit values).
        alpha: Background of transparent pixels, "white" or "black"; "refuse" refuses images with an alpha channel.
        classes, max_images, seed: As for `open_dataset`.
        workers: Number of processes, or of threads where not on Linux; by default the number of usable cores, or fewer
            for few images.
        overwrite: Replaces OUT if it exists, when the new one is complete.
        dry_run: Reads every image, writes nothing, and reports all problems.
        download: Downloads CIFAR-10 into the cache if it is not found.
        progress: Shows a bar at a terminal.

    Returns:
        The report; `print` it.

    Raises:
        NotFound: No such source.
        GddlabError: An option or an image cannot be used, OUT is there already and made by another call, or another
            process is making it.
    """
    target = None if dry_run else _target(source, out)
    made = None if target is None or overwrite else _made(target)
    listing = choose(listed(find_source(source, download=download)), classes, max_images, seed)
    pool = Pool(workers or min(ceil(usable_cores()), max(1, len(listing) // _ALONE)), progress)
    headers, found = scan(pool, listing, alpha)
    recipe, more = plan(headers, resolution=resolution, crop=crop, filter=filter, alpha=alpha)
    problems = [*listing.problems, *found, *more]
    bad = {p.name for p in problems}
    changes = count_changes((h for n, h in headers.items() if n not in bad), recipe) if recipe else {}
    sha256 = None
    if target is None:
        seen = {(p.name, p.kind) for p in problems}
        more = check(pool, listing, list(headers), recipe) if recipe else []
        problems += [p for p in more if (p.name, p.kind) not in seen]
    elif problems or recipe is None:
        raise refusal(listing, problems, preparing=True)
    elif made is None:
        sha256 = make(pool, listing, recipe, target, changes)
    elif made["extra"]["made_by"] == hash_json(settings_of(listing, recipe)):  # by this very call
        sha256 = made["sha256"]
    else:
        check_free(target, overwrite)
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
        unusable=len({p.name for p in problems} & {*listing.names}) if problems else 0,
    )


def _made(out: Path) -> dict[str, Any] | None:
    """The manifest of a zip that `prepare` made; None where there is no file.

    Raises:
        GddlabError: The file is another.
    """
    if not out.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile), zipfile.ZipFile(out) as z:
        manifest: dict[str, Any] = json.loads(z.read(MANIFEST))
        if manifest["sha256"] and manifest["extra"]["made_by"]:
            return manifest
    check_free(out, overwrite=False)
    return None


def _target(source: Source, out: str | Path | None) -> Path:
    if out is None:
        raise GddlabError("out is missing: give the zip to make, or dry_run=True to check the source only")
    path = path_of("out", out)
    if path.suffix.lower() != ".zip" or path.is_dir():
        raise GddlabError(f"out={str(out)!r}: give a file named .zip")
    if isinstance(source, str | Path):
        folder = Path(name_and_part(as_text(source))[0]).expanduser().resolve()
        if folder.is_dir() and path.resolve().is_relative_to(folder):
            raise GddlabError(f"{path} is inside the source {source}: choose another folder")
    return path
