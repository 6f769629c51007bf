"""`Probe`: measures activations during any forward pass, and leaves the network as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.probing.attention import Softmaxes
from gddlab.probing.guard import check_ran, check_seen, eager, exactly, is_compiled
from gddlab.probing.layers import (
    Layer,
    LayerSelection,
    inventory,
    named_layers,
    select_layers,
    transformer_blocks,
)
from gddlab.probing.reductions import (
    FOLLOW,
    Reduction,
    Tap,
    band_share,
    channel_square,
    compiled,
    double,
    follow,
    mean,
    mean_magnitude,
    mean_over_calls,
    mean_square,
    mean_square_between,
    one_reading,
)
from gddlab.probing.sites import (
    IMAGE,
    Calls,
    Site,
    View,
    Window,
    again,
    ancestors,
    arranged,
    check_branch,
    check_stream,
    innermost,
    is_attention,
    named_in,
    on_grid,
    version_of,
)
from gddlab.probing.statistics import DEFAULT, ChannelMoments, Statistic, StatisticSelection, statistic_classes

_LEVELS = (mean_square, mean_magnitude, mean, channel_square)
"""Reductions that are not finite where an activation is not."""


class _Place(NamedTuple):
    """What reductions are taken of: an input or output, or how far it is from an earlier one of the same stream."""

    module: str
    side: str
    before: tuple[str, str] | None = None
    stream: str = ""

    @classmethod
    def of(cls, tap: Tap) -> _Place:
        return cls(tap.module, tap.side, tap.before, tap.stream if tap.before else "")


class _Read(NamedTuple):
    """Which of the readings of a place."""

    call: int
    stream: str
    branch: str


class _Held:
    """A tensor that a later one is compared with, kept by reference until that has been seen."""

    def __init__(self, x: Tensor, readers: set[_Place]):
        self.version = version_of(x)
        self.x = x if self.version is not None else x.clone()  # inference mode does not tell of changes
        self.readers = readers


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
        branch: Guidance branch, by the denoiser's own `branches`, or "all".
        stream: "image" or "context" of layers that hold both, or "all".
        calls: Of a layer that runs several times in one call of the network: "each", the "mean" over them, "first" or
            "last".
        compile: Reads activations by compiled code, see `probe`.

    Attributes:
        sites: By key, each `Site` that was measured: what `statistics` is of. The key of a layer's first run, of the
            image and of the branch "cond" is the layer's name.
        not_run: Layers that a preset or glob brought and that cannot be measured, and why.

    Raises:
        GddlabError: Unknown layer or statistic; a statistic asked for by name that no selected layer has.
            In a pass: a layer named in `layers` that does not run, or returns no tensor; one with another number of
            rows; a stream that the network changes in place while it is compared.
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
        branch: str = "cond",
        stream: str = IMAGE,
        calls: Calls = "each",
        compile: bool = False,
    ):
        self.model, self.rows_per_level = model, rows_per_level
        self.branch, self.stream, self.calls = branch, stream, calls
        self.sigmas = [float(s) for s in sigmas]
        descend = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if not self.sigmas or not all(map(math.isfinite, self.sigmas)) or not descend:
            raise GddlabError(f"sigmas={self.sigmas}: give at least one noise level, largest first, each once")
        self._window = Window(model)
        check_branch(branch, self._window.names)
        check_stream(stream)
        self.stats: list[type[Statistic]] = [*statistic_classes(stats), *([ChannelMoments] if per_channel else [])]
        self._modules = named_layers(model)
        known = inventory(model)
        layers = again(layers)
        selected = select_layers(model, layers, run=True)
        self._named = named_in(layers)
        chosen = {layer.name for layer in selected}
        blocks = {layer.block for layer in selected if layer.block}
        around = {a for name in chosen for a in (name, *ancestors(name))}
        tokens = set(transformer_blocks(self._modules))
        blocks |= around & tokens
        attentions: set[str] = set()
        if any(s.target == "attention" for s in self.stats):
            attentions = {a for a in known if is_attention(self._modules[a])}
            attentions = {a for a in attentions if a in around or not chosen.isdisjoint(ancestors(a))}
        self._plan: dict[str, dict[str, list[dict[str, Tap]]]] = {}
        for name in (n for n in known if n in blocks | chosen | attentions):
            for stat in self.stats:
                target = {"block": blocks, "attention": attentions}.get(stat.target, chosen)
                layer = dataclasses.replace(known[name], block=innermost(name, tokens) or known[name].block)
                taps = stat.taps(layer, self._modules) if name in target else None
                lines = [] if taps is None else taps if isinstance(taps, list) else [taps]
                if lines := [by for by in lines if all(self._wants(tap.stream) for tap in by.values())]:
                    self._plan.setdefault(name, {})[stat.name] = lines
        measured = {s for by_stat in self._plan.values() for s in by_stat}
        names = {s.name for s in self.stats}
        self._asked = names - {*DEFAULT} if names >= {*DEFAULT} else names  # all of them mean those that there are
        self._check_measured(measured, len(selected))
        self._known = {n: known[n] for n in self._plan}
        self._reductions = self._taps()
        chosen_forms = {r for found in self._reductions.values() for r in found}
        self._forms = {r: compiled(r, beside=is_compiled(model)) if compile else r for r in chosen_forms}
        self._ends: dict[tuple[str, str], list[_Place]] = {}
        self._readers: dict[tuple[str, str], set[_Place]] = {}
        for place in self._reductions:
            self._ends.setdefault((place.module, place.side), []).append(place)
            if place.before is not None:
                self._ends.setdefault(place.before, [])
                self._readers.setdefault(place.before, set()).add(place)
        self._views = {name: View(name, self._modules, self._window, innermost(name, tokens)) for name, _ in self._ends}
        self._types = {name: known[name].type for name, _ in self._ends if name in known}
        self._hooks: contextlib.ExitStack | None = None
        self._n = 0  # images of the pass being measured; 0 outside of one
        self._reduced: dict[tuple[_Place, _Read], dict[Reduction, Tensor]] = {}
        self._held: dict[tuple[str, str, str], _Held] = {}
        self._ran: set[tuple[str, str]] = set()
        self._left: set[tuple[str, str]] = set()
        self._open: list[str] = []  # attention modules that run now, the innermost last
        self._passed = False
        self.not_run: dict[str, str] = {}
        self.sites: dict[str, Site] = {}
        self.reset()

    def _check_measured(self, measured: set[str], selected: int) -> None:
        absent = [s for s in self.stats if s.name not in measured and (s.name in self._asked or not measured)]
        if absent:
            raise GddlabError(
                f"statistic {absent[0].name!r} exists for none of the {selected} selected layers "
                f"({absent[0].definition}): choose other layers or statistics"
            )

    def _wants(self, stream: str) -> bool:
        return not stream or self.stream in ("all", stream)

    def reset(self) -> None:
        """Forgets what was measured."""
        self._statistics: dict[str, dict[str, Statistic]] = {}
        self._together: dict[tuple[str, ...], Statistic] = {}
        self._nonfinite: dict[tuple[str, str], Tensor] = {}
        self._sizes: dict[str, int] = {}

    @property
    def statistics(self) -> dict[str, dict[str, Statistic]]:
        """What was measured, by the key of the site, see `sites`, and statistic name."""
        self._separate()
        return self._statistics

    def _separate(self) -> None:
        """Gives each layer its part of what was counted together."""
        for (name, *keys), several in self._together.items():
            for i, key in enumerate(keys):
                sums = {k: x[i].clone() for k, x in several.sums.items()}  # a view would keep all layers
                self._statistic(key, name).add(several.samples, **sums)
        self._together.clear()

    def _statistic(self, key: str, name: str) -> Statistic:
        by_name = self._statistics.setdefault(key, {})
        if name not in by_name:
            by_name[name] = next(s for s in self.stats if s.name == name)()
        return by_name[name]

    @property
    def planned(self) -> list[Layer]:
        """What is to be measured, in the order of the network: the selected layers and the blocks around them."""
        return [
            dataclasses.replace(a, resolution=self._sizes.get(a.name)) if a.resolution is None else a
            for a in self._known.values()
        ]

    @property
    def layers(self) -> list[Layer]:
        """What was measured, in the order of the network: `planned` by site, called by its key."""
        if not self.sites:
            return self.planned
        by_layer: defaultdict[str, list[tuple[str, Site]]] = defaultdict(list)
        for key, site in self.sites.items():
            by_layer[site.layer].append((key, site))
        return [
            dataclasses.replace(layer, name=key)
            for layer in self.planned
            for key, _ in sorted(by_layer[layer.name], key=lambda found: self._rank(found[1]))
        ]

    def _rank(self, site: Site | _Read) -> tuple[int, bool, str, int]:
        """Order of the sites of a layer: the branch measured by default first, the image's stream first."""
        names = self._window.names
        where = names.index(site.branch) if site.branch in names else len(names)
        return where if site.branch != "cond" else -1, site.stream not in ("", IMAGE), site.stream, site.call

    @property
    def n_images(self) -> int:
        """Images measured so far."""
        return max((s.n_images for by_stat in self.statistics.values() for s in by_stat.values()), default=0)

    def _taps(self) -> dict[_Place, tuple[Reduction, ...]]:
        """Reductions by place."""
        out: defaultdict[_Place, set[Reduction]] = defaultdict(set)
        for by_stat in self._plan.values():
            for tap in (tap for lines in by_stat.values() for taps in lines for tap in taps.values()):
                out[_Place.of(tap)].add(tap.reduction)
        for reductions in out.values():
            if not {*reductions, *(part for r in reductions for part in FOLLOW.get(r, ()))} & {*_LEVELS}:
                reductions.add(mean_square)  # a share is finite even where activations are not
        return {key: one_reading(reductions) for key, reductions in out.items()}

    def __enter__(self) -> Probe:
        if self._hooks is not None:
            raise GddlabError("this Probe is already in use: leave its `with` before entering it again")
        with contextlib.ExitStack() as stack:
            stack.enter_context(eager(self.model))
            for remove in self._window.hooks():
                stack.callback(remove)
            for name, side in self._ends:
                if side == "attention":
                    stack.callback(self._modules[name].register_forward_pre_hook(self._opens(name)).remove)
                    stack.callback(self._modules[name].register_forward_hook(self._closes, always_call=True).remove)
                    continue
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
        self._held.clear()

    def _reduce(
        self, name: str, side: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None
    ) -> None:
        """Computes at once: later in-place operations would change an activation kept by reference."""
        if not self._n or (name, side) in self._left:
            return
        call = self._window.run((name, side))
        if call is None:
            return
        view, branches = self._views[name], self._window.branches
        self._ran.add((name, side))
        whole: Any = output if side == "output" else next(iter((*args, *kwargs.values())), None)
        found = view.output(output) if side == "output" else view.input(args, kwargs)
        if found is None and self._may_leave(name):
            self._leave(name, side, f"has a {type(whole).__name__} as its {side}, no tensor")
            return
        if self.calls == "first" and call > 1 and branches:
            return
        rows = self._n * len(self.sigmas) * self.rows_per_level
        each = f", {self.rows_per_level} rows each," if self.rows_per_level > 1 else ""
        levels = f"{len(self.sigmas)} noise levels{each}"
        why = f"{self._n} images at {levels} are {rows} rows: give one per image and noise level"
        if len(branches) > 1:
            why += f", for each of the guidance branches {', '.join(branches)}"
        for stream, x in [("", whole)] if found is None else found:
            check_seen(x, name, side, again=not branches, rows=rows * max(1, len(branches)), why=why)
            if self._wants(stream):
                self._see(name, side, call, stream, x, view)

    def _opens(self, name: str) -> Callable[..., None]:
        return lambda *_: self._open.append(name)

    def _closes(self, *_: Any) -> None:
        self._open.pop()

    def _rows_of_attention(self) -> int | None:
        """Rows of the attention that runs now, if it is measured."""
        return self._window.expected() if self._n and self._open and not self._window.closed else None

    def _attends(self, entropy: Tensor) -> None:
        """Takes the entropies of the attention that runs now, (B, heads, queries)."""
        name = self._open[-1]
        call = self._window.run((name, "attention"))
        if call is None or (self.calls == "first" and call > 1):
            return
        self._ran.add((name, "attention"))
        rows = self._window.expected()
        why = f"the pass has {rows} rows: leave attention_entropy out of stats="
        check_seen(entropy, name, "attention", again=not self._window.branches, rows=rows, why=why)
        view = self._views[name]
        for stream, x in view.queries(entropy):
            if self._wants(stream):
                self._see(name, "attention", call, stream, x.mean(-1), view)

    def _see(self, name: str, side: str, call: int, stream: str, x: Tensor, view: View) -> None:
        """Reduces one stream of one run of a module."""
        version = version_of(x)
        earlier = self._earlier(name, side, stream, x)
        with exactly(x.device):
            for i, (branch, part) in enumerate(self._window.parts(x)):
                if self.branch not in ("all", branch):
                    continue
                y = arranged(part.detach(), view.axis)
                y = y if y.dtype == torch.float64 else y.float()
                grid = view.grid(part, stream)
                if side == "output" and stream in ("", IMAGE) and (grid or (x.ndim == 4 and view.axis != -1)):
                    self._sizes[name] = grid[0] if grid else x.shape[-2]
                read, moved = _Read(call, stream, branch), {}
                for place in self._ends[name, side]:
                    if place.stream not in ("", stream) and stream:
                        continue
                    if place.before is None:
                        self._reduced[place, read] = self._numbers(name, place, y, grid)
                    elif place in earlier:
                        past = self._window.parts(earlier[place])[i][1]
                        past = arranged(past.detach(), view.axis)
                        past = past if past.dtype == torch.float64 else past.float()
                        if self._reductions[place] == (mean_square,) and y.ndim < 4:
                            moved[place] = past
                        else:
                            self._reduced[place, read] = self._numbers(name, place, y - past, grid)
                if moved:
                    between = mean_square_between(y, [*moved.values()], self._n)
                    self._reduced |= {(p, read): {mean_square: x} for p, x in zip(moved, between, strict=True)}
        if version is not None and x._version != version:
            raise GddlabError(
                f"a statistic of layer {name!r} writes into what it is given, the network's own activation: "
                "copy it first"
            )
        if readers := {r for r in self._readers.get((name, side), ()) if not stream or r.stream in ("", stream)}:
            self._held[name, side, stream] = _Held(x, readers)

    def _numbers(self, name: str, place: _Place, x: Tensor, grid: tuple[int, int] | None) -> dict[Reduction, Tensor]:
        found = {}
        for reduction in self._reductions[place]:
            seen = x
            if reduction is band_share and x.ndim != 4:
                if grid is None and (self._views[name].tokens or self._types.get(name) not in ("conv", "block")):
                    continue  # tokens without a place in the image
                seen = x if grid is None else on_grid(x, grid)
            try:
                found[reduction] = self._forms[reduction](seen, self._n)
            except ValueError as e:
                raise GddlabError(f"layer {name!r}: {e}") from None
        return found

    def _earlier(self, name: str, side: str, stream: str, x: Tensor) -> dict[_Place, Tensor]:
        """Tensors that this one is compared with, by place; those that nothing else needs are released."""
        out: dict[_Place, Tensor] = {}
        for place in self._ends[name, side]:
            if place.before is None or (place.stream not in ("", stream) and stream):
                continue
            for key in {(*place.before, stream), (*place.before, place.stream), (*place.before, "")}:
                held = self._held.get(key)
                if held is None or place not in held.readers:
                    continue
                if held.version is not None and held.x._version != held.version:
                    raise GddlabError(
                        f"the network writes into the {key[1]} of {key[0]!r} before {name!r} has run, so how far the "
                        "stream moves between them cannot be measured: leave rel_update out of stats="
                    )
                if held.x.shape != x.shape:
                    raise GddlabError(
                        f"the stream is {tuple(held.x.shape)} at {key[0]!r} and {tuple(x.shape)} at {name!r}: leave "
                        "rel_update out of stats="
                    )
                out[place] = held.x
                held.readers.discard(place)
                if not held.readers:
                    del self._held[key]
        return out

    def _may_leave(self, name: str) -> bool:
        """Whether a layer was not asked for by name, and no pass has measured it."""
        return not self._named(name) and not self._passed

    def _leave(self, name: str, side: str, why: str) -> None:
        self.not_run[name] = why
        self._left.add((name, side))

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
        self._held.clear()
        self._ran.clear()
        self._n = n
        self._window.start(n * len(self.sigmas) * self.rows_per_level)
        reads_attention = any(side == "attention" for _, side in self._ends)
        try:
            with Softmaxes(self._rows_of_attention, self._attends) if reads_attention else contextlib.nullcontext():
                yield
        finally:
            self._n = 0
            self._held.clear()
            self._open.clear()
        for name, side in (place for place in self._ends if place not in self._ran | self._left):
            if side == "attention" and self._may_leave(name):
                self._leave(name, side, "computes no softmax attention")
            elif side == "attention":
                raise GddlabError(f"{name!r} computes no softmax attention: leave attention_entropy out of stats=")
            elif not self._may_leave(name) or not self._reduced:
                check_ran([name])
            else:
                self._leave(name, side, "did not run")
        self._count()
        self._passed = True
        self._reduced.clear()

    def _over_calls(self) -> dict[tuple[_Place, _Read], dict[Reduction, Tensor]]:
        """What was reduced, of the calls that are wanted."""
        if self.calls in ("each", "first"):
            return self._reduced
        runs: defaultdict[tuple[_Place, str, str], dict[int, dict[Reduction, Tensor]]] = defaultdict(dict)
        for (place, read), found in self._reduced.items():
            runs[place, read.stream, read.branch][read.call] = found
        out = {}
        for (place, stream, branch), by_call in runs.items():
            call, found = max(by_call.items())
            if self.calls == "mean" and len(by_call) > 1:
                try:
                    call, found = 0, mean_over_calls([*by_call.values()])
                except RuntimeError:
                    raise GddlabError(
                        f'layer {place.module!r} has outputs of several shapes in one pass: give calls="each"'
                    ) from None
            out[place, _Read(call, stream, branch)] = found
        return out

    def _count(self) -> None:
        """Adds the pass to the statistics; rows that are not finite become NaN in each of them.

        Layers whose reductions have equal shapes are counted together: there are hundreds, of a few numbers each.
        """
        reduced = self._over_calls()
        alike: defaultdict[tuple[Any, ...], list[tuple[_Place, _Read]]] = defaultdict(list)
        for key, found in reduced.items():
            alike[tuple((r, x.shape, x.device) for r, x in found.items())].append(key)
        groups = []
        where: defaultdict[_Place, dict[_Read, tuple[int, int]]] = defaultdict(dict)
        for group, keys in enumerate(alike.values()):
            for i, (place, read) in enumerate(keys):
                where[place][read] = group, i
            several = {r: torch.stack([reduced[key][r] for key in keys]) for r in reduced[keys[0]]}
            several = {r: x.cpu().double() if x.device.type == "mps" else double(x) for r, x in several.items()}
            several |= follow(several)
            level = next(several[r] for r in _LEVELS if r in several)
            level = level.mean(-1) if level.ndim == 4 else level  # of channels
            bad = ~level.isfinite()  # (layers, n, S)
            for r, x in several.items():
                if x.shape[:3] == bad.shape:
                    several[r] = torch.where(bad.reshape(*bad.shape, *[1] * (x.ndim - 3)), torch.nan, x)
            for (place, read), count in zip(keys, bad.sum(1), strict=True):
                if place.before is None:
                    self._add_nonfinite((Site(place.module, *read).key, place.side), count)
            groups.append(several)
        together: defaultdict[tuple[Any, ...], list[tuple[str, dict[str, int]]]] = defaultdict(list)
        sites: dict[str, Site] = {}
        kinds = {s.name: s for s in self.stats}
        for layer, by_stat in self._plan.items():
            for name, lines in by_stat.items():
                own = kinds[name].update is not Statistic.update  # counts one layer at a time
                for read, rows in self._readings(lines, where, groups):
                    site = Site(layer, *read)
                    sites[site.key] = site
                    self._statistic(site.key, name)  # in the order of the network
                    same = tuple((role, reduction, group) for role, (reduction, group, _) in rows.items())
                    at = {role: i for role, (_, _, i) in rows.items()}
                    together[name, same, site.key if own else None].append((site.key, at))
        self._settle(sites, {name for name, *_ in together})
        for (name, same, own), readings in together.items():
            numbers = {}
            for role, reduction, group in same:
                places = [at[role] for _, at in readings]
                x = groups[group][reduction]
                x = x if places == list(range(len(x))) else torch.stack([x[i] for i in places])
                numbers[role] = x.flatten(0, 1)
            if own:
                self._statistic(own, name).update(**numbers)
                continue
            kind = kinds[name]
            samples, sums = kind().totals(len(readings), **numbers)
            self._together.setdefault((name, *(key for key, _ in readings)), kind()).add(samples, **sums)

    def _readings(
        self,
        lines: Sequence[Mapping[str, Tap]],
        where: Mapping[_Place, Mapping[_Read, tuple[int, int]]],
        groups: Sequence[Mapping[Reduction, Tensor]],
    ) -> Iterator[tuple[_Read, dict[str, tuple[Reduction, int, int]]]]:
        """Sites at which all taps of a statistic were read: by role the reduction, its group and its row there."""
        for taps in lines:
            by_role: list[dict[_Read, tuple[Reduction, int, int]]] = []
            for tap in taps.values():
                found = {}
                for read, (group, i) in where.get(_Place.of(tap), {}).items():
                    if tap.stream and read.stream not in ("", tap.stream):
                        continue
                    if tap.reduction in groups[group]:
                        label = read._replace(stream=tap.stream or read.stream)
                        found[label] = tap.reduction, group, i
                by_role.append(found)
            shared = set(by_role[0]).intersection(*by_role[1:]) if by_role else set()
            for read in sorted(shared, key=self._rank):
                if self.stream in ("all", read.stream) or (self.stream == IMAGE and not read.stream):
                    yield read, {role: found[read] for role, found in zip(taps, by_role, strict=True)}

    def _settle(self, sites: dict[str, Site], measured: set[str]) -> None:
        """The first pass says which sites there are; refuses a later one with others."""
        if not self._passed:
            if not sites:
                what = f"stream {self.stream!r}" if self.stream != IMAGE else "output that can be measured"
                raise GddlabError(f"none of the {len(self._known)} selected layers has a {what}: choose other layers")
            self._check_measured(measured, len(self._known))
            self.sites |= sites
        elif strange := sites.keys() ^ self.sites.keys():
            key = min(strange)
            how = "was not there" if key in sites else "is missing that was there"
            raise GddlabError(
                f"{key!r} {how} in the first pass: measure a network that runs its layers alike in all passes, or "
                "leave it out of layers="
            )

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
            key: {name: (stat.samples, {k: v.cpu() for k, v in stat.sums.items()}) for name, stat in by.items()}
            for key, by in self.statistics.items()
        }
        seen = {"sites": {key: tuple(site) for key, site in self.sites.items()}, "not_run": self.not_run}
        return {
            "sums": sums,
            "nonfinite": {k: v.cpu() for k, v in self._nonfinite.items()},
            "sizes": self._sizes,
            **seen,
        }

    def add(self, state: dict[str, Any]) -> None:
        """Adds the `state` of another probe of the same layers, statistics and noise levels."""
        self._separate()
        for key, by in state["sums"].items():
            for name, (samples, sums) in by.items():
                self._statistic(key, name).add(samples, **sums)
        for key, count in state["nonfinite"].items():
            self._add_nonfinite(key, count)
        self._sizes |= state["sizes"]
        self.sites |= {key: Site(*site) for key, site in state["sites"].items()}
        self.not_run |= state["not_run"]

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
