"""What the names in a teacher's pickle become: tensors, arrays, plain containers, records. The whole allow-list is `find`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gddlab.teachers.torchfile import DTYPES, Storage, TensorData, count, find_storage, need, read_torch, shape
from gddlab.teachers.unpickle import Blob, Name, Node, Reader, Record

__all__ = ["find"]

# PyTorch.


def rebuild_tensor(reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorData:
    """`torch._utils._rebuild_tensor(_v2)`, bounds checked; an expanded view (more elements than bytes) is refused."""
    storage = need(storage, Storage, "the storage of a tensor")
    offset, size, stride = count(offset, "a tensor's offset"), shape(size, "a tensor's size"), shape(stride, "a stride")
    if len(size) != len(stride) or len(rest) > 3:
        raise ValueError("a tensor with unequal numbers of sizes and strides")
    n = math.prod(size)
    if n and (
        n > storage.numel or offset + sum((d - 1) * s for d, s in zip(size, stride, strict=True)) >= storage.numel
    ):
        raise ValueError(f"a tensor that reaches beyond its storage, whose length is {storage.numel:,}")
    return TensorData(storage, offset, size, stride, reader.at)


def rebuild_parameter(reader: Reader, data: Any, *rest: Any) -> TensorData:
    return need(data, TensorData, "the data of a parameter")


def load_from_bytes(reader: Reader, blob: Any) -> Storage:
    """`torch.storage._load_from_bytes`: a storage as a torch file of its own."""
    value = read_torch(need(blob, Blob, "a storage"), reader.budget, find=find_storage)
    return need(value, Storage, "the content of a storage")


# numpy.


@dataclass(slots=True, eq=False)
class DType(Node):
    """A plain numpy dtype."""

    kind: str
    order: str = "<"

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise ValueError("the state of a dtype, without a byte order")
        self.order = order

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.kind)


@dataclass(slots=True, eq=False)
class Array(Node):
    """A numpy array, made when its state comes."""

    value: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("the state of an array that is no tuple of five")
        _, size, dtype, fortran, data = state
        self.value = frombuffer(data, dtype, size, "F" if fortran is True else "C")


def frombuffer(data: Any, dtype: Any, size: Any, order: str) -> np.ndarray[Any, Any]:
    """An array over the file's bytes, not copied."""
    data, dtype = need(data, Blob, "the data of an array").view, need(dtype, DType, "the dtype of an array").numpy
    size = shape(size, "an array's size")
    if math.prod(size) * dtype.itemsize != len(data):
        raise ValueError(f"an array of size {size} in {len(data):,} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(size, order="F" if order == "F" else "C")


def make_dtype(reader: Reader, kind: Any, *rest: Any) -> DType:
    if not isinstance(kind, str) or not re.fullmatch(r"[iuf][1248]|b1|bool", kind) or kind == "f1":
        raise ValueError("a dtype that is no plain number")
    return DType("b1" if kind == "bool" else kind)


def make_array(reader: Reader, *args: Any) -> Array:
    return Array()


def make_scalar(reader: Reader, dtype: Any, data: Any) -> Any:
    return frombuffer(data, dtype, (), "C").item()


def array_of_buffer(reader: Reader, data: Any, dtype: Any, size: Any, order: Any) -> Array:
    return Array(frombuffer(data, dtype, size, order))


# Containers and records.


def make_dict(reader: Reader, *args: Any) -> dict[Any, Any]:
    """An empty dict; `OrderedDict(pairs)` and `EasyDict(dict)` are not what pickling writes."""
    if args:
        raise ValueError("a dict with arguments")
    return {}


def new_dict(reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    if args or kwargs:
        raise ValueError("a dict with arguments")
    return {}


def make_set(reader: Reader, items: Any = ()) -> set[Any]:
    return set(reader.members(need(items, (list, tuple), "the content of a set")))


def make_bytes(reader: Reader, content: Any = "", encoding: Any = "latin1") -> Blob:
    """`_codecs.encode(text, "latin1")` and `bytearray(...)`: bytes in older protocols."""
    if isinstance(content, Blob):
        return content
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("an encoding other than latin1")
    reader.budget.charge(2 * len(need(content, str, "a text to encode")), reader.at)
    return Blob(memoryview(bytearray(content, "latin1")), reader.at, decoded=True)


def make_size(reader: Reader, items: Any = ()) -> tuple[int, ...]:
    return shape(items, "a torch.Size")


def make_device(reader: Reader, *args: Any) -> str:
    return "device"


def persistent_object(reader: Reader, meta: Any) -> Record:
    """An object of a class under EDM's `persistence`: class name, constructor arguments and state; its source stays text."""
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
    ("torch", "device"): make_device,
    ("collections", "OrderedDict"): make_dict,
    ("numpy", "dtype"): make_dtype,
    ("numpy._core.multiarray", "_reconstruct"): make_array,
    ("numpy._core.multiarray", "scalar"): make_scalar,
    ("numpy._core.numeric", "_frombuffer"): array_of_buffer,
    ("_codecs", "encode"): make_bytes,
    ("builtins", "bytes"): make_bytes,
    ("builtins", "bytearray"): make_bytes,
    ("builtins", "set"): make_set,
    ("builtins", "frozenset"): make_set,
}
INERT = {("numpy", "ndarray"), *(("torch", str(d).removeprefix("torch.")) for d in set(DTYPES.values()))}
INERT |= {(module, name) for name in DTYPES for module in ("torch", "torch.storage")}
MODULES = ("torch.nn.modules.", "training.", "torch_utils.", "dnnlib.")  # whose classes may appear as records


def find(module: str, name: str) -> Name:
    """The allow-list: what a name becomes. Nothing is imported, whatever the answer."""
    if module.startswith("numpy.core."):
        module = module.replace("numpy.core.", "numpy._core.", 1)
    elif module == "__builtin__":
        module = "builtins"
    if (module, name) in CALLS:
        return Name(module, name, call=CALLS[module, name], new=new_dict if name == "OrderedDict" else None)
    if (module, name) in INERT:
        return Name(module, name)
    if name == "_reconstruct_persistent_obj" and module.split(".")[-2:] == ["torch_utils", "persistence"]:
        return Name(module, name, call=persistent_object)
    if name == "EasyDict" and module.split(".")[-2:] == ["dnnlib", "util"]:
        return Name(module, name, new=new_dict)
    if module.startswith(MODULES) and name.isidentifier():
        return Name(module, name, new=lambda reader, args, kwargs: Record(name, args, kwargs, at=reader.at))
    raise ValueError(f"it names {module[:60]}.{name[:60]}, which no EDM network needs; nothing of it was run")
