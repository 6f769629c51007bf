"""Networks from class names and arguments, from safetensors files, and as students of a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import atomic_path, path_of
from gddlab.nets.dit import DiTPrecond
from gddlab.nets.edm2 import EDM2Precond
from gddlab.nets.precond import EDMPrecond, OneStepPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond
from gddlab.nets.unets import UNet

COUNTS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 256),
    "label_dim": (0, 100_000),
    "augment_dim": (0, 4096),
    "model_channels": (1, 8192),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (1, 64),
    "M": (1, 100_000),
    "patch_size": (1, 64),
    "num_heads": (1, 1024),
    "channels_per_head": (1, 8192),
    "logvar_channels": (1, 8192),
}
NUMBERS = {"sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2", "eps", "sigma_g"}
NUMBERS |= {"dropout", "label_dropout"}
NUMBERS |= {"label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act"}
LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 4096), "resample_filter": (0, 4096), "mid_sigmas": (0, 4096)}
FLAGS = {"target_time", "learn_sigma"}
OPTIONAL = {"channel_mult_emb", "channel_mult_noise", "clip_act"}
NAMES = {"model_type", "embedding_type", "encoder_type", "decoder_type", "kind"}


def refusal(kwargs: dict[Any, Any], tensors: int) -> str | None:
    """What is wrong with the constructor arguments of a network with this many tensors; None if nothing is."""
    for name, value in kwargs.items():
        if (accepted := _accepted(name, value)) is not None:
            shown = repr(value[:40]) if isinstance(value, str) else value
            shown = shown if isinstance(shown, (int, float, str)) else f"<{type(value).__name__}>"
            return f"{str(name)[:40]}={str(shown)[:42]}: {accepted}"
    blocks, levels = kwargs.get("num_blocks", 1), len(kwargs.get("channel_mult", [1]))
    if 8 * blocks * levels > tensors:  # at least four tensors per block, up and down
        return f"{blocks} blocks in {levels} levels, but only {tensors} tensors"
    return None


def _accepted(name: Any, value: Any) -> str | None:
    """What an argument may be, if `value` is not."""
    if value is None and name in OPTIONAL:
        return None
    if name in COUNTS:
        low, high = COUNTS[name]
        return None if type(value) is int and low <= value <= high else f"accepted are whole numbers, {low} to {high:,}"
    if name in NUMBERS:
        return None if type(value) in (int, float) and abs(value) <= 1e6 else "accepted are numbers, up to 1e6"
    if name in LISTS:
        low, high = LISTS[name]
        short = isinstance(value, (list, tuple)) and len(value) <= 16 and (value or name == "attn_resolutions")
        if short and all(type(v) in (int, float) and low <= v <= high for v in value):
            return None
        return f"accepted are lists of 1 to 16 numbers, {low} to {high:,}"
    if name in FLAGS:
        return None if type(value) is bool else "accepted are true and false"
    if name in NAMES:
        return None if isinstance(value, str) and len(value) < 100 else "accepted is a short text"
    return "no network of EDM has this argument"


PRECONDS: dict[str, type[Precond]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
    "OneStepPrecond": OneStepPrecond,
    "DiTPrecond": DiTPrecond,
    "EDM2Precond": EDM2Precond,
    "Precond": EDM2Precond,
}
"""Classes by name; "Precond" is what EDM2's authors call theirs."""


def from_edm(class_name: str, **init_kwargs: Any) -> Precond:
    """Builds a network from the class name and keyword arguments found in an EDM pickle.

    Args:
        class_name: "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond" or "OneStepPrecond", which EDM's pickles
            name; "EDM2Precond", which EDM2's call "Precond"; or "DiTPrecond".
        **init_kwargs: As in the pickle; `use_fp16` is accepted and has no meaning here (autocast decides).

    Returns:
        The network with fresh parameters; its state-dict keys equal the reference's.

    Raises:
        GddlabError: Unknown class, U-Net or argument.
    """
    if class_name not in PRECONDS:
        raise unknown("network class", class_name, PRECONDS)
    kwargs = {k: v for k, v in init_kwargs.items() if k != "use_fp16"}
    try:
        net = PRECONDS[class_name](**kwargs)
    except TypeError as e:
        raise GddlabError(f"{class_name} cannot be built from {sorted(kwargs)}: {e}") from None
    net.init_kwargs = kwargs
    return net


FORMAT = "gddlab-network-1"
TARGET = "model.map_target"
"""How the names of tensors begin that a student has for its target time."""


def architecture(net: Precond) -> dict[str, Any]:
    """Class name and keyword arguments from which `from_edm` builds `net` again."""
    return {"precond": type(net).__name__, "init_kwargs": net.init_kwargs}


State = Mapping[str, torch.Tensor]


def save_network(
    net: Precond, path: str | Path, *, half: bool = False, beside: tuple[str, State] | None = None, **meta: Any
) -> None:
    """Writes weights and architecture atomically; `meta` is JSON and comes back from `load_network`.

    Args:
        net, path: The network, and the .safetensors file.
        half: Rounds the weights to float16, for a file of half the size.
        beside: The name of another network, and its tensors: those that `net` has too are not written, and
            `load_network` must be given them. A student is as large as what was trained.
        **meta: JSON.

    Raises:
        GddlabError: A network that `load_network` could not build again, such as an ideal denoiser.
    """
    from safetensors.torch import save_file

    if (kind := type(net).__name__) not in PRECONDS:
        raise GddlabError(f"{kind} has no file format: accepted are {', '.join(PRECONDS)}")
    header = {"format": FORMAT, **architecture(net), "meta": meta}
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    if beside is not None:
        header["rest"], theirs = beside
        tensors = {k: v for k, v in tensors.items() if k not in theirs or not torch.equal(v, theirs[k].cpu())}
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata={k: json.dumps(v, allow_nan=False) for k, v in header.items()})


def load_network(path: str | Path, *, beside: Callable[[str], State] | None = None) -> tuple[Precond, dict[str, Any]]:
    """Reads a file written by `save_network`; weights in half precision become float32.

    Args:
        path: The .safetensors file.
        beside: Gives the tensors of the network that was `beside` it, by its name.

    Returns:
        The network in eval mode on the CPU, and the metadata given when it was saved.

    Raises:
        NotFound: No such file.
        GddlabError: Not a safetensors file of gddlab, or its weights do not fit its architecture; one that holds what
            differs from another network, without `beside`.
    """
    from safetensors import SafetensorError, safe_open

    path = path_of("path", path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as f:
            about = f.metadata() or {}
            if about.get("format") != json.dumps(FORMAT):  # those of other libraries are no JSON
                raise GddlabError(f"{path} does not say its architecture: give a .safetensors file that gddlab wrote")
            header = {k: json.loads(v) for k, v in about.items()}
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
            state = {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}
    except (SafetensorError, json.JSONDecodeError, RecursionError) as e:
        raise GddlabError(f"{path} is not a whole safetensors file ({e})") from None
    precond, kwargs, meta = (header.get(k) for k in ("precond", "init_kwargs", "meta"))
    others: State = {}
    if (rest := header.get("rest")) is not None:
        if beside is None or not isinstance(rest, str):
            raise GddlabError(f"{path} holds what differs from {str(rest)[:40]!r} alone: load it with its run")
        others = beside(rest)
    if not (isinstance(precond, str) and isinstance(kwargs, dict) and isinstance(meta, dict)):
        raise GddlabError(f"{path}: its metadata lacks precond, init_kwargs or meta: give a file that gddlab wrote")
    if reason := refusal(kwargs, len(state.keys() | others.keys())):
        raise GddlabError(f"{path}: {precond[:40]!r} has {reason}")
    try:
        with torch.device("meta"):
            net = from_edm(precond, **kwargs)
    except (ValueError, RuntimeError, ArithmeticError, LookupError) as e:
        raise GddlabError(f"{path}: {precond[:40]!r} cannot be built: {str(e).splitlines()[0]}") from None
    state = {k: others[k] for k in net.state_dict() if k in others} | state
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as e:
        raise GddlabError(f"{path}: weights do not fit {precond}: {str(e).splitlines()[-1].strip()}") from None
    return net.eval(), meta


def without_labels(net: Precond) -> Precond:
    """The unconditional network that a conditional U-Net is where it is given no label.

    That is worth something where labels were dropped in its training (Ho & Salimans 2022). The bias of the layer that
    embeds labels, which is there without one too, moves into the next layer's.

    Raises:
        GddlabError: The network has no labels, or is no U-Net of EDM.
    """
    if not (isinstance(net.model, UNet) and net.label_dim):
        kind = "unconditional" if isinstance(net.model, UNet) else f"a {type(net.model).__name__}"
        raise GddlabError(f"this network is {kind}: give a conditional U-Net of EDM")
    kwargs = {k: v for k, v in net.init_kwargs.items() if k not in ("label_dim", "label_dropout")}
    state = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("model.map_label.")}
    assert net.model.map_label is not None
    if (bias := net.model.map_label.bias) is not None:
        after = net.model.map_layer0
        moved = after.bias.double() + after.weight.double() @ bias.double()
        state["model.map_layer0.bias"] = moved.to(after.bias.dtype)
    with torch.device("meta"):
        own = from_edm(type(net).__name__, **kwargs)
    own.load_state_dict(state, assign=True)
    return own.train(net.training)


@torch.no_grad()
def without_target(student: OneStepPrecond) -> OneStepPrecond:
    """The student that takes no target time, and makes the same images as one that does.

    Images are made with the target eps, so that what its embedding adds is a constant, which moves into a bias. The
    result is a copy; a student without a target time is returned as it is.
    """
    if not getattr(student, "target_time", False):
        return student
    assert isinstance(student.model, UNet)
    eps = torch.full((1, 1, 1, 1), student.eps, dtype=torch.float64)
    level = student.coefficients(eps).c_noise.to(next(student.parameters()))
    state = {k: v.clone() for k, v in student.state_dict().items() if not k.startswith(TARGET)}
    state["model.map_layer1.bias"] += student.model.embed_target(level.flatten())[0]
    with torch.device("meta"):
        own = from_edm(type(student).__name__, **{k: v for k, v in student.init_kwargs.items() if k != "target_time"})
    own.load_state_dict(state, assign=True)
    assert isinstance(own, OneStepPrecond)
    return own.train(student.training)


INITS = ("teacher", "scratch", "shuffled")
"""Where a student's weights come from."""


def make_student(
    teacher: Precond, *, target_time: bool = False, mid_sigmas: Sequence[float] = (), init: str = "teacher"
) -> OneStepPrecond:
    """A one-step generator with the teacher's weights (method of GDD, section 2 of its paper).

    The augmentation embedding is dropped, dropout is 0. A freeze mask made for the teacher fits. `target_time` and
    `mid_sigmas` are those of `OneStepPrecond`; a target time changes nothing at first. As controls, `init` "scratch"
    gives new weights, "shuffled" each tensor of the teacher in random order, both by torch's global generator.

    Raises:
        GddlabError: The teacher's preconditioning is not EDM's, so that a student could not use its noise embedding;
            `mid_sigmas` do not descend; an unknown `init`.
    """
    if not isinstance(teacher, EDMPrecond):
        raise GddlabError(f"a {type(teacher).__name__} teacher has no one-step student: give an EDMPrecond network")
    if init not in INITS:
        raise unknown("init", init, INITS)
    dropped = ("augment_dim", "eps", "sigma_g", "target_time", "mid_sigmas")
    kwargs: dict[str, Any] = {k: v for k, v in teacher.init_kwargs.items() if k not in dropped}
    kwargs |= {"dropout": 0.0, "model_type": type(teacher.model).__name__}
    if target_time:
        kwargs["target_time"] = True
    if mid_sigmas:
        kwargs["mid_sigmas"] = list(mid_sigmas)
    student = from_edm("OneStepPrecond", **kwargs)
    assert isinstance(student, OneStepPrecond)
    if init != "scratch":
        own = {k: v for k, v in student.state_dict().items() if k.startswith(TARGET)}
        dropped_weights = ("model.map_augment.", TARGET)
        given = {k: v for k, v in teacher.state_dict().items() if not k.startswith(dropped_weights)}
        if init == "shuffled":
            trained = dict(teacher.named_parameters())
            given = {
                k: v.flatten()[torch.randperm(v.numel())].reshape(v.shape) if k in trained else v
                for k, v in given.items()
            }
        student.load_state_dict(own | given, strict=True)
    return student
