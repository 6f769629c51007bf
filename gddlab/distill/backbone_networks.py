"""The networks of backbones, with the weights that were found fitted into them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.distill.backbone_weights import VGG, Source, missing, reason, timm_module
from gddlab.distill.weight_files import fit_state, read_state
from gddlab.errors import GddlabError
from gddlab.files import cache_dir
from gddlab.nets.lite import LITES, as_timm_names

__all__ = ["VGG_STOPS", "create", "fitted", "make_timm", "make_vgg", "vgg_state"]

VGG_STOPS = (13, 23, 33, 43)
"""Where torchvision's `features` are cut: the ends of blocks 2 to 5, before the pooling."""


def create(name: str, input_size: int, **how: Any) -> Any:
    """timm's network, with its classifier; position embeddings and windows made for `input_size` where they depend on it."""
    timm = timm_module()
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        how["img_size"] = input_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **how)


def make_timm(name: str, input_size: int, take: tuple[int, ...], source: Source) -> Any:
    if source.kind == "random":
        net = create(name, input_size)
    elif source.kind == "hub":
        try:
            net = create(name, input_size, pretrained=True, cache_dir=str(cache_dir() / "backbones"))
        except Exception as e:  # the hub's clients have dozens
            raise missing(name, f"{reason(e)} at the hub") from None
    else:
        assert source.path is not None
        given = read_state(source.path)
        _finite(given, source.path)
        net = fitted(name, input_size, given, source.path)
    net.prune_intermediate_layers(list(take), prune_norm=True, prune_head=True)
    return net


def fitted(name: str, input_size: int, given: dict[str, Tensor], path: Path) -> Any:
    """timm's network with these weights: timm renames and resamples what older or other files need, then every name must fit; only classifiers may be absent."""
    with torch.device("meta"):
        bare = create(name, input_size)
    own, cfg = bare.state_dict(), bare.pretrained_cfg
    if name in LITES:
        given = as_timm_names(own, given, path)
    named = cfg["classifier"] or ()
    heads = tuple(f"{h}." for h in ((named,) if isinstance(named, str) else named))
    if all(k in given for k in own if not k.startswith(heads) and not k.endswith("num_batches_tracked")):
        for k in (k for k in own if k.startswith(heads)):
            shape = (own[k].shape[0] + cfg.get("label_offset", 0), *own[k].shape[1:])
            if k not in given or given[k].shape != shape:
                given = {**given, k: torch.zeros(shape)}
    try:
        net = create(name, input_size, pretrained=True, pretrained_cfg_overlay={"state_dict": given})
    except Exception as e:  # a refusal of load_state_dict, or whatever timm's renaming meets
        raise GddlabError(f"{path} does not fit {name}: {_misfit(e)}") from None
    net.pretrained_cfg.pop("state_dict", None)  # timm would keep the tensors
    return net


def make_vgg(source: Source) -> nn.Sequential:
    """torchvision's `features` up to the last level; the classifier, most of the parameters, is never made."""
    from torchvision.models import vgg

    net: nn.Sequential = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)[: VGG_STOPS[-1]]
    if source.kind == "random":
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                assert m.bias is not None
                nn.init.zeros_(m.bias)
        return net
    if source.kind == "hub":
        assert source.address is not None
        try:
            folder = str(cache_dir() / "backbones")
            given = torch.hub.load_state_dict_from_url(
                source.address, model_dir=folder, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as e:  # no network; a file with another hash
            raise missing(VGG, f"{reason(e)} at the hub") from None
    else:
        assert source.path is not None
        given = read_state(source.path)
    net.load_state_dict(vgg_state(net, given, source), strict=False)  # only counters of batches are absent
    return net


def vgg_state(net: nn.Sequential, given: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """What a torchvision state dict has under `features`, checked; the classifier is not needed."""
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    used = {k: given[f"features.{k}"] for k in own if f"features.{k}" in given}
    fit_state(own, used, path)
    return used


def _misfit(e: Exception) -> str:
    """The first name of load_state_dict's list."""
    if found := re.search(r'(Missing|Unexpected) key\(s\) in state_dict: "([^"]+)"', str(e)):
        return (
            f"it lacks {found[2]}" if found[1] == "Missing" else f"it holds {found[2]}, which the network does not have"
        )
    size = r"torch\.Size\(\[(.*?)\]\)"
    if found := re.search(rf"size mismatch for (\S+): .*?{size}.*?{size}", str(e)):
        return f"{found[1]} is ({found[2]}), not ({found[3]})"
    return reason(e)


def _finite(given: Mapping[str, Tensor], path: Path) -> None:
    for name, v in given.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise GddlabError(f"{path} is refused: {name} holds NaN or infinity")
