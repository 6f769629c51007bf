"""Outputs of some layers changed for a while, and what a change to a layer does to the network's output."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import edm_loss, edm_weight
from gddlab.probing.guard import check_ran, check_seen, warn_nonfinite
from gddlab.probing.inputs import Inputs, Rows
from gddlab.probing.layers import Layer, named_layers
from gddlab.probing.reductions import double, mean_square
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import Given, PerImage, Statistic, declare, stacked

WEIGHT = "lambda = (sigma^2 + 0.5^2) / (0.5 sigma)^2 (Karras et al. 2022, table 1)"
"""For definitions of statistics."""

Change = Callable[[Tensor], Tensor | None] | Tensor | None
"""What replaces a layer's output, of the same shape or one that expands to it, or a function of the output that returns
it; None keeps the output."""


@contextlib.contextmanager
def tapped(model: nn.Module, changes: Mapping[str, Change], rows: int | None = None) -> Iterator[dict[str, torch.Size]]:
    """Inside, in one forward pass, the outputs of some layers, by name, are seen and changed.

    Yields the shape of each output, once its layer has run; clear it before another pass. Refuses a layer that does not
    run exactly once, returns no tensor, or has another number of `rows`, where these are given.
    """
    modules = named_layers(model)
    ran: dict[str, torch.Size] = {}

    def hook_of(name: str, change: Change) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            why = f"this pass has {rows} rows: leave it out of layers="
            check_seen(output, name, "output", again=name in ran, rows=rows, why=why)
            ran[name] = output.shape
            found = change(output) if callable(change) else change
            # a separate tensor, in the output's memory format: later layers may write into it
            return None if found is None else torch.empty_like(output).copy_(found)

        return hook

    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.callback(modules[name].register_forward_hook(hook_of(name, change)).remove)
        yield ran
    check_ran([name for name in changes if name not in ran])


def keep(kept: dict[str, Tensor], part: str, output: Tensor) -> None:
    """A change for `tapped` that changes nothing, and keeps the output."""
    kept[part] = output.clone()


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
    model: Callable[..., Any],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    labels: Float[Tensor, "b classes"] | None,
    clean: Float[Tensor, "b c h w"] | None,
) -> Float[Tensor, " b"]:
    """EDM's weighted denoising loss of each image (Karras et al. 2022, equations 2 and 108; sigma_data 0.5).

    Where there are no images, the mean square of the network's answer.
    """
    out = denoised(model, (x, sigma, labels))
    return out.square().mean((1, 2, 3)) if clean is None else edm_loss(out, clean, sigma)


def weighted_error(
    a: Float[Tensor, "rows c h w"], b: Float[Tensor, "rows c h w"], sigmas: Sequence[float]
) -> Float[Tensor, "n s"]:
    """lambda(sigma) |a - b|^2, mean over channels and pixels (Karras et al. 2022, table 1; sigma_data 0.5).

    Row i * S + s is image i at `sigmas[s]`; float64, on the CPU.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return edm_weight(sigma) * mean_square(double(a) - double(b), len(a) // len(sigmas)).cpu().double()


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

    def result(self, *, side: str, settings: dict[str, Any], given: Mapping[str, Given] | None = None) -> ProbeResult:
        """The table over all noise levels; warns of what is not finite.

        Args:
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
        return ProbeResult.of(self.layers, self.inputs.sigmas, sums, meta)
