"""Networks from the pickles of EDM and its descendants (GDD, D2O, SiD), read as data by `gddlab.teachers.unpickle`."""

from __future__ import annotations

import hashlib
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.nets import Precond, from_edm
from gddlab.teachers.rebuild import find
from gddlab.teachers.torchfile import LEGACY_MAGIC, TensorData, read_torch
from gddlab.teachers.unpickle import Blob, Budget, Reader, Record, Refused

__all__ = ["read_edm", "read_pickle"]

CLASSES = {
    "EDMPrecond": "EDMPrecond",
    "VPPrecond": "VPPrecond",
    "VEPrecond": "VEPrecond",
    "iDDPMPrecond": "iDDPMPrecond",
    "GDDPrecond": "OneStepPrecond",
    "D2OPrecond": "OneStepPrecond",
}
"""Classes of networks in pickles, and ours."""
KEYS = ("ema", "net", "G_ema", "G", "model")
"""Where a file keeps its network, the best first."""
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")
LIMITS = {"num_blocks": 64, "model_channels": 8192, "M": 100_000, "img_resolution": 4096, "augment_dim": 4096}
MAX_DEPTH, MAX_TENSORS = 32, 50_000


def read_pickle(path: Path) -> Any:
    """The content of a pickle or torch file as plain containers, `Record`s and `TensorData`; nothing in it is run.

    Raises:
        GddlabError: What is wrong, and at which byte.
    """
    try:
        with path.open("rb") as f:
            view = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as e:
        raise GddlabError(f"{path} cannot be read: {e.strerror}") from None
    blob, budget = Blob(view, 0), Budget()
    try:
        if bytes(view[:2]) == b"PK":
            return read_torch(blob, budget, find=find)
        value = Reader(blob, find=find, budget=budget).read()
        return read_torch(blob, budget, find=find) if value == LEGACY_MAGIC else value
    except Refused as e:
        raise GddlabError(f"{path} is not read, {e}") from None
    except ValueError as e:
        raise GddlabError(f"{path} is not read: {e}") from None


def read_edm(path: Path) -> tuple[Precond, dict[str, Any]]:
    """A network from a pickle.

    Args:
        path: A `network-snapshot-*.pkl` with `ema`, or another pickle or torch file with a network of these classes.

    Returns:
        The network on the CPU, float32, eval mode; and what the file says: class, key, data, sha256 of the file.

    Raises:
        GddlabError: No network, an unknown class, weights that do not fit, or a pickle that cannot be read.
    """
    key, record = _network(path, content := read_pickle(path))
    kwargs = _arguments(path, record)
    tensors = _tensors(path, record)
    net = _build(path, record.cls, kwargs, tensors)
    meta: dict[str, Any] = {"original": {"file": path.name, "sha256": _sha256(path), "class": record.cls, "key": key}}
    trained_on = _trained_on(content)
    if trained_on:
        meta["original"]["data"] = trained_on
    return net, meta


def _network(path: Path, content: Any) -> tuple[str, Record]:
    if isinstance(content, Record):
        return "", content
    if not isinstance(content, dict):
        raise GddlabError(f"{path} holds a {type(content).__name__}, no network: give a network-snapshot .pkl of EDM")
    for key in KEYS:
        if isinstance(content.get(key), Record):
            return key, content[key]
    held = ", ".join(str(k)[:30] for k in list(content)[:8]) or "nothing"
    raise GddlabError(f"{path} holds no network under {', '.join(KEYS)}: it holds {held}")


def _arguments(path: Path, record: Record) -> dict[str, Any]:
    """Constructor arguments that `from_edm` takes, all of them small."""
    if record.cls not in CLASSES:
        raise GddlabError(
            f"{path} holds a network of class {record.cls[:60]!r}; accepted are {', '.join(CLASSES)}"
        )
    if len(record.args) > len(POSITIONAL):
        raise GddlabError(f"{path}: {len(record.args)} positional arguments of {record.cls}; known are {POSITIONAL}")
    kwargs = dict(zip(POSITIONAL, record.args, strict=False)) | record.kwargs
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_data"):  # attributes say what defaults were
        if name in record.state and name not in kwargs:
            kwargs[name] = record.state[name]
    unet = (record.state.get("_modules") or {}).get("model")
    if isinstance(unet, Record):
        kwargs["model_type"] = unet.cls
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}
    for name, value in kwargs.items():
        for v in value if isinstance(value, list) and len(value) <= 16 else [value]:
            plain = v is None or (isinstance(v, str) and len(v) < 100) or (isinstance(v, (int, float)) and abs(v) <= 1e6)
            infinite = isinstance(v, float) and math.isinf(v)
            if not (plain or infinite) or (name in LIMITS and not (isinstance(v, int) and v <= LIMITS[name])):
                shown = v if isinstance(v, (int, float, str)) else type(v).__name__
                raise GddlabError(f"{path}: {record.cls} has {name[:40]}={str(shown)[:40]}, which no network has")
    return {k: v for k, v in kwargs.items() if not (isinstance(v, float) and math.isinf(v))}


def _tensors(path: Path, record: Record) -> dict[str, TensorData]:
    """State dict of a module that was never made."""
    out: dict[str, TensorData] = {}
    todo, seen = [("", record, 0)], set()
    while todo:
        prefix, module, depth = todo.pop()
        if id(module) in seen or depth > MAX_DEPTH:
            raise GddlabError(f"{path}: module {prefix[:60]!r} holds itself or is nested too deep: no network")
        seen.add(id(module))
        transient = module.state.get("_non_persistent_buffers_set") or ()
        for kind, wanted in (("_parameters", TensorData), ("_buffers", TensorData), ("_modules", Record)):
            members = module.state.get(kind) or {}
            if not isinstance(members, dict) or len(out) + len(members) + len(todo) > MAX_TENSORS:
                raise GddlabError(f"{path}: {prefix[:60]}{kind} is no dict, or too large: no network")
            for name, member in members.items():
                if member is None or (kind == "_buffers" and name in transient):
                    continue
                full = f"{prefix}{name}"
                if not isinstance(member, wanted) or len(full) > 500:
                    raise GddlabError(f"{path}: {full[:80]} is a {type(member).__name__}, no {wanted.__name__}")
                if isinstance(member, Record):
                    todo.append((f"{full}.", member, depth + 1))
                else:
                    out[full] = member
    return out


def _build(path: Path, cls: str, kwargs: dict[str, Any], tensors: dict[str, TensorData]) -> Precond:
    try:
        with torch.device("meta"):
            net = from_edm(CLASSES[cls], **kwargs)
    except GddlabError as e:
        raise GddlabError(f"{path}: {e}") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as e:
        raise GddlabError(f"{path}: no {cls} can be built from its arguments ({str(e).splitlines()[0][:120]})") from None
    expected = net.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise GddlabError(f"{path}: {len(missing)} tensors of {cls} are missing, {missing[0]!r} the first")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise GddlabError(f"{path}: {len(extra)} tensors that {cls} does not have, {extra[0][:80]!r} the first")
    for name, t in expected.items():
        if tuple(t.shape) != tensors[name].size:
            raise GddlabError(f"{path}: {name} is {tensors[name].size}, where the architecture has {tuple(t.shape)}")
        if not tensors[name].storage.dtype.is_floating_point:
            raise GddlabError(f"{path}: {name} is of {tensors[name].storage.dtype}, no floating point numbers")
    if sum(tensors[n].nbytes for n in expected) > path.stat().st_size:
        raise GddlabError(f"{path}: its weights are larger than the file, tensors share their bytes: no network")
    try:
        state: dict[str, Tensor] = {n: tensors[n].tensor().float() for n in expected}
    except ValueError as e:
        raise GddlabError(f"{path}: {e}") from None
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def _trained_on(content: Any) -> str | None:
    """The data set that the file names, without its folder."""
    for key in ("training_set_kwargs", "dataset_kwargs"):
        about = content.get(key) if isinstance(content, dict) else None
        if isinstance(about, dict) and isinstance(about.get("path"), str):
            return str(about["path"]).replace("\\", "/").rstrip("/").rpartition("/")[2][:120]
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
