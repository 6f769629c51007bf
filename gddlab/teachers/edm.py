"""Networks from pickles of EDM, EDM2 and EDM's descendants (GDD, D2O, SiD), and from weights alone; nothing is run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gddlab.errors import GddlabError
from gddlab.files import data_dir, file_sha256, hash_json
from gddlab.nets import Precond, from_edm, load_network
from gddlab.nets.architectures import ARCHITECTURES
from gddlab.nets.io import make_student, refusal
from gddlab.nets.precond import SIGMA_DATA
from gddlab.nets.unets import UNETS
from gddlab.pickles import Array, Record, Refused, a, printable
from gddlab.teachers import dit
from gddlab.teachers.torchfiles import TensorData, load_pickle

CLASSES = {
    "EDMPrecond": "EDMPrecond",
    "VPPrecond": "VPPrecond",
    "VEPrecond": "VEPrecond",
    "iDDPMPrecond": "iDDPMPrecond",
    "GDDPrecond": "OneStepPrecond",
    "D2OPrecond": "OneStepPrecond",
    "OneStepPrecond": "OneStepPrecond",
    "DiTPrecond": "DiTPrecond",
    "Precond": "EDM2Precond",
    "EDM2Precond": "EDM2Precond",
}
"""Classes of networks in pickles, and ours."""
KEYS = ("ema", "net", "G_ema", "G", "model")
"""Where a file may keep its network, the preferred one first."""
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_IN_ALL = ("model.map_layer0.weight", "model.pos_embed", "unet.emb_noise.weight")
"""Parameters of which all networks here have one."""
MAX_DEPTH, MAX_TENSORS = 32, 10_000


def read_pickle(path: Path) -> Any:
    """The content of a pickle or torch file as plain containers, `Record`s and `TensorData`; nothing in it is run.

    Raises:
        GddlabError: What is wrong, and at which byte.
    """
    with _refusals(path):
        return load_pickle(path)


def read_edm(path: Path, *, family: str | None = None, heads: int | None = None) -> tuple[Precond, dict[str, Any]]:
    """A network from a `network-snapshot-*.pkl`, or another pickle or torch file with a network of these classes.

    Weights alone, a state dict, are taken where names and shapes fit one network that gddlab knows, and no other; or
    where they are a DiT's or SiT's: `family` and `heads` are for these, as for `load_teacher`.

    Returns:
        The network on the CPU, float32, eval mode; and what the file says: `original` (class, key, data, sha256 of the
        file) and, where it tells, `training` (how noise levels were drawn) and `codec` (that of `TeacherCard`).

    Raises:
        GddlabError: No network, an unknown class, weights that do not fit, or a pickle that cannot be read.
    """
    with _refusals(path):
        content = load_pickle(path)
        key, weights = _weights_alone(content)
        if dit.is_transformer(weights):
            args = content.get("args")
            record, kwargs, weights = dit.recognise(path, weights, args, family=family, heads=heads)
        elif family or heads:
            raise GddlabError(printable(f"{path} is no .pt file of a DiT or SiT: omit family and heads"))
        elif weights:
            key, record, kwargs = _recognised(weights, path)
        else:
            key, record = _network(content)
            kwargs, weights = _arguments(record), tensors_of(record)
        net = _build(record, kwargs, weights, path.stat().st_size)
        about = {"training": _levels(content), "codec": _codec(content, net)}
        sha256 = file_sha256(path)
    original = {"file": path.name, "sha256": sha256, "class": record.cls, "key": key}
    if trained_on := _trained_on(content):
        original["data"] = trained_on
    return net, {"original": original} | {k: v for k, v in about.items() if v}


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Every refusal is one line that names the file and the byte."""
    try:
        yield
    except Refused as e:
        raise GddlabError(printable(f"{path} is refused at {e}")) from None
    except OSError as e:
        raise GddlabError(printable(f"{path} cannot be read: {e.strerror or e}")) from None


def _network(content: Any) -> tuple[str, Record]:
    """The network's key in the file, "" where the file is the network, and the network."""
    if isinstance(content, Record):
        return "", content
    if not isinstance(content, dict):
        raise Refused(0, f"{a(content)}, no network: give a network-snapshot .pkl of EDM")
    for key in KEYS:
        if isinstance(content.get(key), Record):
            return key, content[key]
    held = ", ".join(str(k)[:30] for k in list(content)[:8]) or "nothing"
    raise Refused(0, f"it holds no network under {', '.join(KEYS)}; it holds {held}")


def _weights_alone(content: Any) -> tuple[str, dict[str, TensorData]]:
    """The tensors of a state dict and its key, "" at the top of a file; {} where there is none."""
    keys = (*KEYS, "state_dict") if isinstance(content, dict) else ()
    for key in ("", *keys):
        state = content.get(key) if key else content
        if isinstance(state, dict) and state and all(isinstance(t, TensorData) for t in state.values()):
            return key, {str(name): t for name, t in state.items()}
    return "", {}


def _recognised(weights: dict[str, TensorData], path: Path) -> tuple[str, Record, dict[str, Any]]:
    """Key, class and arguments of the network that a state dict fits; dropout, which they do not tell, may differ."""
    shapes = {name: t.size for name, t in weights.items()}
    fitting: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (precond, kwargs) in _known() if any(name in shapes for name in _IN_ALL) else ():
        with torch.device("meta"):
            net = from_edm(precond, **kwargs)
            nets = {name: net} | ({f"a student of {name}": make_student(net)} if precond == "EDMPrecond" else {})
        for title, known in nets.items():
            if {key: tuple(t.shape) for key, t in known.state_dict().items()} == shapes:
                fitting[title] = type(known).__name__, known.init_kwargs
    if len({(cls, hash_json(kw | {"dropout": 0})) for cls, kw in fitting.values()}) == 1:
        cls, kwargs = next(iter(fitting.values()))
        return "", Record(cls), kwargs
    alone = f"{path} holds weights alone, {len(weights)} tensors, {next(iter(weights))[:60]} the first"
    if fitting:
        titles = " and ".join(list(fitting)[:4])
        give = "net.load_state_dict them into the one that it is, and write it with gddlab.nets.save_network"
        raise GddlabError(printable(f"{alone}, which fit {titles} alike: {give}"))
    give = "give an EDM .pkl, or a .safetensors file that gddlab wrote; gddlab.wrap probes any network in memory"
    raise GddlabError(printable(f"{alone}, of no network that gddlab knows: {give}"))


def _known() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Names, classes and arguments of the published and the bundled networks."""
    yield from ARCHITECTURES.items()
    for path in sorted((data_dir() / "teachers").glob("*/teacher.safetensors")):
        net, _ = load_network(path)
        yield path.parent.name, (type(net).__name__, net.init_kwargs)


def _arguments(record: Record) -> dict[str, Any]:
    """Constructor arguments that `from_edm` takes, all of them small."""
    if record.cls not in CLASSES:
        raise Refused(record.at, f"a network of class {record.cls[:60]!r}; accepted are {', '.join(CLASSES)}")
    if len(record.args) > len(POSITIONAL):
        accepted = ", ".join(POSITIONAL)
        raise Refused(record.at, f"{record.cls} with {len(record.args)} positional arguments; accepted are {accepted}")
    kwargs = dict(zip(POSITIONAL, record.args, strict=False)) | record.kwargs
    if isinstance(own := record.state.get("init_kwargs"), dict):  # one of ours, pickled
        kwargs |= own
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_data"):  # attributes say what defaults were
        if name in record.state and name not in kwargs:
            kwargs[name] = record.state[name]
    unet = _members(record, "_modules").get("model")
    if isinstance(unet, Record) and unet.cls in UNETS:
        kwargs["model_type"] = unet.cls
    kwargs.pop("use_fp16", None)
    if kwargs.get("sigma_max") == math.inf:  # the default, and no number in JSON
        del kwargs["sigma_max"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}


def _members(module: Record, kind: str) -> dict[Any, Any]:
    members = module.state.get(kind)
    if members is not None and not isinstance(members, dict):
        raise Refused(module.at, f"{kind} of a module is {a(members)}: no network")
    return members or {}


def tensors_of(record: Record) -> dict[str, TensorData]:
    """The state dict of a module's record."""
    out: dict[str, TensorData] = {}
    todo, seen, visited = [("", record, 0)], set(), 0
    while todo:
        prefix, module, depth = todo.pop()
        if id(module) in seen or depth > MAX_DEPTH:
            raise Refused(module.at, f"the module {prefix[:60]!r} is there twice, or nested too deep: no network")
        seen.add(id(module))
        transient = module.state.get("_non_persistent_buffers_set")
        for kind, wanted in (("_parameters", TensorData), ("_buffers", TensorData), ("_modules", Record)):
            members = _members(module, kind)
            visited += len(members)
            if visited > MAX_TENSORS:
                raise Refused(module.at, f"more than {MAX_TENSORS:,} tensors and modules: no network")
            for name, member in members.items():
                if member is None or (kind == "_buffers" and isinstance(transient, set) and name in transient):
                    continue
                full = f"{prefix}{name}"
                if not isinstance(name, str) or len(full) > 500:
                    raise Refused(module.at, f"{full[:80]} is no name of a tensor or module")
                if not isinstance(member, wanted):
                    what = "tensor" if wanted is TensorData else "module"
                    raise Refused(module.at, f"{full[:80]} is {a(member)}, no {what}")
                if isinstance(member, Record):
                    todo.append((f"{full}.", member, depth + 1))
                else:
                    out[full] = member
    return out


def _build(record: Record, kwargs: dict[str, Any], tensors: dict[str, TensorData], size: int) -> Precond:
    """The network; nothing is allocated before everything that the file announces has been found in it."""
    cls, at = record.cls, record.at
    if reason := refusal(kwargs, len(tensors)):
        raise Refused(at, f"{cls} has {reason}")
    try:
        with torch.device("meta"):
            net = from_edm(CLASSES[cls], **kwargs)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as e:
        raise Refused(at, f"{cls} cannot be built from its arguments: {str(e).splitlines()[0][:200]}") from None
    if not 0 <= net.sigma_min < net.sigma_max:
        raise Refused(at, f"{cls} with sigma from {net.sigma_min} to {net.sigma_max}: no noise levels")
    expected = net.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise Refused(at, f"{cls} lacks {len(missing)} of its tensors, {missing[0]} the first")
    if extra := sorted(tensors.keys() - expected.keys()):
        what = f"{len(extra)} tensors that {cls} of these arguments does not have"
        raise Refused(at, f"{what}, {extra[0][:80]} the first")
    for name, t in expected.items():
        if tuple(t.shape) != tensors[name].size:
            raise Refused(tensors[name].at, f"{name} is {tensors[name].size}, where {cls} has {tuple(t.shape)}")
        if not tensors[name].storage.dtype.is_floating_point:
            raise Refused(tensors[name].at, f"{name} is {tensors[name].storage.dtype}, no floating point numbers")
    if sum(tensors[n].nbytes for n in expected) > size:
        raise Refused(at, "weights larger than the file: tensors share their bytes")
    state = {}
    for name in expected:
        try:
            weights = tensors[name].view().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        except (ValueError, RuntimeError) as e:
            raise Refused(tensors[name].at, f"{name}: {str(e).splitlines()[0][:200]}") from None
        if not math.isfinite(weights.sum()):
            raise Refused(tensors[name].at, f"{name} holds numbers that are not finite")
        state[name] = weights
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def _trained_on(content: Any) -> str | None:
    """The data set that the file names, without its folder."""
    for key in ("training_set_kwargs", "dataset_kwargs"):
        about = content.get(key) if isinstance(content, dict) else None
        if isinstance(about, dict) and isinstance(about.get("path"), str):
            return printable(about["path"][-1000:].replace("\\", "/").rstrip("/").rpartition("/")[2][:120])
    return None


def _levels(content: Any) -> dict[str, float]:
    """Mean and deviation of ln sigma in training, as the file's loss holds them; {} where these are no numbers."""
    loss = content.get("loss_fn") if isinstance(content, dict) else None
    held: dict[str, Any] = loss.state if isinstance(loss, Record) else {}
    found = [held.get(key) for key in ("P_mean", "P_std")]
    plain = [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= 1e6]
    return {"p_mean": plain[0], "p_std": plain[1]} if len(plain) == 2 else {}


def _codec(content: Any, net: Precond) -> dict[str, Any] | None:
    """How images became the latents that a network of EDM2 denoises, as `TeacherCard.codec`; None for one of pixels."""
    encoder = content.get("encoder") if isinstance(content, dict) else None
    if not isinstance(encoder, Record) or encoder.cls == "StandardRGBEncoder":
        return None
    if encoder.cls != "StabilityVAEEncoder":
        return {"class": printable(encoder.cls[:60])}
    state, scale, bias = encoder.state, *(_numbers(encoder, key, net.img_channels) for key in ("scale", "bias"))
    if not all(s > 0 for s in scale):
        raise Refused(encoder.at, f"the scale of its {encoder.cls} is {scale}: no positive numbers")
    if not isinstance(name := state.get("vae_name"), str):
        raise Refused(encoder.at, f"its {encoder.cls} names no VAE")
    final = getattr(net, "sigma_data", SIGMA_DATA)
    return {
        "vae": printable(name[:120]),
        "factor": 8,
        "range": [0, 1],
        "mean": [float(f"{(0.0 - b) / s:.6g}") for s, b in zip(scale, bias, strict=True)],
        "std": [float(f"{final / s:.6g}") for s in scale],
        "final_std": final,
    }


def _numbers(record: Record, key: str, n: int) -> list[float]:
    """An array of `n` finite numbers in an object's state."""
    held = record.state.get(key)
    value = held.value if isinstance(held, Array) else None
    if value is None or value.shape != (n,) or value.dtype.kind != "f" or not all(map(math.isfinite, value.tolist())):
        what = a(held) if value is None else f"an array of shape {value.shape}"
        raise Refused(record.at, f"the {key} of its {record.cls} is {what}: no {n} finite numbers, one per channel")
    return [float(v) for v in value.tolist()]
