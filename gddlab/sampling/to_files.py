"""`sample_files`: images to a folder of PNG files or an EDM zip, by one process or several."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets.base import ContentHash
from gddlab.datasets.packing import Entry, assemble, image_name, missing_parts, open_parts, write_part
from gddlab.datasets.pixels import BadImage, array, decode
from gddlab.errors import GddlabError, seconds
from gddlab.files import as_text, folder_of, hash_json, path_of, read_json, write_bytes, write_json
from gddlab.nets import Denoiser, Precond, architecture
from gddlab.nets.bare import unwrap
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.ranks import named_ranks
from gddlab.runtime import chosen_device
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import (
    codec_of,
    denoiser_in,
    draw,
    image_shape,
    one_hot,
    positive,
    precision,
    prepared,
    resolve,
    sampler_name,
    seed_list,
    weights_hash,
)
from gddlab.teachers import load_teacher
from gddlab.workers import run_workers

FORMAT = "gddlab-samples-1"
Pairs = Sequence[tuple[int, int | None]]
"""Seed and class of each image."""


def sample_files(
    model: Denoiser | str | Path,
    out: str | Path,
    n: int | None = None,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | str | None = None,
    channels_last: bool = False,
    nproc: int = 1,
    device: str = "auto",
    timeout_s: float = 600.0,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Samples to a folder, or to an EDM zip if `out` ends in .zip; the same call continues after an interruption.

    A folder gets SEED.png (six digits), dataset.json with the classes of a conditional network, and manifest.json with
    weight hash, sampler, seeds and versions. A zip holds the same in EDM's layout; it appears when it is complete, and
    until then its parts are in OUT.parts beside it.

    Parts of `batch_size` images are assigned to the processes in turn: to `nproc` new ones that this call starts, or to
    torchrun's, known by RANK and WORLD_SIZE. They need no process group, only a common file system. Of torchrun's
    processes the first assembles the zip and returns when it is complete; the others when their parts are written.

    Args:
        model: A name, file, run directory, or folder of diffusers; or, with nproc=1, a network, also what `wrap` made.
            Latents are decoded.
        out: Folder, or file that ends in .zip.
        n, seed, seeds, class_labels, steps, sigmas, dtype, channels_last, settings: As for `sample`; no seed twice.
        batch_size: Images at once.
        nproc: Processes on this machine.
        device: Of a model that is loaded here: "auto" (CUDA where available), "cpu" or "cuda".
        timeout_s: How long the first process waits for the next part of another one, seconds; at least five times its
            own slowest part.
        progress: Shows a bar at a terminal.

    Returns:
        Path of the folder or zip.

    Raises:
        GddlabError: Bad arguments, as for `sample`; `out` holds something else, or images of other settings; it cannot
            be written; a process died. What is written is kept, and the same call continues.
    """
    out = path_of("out", out)
    if out.suffix != ".zip":
        folder_of("out", out, "a folder, a name that ends in .zip, or to gddlab sample one in .png")
    total = len(seed_list(n, seed, seeds))
    rank, world = named_ranks().rank, named_ranks().size
    job: dict[str, Any] = {
        "out": str(out),
        "n": n,
        "seed": seed,
        "seeds": None if seeds is None else list(seed_list(n, seed, seeds)),
        "class_labels": class_labels,
        "steps": steps,
        "sigmas": sigmas,
        "batch_size": positive("batch_size", batch_size),
        "dtype": precision(dtype),
        "channels_last": channels_last,
        "device": device,
        "timeout_s": seconds("timeout_s", timeout_s),
        **settings,
    }
    if device != "auto" and not isinstance(model, str | Path):
        raise GddlabError(f"device={device!r} with a network: it stays on its device, omit device")
    nproc = positive("nproc", nproc)
    if nproc > 1 and not isinstance(model, str | Path):
        raise GddlabError(f"nproc={nproc} with a network: give its name, file or run directory, or nproc=1")
    if nproc > 1 and world > 1:
        raise GddlabError(f"nproc={nproc} under torchrun: omit nproc, its processes share the work")
    share = sum(min(batch_size, total - i) for i in range(rank * batch_size, total, world * batch_size))
    with progress_bar(total=share, desc="sampling", unit="img", enabled=progress and rank == 0) as bar:
        if nproc == 1:
            make_share(model, **job, report=bar.update)
        else:
            assert isinstance(model, str | Path)
            run_workers({"model": as_text(model), **job}, nproc, bar.update)
    if world == 1:
        for leftover in out.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    return out


def make_share(
    model: Denoiser | str | Path,
    out: str,
    n: int | None,
    *,
    seed: int,
    seeds: Sequence[int] | None,
    class_labels: Any,
    batch_size: int,
    dtype: str,
    channels_last: bool,
    device: str,
    timeout_s: float,
    report: Callable[[int], Any],
    **method: Any,
) -> None:
    """The part of one process in `sample_files`: the missing parts of its rank; the first process also completes `out`.

    `report` is called with the number of images of each part, when it is written.
    """
    net = load_teacher(model).to(chosen_device(device)) if isinstance(model, str | Path) else model
    how = resolve(net, **method)
    codec = codec_of(net)
    if (channels := image_shape(net)[0]) not in (1, 3):
        raise GddlabError(f"images of {channels} channels: PNG files take 1 or 3, use gddlab.sample for a tensor")
    pairs = _pairs(net, seed_list(n, seed, seeds), class_labels)
    about = {
        "format": FORMAT,
        "model": weights_hash(net),
        "sampler": sampler_name(how),
        "settings": {"sigmas": list(how)} if isinstance(how, tuple) else how.to_dict(),
        "seeds": _short([s for s, _ in pairs]),
        "class_labels": _short([c for _, c in pairs]) if net.label_dim else None,
        "dtype": dtype,
        "channels_last": channels_last,
        "batch_size": batch_size,
        **denoiser_in(net).settings(),
    }
    rank, world = named_ranks().rank, named_ranks().size
    try:
        kind = ZipTarget if Path(out).suffix == ".zip" else FolderTarget
        target = kind(Path(out), _manifest(net, Path(out), about, len(pairs)), pairs)
        slowest = 0.0
        with prepared(net, dtype=dtype, channels_last=channels_last):
            for k in range(rank, target.count, world):
                began = time.monotonic()
                part = pairs[k * batch_size : (k + 1) * batch_size]
                if not target.has(k):
                    part_seeds = [s for s, _ in part]
                    labels = one_hot(net.label_dim, part_seeds, [c for _, c in part if c is not None] or None)
                    images = draw(net, how, part_seeds, labels, codec=codec, channels_last=channels_last)
                    target.write(k, encode(images, part, target.name))
                    slowest = max(slowest, time.monotonic() - began)
                report(len(part))
        if rank == 0:
            target.finish(max(timeout_s, 5 * slowest), world)
    except GddlabError:
        raise
    except OSError as e:
        raise GddlabError(
            f"cannot write {e.filename or out} ({e.strerror}): nothing is lost; the same call continues from here"
        ) from None


def _pairs(net: Denoiser, seeds: Sequence[int], labels: Any) -> Pairs:
    """The images by seed and class, which is None for an unconditional network; no seed twice."""
    if len(set(seeds)) < len(seeds):
        twice = next(s for i, s in enumerate(seeds) if s in seeds[:i])
        raise GddlabError(f"seed {twice} is given twice: files are named by seed, give each once")
    if net.label_dim and labels is None:
        return [(s, s % net.label_dim) for s in seeds]
    dense = one_hot(net.label_dim, seeds, labels)
    if dense is None:
        return [(s, None) for s in seeds]
    ids = dense.argmax(1)
    if not torch.equal(torch.nn.functional.one_hot(ids, net.label_dim).float(), dense):
        raise GddlabError("class_labels mix classes: files take one class per image, give class ids")
    return list(zip(seeds, ids.tolist(), strict=True))


def _short(numbers: Sequence[int | None]) -> str:
    """Integers as "0-99,200", or their hash if that is long."""
    runs: list[list[int]] = []
    for x in numbers:
        assert x is not None
        if runs and x == runs[-1][1] + 1:
            runs[-1][1] = x
        else:
            runs.append([x, x])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(text) <= 100 else f"{len(numbers)} numbers, sha256 {hash_json(list(numbers))[:16]}"


def _manifest(net: Denoiser, out: Path, about: dict[str, Any], n: int) -> dict[str, Any]:
    """A dataset's manifest of the images; `extra` says how they were made."""
    module, (channels, side, _) = denoiser_in(net), image_shape(net)
    name = getattr(net.card, "name", None) or type(unwrap(module)).__name__
    built = {"architecture": architecture(module)} if isinstance(module, Precond) else {}
    return {
        "name": out.stem,
        "source": f"{about['sampler']} samples of {name}",
        "resolution": side,
        "channels": channels,
        "count": n,
        "classes": net.label_dim,
        "crop": "none",
        "filter": "none",
        "codec": "png",
        "extra": about | built | {"versions": versions()},
    }


_MANIFEST = "manifest.json"


class FolderTarget:
    """SEED.png, dataset.json with classes, manifest.json; a part is complete when all its files are."""

    def __init__(self, out: Path, manifest: dict[str, Any], pairs: Pairs):
        self.out, self.pairs, self.side = out, pairs, manifest["resolution"]
        self.size = manifest["extra"]["batch_size"]
        self.count = math.ceil(len(pairs) / self.size)
        if out.is_file():
            raise GddlabError(f"{out} is a file: give a folder, or a name that ends in .zip")
        # Listed before the manifest is looked for: another process may be writing it.
        others = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        if (out / _MANIFEST).exists():
            _same(read_json(out / _MANIFEST), manifest, out)
        elif others:
            raise GddlabError(
                f"{out} holds {others[0]!r} and no samples: give an empty or new folder, or a name that ends in .zip"
            )
        else:
            write_json(out / _MANIFEST, manifest)
        if pairs[0][1] is not None and not (out / "dataset.json").exists():
            write_json(out / "dataset.json", {"labels": [(self.name(seed), c) for seed, c in pairs]})

    @staticmethod
    def name(seed: int) -> str:
        return f"{seed:06d}.png"

    def has(self, k: int) -> bool:
        part = self.pairs[k * self.size : (k + 1) * self.size]
        return all(_is_png(self.out / self.name(seed), self.side) for seed, _ in part)

    def write(self, k: int, entries: Sequence[Entry]) -> None:
        for e in entries:
            if not _is_png(self.out / e.name, self.side):
                write_bytes(self.out / e.name, e.png)

    def finish(self, timeout_s: float, world: int) -> None:
        """Does nothing: every file is in its place."""


class ZipTarget:
    """An EDM zip; until it is complete, its parts are in a folder beside it."""

    def __init__(self, out: Path, manifest: dict[str, Any], pairs: Pairs):
        self.out, self.manifest, self.pairs = out, manifest, pairs
        self.count = math.ceil(len(pairs) / manifest["extra"]["batch_size"])
        self.missing: set[int] = set()
        self.folder: Path | None = None
        if out.exists():
            _same(_zip_manifest(out), manifest, out)
            return
        try:
            self.folder = open_parts(out, _settings(manifest))
            self.missing = set(missing_parts(self.folder, self.count))
        except (OSError, GddlabError):
            if not out.exists():  # else the first process has put the zip there and is removing the parts
                raise
        if out.exists():
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder, self.missing = None, set()

    name = staticmethod(image_name)

    def has(self, k: int) -> bool:
        return k not in self.missing

    def write(self, k: int, entries: Sequence[Entry]) -> None:
        assert self.folder is not None
        write_part(self.folder, k, entries)

    def finish(self, timeout_s: float, world: int) -> None:
        """Waits for the parts of other processes, then puts the zip in its place."""
        if self.folder is None:
            return
        since, left = time.monotonic(), self.count
        while missing := missing_parts(self.folder, self.count):
            if len(missing) < left:
                since, left = time.monotonic(), len(missing)
            if time.monotonic() - since > timeout_s:
                raise GddlabError(
                    f"{self.out}: {left} of {self.count} parts are missing after {timeout_s:.0f} s, the first is due "
                    f"from process {missing[0] % world} of {world}: see its log; the same call continues from here"
                )
            time.sleep(0.2)
        assemble(self.folder, self.count, self.out, self._manifest)

    def _manifest(self, made: Path) -> dict[str, Any]:
        """The manifest with the hash of all images in the order of a dataset, by name."""
        side, channels = self.manifest["resolution"], self.manifest["channels"]
        classes = {self.name(seed): c for seed, c in self.pairs}
        h = ContentHash((len(classes), side, side, channels))
        with zipfile.ZipFile(made) as z:
            for name in sorted(classes):
                h.add(array(decode(z.read(name)))[None])
        ids = [classes[name] for name in sorted(classes)]
        return self.manifest | {"sha256": h.digest(None if ids[0] is None else np.array(ids))}


def encode(images: Tensor, pairs: Pairs, name: Callable[[int], str]) -> list[Entry]:
    """PNG files of a batch; an image that is not finite is refused."""
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        seed = pairs[int((~finite).nonzero()[0])][0]
        raise GddlabError(
            f"the image of seed {seed} is not finite: the model may have diverged or overflowed; try dtype=None"
        )
    entries = []
    for pixels, (seed, label) in zip(to_uint8(images).permute(0, 2, 3, 1).numpy(), pairs, strict=True):
        f = io.BytesIO()
        decode(pixels).save(f, format="PNG")
        entries.append(Entry(name(seed), f.getvalue(), label))
    return entries


def _is_png(path: Path, side: int) -> bool:
    """Whether the file is a complete image of that size; a crash may have left an incomplete one."""
    try:
        content = path.read_bytes()
        return content.startswith(b"\x89PNG") and decode(content).size == (side, side)
    except (OSError, BadImage):
        return False


def _zip_manifest(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as z:
            return json.loads(z.read(_MANIFEST))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError):
        return None


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides what the images are."""
    return {k: v for k, v in manifest["extra"].items() if k not in ("architecture", "versions")}


def _same(there: Any, manifest: dict[str, Any], out: Path) -> None:
    old = there.get("extra") if isinstance(there, dict) else None
    if not isinstance(old, dict) or old.get("format") != FORMAT:
        raise GddlabError(f"{out} exists and holds no samples of gddlab: give another name")
    for key, value in json.loads(json.dumps(_settings(manifest))).items():
        if old.get(key) != value:
            raise GddlabError(
                f"{out} was made with {key}={old.get(key)!r}, not {value!r}: give another name, or delete it"
            )
