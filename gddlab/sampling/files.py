"""`sample_files`: images to a folder of PNG files or an EDM zip, by one process or many; a run that was ended continues."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.files import hash_json, hash_tensors
from gddlab.nets import Precond, architecture
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.runtime import chosen_device
from gddlab.sampling.arguments import module_of, one_hot, positive, precision, seed_list, sigma_list
from gddlab.sampling.samplers import draw, prepared, resolve, sampler_name

__all__ = ["make_share", "open_model", "sample_files"]

FORMAT = "gddlab-samples-1"


def sample_files(
    model: Precond | str | Path,
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
    """Samples to a folder, or to an EDM zip when `out` ends in .zip; the same call continues one that was ended.

    A folder gets SEED.png (six digits), dataset.json with the classes of a conditional network, and manifest.json: weight hash, sampler, seeds,
    versions. A zip holds the same in EDM's layout, and is whole or absent; until it is, its parts lie in OUT.parts beside it.

    The images are dealt in parts of `batch_size` to the processes in turn: `nproc` fresh ones that this call starts, or those that torchrun
    has started, known by RANK and WORLD_SIZE. No process group is needed, only a file system that all of them see. Of torchrun's
    processes the first assembles the zip and returns when it is there; the others return when their parts are written.

    Args:
        model: A network, or a name, file or run directory; with nproc > 1 not a network.
        out: Folder, or file that ends in .zip.
        n, seed, seeds, class_labels, steps, sigmas, dtype, channels_last, settings: As for `sample`; seeds may not repeat.
        batch_size: Images at once.
        nproc: Processes on this machine.
        device: Of a model that is opened here: "auto" (CUDA where there is one), "cpu" or "cuda"; a network stays where it is.
        timeout_s: How long the first process waits for a part of another one, seconds, or five times its own slowest part if that
            is longer; each part that comes starts the wait anew.
        progress: Shows a bar when at a terminal.

    Returns:
        Path of the folder or zip.

    Raises:
        GddlabError: Bad arguments, as for `sample`; `out` holds something else, or images of other settings; it cannot be written; a
            process died. What is written stays, and the same call continues.
    """
    total = len(seed_list(n, seed, seeds))
    rank, world = _rank()
    job: dict[str, Any] = {
        "out": str(out),
        "n": n,
        "seed": seed,
        "seeds": None if seeds is None else list(seed_list(n, seed, seeds)),
        "class_labels": class_labels,
        "steps": steps,
        "sigmas": None if sigmas is None else sigma_list(sigmas),
        "batch_size": positive("batch_size", batch_size),
        "dtype": precision(dtype),
        "channels_last": channels_last,
        "device": device,
        "timeout_s": timeout_s,
        **settings,
    }
    nproc = positive("nproc", nproc)
    if nproc > 1 and not isinstance(model, str | Path):
        raise GddlabError(f"nproc={nproc} with a network: give its name, file or run directory, or nproc=1")
    if nproc > 1 and world > 1:
        raise GddlabError(f"nproc={nproc} under torchrun: leave nproc away, its processes share the work")
    parts = range(rank * batch_size, total, world * batch_size)
    share = sum(min(batch_size, total - i) for i in parts)
    with progress_bar(total=share, desc="sampling", unit="img", enabled=progress and rank == 0) as bar:
        if nproc == 1:
            make_share(model, **job, report=bar.update)
        else:
            from gddlab.sampling.worker import run_workers

            run_workers({"model": str(model), **job}, nproc, bar.update)
    if world == 1:
        for leftover in Path(out).glob(".*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    return Path(out)


def make_share(
    model: Precond | str | Path,
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
    """What one process does of `sample_files`: the missing parts of its rank; the first process also the end.

    Args:
        report: Called with the number of images of each part, when it is there.
    """
    from gddlab.sampling.targets import encode, open_target

    net = open_model(model, device) if isinstance(model, str | Path) else model
    how = resolve(net, **method)
    if net.img_channels not in (1, 3):
        raise GddlabError(
            f"images of {net.img_channels} channels: PNG files take 1 or 3, use gddlab.sample for a tensor"
        )
    image_seeds = seed_list(n, seed, seeds)
    if len(set(image_seeds)) < len(image_seeds):
        twice = next(s for i, s in enumerate(image_seeds) if s in image_seeds[:i])
        raise GddlabError(f"seed {twice} is given twice: files are named by seed, give each once")
    classes = _class_ids(net, image_seeds, class_labels)
    pairs = list(zip(image_seeds, classes, strict=True))
    about = {
        "format": FORMAT,
        "model": hash_tensors(module_of(net).state_dict()),
        "sampler": sampler_name(how),
        "settings": {"sigmas": list(how)} if isinstance(how, tuple) else how.to_dict(),
        "seeds": _short(image_seeds),
        "class_labels": _short(classes) if net.label_dim else None,
        "dtype": dtype,
        "channels_last": channels_last,
        "batch_size": batch_size,
    }
    rank, world = _rank()
    try:
        target = open_target(Path(out), about, _manifest(net, Path(out), about, len(pairs)), pairs)
        slowest = 0.0
        with prepared(net, dtype=dtype, channels_last=channels_last):
            for k in range(rank, target.count, world):
                began = time.monotonic()
                part = pairs[k * batch_size : (k + 1) * batch_size]
                if not target.has(k):
                    labels = one_hot(net.label_dim, len(part), 0, [c for _, c in part if c is not None] or None)
                    images = draw(net, how, [s for s, _ in part], labels, channels_last=channels_last)
                    target.write(k, encode(images, part, target.name))
                    slowest = max(slowest, time.monotonic() - began)
                report(len(part))
        if rank == 0:
            target.finish(max(timeout_s, 5 * slowest), world)
    except GddlabError:
        raise
    except OSError as e:
        raise GddlabError(
            f"cannot write {e.filename or out} ({e.strerror}): nothing is lost, the same call continues when it can be written"
        ) from None


def open_model(source: str | Path, device: str = "auto") -> Precond:
    """The student of a run directory, or a teacher by name or file, on a device.

    Args:
        source: As for `gddlab.load_teacher`, or a run directory of `gddlab.train`.
        device: As for `chosen_device`.
    """
    from gddlab.runs import open_model as opened

    where = chosen_device(device)
    return opened(source).to(where)


def _rank() -> tuple[int, int]:
    """This process's number, and how many there are, as torchrun says it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _class_ids(net: Precond, seeds: Sequence[int], labels: Any) -> Sequence[int | None]:
    """The class of each image; None for an unconditional network."""
    if net.label_dim and labels is None:
        return [s % net.label_dim for s in seeds]
    dense = one_hot(net.label_dim, len(seeds), 0, labels)
    if dense is None:
        return [None] * len(seeds)
    ids = dense.argmax(1)
    if not torch.equal(torch.nn.functional.one_hot(ids, net.label_dim).float(), dense):
        raise GddlabError("class_labels mix classes: files take one class an image, give class ids")
    return list(ids.tolist())


def _short(numbers: Sequence[int | None]) -> str:
    """Integers as "0-99,200", or their hash where that is long; equal for equal numbers in equal order."""
    runs: list[list[int]] = []
    for x in numbers:
        assert x is not None
        if runs and x == runs[-1][1] + 1:
            runs[-1][1] = x
        else:
            runs.append([x, x])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(text) <= 100 else f"{len(numbers)} numbers, sha256 {hash_json(list(numbers))[:16]}"


def _manifest(net: Precond, out: Path, about: dict[str, Any], n: int) -> dict[str, Any]:
    """What is known of the images, in the form of a dataset's manifest; how they were made is in `extra`."""
    name = net.card.name if net.card is not None else type(module_of(net)).__name__
    return {
        "name": out.stem,
        "source": f"{about['sampler']} samples of {name}",
        "resolution": net.img_resolution,
        "channels": net.img_channels,
        "count": n,
        "classes": net.label_dim,
        "crop": "none",
        "filter": "none",
        "codec": "png",
        "extra": about | {"architecture": architecture(module_of(net)), "versions": versions()},
    }
