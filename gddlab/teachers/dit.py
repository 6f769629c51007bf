"""Weights of DiT and SiT, as their authors save them: which network they are of."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from gddlab.errors import GddlabError, positive, unknown
from gddlab.pickles import Record, printable
from gddlab.teachers.torchfiles import TensorData

FAMILIES = ("dit", "sit")
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
"""Attention heads of the published sizes, XL, L, B and S, by width: shapes do not tell them."""
PATCHES, CLASSES, PLACES, END = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "pos_embed",
    "final_layer.linear.weight",
)
"""Tensors whose shapes tell the arguments."""


def check_options(family: str | None, heads: int | None) -> None:
    """Refuses an unknown family, and a number of heads that is none."""
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if heads is not None:
        positive("heads", heads)


def is_transformer(weights: dict[str, TensorData]) -> bool:
    """Whether a state dict has the names of DiT's."""
    return all(name in weights for name in (PATCHES, CLASSES, PLACES, END))


def recognise(
    path: Path, weights: dict[str, TensorData], args: Any, *, family: str | None, heads: int | None
) -> tuple[Record, dict[str, Any], dict[str, TensorData]]:
    """Class, arguments and weights, under gddlab's names, of the network that a state dict is of.

    Args:
        path: The file: its name may tell the family.
        weights: The state dict.
        args: What `train.py` saved as its options; anything else tells nothing.
        family, heads: As for `load_teacher`.

    Raises:
        GddlabError: Shapes of no such network; a family or number of heads that nothing tells; a SiT of another path.
    """
    for name, dims in ((PATCHES, 4), (CLASSES, 2), (PLACES, 3), (END, 2)):
        if len(size := weights[name].size) != dims or not all(size):
            raise _odd(path, name, size)
    width, channels, patch, _ = weights[PATCHES].size
    side = math.isqrt(weights[PLACES].size[1])
    if side**2 != weights[PLACES].size[1]:
        raise _odd(path, PLACES, weights[PLACES].size)
    if (heads := heads or HEADS.get(width)) is None:
        unknown_heads = f"a transformer of width {width}, whose number of attention heads is not known: give heads="
        raise GddlabError(printable(f"{path}: {unknown_heads}"))
    kind = _family(path, args.state if isinstance(args, Record) and args.cls == "Namespace" else {}, family)
    kwargs = {
        "img_resolution": side * patch,
        "img_channels": channels,
        "label_dim": weights[CLASSES].size[0] - 1,
        "kind": kind,
        "patch_size": patch,
        "model_channels": width,
        "num_blocks": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": heads,
        "learn_sigma": weights[END].size[0] != patch**2 * channels,
    }
    return Record("DiTPrecond"), kwargs, {f"model.{name}": t for name, t in weights.items()}


def _odd(path: Path, name: str, size: tuple[int, ...]) -> GddlabError:
    return GddlabError(printable(f"{path}: {name} is {size}, no weights of a DiT or SiT"))


def _family(path: Path, args: dict[Any, Any], family: str | None) -> str:
    """As asked; else as the options of its training say, or its name."""
    args = {name: value for name, value in args.items() if isinstance(value, str)}
    told = re.match(r"(dit|sit)(?![a-z])", args.get("model", "").lower())
    if told and family not in (None, told[1]):
        raise GddlabError(printable(f"family={family!r}: {path} says that it is a {args['model'][:40]}; omit family"))
    named = told or re.search(r"(?<![a-z])(dit|sit)(?![a-z])", path.name.lower())
    if (family := family or (named[1] if named else None)) is None:
        raise GddlabError(
            printable(
                f'{path} may be a DiT or a SiT, whose weights have the same names: give family="dit" or family="sit"'
            )
        )
    for name, known in (("path_type", "Linear"), ("prediction", "velocity")) if family == "sit" else ():
        if (value := args.get(name, known)) != known:
            raise GddlabError(printable(f"{path}: a SiT with {name}={value[:40]!r}: known here is {known!r}"))
    return family
