"""The network inside of wrappers: where it runs, in which numbers, and its weights where others keep them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError

_WRAPPERS = {
    **{"OptimizedModule": "_orig_mod", "AveragedModel": "module"},
    **{"PeftModel": "base_model", "PeftMixedModel": "base_model", "BaseTuner": "model"},
}
"""Where wrappers of torch and PEFT hold the network; by class name, since importing the compiler takes a second."""


def denoiser_of(model: nn.Module) -> nn.Module:
    """What is called as `model(x, sigma, labels)`, without DistributedDataParallel, AveragedModel, torch.compile.

    Raises:
        GddlabError: It is no network.
    """
    if not isinstance(model, nn.Module):
        raise GddlabError(
            f"the network is of type {type(model).__name__}: give a torch.nn.Module, such as load_teacher(...)"
        )
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif held := next((_WRAPPERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _WRAPPERS), ""):
            model = getattr(model, held)
        else:
            return model


def unwrap(model: nn.Module) -> nn.Module:
    """The bare network, inside `gddlab.wrap` too: its names of layers and parameters are used everywhere."""
    while True:
        model = denoiser_of(model)
        inner = getattr(model, "gddlab_bare", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate moves its weights to where they are needed, and back."""
    return any(hasattr(m, "_hf_hook") for m in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Where it is run: of an offloaded network, not where its weights are."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # one hook, or several in a row
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def check_weights(model: nn.Module) -> None:
    """Refuses a network that was made without weights."""
    if device_of(model).type == "meta":
        raise GddlabError('the network is on "meta", it has no weights: load them first')


def number_type(model: nn.Module) -> torch.dtype | None:
    """The type in which it computes: not that of weights which are stored in 8 bits. None without parameters."""
    own = getattr(unwrap(model), "dtype", None)
    if isinstance(own, torch.dtype) and own.is_floating_point and own.itemsize > 1:
        return own
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, None)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Its state dict; of an offloaded network from where the weights are."""
    state: dict[str, Any] = model.state_dict()
    if any(isinstance(t, Tensor) and t.is_meta for t in state.values()) and is_offloaded(model):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return dict(get_state_dict_offloaded_model(model))
    return state
