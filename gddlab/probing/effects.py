"""Outputs of some layers changed for a while, and what a change to a layer does to the network's output."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, warn
from gddlab.nets.bare import denoiser_of
from gddlab.nets.denoiser import data_std
from gddlab.nets.precond import edm_loss, edm_weight
from gddlab.probing.guard import check_ran, check_seen, warn_nonfinite
from gddlab.probing.inputs import Inputs, Rows
from gddlab.probing.layers import Layer, LayerSelection, named_layers, transformer_blocks
from gddlab.probing.reductions import double, mean_square
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.sites import Site, Sites, View, Window, innermost, layer_of, left_out, named_in
from gddlab.probing.statistics import Given, PerImage, Statistic, declare, stacked

WEIGHT = "lambda = (sigma^2 + s^2) / (s sigma)^2, s the standard deviation of the data (Karras et al. 2022, table 1)"
"""For definitions of statistics; `meta["sigma_data"]` holds s, see `data_std`."""


class AtSite(NamedTuple):
    """A change that depends on where it is made: a function of the output and the key of its site."""

    function: Callable[[Tensor, str], Tensor | None]


Change = Callable[[Tensor], Tensor | None] | AtSite | Tensor | None
"""What replaces a layer's output, of the same shape or one that expands to it, or a function of the output that returns
it; None keeps the output."""


class Ran(dict[str, torch.Size]):
    """Shape of each output that was seen, by key of `changes`; cleared before another pass.

    Attributes:
        sites: Keys of all sites that a key of `changes` means.
        absent: Layers that were allowed not to run or to give no tensor, and why they cannot be changed.
    """

    def __init__(self, window: Window, rows: int | None):
        super().__init__()
        self._window, self._rows = window, rows
        self.sites: dict[str, list[str]] = {}
        self.absent: dict[str, str] = {}
        window.start(rows)

    def clear(self) -> None:
        super().clear()
        self.sites.clear()
        self._window.start(self._rows)


@contextlib.contextmanager
def tapped(
    model: nn.Module, changes: Mapping[str, Change], rows: int | None = None, *, may_lack: Collection[str] = ()
) -> Iterator[Ran]:
    """Inside, in one forward pass, the outputs of some layers are seen and changed.

    A layer's name means all that it gives in the pass: each run, stream and guidance branch; what is appended to it
    chooses some, see `Sites`.

    Yields the shape of each output, by key, once its layer has run; clear it before another pass. Refuses a layer that
    does not run, unless it is among `may_lack`, returns no tensor, or has another number of `rows`, where these are
    given; and a pass in which the network is called again.
    """
    modules = named_layers(model)
    window = Window(model)
    ran = Ran(window, rows)
    tokens = set(transformer_blocks(modules))
    wanted: dict[str, dict[str, Sites]] = {}
    for key in changes:
        wanted.setdefault(layer_of(key, modules), {})[key] = Sites.of(key, modules)

    def hook_of(name: str, asked: Mapping[str, Sites]) -> Callable[..., Any]:
        view = View(name, modules, window, innermost(name, tokens))

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = window.run(name)
            if call is None:
                return None
            parts = view.output(output)
            if parts is None and name in may_lack:
                ran.absent[name] = f"has a {type(output).__name__} as its output, no tensor"
                return None
            seen = window.expected()
            why = f"this pass has {seen} rows: leave it out of layers="
            new: list[tuple[str, int, Tensor]] = []
            for stream, x in parts or [("", output)]:
                check_seen(x, name, "output", again=not window.branches, rows=seen, why=why)
                for i, (branch, part) in enumerate(window.parts(x)):
                    site = Site(name, call, stream, branch)
                    for key in (key for key, sites in asked.items() if sites.hold(site)):
                        if key == site.key or key not in ran:
                            ran[key] = part.shape
                        ran.sites.setdefault(key, []).append(site.key)
                        change = changes[key]
                        if isinstance(change, AtSite):
                            found = change.function(part, site.key)
                        else:
                            found = change(part) if callable(change) else change
                        if found is not None:
                            new.append((stream, i, found))
            return view.replaced(output, new) if new else None

        return hook

    with contextlib.ExitStack() as stack:
        for remove in window.hooks():
            stack.callback(remove)
        for name, asked in wanted.items():
            stack.callback(modules[name].register_forward_hook(hook_of(name, asked)).remove)
        yield ran
    missing = [key for key in changes if key not in ran]
    ran.absent |= {key: "did not run" for key in missing if key in may_lack and key not in ran.absent}
    check_ran([key for key in missing if key not in may_lack])


def keep(kept: dict[str, Tensor]) -> AtSite:
    """A change for `tapped` that changes nothing, and keeps the output of each site."""

    def function(output: Tensor, key: str) -> None:
        kept[key] = output.clone()

    return AtSite(function)


def that_run(
    model: nn.Module,
    rows: Rows,
    selected: Sequence[Layer],
    layers: LayerSelection,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Layer], dict[str, str]]:
    """The selected layers whose outputs can be changed, and why the others cannot, which a warning says.

    A layer that `layers` names must run. Of those that a preset or a glob brings, a pass over `rows` finds it out.

    Args:
        parts: Whose outputs are changed for a layer, by its name; by default its own.
    """
    named = named_in(layers)
    brought = {a.name for a in selected if not named(a.name)}
    if not brought:
        return list(selected), {}
    parts = {a.name: [a.name] for a in selected} if parts is None else parts
    every = {part: None for name in parts for part in parts[name]}
    with tapped(model, every, len(rows[0]), may_lack={part for name in brought for part in parts[name]}) as ran:
        denoiser_of(model)(*rows)
    absent = {name: ran.absent[p] for name in brought for p in parts[name] if p in ran.absent}
    found = [a for a in selected if a.name not in absent]
    if not found:  # the first pass over all rows says why
        return list(selected), {}
    if absent:
        warn(left_out(absent))
    return found, absent


def denoised(model: Callable[..., Any], rows: Rows) -> Float[Tensor, "b c h w"]:
    """The network's answer, refused if it has another shape than the states."""
    out = model(*rows)
    if not isinstance(out, Tensor) or out.shape != rows[0].shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise GddlabError(
            f"the network gave {found} for states {tuple(rows[0].shape)}: give a denoiser, which gddlab.wrap makes of "
            "any network"
        )
    return out


def denoising_loss(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    labels: Float[Tensor, "b classes"] | None,
    clean: Float[Tensor, "b c h w"] | None,
) -> Float[Tensor, " b"]:
    """EDM's weighted denoising loss of each image (Karras et al. 2022, equations 2 and 108; sigma_data of `data_std`).

    Where there are no images, the mean square of the network's answer.
    """
    out = denoised(model, (x, sigma, labels))
    return out.square().mean((1, 2, 3)) if clean is None else edm_loss(out, clean, sigma, data_std(model))


def weighted_error(
    a: Float[Tensor, "rows c h w"], b: Float[Tensor, "rows c h w"], sigmas: Sequence[float], sigma_data: float = 0.5
) -> Float[Tensor, "n s"]:
    """lambda(sigma) |a - b|^2, mean over channels and pixels (Karras et al. 2022, table 1).

    Row i * S + s is image i at `sigmas[s]`; float64, on the CPU.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return edm_weight(sigma, sigma_data) * mean_square(double(a) - double(b), len(a) // len(sigmas)).cpu().double()


def change_statistics(kind: str, how: str, changed: str) -> tuple[type[PerImage], type[PerImage]]:
    """Change of the output, and increase of the denoising loss, of a network in which `changed`."""
    output = declare(
        PerImage,
        f"{kind}_output_{how}",
        f"root of lambda(sigma) |D'(x; sigma) - D(x; sigma)|^2, mean over pixels, where in D' {changed}, and D is the "
        f"intact network; {WEIGHT}; mean over images",
        axes="root mean square over channels, pixels; mean over images",
        unit="c_out",  # the scale of what an EDM network adds at this sigma: at small sigma small changes count
    )
    loss = declare(
        PerImage,
        f"{kind}_loss_{how}",
        f"increase of the denoising loss lambda(sigma) |D(x; sigma) - y|^2, mean over pixels, when {changed}; "
        f"{WEIGHT}; mean over images, paired",
        axes="channels, pixels; mean over images",
        unit="EDM loss",
    )
    return output, loss


class Effects:
    """Statistics by layer, from passes over some images at some noise levels each.

    The noise levels come in parts; all images of one part come in succession. A number that is not finite makes the
    value of its layer and noise level NaN, and is reported.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, layers: Sequence[Layer], kinds: Sequence[type[PerImage]]):
        self.model, self.inputs, self.layers, self.kinds = model, inputs, layers, kinds
        self._parts: list[dict[str, dict[str, Statistic]]] = []
        self._sigmas: tuple[float, ...] = ()
        self._bad: Counter[tuple[str, float]] = Counter()

    def add(self, layer: str, sigmas: Sequence[float], *numbers: Float[Tensor, "n s ..."]) -> None:
        """Numbers of each image for each of `kinds`, (n, S) or (n, S, K)."""
        if self._sigmas != tuple(sigmas):
            self._sigmas = tuple(sigmas)
            self._parts.append({a.name: {kind.name: kind() for kind in self.kinds} for a in self.layers})
        bad = torch.zeros(numbers[0].shape[:2], dtype=torch.bool)
        for stat, x in zip(self._parts[-1][layer].values(), numbers, strict=True):
            finite = x.isfinite()
            bad |= ~(finite.all(-1) if x.ndim == 3 else finite)
            stat.update(x=torch.where(finite, x, torch.nan))
        for sigma, count in zip(sigmas, bad.sum(0).tolist(), strict=True):
            self._bad[layer, sigma] += count

    def result(
        self,
        *,
        side: str,
        settings: dict[str, Any],
        given: Mapping[str, Given] | None = None,
        not_run: Mapping[str, str] | None = None,
    ) -> ProbeResult:
        """The table over all noise levels; warns of what is not finite.

        Args:
            not_run: Layers that are left out, and why.
            side: What was not finite: the network's output with a layer "ablated", "patched" or "disturbed", or an
                "attribution".
            given: One more statistic by layer, a measure. `merge` refuses such a result, which lacks its sums.
        """
        sums = stacked(self._parts)
        bad = [{"layer": n, "side": side, "sigma": s, "images": c} for (n, s), c in self._bad.items() if c]
        for layer, statistic in (given or {}).items():
            sums[layer][statistic.name] = statistic
            where = [s for s, x in zip(self.inputs.sigmas, statistic.values.tolist(), strict=True) if math.isnan(x)]
            bad += [{"layer": layer, "side": "measure", "sigma": s, "images": 1} for s in where]
        warn_nonfinite(bad)
        meta = network_meta(self.model, self.layers) | self.inputs.describe() | {"settings": settings, "nonfinite": bad}
        meta |= {"not_run": dict(not_run)} if not_run else {}
        return ProbeResult.of(self.layers, self.inputs.sigmas, sums, meta)
