"""The layers of a network: what they are called, what is known of each, and how a call selects them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from pydantic import SkipValidation
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gddlab.errors import GddlabError, check_takes, shown, unknown
from gddlab.nets.bare import unwrap
from gddlab.nets.unets import TARGET_LAYERS

# Names: those of the bare network, whatever is wrapped around it or compiled.

_ADAPTERS = ("lora_", "hada_", "lokr_", "ia3_", "oft_", "boft_", "vera_", "hra_", "vblora_", "randlora_", "fourierft_")
"""How the names begin that PEFT gives its own parameters."""
_PREFIXES = ("module.", "_orig_mod.", "gddlab_bare.", "base_model.model.")


def plain_name(name: str) -> str:
    """A name without what `gddlab.wrap`, DistributedDataParallel, torch.compile and PEFT add to it."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    name = name.replace("_orig_mod.", "")
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name.removesuffix("._orig_mod"))


def is_adapter(name: str) -> bool:
    """Whether a module or parameter is one of PEFT's, beside the layer that it changes: LoRA's and the like."""
    return any(part.startswith(_ADAPTERS) for part in name.split("."))


def owner_of(parameter: str) -> str:
    """Name of the layer that holds a parameter; of a parametrized weight, the convolution itself."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the bare network by plain name, in its order; the root is ""."""
    out: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        # `_orig_mod` of an OptimizedModule follows under the same plain name; `base_layer` is seen in what is around it
        if type(module).__name__ != "OptimizedModule" and not name.endswith(".base_layer"):
            plain = plain_name(name)
            if plain in out:
                raise GddlabError(f"two modules are called {plain!r}, one of them {name!r}: rename an attribute")
            out[plain] = module
    return out


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module and its children, by plain name."""
    return {plain_name(name): t for name, t in (*module.named_parameters(), *module.named_buffers())}


def parameter_table(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters in the order of the network.

    Without `map_augment`, which a student drops, and LoRA's matrices, which are trained whatever is frozen.
    """
    named: list[tuple[str, Tensor]] = [(plain_name(name), p) for name, p in unwrap(model).named_parameters()]
    own = [(name, p) for name, p in named if "map_augment" not in name.split(".") and not is_adapter(name)]
    return tuple((name, tuple(p.shape)) for name, p in own)


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
    "Block": Anatomy("conv_res1", "conv_skip", ("conv_res0", "conv_res1"), "attn_proj", "attn_qkv"),
}
"""Residual blocks by class name: those of gddlab and EDM, those of diffusers, that of EDM2."""

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
    if kind == "Block":  # in the encoder both paths start behind a norm; in the decoder upsampling repeats pixels
        return parts._replace(skip="norm") if _has(module, "norm") else parts
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
    weight = getattr(getattr(module, "base_layer", module), "weight", None)  # PEFT's layers hold the one they change
    return weight.ndim if isinstance(weight, Tensor) else 0


def type_of(module: nn.Module) -> str:
    """ "block" (residual, or of a transformer), "conv", "linear", "norm", or "" """
    if anatomy(module) is not None or (type(module).__name__ in _PARTS and _mixes(module)):
        return "block"
    if is_conv(module):
        return "conv"
    if _weight_ndim(module) == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "linear"
    around_a_norm = any(map(_is_norm, module.children()))  # PreNorm and the like
    return "norm" if _is_norm(module) and not around_a_norm else ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


# Transformer blocks, whose parts read from streams of tokens and add to them.


class Point(NamedTuple):
    """Where the residual stream of a transformer block can be read.

    Attributes:
        part: What was added to the stream since the point before: "attn", "cross" (attention to the context), "mlp", or
            "all" where parts are added as one sum or are not known. "" at the block's input.
        module: Path inside the block; "" for the block itself.
        side: Whether the stream is the module's input or output.
        stream: "image" or "context".
    """

    part: str
    module: str
    side: Literal["input", "output"]
    stream: str


_Between = tuple[tuple[str, str], ...]
"""Points between input and output of a block: what was added, and the module whose input is the stream then."""

_TWO_NORMS: _Between = (("attn", "norm2"),)
_PLAIN: Mapping[str, _Between] = {"image": _TWO_NORMS}
_JOINT: Mapping[str, _Between] = {"image": _TWO_NORMS, "context": (("attn", "norm2_context"),)}

_PARTS: Mapping[str, Mapping[str, _Between]] = {
    **dict.fromkeys(("DiTBlock", "SiTBlock"), _PLAIN),
    "BasicTransformerBlock": {"image": ()},  # see _between
    "SanaTransformerBlock": {"image": (("attn", "attn2"), ("cross", "norm2"))},
    **dict.fromkeys(("JointTransformerBlock", "FluxTransformerBlock"), _JOINT),
    **dict.fromkeys(("ChromaTransformerBlock", "Flux2TransformerBlock"), _JOINT),
    "QwenImageTransformerBlock": {"image": (("attn", "img_norm2"),), "context": (("attn", "txt_norm2"),)},
    "FluxSingleTransformerBlock": {"image": (), "context": ()},
    "AuraFlowJointTransformerBlock": {"image": (), "context": ()},  # its attention is added through the MLP alone
}
"""Transformer blocks by class name, those of DiT and SiT, then those of diffusers: streams, and points inside."""

_SINGLE_BLOCKS = ("FluxSingleTransformerBlock", "ChromaSingleTransformerBlock")

_TUPLES: Mapping[str, tuple[str, ...]] = {
    **{kind: ("context", "image") for kind, streams in _PARTS.items() if "context" in streams},
    **dict.fromkeys(("CogView3PlusTransformerBlock", "CogView4TransformerBlock"), ("image", "context")),
}


def streams_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parts of a tuple output, in its order: "image" and "context"; () for what returns one tensor.

    A joint attention returns the image first, most of the blocks around it the context.
    """
    kind = type(module).__name__
    if "Attention" in kind and getattr(module, "added_kv_proj_dim", None) is not None:
        return ("image", "context")
    return _TUPLES.get(kind, ())


def points_of(module: nn.Module) -> list[Point]:
    """Points of a transformer block's residual streams, stream by stream in the order of the block; [] for all else.

    The difference of two points is what the part in between has added, gates included.
    """
    if not _mixes(module) or anatomy(module) is not None:
        return []
    kind = type(module).__name__
    streams = _PARTS.get(kind) or dict.fromkeys(("image", *streams_of(module)), _NOTHING)
    out = []
    for stream, between in streams.items():
        between = _between(module) if kind == "BasicTransformerBlock" else between
        if not all(_has(module, place) for _, place in between):
            if stream == "context":  # in a last block it ends in the attention
                continue
            between = ()
        out.append(Point("", "", "input", stream))
        out += [Point(part, place, "input", stream) for part, place in between]
        out.append(Point("mlp" if between else "all", "", "output", stream))
    return out


_NOTHING: _Between = ()


def holds_both(block: nn.Module) -> bool:
    """Whether a transformer block holds the tokens of both streams in one tensor, context first."""
    return type(block).__name__ in _SINGLE_BLOCKS


def branches_in(block: nn.Module) -> list[str]:
    """Children of a transformer block whose outputs are added to its streams."""
    if holds_both(block):
        return ["proj_out"]
    names = ("attn", "attn1", "attn2", "ff", "ff_context", "mlp") if points_of(block) else ()
    return [name for name in names if _has(block, name)]


def _between(block: nn.Module) -> _Between:
    """Of diffusers' `BasicTransformerBlock`, where the names of norms depend on their kind."""
    single = getattr(block, "norm_type", "") == "ada_norm_single"
    last = "norm2" if single else "norm3"
    first = "cross" if getattr(block, "only_cross_attention", False) else "attn"
    second = "attn" if getattr(block, "double_self_attention", False) else "cross"
    if first == second or not _has(block, "attn2"):
        return ((first, last),)
    return ((first, "attn2" if single else "norm2"), (second, last))


def _mixes(module: nn.Module) -> bool:
    """Whether attention and an MLP are inside, as in every transformer block."""
    roles = {role_of(plain_name(name)) for name, _ in module.named_modules() if name}
    return "mlp" in roles and any(role.startswith("attn.") for role in roles)


def transformer_blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the transformer blocks among a network's modules, in its order.

    They are known by class, or by the classes that a network of diffusers names as its repeated blocks. Where there are
    none of these, they are the members of lists, all of one class, that hold attention and an MLP; the innermost ones.
    """
    listed = {
        str(kind)
        for module in modules.values()
        for attribute in ("_no_split_modules", "_repeated_blocks")
        for kind in getattr(module, attribute, None) or ()
    }
    known = {kind for kind in listed if kind.endswith("Block")} | _PARTS.keys()
    found = [n for n, m in modules.items() if n and type(m).__name__ in known and anatomy(m) is None and _mixes(m)]
    if found:
        return found
    members: set[int] = set()
    for module in modules.values():
        inside = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len({type(m) for m in inside}) == 1 and all(map(_mixes, inside)):
            members |= {id(m) for m in inside}
    found = [n for n, m in modules.items() if id(m) in members]
    return [n for n in found if not any(other.startswith(f"{n}.") for other in found)]


# What a layer is there for.

ROLES = (
    *("res.conv", "resample", "attn.qkv", "attn.out", "attn.io", "mlp"),
    *("modulation", "norm", "skip", "embed", "ends", "gain"),
)
"""Roles of layers and parameters: convolutions of residual blocks, and between resolutions; projections into attention,
out of it, and around a transformer inside a U-Net; MLPs; what scales, shifts and gates by noise level and class; norms;
projections on a skip path; embeddings of image, noise level, class and text; first and last layers; gains."""


def _patterns(**of_role: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((role.replace("_", "."), re.compile(p, re.IGNORECASE)) for role, p in of_role.items())


_NAMES = _patterns(
    gain=r"(?:^|\.|_)gain$|(?:^|\.)(?:gamma_?\d?|ls\d?|layer_?scale_?\d?)$",
    modulation=r"(?:^|\.)(?:affine|time_emb_proj|emb_linear|emb_layers\.\d+|scale_shift_(?:table|factor)|proj_out_1"
    r"|\w*norm\w*\.linear(?:_1)?|time_embed\.linear"
    r"|(?:\w*(?:ada_?ln|modulation)\w*|(?:img|txt)_mod)(?:\.\d+|\.lin\w*)?)$",
    norm=r"[^.]*norm[^.]*$|(?:^|\.)ln(?:_\w+|\d)?$",
    embed=r"(?:^|\.)(?:[^.]*embed[^.]*|emb|emb_\w+|label_emb|map_\w+|caption_projection|encoder_hid_\w+|time_step_proj"
    r"|\w+_tokens?|(?:img|txt|time|vector|guidance|context)_in|distilled_guidance_layer)(?:\.|$)",
    attn_qkv=r"(?:^|\.)(?:to_(?:q|k|v|qkv|kv|added_qkv)(?:_\w+)?|add_[qkv]_proj|(?:attn_)?qkv|[qkv]_proj"
    r"|query|key|value|\w*attn\w*\.[qkv]|in_proj_(?:weight|bias))$",
    attn_out=r"(?:^|\.)(?:to_out(?:\.\d+)?|to_add_out|attn_proj|proj_attn|\d+x\d+_\w+\.proj"
    r"|\w*(?:attn|attention)\w*\.(?:proj|proj_out|out|o|out_proj|c_proj|o_proj))$",
    mlp=r"(?:^|\.)(?:\w+_)?(?:ff|ffn|mlp|feed_?forward)(?:_\w+)?\.|(?:^|\.)(?:proj_mlp|fc[12])$"
    r"|transformer_blocks\.\d+\.proj_out$|single_blocks\.\d+\.linear\d$",
    attn_io=r"(?:attentions|motion_modules)\.\d+\.proj_(?:in|out)$",
    skip=r"(?:^|\.)(?:skip|skip_(?:connection|linear)|(?:conv_|nin_)?shortcut|conv_skip)$",
    resample=r"(?:^|\.)(?:up|down)sample(?:rs?)?\.(?:\d+\.)?\w+$",
    res_conv=r"\.conv(?:_res)?\d$|(?:^|\.)(?:in|out)_layers\.\d+$",
    ends=r"(?:^|\.)(?:conv_in|conv_out|out_conv|logvar_\w+|proj_in|proj_out(?:_2)?|norm_out\.linear_2"
    r"|\w*final_layer\.(?:[^.]+\.)?linear|\d+x\d+_(?:conv|aux_\w+))$",
)
"""What a path says, tried in this order: embeddings hold MLPs, and norms what modulates them."""

_CLASSES = _patterns(
    embed=r"embed",
    modulation=r"ada(?:ptive)?_?(?:ln|layer_?norm|group_?norm|norm)|modulat",
    mlp=r"feed_?forward|mlp|[gr]eglu|swiglu",
    attn=r"^(?!.*(?:block|transformer|net)).*(?:attention|attn)",
    resample=r"(?:up|down)sample",
    res_conv=r"res(?:net|idual)?_?block|unetblock",
)
"""What the class of a module says, or of one around it, where its path says nothing."""


def role_of(name: str, modules: Mapping[str, nn.Module] | None = None) -> str:
    """What a layer or a parameter is there for, one of `ROLES`; "" where neither path nor classes say.

    Args:
        name: Plain name of a module; or of a parameter, where that of its module says nothing (`pos_embed`).
        modules: Modules of the network, for their classes.
    """
    role = next((role for role, pattern in _NAMES if pattern.search(name)), "")
    if role or modules is None or name not in modules:
        return role
    module = modules[name]
    if _is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embed"
    around = name
    while around:
        kind = type(modules[around]).__name__ if around in modules else ""
        role = next((role for role, pattern in _CLASSES if pattern.search(kind)), "")
        if role == "attn":
            return "attn.out" if re.search(r"out|proj$", name[len(around) :]) else "attn.qkv"
        if role:  # the only linear layers of a residual block scale and shift
            return "modulation" if role == "res.conv" and not is_conv(module) else role
        around = around.rpartition(".")[0]
    return ""


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
    """What a layer is called: the last part of its name without resolution or number, "to_out" of "to_out.0"."""
    return re.sub(r"^\d+x\d+_", "", re.sub(r"(?<=[^.\d])(\.\d+)+$", "", name).rpartition(".")[2])


# All of it, by layer.


@dataclass(frozen=True)
class Layer:
    """A module that can be probed or frozen.

    Attributes:
        name: Its `named_modules()` path in the bare network, verbatim.
        block: Path of the innermost block, residual or of a transformer, that holds it (or that it is); "" outside.
        kind: What it is called: "conv0", "conv1", "skip", "qkv", "proj", "block", "aux_conv" and so on: the last part
            of its name without the resolution.
        stage: "enc", "mid" or "dec"; "" where the name does not say.
        resolution: Resolution in its name, pixels; else that of its output when it was probed; None where neither is
            known.
        depth: Number of convolutions before it, in the order of `named_modules()`; of blocks, where all blocks are a
            transformer's (`depth_of` says which).
        n_params: Parameters, its own and its children's.
        type: "block", "conv" (a 4-d weight), "linear", "norm", or "" for anything else.
        activated_input: True where its input is known to be the output of an activation: convolutions in the residual
            blocks of gddlab and diffusers, except one behind its resampling, and the last convolution of their U-Nets.
        role: What it is there for, one of `ROLES`; "" for blocks, containers, and where it is not known.
        index: Number of its block among the network's, from 0; None outside of blocks.
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
    role: str = ""  # results of older versions have neither
    index: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inventory(model: nn.Module) -> dict[str, Layer]:
    """Every module of the bare network by name, in its order, without the root and the inside of parametrizations.

    The middle of a diffusers network precedes its decoder, as it runs, although `named_modules()` lists it last.
    """
    modules = _in_order(model)
    blocks, by_blocks = _blocks(modules)
    out: dict[str, Layer] = {}
    convs = begun = 0
    for name, module in modules.items():
        if name:
            stage, resolution = stage_and_resolution(name)
            block = max((b for b in blocks if f"{name}.".startswith(f"{b}.")), key=len, default="")
            kind = "block" if name in blocks else type_of(module)
            weighs = kind != "block" and (kind or any(True for _ in module.parameters(recurse=False)))
            out[name] = Layer(
                name=name,
                block=block,
                kind="block" if kind == "block" else kind_of(name),
                stage=stage,
                resolution=resolution,
                depth=(blocks[block] if block else begun) if by_blocks else convs,
                n_params=sum(p.numel() for p in module.parameters()),
                type=kind,
                activated_input=_follows_activation(name, modules),
                role=role_of(name, modules) if weighs else "",
                index=blocks.get(block),
            )
        convs += is_conv(module)
        begun += name in blocks
    return out


def depth_of(model: nn.Module) -> Literal["convolutions", "blocks"]:
    """What `Layer.depth` counts."""
    return "blocks" if _blocks(_in_order(model))[1] else "convolutions"


def _blocks(modules: Mapping[str, nn.Module]) -> tuple[dict[str, int], bool]:
    """Numbers of the blocks in order, and whether there are some and all are a transformer's."""
    tokens = {*transformer_blocks(modules)}
    names = [n for n, m in modules.items() if n and (n in tokens or anatomy(m) is not None)]
    return {n: i for i, n in enumerate(names)}, bool(names) and tokens.issuperset(names)


def _in_order(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the bare network by name, in the order in which they run, without the inside of parametrizations."""
    return _middle_first({n: m for n, m in named_layers(model).items() if "parametrizations" not in n.split(".")})


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
"""A preset ("conv", "block", "attention", "mlp", "modulation", "norm", "linear", "all"), a name, a glob, "re:" and a
pattern, a list of these, or a function of name and module."""

_NO_FORWARD: Any = nn.Module.forward
"""Of containers, such as `nn.ModuleList`."""
PRESETS = ("conv", "block", "attention", "mlp", "modulation", "norm", "linear", "all")

_BESIDE = {"qkv": ("qkv", "proj", "proj_out"), "to_q": ("to_q", "to_k", "to_v", "to_out.0")}
"""Projections of attention, found beside a layer of this name whatever is around them."""

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Projections that no longer run beside one that was made of them."""


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
        roles = {n: layer.role for n, layer in known.items()}
        chosen = match_layers(layers, {n: layer.type for n, layer in known.items()}, roles=roles)
    if run:
        containers = {n for n in chosen if type(modules[n]).forward is _NO_FORWARD}
        inside = {n for n in known if known[n].type and any(n.startswith(f"{c}.") for c in containers)}
        if containers and not (chosen := chosen - containers | inside):
            raise GddlabError(f"{containers.pop()!r} holds no layer: give names, globs, or one of {', '.join(PRESETS)}")
    return [layer for name, layer in known.items() if name in chosen]


def match_layers(
    selection: object, types: Mapping[str, str], what: str = "layers", roles: Mapping[str, str] | None = None
) -> set[str]:
    """The names in `types`, {name: `Layer.type`}, that a preset, name, glob, "re:..." or a list of these means.

    `what` is the argument's name; `roles` is {name: `Layer.role`}, None for what names say. An item that matches
    nothing is refused, with near matches.
    """
    if not isinstance(selection, Iterable):
        raise GddlabError(
            f"{what}={shown(selection)}: give a name, a glob, 're:...', a list of these, or one of {', '.join(PRESETS)}"
        )
    items = [selection] if isinstance(selection, str) else list(selection)
    if not items:
        raise GddlabError(f"{what} is an empty list: give names, a glob, or one of {', '.join(PRESETS)}")
    if roles is None:
        roles = {n: role_of(n) for n, kind in types.items() if kind in ("conv", "linear")}
    return {n for item in items for n in _matches(item, types, what, roles)}


def _matches(pattern: object, types: Mapping[str, str], what: str, roles: Mapping[str, str]) -> set[str]:
    if not isinstance(pattern, str):
        raise GddlabError(f"{what}: {shown(pattern)} is no name of a layer; give strings, names or globs")
    if pattern in PRESETS:
        found = _preset(pattern, types, roles)
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


def _preset(name: str, types: Mapping[str, str], roles: Mapping[str, str]) -> set[str]:
    """All of a type or role; "attention": projections into and out of attention; "all": whatever has a type.

    Without the embedding of EDM's augmentation labels, which runs only while a teacher is trained, without LoRA's
    matrices, and without projections in whose place fused ones run.
    """
    if name == "attention":
        chosen = {n for n, role in roles.items() if role in ("attn.qkv", "attn.out")} | _beside(types, _BESIDE)
        chosen = {n for n in chosen if types.get(n) in ("conv", "linear", "")}  # "": a convolution over tokens
    elif name in ("mlp", "modulation"):
        chosen = {n for n, role in roles.items() if role == name and types.get(n) in ("conv", "linear")}
    else:
        chosen = {n for n, kind in types.items() if kind and name in (kind, "all")}
    chosen -= _beside(types, _FUSED)
    return {n for n in chosen if "map_augment" not in n.split(".") and not is_adapter(n)}


def _beside(names: Iterable[str], leaves: Mapping[str, Sequence[str]]) -> set[str]:
    """Names of what lies beside layers whose names end in one of `leaves`."""
    out = set()
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        out |= {parent + dot + other for other in leaves.get(leaf, ())}
    return out
