"""Makes EDM zips of images of any kind: checked, cropped, resampled, in parallel; what is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gddlab.datasets.base import ImageDataset
from gddlab.datasets.listing import HINTS, Problem, choose, refusal
from gddlab.datasets.making import check, count_changes, make, plan, scan
from gddlab.datasets.pixels import ALPHA, CROPS, FILTERS
from gddlab.datasets.sources import find_source
from gddlab.datasets.store import cores
from gddlab.datasets.workers import Workers
from gddlab.errors import GddlabError, unknown

__all__ = ["PrepareReport", "prepare"]

_MAX_SIDE = 8192
_ALONE = 128  # images that one process has made before a second one has started
_LISTED = 20  # problems of a kind that a report prints by name
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
        source, out: From where, to where; out is None in a dry run.
        images: How many the source has.
        classes: Number of classes; 0 without labels.
        resolution, channels: Of the images made; None if there is none that could be.
        problems: What is wrong; empty unless a dry run.
        notes: What a user may want to know: images turned, enlarged, repeated to RGB, files passed over.
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
    crop: str = "none",
    filter: str = "lanczos",
    alpha: str = "refuse",
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

    The same call after a kill goes on where it was: finished parts lie in OUT.parts. OUT itself is whole or absent.

    Args:
        source: As for `open_dataset`; images may be of any size and shape here, and grey among colour.
        out: The zip to make. May be left away in a dry run.
        resolution: Side of the images made, pixels; that of the source, which must be one, if left away.
        crop: "center": the largest square around the centre; "none": other images than square are refused.
        filter: Resampling: lanczos, box, bicubic, bilinear, hamming or nearest (Pillow's, over 8-bit values).
        alpha: What stands behind transparent pixels: "white", "black"; "refuse" refuses images with an alpha channel.
        classes, max_images, seed: As for `open_dataset`.
        workers: Processes; as many as there are cores to use, fewer for few images, if left away.
        overwrite: Replaces OUT if it is there, when the new one is whole.
        dry_run: Reads every image, writes nothing, and reports all that is wrong.
        download: Fetches CIFAR-10 into the cache folder when it is not found.
        progress: Shows a bar when at a terminal.

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
    notes += [f"files passed over, no images by name ({suffix}): {n:,}" for suffix, n in listing.ignored.items()]
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
        raise GddlabError("out=None: give the zip to make, or dry_run=True to look at the source only")
    path = Path(out).expanduser()
    if path.suffix.lower() != ".zip" or path.is_dir():
        raise GddlabError(f"out={str(out)!r}: give a file named .zip")
    if path.exists() and not overwrite:
        raise GddlabError(f"{path} is there already: give overwrite=True, or another name")
    if not isinstance(source, ImageDataset) and Path(source).is_dir():
        folder = Path(source).resolve()
        if path.resolve().is_relative_to(folder):
            raise GddlabError(f"{path} lies in the source {source}: choose another folder")
    return path
