"""`patch`: what one layer's weights or activations carry from teacher to student, or from student to teacher."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, SkipValidation
from torch import Tensor, nn

from gddlab.errors import GddlabError, check_takes, validated
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.probing.ablate import select_sites
from gddlab.probing.effects import (
    AtSite,
    Effects,
    Ran,
    change_statistics,
    denoised,
    keep,
    tapped,
    that_run,
    weighted_error,
)
from gddlab.probing.guard import as_it_was, eager
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Timesteps, Unit
from gddlab.probing.layers import LayerSelection, check_architecture, named_layers, named_tensors, select_layers
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.sites import again, layer_of
from gddlab.probing.statistics import Given, PerImage, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs
from gddlab.sampling.samplers import precision

Measure = SkipValidation[Callable[[nn.Module], float]]
"""A number of a network, such as a distance of its samples to real images."""

What = Literal["weights", "activations"]

WHAT: Mapping[str, str] = {
    "weights": "has the other network's parameters and buffers",
    "activations": "gives the other network's output for the same input",
}
"""What is taken from the other network."""


class Recovered(PerImage):
    """1 - after / before, from the distances to the teacher's image with the layer patched and intact, (n, S, 2)."""

    def value(self, means: Tensor) -> Tensor:
        after, before = means.unbind(1)
        return torch.where(after == before, 0.0, 1 - after / before)  # 0 also where both distances are 0


def _statistics(what: str) -> dict[str, type[PerImage]]:
    patched = f"the layer {WHAT[what]}"
    output, loss = change_statistics("patch", what, patched)
    recovered = declare(
        Recovered,
        f"patch_recovered_{what}",
        f"1 - |G' - D| / |G - D|, where in G' {patched}, G is the intact student and D the teacher, which sees the "
        "same input; Euclidean distances, means over images; 1 is the teacher's image, 0 as far from it as before; "
        "sem by the delta method",
        axes="channels, pixels, images; ratio of means",
        unit="share",
    )
    return {"output": output, "student": recovered, "teacher": loss}


STATISTICS = {what: _statistics(what) for what in WHAT}
MEASURES = {
    what: declare(
        Given,
        f"patch_measure_{what}",
        f"measure of the network in which the layer {how}, minus the intact one's; one number per layer, repeated at "
        "every sigma",
        axes="as the function given to `patch` says",
        unit="measure",
    )
    for what, how in WHAT.items()
}


@beside_runs()
@validated
def patch(
    student: Any,
    teacher: Any,
    layers: LayerSelection = "conv",
    *,
    what: What = "weights",
    into: Literal["student", "teacher"] = "student",
    timesteps: Timesteps = 18,
    unit: Unit = "sigma",
    data: Data = None,
    n: PositiveInt = 16,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    measure: Measure | None = None,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> ProbeResult:
    """Puts one layer at a time of one network into the other, and measures what it changes there.

    A layer includes all that is in it, a block its children. Each network keeps its own preconditioning. Numbers do not
    depend on `batch_size` beyond rounding, and memory does not grow with images, noise levels or layers. Networks are
    run in eval mode without gradients and left as they were, weights bit for bit.

    Args:
        student: A one-step generator with the teacher's architecture, but for `map_augment`.
        teacher: The network that it was made from.
        layers: What is patched, each on its own; as in `probe`.
        what: "weights" gives the layer the other network's parameters and buffers; "activations" gives it the other
            network's output for the same input of the networks.
        into: "student" patches the student's one-step images, at sigma 80; "teacher" the teacher's denoising at
            `timesteps`.
        timesteps, unit, data: As in `probe`; for the teacher only.
        n, batch_size, class_labels, seed, start, device, dtype, progress: As in `probe`; None as `device` is where the
            patched network is.
        measure: Called with the patched network as it was given here, once per layer; it must not change the network.

    Returns:
        One row per layer, noise level and statistic, with standard errors over images: `patch_output_WHAT`, how much
        the image changes; into the student `patch_recovered_WHAT`, how close it comes to the teacher's D(80 z; 80);
        into the teacher `patch_loss_WHAT`, how much its denoising loss grows; with `measure`, `patch_measure_WHAT`
        without an error. Exact definitions are in `meta["stats"]`. The result is of the patched network;
        `meta["settings"]["donor"]` is the fingerprint of the other. Those of other images `merge`, except with a
        `measure`.

    Raises:
        GddlabError: Networks of different architecture, or the same one twice; an unknown `what` or `into`; a layer
            without weights, or one whose activations cannot be exchanged; a measure that is no number; and whatever
            `probe` refuses.
    """
    if into == "student" and data is not None:
        raise GddlabError('data= is for into="teacher": a student starts from noise alone, omit it')
    if measure is not None:
        check_takes("measure", measure, "model")
    if unwrap(student) is unwrap(teacher):
        raise GddlabError("student and teacher are the same network: give two")
    check_architecture(named_tensors(unwrap(student)), named_tensors(unwrap(teacher)))
    model, donor = (student, teacher) if into == "student" else (teacher, student)
    states: Any = "student" if into == "student" else "noised"
    images: Any = {"n": n, "start": start, "seed": seed, "class_labels": class_labels}
    inputs = Inputs(model, timesteps, unit=unit, data=data, states=states, **images)
    net, other = inputs.denoiser, denoiser_of(donor)
    layers = again(layers)
    selected = select_sites(model, layers) if what == "activations" else select_layers(model, layers)
    theirs = named_layers(donor)
    if strange := [a.name for a in selected if layer_of(a.name, theirs) not in theirs]:
        raise GddlabError(f"layer {strange[0]!r} is in the {into} alone: leave it out of layers=")
    patched = weights_of if what == "weights" else activations_of
    measured: dict[str, float] = {}
    levels, passes = inputs.split(batch_size)
    error = functools.partial(weighted_error, sigma_data=inputs.sigma_data)
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(as_it_was(net, device=device, dtype=dtype))
        stack.enter_context(as_it_was(other, device=target))
        for context in (torch.no_grad(), eager(model), eager(donor)):
            stack.enter_context(context)
        not_run: dict[str, str] = {}
        if what == "activations":
            selected, not_run = that_run(model, inputs.rows(0, 1, device=target, sigmas=levels[0]), selected, layers)
        effects = Effects(model, inputs, selected, [STATISTICS[what]["output"], STATISTICS[what][into]])
        equal = {a.name for a in selected if what == "weights" and equal_weights(donor, model, a.name)}
        total = (len(levels) * len(passes) + (measure is not None)) * len(selected)
        bar = stack.enter_context(progress_bar(total=total, desc="patching", unit="pass", enabled=progress))
        for sigmas in levels:
            for i, j in passes:
                shown = inputs.noised(i, j, device=target, sigmas=sigmas)
                rows, clean = shown[:3], shown.clean
                intact = denoised(net, rows)
                goal = denoised(other, rows) if clean is None else clean
                before = error(intact, goal, sigmas)
                for layer in selected:
                    found = intact
                    if layer.name not in equal:
                        with patched(donor, model, layer.name):
                            found = denoised(net, rows)
                    after = error(found, goal, sigmas)
                    second = torch.stack([after, before], -1).sqrt() if into == "student" else after - before
                    effects.add(layer.name, sigmas, error(found, intact, sigmas).sqrt(), second)
                    bar.update()
        if measure is not None:
            whole = _number(measure, model)
            for layer in selected:
                with patched(donor, model, layer.name):
                    measured[layer.name] = _number(measure, model) - whole
                bar.update()
    settings = {"tier": "patch", "what": what, "into": into, "donor": network_meta(donor)["model"]["fingerprint"]}
    settings["dtype"] = precision(dtype)
    finite = {name: x if math.isfinite(x) else math.nan for name, x in measured.items()}
    given = {name: MEASURES[what]([x] * len(inputs.sigmas)) for name, x in finite.items()}
    return effects.result(side="patched", settings=settings, given=given, not_run=not_run)


def _number(measure: Measure, model: nn.Module) -> float:
    found = measure(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise GddlabError(f"measure= gave a {type(found).__name__}, no number: return a float") from None


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
    """Whether layer `name` has the same bits in both, on one device; refuses a layer without weights."""
    ours, theirs = (named_tensors(named_layers(net)[name]) for net in (model, donor))
    if not ours:
        raise GddlabError(f'layer {name!r} has no weights: leave it out of layers=, or give what="activations"')
    return all(t.dtype == theirs[k].dtype and torch.equal(t, theirs[k]) for k, t in ours.items())


@contextlib.contextmanager
def activations_of(donor: nn.Module, model: nn.Module, *names: str) -> Iterator[None]:
    """Inside, layers `names` of `model` return what `donor`'s, which is run first, return for the same arguments."""
    kept: dict[str, Tensor] = {}
    seen: list[Ran] = []

    def run_donor(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen[0].clear()
        kept.clear()
        with tapped(donor, dict.fromkeys(names, keep(kept))):
            denoiser_of(donor)(*args, **kwargs)

    # before the hooks of `tapped`: each call of the network is a pass of its own
    handle = denoiser_of(model).register_forward_pre_hook(run_donor, with_kwargs=True)
    try:
        with tapped(model, dict.fromkeys(names, AtSite(lambda _, key: _kept(kept, key)))) as ran:
            seen.append(ran)
            yield
    finally:
        handle.remove()


def _kept(kept: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in kept:
        raise GddlabError(f"{key!r} is in one of the networks alone: leave it out of layers=")
    return kept[key]
