"""Writes pickles like those of EDM and EDM2, without their code: names are written as opcodes, never imported."""

from __future__ import annotations

import copy
import io
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
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


@dataclass(frozen=True, eq=False)
class Raw:
    """Opcodes as they are; they push one value and leave the memo alone."""

    opcodes: bytes


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python lets names be written without importing them
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

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

    def verbatim(self, r: Raw) -> None:
        self.write(r.opcodes)

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
        torch.save(t.detach()._typed_storage(), inner, _use_new_zipfile_serialization=self.zipped)
        storage = Call(Symbol("torch.storage", "_load_from_bytes"), (inner.getvalue(),))
        plain = (storage, t.storage_offset(), tuple(t.shape), tuple(t.stride()), False, OrderedDict())
        value = Call(Symbol("torch._utils", "_rebuild_tensor_v2"), plain)
        if isinstance(t, nn.Parameter):
            value = Call(Symbol("torch._utils", "_rebuild_parameter"), (value, True, OrderedDict()))
        self.keep.append(value)
        self.save(value)

    def __init__(self, file: io.BytesIO, protocol: int, zipped: bool):
        super().__init__(file, protocol)
        self.zipped = zipped  # the storages as torch files of today, where EDM's are of the format before 1.6
        self.keep: list[Any] = []  # ids in the memo must stay taken

    dispatch |= {
        Symbol: symbol,
        Call: call,
        New: new,
        Raw: verbatim,
        bytes: raw,
        OrderedDict: ordered,
        torch.Tensor: tensor,
        nn.Parameter: tensor,
    }


def dumps(value: Any, protocol: int = 4, zipped: bool = False) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol, zipped).dump(value)
    return out.getvalue()


def easy(**items: Any) -> New:
    """dnnlib's EasyDict."""
    return New(Symbol("dnnlib.util", "EasyDict"), items=items)


def persistent(class_name: str, state: dict[str, Any], *, source: str = SOURCE) -> Call:
    meta = easy(type="class", version=6, module_src=source, class_name=class_name, state=state)
    return Call(Symbol("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


THEIRS = {"EDM2Precond": "Precond", "EDM2UNet": "UNet"}
"""What EDM2's authors call classes that are called otherwise here."""
OURS = "PixelNorm"
"""A class that they do not have; it holds nothing."""


def class_of(module: nn.Module) -> str:
    return THEIRS.get(type(module).__name__, type(module).__name__)


def state_of(module: nn.Module, **extra: Any) -> dict[str, Any]:
    return {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_forward_hooks": OrderedDict(),
        "_modules": OrderedDict(
            (k, None if m is None else pickled(m)) for k, m in module._modules.items() if type(m).__name__ != OURS
        ),
        **extra,
    }


def pickled(module: nn.Module, **extra: Any) -> Any:
    """A module as EDM's classes pickle: persistent ones, and torch's own containers."""
    if isinstance(module, nn.ModuleDict):
        return New(Symbol("torch.nn.modules.container", "ModuleDict"), state=state_of(module))
    return persistent(class_of(module), state_of(module, _init_args=(), _init_kwargs={}) | extra)


def network(
    net: Precond,
    *,
    cls: str | None = None,
    args: tuple[Any, ...] = (),
    init: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
) -> Call:
    """A network with the arguments that it was built from; `args`, `init` and `state` change what the file says."""
    init_kwargs = dict(use_fp16=False, **net.init_kwargs) | (init or {})
    for name in ("img_resolution", "img_channels", "label_dim", "use_fp16")[: len(args)]:
        init_kwargs.pop(name, None)
    given = {"_init_args": args, "_init_kwargs": easy(**init_kwargs)}
    about = {"img_resolution": net.img_resolution, "label_dim": net.label_dim}
    return persistent(cls or class_of(net), state_of(net, **given, **about) | (state or {}))


def snapshot(
    net: Precond,
    *,
    protocol: int = 4,
    zipped: bool = False,
    content: dict[str, Any] | None = None,
    **changes: Any,
) -> bytes:
    """A network-snapshot pickle; `content` adds to it or replaces."""
    whole = {
        "ema": network(net, **changes),
        "loss_fn": persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "_init_args": (), "_init_kwargs": easy()}),
        "augment_pipe": persistent("AugmentPipe", {"p": 0.12, "_init_args": (0.12,), "_init_kwargs": easy(xflip=1e8)}),
        "dataset_kwargs": easy(class_name="training.dataset.ImageFolderDataset", path="datasets/digits-16x16.zip"),
    }
    return dumps(whole | (content or {}), protocol, zipped)


RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


def encoder(channels: int = 4, **changes: Any) -> Call:
    """EDM2's encoder of images to latents, as its pickles hold it."""
    scale = np.float32(0.5) / np.float32(RAW_STD[:channels])
    bias = np.float32(0) - np.float32(RAW_MEAN[:channels]) * scale
    state: dict[str, Any] = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": bias}
    state |= {"batch_size": 8, "_vae": None, "_init_args": (), "_init_kwargs": {}}
    return persistent("StabilityVAEEncoder", state | changes)


def snapshot2(
    net: Precond,
    *,
    protocol: int = 4,
    zipped: bool = False,
    content: dict[str, Any] | None = None,
    **changes: Any,
) -> bytes:
    """A network-snapshot pickle of EDM2, its weights in 16 bits; `content` adds to it or replaces."""
    loss = {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}}
    whole = {
        "encoder": encoder() if net.img_channels == 4 else persistent("StandardRGBEncoder", {"_init_args": ()}),
        "dataset_kwargs": easy(class_name="training.dataset.ImageFolderDataset", path="datasets/img512-sd.zip"),
        "loss_fn": persistent("EDM2Loss", loss),
        "ema": network(copy.deepcopy(net).half(), **changes),
    }
    return dumps(easy(**whole | (content or {})), protocol, zipped)


def write_snapshot(path: Path, net: Precond, **kwargs: Any) -> Path:
    path.write_bytes(snapshot(net, **kwargs))
    return path


# Opcodes by hand.


def opcodes(*parts: bytes | str, protocol: int = 4) -> bytes:
    """A pickle: its protocol, the opcodes, STOP."""
    return bytes([0x80, protocol]) + b"".join(p.encode("latin1") if isinstance(p, str) else p for p in parts) + b"."


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def name(module: str, qualified: str) -> bytes:
    return b"c" + f"{module}\n{qualified}\n".encode()


def values(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + values(*args) + b"R"
