"""`FreezeMask`: the one authority on which parameters are frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json, read_json, write_json
from gddlab.freezing.bits import same_bits, tensors_of
from gddlab.probing.layers import kind_of, parameter_table, place, plain_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["FORMAT", "FreezeMask", "Parameters", "fingerprint"]

FORMAT = "gddlab-mask-1"
Parameters = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a network's parameters, in its order, without `map_augment`."""


def fingerprint(parameters: Parameters) -> str:
    """sha256 over sorted names and shapes: teacher and student of one architecture have the same."""
    return hash_json(sorted([name, list(shape)] for name, shape in parameters))


@dataclass(frozen=True)
class FreezeMask:
    """Which parameters of a network stay as the teacher has them.

    A mask made for a teacher fits its student: `map_augment`, which students drop, belongs to neither. What
    DistributedDataParallel and torch.compile put in front of names does not matter.

    Attributes:
        frozen: Names of the frozen parameters, relative to the `Precond`, in the order of the network.
        parameters: Names and shapes of all parameters of the network, without `map_augment`.
        strategy: How it was chosen.
        arguments: Of the strategy, and what it reached; JSON.
        scores: By layer, where layers were ordered by a measurement.
        probe_hash: `ProbeResult.hash` of that measurement.

    Raises:
        GddlabError: A frozen name is not among the parameters.
    """

    frozen: tuple[str, ...]
    parameters: Parameters = field(repr=False)
    strategy: str = "custom"
    arguments: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] | None = field(default=None, repr=False)
    probe_hash: str | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parameters]
        wanted = {plain_name(name) for name in self.frozen}
        for name in wanted.difference(names):
            raise unknown("parameter", name, names)
        object.__setattr__(self, "frozen", tuple(n for n in names if n in wanted))
        object.__setattr__(self, "parameters", tuple((n, tuple(shape)) for n, shape in self.parameters))

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
        return sum(_numel(shape) for _, shape in self.parameters)

    @property
    def n_frozen(self) -> int:
        """Numbers in frozen parameters."""
        frozen = set(self.frozen)
        return sum(_numel(shape) for name, shape in self.parameters if name in frozen)

    @property
    def fraction(self) -> float:
        """Frozen share of all parameters."""
        return self.n_frozen / self.n_params

    def apply(self, model: nn.Module) -> None:
        """Frozen parameters stop requiring gradients, all others require them, whatever was before.

        Raises:
            GddlabError: `model` is another architecture.
        """
        self._check(model)
        frozen = set(self.frozen)
        for name, p in model.named_parameters():
            p.requires_grad_(plain_name(name) not in frozen)

    def trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names, in the order of the network: what an optimiser gets.

        Raises:
            GddlabError: `model` is another architecture.
        """
        self._check(model)
        frozen = set(self.frozen)
        named = ((plain_name(name), p) for name, p in model.named_parameters())
        return [(name, p) for name, p in named if name not in frozen]

    def verify(self, model: nn.Module, teacher: nn.Module) -> None:
        """Compares frozen parameters, and buffers of the modules that own them, with the teacher's, bit by bit.

        Raises:
            GddlabError: Some differ; it names them. Or one network is another architecture.
        """
        self._check(model)
        self._check(teacher)
        ours, theirs = tensors_of(model), tensors_of(teacher)
        owners = {name.rpartition(".")[0] for name in self.frozen}
        buffers = [plain_name(n) for n, _ in model.named_buffers()]
        names = [*self.frozen, *(n for n in buffers if n.rpartition(".")[0] in owners and n in theirs)]
        changed = [n for n in names if not same_bits(ours[n], theirs[n])]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise GddlabError(
                f"{len(changed)} of {len(names)} frozen tensors differ from the teacher's: {', '.join(changed[:5])}{more}"
            )

    def _check(self, model: nn.Module) -> None:
        table = parameter_table(model)
        if fingerprint(table) == self.fingerprint:
            return
        mine, other = dict(self.parameters), dict(table)
        shapes = (n for n in mine if n in other and mine[n] != other[n])
        if (name := next((n for n in mine if n not in other), None)) is not None:
            where = f"it has no {name}"
        elif (name := next((n for n in other if n not in mine), None)) is not None:
            where = f"the mask does not know its {name}"
        else:
            name = next(shapes)
            where = f"{name} is {other[name]}, not {mine[name]}"
        raise GddlabError(
            f"this mask is for another network ({self.n_params:,} parameters; {where}): select one for this network"
        )

    def summary(self) -> pd.DataFrame:
        """Parameters, frozen parameters and their share, by stage of the network and kind of layer, with a total."""
        import pandas as pd

        frozen = set(self.frozen)
        rows = []
        for name, shape in self.parameters:
            owner, size = name.rpartition(".")[0], _numel(shape)
            rows.append((place(owner)[0] or "-", kind_of(owner), size, size if name in frozen else 0))
        frame = pd.DataFrame(rows, columns=["stage", "kind", "parameters", "frozen"])
        table = frame.groupby(["stage", "kind"], sort=False).sum()
        table.loc[("total", ""), :] = table.sum()
        table = table.astype("int64")
        table["share"] = table["frozen"] / table["parameters"]
        return table

    def diff(self, other: FreezeMask) -> pd.DataFrame:
        """Parameters that one mask freezes and the other trains: columns parameter, size, self, other.

        Raises:
            GddlabError: `other` is for another architecture.
        """
        import pandas as pd

        if self.fingerprint != other.fingerprint:
            raise GddlabError(
                f"masks of {self.n_params:,} and {other.n_params:,} parameters are for different networks"
            )
        mine, theirs = set(self.frozen), set(other.frozen)
        words = {True: "frozen", False: "trained"}
        rows = [
            (name, _numel(shape), words[name in mine], words[name in theirs])
            for name, shape in self.parameters
            if (name in mine) != (name in theirs)
        ]
        return pd.DataFrame(rows, columns=["parameter", "size", "self", "other"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws each block's share of all parameters along depth, frozen and trained."""
        from gddlab.freezing.plots import draw_mask

        return draw_mask(self, ax)

    def to_dict(self) -> dict[str, Any]:
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
            )
            fits = (mask.hash, mask.fingerprint) == (value["hash"], value["fingerprint"])
        except (KeyError, TypeError) as e:
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
        try:
            return cls.from_dict(read_json(path))
        except FileNotFoundError:
            raise
        except GddlabError as e:
            raise GddlabError(f"{path}: {e}") from None

    def _repr_html_(self) -> str:
        arguments = ", ".join(f"{k}={v}" for k, v in self.arguments.items())
        text = (
            f"FreezeMask {self.hash[:12]}: {self.strategy}({arguments}), "
            f"{self.n_frozen:,} of {self.n_params:,} parameters frozen ({self.fraction:.2%})"
        )
        table = self.summary()
        return f"<p>{escape(text)}</p>" + table.to_html(formatters={"share": "{:.1%}".format})


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
