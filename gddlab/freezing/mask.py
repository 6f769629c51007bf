"""`FreezeMask`: the one authority on which parameters are frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json, read_json, write_json
from gddlab.freezing import applying, storage
from gddlab.freezing.places import numel, parameter_frame
from gddlab.freezing.tables import diff, mask_html, mask_line, summary
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import owner_of, parameter_table, plain_name, unwrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["FreezeMask", "Parameters", "fingerprint"]

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
            rest = applying.unmatched(dict(self.parameters), dict(self._table(model)))
        else:
            self._check(model)
        applying.freeze(model, set(self.frozen).difference(rest))
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
        changed, n = applying.changed_tensors(model, teacher, self.frozen)
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
        from gddlab.freezing.transfer import transfer

        return transfer(self, _network(model), by)

    def _check(self, model: nn.Module) -> None:
        table = self._table(model)
        if fingerprint(table) != self.fingerprint:
            where = applying.difference(dict(self.parameters), dict(table))
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
        return storage.to_dict(self)

    @classmethod
    def from_dict(cls, value: Any) -> FreezeMask:
        """Raises GddlabError where `value` is no mask, or was edited so that its hash no longer fits."""
        return storage.from_dict(cls, value)

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
