"""`edit` and `directions`: images of a student changed by class, towards others, by strokes, along a direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from gddlab.editing.inversion import Inversion, invert
from gddlab.editing.search import Generator, Search, check_images, class_ids_of, running, searching, slerp
from gddlab.errors import GddlabError, numbers_in, shown, validated
from gddlab.probing.effects import AtSite, keep, tapped
from gddlab.probing.guard import eager
from gddlab.probing.inputs import Labels
from gddlab.probing.layers import LayerSelection, select_layers
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs
from gddlab.sampling.samplers import one_hot, seed_list

RANK = 1e-12
"""Least variance of a direction over the mean square of all outputs; single precision rounds at 1e-14."""

STRONGEST = 1e4
"""Largest strength of an edit, of either sign."""
STROKE_STEPS = 50
"""Of the search that carries strokes into what the student can make."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Principal components of a layer's output over images of a student, at the noise level that it starts from.

    Attributes:
        layer: Its name.
        mean: Of the outputs, (C, H, W).
        vectors: Of unit length, largest variance first, (k, C, H, W).
        std: Standard deviation along each, (k,).
        share: Of the total variance, (k,).
        n: Images that they were estimated from.
    """

    layer: str
    mean: Tensor
    vectors: Tensor
    std: Tensor
    share: Tensor
    n: int

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, i: int) -> Direction:
        if not -len(self) <= i < len(self):
            raise IndexError(f"direction {i}: there are {len(self)}")
        return Direction(self.layer, self.vectors[i] * self.std[i])

    def __repr__(self) -> str:
        shares = ", ".join(f"{x:.0%}" for x in self.share[:4].tolist())
        return (
            f"{len(self)} directions at {self.layer!r} from {self.n} images: {shares}{' ...' if len(self) > 4 else ''}"
        )


@dataclass(frozen=True, eq=False)
class Direction:
    """What is added to a layer's output: one standard deviation along a principal component, or a vector of your own.

    Attributes:
        layer: Its name.
        vector: Of the shape of one image's output, or one that expands to it.
    """

    layer: str
    vector: Tensor


@dataclass(frozen=True, eq=False)
class Edited:
    """Edited images, one column per strength.

    Attributes:
        images: In [-1, 1], (B, S, C, H, W).
        before: The student's images without the edit, (B, C, H, W).
        strengths: Of the edit, S of them.
        z: Noise of the images, (B, S, C, H, W); where the edit acts on layers, that of the images before.
    """

    images: Tensor
    before: Tensor
    strengths: tuple[float, ...]
    z: Tensor

    def __repr__(self) -> str:
        return f"{len(self.images)} images at strengths {', '.join(f'{s:g}' for s in self.strengths)}"


@beside_runs()
@validated
def directions(
    student: Any,
    layer: str,
    *,
    k: PositiveInt = 8,
    n: PositiveInt = 512,
    seed: NonNegativeInt = 0,
    class_labels: Labels = None,
    batch_size: PositiveInt = 64,
    progress: bool = True,
) -> Directions:
    """Directions in which a layer's output varies most over a student's images (Harkonen et al. 2020, GANSpace).

    The output is taken whole, with its places, in the student's first step.

    Args:
        student: A student.
        layer: Name of a layer, as in `probe`.
        k: Directions.
        n: Images, of seeds from `seed` on; more than `k`.
        seed: The first.
        class_labels: For a conditional student, as for `sample`.
        batch_size: Images at once; the outputs of all are held.
        progress: Shows a bar at a terminal.

    Raises:
        GddlabError: No student; no such layer, or several; fewer images than directions; the outputs vary in fewer
            directions, as those of a layer that sees the noise level alone.
    """
    make = Generator(student)
    name = _one_layer(student, layer)
    if n <= k:
        raise GddlabError(f"n={n} images for k={k} directions: give more than {k}")
    labels = one_hot(make.label_dim, seed_list(n, seed, None), class_labels)
    kept: dict[str, Tensor] = {}
    found: list[Tensor] = []
    bar = progress_bar(total=n, desc="directions", unit="img", enabled=progress)
    with bar, running(student), eager(student), torch.no_grad():
        for i in range(0, n, batch_size):
            j = min(i + batch_size, n)
            z, later = make.noise(range(seed + i, seed + j))
            rows = None if labels is None else labels[i:j].to(z)
            make(z, rows, later, [tapped(student, {name: keep(kept)}, j - i)])
            found.append(kept[name].float().cpu())
            bar.update(j - i)
    x = torch.cat(found).double()
    mean = x.mean(0)
    flat = (x - mean).flatten(1)  # (n, d), d mostly above n
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    top, order = values.flip(0)[:k].clamp(min=0), vectors.flip(1)[:, :k]
    if (rank := int((values > RANK * max(x.square().sum().item(), 1e-30)).sum())) < k:
        raise GddlabError(
            f"k={k} directions of {name!r}: its outputs for {n} images vary in {rank} alone, give a smaller k or "
            "another layer"
        )
    axes = (flat.T @ order / top.sqrt()).T
    axes = axes * axes.sum(1, keepdim=True).sign()  # eigenvectors have no sign of their own
    total = values.clamp(min=0).sum()
    return Directions(
        name,
        mean.float(),
        axes.reshape(k, *mean.shape).float(),
        (top / (n - 1)).sqrt().float(),
        (top / total).float(),
        n,
    )


def _one_layer(student: Any, layer: str) -> str:
    names = [found.name for found in select_layers(student, [layer])]
    if len(names) != 1:
        raise GddlabError(f"layer={layer!r} means {len(names)} layers: give the name of one")
    return names[0]


@beside_runs()
@validated
@searching
def edit(
    student: Any,
    source: Any,
    *,
    strength: Any = 1.0,
    class_labels: Labels = None,
    towards: Any = None,
    strokes: Any = None,
    direction: Direction | None = None,
    layers: LayerSelection | None = None,
    batch_size: PositiveInt = 64,
    progress: bool = True,
) -> Edited:
    """Changes images of a student; one of `class_labels`, `towards`, `strokes` and `direction` says how.

        edit(student, [0, 1, 2], towards=[7, 8, 9], strength=[0, 0.5, 1])
        edit(student, photos, direction=directions(student, "model.dec.16x16_block0")[0], strength=[-2, 2])

    Args:
        student: A student.
        source: What is edited: seeds, as for `sample`; an `Inversion`; or images, inverted with `invert`'s defaults.
        strength: One or several; 0 leaves the image, or its inversion if it was given as one, as it is; 1 is the whole
            edit. Along a direction they are standard deviations of either sign.
        class_labels: The class that images shall have, their noise being kept; between 0 and 1 the label is mixed.
        towards: Images of the same number, as seeds, an `Inversion` or images: along the great circle between the noise
            of both. A student of several steps keeps the source's noise of the later ones.
        strokes: Painted images, [-1, 1], (B, C, H, W): noise is searched for from the source's on, until the student's
            image is like the painted one; between 0 and 1 along the great circle.
        direction: One of `directions`, or one of your own, added to its layer's output in the student's first step.
        layers: With `class_labels` and `towards`: the layers that see the edit; the others see the source. Strengths
            mix their outputs.
        batch_size: Images at once.
        progress: Shows a bar at a terminal.

    Raises:
        GddlabError: None or several of the edits; numbers of images that differ; a class for an unconditional student.
    """
    make = Generator(student)
    given = {"class_labels": class_labels, "towards": towards, "strokes": strokes, "direction": direction}
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise GddlabError(f"{' and '.join(kinds) or 'no edit'} given: give one of {', '.join(given)}")
    if layers is not None and kinds[0] in ("strokes", "direction"):
        raise GddlabError(f"layers= with {kinds[0]}: it is for class_labels and towards, omit it")
    strengths = _strengths(strength)
    z, ids, later = _source(make, source, progress, batch_size)
    n = len(z)
    goal, goal_ids = z, ids
    if towards is not None:
        goal, goal_ids, _ = _source(make, towards, progress, batch_size)
        if len(goal) != n:
            raise GddlabError(f"towards has {len(goal)} images and source {n}: give as many")
    if class_labels is not None:
        goal_ids = class_ids_of(student, class_labels, n)
    if strokes is not None:
        painted = check_images("strokes", strokes, make.shape)
        if len(painted) != n:
            raise GddlabError(f"strokes has {len(painted)} images and source {n}: give as many")
        goal = _carried(make, z, ids, later, painted, batch_size)
    names = None if layers is None else [layer.name for layer in select_layers(student, layers)]
    if direction is not None:
        _check_direction(make, direction, z[:1], ids)
    images = torch.empty(n, len(strengths), *make.shape)
    before, noise = torch.empty(n, *make.shape), z[:, None].repeat(1, len(strengths), 1, 1, 1)
    bar = progress_bar(total=n * len(strengths), desc="editing", unit="img", enabled=progress)
    with bar, running(student), eager(student), torch.no_grad():
        for i in range(0, n, batch_size):
            rows = slice(i, min(i + batch_size, n))
            a, b, fixed = z[rows], goal[rows], [x[rows] for x in later]
            ca, cb = (make.one_hot(x if x is None else x[rows]) for x in (ids, goal_ids))
            before[rows] = make(a, ca, fixed).clamp(-1, 1).cpu()
            kept: list[dict[str, Tensor]] = [{} for _ in make.module.sigmas]
            if names is not None:
                make(b, cb, fixed, [tapped(student, dict.fromkeys(names, keep(step)), len(a)) for step in kept])
            for s, t in enumerate(strengths):
                if direction is not None:
                    change = {direction.layer: AtSite(_added(direction.vector, t))}
                    x = make(a, ca, fixed, [tapped(student, change, len(a))])
                elif names is not None:
                    changes = [dict.fromkeys(names, AtSite(_mixed(step, t))) for step in kept]
                    x = make(a, ca, fixed, [tapped(student, change, len(a)) for change in changes])
                else:
                    at = a if goal is z else slerp(a, b, t)
                    noise[rows, s] = at
                    x = make(at, ca if ca is None or cb is None else torch.lerp(ca, cb, t), fixed)
                images[rows, s] = x.clamp(-1, 1).cpu()
                bar.update(len(a))
    return Edited(images, before, strengths, noise.cpu())


def _check_direction(make: Generator, direction: Direction, z: Tensor, ids: Tensor | None) -> None:
    """Refuses a direction whose vector is not of the shape of its layer's output for one image, or not finite."""
    name, vector = _one_layer(make.net, direction.layer), direction.vector
    if not isinstance(vector, Tensor) or not vector.is_floating_point() or not vector.isfinite().all():
        raise GddlabError(f"direction.vector is {shown(vector)}: give a float tensor of finite numbers")
    kept: dict[str, Tensor] = {}
    _, later = make.noise([0])
    with running(make.net), eager(make.net), torch.no_grad():
        make(z, make.one_hot(ids if ids is None else ids[:1]), later, [tapped(make.net, {name: keep(kept)}, 1)])
    shape = tuple(kept[name].shape[1:])
    given = tuple(vector.shape)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in zip(given[::-1], shape[::-1], strict=False)):
        raise GddlabError(f"direction.vector is {given}: the output of {name!r} is {shape} for one image, give that")


def _strengths(strength: Any) -> tuple[float, ...]:
    try:
        listed = [strength] if isinstance(strength, Real) and not isinstance(strength, bool) else numbers_in(strength)
        found = tuple(float(x) for x in listed)
    except (TypeError, ValueError, OverflowError):
        raise GddlabError(f"strength={shown(strength)}: give a number, or a list of numbers") from None
    if not found or not all(abs(x) <= STRONGEST for x in found):
        raise GddlabError(f"strength={shown(strength)}: give numbers of at most {STRONGEST:g}, at least one")
    return found


def _source(
    make: Generator, source: Any, progress: bool, batch_size: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Noise, class ids and the noise of later steps of seeds, an inversion, or images."""
    if isinstance(source, Tensor) and source.is_floating_point():
        source = invert(make.net, source, batch_size=batch_size, progress=progress)
    if isinstance(source, Inversion):
        if tuple(source.z.shape[1:]) != make.shape:
            raise GddlabError(f"the inversion is of images {tuple(source.z.shape[1:])}: give one of {make.shape}")
        _, later = make.noise(source.seeds.tolist())
        return source.z.to(make.device), source.class_ids if make.label_dim else None, later
    if isinstance(source, str) or not isinstance(source, Iterable):
        raise GddlabError(f"{shown(source)} is no source: give a list of seeds, an Inversion, or images (B, C, H, W)")
    if getattr(source, "ndim", 1) == 0:
        raise GddlabError(f"{shown(source)} is one number: give a list of seeds")
    seeds = seed_list(None, 0, list(source))
    labels = one_hot(make.label_dim, seeds, None)
    z, later = make.noise(seeds)
    return z, None if labels is None else labels.argmax(1), later


def _carried(
    make: Generator, z: Tensor, ids: Tensor | None, later: Sequence[Tensor], painted: Tensor, batch_size: int
) -> Tensor:
    """Noise near z of images like the painted ones."""
    out = torch.empty_like(z)
    for i in range(0, len(z), batch_size):
        rows = slice(i, min(i + batch_size, len(z)))
        wanted, fixed = painted[rows].to(z), [x[rows] for x in later]
        labels = make.one_hot(ids if ids is None else ids[rows])

        def loss(z: Tensor, wanted: Tensor = wanted, labels: Any = labels, fixed: Any = fixed) -> Tensor:
            return (make(z, labels, fixed) - wanted).square().mean((1, 2, 3))

        with running(make.net):
            search = Search(z[rows], steps=STROKE_STEPS)
            search.run(loss, STROKE_STEPS)
        out[rows] = search.z
    return out


def _added(vector: Tensor, strength: float) -> Any:
    return lambda output, key: output + strength * vector.to(output)


def _mixed(kept: dict[str, Tensor], strength: float) -> Any:
    return lambda output, key: torch.lerp(output, kept[key], strength)
