"""Torch files in memory, read as data: the format before 1.6 (five pickles, then raw storages) and since (a zip of stored entries)."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gddlab.teachers.unpickle import MAX_NAME, OBJECT, Blob, Budget, Name, Reader, Refused, a

__all__ = [
    "DTYPES",
    "LEGACY_MAGIC",
    "Storage",
    "TensorData",
    "count",
    "find_storage",
    "need",
    "read_torch",
    "shape",
    "zip_directory",
]

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


@dataclass(slots=True, eq=False)
class Storage:
    """A typed run of bytes in the file; the bytes of a file before 1.6 are found after its pickles."""

    dtype: torch.dtype
    numel: int
    data: memoryview | None = None


@dataclass(slots=True, eq=False)
class TensorData:
    """A tensor that is still in the file; `at` is the byte that made it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    at: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def view(self) -> Tensor:
        """The tensor over the file's own bytes: copy it before the file may change."""
        s = self.storage
        if s.data is None:
            raise ValueError("a tensor whose bytes are not in the file")
        if not math.prod(self.size):
            return torch.empty(self.size, dtype=s.dtype)
        return torch.frombuffer(s.data, dtype=s.dtype).as_strided(self.size, self.stride, self.offset)


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
        raise ValueError(f"{what} is {a(value)}")
    return value


class Storages:
    """The persistent ids of one torch file: every storage that its pickle names."""

    def __init__(self) -> None:
        self.found: dict[str, Storage] = {}

    def __call__(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise ValueError("a persistent id that is no storage")
        kind, cls, name, _, numel, *rest = pid
        if kind != "storage" or not isinstance(cls, Name) or cls.name not in DTYPES or (rest and rest[0] is not None):
            raise ValueError("a persistent id that is no storage")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError("a storage whose name is no short text")
        storage = Storage(DTYPES[cls.name], count(numel, "the length of a storage"))
        return self.found.setdefault(name, storage)

    def place(self, name: str, data: memoryview) -> None:
        storage = self.found[name]
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"a storage of {len(data):,} bytes, where {storage.numel:,} numbers were announced")
        storage.data = data


def read_torch(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a torch file, of either format; storages stay where they are.

    `torch.load(weights_only=True)` would not do: it allocates what a file announces before it looks what is there, and inflates zips.

    Raises:
        Refused: What is wrong, and at which byte.
    """
    if bytes(blob.view[:4]) == b"PK\x03\x04":
        return read_torch_zip(blob, budget, find=find)
    storages = Storages()
    reader = Reader(blob, find=find, persistent=storages, budget=budget)
    try:
        if reader.read() != LEGACY_MAGIC or reader.read() != 1001:
            raise ValueError("bytes that are no torch file")
        if need(reader.read(), dict, "the header of a torch file").get("little_endian") is not True:
            raise ValueError("a torch file of a big-endian machine")
        value = reader.read()
        for name in need(reader.read(), list, "the list of storages"):
            storage = storages.found.get(name) if isinstance(name, str) else None
            numel = reader.unpack("<q")
            if storage is None or numel != storage.numel:
                raise ValueError(f"a storage of {numel:,} numbers, which was not announced")
            storages.place(name, reader.take(numel * storage.dtype.itemsize))
    except ValueError as e:
        raise Refused(reader.offset, str(e)) from None
    return value


def read_torch_zip(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a torch file since 1.6; entries must be stored, not compressed, so that no entry is larger than the file."""
    entries: dict[str, Blob] = {}
    storages = Storages()
    try:
        for entry in zip_directory(blob.view):
            budget.charge(OBJECT + 8 * len(entry.name), blob.base)
            if not entry.stored or len(entry.name) > MAX_NAME or entry.name in entries:
                raise ValueError(f"the entry {entry.name[:60]!r} is compressed, or there twice")
            data = entry.data(blob.view)
            entries[entry.name] = Blob(blob.view[data], blob.base + (0 if blob.decoded else data.start), blob.decoded)
        pickles = [n for n in entries if n.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} data.pkl in place of one")
        folder = pickles[0].removesuffix("data.pkl")
        if (order := entries.get(f"{folder}byteorder")) is not None and bytes(order.view[:8]) != b"little":
            raise ValueError("it is of a big-endian machine")
        value = Reader(entries[pickles[0]], find=find, persistent=storages, budget=budget).read()
        for name in storages.found:
            if (content := entries.get(f"{folder}data/{name}")) is None:
                raise ValueError(f"the storage {name[:60]!r} is not in the zip")
            storages.place(name, content.view)
    except ValueError as e:
        raise Refused(blob.base, f"no torch file, or a damaged zip: {e}") from None
    return value


class Entry(NamedTuple):
    """A file in a zip: its name, whether it is stored as it is, where its header stands, its length."""

    name: str
    stored: bool
    header: int
    size: int

    def data(self, view: memoryview) -> slice:
        """Where its bytes lie."""
        if self.header + 30 > len(view):
            raise ValueError(f"its entry {self.name[:60]!r} lies outside it")
        start = self.header + 30 + sum(struct.unpack_from("<HH", view, self.header + 26))
        if start + self.size > len(view):
            raise ValueError(f"its entry {self.name[:60]!r} lies outside it")
        return slice(start, start + self.size)


def zip_directory(view: memoryview) -> Iterator[Entry]:
    """The first 65,535 entries of a zip, one by one: a directory may be as large as the file, and `zipfile` reads it whole.

    Raises:
        ValueError: There is no directory, or it is damaged.
    """
    tail = bytes(view[-(2**16 + 22) :])
    end = tail.rfind(b"PK\x05\x06")
    if not 0 <= end <= len(tail) - 22:
        raise ValueError("without its directory; a download that was cut off?")
    n, _, at = struct.unpack_from("<HII", tail, end + 10)
    for _ in range(n):
        if at + 46 > len(view) or bytes(view[at : at + 4]) != b"PK\x01\x02":
            raise ValueError("its directory is broken")
        flags, method, packed, size, *lengths, header = struct.unpack_from("<8xHH8xIIHHH8xI", view, at)
        name = str(view[at + 46 : at + 46 + lengths[0]], "utf-8", "replace")
        yield Entry(name, method == 0 and packed == size and not flags & 1, header, size)
        at += 46 + sum(lengths)


def find_storage(module: str, name: str) -> Name:
    """The allow-list inside a storage's own torch file: the storage classes."""
    if module in ("torch", "torch.storage") and name in DTYPES:
        return Name(module, name)
    raise ValueError(f"it names {module[:60]}.{name[:60]} inside a storage; nothing of it was run")
