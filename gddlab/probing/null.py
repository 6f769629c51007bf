"""Null models: networks of the same architecture whose weights know nothing, or less, of the data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown, validated
from gddlab.nets import Precond, architecture, from_edm
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.probing.layers import plain_name
from gddlab.probing.plots.axes import Probed, wide
from gddlab.runtime import generator

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["init", "shuffled", "spectrum"]
LEVEL = 0.05
"""Of the test against null models, after correction."""
ZERO = 1e-3
"""A layer whose fresh weights are smaller than the trained ones by this factor is one that starts at zero."""


@validated
def null(model: Any, kind: Kind = "shuffled", *, seed: NonNegativeInt = 0) -> nn.Module:
    """A copy of a network with other weights, to compare measurements with: what does the architecture do by itself?

    Args:
        model: A denoiser, as for `probe`.
        kind: "init", fresh weights, as at the beginning of training; layers that start at zero get normal weights with
            the trained root mean square, since otherwise their blocks would do nothing. "shuffled", the trained
            numbers of each tensor in random order. "spectrum", matrices (weights by output channel) with the trained
            singular values and random directions; vectors, such as biases, are kept.
        seed: Of all that is random.

    Returns:
        The copy, in the mode and on the device of the original, with its shapes, types, buffers and card, and without
        hooks on outputs.

    Raises:
        GddlabError: An unknown kind; for "init", a network of another library than diffusers, with parameters that no
            `reset_parameters` makes anew.
    """
    if kind not in get_args(Kind):
        raise unknown("kind of null model", kind, get_args(Kind))
    out = copy.deepcopy(denoiser_of(model))
    for module in out.modules():
        module._forward_hooks.clear()  # a recorder of the original's outputs is not the copy's
    g = generator(seed, 0)
    with torch.no_grad():
        if kind == "init":
            _initialise(out, seed, g)
        else:
            change = _shuffled if kind == "shuffled" else _turned
            for p in out.parameters():
                if p.is_floating_point():
                    p.copy_(change(p.detach().cpu(), g))
    return out


def _shuffled(weight: Tensor, g: torch.Generator) -> Tensor:
    return weight.flatten()[torch.randperm(weight.numel(), generator=g)].reshape(weight.shape)


def _turned(weight: Tensor, g: torch.Generator) -> Tensor:
    """The same singular values between random orthonormal directions (Haar).  (out, ...) -> (out, ...)"""
    if weight.ndim < 2:
        return weight
    values = torch.linalg.svdvals(weight.double().flatten(1))
    left, right = (_directions(n, len(values), g) for n in (len(weight), weight[0].numel()))
    return ((left * values) @ right.mT).reshape(weight.shape).to(weight.dtype)


def _directions(n: int, k: int, g: torch.Generator) -> Tensor:
    """k random orthonormal vectors, (n, k); signs make the distribution uniform (Mezzadri 2007, section 5)."""
    q, r = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))
    return q * r.diagonal().sign()


def _initialise(net: nn.Module, seed: int, g: torch.Generator) -> None:
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in net.named_buffers()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(net, Precond):
            fresh = from_edm(**_arguments(net))
            for (_, mine), (_, theirs) in zip(net.named_parameters(), fresh.named_parameters(), strict=True):
                mine.copy_(theirs)
        else:
            bare = unwrap(net)
            made = _made_anew(bare)
            for name, module in bare.named_modules():
                own = {plain_name(f"{name}.{n}".lstrip(".")): p for n, p in module.named_parameters(recurse=False)}
                if own and own.keys() <= made.keys():
                    for n, p in own.items():
                        p.copy_(made[n])
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif own:
                    where = next(iter(own))
                    raise GddlabError(
                        f'kind="init": {where!r} has no reset_parameters that would make it anew: give "shuffled" or '
                        '"spectrum"'
                    )
    for name, b in net.named_buffers():  # running means of BatchNorm are made anew, too
        b.copy_(buffers[name])
    for name, p in net.named_parameters():
        size = trained[name].square().mean().sqrt()
        if p.ndim > 1 and p.square().mean().sqrt() < ZERO * size:
            p.copy_(size * torch.randn(p.shape, generator=g).to(p))


def _made_anew(bare: nn.Module) -> dict[str, Tensor]:
    """Parameters of a new network of a class of diffusers, by name; {} of others, which do not say how it is made."""
    kind: Any = type(bare)
    if not (hasattr(kind, "from_config") and hasattr(bare, "config")):
        return {}
    return dict(kind.from_config(bare.config).named_parameters())


def _arguments(net: Precond) -> dict[str, Any]:
    about = architecture(net)
    return {"class_name": about["precond"], **about["init_kwargs"]}


class AgainstNulls(Probed):
    """What a `ProbeResult` says of null models that were measured on the same inputs."""

    def above_null(self, stat: str) -> pd.DataFrame:
        """Tests at which layers and noise levels a statistic differs from what null models have.

        The value lies outside of the range of the drawn null models, and its difference to each of them is larger than
        the errors over images explain: p is the largest of the two-sided p of a normal test against each draw (an
        intersection-union test; Berger 1982), 1 inside of the range. It is corrected for all layers and noise levels of
        a kind by Benjamini & Hochberg (1995). The test is against the null models drawn: with few of them, another one
        may well lie outside of their range too, so see how far `value` is from it. Errors are taken as independent,
        though images and noise are the same: the test is conservative.

        Returns:
            One row per kind, layer and noise level: `value`, `sem`, `null_low` and `null_high` (range over draws),
            `draws`, `p`, `p_corrected`, and `differs` (p_corrected below 0.05).

        Raises:
            GddlabError: No null models were measured; `stat` was not measured; the result is crossed.
        """
        import pandas as pd
        from scipy.stats import false_discovery_control, norm

        if not self.nulls:
            raise GddlabError('no null models were measured: probe with nulls=("shuffled", "init")')
        value, sem = wide(self.frame, stat), wide(self.frame, stat, "sem")
        known, tables = self._of_nulls(stat, value), []
        for kind, draws in self.nulls.items():
            theirs = known[kind]
            errors = np.stack([wide(r.frame, stat, "sem").loc[value.index, value.columns] for r in draws])
            low, high = theirs.min(0), theirs.max(0)
            gap = np.abs(value.to_numpy() - theirs)
            with np.errstate(divide="ignore", invalid="ignore"):
                z = np.where(gap == 0, 0.0, gap / np.sqrt(sem.to_numpy() ** 2 + errors**2))
            inside = (value.to_numpy() >= low) & (value.to_numpy() <= high)
            p = np.where(inside, 1.0, (2 * norm.sf(z)).max(0))
            corrected = np.full_like(p, np.nan)
            finite = np.isfinite(p)
            corrected[finite] = false_discovery_control(p[finite]) if finite.any() else np.nan
            columns = {"value": value, "sem": sem, "null_low": low, "null_high": high, "p": p, "p_corrected": corrected}
            long = {name: np.asarray(x)[:, ::-1].ravel() for name, x in columns.items()}
            layers, sigmas = np.repeat(value.index, value.shape[1]), np.tile(value.columns[::-1], len(value))
            table = pd.DataFrame({"kind": kind, "layer": layers, "sigma": sigmas, **long})
            table.insert(7, "draws", len(draws))
            tables.append(table.assign(differs=table["p_corrected"] < LEVEL))
        return pd.concat(tables, ignore_index=True)
