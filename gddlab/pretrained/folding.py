"""Folds BatchNorm into the convolutions before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-4
"""Largest difference that folding may make to an output, relative to the output's largest value."""


class _Trace(TorchDispatchMode):
    """Records which convolution feeds which BatchNorm from the data flow; names and order of modules do not tell.

    `pairs` holds the ids of the convolution's weight and of the normalisation's running mean. A convolution whose
    output has a second reader, or a module that is used twice, cannot be folded: `uses` counts the readers of each
    convolution's output, `calls` the uses of each weight or running mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, int]] = {}  # holds the outputs, so that no id is given twice
        self.pairs: list[tuple[int, int, Tensor]] = []
        self.uses: Counter[int] = Counter()
        self.calls: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        self.uses.update(id(a) for a in flat if isinstance(a, Tensor) and id(a) in self.made)
        name = func._schema.name.removeprefix("aten::")
        if name == "convolution":
            self.made[id(out)] = (out, id(args[1]))
            self.calls[id(args[1])] += 1
        elif "batch_norm" in name and isinstance(args[3], Tensor):
            self.calls[id(args[3])] += 1
            if id(args[0]) in self.made:
                y, weight = self.made[id(args[0])]
                self.pairs.append((weight, id(args[3]), y))
        return out


def probe_image(size: int, *, like: Tensor) -> Tensor:
    """The same noise each time, (1, 3, size, size), in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, size, size, generator=generator).to(device=like.device, dtype=like.dtype)


@torch.no_grad()
def fold_batchnorm(
    net: nn.Module, probe: Tensor, *, run: Callable[[Tensor], Tensor | Sequence[Tensor]] | None = None
) -> nn.Module:
    """Folds each eval-mode BatchNorm into the convolution that alone feeds it, in place; its activation stays.

    Outputs are equal up to float32 rounding, with fewer passes over memory. A BatchNorm with any other input (a sum, a
    concatenation, a convolution whose output has a second reader) is kept. `probe` is images (B, 3, H, W) for `run`, by
    default `net`: the outputs before and after are compared, and if they differ by more than 1e-4 of the largest value,
    everything is restored. `net` must be in eval mode, and is returned.
    """
    norms = {id(m.running_mean): m for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    if not norms:
        return net
    run = run or net
    convs = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d)}
    with _Trace() as trace:
        before = _list(run(probe))
    undo = []
    for weight, mean, y in trace.pairs:
        conv, norm = convs.get(weight), norms.get(mean)
        alone = trace.uses[id(y)] == trace.calls[weight] == trace.calls[mean] == 1 and all(o is not y for o in before)
        if conv is None or norm is None or not alone or norm._forward_hooks or conv._forward_hooks:
            continue
        undo.append(_fold(net, conv, norm))
    after = _list(run(probe))
    if not all(
        (a - b).abs().max() <= TOLERANCE * a.abs().max().clamp_min(1e-30) for a, b in zip(before, after, strict=True)
    ):
        for put_back in reversed(undo):
            put_back()
    return net


def _list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _fold(net: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[], None]:
    """Folds one pair; returns what undoes it."""
    assert norm.running_mean is not None and norm.running_var is not None
    wide = [None if t is None else t.double() for t in (conv.bias, norm.weight, norm.bias)]
    bias, gamma, beta = wide
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if gamma is None else gamma * scale
    shift = -norm.running_mean.double() if bias is None else bias - norm.running_mean.double()
    shift = shift * scale if beta is None else shift * scale + beta
    old, dtype = (conv.weight, conv.bias), conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    act = getattr(norm, "act", None)  # timm's BatchNormAct2d; its dropout is off in eval mode
    instead = (act if isinstance(act, nn.Module) else nn.Identity()).eval()
    places = [(m, name) for m in net.modules() for name, child in m.named_children() if child is norm]
    for parent, name in places:
        setattr(parent, name, instead)

    def put_back() -> None:
        conv.weight, conv.bias = old
        for parent, name in places:
            setattr(parent, name, norm)

    return put_back
