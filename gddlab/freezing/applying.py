"""A mask on a network: gradients off, buffers held, differences from the teacher found."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing.bits import same_bits, tensors_of
from gddlab.probing.layers import named_layers, plain_name, unwrap

__all__ = ["EvalMode", "changed_tensors", "difference", "freeze", "frozen_modules", "unmatched"]


class EvalMode:
    """Stands in for the `train` method of a frozen module: the module stays in eval mode, its children follow.

    An object rather than a function, so that a copied or unpickled network holds its own modules.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.module).train(self.module, mode)
        self.module.training = False
        return self.module


def freeze(model: nn.Module, frozen: Collection[str]) -> None:
    """Sets `requires_grad` of every parameter of the bare network, and holds frozen modules with buffers in eval mode."""
    net = unwrap(model)
    for name, p in net.named_parameters():
        p.requires_grad_(plain_name(name) not in frozen)
    held = frozen_modules(net, frozen)
    for name, module in named_layers(net).items():
        if name in held:
            module.__dict__["train"] = EvalMode(module)
            module.training = False
        elif isinstance(module.__dict__.get("train"), EvalMode):
            del module.__dict__["train"]
            module.training = net.training


def frozen_modules(model: nn.Module, frozen: Collection[str]) -> set[str]:
    """Names of modules with buffers and nothing to train.

    All parameters of such a module are frozen; where it has none, as a BatchNorm without weights, all those within the
    nearest module around it that has some.
    """
    net = unwrap(model)
    still = {id(p) for name, p in net.named_parameters() if plain_name(name) in frozen}
    modules = named_layers(net)
    out = set()
    for name, module in modules.items():
        if not any(True for _ in module.named_buffers(recurse=False)):
            continue
        parameters, around = list(module.parameters(recurse=False)), name
        while not parameters and around:
            around = around.rpartition(".")[0]
            parameters = list(modules[around].parameters()) if around in modules else []
        if parameters and all(id(p) in still for p in parameters):
            out.add(name)
    return out


def changed_tensors(model: nn.Module, teacher: nn.Module, frozen: Collection[str]) -> tuple[list[str], int]:
    """Names of frozen parameters, and of buffers of frozen modules, that differ in a bit; and how many were compared."""
    ours, theirs = tensors_of(model), tensors_of(teacher)
    modules = frozen_modules(model, frozen)
    buffers = (plain_name(n) for n, _ in unwrap(model).named_buffers())
    names = [*frozen, *(n for n in buffers if n.rpartition(".")[0] in modules and n in theirs)]
    return [n for n in names if not same_bits(ours[n], theirs[n])], len(names)


def difference(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str:
    """What tells another network from the mask's, given that something does."""
    if (name := next((n for n in mine if n not in other), None)) is not None:
        return f"it has no {name}"
    if (name := next((n for n in other if n not in mine), None)) is not None:
        return f"the mask does not know its {name}"
    name = next(n for n in mine if mine[n] != other[n])
    return f"{name} is {other[name]}, not {mine[name]}"


def unmatched(mine: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Parameters that do not have the same name and shape in both; says so, and refuses where none has."""
    matched = {n for n in mine if other.get(n) == mine[n]}
    if not matched:
        raise GddlabError(
            f"none of the {len(other)} parameters has a name and shape that the mask knows: use mask.transfer(model)"
        )
    out = tuple(n for n in dict.fromkeys((*mine, *other)) if n not in matched)
    if out:
        more = f" and {len(out) - 3} more" if len(out) > 3 else ""
        warnings.warn(
            f"{len(matched)} parameters match the mask, {len(out)} do not: {', '.join(out[:3])}{more}", stacklevel=3
        )
    return out
