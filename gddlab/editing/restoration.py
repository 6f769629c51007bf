"""`inpaint` and `restore`: images that agree with what was measured of them, several for each."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from gddlab.editing.operators import Operator, Pixels, check_keep
from gddlab.editing.search import (
    Generator,
    Search,
    Styles,
    check_images,
    class_ids_of,
    colour,
    owned,
    running,
    searching,
    student_in,
)
from gddlab.errors import GddlabError, validated
from gddlab.nets import OneStepPrecond
from gddlab.nets.bare import device_of
from gddlab.probing.guard import eager
from gddlab.probing.inputs import Labels, Precision
from gddlab.progress import progress_bar
from gddlab.runtime import Seed, beside_runs
from gddlab.sampling.samplers import (
    ImageNoise,
    Sampler,
    denoiser_in,
    image_shape,
    input_type,
    noised_again,
    one_hot,
    seed_list,
)

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["optimise", "rounds", "teacher"]
STEPS: dict[str, int] = {"optimise": 50, "rounds": 4, "teacher": 18}
"""Of the search; times that the later steps of a student are gone through; noise levels of a teacher."""
LARGEST = 1e15
"""What a measurement may be at most; its square is still a float."""
TRIED, RATE, WHITE, PLAIN = 8, 0.2, 1.0, 0.05
"""Noise tried before a search, which begins at the nearest; its learning rate; the weights of `colour` and of the mean
square of `Styles` in it. Chosen on the first 256 held-out digits, for other images than those of the tables, and on
162 held-out emoji: with the upper half of a digit known, a search from one noise at an inversion's rate, without
`colour`, ended three times as far from the data; without styles, completed digits and emoji were 7 to 17 % farther from
the hidden truth in pixels."""
RESAMPLED = 4
"""Times that a teacher denoises at each noise level."""


@dataclass(frozen=True, eq=False)
class Restoration:
    """Several images for each measurement.

    Attributes:
        images: In [-1, 1], (B, n, C, H, W).
        error: How far the network's own images measure from what was given, before they were corrected to it: root
            mean square of A x - y, (B, n).
        method, operator: How, and of what.
        calls: Calls of the network per completed image.
        seconds: Wall time per completed image.
    """

    images: Tensor
    error: Tensor
    method: str
    operator: str
    calls: int
    seconds: float

    def __repr__(self) -> str:
        b, n = self.images.shape[:2]
        return (
            f"Restoration of {b} x {n} images by {self.method!r} from {self.operator}: error {self.error.median():.3f} "
            f"(median), {self.calls:,} calls and {self.seconds:.2g} s an image"
        )

    def scores(self, truth: Tensor | None = None) -> pd.DataFrame:
        """One row: error, diversity, and distances to the hidden truth.

        Args:
            truth: What was measured, (B, C, H, W) in [-1, 1]; None omits its columns.

        Returns:
            Columns method, operator, images (B x n), error (mean), diversity (mean perceptual distance between two
            completions of one image; NaN for one), perceptual, pixels (to the truth: mean of `Lite0Distance`, mean root
            mean square), perceptual_best, pixels_best (of the best of n), calls, seconds.

        Raises:
            GddlabError: A truth of another shape.
        """
        import pandas as pd

        from gddlab.distill.distances import Lite0Distance

        b, n = self.images.shape[:2]
        feel = Lite0Distance()

        def distances(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([feel(p, q) for p, q in zip(x.split(64), y.split(64), strict=True)])

        row: dict[str, Any] = {"method": self.method, "operator": self.operator, "images": b * n}
        row |= {"error": self.error.mean().item(), "diversity": math.nan}
        if n > 1:
            i, j = torch.triu_indices(n, n, 1)
            row["diversity"] = distances(self.images[:, i].flatten(0, 1), self.images[:, j].flatten(0, 1)).mean().item()
        if truth is not None:
            truth = check_images("truth", truth, self.images.shape[2:])
            if len(truth) != b:
                raise GddlabError(f"truth has {len(truth)} images: give {b}")
            known = truth[:, None].expand_as(self.images).flatten(0, 1)
            felt = distances(self.images.flatten(0, 1), known).view(b, n)
            pixels = (self.images - truth[:, None]).square().mean((2, 3, 4)).sqrt()
            for name, found in (("perceptual", felt), ("pixels", pixels)):
                row |= {name: found.mean().item(), f"{name}_best": found.min(1).values.mean().item()}
        return pd.DataFrame([row | {"calls": self.calls, "seconds": self.seconds}])


class Problem(NamedTuple):
    """What one batch of rows is to agree with.

    Attributes:
        y: Measurements, one per row.
        operator: Of these rows.
        labels: One-hot, or None.
        seeds: One per row.
    """

    y: Tensor
    operator: Operator
    labels: Tensor | None
    seeds: list[int]

    def error(self, x: Tensor) -> Tensor:
        """Mean square of A x - y over what was measured, (rows,)."""
        return self.operator.error(x, self.y)


@beside_runs()
@validated
@searching
def inpaint(
    student: Any,
    images: Any,
    keep: Any,
    *,
    n: PositiveInt = 4,
    method: Method = "optimise",
    class_labels: Labels = None,
    steps: PositiveInt | None = None,
    restarts: PositiveInt = 1,
    seed: Seed = 0,
    batch_size: PositiveInt = 128,
    dtype: Precision = None,
    progress: bool = True,
) -> Restoration:
    """Completes images of which some pixels are known, each in several ways.

        found = gddlab.inpaint(student, images, keep, n=4)  # found.images: (B, 4, C, H, W)

    Known pixels are in the result as they were given, to the bit.

    Args:
        student, n, method, class_labels, steps, restarts, seed, batch_size, dtype, progress: As for `restore`.
        images: float [-1, 1], (B, C, H, W); unknown pixels may have any value in range.
        keep: Which pixels are known, bool or 0 and 1: (H, W) for all images, or (B, 1 or C, H, W); or the known part by
            name: "top", "bottom", "left", "right" half, or the "border" without the middle.

    Raises:
        GddlabError: Images or a mask of another shape, an image of which nothing is known or nothing missing, and what
            `restore` refuses.
    """
    shape = image_shape(student)
    images = check_images("images", images, shape)
    known = Pixels(check_keep(keep, len(images), shape))
    return restore(
        student,
        known.apply(images),
        known,
        n=n,
        method=method,
        class_labels=class_labels,
        steps=steps,
        restarts=restarts,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
    )


@beside_runs()
@validated
@searching
def restore(
    student: Any,
    measured: Tensor,
    operator: Operator,
    *,
    n: PositiveInt = 4,
    method: Method = "optimise",
    class_labels: Labels = None,
    steps: PositiveInt | None = None,
    restarts: PositiveInt = 1,
    seed: Seed = 0,
    batch_size: PositiveInt = 128,
    dtype: Precision = None,
    progress: bool = True,
) -> Restoration:
    """Images near what a network makes that measure as given: super-resolution, deblurring, colouring.

        restore(student, small, downscale(4)).images

    Methods:
        "optimise": Adam moves noise, from the nearest of 8 random ones, until the student's image measures as given.
            Two terms keep it like what the student knows: neighbouring values of the noise stay uncorrelated, and the
            scales and shifts of the student's channels, which move with the noise for each image, stay near the
            student's own. A completion is the best of `restarts` searches. A compiled student runs as Python here;
        "rounds": for a student of several steps: its image is made to agree, gets noise again and goes through the
            later steps, `steps` times (as consistency models edit; Song et al. 2023, algorithm 4);
        "teacher": for comparison, with a teacher in place of the student: Euler's steps, before each of which the state
            is made to agree with the measurement at that noise level; each step but the first and the last is taken 4
            times, with fresh noise in between (RePaint; Lugmayr et al. 2022, algorithm 1).

    A result depends on an image's place and the seed, not on its batch, but for rounding, which a search of many steps
    can carry to another image that measures as well.

    Args:
        student: A student; a teacher for the method "teacher".
        measured: What was measured, as `operator.apply` gives it, (B, ...).
        operator: What was measured; its adjoint is checked.
        n: Images per measurement.
        method: "optimise", "rounds" or "teacher".
        class_labels: For a conditional network: class ids, or one for all; None draws one for each completion.
        steps: Of the search, by default 50; of rounds 4; of a teacher 18.
        restarts: Of "optimise", searches per completed image.
        seed: Image i, completion k has the seeds from seed + (i * n + k) * restarts on, one a search.
        batch_size: How many searches run at once: completions x restarts; at least those of one completion.
        dtype: Runs the network under autocast, as for `sample`.
        progress: Shows a bar at a terminal.

    Raises:
        GddlabError: A network that does not fit the method; measurements that the operator cannot have given; an
            adjoint that is none; classes of an unconditional network.
    """
    net, y = denoiser_in(student), measured
    if net.latent:
        raise GddlabError("this network works on latents: give one that makes images")
    expected = operator.check(image_shape(student), device_of(student))
    if y.ndim < 2 or tuple(y.shape[1:]) != expected or not len(y):
        raise GddlabError(f"measured is {tuple(y.shape)}: give (B, {', '.join(map(str, expected))})")
    if not y.is_floating_point() or not y.isfinite().all() or y.abs().max() > LARGEST:
        raise GddlabError(f"measured is {y.dtype}, not finite, or above {LARGEST:g}: give finite float numbers")
    if (one_step := isinstance(net, OneStepPrecond)) == (method == "teacher"):
        kind, other = ("student", "a teacher") if one_step else ("teacher", "a one-step student")
        raise GddlabError(f"method={method!r} with a {kind}: give {other}")
    if method == "rounds" and not student_in(student).mid_sigmas:
        raise GddlabError('method="rounds" with a student of one step: give one of several, or method="optimise"')
    began, b, device = time.perf_counter(), len(y), device_of(student)
    run, tries = METHODS[method], restarts if method == "optimise" else 1
    ids, y = class_ids_of(student, class_labels, b), owned(y).float().to(device)
    drawn = seed_list(b * n * tries, seed, None)
    size, of = max(1, batch_size // tries), torch.arange(b).repeat_interleave(n)  # (completions,)
    calls, found = 0, list[tuple[Tensor, Tensor]]()
    with (
        progress_bar(total=b * n, desc=f"restoring, {method}", unit="img", enabled=progress) as bar,
        running(student, dtype),
    ):
        for i in range(0, b * n, size):
            rows = of[i : i + size].repeat_interleave(tries)
            seeds = drawn[i * tries : i * tries + len(rows)]
            own = [seed + (s - seed) // tries for s in seeds]  # one number a completion, which draws its class
            labels = one_hot(net.label_dim, own, None if ids is None else ids[rows])
            labels = None if labels is None else labels.to(device)
            problem = Problem(y[rows.to(device)], operator.at(rows), labels, list(seeds))
            x, calls = run(student, problem, STEPS[method] if steps is None else steps)
            x = x.clamp(-1, 1)
            error = problem.error(x)
            best = error.view(-1, tries).argmin(1) + torch.arange(0, len(x), tries, device=x.device)
            if operator.exact:
                x = problem.operator.agreeing(x, problem.y)
            found.append((x[best].cpu(), error.sqrt()[best].cpu()))
            bar.update(len(best))
    images, errors = (torch.cat(parts).unflatten(0, (b, n)) for parts in zip(*found, strict=True))
    return Restoration(
        images,
        errors,
        method,
        operator.name,
        calls * tries,
        (time.perf_counter() - began) / (b * n),
    )


def _optimise(student: Any, problem: Problem, steps: int) -> tuple[Tensor, int]:
    make, styles = Generator(student), Styles(student)
    with eager(student):  # which hooks need
        with styles.seen():
            start, unlike = _nearest(make, problem)
        later = start[1:]

        def image(z: Tensor, style: Tensor) -> Tensor:
            with styles.added(style):
                return make(z, problem.labels, later)

        def loss(z: Tensor, style: Tensor) -> Tensor:
            far = problem.error(image(z, style)) / unlike
            return far + WHITE * colour(z) + PLAIN * style.square().sum(1) / max(1, style.shape[1])

        search = Search(start[0], styles.zeros(start[0]), steps=steps, lr=RATE)
        search.run(loss, steps)
        with torch.no_grad():
            return image(*search.rows), (TRIED + steps + 1) * make.calls


@torch.no_grad()
def _nearest(make: Generator, problem: Problem) -> tuple[list[Tensor], Tensor]:
    """Of each row, the noise of those tried whose image measures most nearly as given, and that of later steps.

    Also the mean error of the images tried, which have nothing to do with what was measured: the unit of an error.
    """
    drawn = ImageNoise(problem.seeds, make.shape)
    tried = [make.noise(drawn) for _ in range(TRIED)]
    errors = torch.stack([problem.error(make(z, problem.labels, later)) for z, later in tried])  # (TRIED, rows)
    best, rows = errors.argmin(0), torch.arange(errors.shape[1], device=errors.device)
    kinds = zip(*([z, *later] for z, later in tried), strict=True)
    return [torch.stack(kind)[best, rows] for kind in kinds], errors.mean(0).clamp(min=1e-30)


@torch.no_grad()
def _rounds(student: Any, problem: Problem, steps: int) -> tuple[Tensor, int]:
    net, noise = student_in(student), ImageNoise(problem.seeds, image_shape(student))
    z = noise(torch.float32).to(problem.y.device)
    x = student((net.sigma_g * z).to(input_type(net)), net.sigma_g, problem.labels)
    levels = steps * net.mid_sigmas
    for sigma in levels:
        x = noised_again(net, problem.operator.put_back(x.float(), problem.y), sigma, noise(torch.float32))
        x = student(x.to(input_type(net)), sigma, problem.labels)
    return x.float(), 1 + len(levels)


@torch.no_grad()
def _teacher(teacher: Any, problem: Problem, steps: int) -> tuple[Tensor, int]:
    net, noise = denoiser_in(teacher), ImageNoise(problem.seeds, image_shape(teacher))
    sampler = Sampler(steps=steps)
    levels = [float(x) for x in net.round_sigma(sampler.noise_levels(*sampler.sigma_range(net)))]
    x = levels[0] * noise(torch.float32).to(problem.y)
    image, calls = x, 0
    for i, (sigma, lower) in enumerate(itertools.pairwise([*levels, 0.0])):
        again = RESAMPLED if i > 0 and lower > 0 else 1
        for k in range(again):
            known = problem.y + sigma * problem.operator.apply(noise(torch.float32).to(x))
            x = problem.operator.put_back(x, known)
            level = torch.tensor(sigma, dtype=input_type(net), device=x.device)
            image, calls = teacher(x.to(level), level, problem.labels).float(), calls + 1
            x = image + lower / sigma * (x - image)  # Euler's step
            if k < again - 1:
                x = x + math.sqrt(sigma**2 - lower**2) * noise(torch.float32).to(x)
    return image, calls


METHODS: dict[str, Callable[[Any, Problem, int], tuple[Tensor, int]]] = {
    "optimise": _optimise,
    "rounds": _rounds,
    "teacher": _teacher,
}
