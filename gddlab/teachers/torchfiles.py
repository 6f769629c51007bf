"""Torch files and EDM's pickles, read as data: tensors stay in the file, modules become records.

A torch file is a zip of stored entries (since PyTorch 1.6), or five pickles followed by raw storages (before).
`torch.load(weights_only=True)` would not do: it allocates what a file announces before it checks what is there, and
inflates zips.
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gddlab.errors import GddlabError, NotFound
from gddlab.files import describe_start
from gddlab.pickles import (
    OBJECT,
    Blob,
    Budget,
    Name,
    PickleReader,
    Record,
    Refused,
    count,
    find_plain,
    need,
    new_dict,
    printable,
    shape,
)

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


def format_of(path: Path) -> str:
    """ "pickle", "torch" (a zip that torch.save wrote) or "safetensors", by the first bytes; refuses any other file."""
    try:
        if not path.exists():
            raise NotFound(printable(f"no such file: {path}"))
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise GddlabError(printable(f"{path} is {what}: give a .pkl or .safetensors file"))
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(4096)
            if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
                return "pickle"
            if head[8:10] in (b'{"', b"{}") and size >= (announced := 8 + int.from_bytes(head[:8], "little")):
                return "safetensors"
            if head.startswith(b"PK\x03\x04"):
                what = _describe_zip(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))
                if what == "torch":
                    return what
            elif head[8:10] == b'{"' and head[5:8] == b"\0\0\0":
                what = f"an incomplete .safetensors file, {size:,} bytes with a header of {announced:,}: fetch it again"
            else:
                what = describe_start(head)
    except OSError as e:
        if isinstance(e, NotFound):
            raise
        raise GddlabError(printable(f"{path} cannot be read: {e.strerror or e}")) from None
    accepted = "a teacher is an EDM pickle (.pkl) or a .safetensors file that gddlab wrote"
    raise GddlabError(printable(f"{path} is {what}; {accepted}"))


def _describe_zip(view: memoryview) -> str:
    try:
        names = [e.name for e in itertools.islice(zip_directory(view), 1000)]  # torch.save writes data.pkl first
    except ValueError as e:
        return f"a damaged zip ({e})"
    if any(n.endswith("data.pkl") for n in names):
        return "torch"
    many = f"{len(names):,} files" if len(names) < 1000 else "1,000 files or more"
    if any(n.lower().endswith((".png", ".jpg", ".jpeg", "dataset.json")) for n in names):
        return f"a zip of images ({many}), which is a dataset"
    if names and all(n.endswith(".npy") for n in names):
        return f"numpy arrays (.npz, {many})"
    return f"a zip of {many}, none of them torch's data.pkl"


def load_pickle(path: Path) -> Any:
    """The content of a pickle or torch file: plain containers, `Record`s, and `TensorData` over the file's bytes."""
    if not path.is_file():
        raise GddlabError(printable(f"{path} is no regular file, or does not exist"))  # opening a pipe would block
    if not path.stat().st_size:
        raise Refused(0, "the file is empty")
    with path.open("rb") as f:  # a private mapping: writable, as torch wants it, and never written back
        view = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
    return read_blob(Blob(view, 0), Budget(), find=find_edm)


# Tensors and their storages.


@dataclass(slots=True, eq=False)
class Storage:
    """A typed run of bytes in the file; in a file before 1.6 the bytes stand after the pickles and are set last."""

    dtype: torch.dtype
    numel: int
    data: memoryview | None = None


@dataclass(slots=True, eq=False)
class TensorData:
    """A tensor that is still in the file; `at` is the byte of the opcode that made it."""

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
        if not isinstance(name, str) or len(name) > 256:
            raise ValueError("a storage whose name is no short text")
        storage = Storage(DTYPES[cls.name], count(numel, "the length of a storage"))
        return self.found.setdefault(name, storage)

    def place(self, name: str, data: memoryview) -> None:
        storage = self.found[name]
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"a storage of {len(data):,} bytes, where {storage.numel:,} numbers were announced")
        storage.data = data


def read_blob(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a pickle, or of a torch file of either format; storages stay where they are."""
    if bytes(blob.view[:2]) == b"PK":
        return _read_torch_zip(blob, budget, find=find)
    reader = PickleReader(blob, find=find, budget=budget)
    if (value := reader.read()) != LEGACY_MAGIC:
        return value
    storages = reader.persistent = Storages()
    try:
        if reader.read() != 1001:
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


def _read_torch_zip(blob: Blob, budget: Budget, *, find: Callable[[str, str], Name]) -> Any:
    """The value of a torch file since 1.6; its entries must be uncompressed, so that none is larger than the file."""
    entries: dict[str, Blob] = {}
    storages = Storages()
    try:
        for entry in zip_directory(blob.view):
            budget.charge(OBJECT + 8 * len(entry.name), blob.base)
            if not entry.stored or len(entry.name) > 256 or entry.name in entries:
                raise ValueError(f"the entry {entry.name[:60]!r} is compressed, or there twice")
            data = entry.data(blob.view)
            entries[entry.name] = Blob(blob.view[data], blob.base + (0 if blob.decoded else data.start), blob.decoded)
        pickles = [n for n in entries if n.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} data.pkl in place of one")
        folder = pickles[0].removesuffix("data.pkl")
        if (order := entries.get(f"{folder}byteorder")) is not None and bytes(order.view[:8]) != b"little":
            raise ValueError("it comes from a big-endian machine")
        value = PickleReader(entries[pickles[0]], find=find, persistent=storages, budget=budget).read()
        for name in storages.found:
            if (content := entries.get(f"{folder}data/{name}")) is None:
                raise ValueError(f"the storage {name[:60]!r} is not in the zip")
            storages.place(name, content.view)
    except ValueError as e:
        raise Refused(blob.base, f"no torch file, or a damaged zip: {e}") from None
    return value


BEYOND = 0xFFFFFFFF
"""In place of a number that does not fit into four bytes."""


class Entry(NamedTuple):
    """A file in a zip: its name, whether it is uncompressed, where its header starts, its length."""

    name: str
    stored: bool
    header: int
    size: int

    def data(self, view: memoryview) -> slice:
        """The range of its bytes in the zip."""
        if self.header + 30 > len(view):
            raise ValueError(f"its entry {self.name[:60]!r} lies outside it")
        start = self.header + 30 + sum(struct.unpack_from("<HH", view, self.header + 26))
        if start + self.size > len(view):
            raise ValueError(f"its entry {self.name[:60]!r} lies outside it")
        return slice(start, start + self.size)


def zip_directory(view: memoryview) -> Iterator[Entry]:
    """The first 65,535 entries of a zip or zip64, one by one: `zipfile` reads all of a directory, which may fill it."""
    tail = bytes(view[-(2**16 + 22) :])
    end = tail.rfind(b"PK\x05\x06")
    if not 0 <= end <= len(tail) - 22:
        raise ValueError("without its directory; an incomplete download?")
    n, _, at = struct.unpack_from("<HII", tail, end + 10)
    place = end - 20
    if place >= 0 and tail[place : place + 4] == b"PK\x06\x07":  # beyond 4 GiB: where a second end is
        (record,) = struct.unpack_from("<Q", tail, place + 8)
        if record + 56 > len(view) or bytes(view[record : record + 4]) != b"PK\x06\x06":
            raise ValueError("its directory is broken")
        n, _, at = struct.unpack_from("<QQQ", view, record + 32)
    for _ in range(min(n, 0xFFFF)):
        if at + 46 > len(view) or bytes(view[at : at + 4]) != b"PK\x01\x02":
            raise ValueError("its directory is broken")
        flags, method, packed, size, *lengths, header = struct.unpack_from("<8xHH8xIIHHH8xI", view, at)
        first = at + 46 + lengths[0]
        name = str(view[at + 46 : first], "utf-8", "replace")
        size, packed, header = _long(bytes(view[first : first + lengths[1]]), size, packed, header)
        yield Entry(name, method == 0 and packed == size and not flags & 1, header, size)
        at += 46 + sum(lengths)


def _long(extra: bytes, *numbers: int) -> tuple[int, ...]:
    """Size, packed size and place of a zip's entry, of which those beyond 4 GiB are in its extra fields."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            held = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            return tuple(next(held, BEYOND) if number == BEYOND else number for number in numbers)
        extra = extra[4 + length :]
    return numbers


# What the names in a teacher's pickle become.


def rebuild_tensor(reader: PickleReader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorData:
    """`torch._utils._rebuild_tensor(_v2)`, bounds checked; an expanded view (more elements than bytes) is refused."""
    storage = need(storage, Storage, "the storage of a tensor")
    offset, size, stride = count(offset, "a tensor's offset"), shape(size, "a tensor's size"), shape(stride, "a stride")
    if len(size) != len(stride) or len(rest) > 3:
        raise ValueError("a tensor with unequal numbers of sizes and strides")
    n = math.prod(size)
    last = offset + sum((d - 1) * s for d, s in zip(size, stride, strict=True))
    if n and (n > storage.numel or last >= storage.numel):
        raise ValueError(f"a tensor that reaches beyond its storage, whose length is {storage.numel:,}")
    return TensorData(storage, offset, size, stride, reader.at)


def rebuild_parameter(reader: PickleReader, data: Any, *rest: Any) -> TensorData:
    return need(data, TensorData, "the data of a parameter")


def load_from_bytes(reader: PickleReader, blob: Any) -> Storage:
    """`torch.storage._load_from_bytes`: a storage as a torch file of its own."""
    value = read_blob(need(blob, Blob, "a storage"), reader.budget, find=find_storage)
    return need(value, Storage, "the content of a storage")


def make_size(reader: PickleReader, items: Any = ()) -> tuple[int, ...]:
    return shape(items, "a torch.Size")


def persistent_object(reader: PickleReader, meta: Any) -> Record:
    """An object of a class under EDM's `persistence`: name, constructor arguments, state; its source stays text."""
    meta = need(meta, dict, "a persistent object")
    if meta.get("type") != "class":
        raise ValueError("a persistent object that is no class")
    record = Record(need(meta.get("class_name"), str, "the class name of a persistent object"), at=reader.at)
    record.build(meta.get("state"))
    record.args = need(record.state.get("_init_args", ()), tuple, "the arguments of a persistent object")
    record.kwargs = need(record.state.get("_init_kwargs", {}), dict, "the keyword arguments of a persistent object")
    return record


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): load_from_bytes,
    ("torch", "Size"): make_size,
    ("torch", "device"): lambda reader, *args: "device",
}
STORAGES = {(module, name) for name in DTYPES for module in ("torch", "torch.storage")}
TENSOR_DTYPES = {("torch", str(d).removeprefix("torch.")) for d in set(DTYPES.values())}
RECORDS = re.compile(
    r"(torch\.nn\.modules|training|torch_utils|dnnlib)\..*"
    r"|gddlab\.nets\.(blocks|dit|edm2|path|precond|unets)|gddlab\.teachers\.catalog"
)
"""Modules whose classes may appear as records."""


def find_edm(module: str, name: str) -> Name:
    """The allow-list of a teacher's file. Nothing is imported, whatever the answer."""
    if (module, name) in CALLS:
        return Name(module, name, call=CALLS[module, name])
    if (module, name) in STORAGES | TENSOR_DTYPES:
        return Name(module, name)
    if name == "_reconstruct_persistent_obj" and module.split(".")[-2:] == ["torch_utils", "persistence"]:
        return Name(module, name, call=persistent_object)
    if name == "EasyDict" and module.split(".")[-2:] == ["dnnlib", "util"]:
        return Name(module, name, new=new_dict)
    if (RECORDS.fullmatch(module) and name.isidentifier()) or (module, name) == ("argparse", "Namespace"):
        return Name(module, name, new=lambda reader, args, kwargs: Record(name, args, kwargs, at=reader.at))
    return find_plain(module, name)


def find_storage(module: str, name: str) -> Name:
    """The allow-list inside a storage's own torch file: the storage classes."""
    if (module, name) in STORAGES:
        return Name(module, name)
    raise ValueError(f"it names {module[:60]}.{name[:60]} inside a storage; nothing was run")
