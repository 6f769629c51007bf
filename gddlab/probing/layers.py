"""Which layers there are in a network, what is known about each, and how they are named in a call."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gddlab.errors import GddlabError, unknown

__all__ = [
    "PRESETS",
    "Anatomy",
    "Layer",
    "LayerSelection",
    "anatomy",
    "denoiser_of",
    "follows_activation",
    "inventory",
    "is_conv",
    "kind_of",
    "match_layers",
    "named_layers",
    "owner_of",
    "parameter_table",
    "place",
    "plain_name",
    "select_layers",
    "type_of",
    "unwrap",
    "weight_ndim",
]

_WRAPPERS = {"OptimizedModule": "_orig_mod", "AveragedModel": "module"}
"""Where torch's wrappers hold the network; by class name, since the compiler takes a second to import."""


def plain_name(name: str) -> str:
    """A parameter's or module's name without what `gddlab.wrap`, DistributedDataParallel and torch.compile put in."""
    while name.startswith(("module.", "_orig_mod.", "gddlab_bare.")):
        name = name.partition(".")[2]
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def owner_of(parameter: str) -> str:
    """Name of the layer that a parameter belongs to: of the convolution itself, where its weight is parametrized."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0]


def denoiser_of(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile: called as `model(x, sigma, labels)`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        elif type(model).__name__ in _WRAPPERS:
            inner = getattr(model, _WRAPPERS[type(model).__name__])
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def unwrap(model: nn.Module) -> nn.Module:
    """The bare network, inside `gddlab.wrap` too: it names layers and parameters."""
    while True:
        model = denoiser_of(model)
        inner = getattr(model, "gddlab_bare", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the bare network by plain name, in its order; the root is "".

    Raises:
        GddlabError: Two modules have one plain name.
    """
    out: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        if type(module).__name__ != "OptimizedModule":  # its `_orig_mod` follows under the same plain name
            plain = plain_name(name)
            if plain in out:
                raise GddlabError(f"two modules are called {plain!r}, one of them {name!r}: rename an attribute")
            out[plain] = module
    return out


def parameter_table(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters in the order of the network, without `map_augment`, which a student drops."""
    named: list[tuple[str, Tensor]] = [(plain_name(name), p) for name, p in unwrap(model).named_parameters()]
    return tuple((name, tuple(p.shape)) for name, p in named if "map_augment" not in name.split("."))


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


LayerSelection = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A preset ("conv", "block", "attention", "norm", "linear", "all"), a name, a glob, "re:" and a pattern, a list of these, or a
function of name and module."""

PRESETS = ("conv", "block", "attention", "norm", "linear", "all")

_ATTENTION = {"qkv": ("qkv", "proj", "proj_out"), "to_q": ("to_q", "to_k", "to_v", "to_out.0")}
"""Projections of self-attention that lie beside one of that name."""


@dataclass(frozen=True)
class Layer:
    """A module that can be probed or frozen.

    Attributes:
        name: Its `named_modules()` path in the bare network, verbatim.
        block: Path of the residual block that it lies in (or is); "" outside of blocks.
        kind: Its role: "conv0", "conv1", "skip", "qkv", "proj", "block", "aux_conv" and so on: the last part of its name
            without the resolution.
        stage: "enc", "mid" or "dec"; "" where the name does not say.
        resolution: Nominal resolution in its name, pixels; where the name does not say, that of its output when it was probed; None
            before that, or without pixels.
        depth: Number of convolutions before it, in the order of `named_modules()`.
        n_params: Parameters, its own and its children's.
        type: "block", "conv" (a 4-d weight), "linear", "norm", or "" for anything else.
        activated_input: True where its input is known to be the output of an activation: the convolutions of a residual block
            of gddlab or diffusers, but for one behind its resampling, and the last convolution of a U-Net of theirs. False for
            anything else, known or not.
    """

    name: str
    block: str
    kind: str
    stage: str
    resolution: int | None
    depth: int
    n_params: int
    type: str
    activated_input: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _middle_first(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    names = list(modules)
    middle = [n for n in names if n.split(".")[0] == "mid_block"]
    up = next((i for i, n in enumerate(names) if n.split(".")[0] == "up_blocks"), None)
    if up is None or not middle:
        return modules
    rest = [n for n in names if n not in set(middle)]
    up = rest.index(names[up])
    return {n: modules[n] for n in (*rest[:up], *middle, *rest[up:])}


def inventory(model: nn.Module) -> dict[str, Layer]:
    """Every module of the bare network by name, in the order of `named_modules()`, without the root and the inside of
    parametrizations; the middle of a diffusers network, which lists it last, stands before its decoder, as it runs."""
    modules = _middle_first(_modules(model))
    blocks = [n for n, m in modules.items() if anatomy(m) is not None]
    out: dict[str, Layer] = {}
    depth = 0
    for name, module in modules.items():
        if name:
            stage, resolution = place(name)
            kind = type_of(module)
            out[name] = Layer(
                name=name,
                block=_block_of(name, blocks),
                kind="block" if kind == "block" else kind_of(name),
                stage=stage,
                resolution=resolution,
                depth=depth,
                n_params=sum(p.numel() for p in module.parameters()),
                type=kind,
                activated_input=follows_activation(name, modules),
            )
        depth += is_conv(module)
    return out


def select_layers(model: nn.Module, layers: LayerSelection) -> list[Layer]:
    """The layers that `layers` names, in the order of the network.

    Raises:
        GddlabError: Nothing matches, or one name or glob of a list does not.
    """
    modules = {n: m for n, m in _modules(model).items() if n}
    types = {n: type_of(m) for n, m in modules.items()}
    if isinstance(layers, str):
        chosen = match_layers(layers, types)
    elif callable(layers):
        chosen = {n for n, m in modules.items() if layers(n, m)}
        if not chosen:
            raise GddlabError(f"layers={layers!r} accepts none of {len(modules)} modules: return True for some")
    elif isinstance(layers, Iterable):
        chosen = {n for item in layers for n in match_layers(item, types)}
        if not chosen:
            raise GddlabError(f"layers is an empty list: give names, a glob, or one of {', '.join(PRESETS)}")
    else:
        raise GddlabError(
            f"layers={layers!r}: give a name, a glob, 're:...', a list, a function, or one of {', '.join(PRESETS)}"
        )
    return [layer for name, layer in inventory(model).items() if name in chosen]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in named_layers(model).items() if "parametrizations" not in n.split(".")}


def _preset(name: str, types: Mapping[str, str]) -> set[str]:
    """ "attention" is the projections of self-attention; "all" is every convolution, linear layer, norm and block. The embedding of EDM's augmentation
    labels is in none: it runs only while a teacher is trained."""
    if name != "attention":
        chosen = {n for n, kind in types.items() if kind and name in (kind, "all")}
        return {n for n in chosen if "map_augment" not in n.split(".")}
    found = set()
    for n in types:
        parent, dot, leaf = n.rpartition(".")
        found |= {parent + dot + beside for beside in _ATTENTION.get(leaf, ())}
    return {n for n in found if types.get(n) in ("conv", "linear", "")}  # "": a convolution over tokens, say


def match_layers(pattern: object, types: Mapping[str, str], what: str = "layers") -> set[str]:
    """Names that one preset, name, glob or "re:..." means.

    Args:
        pattern: What the user gave.
        types: `Layer.type` of each name that there is.
        what: The user's argument, for errors.

    Raises:
        GddlabError: Nothing matches, near matches are given; or it is no string.
    """
    if not isinstance(pattern, str):
        raise GddlabError(f"{what}: {pattern!r} is no name of a layer; give strings, names or globs")
    if pattern in PRESETS:
        found = _preset(pattern, types)
        if not found:
            raise GddlabError(f"{what}={pattern!r}: this network has none; give names or globs instead")
        return found
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as e:
            raise GddlabError(f"{what}={pattern!r} is no regular expression ({e})") from None
        found = {n for n in types if regex.search(n)}
    else:
        plain = plain_name(pattern)  # as a wrapped network's own named_modules() gives it
        found = {n for n in types if n == plain or fnmatch.fnmatchcase(n, plain)}
    if not found:
        raise unknown("layer", pattern, [*types, *PRESETS])
    return found


def _block_of(name: str, blocks: Iterable[str]) -> str:
    return max((b for b in blocks if name == b or name.startswith(b + ".")), key=len, default="")
