"""`sample`: images of a student or a teacher, each from a seed of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.nets import OneStepPrecond, Precond
from gddlab.progress import progress_bar
from gddlab.sampling.arguments import module_of, one_hot, positive, precision, seed_list, sigma_list
from gddlab.sampling.noise import ImageNoise
from gddlab.sampling.schedules import karras_sigmas
from gddlab.sampling.solvers import Sampler, check_sigmas, integrate, multistep, time_steps

__all__ = ["Method", "draw", "one_hot", "prepared", "resolve", "sample", "sampler_name"]

Method = Sampler | tuple[float, ...]
"""A teacher's sampler, or the noise levels of a student."""


def sample(
    net: Precond,
    n: int | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    sigmas: Sequence[float] | None = None,
    batch_size: int = 128,
    dtype: torch.dtype | str | None = None,
    channels_last: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Draws images; an image comes from its seed, whatever the batch size.

    A student takes the steps it was made for, mostly one, or n: `sample(student, sigmas=(80.0, 0.8))`. A teacher is sampled with EDM's deterministic Heun sampler, or as
    the fields of `Sampler` say: `sample(teacher, steps=32, S_churn=40)`. A SiD student is a plain EDMPrecond network that is
    run once at sigma 2.5: `sample(net, steps=1, sigma_max=2.5)` is D(2.5 z; 2.5).

    Args:
        net: Student or teacher; it stays on its device.
        n: Images; 64, or one a seed, if None.
        steps: For a student the number of steps, its own if None; more than one visit the Karras grid from 80 to eps. For a teacher
            the number of noise levels, 18 if None.
        seed: First seed; image i comes from seed + i.
        seeds: Explicit seeds in its place, one an image, 0 to 2^32 - 1.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim);
            None deals classes in turn, an image having class seed mod label_dim.
        sigmas: For a student: the noise levels of its steps, descending from 80; its own if None.
        batch_size: Images at once.
        dtype: torch.bfloat16 or torch.float16, or their names, run the network under autocast; None in its own precision.
        channels_last: Runs the network in that memory format, faster for convolutions on CPUs with bfloat16 and on GPUs.
        progress: Shows a bar when at a terminal or in a notebook.
        **settings: Fields of `Sampler`, for a teacher: solver, discretization, schedule, scaling, sigma_min, sigma_max, rho,
            S_churn, S_min, S_max, S_noise, ...

    Returns:
        float32 in [-1, 1], (n, C, H, W), on the CPU.

    Raises:
        GddlabError: Numbers out of range, settings of a teacher given to a student or the other way round, labels that do not fit.
    """
    how = resolve(net, steps=steps, sigmas=sigmas, **settings)
    image_seeds = seed_list(n, seed, seeds)
    n = len(image_seeds)
    batch_size = positive("batch_size", batch_size)
    if class_labels is None and net.label_dim:
        class_labels = [s % net.label_dim for s in image_seeds]
    labels = one_hot(net.label_dim, n, seed, class_labels)
    out = torch.empty(n, net.img_channels, net.img_resolution, net.img_resolution)
    bar = progress_bar(total=n, desc="sampling", unit="img", enabled=progress)
    with bar, prepared(net, dtype=dtype, channels_last=channels_last):
        for i in range(0, n, batch_size):
            j = min(i + batch_size, n)
            c = None if labels is None else labels[i:j]
            out[i:j] = draw(net, how, image_seeds[i:j], c, channels_last=channels_last)
            bar.update(j - i)
    return out


def resolve(
    net: Precond, *, steps: int | None = None, sigmas: Sequence[float] | None = None, **settings: Any
) -> Method:
    """What `sample` does with a network: the noise levels of a student, or the sampler of a teacher."""
    module = module_of(net)
    if isinstance(module, OneStepPrecond):
        for name, value in settings.items():
            raise GddlabError(f"{name}={value!r} with a one-step student: it takes steps=N or sigmas=(80.0, ...)")
        if sigmas is not None:
            if steps is not None:
                raise GddlabError(f"steps={steps} and sigmas={sigmas}: give one of them")
            levels = sigma_list(sigmas)
            check_sigmas(module, levels)
            return tuple(levels)
        if steps is None:
            return module.sigmas
        k = positive("steps", steps)
        between = karras_sigmas(k + 1, sigma_min=module.eps, sigma_max=module.sigma_g)[1:-1]
        return (module.sigma_g, *between.tolist())
    if sigmas is not None:
        raise GddlabError(
            f"sigmas={sigmas} with {type(module).__name__}: only a one-step student takes sigmas; "
            "give steps, sigma_min, sigma_max"
        )
    fields = [f.name for f in dataclasses.fields(Sampler)]
    for name in settings:
        if name not in fields:
            raise unknown("option of sample", name, fields)
    sampler = Sampler(**settings if steps is None else {"steps": steps, **settings})
    time_steps(module, sampler)
    return sampler


def sampler_name(how: Method) -> str:
    """A short name: "one-step" (from sigma 80), "consistency-2", "heun-18", and whatever is not EDM's default after it; equal for equal samplers only."""
    if isinstance(how, tuple):
        if how == (80.0,):
            return "one-step"
        kind = "one-step" if len(how) == 1 else f"consistency-{len(how)}"
        return f"{kind} sigmas=" + ",".join(f"{s:.17g}" if float(f"{s:.6g}") != s else f"{s:.6g}" for s in how)
    default = Sampler().to_dict()
    rest = {k: v for k, v in how.to_dict().items() if k not in ("steps", "solver") and v != default[k]}
    return " ".join([f"{how.solver}-{how.steps}", *(f"{k}={v}" for k, v in rest.items())])


@contextlib.contextmanager
def prepared(net: Precond, *, dtype: torch.dtype | str | None = None, channels_last: bool = False) -> Iterator[None]:
    """Inference: eval mode, no gradients, autocast, memory format of the weights; afterwards the network is as before."""
    first = next(net.parameters())
    name = precision(dtype)
    if name != "float32" and first.dtype != torch.float32:
        raise GddlabError(f"dtype={name} with a {first.dtype} network: autocast wants float32 weights, use net.float()")
    was_training = net.training
    number = first.dtype if name == "float32" else getattr(torch, name)
    layout = torch.channels_last if channels_last else torch.preserve_format
    # Kernels are converted here once; autocast would cast them again in every call.
    weights = [(p, p.data) for p in net.parameters() if p.ndim == 4 and p is not first]
    try:
        for p, data in weights:
            p.data = data.to(number, memory_format=layout)
        net.eval()
        autocast = torch.autocast(first.device.type, dtype=getattr(torch, name), enabled=name != "float32")
        with torch.inference_mode(), autocast:
            yield
    finally:
        net.train(was_training)
        for p, data in weights:
            p.data = data


def draw(
    net: Precond, how: Method, seeds: Sequence[int], labels: Tensor | None, *, channels_last: bool = False
) -> Tensor:
    """One batch, inside `prepared`.  -> (len(seeds), C, H, W), float32 in [-1, 1], on the CPU"""
    first = next(net.parameters())
    noise = ImageNoise(seeds, (net.img_channels, net.img_resolution, net.img_resolution))
    z = noise(torch.float32).to(first.device)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    c = None if labels is None else labels.to(first.device)
    if isinstance(how, tuple):
        x = multistep(cast(OneStepPrecond, net), z.to(first.dtype), c, sigmas=how, noise=noise)
    else:
        x = integrate(net, z, c, how, noise=noise)
    return x.float().clamp(-1, 1).cpu()
