"""`Probe`: measures activations during any forward pass, and leaves the network as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.probing.guard import check_ran, check_seen, eager, exactly, is_compiled
from gddlab.probing.layers import Layer, LayerSelection, inventory, named_layers, select_layers
from gddlab.probing.reductions import (
    FOLLOW,
    Reduction,
    Tap,
    channel_square,
    compiled,
    double,
    follow,
    mean,
    mean_magnitude,
    mean_square,
    one_reading,
)
from gddlab.probing.statistics import DEFAULT, ChannelMoments, Statistic, StatisticSelection, statistic_classes

_LEVELS = (mean_square, mean_magnitude, mean, channel_square)
"""Reductions that are not finite where an activation is not."""


class Probe:
    """Measures layers of a network while it runs, as a context manager.

        sigmas = [80.0, 2.5, 0.002]
        with Probe(net, sigmas, layers="model.enc.*") as p:
            with p.images(4):
                net(x, sigma)           # 12 rows: row 3 * i + s is image i at sigmas[s]
        p.statistics["model.enc.16x16_conv"]["rms"].result()

    Hooks stay until the `with` ends, whatever is raised inside; only these are removed. Passes outside of `images` are
    not measured. The network, its outputs, its modes and others' hooks are not touched. A compiled network runs eagerly
    inside, since compiled code does not call hooks added later.

    Args:
        model: Any network.
        sigmas: Noise levels of the rows of one image, largest first.
        rows_per_level: Rows of an image at each of them, which follow each other, as where several levels are told.
        layers: See `LayerSelection`. Statistics of blocks are taken of each residual block that holds a selected layer.
        stats: Names of statistics, or your own subclasses of `Statistic`.
        per_channel: Also sums each channel's moments, as the statistic "channel_moments".
        compile: Reads activations by compiled code, see `probe`.

    Raises:
        GddlabError: Unknown layer or statistic; a statistic asked for by name that no selected layer has.
            In a pass: a layer that does not run exactly once, returns no tensor, or has another number of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        sigmas: Sequence[float],
        *,
        rows_per_level: int = 1,
        layers: LayerSelection = "conv",
        stats: StatisticSelection = DEFAULT,
        per_channel: bool = False,
        compile: bool = False,
    ):
        self.model, self.rows_per_level = model, rows_per_level
        self.sigmas = [float(s) for s in sigmas]
        descend = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if not self.sigmas or not all(map(math.isfinite, self.sigmas)) or not descend:
            raise GddlabError(f"sigmas={self.sigmas}: give at least one noise level, largest first, each once")
        self.stats: list[type[Statistic]] = [*statistic_classes(stats), *([ChannelMoments] if per_channel else [])]
        modules = named_layers(model)
        known = inventory(model)
        selected = select_layers(model, layers, run=True)
        blocks = {layer.block for layer in selected if layer.block}
        chosen = {layer.name for layer in selected}
        self._plan: dict[str, dict[str, dict[str, Tap]]] = {}
        for name in (n for n in known if n in blocks | chosen):
            for stat in self.stats:
                target = blocks if stat.target == "block" else chosen
                taps = stat.taps(known[name], modules) if name in target else None
                if taps is not None:
                    self._plan.setdefault(name, {})[stat.name] = taps
        measured = {s for by_stat in self._plan.values() for s in by_stat}
        absent = [s for s in self.stats if s.name not in measured]
        if absent and (stats != DEFAULT or not measured):
            raise GddlabError(
                f"statistic {absent[0].name!r} exists for none of the {len(selected)} selected layers "
                f"({absent[0].definition}): choose other layers or statistics"
            )
        self._layers = [known[n] for n in self._plan]
        self._reductions = self._taps()
        chosen_forms = {r for found in self._reductions.values() for r in found}
        self._forms = {r: compiled(r, beside=is_compiled(model)) if compile else r for r in chosen_forms}
        self._modules = {name: modules[name] for name, _ in self._reductions}
        self._hooks: contextlib.ExitStack | None = None
        self._n = 0  # images of the pass being measured; 0 outside of one
        self._reduced: dict[tuple[str, str], dict[Reduction, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets what was measured."""
        classes = {s.name: s for s in self.stats}
        self._statistics: dict[str, dict[str, Statistic]] = {
            layer: {name: classes[name]() for name in by_stat} for layer, by_stat in self._plan.items()
        }
        self._together: dict[tuple[str, ...], Statistic] = {}
        self._nonfinite: dict[tuple[str, str], Tensor] = {}
        self._sizes: dict[str, int] = {}

    @property
    def statistics(self) -> dict[str, dict[str, Statistic]]:
        """What was measured, by layer name and statistic name."""
        for (name, *layers), several in self._together.items():
            for i, layer in enumerate(layers):
                sums = {k: x[i].clone() for k, x in several.sums.items()}  # a view would keep all layers
                self._statistics[layer][name].add(several.samples, **sums)
        self._together.clear()
        return self._statistics

    @property
    def layers(self) -> list[Layer]:
        """What is measured, in the order of the network: the selected layers and the blocks around them."""
        return [
            dataclasses.replace(a, resolution=self._sizes.get(a.name)) if a.resolution is None else a
            for a in self._layers
        ]

    @property
    def n_images(self) -> int:
        """Images measured so far."""
        return max(s.n_images for by_stat in self.statistics.values() for s in by_stat.values())

    def _taps(self) -> dict[tuple[str, str], tuple[Reduction, ...]]:
        """Reductions by module and side."""
        out: defaultdict[tuple[str, str], set[Reduction]] = defaultdict(set)
        for by_stat in self._plan.values():
            for taps in by_stat.values():
                for tap in taps.values():
                    out[tap.module, tap.side].add(tap.reduction)
        for reductions in out.values():
            if not {*reductions, *(part for r in reductions for part in FOLLOW.get(r, ()))} & {*_LEVELS}:
                reductions.add(mean_square)  # a share is finite even where activations are not
        return {key: one_reading(reductions) for key, reductions in out.items()}

    def __enter__(self) -> Probe:
        if self._hooks is not None:
            raise GddlabError("this Probe is already in use: leave its `with` before entering it again")
        with contextlib.ExitStack() as stack:
            stack.enter_context(eager(self.model))
            for name, side in self._reductions:
                hook, module = functools.partial(self._reduce, name, side), self._modules[name]
                register = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
                stack.callback(register(hook, with_kwargs=True).remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hooks is not None
        self._hooks.close()
        self._hooks = None
        self._reduced.clear()

    def _reduce(
        self, name: str, side: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None
    ) -> None:
        """Computes at once: later in-place operations would change an activation kept by reference."""
        if not self._n:
            return
        x: Any = output if side == "output" else next(iter((*args, *kwargs.values())), None)
        rows = self._n * len(self.sigmas) * self.rows_per_level
        each = f", {self.rows_per_level} rows each," if self.rows_per_level > 1 else ""
        levels = f"{len(self.sigmas)} noise levels{each}"
        why = f"{self._n} images at {levels} are {rows} rows: give one per image and noise level"
        check_seen(x, name, side, again=(name, side) in self._reduced, rows=rows, why=why)
        if side == "output" and x.ndim == 4:
            self._sizes[name] = x.shape[-2]
        with exactly(x.device):
            version = None if x.is_inference() else x._version
            before, x = x, x.detach()
            x = x if x.dtype == torch.float64 else x.float()
            found = {}
            for reduction in self._reductions[name, side]:
                try:
                    found[reduction] = self._forms[reduction](x, self._n)
                except ValueError as e:
                    raise GddlabError(f"layer {name!r}: {e}") from None
        if version is not None and before._version != version:
            raise GddlabError(
                f"a statistic of layer {name!r} writes into what it is given, the network's own activation: "
                "copy it first"
            )
        self._reduced[name, side] = found

    @contextlib.contextmanager
    def images(self, n: int) -> Iterator[None]:
        """Measures one forward pass of `n` images, `n * len(sigmas) * rows_per_level` rows.

        Nothing is counted after an error inside.
        """
        if self._hooks is None:
            raise GddlabError("this Probe has no hooks now: call images() inside `with Probe(...) as p:`")
        if n < 1:
            raise GddlabError(f"n={n} images in a pass: give at least 1")
        self._reduced.clear()
        self._n = n
        try:
            yield
        finally:
            self._n = 0
        check_ran([name for name, _ in self._reductions.keys() - self._reduced.keys()])
        self._count()
        self._reduced.clear()

    def _count(self) -> None:
        """Adds the pass to the statistics; rows that are not finite become NaN in each of them.

        Layers whose reductions have equal shapes are counted together: there are hundreds, of a few numbers each.
        """
        alike: defaultdict[tuple[Any, ...], list[tuple[str, str]]] = defaultdict(list)
        for key, found in self._reduced.items():
            alike[tuple((r, x.shape, x.device) for r, x in found.items())].append(key)
        place = {key: (group, i) for group, keys in enumerate(alike.values()) for i, key in enumerate(keys)}
        groups = []
        for keys in alike.values():
            several = {r: torch.stack([self._reduced[key][r] for key in keys]) for r in self._reduced[keys[0]]}
            several = {r: x.cpu().double() if x.device.type == "mps" else double(x) for r, x in several.items()}
            several |= follow(several)
            level = next(several[r] for r in _LEVELS if r in several)
            level = level.mean(-1) if level.ndim == 4 else level  # of channels
            bad = ~level.isfinite()  # (layers, n, S)
            for r, x in several.items():
                if x.shape[:3] == bad.shape:
                    several[r] = torch.where(bad.reshape(*bad.shape, *[1] * (x.ndim - 3)), torch.nan, x)
            for key, count in zip(keys, bad.sum(1), strict=True):
                self._add_nonfinite(key, count)
            groups.append(several)
        together: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for layer, by_stat in self._plan.items():
            for name, taps in by_stat.items():
                same = tuple((role, t.reduction, place[t.module, t.side][0]) for role, t in taps.items())
                own = type(self._statistics[layer][name]).update is not Statistic.update  # counts one layer at a time
                together[name, same, layer if own else None].append(layer)
        for (name, same, own), layers in together.items():
            reduced = {}
            for role, reduction, group in same:
                rows = [place[t.module, t.side][1] for t in (self._plan[layer][name][role] for layer in layers)]
                x = groups[group][reduction]
                x = x if rows == list(range(len(x))) else torch.stack([x[i] for i in rows])
                reduced[role] = x.flatten(0, 1)
            if own:
                self._statistics[own][name].update(**reduced)
                continue
            kind = type(self._statistics[layers[0]][name])
            samples, sums = kind().totals(len(layers), **reduced)
            self._together.setdefault((name, *layers), kind()).add(samples, **sums)

    def _add_nonfinite(self, key: tuple[str, str], count: Tensor) -> None:
        self._nonfinite[key] = self._nonfinite[key] + count if key in self._nonfinite else count

    def nonfinite(self) -> list[dict[str, Any]]:
        """Where activations were NaN, infinite or too large to square: layer, side, sigma, number of images."""
        return [
            {"layer": name, "side": side, "sigma": sigma, "images": int(count)}
            for (name, side), counts in self._nonfinite.items()
            for sigma, count in zip(self.sigmas, counts.view(-1, self.rows_per_level).amax(1).tolist(), strict=True)
            if count
        ]

    def state(self) -> dict[str, Any]:
        """What it has measured, on the CPU; for `add` in another process."""
        sums = {
            layer: {name: (stat.samples, {k: v.cpu() for k, v in stat.sums.items()}) for name, stat in by.items()}
            for layer, by in self.statistics.items()
        }
        return {"sums": sums, "nonfinite": {k: v.cpu() for k, v in self._nonfinite.items()}, "sizes": self._sizes}

    def add(self, state: dict[str, Any]) -> None:
        """Adds the `state` of another probe of the same layers, statistics and noise levels."""
        for layer, by in state["sums"].items():
            for name, (samples, sums) in by.items():
                self.statistics[layer][name].add(samples, **sums)
        for key, count in state["nonfinite"].items():
            self._add_nonfinite(key, count)
        self._sizes |= state["sizes"]

    def merge(self, other: Probe) -> None:
        """Adds what another probe of the same network, layers and statistics has measured on other images.

        Raises:
            GddlabError: The probes do not measure the same.
        """
        ours, theirs = (
            {n: {k: type(s) for k, s in by.items()} for n, by in p.statistics.items()} for p in (self, other)
        )
        if ours != theirs or (self.sigmas, self.rows_per_level) != (other.sigmas, other.rows_per_level):
            raise GddlabError("these probes measure different layers, statistics or noise levels: merge equal ones")
        self.add(other.state())
