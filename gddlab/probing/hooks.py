"""`Probe`: measures activations during any forward pass, and leaves the network as it was."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.probing.layers import Layer, LayerSelection, inventory, select_layers
from gddlab.probing.reductions import REDUCTIONS, Tap
from gddlab.probing.statistics import DEFAULT, STATISTICS, Statistic

__all__ = ["Probe"]


class Probe:
    """Measures layers of a network while it runs, as a context manager.

        sigmas = [80.0, 2.5, 0.002]
        with Probe(net, sigmas, layers="model.enc.*") as p:
            with p.images(4):
                net(x, sigma)           # 12 rows: row 3 * i + s is image i at sigmas[s]
        p.statistics["model.enc.16x16_conv"]["rms"].result()

    Hooks stand from `with` to its end, whatever is raised in between; only these are removed. Passes outside of
    `images` are not measured. The network, its outputs, its modes and others' hooks are not touched.

    Args:
        model: Any network.
        sigmas: Noise levels of the rows of one image, largest first.
        layers: See `LayerSelection`. Statistics of blocks are taken of each U-Net block that holds a selected layer.
        stats: Names of statistics.

    Attributes:
        layers: What is measured, in the order of the network: the selected layers and the blocks around them.
        statistics: By layer name and statistic name.

    Raises:
        GddlabError: Unknown layer or statistic; a statistic asked for by name that no selected layer has.
            In a pass: a layer that does not run exactly once, returns no tensor, or has another number of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        sigmas: Sequence[float],
        *,
        layers: LayerSelection = "conv",
        stats: str | Iterable[str] = DEFAULT,
    ):
        self.model = model
        self.sigmas = [float(s) for s in sigmas]
        if not self.sigmas or any(a <= b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise GddlabError(f"sigmas={self.sigmas}: give at least one noise level, largest first, each once")
        names = [stats] if isinstance(stats, str) else list(dict.fromkeys(stats))
        for name in names:
            if name not in STATISTICS:
                raise unknown("statistic", name, STATISTICS)
        if not names:
            raise GddlabError(f"stats is empty: accepted are {', '.join(STATISTICS)}")
        self.stats = tuple(names)

        modules = dict(model.named_modules())
        known = inventory(model)
        selected = select_layers(model, layers)
        around = {layer.block for layer in selected if layer.block}
        wanted = around | {layer.name for layer in selected}
        chosen = {layer.name for layer in selected}
        self.statistics: dict[str, dict[str, Statistic]] = {}
        self._plan: dict[str, dict[str, dict[str, Tap]]] = {}
        for name in (n for n in known if n in wanted):
            for stat in self.stats:
                target = around if STATISTICS[stat].target == "block" else chosen
                taps = STATISTICS[stat].taps(known[name], modules) if name in target else None
                if taps is not None:
                    self._plan.setdefault(name, {})[stat] = taps
                    self.statistics.setdefault(name, {})[stat] = STATISTICS[stat]()
        self.layers: list[Layer] = [known[n] for n in self._plan]
        measured = {s for by_stat in self._plan.values() for s in by_stat}
        absent = [s for s in self.stats if s not in measured]
        if absent and (self.stats != DEFAULT or not measured):
            raise GddlabError(
                f"statistic {absent[0]!r} exists for none of the {len(selected)} selected layers "
                f"({STATISTICS[absent[0]].definition}): choose other layers or statistics"
            )
        self._reductions = self._taps()
        self._hooks: contextlib.ExitStack | None = None
        self._n = 0  # images of the pass being measured; 0 outside of one
        self._reduced: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._nonfinite: defaultdict[tuple[str, str], Tensor | int] = defaultdict(int)

    @property
    def n_images(self) -> int:
        """Images measured so far."""
        return max(s.n_images for by_stat in self.statistics.values() for s in by_stat.values())

    def _taps(self) -> dict[tuple[str, str], set[str]]:
        """Reductions by module and side."""
        out: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for by_stat in self._plan.values():
            for taps in by_stat.values():
                for tap in taps.values():
                    out[tap.module, tap.side].add(tap.reduction)
        for (name, side), reductions in out.items():
            if "gram" in reductions:
                reductions.discard("mean_square")
            # a share of positive values is finite even where activations are not
            if reductions == {"positive_share"} and (name, "output") not in out:
                out[name, side] = reductions | {"mean_magnitude"}
        return dict(out)

    def __enter__(self) -> Probe:
        if self._hooks is not None:
            raise GddlabError("this Probe is already in use: leave its `with` before entering it again")
        modules = dict(self.model.named_modules())
        with contextlib.ExitStack() as stack:
            for name, side in self._reductions:
                module = modules[name]
                if side == "output":
                    handle = module.register_forward_hook(self._on_output(name))
                else:
                    handle = module.register_forward_pre_hook(self._on_input(name), with_kwargs=True)
                stack.callback(handle.remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hooks is not None
        self._hooks.close()
        self._hooks = None
        self._reduced.clear()

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._reduce(name, "output", output)

        return hook

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._reduce(name, "input", args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def _reduce(self, name: str, side: str, x: Any) -> None:
        """Here and now: later in-place operations change what a hook keeps by reference."""
        if not self._n:
            return
        if not isinstance(x, Tensor):
            raise GddlabError(
                f"the {side} of layer {name!r} is a {type(x).__name__}, no tensor: leave it out of layers="
            )
        rows = self._n * len(self.sigmas)
        if x.ndim == 0 or x.shape[0] != rows:
            raise GddlabError(
                f"the {side} of layer {name!r} is {tuple(x.shape)}, but {self._n} images at {len(self.sigmas)} noise "
                f"levels are {rows} rows: give the network one row an image and noise level"
            )
        if (name, side) in self._reduced:
            raise GddlabError(
                f"layer {name!r} ran twice in one pass: call the network once, or leave it out of layers="
            )
        reductions = self._reductions[name, side]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _full_precision(x.device):
            x = x.detach().float()
            if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
                x = x.permute(0, 2, 3, 1)  # no reduction minds the order within a row; flattening it would copy
            found = {r: REDUCTIONS[r](x, self._n) for r in reductions}
        if "gram" in found:  # its diagonal is free
            found["mean_square"] = found["gram"].diagonal(dim1=-2, dim2=-1)
        self._reduced[name, side] = found

    @contextlib.contextmanager
    def images(self, n: int) -> Iterator[None]:
        """Measures one forward pass of `n` images, `n * len(sigmas)` rows; counts nothing if an error is raised inside."""
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
        for name, _ in self._reductions.keys() - self._reduced.keys():
            raise GddlabError(f"layer {name!r} did not run in this pass: leave it out of layers=")
        self._count()
        self._reduced.clear()

    def _count(self) -> None:
        for layer, by_stat in self._plan.items():
            for stat, taps in by_stat.items():
                reduced = {role: self._reduced[t.module, t.side][t.reduction] for role, t in taps.items()}
                self.statistics[layer][stat].update(**reduced)
        for key, found in self._reduced.items():
            level = found.get("mean_square", found.get("mean_magnitude"))
            if level is not None:
                self._nonfinite[key] = self._nonfinite[key] + (~level.isfinite()).sum(0)

    def nonfinite(self) -> list[dict[str, Any]]:
        """Where activations were NaN, infinite or too large to square: layer, side, sigma, number of images."""
        return [
            {"layer": name, "side": side, "sigma": sigma, "images": int(count)}
            for (name, side), counts in self._nonfinite.items()
            for sigma, count in zip(self.sigmas, torch.as_tensor(counts).tolist(), strict=True)
            if count
        ]


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keeps TF32 and bfloat16 out of the Gram matrices where the user allows them in the network's products."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
