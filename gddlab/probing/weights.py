"""`weight_change`: how far the weights of each layer have moved from another network's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gddlab.errors import GddlabError, shown, validated
from gddlab.nets.bare import denoiser_of
from gddlab.nets.precond import check_level
from gddlab.probing.layers import LayerSelection, check_architecture, named_layers, plain_name, select_layers
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import Given, Statistic, declare

WeightChange = declare(
    Given,
    "weight_change",
    "|w - w_reference| / |w_reference|, Euclidean norms over all parameters of the layer; it does not depend on sigma",
    axes="parameters",
    unit="ratio",
)


@validated
@torch.no_grad()
def weight_change(
    model: Any, reference: Any, layers: LayerSelection = "all", *, sigma: float | None = None
) -> ProbeResult:
    """Measures how far each layer's parameters are from another network's of the same architecture.

    Args:
        model: A student, say.
        reference: Its teacher, say; what students drop (`map_augment`) or add (`map_target0`, `map_target1`) does not
            count.
        layers: As for `probe`.
        sigma: Noise level given to the values in the table; None takes the one that a student runs at, 80 for others.

    Returns:
        `weight_change` of each layer with parameters; 0 where they are equal bit for bit, NaN where the reference's are
        all 0. `sem` is NaN: there are no images.

    Raises:
        GddlabError: A chosen layer's parameters differ in name or shape; no layer has parameters; no such sigma.
    """
    ours, theirs = named_layers(model), named_layers(reference)
    level = float(getattr(denoiser_of(model), "sigma_g", 80.0)) if sigma is None else sigma
    if sigma is not None:
        check_level(f"sigma={sigma}", denoiser_of(model), sigma)
    chosen = [layer for layer in select_layers(model, layers) if layer.n_params]
    found: dict[str, dict[str, Statistic]] = {}
    for layer in chosen:
        w, w_reference = _parameters(ours, layer.name), _parameters(theirs, layer.name)
        check_architecture(w, w_reference, ("network", "reference"))
        shared = [name for name in w if name in w_reference]
        if not shared:  # what students add
            continue
        moved = size = 0.0
        for name in shared:
            p = w[name]
            q = w_reference[name].to(p.device).double()
            moved += float((p.double() - q).square().sum())
            size += float(q.square().sum())
        ratio = (moved / size) ** 0.5 if size else (0.0 if not moved else float("nan"))
        found[layer.name] = {"weight_change": WeightChange([ratio])}
    chosen = [layer for layer in chosen if layer.name in found]
    if not chosen:
        raise GddlabError(f"layers={shown(layers)}: none of these has parameters, choose others")
    meta = network_meta(model, chosen) | {"data": None, "states": "weights", "n_images": 0, "seed": None, "images": []}
    return ProbeResult.of(chosen, [level], found, meta)


def _parameters(modules: dict[str, nn.Module], layer: str) -> dict[str, nn.Parameter]:
    """A layer's parameters, its children's too, by name in the network; none where the network has no such layer."""
    named = modules[layer].named_parameters() if layer in modules else ()
    return {plain_name(f"{layer}.{name}"): p for name, p in named}
