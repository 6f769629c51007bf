"""`FreezeMask`: the one authority on which parameters are frozen."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json, read_json, write_json
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import kind_of, named_layers, owner_of, parameter_table, place, plain_name, unwrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "FORMAT",
    "NOWHERE",
    "EvalMode",
    "FreezeMask",
    "Parameters",
    "block_of",
    "changed_tensors",
    "diff",
    "difference",
    "fingerprint",
    "freeze",
    "from_dict",
    "frozen_modules",
    "html_rows",
    "mask_html",
    "mask_line",
    "numel",
    "parameter_frame",
    "same_bits",
    "same_network",
    "share_text",
    "shares",
    "summary",
    "tensors_of",
    "to_dict",
    "transfer",
    "unmatched",
]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the bare network by plain name."""
    net = unwrap(model)
    return {plain_name(n): t.detach() for n, t in (*net.named_parameters(), *net.named_buffers())}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bytes: NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


class EvalMode:
    """Stands in for the `train` method of a frozen module: the module stays in eval mode, its children follow.

    An object rather than a function, so that a copied or unpickled network holds its own modules.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.module).train(self.module, mode)
        self.module.training = False
        return self.module


def freeze(model: nn.Module, frozen: Collection[str]) -> None:
    """Sets `requires_grad` of every parameter of the bare network, and holds frozen modules with buffers in eval mode."""
    net = unwrap(model)
    for name, p in net.named_parameters():
        p.requires_grad_(plain_name(name) not in frozen)
    held = frozen_modules(net, frozen)
    for name, module in named_layers(net).items():
        if name in held:
            module.__dict__["train"] = EvalMode(module)
            module.training = False
        elif isinstance(module.__dict__.get("train"), EvalMode):
            del module.__dict__["train"]
            module.training = net.training


def frozen_modules(model: nn.Module, frozen: Collection[str]) -> set[str]:
    """Names of modules with buffers and nothing to train.

    All parameters of such a module are frozen; where it has none, as a BatchNorm without weights, all those within the
    nearest module around it that has some.
    """
    net = unwrap(model)
    still = {id(p) for name, p in net.named_parameters() if plain_name(name) in frozen}
    modules = named_layers(net)
    out = set()
    for name, module in modules.items():
        if not any(True for _ in module.named_buffers(recurse=False)):
            continue
        parameters, around = list(module.parameters(recurse=False)), name
        while not parameters and around:
            around = around.rpartition(".")[0]
            parameters = list(modules[around].parameters()) if around in modules else []
        if parameters and all(id(p) in still for p in parameters):
            out.add(name)
    return out


def changed_tensors(model: nn.Module, teacher: nn.Module, frozen: Collection[str]) -> tuple[list[str], int]:
    """Names of frozen parameters, and of buffers of frozen modules, that differ in a bit; and how many were compared."""
    ours, theirs = tensors_of(model), tensors_of(teacher)
    modules = frozen_modules(model, frozen)
    buffers = (plain_name(n) for n, _ in unwrap(model).named_buffers())
    names = [*frozen, *(n for n in buffers if n.rpartition(".")[0] in modules and n in theirs)]
    return [n for n in names if not same_bits(ours[n], theirs[n])], len(names)


def difference(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str:
    """What tells another network from the mask's, given that something does."""
    if (name := next((n for n in mine if n not in other), None)) is not None:
        return f"it has no {name}"
    if (name := next((n for n in other if n not in mine), None)) is not None:
        return f"the mask does not know its {name}"
    name = next(n for n in mine if mine[n] != other[n])
    return f"{name} is {other[name]}, not {mine[name]}"


def unmatched(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Parameters that do not have the same name and shape in both; says so, and refuses where none has."""
    matched = {n for n in mine if other.get(n) == mine[n]}
    if not matched:
        raise GddlabError(
            f"none of the {len(other)} parameters has a name and shape that the mask knows: use mask.transfer(model)"
        )
    out = tuple(n for n in dict.fromkeys((*mine, *other)) if n not in matched)
    if out:
        more = f" and {len(out) - 3} more" if len(out) > 3 else ""
        warnings.warn(
            f"{len(matched)} parameters match the mask, {len(out)} do not: {', '.join(out[:3])}{more}", stacklevel=3
        )
    return out


FORMAT = "gddlab-mask-1"


def to_dict(mask: FreezeMask) -> dict[str, Any]:
    candidates = mask.candidates
    return {
        "format": FORMAT,
        "strategy": mask.strategy,
        "arguments": mask.arguments,
        "fraction": mask.fraction,
        "hash": mask.hash,
        "fingerprint": mask.fingerprint,
        "probe_hash": mask.probe_hash,
        "frozen": list(mask.frozen),
        "scores": mask.scores,
        "candidates": None if candidates is None else {name: list(layers) for name, layers in candidates.items()},
        "parameters": [[name, list(shape)] for name, shape in mask.parameters],
    }


def from_dict(make: Callable[..., FreezeMask], value: Any) -> FreezeMask:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise GddlabError("this is no freeze mask: give what FreezeMask.save wrote")
    try:
        mask = make(
            frozen=tuple(value["frozen"]),
            parameters=tuple((name, tuple(shape)) for name, shape in value["parameters"]),
            strategy=value["strategy"],
            arguments=value["arguments"],
            scores=value["scores"],
            probe_hash=value["probe_hash"],
            candidates=value.get("candidates"),  # files of older versions have none
        )
        fits = (mask.hash, mask.fingerprint) == (value["hash"], value["fingerprint"])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, GddlabError):
            raise
        raise GddlabError(f"this freeze mask is incomplete ({e!r}): give what FreezeMask.save wrote") from None
    if not fits:
        raise GddlabError("this freeze mask was edited: its hash does not fit its names; select it again")
    return mask


NOWHERE = "-"
"""Stage or resolution of what has none: embeddings, layers of other naming."""


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def block_of(layer: str) -> str:
    """The module along depth that a layer belongs to.

    Up to the part of its name with a resolution (EDM), else up to the last number (diffusers, `nn.Sequential`), else itself.
    """
    if found := re.match(r"(.*?\d+x\d+_[^.]+)(?:\.|$)", layer):
        return found[1]
    found = re.match(r"(.*\.\d+)\.[^.]+", layer)
    return found[1] if found else layer


def parameter_frame(parameters: Parameters, frozen: Collection[str]) -> pd.DataFrame:
    """A row a parameter: columns parameter, block, stage, resolution (pixels), kind, size (numbers), frozen."""
    import pandas as pd

    frozen = set(frozen)
    rows = []
    for name, shape in parameters:
        layer = owner_of(name)
        stage, resolution = place(layer)
        rows.append((name, block_of(layer), stage or NOWHERE, resolution, kind_of(layer), numel(shape), name in frozen))
    columns = ["parameter", "block", "stage", "resolution", "kind", "size", "frozen"]
    return pd.DataFrame(rows, columns=columns).astype({"resolution": "Int64"})


def shares(frame: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Frozen share of the numbers in each group of a `parameter_frame`, in the order of the network."""
    sizes = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby(by, sort=False, dropna=False)
    table = sizes[["size", "still"]].sum()
    return table["still"] / table["size"]


def share_text(value: Any) -> str:
    """A share, or one a resolution, in per cent; "" for None; masks of one's own may say anything else."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {share_text(v)}" for name, v in value.items())
    if isinstance(value, int | float):
        return f"{value:.2%}"
    return "" if value is None else str(value)


def mask_line(mask: FreezeMask) -> str:
    details = [f"{len(mask.frozen)} of {len(mask.parameters)} tensors"]
    if (asked := mask.arguments.get("budget")) is not None:
        details.append(f"budget {share_text(asked)}{_of(mask)}, reached {share_text(mask.arguments.get('reached'))}")
    frozen = f"{mask.fraction:.2%} of {mask.n_params:,} parameters frozen"
    return f"{mask.strategy}: {frozen} ({'; '.join(details)})"


def mask_html(mask: FreezeMask) -> str:
    a = mask.arguments
    rows = {
        "strategy": mask.strategy,
        "frozen": f"{mask.n_frozen:,} of {mask.n_params:,} parameters, {mask.fraction:.2%}; "
        f"{len(mask.frozen)} of {len(mask.parameters)} tensors",
    }
    if "budget" in a:
        rows["budget asked"] = share_text(a["budget"]) + _of(mask)
        rows["budget reached"] = share_text(a.get("reached"))
    others = {k: v for k, v in a.items() if k not in ("budget", "reached") and v is not None}
    rows["arguments"] = ", ".join(f"{k}={v}" for k, v in others.items())
    rows["hash"] = mask.hash[:12]
    by_kind = shares(mask.to_frame(), ["kind", "stage"]).unstack(sort=False)
    text = by_kind.to_html(float_format="{:.0%}".format, na_rep="")
    return f"{html_rows('FreezeMask', rows)}<p>Frozen share of the parameters, by kind of layer and stage</p>{text}"


def _of(mask: FreezeMask) -> str:
    if mask.strategy == "per-resolution":
        return " of the candidates at each resolution"
    return " of the candidates' number" if mask.arguments.get("unit") == "layers" else ""


def html_rows(caption: str, rows: Mapping[str, str]) -> str:
    """A table of two columns; rows without text are left out."""
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items() if v)
    return f"<table><caption>{escape(caption)}</caption>{cells}</table>"


def summary(mask: FreezeMask) -> pd.DataFrame:
    frame = mask.to_frame().rename(columns={"size": "parameters", "frozen": "still"})
    frame["frozen"] = frame["parameters"].where(frame["still"], 0)
    table = frame.groupby(["stage", "kind"], sort=False)[["parameters", "frozen"]].sum()
    table.loc[("total", ""), :] = table.sum()
    table = table.astype("int64")
    table["share"] = table["frozen"] / table["parameters"]
    return table


def same_network(mask: FreezeMask, other: FreezeMask) -> None:
    if not hasattr(other, "fingerprint"):
        raise GddlabError(f"{other!r} is no FreezeMask: give what select_freeze or FreezeMask.load returns")
    if mask.fingerprint != other.fingerprint:
        raise GddlabError(f"masks of {mask.n_params:,} and {other.n_params:,} parameters are for different networks")


def diff(mask: FreezeMask, other: FreezeMask) -> pd.DataFrame:
    import pandas as pd

    same_network(mask, other)
    mine, theirs = set(mask.frozen), set(other.frozen)
    words = {True: "frozen", False: "trained"}
    rows = [
        (name, numel(shape), words[name in mine], words[name in theirs])
        for name, shape in mask.parameters
        if (name in mine) != (name in theirs)
    ]
    return pd.DataFrame(rows, columns=["parameter", "size", "self", "other"])


Parameters = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a network's parameters, in its order, without `map_augment`."""


def fingerprint(parameters: Parameters) -> str:
    """sha256 over sorted names and shapes: teacher and student of one architecture have the same."""
    return hash_json(sorted([name, list(shape)] for name, shape in parameters))


@dataclass(frozen=True)
class FreezeMask:
    """Which parameters of a network stay as the teacher has them.

    A mask made for a teacher fits its student: `map_augment`, which students drop, belongs to neither; the embedding
    of a target time, which some students add (`map_target0`, `map_target1`), is trained. What DistributedDataParallel and
    torch.compile put in front of names does not matter.

    Attributes:
        frozen: Names of the frozen parameters, relative to the `Precond`, in the order of the network.
        parameters: Names and shapes of all parameters of the network, without `map_augment`.
        strategy: How it was chosen.
        arguments: Of the strategy, and what it reached; JSON.
        scores: By candidate, where candidates were ordered by a measurement.
        probe_hash: `ProbeResult.hash` of that measurement.
        candidates: What it was chosen among: names of layers, or of blocks that are frozen together, with the layers whose own
            parameters are meant. None where no such choice was made.

    Raises:
        GddlabError: A frozen name is not among the parameters, or a candidate's layer has none.
    """

    frozen: tuple[str, ...] = field(repr=False)
    parameters: Parameters = field(repr=False)
    strategy: str = "custom"
    arguments: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] | None = field(default=None, repr=False)
    probe_hash: str | None = None
    candidates: dict[str, tuple[str, ...]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parameters]
        wanted = {plain_name(name) for name in self.frozen}
        for name in wanted.difference(names):
            raise unknown("parameter", name, names)
        object.__setattr__(self, "frozen", tuple(n for n in names if n in wanted))
        object.__setattr__(self, "parameters", tuple((n, tuple(shape)) for n, shape in self.parameters))
        if self.candidates is not None:
            owners = {owner_of(name) for name in names}
            for layer in (x for layers in self.candidates.values() for x in layers if x not in owners):
                raise unknown("layer", layer, owners)
            object.__setattr__(self, "candidates", {n: tuple(layers) for n, layers in self.candidates.items()})

    def __hash__(self) -> int:
        return hash(self.hash)

    def __str__(self) -> str:
        return mask_line(self)

    @property
    def fingerprint(self) -> str:
        """Of the architecture that it fits."""
        return fingerprint(self.parameters)

    @property
    def hash(self) -> str:
        """sha256 of architecture and frozen names: masks that freeze the same have the same."""
        return hash_json({"fingerprint": self.fingerprint, "frozen": sorted(self.frozen)})

    @property
    def n_params(self) -> int:
        """Numbers in all parameters."""
        return sum(numel(shape) for _, shape in self.parameters)

    @property
    def n_frozen(self) -> int:
        """Numbers in frozen parameters."""
        frozen = set(self.frozen)
        return sum(numel(shape) for name, shape in self.parameters if name in frozen)

    @property
    def fraction(self) -> float:
        """Frozen share of all parameters."""
        return self.n_frozen / self.n_params

    def apply(self, model: nn.Module, *, force: bool = False) -> tuple[str, ...]:
        """Frozen parameters stop requiring gradients, all others require them, whatever was before.

        Frozen modules with buffers, such as BatchNorm's running statistics, are put into eval mode and stay there under
        `model.train()` until another mask trains them.

        Args:
            model: The network, bare or wrapped.
            force: Takes another architecture too: parameters of equal name and shape are frozen, all others trained.

        Returns:
            Names that the mask and `model` do not share with one shape; () without `force`.

        Raises:
            GddlabError: `model` is another architecture; with `force`, nothing matches.
        """
        rest: tuple[str, ...] = ()
        if force:
            rest = unmatched(dict(self.parameters), dict(self._table(model)))
        else:
            self._check(model)
        freeze(model, set(self.frozen).difference(rest))
        return rest

    def trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names, in the order of the network: what an optimiser gets.

        Raises:
            GddlabError: `model` is another architecture.
        """
        self._check(model)
        frozen = set(self.frozen)
        named = ((plain_name(name), p) for name, p in unwrap(model).named_parameters())
        return [(name, p) for name, p in named if name not in frozen]

    def verify(self, model: nn.Module, teacher: nn.Module) -> None:
        """Compares frozen parameters, and buffers of frozen modules, with the teacher's, bit by bit.

        Raises:
            GddlabError: Some differ; it names them. Or one network is another architecture.
        """
        self._check(model)
        self._check(teacher)
        changed, n = changed_tensors(model, teacher, self.frozen)
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise GddlabError(
                f"{len(changed)} of {n} frozen tensors differ from the teacher's: {', '.join(changed[:5])}{more}"
            )

    def transfer(self, model: nn.Module, *, by: str = "resolution") -> FreezeMask:
        """The mask's decisions for another architecture.

        Each parameter takes the decision of this network's parameter of equal stage, resolution, kind of layer and name (weight,
        bias), at the nearest relative position among these. What has no such counterpart is trained, and listed.

        Args:
            model: The other network; it is not changed.
            by: "resolution", pixels, or "level", halvings below the network's highest resolution.

        Returns:
            A mask for `model`; its arguments list the groups without a counterpart ("dec/64/conv0") and the share of
            parameters that have one.

        Raises:
            GddlabError: Nothing of `model` has a counterpart; unknown `by`.
        """

        return transfer(self, _network(model), by)

    def _check(self, model: nn.Module) -> None:
        table = self._table(model)
        if fingerprint(table) != self.fingerprint:
            where = difference(dict(self.parameters), dict(table))
            raise GddlabError(
                f"this mask is for another network ({self.n_params:,} parameters; {where}): select one for this network"
            )

    def _table(self, model: nn.Module) -> Parameters:
        """Parameters of `model`; of a student that takes a target time, those that its teacher has too."""
        known = dict(self.parameters)
        table = parameter_table(_network(model))
        return tuple((n, shape) for n, shape in table if n in known or set(TARGET_LAYERS).isdisjoint(n.split(".")))

    def to_frame(self) -> pd.DataFrame:
        """A row a parameter: columns parameter, block, stage, resolution (pixels), kind, size (numbers), frozen."""
        return parameter_frame(self.parameters, self.frozen)

    def summary(self) -> pd.DataFrame:
        """Parameters, frozen parameters and their share, by stage of the network and kind of layer, with a total."""
        return summary(self)

    def diff(self, other: FreezeMask) -> pd.DataFrame:
        """Parameters that one mask freezes and the other trains: columns parameter, size, self, other.

        Raises:
            GddlabError: `other` is for another architecture.
        """
        return diff(self, other)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws each block's share of all parameters along depth, frozen and trained."""
        from gddlab.freezing.plots import draw_mask

        return draw_mask(self, ax)

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, value: Any) -> FreezeMask:
        """Raises GddlabError where `value` is no mask, or was edited so that its hash no longer fits."""
        return from_dict(cls, value)

    def save(self, path: str | Path) -> None:
        """Writes JSON atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> FreezeMask:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such file.
            GddlabError: Not a mask, or edited by hand.
        """
        try:
            return cls.from_dict(read_json(path))
        except FileNotFoundError:
            raise
        except GddlabError as e:
            raise GddlabError(f"{path}: {e}") from None

    def _repr_html_(self) -> str:
        return mask_html(self)


def _network(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise GddlabError(f"model is a {type(model).__name__}: give a network, an nn.Module")
    return model


Key = tuple[str, int | None, str, str]
"""Stage, resolution or level, kind of layer, last part of the parameter's name."""


def transfer(mask: FreezeMask, model: nn.Module, by: str) -> FreezeMask:
    if by not in ("resolution", "level"):
        raise unknown("by", by, ("resolution", "level"))
    parameters = parameter_table(model)
    theirs, ours = _groups(mask.parameters, by), _groups(parameters, by)
    decided = set(mask.frozen)
    sizes = {name: numel(shape) for name, shape in parameters}
    frozen: list[str] = []
    unmapped: dict[str, int] = {}
    for key, names in ours.items():
        if key not in theirs:
            whole = key[:3] not in {k[:3] for k in theirs}
            label = "/".join(str(part or NOWHERE) if part != 0 else "0" for part in key[: 3 if whole else 4])
            unmapped[label] = unmapped.get(label, 0) + len(names)
            continue
        twins = theirs[key]
        frozen += [n for i, n in enumerate(names) if twins[_nearest(i, len(names), len(twins))] in decided]
    lost = sum(sizes[n] for key, names in ours.items() if key not in theirs for n in names)
    if lost == sum(sizes.values()):
        raise GddlabError(f"no parameter of this network has a counterpart by {by} in the mask's: select a mask for it")
    out = FreezeMask(
        tuple(frozen),
        parameters,
        "transfer",
        {
            "strategy": mask.strategy,
            "mask": mask.hash,
            "by": by,
            "mapped": 1 - lost / sum(sizes.values()),
            "n_unmapped": sum(unmapped.values()),
            "unmapped": list(unmapped),
        },
    )
    out.arguments["reached"] = out.fraction
    return out


def _groups(parameters: Parameters, by: str) -> dict[Key, list[str]]:
    """Names by place, in the order of the network."""
    names = [name for name, _ in parameters]
    top = max((r for name in names if (r := place(owner_of(name))[1]) is not None), default=0)
    out: dict[Key, list[str]] = {}
    for name in names:
        layer = owner_of(name)
        stage, where = place(layer)
        if by == "level" and where is not None:
            where = round(math.log2(top / where))
        out.setdefault((stage, where, kind_of(layer), name[len(layer) :].strip(".")), []).append(name)
    return out


def _nearest(i: int, n: int, m: int) -> int:
    """Index among `m` layers of the one whose relative position is nearest to that of layer `i` of `n`; the earlier of two."""
    position = i / (n - 1) if n > 1 else 0.5
    return math.ceil(position * (m - 1) - 0.5)
