"""Writes pickles of the form that EDM's `persistence` makes, without any of its code: names are written as opcodes, never imported."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gddlab.nets import Precond

SOURCE = "raise SystemExit('the source in a pickle was run')\n"


@dataclass(frozen=True)
class Symbol:
    """A global by name."""

    module: str
    name: str

    def __call__(self) -> None:
        raise AssertionError("a symbol is never called")


@dataclass(frozen=True, eq=False)
class Call:
    """function(*args), then its state."""

    function: Symbol
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, eq=False)
class New:
    """cls.__new__(cls, *args), then its state."""

    cls: Symbol
    args: tuple[Any, ...] = ()
    state: Any = None
    items: Any = None


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python lets names be written without importing them
    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def symbol(self, s: Symbol) -> None:
        if self.proto >= 4:
            self.save(s.module)
            self.save(s.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{s.module}\n{s.name}\n".encode())
        self.memoize(s)

    def call(self, c: Call) -> None:
        self.save_reduce(c.function, c.args, state=c.state, obj=c)

    def new(self, n: New) -> None:
        self.save(n.cls)
        self.save(n.args)
        self.write(pickle.NEWOBJ)
        self.memoize(n)
        if n.items:
            self._batch_setitems(n.items.items())
        if n.state is not None:
            self.save(n.state)
            self.write(pickle.BUILD)

    def raw(self, b: bytes) -> None:
        if self.proto >= 3:
            pickle._Pickler.dispatch[bytes](self, b)  # type: ignore[attr-defined]
        else:
            self.save_reduce(Symbol("_codecs", "encode"), (b.decode("latin1"), "latin1"), obj=b)

    def ordered(self, d: OrderedDict[Any, Any]) -> None:
        self.save_reduce(Symbol("collections", "OrderedDict"), (), dictitems=iter(d.items()), obj=d)

    def batch(self, items: Any, obj: Any = None) -> None:
        self._batch_setitems(items)

    def tensor(self, t: torch.Tensor) -> None:
        inner = io.BytesIO()
        torch.save(t.detach().clone()._typed_storage(), inner, _use_new_zipfile_serialization=False)
        storage = Call(Symbol("torch.storage", "_load_from_bytes"), (inner.getvalue(),))
        plain = (storage, 0, tuple(t.shape), tuple(t.stride()), False, OrderedDict())
        value = Call(Symbol("torch._utils", "_rebuild_tensor_v2"), plain)
        if isinstance(t, nn.Parameter):
            value = Call(Symbol("torch._utils", "_rebuild_parameter"), (value, True, OrderedDict()))
        self.keep.append(value)
        self.save(value)

    def __init__(self, file: io.BytesIO, protocol: int):
        super().__init__(file, protocol)
        self.keep: list[Any] = []  # ids in the memo must stay taken

    dispatch |= {Symbol: symbol, Call: call, New: new, bytes: raw, OrderedDict: ordered, torch.Tensor: tensor, nn.Parameter: tensor}


def dumps(value: Any, protocol: int = 4) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def easy(**items: Any) -> New:
    """dnnlib's EasyDict."""
    return New(Symbol("dnnlib.util", "EasyDict"), items=items)


def persistent(class_name: str, state: dict[str, Any], *, source: str = SOURCE) -> Call:
    meta = easy(type="class", version=6, module_src=source, class_name=class_name, state=state)
    return Call(Symbol("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def state_of(module: nn.Module, **extra: Any) -> dict[str, Any]:
    return {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_forward_hooks": OrderedDict(),
        "_modules": OrderedDict((k, None if m is None else pickled(m)) for k, m in module._modules.items()),
        **extra,
    }


def pickled(module: nn.Module, **extra: Any) -> Any:
    """A module as EDM's classes pickle: persistent ones, and torch's own containers."""
    if isinstance(module, nn.ModuleDict):
        return New(Symbol("torch.nn.modules.container", "ModuleDict"), state=state_of(module))
    return persistent(type(module).__name__, state_of(module, _init_args=(), _init_kwargs={}) | extra)


def network(net: Precond, *, cls: str | None = None, **kwargs: Any) -> Call:
    """A network with the arguments that it was built from."""
    init = easy(use_fp16=False, **net.init_kwargs, **kwargs)
    state = state_of(net, _init_args=(), _init_kwargs=init, img_resolution=net.img_resolution, label_dim=net.label_dim)
    return persistent(cls or type(net).__name__, state)


def snapshot(net: Precond, *, cls: str | None = None, protocol: int = 4, **kwargs: Any) -> bytes:
    """A network-snapshot pickle."""
    content = {
        "ema": network(net, cls=cls, **kwargs),
        "loss_fn": persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "_init_args": (), "_init_kwargs": easy()}),
        "augment_pipe": persistent("AugmentPipe", {"p": 0.12, "_init_args": (0.12,), "_init_kwargs": easy(xflip=1e8)}),
        "dataset_kwargs": easy(class_name="training.dataset.ImageFolderDataset", path="datasets/digits-16x16.zip"),
    }
    return dumps(content, protocol)


def write_snapshot(path: Path, net: Precond, **kwargs: Any) -> Path:
    path.write_bytes(snapshot(net, **kwargs))
    return path


def opcodes(*parts: bytes | str | int) -> bytes:
    """A pickle by hand: protocol 4, the given opcodes, STOP."""
    return b"\x80\x04" + b"".join(p.encode() if isinstance(p, str) else bytes([p]) if isinstance(p, int) else p for p in parts) + b"."


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
