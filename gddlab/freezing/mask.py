"""`FreezeMask`: the one authority on which parameters are frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json, read_json, write_json
from gddlab.freezing.tables import NOWHERE, Parameters, fingerprint, html_table, numel, parameter_frame, shares
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import (
    kind_of,
    named_layers,
    named_tensors,
    owner_of,
    parameter_table,
    plain_name,
    stage_and_resolution,
    unwrap,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMAT = "gddlab-mask-1"


@dataclass(frozen=True)
class FreezeMask:
    """Which parameters of a network stay as the teacher has them.

    A mask made for a teacher fits its student: `map_augment`, which students drop, belongs to neither; the embedding
    of a target time, which some students add (`map_target0`, `map_target1`), is trained. Prefixes that
    DistributedDataParallel and torch.compile put before names do not matter.

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
            GddlabError: `model` is another architecture; with `force`, nothing matches.
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
        table = self._table(model)
        if fingerprint(table) != self.fingerprint:
            where = _difference(dict(self.parameters), dict(table))
            raise GddlabError(
                f"this mask is for another network ({self.n_params:,} parameters; {where}): select one for this network"
            )

    def _table(self, model: nn.Module) -> Parameters:
        """Parameters of `model`, without those that a student with a target time adds to its teacher's."""
        known = dict(self.parameters)
        table = parameter_table(_network(model))
        return tuple((n, shape) for n, shape in table if n in known or set(TARGET_LAYERS).isdisjoint(n.split(".")))

    # For another architecture.

    def transfer(self, model: nn.Module, *, by: str = "resolution") -> FreezeMask:
        """The mask's decisions for another architecture.

        Each parameter takes the decision of this network's parameter of equal stage, resolution, kind of layer and name
        (weight, bias), at the nearest relative position among these. What has no such counterpart is trained, and
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
        parameters = parameter_table(_network(model))
        theirs, ours = _groups(self.parameters, by), _groups(parameters, by)
        kinds = {key[:3] for key in theirs}
        decided, sizes = set(self.frozen), {name: numel(shape) for name, shape in parameters}
        frozen: list[str] = []
        unmapped: list[str] = []
        lost: list[str] = []
        for key, names in ours.items():
            if key not in theirs:
                parts = key if key[:3] in kinds else key[:3]  # a single tensor, or the whole kind of layer
                unmapped.append("/".join(str(part or NOWHERE) if part != 0 else "0" for part in parts))
                lost += names
                continue
            twins = theirs[key]
            frozen += [n for i, n in enumerate(names) if twins[_nearest(i, len(names), len(twins))] in decided]
        mapped = 1 - sum(sizes[n] for n in lost) / sum(sizes.values())
        if not mapped:
            raise GddlabError(
                f"no parameter of this network has a counterpart by {by} in the mask's: select a mask for it"
            )
        arguments = {
            "strategy": self.strategy,
            "mask": self.hash,
            "by": by,
            "mapped": mapped,
            "n_unmapped": len(lost),
            "unmapped": list(dict.fromkeys(unmapped)),
        }
        return FreezeMask(tuple(frozen), parameters, "transfer", arguments).with_reached()

    # In tables and words.

    def with_reached(self) -> FreezeMask:
        """Notes the frozen share among the arguments, unless the strategy has noted what it reached."""
        self.arguments.setdefault("reached", self.fraction)
        return self

    def to_frame(self) -> pd.DataFrame:
        """One row per parameter: columns parameter, block, stage, resolution (pixels), kind, size (numbers), frozen."""
        return parameter_frame(self.parameters, self.frozen)

    def summary(self) -> pd.DataFrame:
        """Parameters, frozen parameters and their share, by stage of the network and kind of layer, with a total."""
        frame = self.to_frame().rename(columns={"size": "parameters", "frozen": "still"})
        frame["frozen"] = frame["parameters"].where(frame["still"], 0)
        table = frame.groupby(["stage", "kind"], sort=False)[["parameters", "frozen"]].sum()
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

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws each block's share of all parameters along depth, frozen and trained."""
        from gddlab.freezing.plots import draw_mask

        return draw_mask(self, ax)

    def __str__(self) -> str:
        details = [f"{len(self.frozen)} of {len(self.parameters)} tensors"]
        if (asked := self.arguments.get("budget")) is not None:
            reached = share_text(self.arguments.get("reached"))
            details.append(f"budget {share_text(asked)}{self._budget_of()}, reached {reached}")
        frozen = f"{self.fraction:.2%} of {self.n_params:,} parameters frozen"
        return f"{self.strategy}: {frozen} ({'; '.join(details)})"

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
        candidates = self.candidates
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "arguments": self.arguments,
            "fraction": self.fraction,
            "hash": self.hash,
            "fingerprint": self.fingerprint,
            "probe_hash": self.probe_hash,
            "frozen": list(self.frozen),
            "scores": self.scores,
            "candidates": None if candidates is None else {name: list(layers) for name, layers in candidates.items()},
            "parameters": [[name, list(shape)] for name, shape in self.parameters],
        }

    @classmethod
    def from_dict(cls, value: Any) -> FreezeMask:
        """Raises GddlabError where `value` is no mask, or was edited so that its hash no longer fits."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise GddlabError("this is no freeze mask: give what FreezeMask.save wrote")
        try:
            mask = cls(
                frozen=tuple(value["frozen"]),
                parameters=tuple((name, tuple(shape)) for name, shape in value["parameters"]),
                strategy=value["strategy"],
                arguments=value["arguments"],
                scores=value["scores"],
                probe_hash=value["probe_hash"],
                candidates=value.get("candidates"),  # files of older versions have none
            )
            fits = (mask.hash, mask.fingerprint) == (value["hash"], value["fingerprint"])
        except GddlabError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise GddlabError(f"this freeze mask is incomplete ({e!r}): give what FreezeMask.save wrote") from None
        if not fits:
            raise GddlabError("this freeze mask was edited: its hash does not fit its names; select it again")
        return mask

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
        value = read_json(path)
        try:
            return cls.from_dict(value)
        except GddlabError as e:
            raise GddlabError(f"{path}: {e}") from None


def check_same_network(mask: FreezeMask, other: FreezeMask) -> None:
    """Refuses what is no mask, or a mask of another architecture."""
    if not isinstance(other, FreezeMask):
        raise GddlabError(f"{other!r} is no FreezeMask: give what select_freeze or FreezeMask.load returns")
    if mask.fingerprint != other.fingerprint:
        raise GddlabError(f"masks of {mask.n_params:,} and {other.n_params:,} parameters are for different networks")


def share_text(value: Any) -> str:
    """A share, or one per resolution, in per cent; "" for None; anything else as it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {share_text(v)}" for name, v in value.items())
    if isinstance(value, int | float):
        return f"{value:.2%}"
    return "" if value is None else str(value)


# How a network is frozen.


class _EvalMode:
    """Replaces the `train` method of a frozen module: the module stays in eval mode, its children follow.

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
    """Names of modules with buffers and nothing to train.

    All parameters of such a module are frozen. Where it has none, like a BatchNorm without weights, all parameters in
    the nearest module around it that has some are frozen.
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


def _network(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise GddlabError(f"model is a {type(model).__name__}: give a network, an nn.Module")
    return model


def _difference(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str:
    """The first difference between the mask's parameters and another network's, given that there is one."""
    if (name := next((n for n in mine if n not in other), None)) is not None:
        return f"it has no {name}"
    if (name := next((n for n in other if n not in mine), None)) is not None:
        return f"the mask does not know its {name}"
    name = next(n for n in mine if mine[n] != other[n])
    return f"{name} is {other[name]}, not {mine[name]}"


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
        warnings.warn(
            f"{len(matched)} parameters match the mask, {len(out)} do not: {', '.join(out[:3])}{more}", stacklevel=3
        )
    return out


def _groups(parameters: Parameters, by: str) -> dict[tuple[str, int | None, str, str], list[str]]:
    """Names by stage, resolution or level, kind of layer, and last part of the name, in the order of the network."""
    names = [name for name, _ in parameters]
    top = max((r for name in names if (r := stage_and_resolution(owner_of(name))[1]) is not None), default=0)
    out: dict[tuple[str, int | None, str, str], list[str]] = {}
    for name in names:
        layer = owner_of(name)
        stage, where = stage_and_resolution(layer)
        if by == "level" and where is not None:
            where = round(math.log2(top / where))
        out.setdefault((stage, where, kind_of(layer), name[len(layer) :].strip(".")), []).append(name)
    return out


def _nearest(i: int, n: int, m: int) -> int:
    """Index, among `m` layers, of the relative position nearest to that of layer `i` of `n`; the earlier of two."""
    position = i / (n - 1) if n > 1 else 0.5
    return math.ceil(position * (m - 1) - 0.5)
