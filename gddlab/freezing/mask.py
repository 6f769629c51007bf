"""`FreezeMask`: the one authority on which parameters are frozen."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound, shown, unknown, validated, warn
from gddlab.files import check_kind, hash_json, holds_format, path_of, read_json, write_json
from gddlab.freezing.strategies import RULES, STRATEGIES
from gddlab.nets.bare import unwrap
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import (
    difference,
    kind_of,
    named_layers,
    named_tensors,
    owner_of,
    parameter_table,
    plain_name,
    role_of,
    stage_and_resolution,
)
from gddlab.probing.plots.axes import mark_places, rows_of
from gddlab.probing.result import html_table
from gddlab.theme import FROZEN, TRAINED, axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMAT = "gddlab-mask-1"

Parameters = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a network's parameters, in its order, without `map_augment` and LoRA's matrices."""

NOWHERE = "-"
"""Stage or resolution of what has none: embeddings, layers whose names do not say."""

INCH_PER_BLOCK = 0.2
"""Width of a block in a figure."""


def parameters_of(model: nn.Module) -> Parameters:
    """Names and shapes of the parameters that a mask freezes or trains.

    Raises:
        GddlabError: Quantised weights, which cannot be trained.
    """
    for name, p in unwrap(model).named_parameters():
        if not (p.is_floating_point() or p.is_complex()):
            raise GddlabError(
                f"{plain_name(name)!r} is {str(p.dtype).removeprefix('torch.')}: quantised weights cannot be trained, "
                "give the network before it was quantised"
            )
    return parameter_table(model)


def fingerprint(parameters: Parameters) -> str:
    """sha256 over sorted names and shapes: teacher and student of one architecture have the same."""
    return hash_json(sorted([name, list(shape)] for name, shape in parameters))


@validated
@dataclass(frozen=True)
class FreezeMask:
    """Which parameters of a network stay as the teacher has them.

    A mask made for a teacher fits its student: `map_augment`, which students drop, belongs to neither; the embedding
    of a target time, which some students add (`map_target0`, `map_target1`), is trained, as are LoRA's matrices.
    Prefixes that DistributedDataParallel, torch.compile and PEFT put before names do not matter.

    Attributes:
        frozen: Names of the frozen parameters, relative to the `Precond`, in the order of the network.
        parameters: Names and shapes of all parameters of the network, without `map_augment`.
        strategy: How it was chosen.
        arguments: Of the strategy, and what it reached; JSON.
        scores: By candidate, where candidates were ordered by a measurement.
        probe_hash: `ProbeResult.hash` of that measurement.
        candidates: What it was chosen among: names of layers, or of blocks that are frozen together, with the layers
            whose own parameters are meant. None where no such choice was made.

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
        return sum(prod(shape) for _, shape in self.parameters)

    @property
    def n_frozen(self) -> int:
        """Numbers in frozen parameters."""
        frozen = set(self.frozen)
        return sum(prod(shape) for name, shape in self.parameters if name in frozen)

    @property
    def fraction(self) -> float:
        """Frozen share of all parameters."""
        return self.n_frozen / self.n_params

    # On a network.

    def apply(self, model: nn.Module, *, force: bool = False) -> tuple[str, ...]:
        """Sets `requires_grad`: False for frozen parameters, True for all others, whatever it was before.

        Frozen modules with buffers, such as BatchNorm's running statistics, are put into eval mode and stay there under
        `model.train()` until another mask trains them.

        Args:
            model: The network, bare or wrapped.
            force: Accepts another architecture too: parameters of equal name and shape are frozen, all others trained.

        Returns:
            Names that the mask and `model` do not share with one shape; () without `force`.

        Raises:
            GddlabError: `model` is another architecture; with `force`, nothing matches; or it is quantised.
        """
        rest: tuple[str, ...] = ()
        if force:
            rest = _unmatched(dict(self.parameters), dict(self._table(model)))
        else:
            self._check(model)
        _freeze(model, set(self.frozen).difference(rest))
        return rest

    def trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters for the optimiser, with their names, in the order of the network.

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
        ours, theirs = named_tensors(unwrap(model)), named_tensors(unwrap(teacher))
        held = _frozen_modules(model, self.frozen)
        buffers = (plain_name(n) for n, _ in unwrap(model).named_buffers())
        names = [*self.frozen, *(n for n in buffers if n.rpartition(".")[0] in held and n in theirs)]
        if changed := [n for n in names if not _same_bits(ours[n], theirs[n])]:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise GddlabError(
                f"{len(changed)} of {len(names)} frozen tensors differ from the teacher's: "
                f"{', '.join(changed[:5])}{more}"
            )

    def _check(self, model: nn.Module) -> None:
        if where := difference(dict(self.parameters), dict(self._table(model)), ("mask", "network")):
            what = "select one for this network"
            if re.search(r"to_(added_)?q?kv\.", where):
                what = "its attention was fused or split since, undo that, or select one for it as it is now"
            raise GddlabError(f"this mask is for another network ({self.n_params:,} parameters; {where}): {what}")

    def _table(self, model: nn.Module) -> Parameters:
        """Parameters of `model`, without those that a student with a target time adds to its teacher's."""
        known = dict(self.parameters)
        table = parameters_of(model)
        return tuple((n, shape) for n, shape in table if n in known or set(TARGET_LAYERS).isdisjoint(n.split(".")))

    # For another architecture.

    def transfer(self, model: nn.Module, *, by: str = "resolution") -> FreezeMask:
        """The mask's decisions for another architecture.

        Each parameter takes the decision of this network's parameter of equal stage, resolution, part of its block and
        name (weight, bias), in the block at the nearest relative depth. Where this network calls no part so, it is that
        of a parameter of equal role, for the roles that rules freeze. What has no such counterpart is trained, and
        listed.

        Args:
            model: The other network; it is not changed.
            by: "resolution", pixels, or "level", halvings below the network's highest resolution.

        Returns:
            A mask for `model`; its arguments list the groups without a counterpart ("dec/64/conv0") and the share of
            parameters that have one.

        Raises:
            GddlabError: Nothing of `model` has a counterpart; unknown `by`.
        """
        if by not in ("resolution", "level"):
            raise unknown("by", by, ("resolution", "level"))
        parameters = parameters_of(model)
        theirs, ours = _groups(self.parameters, by), _groups(parameters, by)
        parts = {key.part_only for key in theirs}
        by_role, ours_by_role = _by_role(self.parameters, by), _by_role(parameters, by)
        alike = {a: b for role in by_role.keys() & ours_by_role for a, b in _twins(ours_by_role[role], by_role[role])}
        decided, sizes = set(self.frozen), {name: prod(shape) for name, shape in parameters}
        frozen: list[str] = []
        unmapped: list[str] = []
        lost: list[str] = []
        for key, names in ours.items():
            if key in theirs:
                twins = dict(_twins(names, theirs[key]))
            elif key.part_only not in parts and alike.keys() >= {*names}:
                twins = alike
            else:
                unmapped.append(str(key if key.part_only in parts else key.part_only))  # one tensor, or all of a part
                lost += names
                continue
            frozen += [n for n in names if twins[n] in decided]
        mapped = 1 - sum(sizes[n] for n in lost) / sum(sizes.values())
        if not mapped:
            raise GddlabError(
                f"no parameter of this network has a counterpart by {by} in the mask's: select a mask for it"
            )
        arguments = {"strategy": self.strategy, "mask": self.hash, "by": by, "mapped": mapped}
        arguments |= {"n_unmapped": len(lost), "unmapped": list(dict.fromkeys(unmapped))}
        return FreezeMask(tuple(frozen), parameters, "transfer", arguments).with_reached()

    # In tables and words.

    def with_reached(self) -> FreezeMask:
        """Notes the frozen share among the arguments, unless the strategy has noted what it reached."""
        self.arguments.setdefault("reached", self.fraction)
        return self

    def to_frame(self) -> pd.DataFrame:
        """One row per parameter: parameter, block, stage, resolution (pixels), kind, role, size (numbers), frozen.

        `kind` is the layer's path inside its block ("conv0", "attn.proj"), `role` what it is there for.
        """
        import pandas as pd

        frozen = set(self.frozen)
        rows = []
        for name, shape in self.parameters:
            layer = bearer_of(name)
            stage, resolution = stage_and_resolution(layer)
            where = (block_of(layer), stage or NOWHERE, resolution, part_of(layer), role_of(layer))
            rows.append((name, *where, prod(shape), name in frozen))
        columns = ["parameter", "block", "stage", "resolution", "kind", "role", "size", "frozen"]
        return pd.DataFrame(rows, columns=columns).astype({"resolution": "Int64"})

    def summary(self) -> pd.DataFrame:
        """Parameters, frozen parameters and their share, by stage of the network and kind of layer, with a total."""
        table = sizes(self.to_frame(), ["stage", "kind"]).rename(columns={"size": "parameters", "still": "frozen"})
        table.loc[("total", ""), :] = table.sum()
        table = table.astype("int64")
        table["share"] = table["frozen"] / table["parameters"]
        return table

    def diff(self, other: FreezeMask) -> pd.DataFrame:
        """Parameters that one mask freezes and the other trains: columns parameter, size, self, other.

        Raises:
            GddlabError: `other` is for another architecture.
        """
        check_same_network(self, other)
        frame = self.to_frame()[["parameter", "size"]]
        words = {True: "frozen", False: "trained"}
        for name, mask in (("self", self), ("other", other)):
            frame[name] = frame["parameter"].isin(mask.frozen).map(words)
        return frame[frame["self"] != frame["other"]].reset_index(drop=True)

    @themed
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws each block's share of all parameters along depth, frozen and trained."""
        import seaborn as sns

        frame = self.to_frame()
        table = 100 * sizes(frame, "block") / self.n_params
        ax = axes_of(ax, max(5.0, INCH_PER_BLOCK * len(table) + 1.5), 3.6)
        still, total = table["still"].sum(), table["size"].sum()
        look: dict[str, Any] = {"ax": ax, "saturation": 1, "width": 0.8, "linewidth": 0}
        sns.barplot(x=table.index, y=table["size"], color=TRAINED, label=f"trained, {total - still:.1f} %", **look)
        sns.barplot(x=table.index, y=table["still"], color=FROZEN, label=f"frozen, {still:.1f} %", **look)
        ax.set_xlim(-0.6, len(table) - 0.4)
        label_blocks(ax, frame, -0.5)
        ax.set_ylabel("share of all parameters, %")
        ax.set_title(self._title(), loc="left", pad=30)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], ncols=2, loc="lower right", bbox_to_anchor=(1, 1.13), borderaxespad=0.2)
        return ax

    def _title(self) -> str:
        score, freeze = self.arguments.get("score"), self.arguments.get("freeze")
        if score is None:
            return self.strategy
        if isinstance(score, dict):
            score = " ".join(f"{weight:+g} {stat}" for stat, weight in score.items())
        return f"{self.strategy}: {score}, {freeze} first"

    def __str__(self) -> str:
        details = [f"{len(self.frozen)} of {len(self.parameters)} tensors"]
        if (asked := self.arguments.get("budget")) is not None:
            reached = share_text(self.arguments.get("reached"))
            details.append(f"budget {share_text(asked)}{self._budget_of()}, reached {reached}")
        frozen = f"{self.fraction:.2%} of {self.n_params:,} parameters frozen"
        return f"{self.strategy}: {frozen} ({'; '.join(details)}); {self._by_kind()}"

    def _by_kind(self) -> str:
        """What is frozen, and what is trained whole, by kind of layer without numbers: "frozen conv 99%, proj; ..."."""
        still, total, frozen = Counter[str](), Counter[str](), {*self.frozen}
        for name, shape in self.parameters:
            kind = part_of(bearer_of(name)).rstrip("0123456789")
            total[kind] += prod(shape)
            still[kind] += prod(shape) if name in frozen else 0
        parts = [k if still[k] == n else f"{k} {min(still[k] / n, 0.999):.1%}" for k, n in total.items() if still[k]]
        trained = [k for k in total if not still[k]]
        return f"frozen {', '.join(parts) or 'nothing'}; trained {', '.join(trained) or 'the rest'}"

    def _budget_of(self) -> str:
        if self.strategy == "per-resolution":
            return " of the candidates at each resolution"
        return " of the candidates' number" if self.arguments.get("unit") == "layers" else ""

    def _repr_html_(self) -> str:
        a = dict(self.arguments)
        rows = {
            "strategy": self.strategy,
            "frozen": f"{self.n_frozen:,} of {self.n_params:,} parameters, {self.fraction:.2%}; "
            f"{len(self.frozen)} of {len(self.parameters)} tensors",
        }
        asked, reached = a.pop("budget", None), a.pop("reached", None)
        if asked is not None:
            rows |= {"budget asked": share_text(asked) + self._budget_of(), "budget reached": share_text(reached)}
        rows["arguments"] = ", ".join(f"{k}={v}" for k, v in a.items() if v is not None)
        rows["hash"] = self.hash[:12]
        by_kind = shares(self.to_frame(), ["kind", "stage"]).unstack(sort=False)
        text = by_kind.to_html(float_format="{:.0%}".format, na_rep="")
        title = "<p>Frozen share of the parameters, by kind of layer and stage</p>"
        return html_table("FreezeMask", rows) + title + text

    # On disk.

    def to_dict(self) -> dict[str, Any]:
        names = ("strategy", "arguments", "fraction", "hash", "fingerprint", "probe_hash", "frozen", "scores")
        written = {name: getattr(self, name) for name in (*names, "candidates", "parameters")}
        return {"format": FORMAT, **json.loads(json.dumps(written))}  # lists for tuples, as in a file

    @classmethod
    def from_dict(cls, value: Any) -> FreezeMask:
        """Raises GddlabError where `value` is no mask, or was edited so that its hash no longer fits."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise GddlabError("this is no freeze mask: give what FreezeMask.save wrote")
        own = ("frozen", "parameters", "strategy", "arguments", "scores", "probe_hash")
        try:
            # files of older versions have no candidates
            mask = cls(**{name: value[name] for name in own}, candidates=value.get("candidates"))
            fits = (mask.hash, mask.fingerprint) == (value["hash"], value["fingerprint"])
        except GddlabError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise GddlabError(f"this freeze mask is incomplete ({e!r}): give what FreezeMask.save wrote") from None
        if not fits:
            raise GddlabError("this freeze mask was edited: its hash does not fit its names; select it again")
        return mask

    @staticmethod
    def check_place(path: str | Path) -> Path:
        """The file for a mask. Raises GddlabError where another file is."""
        place = path_of("path", path)
        check_kind(place, lambda path: path.is_dir() or holds_format(path, FORMAT), "freeze mask")
        return place

    def save(self, path: str | Path) -> None:
        """Writes JSON atomically. Raises GddlabError where a file is that is no mask; another mask is replaced."""
        write_json(self.check_place(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> FreezeMask:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such file.
            GddlabError: Not a mask, or edited by hand.
        """
        if (name := str(path)) in STRATEGIES and not Path(name).exists():
            raise NotFound(f"mask {name!r} is a strategy, no file: give select_freeze(net, strategy={name!r})")
        value = read_json(path)
        try:
            return cls.from_dict(value)
        except GddlabError as e:
            raise GddlabError(f"{path}: {e}") from None


def check_same_network(mask: FreezeMask, other: FreezeMask) -> None:
    """Refuses what is no mask, or a mask of another architecture."""
    if not isinstance(other, FreezeMask):
        raise GddlabError(f"{shown(other)} is no FreezeMask: give what select_freeze or FreezeMask.load returns")
    if mask.fingerprint != other.fingerprint:
        raise GddlabError(f"masks of {mask.n_params:,} and {other.n_params:,} parameters are for different networks")


def share_text(value: Any) -> str:
    """A share, or one per resolution, in per cent; "" for None; anything else as it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {share_text(v)}" for name, v in value.items())
    if isinstance(value, int | float):
        return f"{value:.2%}"
    return "" if value is None else str(value)


# Blocks, in tables and figures.


def bearer_of(parameter: str) -> str:
    """The layer of a parameter; the parameter itself where a block or the network holds it, no layer (`pos_embed`)."""
    layer = owner_of(parameter)
    return layer if role_of(layer) or not role_of(parameter) else parameter


def part_of(layer: str) -> str:
    """Its path inside its block, without a last number ("conv0", "attn.proj"); outside of blocks its `kind_of`."""
    inside = layer.removeprefix(block_of(layer)).strip(".")
    return re.sub(r"(\.\d+)+$", "", inside) if re.search(r"[^.\d]", inside) else kind_of(layer)


def block_of(layer: str) -> str:
    """The module along depth that a layer belongs to.

    Up to the part of its name with a resolution (EDM), else up to the last number (diffusers, `nn.Sequential`) that is
    none of an MLP's, else itself.
    """
    found = re.match(r"(.*?\d+x\d+_[^.]+)(?:\.|$)", layer) or re.match(r"(.*(?<!\.net)\.\d+)\.[^.]+", layer)
    return found[1] if found else layer


def sizes(frame: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Numbers, and frozen ones, in each group of a mask's frame, in the order of the network: columns size, still."""
    groups = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby(by, sort=False, dropna=False)
    return groups[["size", "still"]].sum()


def shares(frame: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Frozen share of the numbers in each group."""
    table = sizes(frame, by)
    return table["still"] / table["size"]


def label_blocks(ax: Axes, frame: pd.DataFrame, first: float) -> None:
    """Names of blocks below, their stage and resolution above; blocks begin at `first` and are 1 wide."""
    blocks = frame.drop_duplicates("block").assign(layer=lambda f: f["block"], depth=0, n_params=0)
    blocks["stage"] = blocks["stage"].replace(NOWHERE, "")
    rows = rows_of(blocks, blocks["layer"])
    prefix = "model." if all(n.startswith("model.") for n in rows.index) else ""
    known = rows["resolution"].notna()
    paths = [n.removeprefix(prefix).split(".") for n in rows.index]
    short = [".".join(path if path[-1].isdigit() else path[-2:]) for path in paths]  # a layer's own name is enough
    names = [kind_of(n) if inside else s for n, s, inside in zip(rows.index, short, known, strict=True)]
    ax.set_xticks([i + first + 0.5 for i in range(len(rows))], names, rotation=90, fontsize=7)
    ax.set_xlabel("")
    mark_places(ax, rows, [i + first for i in range(len(rows) + 1)], "top", at=1.02)


# How a network is frozen.


class _EvalMode:
    """Replaces `train` of a frozen module, which stays in eval mode while its children follow.

    An object, no function, so that a copied or unpickled network holds its own modules.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.module).train(self.module, mode)
        self.module.training = False
        return self.module


def _freeze(model: nn.Module, frozen: Collection[str]) -> None:
    """Sets `requires_grad` of every parameter, and keeps frozen modules with buffers in eval mode."""
    net = unwrap(model)
    for name, p in net.named_parameters():
        p.requires_grad_(plain_name(name) not in frozen)
    held = _frozen_modules(net, frozen)
    for name, module in named_layers(net).items():
        if name in held:
            module.__dict__["train"] = _EvalMode(module)
            module.training = False
        elif isinstance(module.__dict__.get("train"), _EvalMode):
            del module.__dict__["train"]
            module.training = net.training


def _frozen_modules(model: nn.Module, frozen: Collection[str]) -> set[str]:
    """Names of modules with buffers and nothing to train: all their parameters are frozen.

    Where it has none, like a BatchNorm without weights, those in the nearest module around it that has some.
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


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bytes: NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


# Whether a network fits.


def _unmatched(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Parameters without the same name and shape in both, with a warning; refuses networks that share none."""
    matched = {n for n in mine if other.get(n) == mine[n]}
    if not matched:
        raise GddlabError(
            f"none of the {len(other)} parameters has a name and shape that the mask knows: use mask.transfer(model)"
        )
    out = tuple(n for n in dict.fromkeys((*mine, *other)) if n not in matched)
    if out:
        more = f" and {len(out) - 3} more" if len(out) > 3 else ""
        warn(f"{len(matched)} parameters match the mask, {len(out)} do not: {', '.join(out[:3])}{more}")
    return out


class _Group(NamedTuple):
    """What parameters of two networks have in common; `where` is a resolution or a level, `tensor` "weight" or so."""

    stage: str
    where: int | None
    part: str
    role: str
    tensor: str | None = None

    @property
    def part_only(self) -> _Group:
        return self._replace(tensor=None)

    def __str__(self) -> str:
        place = (self.stage or NOWHERE, NOWHERE if self.where is None else str(self.where), self.part)
        return "/".join([*place, *([self.tensor] if self.tensor else [])])


def _groups(parameters: Parameters, by: str) -> dict[_Group, list[str]]:
    """Names of parameters by what they have in common, in the order of the network."""
    names = [name for name, _ in parameters]
    top = max((r for name in names if (r := stage_and_resolution(owner_of(name))[1]) is not None), default=0)
    out: dict[_Group, list[str]] = {}
    for name in names:
        layer = bearer_of(name)
        stage, where = stage_and_resolution(layer)
        if by == "level" and where is not None:
            where = round(math.log2(top / where))
        group = _Group(stage, where, part_of(layer), role_of(layer), name[len(layer) :].strip("."))
        out.setdefault(group, []).append(name)
    return out


def _by_role(parameters: Parameters, by: str) -> dict[_Group, list[str]]:
    """The same whatever the part of the block, for the roles that rules freeze."""
    place = {name: i for i, (name, _) in enumerate(parameters)}
    out: dict[_Group, list[str]] = {}
    for group, names in _groups(parameters, by).items():
        if group.role in RULES["gdd-i-3"]:
            out.setdefault(group._replace(part=""), []).extend(names)
    return {group: sorted(names, key=place.__getitem__) for group, names in out.items()}


def _twins(names: Iterable[str], others: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each name with one of the others: of the block at the nearest relative depth, and in that likewise."""
    mine, theirs = _in_blocks(names), _in_blocks(others)
    for i, inside in enumerate(mine):
        across = theirs[_nearest(i, len(mine), len(theirs))]
        for j, name in enumerate(inside):
            yield name, across[_nearest(j, len(inside), len(across))]


def _in_blocks(names: Iterable[str]) -> list[list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(block_of(bearer_of(name)), []).append(name)
    return list(out.values())


def _nearest(i: int, n: int, m: int) -> int:
    """Index, among `m` layers, of the relative position nearest to that of layer `i` of `n`; the earlier of two."""
    position = i / (n - 1) if n > 1 else 0.5
    return math.ceil(position * (m - 1) - 0.5)
