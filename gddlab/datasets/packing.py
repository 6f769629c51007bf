"""EDM zips made in parts, so that interrupted work can continue; the zip appears when it is complete."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gddlab.errors import GddlabError
from gddlab.files import atomic_path, fsync_dir, read_json, write_json

_LABELS = "dataset.json"
_MANIFEST = "manifest.json"
_PART = re.compile(r"part-(\d{6,})\.zip")


@dataclass(frozen=True)
class Entry:
    """One image of a zip: its path inside, its PNG file, and its class and group where the set has them."""

    name: str
    png: bytes
    label: int | None = None
    group: str | None = None


def image_name(index: int) -> str:
    """Path of image `index` in a zip, a folder per thousand: image_name(1234) == "00001/img00001234.png"."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def open_parts(out: Path, settings: dict[str, Any]) -> Path:
    """Makes or reopens the folder OUT.parts beside `out`; `settings`, JSON, are all that decides what parts hold.

    Raises:
        GddlabError: It was made with other settings.
    """
    folder = out.with_name(out.name + ".parts")
    path = folder / "settings.json"
    if not path.exists():
        if folder.is_dir() and any(_PART.fullmatch(p.name) for p in folder.iterdir()):
            raise GddlabError(f"{folder} has parts but no settings.json: delete the folder to start over")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    old, new = read_json(path), json.loads(json.dumps(settings))
    if not isinstance(old, dict):
        raise GddlabError(f"{path} holds {type(old).__name__}, not settings: delete {folder} to start over")
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise GddlabError(
                f"{folder} was started with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                "continue with the former, or delete the folder to start over"
            )
    return folder


def missing_parts(folder: Path, count: int) -> list[int]:
    """The missing ones of the parts 0..count - 1, ascending."""
    there = {int(m[1]) for p in folder.iterdir() if (m := _PART.fullmatch(p.name))}
    return [k for k in range(count) if k not in there]


def write_part(folder: Path, k: int, entries: Sequence[Entry]) -> None:
    """Writes part `k` atomically; processes may write at the same time."""
    with atomic_path(_part(folder, k)) as tmp:
        _write(tmp, entries)


def read_part(folder: Path, k: int) -> Iterator[Entry]:
    """The entries of part `k`, in order."""
    path = _part(folder, k)
    try:
        with zipfile.ZipFile(path) as z:
            table = json.loads(z.read(_LABELS))
            labels, groups = dict(table["labels"] or []), dict(table.get("groups", []))
            for name in z.namelist():
                if name != _LABELS:
                    yield Entry(name, z.read(name), labels.get(name), groups.get(name))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as e:
        raise GddlabError(f"{path} is damaged ({e}): delete it and run the same command again") from None


def assemble(folder: Path, count: int, out: Path, manifest: Callable[[Path], dict[str, Any]]) -> None:
    """Merges the parts 0..count - 1 into `out`, in order, then removes the folder; `out` appears when all is written.

    The zip holds stored PNG files, dataset.json with `{"labels": [[name, class], ...]}` (or null) and the groups of
    images that have one, and manifest.json, which `manifest` makes from the path of the zip without it.

    Raises:
        GddlabError: A part is missing or damaged, two images have one name, or only some have labels.
    """
    if missing := missing_parts(folder, count):
        raise GddlabError(f"{folder} lacks {len(missing)} of {count} parts (first: {missing[0]}): make them first")
    # Inside the folder, so that a process killed here leaves nothing else beside `out`.
    with atomic_path(folder / "whole.zip") as tmp:
        _write(tmp, (e for k in range(count) for e in read_part(folder, k)))
        about = manifest(tmp)
        with zipfile.ZipFile(tmp, "a") as z:
            _store(z, _MANIFEST, _json(about))
    out.parent.mkdir(parents=True, exist_ok=True)
    (folder / "whole.zip").replace(out)
    fsync_dir(out.parent)
    shutil.rmtree(folder)


def _part(folder: Path, k: int) -> Path:
    return folder / f"part-{k:06d}.zip"


def _write(path: Path, entries: Iterable[Entry]) -> None:
    """A zip of images and dataset.json."""
    labels: dict[str, int | None] = {}
    groups: list[tuple[str, str]] = []
    with zipfile.ZipFile(path, "w") as z:
        for e in entries:
            if e.name in labels or e.name in (_LABELS, _MANIFEST):
                raise GddlabError(f"two files of the zip are named {e.name!r}: give each image a name of its own")
            labels[e.name] = e.label
            groups += [(e.name, e.group)] if e.group is not None else []
            _store(z, e.name, e.png)
        pairs = [(name, label) for name, label in labels.items() if label is not None]
        if pairs and len(pairs) < len(labels):
            name = next(name for name, label in labels.items() if label is None)
            raise GddlabError(f"{name!r} has no label, {len(pairs)} other images have one: give all or none")
        _store(z, _LABELS, _json({"labels": pairs or None} | ({"groups": groups} if groups else {})))


def _store(z: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a file without compression, time or owner, so that equal images make equal zips."""
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix, wherever it was made
    info.external_attr = 0o644 << 16
    z.writestr(info, content)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


S = TypeVar("S")
T = TypeVar("T")
_function: Callable[[Any], Any]
"""What this worker of `in_workers` calls."""


def in_workers(function: Callable[[S], T], tasks: Iterable[S], count: int) -> Iterator[T]:
    """function(task) of each task, in order; only a few tasks are queued at a time.

    Several processes are forked, so that they have what the function refers to without a copy of it, and scripts need
    no `if __name__ == "__main__"`. Only Linux forks safely: elsewhere threads take their place.

    Raises:
        GddlabError: A process was killed.
    """
    if count == 1:
        yield from map(function, tasks)
        return
    pool: Executor
    call: Callable[[S], T]
    if sys.platform == "linux":
        fork = multiprocessing.get_context("fork")
        pool, call = ProcessPoolExecutor(count, fork, initializer=_begin, initargs=(function,)), _call
    else:
        pool, call = ThreadPoolExecutor(count), function
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(call, task))
            if len(waiting) > 2 * count:  # enough that a slow task leaves no worker idle
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise GddlabError(
            f"one of {count} worker processes was killed (out of memory?): run the same command again to continue; "
            "workers=1 needs least memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles it, and ends the pool
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this process with its parent; an executor's processes would wait for work forever."""
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    return _function(task)
