"""`patch`: what one layer's weights or activations carry from teacher to student, or from student to teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError, unknown
from gddlab.probing.edits import activations_of, check_architecture, equal_weights, weights_of
from gddlab.probing.inputs import Inputs, as_it_was
from gddlab.probing.layers import LayerSelection, denoiser_of, named_layers, select_layers
from gddlab.probing.losses import WEIGHT, Effect, Effects, denoised, warn_of, weighted_error
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.wrap import eager
from gddlab.progress import progress_bar
from gddlab.sampling.samplers import positive

__all__ = ["WHAT", "Measure", "patch"]

Measure = Callable[[nn.Module], float]
"""A number of a network, such as a distance of its samples to real images."""

WHAT: Mapping[str, str] = {
    "weights": "has the other network's parameters and buffers",
    "activations": "gives the other network's output for the same input",
}
"""What is taken from the other network."""


class PatchOutput(Effect):
    """On the scale of what an EDM network adds at this sigma, c_out; at a student's sigma of 80 that is the data's standard deviation, 0.5."""

    stem = "patch_output"
    template = (
        "root of lambda(sigma) |D'(x; sigma) - D(x; sigma)|^2, mean over pixels, where in D' the layer {how}, and D is the intact network; "
        f"{WEIGHT}; mean over images"
    )
    axes = "root mean square over channels, pixels; mean over images"
    unit = "c_out"


class PatchRecovered(Effect):
    """From the distances to the teacher's image, patched and intact, (n, S, 2)."""

    stem = "patch_recovered"
    template = (
        "1 - |G' - D| / |G - D|, where in G' the layer {how}, G is the intact student and D the teacher, which sees the same input; Euclidean "
        "distances, means over images; 1 is the teacher's image, 0 as far from it as before; sem by the delta method"
    )
    axes = "channels, pixels, images; ratio of means"
    unit = "share"

    def value(self, means: Tensor) -> Tensor:
        after, before = means.unbind(1)
        return torch.where(
            after == before, 0.0, 1 - after / before
        )  # nothing recovered, where there is no distance either


class PatchLoss(Effect):
    """Loss with the layer patched minus the intact network's, for the same image and noise."""

    stem = "patch_loss"
    template = (
        "increase of the denoising loss lambda(sigma) |D(x; sigma) - y|^2, mean over pixels, of a network in which the layer {how}; "
        f"{WEIGHT}; mean over images, paired"
    )
    axes = "channels, pixels; mean over images"
    unit = "EDM loss"


class PatchMeasure(Effect):
    """One number a network: it is no mean over images, so that it has no error and does not add up."""

    stem = "patch_measure"
    template = "measure of the network in which the layer {how}, minus the intact one's; a number a layer, repeated at every sigma"
    axes = "as the function given to `patch` says"
    unit = "measure"

    @property
    def n_images(self) -> int:
        return 0


class PatchOutputWeights(PatchOutput, way="weights", how=WHAT["weights"]): ...


class PatchOutputActivations(PatchOutput, way="activations", how=WHAT["activations"]): ...


class PatchRecoveredWeights(PatchRecovered, way="weights", how=WHAT["weights"]): ...


class PatchRecoveredActivations(PatchRecovered, way="activations", how=WHAT["activations"]): ...


class PatchLossWeights(PatchLoss, way="weights", how=WHAT["weights"]): ...


class PatchLossActivations(PatchLoss, way="activations", how=WHAT["activations"]): ...


class PatchMeasureWeights(PatchMeasure, way="weights", how=WHAT["weights"]): ...


class PatchMeasureActivations(PatchMeasure, way="activations", how=WHAT["activations"]): ...


KINDS: Mapping[tuple[str, str], tuple[type[Effect], ...]] = {
    ("weights", "student"): (PatchOutputWeights, PatchRecoveredWeights),
    ("weights", "teacher"): (PatchOutputWeights, PatchLossWeights),
    ("activations", "student"): (PatchOutputActivations, PatchRecoveredActivations),
    ("activations", "teacher"): (PatchOutputActivations, PatchLossActivations),
}
MEASURES = {"weights": PatchMeasureWeights, "activations": PatchMeasureActivations}


def patch(
    student: nn.Module,
    teacher: nn.Module,
    layers: LayerSelection = "conv",
    *,
    what: str = "weights",
    into: str = "student",
    timesteps: int | Sequence[float] | None = 18,
    data: str | ImageDataset | None = None,
    n: int = 16,
    batch_size: int = 64,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    start: int = 0,
    measure: Measure | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Puts one layer at a time of one network into the other, and measures what it changes there.

    A layer stands for all that is in it, a block for its children. Each network keeps its own preconditioning. Numbers do not depend on `batch_size`
    beyond rounding, and memory does not grow with images, noise levels or layers. Networks are run in eval mode without gradients and left as
    they were, weights bit for bit.

    Args:
        student: A one-step generator with the teacher's architecture, but for `map_augment`.
        teacher: The network that it was made from.
        layers: What is patched, each on its own; as in `probe`.
        what: "weights" gives the layer the other network's parameters and buffers; "activations" gives it the other network's output for the
            same input of the networks.
        into: "student" patches the student's one-step images, at sigma 80; "teacher" the teacher's denoising at `timesteps`.
        timesteps, data: As in `probe`; for the teacher only.
        n, batch_size, class_labels, seed, start, device, dtype, progress: As in `probe`; None as `device` is where the patched network is.
        measure: Called with the patched network as it was given here, once a layer; it leaves the network as it is.

    Returns:
        A row a layer, noise level and statistic, with standard errors over images: `patch_output_WHAT`, how much the image changes; into the student
        `patch_recovered_WHAT`, how far it goes to the teacher's D(80 z; 80); into the teacher `patch_loss_WHAT`, how much its
        denoising loss grows; `patch_measure_WHAT`, with `measure`, without an error. Exact definitions are in `meta["stats"]`. The result is of the
        patched network; `meta["settings"]["donor"]` is the fingerprint of the other. Those of other images `merge`, but for a `measure`.

    Raises:
        GddlabError: Networks of different architecture, or the same one twice; an unknown `what` or `into`; a layer without weights, or one whose activations
            cannot be exchanged; a measure that is no number; and whatever `probe` refuses.
    """
    if what not in WHAT:
        raise unknown("what", what, WHAT)
    if into not in ("student", "teacher"):
        raise unknown("into", into, ("student", "teacher"))
    if into == "student" and data is not None:
        raise GddlabError('data= is for into="teacher": a student starts from noise alone, leave it away')
    check_architecture(student, teacher)
    model, donor = (student, teacher) if into == "student" else (teacher, student)
    states = "student" if into == "student" else "noised"
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    positive("batch_size", batch_size)
    net, other, selected = inputs.denoiser, denoiser_of(donor), select_layers(model, layers)
    if strange := [a.name for a in selected if a.name not in named_layers(donor)]:
        raise GddlabError(f"layer {strange[0]!r} is in the {into} alone: leave it out of layers=")
    patched = weights_of if what == "weights" else activations_of
    kinds = KINDS[what, into]
    effects, measured = Effects(selected, kinds), Effects(selected, [MEASURES[what]])
    levels, passes = inputs.split(batch_size)
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(as_it_was(net, device=device, dtype=dtype))
        stack.enter_context(as_it_was(other, device=target))
        for context in (torch.no_grad(), eager(model), eager(donor)):
            stack.enter_context(context)
        equal = {a.name for a in selected if what == "weights" and equal_weights(donor, model, a.name)}
        total = (len(levels) * len(passes) + (measure is not None)) * len(selected)
        bar = stack.enter_context(progress_bar(total=total, desc="patching", unit="pass", enabled=progress))
        for sigmas in levels:
            for i, j in passes:
                rows = inputs.rows(i, j, device=target, sigmas=sigmas)
                intact = denoised(net, rows)
                if into == "student":
                    goal = denoised(other, rows)
                else:
                    goal = inputs.clean(i, j).to(target).repeat_interleave(len(sigmas), 0)
                before = weighted_error(intact, goal, sigmas)
                for layer in selected:
                    found = intact
                    if layer.name not in equal:
                        with patched(donor, model, layer.name):
                            found = denoised(net, rows)
                    after = weighted_error(found, goal, sigmas)
                    second = torch.stack([after, before], -1).sqrt() if into == "student" else after - before
                    effects.add(layer.name, sigmas, weighted_error(found, intact, sigmas).sqrt(), second)
                    bar.update()
        if measure is not None:
            whole = _number(measure, model)
            for layer in selected:
                with patched(donor, model, layer.name):
                    difference = _number(measure, model) - whole
                measured.add(
                    layer.name, inputs.sigmas, torch.full((1, len(inputs.sigmas)), difference, dtype=torch.float64)
                )
                bar.update()
    about: dict[str, Any] = {"tier": "patch", "what": what, "into": into}
    about["donor"] = network_meta(donor)["model"]["fingerprint"]
    about["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    meta = network_meta(model, selected) | inputs.describe() | {"settings": about}
    meta["nonfinite"] = [*effects.nonfinite("patched"), *measured.nonfinite("measure")]
    warn_of(meta["nonfinite"])
    sums = effects.statistics
    if measure is None:
        return ProbeResult.of(selected, inputs.sigmas, sums, meta)
    both = {name: {**by, **measured.statistics[name]} for name, by in sums.items()}
    # without the sums of `measure`, which do not add up, the result is refused by merge
    return ProbeResult.of(selected, inputs.sigmas, both, meta).copy(statistics=sums)


def _number(measure: Measure, model: nn.Module) -> float:
    found = measure(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise GddlabError(f"measure= gave a {type(found).__name__}, no number: return a float") from None
