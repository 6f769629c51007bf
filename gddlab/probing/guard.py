"""Runs a network for a measurement: in eval mode, on a device, eagerly; restores it, and refuses or warns."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, warn
from gddlab.nets.bare import check_weights, device_of, is_offloaded
from gddlab.runtime import switched
from gddlab.sampling.samplers import precision


@contextlib.contextmanager
def as_it_was(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Iterator[torch.device]:
    """Eval mode, autocast to `dtype`, on `device`, which is yielded; afterwards modes and device are as before.

    None as device or dtype leaves the network where it is, in its own precision, also where the caller has autocast on.
    A network that accelerate or diffusers offloads runs where its hooks bring it.

    Raises:
        GddlabError: A device that cannot be used, or any for a network that is offloaded; a network without weights.
    """
    check_weights(model)
    origin = device_of(model)
    if device is not None and str(device) != str(origin) and is_offloaded(model):
        raise GddlabError(f"device={str(device)!r}: this network is offloaded and runs on {origin}, omit device=")
    target = origin if device is None else _device(device)
    name = precision(dtype)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        if target != origin:
            model.to(target)
        with torch.autocast(target.type, getattr(torch, name), enabled=name != "float32"):
            yield target
    finally:
        if target != origin:
            model.to(origin)
        for module, mode in modes.items():
            module.training = mode


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0].rstrip(".")
        raise GddlabError(f"device={str(name)!r} cannot be used here ({reason}): give another, such as cpu") from None
    if device.type == "meta":  # which holds no values: a network that goes there loses its weights
        raise GddlabError(f"device={str(name)!r} holds no values: give another, such as cpu")
    return device


@contextlib.contextmanager
def differentiable(model: nn.Module, wanted: Collection[Tensor] = ()) -> Iterator[None]:
    """Gradients of the parameters `wanted` and no others, also where the caller has switched gradients off.

    Raises:
        GddlabError: Weights that were made in inference mode, which have no gradient.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    if any(p.is_inference() for p in flags):
        raise GddlabError("this network was loaded in torch.inference_mode(): load it outside, gradients are needed")
    chosen = set(wanted)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for p in flags:
                p.requires_grad_(p in chosen)
            yield
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Runs a compiled network, or its compiled parts, as Python: compiled code does not call hooks added later.

    The compiler's stance belongs to the process, so other compiled networks run as Python inside, too.
    """
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of it is."""
    return any(_is_compiled(m) for m in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile` of it or of its functions; found without importing the compiler, which takes a second."""
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    functions = (module.forward, getattr(module, "denoise", None))
    return any(hasattr(f, "_torchdynamo_orig_callable") for f in functions)


def check_seen(x: Any, name: str, side: str, *, again: bool, rows: int | None, why: str) -> None:
    """Refuses what a hook sees of a layer: no tensor, a second time in one pass, or another number of rows."""
    if not isinstance(x, Tensor):
        raise GddlabError(f"the {side} of layer {name!r} is a {type(x).__name__}, no tensor: leave it out of layers=")
    if again:
        raise GddlabError(f"layer {name!r} ran twice in one pass: call the network once, or leave it out of layers=")
    if rows is not None and (x.ndim == 0 or len(x) != rows):
        raise GddlabError(f"the {side} of layer {name!r} is {tuple(x.shape)}, but {why}")


def check_ran(absent: Collection[str]) -> None:
    """Refuses layers that did not run in a pass."""
    for name in absent:
        raise GddlabError(f"layer {name!r} did not run in this pass: leave it out of layers=")


def exactly(device: torch.device) -> contextlib.ExitStack:
    """Without gradients, autocast and matrix products in TF32 or bfloat16, which the user may allow in the network.

    A context that costs nothing where none of them is on.
    """
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    if backend.matmul.fp32_precision not in ("none", "ieee"):
        stack.enter_context(switched("fp32_precision", "ieee", backend.matmul))
    return stack


def warn_nonfinite(nonfinite: Sequence[dict[str, Any]], what: str = "values") -> None:
    """Warns, at the user's line, of what was not finite: layer, side, sigma of each."""
    if not nonfinite:
        return
    where = ", ".join(f"{b['layer']} ({b['side']}) at sigma {b['sigma']:g}" for b in nonfinite[:3])
    warn(f"{what} are not finite in {len(nonfinite)} places: {where}", RuntimeWarning)
