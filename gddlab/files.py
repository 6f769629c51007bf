"""Files that are whole or absent: atomic writes, strict JSON, hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gddlab.errors import GddlabError, NotFound

__all__ = [
    "append_jsonl",
    "atomic_path",
    "cache_dir",
    "data_dir",
    "file_sha256",
    "fsync_dir",
    "hash_json",
    "hash_tensors",
    "last_jsonl",
    "read_end",
    "read_json",
    "read_jsonl",
    "thin_jsonl",
    "write_bytes",
    "write_json",
    "write_text",
]


def data_dir() -> Path:
    """Folder of what ships with gddlab: `data/` in a clone, `gddlab/data/` in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def cache_dir() -> Path:
    """Folder of downloads and of what is dear to compute: `$GDDLAB_CACHE`, or `~/.cache/gddlab`."""
    return Path(os.environ.get("GDDLAB_CACHE") or "~/.cache/gddlab").expanduser()


def fsync_dir(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is fsynced and renamed to `path`, on an error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    tmp = Path(name)
    try:
        yield tmp
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        tmp.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from colleagues
        tmp.replace(path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_path(path) as tmp:
        tmp.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Strict JSON (no NaN), two spaces, final newline."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise GddlabError(f"{path} is not JSON ({e}): give a file that gddlab wrote") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a .jsonl file; a last line still being written is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_jsonl(path: str | Path, line: Mapping[str, Any]) -> None:
    """Adds a line, and returns when it is on the disk: what a later checkpoint counts on must outlive the machine."""
    with Path(path).open("a") as f:
        f.write(json.dumps(line, allow_nan=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_end(path: str | Path, size: int = 1 << 16) -> list[str]:
    """The last lines of a file, as many as `size` bytes hold, however long the file is; what is no UTF-8 is replaced. A last line without its end counts."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open("rb") as f:
        start = max(0, path.stat().st_size - size)
        f.seek(start)
        lines = f.read(size).decode(errors="replace").splitlines()
    return lines[1:] if start and len(lines) > 1 else lines  # the first may have begun before


def last_jsonl(path: str | Path) -> dict[str, Any] | None:
    """The last whole line of a .jsonl file, without reading the others; None where there is none."""
    for line in reversed(read_end(path)):
        try:
            found: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # still being written
            continue
        return found
    return None


def thin_jsonl(path: str | Path, most: int = 1000) -> list[dict[str, Any]]:
    """Lines of a .jsonl file for a picture, in their order: all of a short file, of a long one about `most` that lie evenly spread, and the last.

    What it reads does not grow with the file.
    """
    path = Path(path)
    if not path.exists():
        return []
    size = path.stat().st_size
    if size <= most * 1024:
        return read_jsonl(path)
    found = {}
    with path.open("rb") as f:
        for i in range(most):
            f.seek(i * size // most)
            if i:
                f.readline()  # what is left of the line that stands there
            start, line = f.tell(), f.readline()
            if line.endswith(b"\n"):
                found[start] = line
    lines = [json.loads(line) for _, line in sorted(found.items())]
    last = last_jsonl(path)
    return lines if last is None or lines[-1:] == [last] else [*lines, last]


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered until the file changes."""
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, *stamp: Any) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor | np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        a = t.detach().cpu().contiguous() if isinstance(t, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(t))
        h.update(f"{name}:{a.dtype}:{tuple(a.shape)}".encode())
        h.update(a.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
