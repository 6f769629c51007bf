"""Decoded images: in memory, or once in the cache and mapped by every process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil

import numpy as np
from filelock import FileLock

from gddlab.datasets.base import content_hash
from gddlab.datasets.listing import Listing, Problem, attempt, refusal
from gddlab.datasets.pixels import BadImage, array, decode
from gddlab.errors import GddlabError
from gddlab.files import atomic_path, cache_dir, hash_json, read_json, write_json
from gddlab.limits import usable_cores, usable_memory
from gddlab.progress import progress_bar

_CHUNK = 128
_COLOURS = {1: "grey", 3: "RGB"}


def materialise(
    listing: Listing, *, recorded: str | None = None, xflip: bool = False, memory: str = "auto", progress: bool = True
) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """All images decoded, uint8 (N, R, R, C); their labels, int64 (N,) or None; the hash of both where it was computed.

    Arguments as for `open_dataset`; with `xflip`, N is twice as large. `recorded`: what the hash must be.

    Raises:
        GddlabError: Images are missing, damaged, of different sizes or not those recorded; or the cache folder cannot
            hold them.
    """
    if listing.problems:
        raise refusal(listing, list(listing.problems))
    shape = (len(listing) * (1 + xflip), *_shape(listing))
    size = int(np.prod(shape, dtype=np.int64))
    labels = listing.labels
    if labels is not None and xflip:
        labels = np.concatenate([labels, labels])
    if memory == "auto":
        together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory = "ram" if size * together <= usable_memory()[1] // 4 else "mapped"
    if memory == "ram":
        images = np.empty(shape, dtype=np.uint8)
        _fill(images, listing, progress)
        return images, labels, _hash(images, labels, recorded, listing.source) if recorded else None
    return _mapped(shape, size, listing, labels, recorded, progress)


def _mapped(
    shape: tuple[int, ...],
    size: int,
    listing: Listing,
    labels: np.ndarray | None,
    recorded: str | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray | None, str]:
    from PIL import __version__ as pillow

    ids = None if labels is None else labels.tolist()
    key = hash_json([listing.fingerprint, list(listing.names), ids, shape, pillow])[:32]
    folder = cache_dir() / "datasets"
    path = folder / f"{key}.npy"
    about = folder / f"{key}.json"  # written last, when all is complete
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if not (about.exists() and path.exists()):
                if shutil.disk_usage(folder).free < size:
                    raise GddlabError(
                        f"{size:,} bytes of images do not fit into {folder}: set GDDLAB_CACHE to another folder"
                    )
                with atomic_path(path) as tmp:
                    images = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.uint8, shape=shape)
                    _fill(images, listing, progress)
                    images.flush()
                    sha256 = _hash(images, labels, recorded, listing.source)
                    del images
                write_json(about, {"source": listing.source, "sha256": sha256})
    except OSError as e:
        raise GddlabError(f"cannot write to {folder} ({e}): set GDDLAB_CACHE to a folder that can be written") from None
    # Copy on write: processes share pages, and none can change the file.
    mapped = np.load(path, mmap_mode="c", allow_pickle=False)
    if mapped.shape != shape or mapped.dtype != np.uint8:
        raise GddlabError(f"{path} is damaged: delete it and {about.name}")
    return mapped, labels, str(read_json(about)["sha256"])


def _squares(listing: Listing, names: Sequence[str]) -> Iterator[np.ndarray | Problem]:
    """Pixels of square images, or why there are none."""

    def square(name: str) -> np.ndarray:
        image = array(decode(listing.read(name)))
        if image.shape[0] != image.shape[1]:
            raise BadImage("not square", f"{image.shape[1]}x{image.shape[0]}")
        return image

    return attempt(square, names)


def _shape(listing: Listing) -> tuple[int, ...]:
    """Shape of the first usable image; all others must have it."""
    problems = []
    for image in _squares(listing, listing.names):
        if not isinstance(image, Problem):
            return image.shape
        problems.append(image)
    raise refusal(listing, problems)


def _fill(out: np.ndarray, listing: Listing, progress: bool) -> None:
    """Decodes into `out` by threads (Pillow's decoders release the GIL); then appends mirror images."""
    n = len(listing)
    shape = out.shape[1:]

    def chunk(start: int) -> list[Problem]:
        problems = []
        names = listing.names[start : start + _CHUNK]
        for i, image in enumerate(_squares(listing, names)):
            if isinstance(image, Problem):
                problems.append(image)
            elif image.shape[:2] == shape[:2] and image.shape != shape:
                detail = f"mode {listing.header(names[i]).mode}, the first has {_COLOURS[shape[2]]}"
                problems.append(Problem(names[i], "colours differ", detail))
            elif image.shape != shape:
                detail = f"{_size(image.shape)}, the first has {_size(shape)}"
                problems.append(Problem(names[i], "size differs", detail))
            else:
                out[start + i] = image
        return problems

    problems: list[Problem] = []
    bar = progress_bar(total=n, desc=f"reading {listing.name}", unit="img", enabled=progress)
    with ThreadPoolExecutor(ceil(usable_cores())) as pool, bar:
        for start, found in zip(range(0, n, _CHUNK), pool.map(chunk, range(0, n, _CHUNK)), strict=True):
            problems += found
            bar.update(min(_CHUNK, n - start))
    if problems:
        raise refusal(listing, problems)
    for i in range(n, len(out), 1024):
        stop = min(i + 1024, len(out))
        out[i:stop] = out[i - n : stop - n, :, ::-1]


def _hash(images: np.ndarray, labels: np.ndarray | None, recorded: str | None, source: str) -> str:
    found = content_hash(images, labels)
    if recorded is not None and found != recorded:
        raise GddlabError(
            f"{source}: images or labels are not those of its manifest "
            f"(sha256 {found[:16]}, recorded {recorded[:16]}): prepare the data again"
        )
    return found


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}x{shape[2]}"
