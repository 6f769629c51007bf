"""What a module is, as its structure and its name say: its type, the parts of a residual block, its place in the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Anatomy", "anatomy", "follows_activation", "is_conv", "kind_of", "place", "type_of", "weight_ndim"]

_EDM_NAME = re.compile(r"(?:^|\.)(?P<stage>enc|dec)\.(?P<resolution>\d+)x\d+_(?P<rest>\w+)$")
_STAGES = {"down_blocks": "enc", "mid_block": "mid", "up_blocks": "dec"}
_LAST = {"DhariwalUNet": "out_conv", "UNet2DModel": "conv_out"}
"""Last convolutions of U-Nets, by class name as everywhere here: EDM's own networks and gddlab's have the same parts."""


class Anatomy(NamedTuple):
    """Children of a residual block.

    Attributes:
        branch: Last layer of its branch, whose output is added to the skip path.
        skip: Skip path, seen in this child's output; "" or absent: the block's input is the skip path; None: no module shows it.
        activated: Layers whose input is the output of an activation.
        attention: Last layer of its attention's branch.
        attention_base: Layer whose input that is added to.
    """

    branch: str
    skip: str | None
    activated: tuple[str, ...]
    attention: str = ""
    attention_base: str = ""


_RESNET = Anatomy("conv2", "conv_shortcut", ("conv1", "conv2"))
_ANATOMY: Mapping[str, Anatomy] = {
    "UNetBlock": Anatomy("conv1", "skip", ("conv0", "conv1"), "proj", "norm2"),
    "ResnetBlock2D": _RESNET,
    "ResnetBlockCondNorm2D": _RESNET,
    "Attention": Anatomy("to_out.0", "", ()),
}
"""Residual blocks by class name: gddlab's own, then diffusers'."""


def anatomy(module: nn.Module | None) -> Anatomy | None:
    """The parts of a residual block; None for anything else, a block of the same class name and other parts included."""
    kind = type(module).__name__
    parts = _ANATOMY.get(kind)
    if module is None or parts is None or not _has(module, parts.branch):
        return None
    if kind == "Attention" and getattr(module, "residual_connection", None) is not True:
        return None  # the sum is taken elsewhere
    if parts is not _RESNET or not _resamples(module):
        return parts
    # Branch and skip path share the resampling, so that its two outputs cannot be told apart; on the branch it precedes conv1.
    return parts._replace(skip="conv_shortcut" if _has(module, "conv_shortcut") else None, activated=("conv2",))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _resamples(module: nn.Module) -> bool:
    """In a way that changes shares and mean squares: repeating pixels, as diffusers' `Upsample2D` does here, keeps them."""
    up, down = getattr(module, "upsample", None), getattr(module, "downsample", None)
    return down is not None or (up is not None and type(up).__name__ != "Upsample2D")


def weight_ndim(module: nn.Module) -> int:
    """Dimensions of `weight`, 0 without one. A parametrized one is not computed: that would go on with spectral norm's power iteration."""
    if parametrize.is_parametrized(module, "weight"):
        inside = module.get_submodule("parametrizations.weight")
        return max(t.ndim for t in (*inside.parameters(recurse=False), *inside.buffers(recurse=False)))
    weight = getattr(module, "weight", None)
    return weight.ndim if isinstance(weight, Tensor) else 0


def is_conv(module: nn.Module) -> bool:
    """A layer with a 4-d weight: EDM's own classes and users' need not be `nn.Conv2d`; resampling has no weight."""
    return weight_ndim(module) == 4


def type_of(module: nn.Module) -> str:
    """ "block", "conv", "linear", "norm", or "" """
    if anatomy(module) is not None:
        return "block"
    if is_conv(module):
        return "conv"
    if weight_ndim(module) == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "linear"
    around_a_norm = any(map(_is_norm, module.children()))  # PreNorm and the like
    return "norm" if _is_norm(module) and not around_a_norm else ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def place(name: str) -> tuple[str, int | None]:
    """Stage and resolution that a name says, its own or its block's."""
    stage = next((s for part, s in _STAGES.items() if part in name.split(".")), "")
    while name:
        if found := _EDM_NAME.search(name):
            return found["stage"], int(found["resolution"])
        name = name.rpartition(".")[0]
    return stage, None


def kind_of(name: str) -> str:
    """Role that a name says: its last part without the resolution, "to_out" of "to_out.0"."""
    return re.sub(r"^\d+x\d+_", "", re.sub(r"(?<=[^.\d])(\.\d+)+$", "", name).rpartition(".")[2])


def follows_activation(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer's input is known to be the output of an activation; `modules` are the network's by name."""
    parent, _, leaf = name.rpartition(".")
    around = modules.get(parent)
    if (parts := anatomy(around)) is not None:
        return leaf in parts.activated
    if any(_LAST.get(c.__name__) == leaf for c in type(around).__mro__):
        return True
    beyond = type(modules.get(parent.rpartition(".")[0])).__mro__
    return leaf.endswith("_aux_conv") and any(c.__name__ == "SongUNet" for c in beyond)
