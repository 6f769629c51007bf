"""One layer of a network changed for a while: its outputs, its weights, or another network's outputs in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.guard import check_ran, check_seen
from gddlab.probing.layers import denoiser_of, named_layers, named_tensors, unwrap

Change = Callable[[Tensor], Tensor | None] | None
"""Takes a layer's output and returns its replacement, of the same shape or one that expands to it; None keeps it, as an
answer or in place of the function."""


@contextlib.contextmanager
def tapped(model: nn.Module, changes: Mapping[str, Change], rows: int | None = None) -> Iterator[dict[str, torch.Size]]:
    """Inside, in one forward pass, the outputs of some layers are seen and changed.

    Args:
        model: Any network.
        changes: What happens to the output of each layer, by name.
        rows: First dimension that outputs must have; None accepts any.

    Yields:
        Shape of each layer's output, once it has run; clear it before another pass.

    Raises:
        GddlabError: A layer did not run, ran twice, returned no tensor, or has another number of rows.
    """
    modules = named_layers(model)
    ran: dict[str, torch.Size] = {}

    def hook_of(name: str, change: Change) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            why = f"this pass has {rows} rows: leave it out of layers="
            check_seen(output, name, "output", again=name in ran, rows=rows, why=why)
            ran[name] = output.shape
            found = None if change is None else change(output)
            # a separate tensor, in the output's memory format: later layers may write into it
            return None if found is None else torch.empty_like(output).copy_(found)

        return hook

    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.callback(modules[name].register_forward_hook(hook_of(name, change)).remove)
        yield ran
    check_ran([name for name in changes if name not in ran])


def spread(mean: Float[Tensor, "rows c"], output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Means of channels in the shape that expands over the pixels of `output`, or over the tokens of (B, T, C)."""
    return mean[:, None] if output.ndim == 3 else mean.reshape(*mean.shape, *[1] * (output.ndim - 2))


def swapped(n: int, output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Exchanges the rows of images 2k and 2k + 1; `n` images."""
    return output.unflatten(0, (n // 2, 2, -1)).flip(1).flatten(0, 2)


@contextlib.contextmanager
def weights_of(donor: nn.Module, model: nn.Module, name: str) -> Iterator[None]:
    """Inside, layer `name` of `model` has the parameters and buffers of `donor`'s; its own return bit for bit."""
    ours, theirs = (named_tensors(named_layers(net)[name]) for net in (model, donor))
    before = {k: t.detach().clone() for k, t in ours.items()}
    try:
        _write(ours, theirs)
        yield
    finally:
        _write(ours, before)


def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for k, t in tensors.items():
        t.data.copy_(values[k])  # by .data: a graph that the user holds stays valid once the values are restored
    torch.clear_autocast_cache()  # it holds low-precision copies of the old values


def equal_weights(donor: nn.Module, model: nn.Module, name: str) -> bool:
    """Whether layer `name` has the same bits in both, on one device.

    Raises:
        GddlabError: It has no weights.
    """
    ours, theirs = (named_tensors(named_layers(net)[name]) for net in (model, donor))
    if not ours:
        raise GddlabError(f'layer {name!r} has no weights: leave it out of layers=, or give what="activations"')
    return all(t.dtype == theirs[k].dtype and torch.equal(t, theirs[k]) for k, t in ours.items())


@contextlib.contextmanager
def activations_of(donor: nn.Module, model: nn.Module, name: str) -> Iterator[None]:
    """Inside, layer `name` of `model` returns what `donor`'s returns for the same arguments of the network.

    `donor` is run before each pass.

    Raises:
        GddlabError: The layer does not run exactly once per pass, or returns no tensor, in either.
    """
    kept: list[Tensor] = []
    with tapped(model, {name: lambda _: kept[0]}) as ran:

        def run_donor(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            ran.clear()
            kept.clear()
            with tapped(donor, {name: lambda output: kept.append(output.clone())}):
                denoiser_of(donor)(*args, **kwargs)

        handle = denoiser_of(model).register_forward_pre_hook(run_donor, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def check_architecture(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses networks whose parameters or buffers differ in name or shape.

    Except for `map_augment`, which a student drops, and `map_target0` and `map_target1`, which one may add.

    Raises:
        GddlabError: They do, or are one network.
    """
    if unwrap(student) is unwrap(teacher):
        raise GddlabError("student and teacher are the same network: give two")
    own = {"map_augment", *TARGET_LAYERS}
    ours, theirs = (
        {k: tuple(t.shape) for k, t in named_tensors(unwrap(net)).items() if own.isdisjoint(k.split("."))}
        for net in (student, teacher)
    )
    for name in (*ours, *theirs):
        a, b = (str(table.get(name, "missing")) for table in (ours, theirs))
        if a != b:
            raise GddlabError(
                f"{name!r} is {a} in the student, {b} in the teacher: give two networks of the same architecture"
            )
