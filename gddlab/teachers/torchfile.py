"""Torch files in memory, read as data: the format before 1.6 (five pickles, then raw storages) and since (a zip of stored entries)."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.teachers.unpickle import Blob, Budget, Name, Reader

__all__ = ["DTYPES", "Storage", "TensorData", "count", "find_storage", "need", "read_torch", "shape"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
MAX_DIRECTORY = 2**21  # bytes of a zip's directory: 20,000 storages


@dataclass(slots=True, eq=False)
class Storage:
    """A typed run of bytes in the file; the bytes of a file before 1.6 are found after its pickles."""

    dtype: torch.dtype
    numel: int
    data: memoryview | None = None


@dataclass(slots=True, eq=False)
class TensorData:
    """A tensor that is still in the file: `tensor()` reads it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """A copy of its own, so that nothing refers to the file."""
        s = self.storage
        if s.data is None:
            raise ValueError("a tensor whose bytes are not in the file")
        if not math.prod(self.size):
            return torch.empty(self.size, dtype=s.dtype)
        flat = torch.empty(s.numel, dtype=s.dtype)
        target = flat.view(torch.uint8).numpy()
        target[:] = np.frombuffer(s.data, dtype=np.uint8)
        if self.offset == 0 and math.prod(self.size) == s.numel and is_contiguous(self.size, self.stride):
            return flat.view(self.size)
        return flat.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{what} is no count: {str(value)[:40] if isinstance(value, int) else type(value).__name__}")
    return value


def shape(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 8:
        raise ValueError(f"{what} is no shape")
    return tuple(count(v, what) for v in value)


def need(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is a {type(value).__name__}")
    return value


class Storages:
    """The persistent ids of one torch file: every storage that its pickle names."""

    def __init__(self) -> None:
        self.found: dict[str, Storage] = {}

    def __call__(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise ValueError("a persistent id that is no storage")
        kind, cls, name, _, numel, *rest = pid
        if kind != "storage" or not isinstance(cls, Name) or cls.name not in DTYPES:
            raise ValueError("a persistent id that is no storage")
        if rest and rest[0] is not None:
            raise ValueError("a storage that is a view of another")
        storage = Storage(DTYPES[cls.name], count(numel, "the length of a storage"))
        return self.found.setdefault(need(name, str, "the name of a storage"), storage)

    def place(self, name: Any, data: memoryview) -> None:
        storage = self.found.get(name)
        if storage is None or len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"a storage of {len(data):,} bytes that is not the one announced")
        storage.data = data


def read_torch(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a torch file, of either format; storages stay where they are.

    `torch.load(weights_only=True)` would not do: it allocates what a file announces before it looks what is there, and inflates zips.
    """
    if bytes(blob.view[:4]) == b"PK\x03\x04":
        return read_torch_zip(blob, budget, find=find)
    storages = Storages()
    reader = Reader(blob, find=find, persistent=storages, budget=budget)
    magic, version = reader.read(), reader.read()
    if magic != LEGACY_MAGIC or version != 1001:
        raise ValueError("bytes that are no torch file")
    if need(reader.read(), dict, "the header of a torch file").get("little_endian") is not True:
        raise ValueError("a torch file of a big-endian machine")
    value = reader.read()
    for name in need(reader.read(), list, "the list of storages"):
        numel = reader.unpack("<q")
        storage = storages.found.get(need(name, str, "the name of a storage"))
        if storage is None or numel != storage.numel:
            raise ValueError(f"a storage of {numel} elements that is not the one announced")
        storages.place(name, reader.take(numel * storage.dtype.itemsize))
    return value


def read_torch_zip(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a torch file since 1.6; entries must be stored, not compressed, so that no entry is larger than the file."""
    entries = zip_entries(blob, budget)
    pickles = [n for n in entries if n.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip without a data.pkl, no torch file")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order is not None and bytes(order.view[:8]) != b"little":
        raise ValueError("a torch file of a big-endian machine")
    storages = Storages()
    value = Reader(entries[pickles[0]], find=find, persistent=storages, budget=budget).read()
    for name in storages.found:
        entry = entries.get(f"{folder}data/{name}")
        if entry is None:
            raise ValueError("a storage that is not in the zip")
        storages.place(name, entry.view)
    return value


def zip_entries(blob: Blob, budget: Budget) -> dict[str, Blob]:
    """Where the stored entries of a zip lie."""
    view = blob.view
    tail = bytes(view[-(2**16) :])
    end = tail.rfind(b"PK\x05\x06")
    directory = struct.unpack_from("<I", tail, end + 12)[0] if 0 <= end <= len(tail) - 16 else len(view)
    if directory > MAX_DIRECTORY:
        raise ValueError("a zip without an end, or with a directory too large for a torch file")
    budget.charge(2**16 + 16 * directory, blob.base)
    try:
        with zipfile.ZipFile(Window(view)) as z:
            infos = z.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as e:
        raise ValueError(f"a damaged zip ({e})") from None
    entries = {}
    for info in infos:
        at = info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError("a zip with a compressed or encrypted entry, no torch file")
        if not 0 <= at <= len(view) - 30:
            raise ValueError("a zip whose entries lie outside it")
        start = at + 30 + sum(struct.unpack_from("<HH", view, at + 26))
        if start + info.file_size > len(view):
            raise ValueError("a zip whose entries lie outside it")
        entries[info.filename] = Blob(view[start : start + info.file_size], blob.base + start)
    return entries


class Window(io.RawIOBase):
    """A file over bytes that are not copied."""

    def __init__(self, view: memoryview):
        self.bytes, self.at = view, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, len(self.bytes))[whence]
        if at < 0:
            raise ValueError("a seek before the start")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.bytes[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


def find_storage(module: str, name: str) -> Name:
    """The allow-list inside a storage's own torch file: the storage classes."""
    if module in ("torch", "torch.storage") and name in DTYPES:
        return Name(module, name)
    raise ValueError(f"it names {module[:60]}.{name[:60]} inside a storage; nothing of it was run")
