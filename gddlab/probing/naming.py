"""What a network is called as and what its modules and parameters are called, whatever is wrapped around it."""

from __future__ import annotations

from torch import Tensor, nn

from gddlab.errors import GddlabError

__all__ = ["denoiser_of", "named_layers", "owner_of", "parameter_table", "plain_name", "unwrap"]

_WRAPPERS = {"OptimizedModule": "_orig_mod", "AveragedModel": "module"}
"""Where torch's wrappers hold the network; by class name, since the compiler takes a second to import."""


def plain_name(name: str) -> str:
    """A parameter's or module's name without what `gddlab.wrap`, DistributedDataParallel and torch.compile put in."""
    while name.startswith(("module.", "_orig_mod.", "gddlab_bare.")):
        name = name.partition(".")[2]
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def owner_of(parameter: str) -> str:
    """Name of the layer that a parameter belongs to: of the convolution itself, where its weight is parametrized."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0]


def denoiser_of(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile: called as `model(x, sigma, labels)`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        elif type(model).__name__ in _WRAPPERS:
            inner = getattr(model, _WRAPPERS[type(model).__name__])
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def unwrap(model: nn.Module) -> nn.Module:
    """The bare network, inside `gddlab.wrap` too: it names layers and parameters."""
    while True:
        model = denoiser_of(model)
        inner = getattr(model, "gddlab_bare", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the bare network by plain name, in its order; the root is "".

    Raises:
        GddlabError: Two modules have one plain name.
    """
    out: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        if type(module).__name__ != "OptimizedModule":  # its `_orig_mod` follows under the same plain name
            plain = plain_name(name)
            if plain in out:
                raise GddlabError(f"two modules are called {plain!r}, one of them {name!r}: rename an attribute")
            out[plain] = module
    return out


def parameter_table(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all parameters in the order of the network, without `map_augment`, which a student drops."""
    named: list[tuple[str, Tensor]] = [(plain_name(name), p) for name, p in unwrap(model).named_parameters()]
    return tuple((name, tuple(p.shape)) for name, p in named if "map_augment" not in name.split("."))
