"""The layers of a network: what they are called, what is known of each, and how a call selects them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pydantic import SkipValidation
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gddlab.errors import GddlabError, check_takes, shown, unknown
from gddlab.nets.bare import denoiser_of as denoiser_of
from gddlab.nets.bare import unwrap as unwrap
from gddlab.nets.unets import TARGET_LAYERS

# Names: those of the bare network, whatever is wrapped around it or compiled.


def plain_name(name: str) -> str:
    """A name without the prefixes of `gddlab.wrap`, DistributedDataParallel and torch.compile."""
    while name.startswith(("module.", "_orig_mod.", "gddlab_bare.")):
        name = name.partition(".")[2]
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def owner_of(parameter: str) -> str:
    """Name of the layer that holds a parameter; of a parametrized weight, the convolution itself."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the bare network by plain name, in its order; the root is ""."""
    out: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        if type(module).__name__ != "OptimizedModule":  # its `_orig_mod` follows under the same plain name
            plain = plain_name(name)
            if plain in out:
                raise GddlabError(f"two modules are called {plain!r}, one of them {name!r}: rename an attribute")
            out[plain] = module
    return out


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module and its children, by plain name."""
    return {plain_name(name): t for name, t in (*module.named_parameters(), *module.named_buffers())}


def parameter_table(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters in the order of the network, without `map_augment`, which a student drops."""
    named: list[tuple[str, Tensor]] = [(plain_name(name), p) for name, p in unwrap(model).named_parameters()]
    return tuple((name, tuple(p.shape)) for name, p in named if "map_augment" not in name.split("."))


def difference(ours: Mapping[str, object], theirs: Mapping[str, object], words: tuple[str, str]) -> str:
    """The first tensor that two tables of names and shapes do not share; `words` name the two. "" if equal."""
    for name in (*ours, *theirs):
        a, b = (str(table.get(name, "missing")) for table in (ours, theirs))
        if a != b:
            return f"{name!r} is {a} in the {words[0]}, {b} in the {words[1]}"
    return ""


def check_architecture(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], words: tuple[str, str] = ("student", "teacher")
) -> None:
    """Refuses two networks' tensors that differ in name or shape; `words` name the two.

    What students drop (`map_augment`) or add (`map_target0`, `map_target1`) does not count.
    """
    own = {"map_augment", *TARGET_LAYERS}
    ours, theirs = (
        {k: tuple(t.shape) for k, t in tensors.items() if own.isdisjoint(k.split("."))}
        for tensors in (student, teacher)
    )
    if where := difference(ours, theirs, words):
        raise GddlabError(f"{where}: give two networks of the same architecture")


# What a module is.


class Anatomy(NamedTuple):
    """Children of a residual block.

    Attributes:
        branch: Last layer of its branch, whose output is added to the skip path.
        skip: Skip path, seen in this child's output. "" or absent: the skip path is the block's input. None: no module
            shows it.
        activated: Layers whose input is the output of an activation.
        attention: Last layer of its attention's branch.
        attention_base: Layer whose input the attention is added to.
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
"""Residual blocks by class name: those of gddlab and EDM, then those of diffusers."""

_LAST = {"DhariwalUNet": "out_conv", "UNet2DModel": "conv_out"}
"""Last convolutions of U-Nets, by class name."""


def anatomy(module: nn.Module | None) -> Anatomy | None:
    """The parts of a residual block; None for anything else, also for a class of the same name with other parts."""
    kind = type(module).__name__
    parts = _ANATOMY.get(kind)
    if module is None or parts is None or not _has(module, parts.branch):
        return None
    if kind == "Attention" and getattr(module, "residual_connection", None) is not True:
        return None  # the sum is taken elsewhere
    if parts is not _RESNET or not _resamples(module):
        return parts
    # One resampling serves branch and skip path, so its two outputs cannot be separated; conv1 follows it.
    return parts._replace(skip="conv_shortcut" if _has(module, "conv_shortcut") else None, activated=("conv2",))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _resamples(module: nn.Module) -> bool:
    """Whether shares and mean squares change; diffusers' `Upsample2D` repeats pixels here, which keeps them."""
    up, down = getattr(module, "upsample", None), getattr(module, "downsample", None)
    return down is not None or (up is not None and type(up).__name__ != "Upsample2D")


def is_conv(module: nn.Module) -> bool:
    """A layer with a 4-d weight, of whatever class; resampling has no weight."""
    return _weight_ndim(module) == 4


def _weight_ndim(module: nn.Module) -> int:
    """Dimensions of `weight`, 0 without one. A parametrized weight is not computed: spectral norm would iterate."""
    if parametrize.is_parametrized(module, "weight"):
        inside = module.get_submodule("parametrizations.weight")
        return max(t.ndim for t in (*inside.parameters(recurse=False), *inside.buffers(recurse=False)))
    weight = getattr(module, "weight", None)
    return weight.ndim if isinstance(weight, Tensor) else 0


def type_of(module: nn.Module) -> str:
    """ "block", "conv", "linear", "norm", or "" """
    if anatomy(module) is not None:
        return "block"
    if is_conv(module):
        return "conv"
    if _weight_ndim(module) == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "linear"
    around_a_norm = any(map(_is_norm, module.children()))  # PreNorm and the like
    return "norm" if _is_norm(module) and not around_a_norm else ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


# What a name says.

_EDM_NAME = re.compile(r"(?:^|\.)(?P<stage>enc|dec)\.(?P<resolution>\d+)x\d+_(?P<rest>\w+)$")
_STAGES = {"down_blocks": "enc", "mid_block": "mid", "up_blocks": "dec"}


def stage_and_resolution(name: str) -> tuple[str, int | None]:
    """Stage ("enc", "mid", "dec" or "") and resolution in a layer's name or in that of its block."""
    stage = next((s for part, s in _STAGES.items() if part in name.split(".")), "")
    while name:
        if found := _EDM_NAME.search(name):
            return found["stage"], int(found["resolution"])
        name = name.rpartition(".")[0]
    return stage, None


def kind_of(name: str) -> str:
    """Role of a layer: the last part of its name without resolution or number, "to_out" of "to_out.0"."""
    return re.sub(r"^\d+x\d+_", "", re.sub(r"(?<=[^.\d])(\.\d+)+$", "", name).rpartition(".")[2])


# All of it, by layer.


@dataclass(frozen=True)
class Layer:
    """A module that can be probed or frozen.

    Attributes:
        name: Its `named_modules()` path in the bare network, verbatim.
        block: Path of the residual block that holds it (or that it is); "" outside of blocks.
        kind: Its role: "conv0", "conv1", "skip", "qkv", "proj", "block", "aux_conv" and so on: the last part of its
            name without the resolution.
        stage: "enc", "mid" or "dec"; "" where the name does not say.
        resolution: Resolution in its name, pixels; else that of its output when it was probed; None where neither is
            known.
        depth: Number of convolutions before it, in the order of `named_modules()`.
        n_params: Parameters, its own and its children's.
        type: "block", "conv" (a 4-d weight), "linear", "norm", or "" for anything else.
        activated_input: True where its input is known to be the output of an activation: convolutions in the residual
            blocks of gddlab and diffusers, except one behind its resampling, and the last convolution of their U-Nets.
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


def inventory(model: nn.Module) -> dict[str, Layer]:
    """Every module of the bare network by name, in its order, without the root and the inside of parametrizations.

    The middle of a diffusers network precedes its decoder, as it runs, although `named_modules()` lists it last.
    """
    modules = {n: m for n, m in named_layers(model).items() if "parametrizations" not in n.split(".")}
    modules = _middle_first(modules)
    blocks = [n for n, m in modules.items() if anatomy(m) is not None]
    out: dict[str, Layer] = {}
    depth = 0
    for name, module in modules.items():
        if name:
            stage, resolution = stage_and_resolution(name)
            kind = type_of(module)
            out[name] = Layer(
                name=name,
                block=max((b for b in blocks if f"{name}.".startswith(f"{b}.")), key=len, default=""),
                kind="block" if kind == "block" else kind_of(name),
                stage=stage,
                resolution=resolution,
                depth=depth,
                n_params=sum(p.numel() for p in module.parameters()),
                type=kind,
                activated_input=_follows_activation(name, modules),
            )
        depth += is_conv(module)
    return out


def _middle_first(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The names under "mid_block" moved before the first under "up_blocks"."""
    middle = [n for n in modules if n.split(".")[0] == "mid_block"]
    rest = [n for n in modules if n.split(".")[0] != "mid_block"]
    up = next((i for i, n in enumerate(rest) if n.split(".")[0] == "up_blocks"), None)
    if up is None:
        return modules
    return {n: modules[n] for n in (*rest[:up], *middle, *rest[up:])}


def _follows_activation(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer's input is known to be the output of an activation."""
    parent, _, leaf = name.rpartition(".")
    around = modules.get(parent)
    if (parts := anatomy(around)) is not None:
        return leaf in parts.activated
    if any(_LAST.get(c.__name__) == leaf for c in type(around).__mro__):
        return True
    beyond = type(modules.get(parent.rpartition(".")[0])).__mro__
    return leaf.endswith("_aux_conv") and any(c.__name__ == "SongUNet" for c in beyond)


# Selection.

LayerSelection = SkipValidation[str | Iterable[str] | Callable[[str, nn.Module], bool]]
"""A preset ("conv", "block", "attention", "norm", "linear", "all"), a name, a glob, "re:" and a pattern, a list of
these, or a function of name and module."""

_NO_FORWARD: Any = nn.Module.forward
"""Of containers, such as `nn.ModuleList`."""
PRESETS = ("conv", "block", "attention", "norm", "linear", "all")

_ATTENTION = {"qkv": ("qkv", "proj", "proj_out"), "to_q": ("to_q", "to_k", "to_v", "to_out.0")}
"""Projections of self-attention, found beside a layer of this name."""


def select_layers(model: nn.Module, layers: LayerSelection, *, run: bool = False) -> list[Layer]:
    """The layers that `layers` names, in the order of the network.

    Args:
        model: The network.
        layers: See `LayerSelection`.
        run: Whether they have to run: a container, which does not, means the layers inside.

    Raises:
        GddlabError: Nothing matches, or one name or glob of a list does not.
    """
    known, modules = inventory(model), named_layers(model)
    if callable(layers):
        if isinstance(layers, nn.Module | type):
            raise GddlabError(
                f"layers={shown(layers)}: give names, globs, or a function such as lambda name, module: "
                "isinstance(module, torch.nn.Conv2d)"
            )
        check_takes("layers", layers, "name", "module")
        chosen = {n for n in known if layers(n, modules[n])}
        if not chosen:
            raise GddlabError(f"layers={shown(layers)} accepts none of {len(known)} modules: return True for some")
    else:
        chosen = match_layers(layers, {n: layer.type for n, layer in known.items()})
    if run:
        containers = {n for n in chosen if type(modules[n]).forward is _NO_FORWARD}
        inside = {n for n in known if known[n].type and any(n.startswith(f"{c}.") for c in containers)}
        if containers and not (chosen := chosen - containers | inside):
            raise GddlabError(f"{containers.pop()!r} holds no layer: give names, globs, or one of {', '.join(PRESETS)}")
    return [layer for name, layer in known.items() if name in chosen]


def match_layers(selection: object, types: Mapping[str, str], what: str = "layers") -> set[str]:
    """The names in `types`, {name: `Layer.type`}, that a preset, name, glob, "re:..." or a list of these means.

    `what` is the argument's name. An item that matches nothing is refused, with near matches.
    """
    if not isinstance(selection, Iterable):
        raise GddlabError(
            f"{what}={shown(selection)}: give a name, a glob, 're:...', a list of these, or one of {', '.join(PRESETS)}"
        )
    items = [selection] if isinstance(selection, str) else list(selection)
    if not items:
        raise GddlabError(f"{what} is an empty list: give names, a glob, or one of {', '.join(PRESETS)}")
    return {n for item in items for n in _matches(item, types, what)}


def _matches(pattern: object, types: Mapping[str, str], what: str) -> set[str]:
    if not isinstance(pattern, str):
        raise GddlabError(f"{what}: {shown(pattern)} is no name of a layer; give strings, names or globs")
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
        plain = plain_name(pattern)  # a wrapped network's own named_modules() gives it with prefixes
        found = {n for n in types if n == plain or fnmatch.fnmatchcase(n, plain)}
    if not found:
        raise unknown("layer", pattern, [*types, *PRESETS])
    return found


def _preset(name: str, types: Mapping[str, str]) -> set[str]:
    """All of a type; "attention": the projections of self-attention; "all": convolutions, linear layers, norms, blocks.

    Without the embedding of EDM's augmentation labels, which runs only while a teacher is trained.
    """
    if name != "attention":
        chosen = {n for n, kind in types.items() if kind and name in (kind, "all")}
        return {n for n in chosen if "map_augment" not in n.split(".")}
    found = set()
    for n in types:
        parent, dot, leaf = n.rpartition(".")
        found |= {parent + dot + beside for beside in _ATTENTION.get(leaf, ())}
    return {n for n in found if types.get(n) in ("conv", "linear", "")}  # "": a convolution over tokens, for example
