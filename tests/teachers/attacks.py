"""Files that attack the reader of pickles, each in a few opcodes, and a watch over what reading them does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gddlab.errors import GddlabError
from gddlab.nets import Precond, from_edm
from gddlab.teachers.edm import read_edm
from gddlab.teachers.torchfiles import format_of
from tests.teachers.pickles import (
    Call,
    New,
    Raw,
    Symbol,
    call,
    dumps,
    easy,
    encoder,
    name,
    network,
    opcodes,
    persistent,
    snapshot,
    snapshot2,
    state_of,
    text,
    values,
)

ROOT = Path(__file__).parents[2]
MARK = "attacked"
"""The file that attacks try to write in the working folder."""


def small_net(**changes: Any) -> Precond:
    """A network of 3,000 parameters."""
    torch.manual_seed(0)
    unet: dict[str, Any] = {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return from_edm("EDMPrecond", img_resolution=4, img_channels=1, model_type="SongUNet", **unet | changes).eval()


def small_edm2(**changes: Any) -> Precond:
    """A network of EDM2, of latents, 6,000 parameters; its gains are not 0."""
    torch.manual_seed(0)
    unet: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    shape = {"img_resolution": 4, "img_channels": 4, "channels_per_head": 8, "logvar_channels": 8}
    net = from_edm("EDM2Precond", **shape | unet | changes)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.fill_(1.0)
    return net.eval()


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


# What an attack does: opcodes that push one value.

SYSTEM = call(name("os", "system"), text(f"touch {MARK}"))
SOURCE = f"open({MARK!r}, 'w').close()"
CALLS: dict[str, bytes] = {
    "os.system": SYSTEM,
    "posix.system": call(name("posix", "system"), text(f"touch {MARK}")),
    "nt.system": call(name("nt", "system"), text("echo")),
    "subprocess.Popen": call(name("subprocess", "Popen"), text(f"touch {MARK}")),
    "pty.spawn": call(name("pty", "spawn"), text("sh")),
    "eval": call(name("builtins", "eval"), text(SOURCE)),
    "exec": call(name("builtins", "exec"), text(SOURCE)),
    "eval under its old name": call(name("__builtin__", "eval"), text(SOURCE)),
    "compile": call(name("builtins", "compile"), text(SOURCE), text("x"), text("exec")),
    "__import__": call(name("builtins", "__import__"), text("this")),
    "getattr": call(name("builtins", "getattr"), name("torch", "device"), text("__class__")),
    "open": call(name("builtins", "open"), text(MARK), text("w")),
    "io.open": call(name("io", "open"), text(MARK), text("w")),
    "pathlib": call(name("pathlib", "Path"), text(MARK)),
    "importlib": call(name("importlib", "import_module"), text("this")),
    "runpy": call(name("runpy", "_run_code"), text(SOURCE), b"}"),
    "operator.attrgetter": call(name("operator", "attrgetter"), text("system")),
    "functools.partial": call(name("functools", "partial"), name("os", "system"), text(f"touch {MARK}")),
    "codecs": call(name("_codecs", "decode"), text("x"), text("rot13")),
    "encode in another codec": call(name("_codecs", "encode"), text("x"), text("rot13")),
    "pickle.loads": call(name("pickle", "loads"), b"C\x04\x80\x04N."),
    "pickle._loads in torch": call(name("torch.serialization", "load"), text("x")),
    "torch.load": call(name("torch", "load"), text("x")),
    "torch.hub": call(name("torch.hub", "load"), text("x/y"), text("z")),
    "torch.jit": call(name("torch.jit", "load"), text("x")),
    "torch.ops": call(name("torch.ops", "load_library"), text("x.so")),
    "torch's own compiler": call(name("torch._inductor.codecache", "PyCodeCache.load"), text(SOURCE)),
    "numpy.load": call(name("numpy", "load"), text("x")),
    "numpy's runstring": call(name("numpy.testing._private.utils", "runstring"), text(SOURCE), b"}"),
    "numpy.f2py": call(name("numpy.f2py", "compile"), text("x")),
    "types.CodeType": call(name("types", "CodeType")),
    "marshal": call(name("marshal", "loads"), b"C\x01N"),
    "ctypes": call(name("ctypes", "CDLL"), text("libc.so.6")),
    "socket": call(name("socket", "create_connection"), text("127.0.0.1")),
    "webbrowser": call(name("webbrowser", "open"), text("http://127.0.0.1")),
    "copyreg": call(name("copyreg", "_reconstructor"), name("os", "_wrap_close"), name("builtins", "object"), b"N"),
    "copyreg.__newobj__": call(name("copyreg", "__newobj__"), name("os", "_wrap_close")),
    "the reader's own parts": call(name("gddlab.teachers.edm", "read_edm"), text("x")),
    "logging.config": call(name("logging.config", "_handle_existing_loggers"), b"]"),
    "timeit": call(name("timeit", "timeit"), text(SOURCE)),
    "dnnlib's constructor": call(name("dnnlib.util", "construct_class_by_name"), text("os.system")),
    "dnnlib's function caller": call(name("dnnlib.util", "call_func_by_name"), text("os.system")),
    "persistence's own parts": call(name("torch_utils.persistence", "_src_to_module"), text(SOURCE)),
    "a class of torch called": call(name("torch.nn.modules.container", "ModuleDict")),
    "a dotted name": call(name("torch.nn.modules.container", "ModuleDict.__init__.__globals__"), b"}"),
    "a dotted builtin": call(name("collections", "OrderedDict.__init__.__globals__"), b"}"),
    "a dotted rebuild": call(name("torch._utils", "_rebuild_tensor_v2.__globals__.get"), text("sys")),
    "a name with a newline": text("os\nx\x1b[2J") + text("system\n\x9b") + b"\x93)R",
    "a name in surrogates": b"X\x03\x00\x00\x00\xed\xa0\x80" + text("system") + b"\x93)R",
    "an empty name": name("", "") + b")R",
    "a stack global of numbers": b"K\x01K\x02\x93)R",
    "a call of a text": text("os.system") + b")R",
    "a call of a tensor class": name("torch", "FloatStorage") + b"(K\x01tR",
    "a call with a list": name("collections", "OrderedDict") + b"]R",
    "a call with too many": name("torch", "device") + values(b"N" * 65) + b"R",
    "an instance of os": name("os", "_wrap_close") + b")\x81",
    "an instance with keywords": name("os", "_wrap_close") + b")}\x92",
    "an instance of a function": name("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "an instance of a text": text("x") + b")\x81",
    "keywords that are numbers": name("torch.nn.modules.container", "ModuleDict") + b"N}\x92",
    "state for a text": text("x") + b"}b",
    "state for a list": b"]}b",
    "state for a name": name("torch.nn.modules.container", "ModuleDict") + b"}b",
    "state that is a name": name("torch.nn.modules.container", "ModuleDict") + b")\x81" + name("os", "system") + b"b",
    "state set twice": name("torch.nn.modules.container", "ModuleDict") + b")\x81}K\x01K\x02sb}K\x01K\x02sb",
    "state by __setstate__": name("torch.nn.modules.container", "ModuleDict")
    + b")\x81}"
    + text("__setstate__")
    + name("os", "system")
    + b"sb",
    "a state in slots": name("torch.nn.modules.container", "ModuleDict") + b")\x81N}" + text("x") + b"Ns\x86b",
    "an INST": b"(" + text(f"touch {MARK}") + b"ios\nsystem\n",
    "an OBJ": b"(" + name("os", "system") + text(f"touch {MARK}") + b"o",
    "an EXT1": b"\x82\x01)R",
    "an EXT2": b"\x83\x01\x00)R",
    "an EXT4": b"\x84\x01\x00\x00\x00)R",
    "a PERSID": b"Pos.system\n",
    "a BINPERSID": b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01tQ",
    "a buffer out of band": b"\x97",
    "a read-only buffer": b"N\x98",
    "a DUP": b"N20",
    "a protocol-0 text": b"Vos.system\n",
    "a protocol-0 string": b"S'os.system'\n",
    "a protocol-0 number": b"I1\n",
    "a protocol-0 long": b"L1L\n",
    "a protocol-0 float": b"F1\n",
    "a protocol-0 put": b"Np0\n",
    "a protocol-0 get": b"g0\n",
    "a protocol-0 dict": b"(d",
    "a protocol-0 list": b"(l",
    "a protocol-1 string": b"U\x01x",
    "an opcode that is none": b"\xff",
    "protocol 6": b"\x80\x06N",
    "protocol 1": b"\x80\x01N",
    "nothing on the stack": b"0",
    "a mark that is not there": b"t",
    "a pop below a mark": b"N(0N",
    "memory never stored": b"h\x07",
    "a dict with half a pair": b"}(Nu",
    "a key that is a list": b"}]Ns",
    "a key that is a name": b"}" + name("torch", "device") + b"Ns",
    "a key that is a tuple": b"})Ns",
    "a key that is a float": b"}G\x7f\xf8\x00\x00\x00\x00\x00\x00Ns",
    "a key that is a large number": b"}\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01Ns",
    "a key that is a long text": b"}" + text("k" * 1001) + b"Ns",
    "a set of lists": b"\x8f(]\x90",
    "a frozen set of lists": b"(]\x91",
    "a set in a set": b"(\x8f\x91",
    "appending to a tuple": b")Na",
    "an item of a list": b"]K\x00Ns",
    "text that is no UTF-8": b"X\x01\x00\x00\x00\xff",
    "a number of 300 bytes": b"\x8b" + struct.pack("<i", 300) + bytes(300),
    "a number of -1 bytes": b"\x8b" + struct.pack("<i", -1),
    "a name of 300 characters": text("m" * 300) + text("n") + b"\x93",
    "a name without an end": b"c" + b"x" * 300,
}

# 200 bytes that ask for terabytes.

TERA = 2**43
STORAGE = values(
    text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"\x8a\x06" + u64(TERA)[:6], b"N"
)
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def legacy(
    value: bytes, *, keys: bytes = b"]" + text("0") + b"a", tail: bytes = b"", header: bytes | None = None
) -> bytes:
    """A torch file from before 1.6 whose parts are opcodes."""
    header = header if header is not None else b"}" + text("little_endian") + b"\x88s"
    return MAGIC + b"\x80\x02M\xe9\x03." + b"".join(opcodes(p, protocol=2) for p in (header, value, keys)) + tail


def zipped(value: bytes, **entries: bytes) -> bytes:
    """A torch file since 1.6 whose data.pkl is opcodes; `entries` lie in data/."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", opcodes(value, protocol=2))
        for key, content in entries.items():
            z.writestr(f"archive/data/{key}", content)
    return out.getvalue()


def in_bytes(torch_file: bytes) -> bytes:
    """The storage that these bytes claim to be."""
    return call(name("torch.storage", "_load_from_bytes"), b"B" + struct.pack("<I", len(torch_file)) + torch_file)


def tensor(storage: bytes, size: bytes = b"(K\x01t", stride: bytes = b"(K\x01t", offset: bytes = b"K\x00") -> bytes:
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, b"\x89", b"N")


FLOAT = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
ONE = in_bytes(legacy(FLOAT + b"K\x01NtQ", tail=u64(1) + bytes(4)))
DTYPE = name("numpy", "dtype") + values(text("f4"), b"\x89", b"\x88") + b"R"
DTYPE += values(b"K\x03", text("<"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00") + b"b"
ARRAY = name("numpy.core.multiarray", "_reconstruct") + values(name("numpy", "ndarray"), b"(K\x00t", b"C\x01b") + b"R"
HUGE = b"\x8a\x06" + u64(TERA)[:6]
BOMBS: dict[str, bytes] = {
    "bytes of terabytes": b"\x8e" + u64(TERA),
    "bytes of 2**64 - 1": b"\x8e" + u64(2**64 - 1),
    "a bytearray of terabytes": b"\x96" + u64(TERA),
    "text of terabytes": b"\x8d" + u64(TERA),
    "text of 4 GB": b"X" + b"\xff" * 4,
    "a number of gigabytes": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a storage of terabytes": in_bytes(legacy(STORAGE + b"Q", tail=u64(TERA))),
    "a storage of terabytes with few": in_bytes(legacy(STORAGE + b"Q", tail=u64(1) + bytes(4))),
    "a storage of terabytes in a zip": in_bytes(zipped(STORAGE + b"Q", **{"0": bytes(4)})),
    "a storage that is not in the zip": in_bytes(zipped(STORAGE + b"Q")),
    "a storage of -1 numbers": in_bytes(legacy(FLOAT + b"J\xff\xff\xff\xffNtQ")),
    "a storage of True numbers": in_bytes(legacy(FLOAT + b"\x88NtQ")),
    "a storage of 2**300 numbers": in_bytes(legacy(FLOAT + b"\x8a\x28" + b"\x00" * 39 + b"\x01NtQ")),
    "a storage of objects": in_bytes(legacy(FLOAT.replace(b"FloatStorage", b"device") + b"K\x01NtQ")),
    "a storage that is a view": in_bytes(legacy(FLOAT + b"K\x01" + values(text("1"), b"K\x00", b"K\x01") + b"tQ")),
    "a storage that is a list": in_bytes(legacy(b"]", keys=b"]")),
    "a storage listed as another": in_bytes(legacy(FLOAT + b"K\x01NtQ", keys=b"]" + text("1") + b"a", tail=u64(1))),
    "a storage listed as a list": in_bytes(legacy(FLOAT + b"K\x01NtQ", keys=b"]]a", tail=u64(1) + bytes(4))),
    "a storage of big-endian bytes": in_bytes(
        legacy(FLOAT + b"K\x01NtQ", header=b"}" + text("little_endian") + b"\x89s")
    ),
    "a storage whose header is a list": in_bytes(legacy(FLOAT + b"K\x01NtQ", header=b"]")),
    "a storage that is no torch file": in_bytes(opcodes("N") * 5),
    "a storage of other bytes": in_bytes(b"os.system"),
    "a storage of no bytes": in_bytes(b""),
    "a storage that is a text": call(name("torch.storage", "_load_from_bytes"), text("x")),
    "a storage within a storage": in_bytes(legacy(in_bytes(legacy(FLOAT + b"K\x01NtQ")))),
    "a tensor of terabytes": tensor(ONE, values(HUGE), b"(K\x00t"),
    "a tensor of terabytes by stride": tensor(ONE, b"(K\x01t", b"(K\x01t", HUGE),
    "a tensor of 2**384": tensor(ONE, values(HUGE * 8), b"(" + b"K\x00" * 8 + b"t"),
    "a tensor of nine dimensions": tensor(ONE, b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"),
    "a tensor of negative size": tensor(ONE, b"(J\xff\xff\xff\xfft"),
    "a tensor of negative stride": tensor(ONE, b"(K\x01t", b"(J\xff\xff\xff\xfft"),
    "a tensor of negative offset": tensor(ONE, offset=b"J\xff\xff\xff\xff"),
    "a tensor past its end": tensor(ONE, offset=b"K\x01"),
    "a tensor of floats for sizes": tensor(ONE, b"(G\x7f\xf0\x00\x00\x00\x00\x00\x00t"),
    "a tensor with half a stride": tensor(ONE, b"(K\x01K\x01t"),
    "a tensor of a list": tensor(b"]"),
    "a tensor without arguments": call(name("torch._utils", "_rebuild_tensor_v2")),
    "a parameter of a list": call(name("torch._utils", "_rebuild_parameter"), b"]", b"\x88", b"N"),
    "an array of terabytes": ARRAY + values(b"K\x01", values(HUGE), DTYPE, b"\x89", b"C\x04" + bytes(4)) + b"b",
    "an array of 2**384": ARRAY + values(b"K\x01", values(HUGE * 8), DTYPE, b"\x89", b"C\x04" + bytes(4)) + b"b",
    "an array of objects": name("numpy", "dtype") + values(text("O8"), b"\x89", b"\x88") + b"R",
    "an array of records": name("numpy", "dtype") + values(text("V8"), b"\x89", b"\x88") + b"R",
    "an array whose data is a name": ARRAY + values(b"K\x01", b"(K\x01t", DTYPE, b"\x89", name("os", "system")) + b"b",
    "an array whose dtype is a text": ARRAY
    + values(b"K\x01", b"(K\x01t", text("O"), b"\x89", b"C\x04" + bytes(4))
    + b"b",
    "an array of a short state": ARRAY + b"(K\x01tb",
    "a dtype of a short state": DTYPE + b"(K\x01tb",
    "a scalar of many": call(name("numpy._core.multiarray", "scalar"), DTYPE, b"C\x08" + bytes(8)),
    "a scalar of a list": call(name("numpy._core.multiarray", "scalar"), DTYPE, b"]"),
    "a size of lists": call(name("torch", "Size"), b"(]t"),
    "a set of a number": call(name("builtins", "set"), b"K\x01"),
    "an ordered dict of pairs": call(name("collections", "OrderedDict"), b"]"),
    "bytes of a surrogate": call(name("_codecs", "encode"), text("€"), text("latin1")),
    "a persistent object of a list": call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), b"]"),
    "a persistent object of nothing": call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}"),
}

# Where an attack hides: a snapshot with the opcodes at one place of it.


def _hidden_storage(payload: bytes, wrap: Callable[[bytes], bytes]) -> Raw:
    return Raw(tensor(in_bytes(wrap(payload))))


PLACES: dict[str, Callable[[Precond, bytes], bytes]] = {
    "alone": lambda net, p: opcodes(p),
    "in protocol 2": lambda net, p: opcodes(p, protocol=2),
    "in place of the network": lambda net, p: snapshot(net, content={"ema": Raw(p)}),
    "beside the network": lambda net, p: snapshot(net, content={"extra": Raw(p)}),
    "thrown away": lambda net, p: snapshot(net, content={"extra": Raw(p + b"0N")}),
    "in the state": lambda net, p: snapshot(net, state={"hook": Raw(p)}),
    "in _init_kwargs": lambda net, p: snapshot(net, init={"dropout": Raw(p)}),
    "in _init_args": lambda net, p: snapshot(net, args=(Raw(p),)),
    "as _init_kwargs": lambda net, p: snapshot(net, state={"_init_kwargs": Raw(p)}),
    "in _parameters": lambda net, p: snapshot(net, state={"_parameters": OrderedDict(x=Raw(p))}),
    "as _parameters": lambda net, p: snapshot(net, state={"_parameters": Raw(p)}),
    "in _buffers": lambda net, p: snapshot(net, state={"_buffers": OrderedDict(x=Raw(p))}),
    "as the U-Net": lambda net, p: snapshot(net, state={"_modules": OrderedDict(model=Raw(p))}),
    "as a hook": lambda net, p: snapshot(net, state={"_forward_hooks": OrderedDict(x=Raw(p))}),
    "as a class name": lambda net, p: dumps({"ema": persistent(Raw(p), state_of(net))}),  # type: ignore[arg-type]
    "as module_src": lambda net, p: dumps({"ema": persistent("EDMPrecond", state_of(net), source=Raw(p))}),  # type: ignore[arg-type]
    "as the state": lambda net, p: dumps({"ema": persistent("EDMPrecond", Raw(p))}),  # type: ignore[arg-type]
    "as an argument of a class": lambda net, p: dumps(New(Symbol("torch.nn.modules.linear", "Linear"), (Raw(p),))),
    "as the state of a container": lambda net, p: dumps(
        New(Symbol("torch.nn.modules.container", "ModuleDict"), state=Raw(p))
    ),
    "in a tensor's place": lambda net, p: dumps(
        Call(Symbol("torch._utils", "_rebuild_tensor_v2"), (Raw(p), 0, (1,), (1,)))
    ),
    "in a storage, before 1.6": lambda net, p: snapshot(net, content={"extra": _hidden_storage(p, legacy)}),
    "in a storage's header": lambda net, p: snapshot(
        net, content={"extra": _hidden_storage(p, lambda p: legacy(FLOAT + b"K\x01NtQ", header=p))}
    ),
    "in a storage's list": lambda net, p: snapshot(
        net, content={"extra": _hidden_storage(p, lambda p: legacy(FLOAT + b"K\x01NtQ", keys=p))}
    ),
    "in a storage, since 1.6": lambda net, p: snapshot(net, content={"extra": _hidden_storage(p, zipped)}),
    "in a torch file, before 1.6": lambda net, p: legacy(p),
    "in a torch file, since 1.6": lambda net, p: zipped(p),
    "in EDM2's encoder": lambda net, p: snapshot2(small_edm2(), content={"encoder": encoder(vae_name=Raw(p))}),
    "as EDM2's encoder": lambda net, p: snapshot2(small_edm2(), content={"encoder": Raw(p)}),
    "in EDM2's network": lambda net, p: snapshot2(small_edm2(), init={"clip_act": Raw(p)}),
}


# Attacks on what is built from the content.

CLASS = name("torch.nn.modules.linear", "Linear")


def _with_state(**state: Any) -> Callable[[Precond], bytes]:
    return lambda net: snapshot(net, state=state)


def _with_init(**init: Any) -> Callable[[Precond], bytes]:
    return lambda net: snapshot(net, init=init)


def _itself(net: Precond) -> bytes:
    """A module that holds itself."""
    module = name("torch.nn.modules.container", "ModuleDict") + b")\x81r\x00\x00\x01\x00}" + text("_modules") + b"}"
    module += text("x") + b"j\x00\x00\x01\x00ssb"
    return snapshot(net, protocol=3, state={"_modules": OrderedDict(model=Raw(module))})  # 4 counts the memo


def _deep(net: Precond) -> bytes:
    """Modules in modules, 10,000 deep."""
    start = name("torch.nn.modules.container", "ModuleDict") + b")\x81}" + text("_modules") + b"}" + text("x")
    return snapshot(net, state={"_modules": OrderedDict(model=Raw(start * 5_000 + b"N" + b"ssb" * 5_000))})


def _shared(net: Precond) -> bytes:
    """Many modules that are one."""
    module = name("torch.nn.modules.linear", "Linear") + b")\x81r\x00\x00\x01\x00"
    many = b"}" + text("a") + module + b"s" + b"".join(text(f"m{i}") + b"j\x00\x00\x01\x00s" for i in range(50))
    return snapshot(net, protocol=3, state={"_modules": Raw(many)})


WIDE = OrderedDict((f"t{i}", None) for i in range(10_001))
NETWORKS: dict[str, Callable[[Precond], bytes]] = {
    "another class": lambda net: snapshot(net, cls="StyleGAN"),
    "a class with control characters": lambda net: snapshot(net, cls="x\n\x1b[2J\u202e\ud800"),
    "a class of a megabyte": lambda net: snapshot(net, cls="x" * 2**20),
    "five positional arguments": lambda net: snapshot(net, args=(4, 1, 0, False, 9)),
    "an unknown argument": _with_init(device="cuda"),
    "an argument that is no text": lambda net: snapshot(
        net, state={"_init_kwargs": {1: 2, "img_resolution": 4, "img_channels": 1}}
    ),
    "a name of control characters": _with_init(**{"\n\x1b]0;x\x07": 1}),
    "10,000 arguments": _with_init(**{f"a{i}": 1 for i in range(10_000)}),
    "a list of networks": lambda net: dumps([network(net)]),
    "a number": lambda net: dumps(7),
    "a text": lambda net: dumps("x\n" * 100),
    "no network": lambda net: dumps({"a\nb": 1, 2: 3, None: 4, "x" * 900: 5}),
    "an empty dict": lambda net: dumps({}),
    "a network that is a text": lambda net: dumps({"ema": "EDMPrecond"}),
    "_modules that is a list": _with_state(_modules=[1]),
    "_modules that is a text": _with_state(_modules="x"),
    "_parameters that is a tuple": _with_state(_parameters=(1, 2)),
    "_buffers of a number": _with_state(_buffers={"x": 1}),
    "_buffers by a number": _with_state(_buffers={1: torch.zeros(1)}),
    "_modules of a tensor": _with_state(_modules={"model": torch.zeros(1)}),
    "_parameters of a module": _with_state(_parameters={"x": easy()}),
    "transient buffers that are a number": _with_state(_buffers={"x": 1}, _non_persistent_buffers_set=7),
    "a tensor too many": _with_state(_parameters={"a\nb\x1b": torch.zeros(1)}),
    "a name of a tensor too long": _with_state(_parameters={"x" * 999: torch.zeros(1)}),
    "too few tensors": _with_state(_modules={}),
    "tensors in lists 10,000 long": _with_state(_parameters=WIDE),
    "a module that holds itself": _itself,
    "modules nested deep": _deep,
    "a module many times": _shared,
    "64 blocks a level": _with_init(num_blocks=64),
    "2**40 blocks": _with_init(num_blocks=2**40),
    "-1 blocks": _with_init(num_blocks=-1),
    "True blocks": _with_init(num_blocks=True),
    "1.5 blocks": _with_init(num_blocks=1.5),
    "16 levels": _with_init(channel_mult=[1] * 16),
    "10,000 levels": _with_init(channel_mult=[1] * 10_000),
    "no levels": _with_init(channel_mult=[]),
    "levels of texts": _with_init(channel_mult=["1"]),
    "levels of 2**60": _with_init(channel_mult=[2**60]),
    "levels of 64 times 8192": _with_init(channel_mult=[64], model_channels=8192, channel_mult_emb=64),
    "half a level": _with_init(channel_mult=[0.5]),
    "no channels": _with_init(model_channels=0),
    "NaN channels": _with_init(model_channels=float("nan")),
    "two channels": _with_init(model_channels=2),
    "a resolution of 2**31": _with_init(img_resolution=2**31),
    "a resolution that is a list": _with_init(img_resolution=[4]),
    "a resolution that is a dict": _with_init(img_resolution={"x": 1}),
    "another resolution": _with_init(img_resolution=8),
    "three channels": _with_init(img_channels=3),
    "2**40 labels": _with_init(label_dim=2**40),
    "-1 labels": _with_init(label_dim=-1),
    "an odd filter": _with_init(resample_filter=[1, 2, 1]),
    "a filter of NaN": _with_init(resample_filter=[float("nan")] * 2),
    "attention at 10,000 levels": _with_init(attn_resolutions=list(range(10_000))),
    "an unknown U-Net": _with_init(encoder_type="os.system"),
    "a U-Net by a number": _with_init(encoder_type=7),
    "another U-Net": _with_state(_modules=OrderedDict(model=New(Symbol("training.networks", "os\u0085"[:2])))),
    "sigma_data of NaN": _with_init(sigma_data=float("nan")),
    "sigma_data of infinity": _with_init(sigma_data=float("inf")),
    "sigma_min of minus infinity": _with_init(sigma_min=float("-inf")),
    "sigma_min that is a text": _with_init(sigma_min="0"),
    "sigma from 3 to 2": _with_init(sigma_min=3, sigma_max=2),
    "sigma of 10**400": _with_init(sigma_max=10**400),
    "VP of NaN": lambda net: snapshot(net, cls="VPPrecond", init={"beta_d": float("nan")}),
    "VP that overflows": lambda net: snapshot(net, cls="VPPrecond", init={"beta_d": 1e6}),
    "VP below zero": lambda net: snapshot(net, cls="VPPrecond", init={"beta_d": -5.0}),
    "iDDPM of 10**9 levels": lambda net: snapshot(net, cls="iDDPMPrecond", init={"M": 10**9}),
    "iDDPM that divides by zero": lambda net: snapshot(net, cls="iDDPMPrecond", init={"C_2": -1}),
    "weights of integers": lambda net: snapshot(changed(net, lambda t: t.int())),
    "weights of NaN": lambda net: snapshot(changed(net, lambda t: t * float("nan"))),
    "weights of infinity": lambda net: snapshot(changed(net, lambda t: t + float("inf"))),
    "weights that share their bytes": lambda net: snapshot(
        changed(net, lambda t: torch.zeros(1).as_strided(t.shape, [0] * t.ndim))
    ),
} | {
    f"EDM2, {title}": (lambda net, changes=changes: snapshot2(small_edm2(), **changes))
    for title, changes in {
        "an EDM network inside": {
            "state": {"_modules": OrderedDict(model=New(Symbol("training.networks", "SongUNet")))}
        },
        "no U-Net": {"state": {"_modules": {}}},
        "a U-Net that is a text": {"state": {"_modules": {"unet": "UNet"}}},
        "a tensor too many": {"state": {"_parameters": {"x": torch.zeros(1)}}},
        "64 blocks a level": {"init": {"num_blocks": 64}},
        "16 levels": {"init": {"channel_mult": [1] * 16}},
        "another width": {"init": {"model_channels": 16}},
        "wide embeddings": {"init": {"channel_mult_emb": 64, "channel_mult_noise": 64, "model_channels": 8192}},
        "no channels in a head": {"init": {"channels_per_head": 0}},
        "heads that do not divide": {"init": {"channels_per_head": 3}},
        "features without number": {"init": {"logvar_channels": 2**40}},
        "balances that are lists": {"init": {"res_balance": [0.3]}},
        "clipping at NaN": {"init": {"clip_act": float("nan")}},
        "no blocks, by None": {"init": {"num_blocks": None}},
        "an odd filter": {"init": {"resample_filter": [1, 2, 1]}},
        "sigma_data of infinity": {"init": {"sigma_data": float("inf")}},
        "an encoder of three channels": {"content": {"encoder": encoder(3)}},
        "an encoder of NaN": {"content": {"encoder": encoder(scale=np.full(4, np.nan, "f4"))}},
        "an encoder that divides by zero": {"content": {"encoder": encoder(scale=np.zeros(4, "f4"))}},
        "an encoder of integers": {"content": {"encoder": encoder(bias=np.arange(4))}},
        "an encoder of a network": {"content": {"encoder": encoder(scale=Raw(CLASS + b")\x81"))}},
        "an encoder of a megabyte": {"content": {"encoder": encoder(scale=np.ones(2**18, "f4"))}},
        "an encoder without a name": {"content": {"encoder": encoder(vae_name=["x"])}},
    }.items()
}


def changed(net: Precond, change: Callable[[torch.Tensor], torch.Tensor]) -> Precond:
    for module in net.modules():
        for key, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[key] = None
                module._buffers[key] = change(p.detach())
    return net


# Files of n bytes that try to take far more memory or time than they should.

MB = 2**20


def get(i: int) -> bytes:
    return b"j" + struct.pack("<I", i)


def put(i: int) -> bytes:
    return b"r" + struct.pack("<I", i)


def number(i: int) -> bytes:
    return b"J" + struct.pack("<i", i)


def each(n: int, item: Callable[[int], bytes]) -> bytes:
    return b"".join(map(item, range(n)))


def again(n: int, function: bytes, *args: bytes) -> bytes:
    """One call with long arguments, again and again, by the memo."""
    return opcodes(function, put(0), values(*args), put(1), (get(0) + get(1) + b"R0") * (n // 12))


def _blob(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def _zip_of_nothing(n: int) -> bytes:
    directory = each(n // 52, lambda i: b"PK\1\2" + bytes(24) + struct.pack("<HHH", 6, 0, 0) + bytes(12) + b"%06x" % i)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 30, 0)
    return b"PK\3\4" + bytes(26) + directory + end


def _shared_members(n: int) -> bytes:
    """Many modules with one dict of many tensors."""
    few = b"}(" + each(9000, lambda i: text(f"m{i}") + b"N") + b"u" + put(99_990) + b"0"
    state = b"}" + text("_parameters") + get(99_990) + b"s" + put(99_991) + b"0" + CLASS + put(99_992) + b"0"
    many = b"}(" + each(9000, lambda i: text(f"m{i}") + get(99_992) + b")\x81" + get(99_991) + b"b") + b"u"
    return snapshot(small_net(), protocol=3, state={"_modules": Raw(few + state + many)})


def _wide(n: int) -> bytes:
    """A text that takes four bytes a letter, for one letter in it."""
    letters = min(n, 16 * MB) - 4
    one = b"X" + struct.pack("<I", letters + 4) + b"a" * letters + "\U0001f600".encode()
    return opcodes(one * max(1, n // (16 * MB)))


def _wide_network(n: int) -> bytes:
    """A network in half precision, which is not refused and grows to twice its file."""
    unet = {"model_type": "SongUNet", "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    channels = 32 * max(1, int((n / 2**18) ** 0.5))
    net = from_edm("EDMPrecond", img_resolution=4, img_channels=1, model_channels=channels, **unet)
    return snapshot(changed(net, lambda t: t.half()))


AMPLIFIERS: dict[str, Callable[[int], bytes]] = {
    "None": lambda n: opcodes("(" + "N" * n + "t"),
    "None from the memo": lambda n: opcodes("Nq\0(" + "h\0" * (n // 2) + "t"),
    "dicts": lambda n: opcodes("}" * n),
    "lists": lambda n: opcodes("]" * n),
    "sets": lambda n: opcodes("\x8f" * n),
    "frozen sets": lambda n: opcodes("(N\x91" * (n // 3)),
    "lists of one": lambda n: opcodes("]Na" * (n // 3)),
    "dicts of one": lambda n: opcodes("}NNs" * (n // 4)),
    "sets of one": lambda n: opcodes("\x8f(N\x90" * (n // 4)),
    "tuples in tuples": lambda n: opcodes(")" + "\x85" * min(n, 500_000)),
    "lists in lists": lambda n: opcodes("]" * (m := min(n // 2, 250_000)) + "a" * (m - 1)),
    "dicts in dicts": lambda n: opcodes("}" + "N}" * (m := min(n // 3, 150_000)) + "s" * m),
    "objects in objects": lambda n: opcodes(
        CLASS, put(0), b"0", (get(0) + b")\x81}N") * (m := min(n // 8, 50_000)), b"N", "sb" * m
    ),
    "marks": lambda n: opcodes("(" * n),
    "frames": lambda n: opcodes((b"\x95" + bytes(8)) * (n // 9)),
    "protocols": lambda n: opcodes("\x80\x04" * (n // 2)),
    "pops": lambda n: opcodes("N0" * (n // 2)),
    "memo": lambda n: opcodes(b"N" + each(n // 5, put)),
    "memo by itself": lambda n: opcodes("N" + "\x94" * n),
    "wide texts": lambda n: opcodes("(", (b"X\4\0\0\0" + "\U0001f600".encode()) * (n // 9), "t"),
    "a wide text": _wide,
    "numbers of 255 bytes": lambda n: opcodes("(", (b"\x8a\xff" + b"\x7f" * 255) * (n // 257), "t"),
    "floats": lambda n: opcodes("(" + "G@\x08\0\0\0\0\0\1" * (n // 9) + "t"),
    "keys that are numbers": lambda n: opcodes("}(", each(n // 6, lambda i: number(i) + b"N"), "u"),
    "keys whose hashes collide": lambda n: opcodes(
        "}(", each(n // 6, lambda i: number((i << 18) & 0x7FFFFFFF | i >> 13) + b"N"), "u"
    ),
    "keys that are texts": lambda n: opcodes("}(", each(n // 14, lambda i: text(f"{i:08x}") + b"N"), "u"),
    "keys that are bytes": lambda n: opcodes(_blob(b"k" * 999), put(0), (b"}" + get(0) + b"Ns") * (n // 8)),
    "long texts of Python 2": lambda n: opcodes("(", (b"U\xff" + b"\xe9" * 255) * (n // 257), "t"),
    "long strings of Python 2": lambda n: opcodes("(", b"T\0\0\0\0" * (n // 5), "t"),
    "keys that are equal": lambda n: opcodes(
        text("k" * 1000), put(0), text("k" * 1000), put(1), "}", get(0), "Ns", (get(1) + b"Ns") * (n // 7)
    ),
    "names": lambda n: opcodes(CLASS * (n // len(CLASS))),
    "objects": lambda n: opcodes(CLASS, put(0), (get(0) + b")\x81") * (n // 7)),
    "bytes": lambda n: opcodes("C\0" * (n // 2)),
    "sets of a long list": lambda n: again(n, name("builtins", "set"), b"](" + each(20_000, number) + b"e"),
    "bytes of a long text": lambda n: again(n, name("_codecs", "encode"), text("a" * MB), text("latin1")),
    "tensors": lambda n: again(n, name("torch._utils", "_rebuild_tensor_v2"), ONE, b"K\0", b"(K\1t", b"(K\1t"),
    "arrays": lambda n: again(n, name("numpy.core.multiarray", "_reconstruct")),
    "storages": lambda n: again(
        n, name("torch.storage", "_load_from_bytes"), _blob(legacy(FLOAT + b"K\1NtQ", tail=u64(1) + bytes(4)))
    ),
    "storages in zips": lambda n: again(
        n, name("torch.storage", "_load_from_bytes"), _blob(zipped(FLOAT + b"K\1NtQ", **{"0": bytes(4)}))
    ),
    "storages by name": lambda n: legacy(
        each(n // 64, lambda i: FLOAT.replace(text("0"), text(str(i))) + b"K\0NtQ"), keys=b"]"
    ),
    "storages of nothing": lambda n: legacy(
        FLOAT + b"K\0NtQ", keys=text("0") + put(0) + b"0](" + get(0) * (n // 13) + b"e", tail=bytes(8) * (n // 13)
    ),
    "a zip of nothing": _zip_of_nothing,
    "a storage in a zip of nothing": lambda n: opcodes(in_bytes(_zip_of_nothing(n))),
    "members that modules share": _shared_members,
    "a network in half precision": _wide_network,
    "zeros": lambda n: b"\x80\x04" + bytes(n),
}


def corpus() -> dict[str, bytes]:
    """Every attack as a file, by its name."""
    files = {f"call: {n}": opcodes(p) for n, p in CALLS.items()} | {f"bomb: {n}": opcodes(p) for n, p in BOMBS.items()}
    files |= {f"place: {n}": hide(small_net(), SYSTEM) for n, hide in PLACES.items()}
    return files | {f"network: {n}": write(small_net()) for n, write in NETWORKS.items()}


# What reading does besides reading.

_events: list[str] | None = None
_thread = 0
QUIET = {"mmap.__new__", "sys._getframe", "builtins.id"}
_hooked = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and event not in QUIET and threading.get_ident() == _thread:
        _events.append(f"{event} {args!r:.200}" if event in ("open", "import", "exec", "compile") else event)


@contextlib.contextmanager
def watched(path: Path) -> Iterator[None]:
    """Fails where the block imports, compiles, runs, opens or starts anything besides opening `path`."""
    global _events, _hooked, _thread
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
        with tempfile.TemporaryDirectory() as folder:  # torch imports parts of itself when they are first used
            net = small_net(channel_mult=[1, 1], embedding_type="fourier", label_dim=2)
            for content in (snapshot(net), snapshot2(small_edm2(channel_mult=[1, 1], label_dim=2))):
                (valid := Path(folder) / "valid.pkl").write_bytes(content)
                read_edm(valid)
    _events, _thread = (seen := []), threading.get_ident()
    try:
        yield
    finally:
        _events = None
    others = [e for e in seen if not (e.startswith("open ") and str(path) in e)]
    assert not others, others


def load(path: Path) -> tuple[Precond | None, str]:
    """The network, or what the refusal says; anything else is raised."""
    try:
        with watched(path):
            kind = format_of(path)
            return (read_edm(path)[0], "") if kind != "safetensors" else (None, "a safetensors file")
    except GddlabError as e:
        return None, str(e)


def measure(paths: list[Path]) -> list[dict[str, Any]]:
    """Seconds, peak MiB and outcome of loading each file, each in a new process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", "import sys, tests.teachers.attacks as a; a.measure_here(sys.argv[1:])"]
    done = subprocess.run([*command, *map(str, paths)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure_here(paths: list[str]) -> None:
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MiB
    with tempfile.TemporaryDirectory() as folder, watched(Path(folder)):
        pass
    for path in paths:
        if not (pid := os.fork()):
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                net, message = load(Path(path))
                end = message or f"{sum(p.numel() for p in net.parameters()) if net else 0} parameters"
            except BaseException as e:
                end = f"{type(e).__name__}: {e}"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
            sys.stdout.write(json.dumps({"s": time.perf_counter() - start, "mib": grown, "end": end}) + "\n")
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.stdout.write(json.dumps({"s": 0.0, "mib": 0.0, "end": "the process died"}) + "\n")
            sys.stdout.flush()
