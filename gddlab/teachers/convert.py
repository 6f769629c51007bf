"""Turns any teacher into a safetensors file that holds its architecture, and checks that its outputs are equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.files import atomic_path, check_free, path_of
from gddlab.nets import Precond, load_network, save_network
from gddlab.runtime import generator
from gddlab.teachers.catalog import TeacherCard, load_precond

SIGMAS = 5
"""Noise levels of the check, over the network's range."""


@dataclass(frozen=True)
class Converted:
    """A file that was written, and how it was checked."""

    path: Path
    card: TeacherCard
    outputs: int
    """Denoised images that were compared, all equal bit for bit."""

    def __str__(self) -> str:
        size = self.path.stat().st_size / 2**20
        return (
            f"{self.path}: {self.card.parameters:,} parameters, {size:.1f} MiB; "
            f"{self.outputs} outputs equal those of the original, bit for bit"
        )


def convert(source: str | Path, out: str | Path, *, overwrite: bool = False) -> Converted:
    """Writes a teacher (or published student) as safetensors.

    The metadata keeps architecture, preconditioning, sigma range, classes, the data set if known, and name, class and
    sha256 of the original file. The file is read back and its outputs are compared before it gets its name.

    Args:
        source: As for `load_teacher`.
        out: Path that ends in .safetensors.
        overwrite: Replaces a file that is there.

    Raises:
        GddlabError: As `load_teacher`; `out` has another ending, exists, or cannot be written; outputs differ.
    """
    out = path_of("out", out)
    if out.suffix != ".safetensors":
        raise GddlabError(f"{out} does not end in .safetensors: give such a name")
    check_free(out, overwrite)
    net = load_precond(source)
    try:
        with atomic_path(out) as tmp:
            save_network(net, tmp, **net.card.to_meta())
            again, _ = load_network(tmp)
            outputs = compare(net, again, str(source))
    except OSError as e:
        raise GddlabError(f"{out} cannot be written: {e.strerror or e}") from None
    again = load_precond(out)
    return Converted(out, again.card, outputs)


def compare(net: Precond, again: Precond, source: str) -> int:
    """Denoises the same noise with both networks, and refuses any difference; the number of outputs."""
    low, high = math.log10(net.card.sigma_min), math.log10(net.card.sigma_max)
    levels = torch.logspace(high, low, SIGMAS, dtype=torch.float64).float()
    sigmas = net.round_sigma(levels)
    shape = (SIGMAS, net.img_channels, net.img_resolution, net.img_resolution)
    z = torch.randn(shape, generator=generator(0, 0))
    x = z * sigmas.reshape(-1, 1, 1, 1)
    labels: list[Tensor | None] = [None]
    if net.label_dim:
        labels.append(torch.nn.functional.one_hot(torch.arange(SIGMAS) % net.label_dim, net.label_dim).float())
    with torch.inference_mode():
        for c in labels:
            a, b = net(x, sigmas, c), again(x, sigmas, c)
            if not torch.equal(a, b):
                raise GddlabError(
                    f"{source}: the converted network differs by {(a - b).abs().max():.3g}; nothing was kept"
                )
            if not torch.isfinite(a).all():
                raise GddlabError(f"{source}: the network's outputs are not finite; nothing was written")
    return SIGMAS * len(labels)
