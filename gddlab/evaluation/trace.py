"""`trace`: what each layer is needed for on the way from noise to image, one step of the sampler at a time."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, SkipValidation
from torch import Tensor, nn

from gddlab.datasets import data_of
from gddlab.errors import GddlabError, validated
from gddlab.evaluation.extractors import Extractor, PixelExtractor, find_extractor
from gddlab.evaluation.features import image_features
from gddlab.evaluation.images import check_shape
from gddlab.evaluation.metrics import Statistics, statistics
from gddlab.evaluation.references import Reference, open_reference
from gddlab.nets import OneStepPrecond
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.probing.ablate import MODES as REPLACED
from gddlab.probing.ablate import all_sites, changes_of, means_of, outputs_of, select_sites, sized
from gddlab.probing.effects import Effects, denoised, tapped, that_run
from gddlab.probing.guard import as_it_was, eager
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Rows, Timesteps, Unit
from gddlab.probing.layers import LayerSelection, check_architecture, named_layers, named_tensors
from gddlab.probing.patch import activations_of
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.sites import again
from gddlab.probing.statistics import Given, PerImage, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs
from gddlab.sampling import ImageNoise, heun_step
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import noised_again, resolve, sampler_name

Mode = Literal["mean", "zero", "resample", "donor"]

MODES: Mapping[str, str] = {
    "mean": "its mean over images and pixels, of each channel, in the same call of the undisturbed sampling",
    "zero": REPLACED["zero"],
    "resample": "its output for another image in the same call",
    "donor": "the other network's output for the same input of the networks",
}
"""What replaces an output."""

GROUPS = 32
"""Parts of the images of which a jackknife leaves out one at a time: more cost time and hardly change the error."""


def _when(mode: str) -> str:
    part = "the layer's output (of a block: its branch's and its attention's)"
    return f"{part} is replaced by {MODES[mode]}, in every network call of the step that starts from sigma"


def _pixels(mode: str) -> type[PerImage]:
    return declare(
        PerImage,
        f"trace_pixels_{mode}",
        f"root of the mean of (y' - y)^2 over channels and pixels, where y is the final image, clipped to [-1, 1], and "
        f"y' that of the same noise when {_when(mode)}; mean over images",
        axes="root mean square over channels, pixels; mean over images",
        unit="[-1, 1]",
    )


@functools.cache
def _features(mode: str, extractor: str) -> type[PerImage]:
    return declare(
        PerImage,
        f"trace_{extractor}_{mode}",
        f"Euclidean distance of the {extractor} features of the final image, as 8 bits, and of that of the same noise "
        f"when {_when(mode)}; mean over images",
        axes="norm over features; mean over images",
        unit=f"{extractor} feature",
    )


def _to_data(mode: str, spec: Extractor, n: int, real: str) -> type[Given]:
    return declare(
        Given,
        f"trace_{spec.metric_name('fid').replace('-', '_')}_{mode}",
        f"increase of the Frechet distance, {spec.label} features, of the final images of {n} seeds to {real} when "
        f"{_when(mode)}; distances of so few images are large, and only differences at equal n compare; sem by a "
        f"jackknife over at most {GROUPS} groups of images, paired",
        axes="images, features",
        unit="squared feature",
    )


PIXELS = {mode: _pixels(mode) for mode in MODES}


@beside_runs()
@validated
def trace(
    model: Any,
    steps: Timesteps = None,
    layers: LayerSelection = "block",
    mode: Mode = "mean",
    *,
    unit: Unit = "sigma",
    donor: SkipValidation[Any] = None,
    n: Annotated[int, Field(ge=2)] = 64,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    extractor: str | Path | None = "lite0",
    data: Data = None,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures what each layer is needed for in generation: disturbs it in one step, and looks at the final image.

    A teacher is sampled by Heun's method (Karras et al. 2022, algorithm 1), a student by its own steps. One layer's
    output is replaced in every network call of one step; the rest of the sampling is undisturbed. What is replaced is
    what `ablate` replaces: of a residual block, what its branch and its attention add.

    The undisturbed state is kept at each step, so that no sampling starts from noise again. For L layers and S steps a
    teacher takes L S^2 + 4 S - 3 network calls for each part of `batch_size` images, a student
    L S (S + 1) / 2 + 2 S - 1: 4,605 for the 14 blocks and 18 steps of the digits teacher. "resample" adds a call for
    each disturbed one of a block with attention, "donor" one of the donor for each. Memory grows with `n` by an image
    and its features, not with layers or steps. Numbers do not depend on `batch_size` beyond rounding.

    Args:
        model: A teacher or student; any denoiser as for `probe` that says its `img_channels` and `img_resolution`.
        steps: Number of steps or, descending, their noise levels; None takes 18 of a teacher, a student's own.
        unit: Of `steps`: "sigma", or "t", a teacher's own time, as in `probe`.
        layers: What is disturbed, each on its own; as in `ablate`.
        mode: "mean" replaces an output by its mean over all `n` images and all pixels, of each channel, in the same
            call of the undisturbed sampling; "zero" by zeros; "resample" by its output for another image in the same
            call, where images are swapped in pairs; "donor" by that of `donor` for the same input of the networks.
        donor: A network of the same architecture, but for `map_augment`, such as the teacher of a student.
        n: Images, at least 2.
        batch_size: Images of one pass; with "resample" at least two.
        seed: First seed; image i comes from seed + i, as in `sample`.
        class_labels, device, dtype, progress: As in `probe`.
        extractor: Network whose features are compared too, as for `evaluate`. In Python None compares pixels alone.
        data: Real images, as for `evaluate`, by default those on the network's card. Where there are none, distances to
            them are not measured.

    Returns:
        One row per layer, step and statistic; `sigma` is the noise level that the step starts from. With standard
        errors over images `trace_pixels_MODE` and `trace_lite0_MODE`, the distance of the final images to the
        undisturbed ones, in pixels and in features; `trace_fd_lite0_MODE`, how much farther from the data the set is.
        Exact definitions are in `meta["stats"]`, the undisturbed set's own distance in `meta["settings"]`.

    Raises:
        GddlabError: An unknown mode; an odd `n` with "resample"; a donor missing, of another architecture, or without
            use; settings of a teacher given to a student; real images of another shape; and whatever `ablate` refuses.
    """
    spec = None if extractor is None else find_extractor(extractor)
    if spec is None and data is not None:
        raise GddlabError("data= is compared by features: give an extractor, or omit data=")
    if isinstance(spec, PixelExtractor):
        raise GddlabError("extractor='pixels': pixels are compared anyway, give a network")
    if mode == "resample" and n % 2:
        raise GddlabError(f'n={n}: mode="resample" swaps the images of each pair, give an even n')
    sampling = Sampling(model, steps, unit=unit, n=n, seed=seed, class_labels=class_labels)
    layers = again(layers)
    selected, modules = select_sites(model, layers), named_layers(model)
    other = _donor(model, donor, mode)
    inputs = sampling.inputs
    if inputs.codec is None and getattr(inputs.denoiser, "latent", False):
        raise GddlabError("this network makes latents, and images are compared here: give gddlab.wrap vae=")
    spec = None if spec is None else spec.fitted(*inputs.image_shape[:2])
    real = None if spec is None else _real(sampling.inputs, data, spec, progress)
    outputs = {layer.name: outputs_of(layer, modules) for layer in selected}
    kinds = [PIXELS[mode]] + ([] if spec is None else [_features(mode, spec.label)])
    size = max(batch_size, 2) // 2 * 2 if mode == "resample" else batch_size
    parts = [(i, min(i + size, n)) for i in range(0, n, size)]
    shapes: dict[str, torch.Size] = {}
    sites: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(as_it_was(sampling.net, device=device, dtype=dtype))
        if other is not None:
            stack.enter_context(as_it_was(denoiser_of(other), device=target))
            stack.enter_context(eager(other))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager(model))
        one = sampling.inputs.rows(0, 1, device=target, sigmas=sampling.inputs.sigmas[:1])
        selected, not_run = that_run(model, one, selected, layers, outputs)
        every = {part: None for layer in selected for part in outputs[layer.name]}
        effects = Effects(model, sampling.inputs, selected, kinds)
        farther: dict[str, list[tuple[float, float]]] = {layer.name: [] for layer in selected}
        total = len(parts) * len(sampling) * len(selected)
        bar = stack.enter_context(progress_bar(total=total, desc="tracing", unit="sampling", enabled=progress))

        probes = [
            [all_sites(model, [sigma], every) for sigma in calls] if mode == "mean" else [] for calls in sampling.calls
        ]
        whole = torch.empty(n, *inputs.image_shape)
        for i, j in parts:
            x = sampling.begin(i, j, target)
            for k in range(len(sampling)):
                x = sampling.step(k, x, i, j, functools.partial(_seen, model, every, shapes, sites, probes[k]))
            whole[i:j] = final(inputs.shown(x))
        means = [[means_of(probe) for probe in of_step] for of_step in probes]
        intact = None if spec is None else Compared(whole, spec, real, target)

        states = [sampling.begin(i, j, target) for i, j in parts]
        for k, sigma in enumerate(sampling.inputs.sigmas):
            for layer in selected:
                around = functools.partial(
                    _disturbed, model, sampling.net, sites, outputs[layer.name], mode, means[k], other
                )
                images = torch.empty_like(whole)
                for (i, j), state in zip(parts, states, strict=True):
                    x = sampling.step(k, state, i, j, around)
                    for later in range(k + 1, len(sampling)):
                        x = sampling.step(later, x, i, j)
                    images[i:j] = final(inputs.shown(x))
                    bar.update()
                numbers = [(images - whole).double().square().mean((1, 2, 3)).sqrt()]
                if intact is not None:
                    features = intact.features_of(images)
                    numbers.append((features - intact.features).norm(dim=1))
                    if real is not None:
                        farther[layer.name].append(intact.farther(features))
                effects.add(layer.name, [sigma], *[x[:, None] for x in numbers])
            if k + 1 < len(sampling):
                states = [sampling.step(k, x, i, j) for (i, j), x in zip(parts, states, strict=True)]
    effects.layers = [sized(layer, shapes[outputs[layer.name][0]]) for layer in selected]
    settings: dict[str, Any] = {"tier": "trace", "mode": mode, "sampler": sampling.name}
    settings["extractor"] = None if spec is None else spec.label
    settings["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    settings["donor"] = None if other is None else network_meta(other)["model"]["fingerprint"]
    given = None
    if spec is not None and real is not None and intact is not None:
        kind = _to_data(mode, spec, n, real.name)
        columns = {name: torch.tensor(rows, dtype=torch.float64).T for name, rows in farther.items()}
        given = {name: kind(value, sem, n) for name, (value, sem) in columns.items()}
        distance = intact.distance if math.isfinite(intact.distance) else None
        settings |= {"data": real.name, "data_sha256": real.sha256, "distance": distance}
    result = effects.result(side="disturbed", settings=settings, given=given, not_run=not_run)
    # the means are of these images, as in `ablate`
    return result.copy(statistics={}) if mode == "mean" else result


def _donor(model: nn.Module, donor: Any, mode: str) -> nn.Module | None:
    """The other network, checked."""
    if (donor is None) == (mode == "donor"):
        raise GddlabError(
            'mode="donor" takes outputs of another network: give donor='
            if donor is None
            else f'donor= has no use with mode="{mode}": give mode="donor", or omit it'
        )
    if donor is None:
        return None
    if unwrap(donor) is unwrap(model):
        raise GddlabError("the donor is the network itself: give another one")
    check_architecture(named_tensors(unwrap(model)), named_tensors(unwrap(donor)), ("network", "donor"))
    found: nn.Module = donor
    return found


def _real(inputs: Inputs, data: Data, spec: Extractor, progress: bool) -> Reference | None:
    """The real images, checked; None where the network names none."""
    spec.check()
    data = data_of(getattr(inputs.denoiser, "card", None)) if data is None else data
    if data is None:
        return None
    real = open_reference(data, spec, progress=progress)
    check_shape(inputs.image_shape, real, "the network's images")
    return real


@contextlib.contextmanager
def _seen(
    model: nn.Module,
    parts: Mapping[str, None],
    shapes: dict[str, torch.Size],
    sites: dict[str, list[str]],
    probes: Sequence[Probe],
    call: int,
    rows: Rows,
) -> Iterator[None]:
    """Inside, an undisturbed call: a layer that cannot be disturbed is refused, and means are measured if wanted."""
    with contextlib.ExitStack() as stack:
        if probes:
            stack.enter_context(probes[call])
            stack.enter_context(probes[call].images(len(rows[0])))
        ran = stack.enter_context(tapped(model, parts, len(rows[0])))
        yield
    shapes.update(ran)
    sites.update(ran.sites)


@contextlib.contextmanager
def _disturbed(
    model: nn.Module,
    net: nn.Module,
    sites: Mapping[str, Sequence[str]],
    parts: Sequence[str],
    mode: str,
    means: Sequence[Mapping[str, Tensor]],
    donor: nn.Module | None,
    call: int,
    rows: Rows,
) -> Iterator[None]:
    """Inside, the outputs `parts` of one layer are replaced, in call number `call` of a step."""
    if donor is not None:
        with activations_of(donor, model, *parts):
            yield
        return
    n = len(rows[0])
    changes = changes_of(model, net, rows, sites, parts, mode, means[call] if means else {}, n)
    with tapped(model, changes, n):
        yield


Around = Callable[[int, Rows], contextlib.AbstractContextManager[None]]
"""Given the number of a network call in its step, and its arguments: what surrounds the call."""


def _plain(call: int, rows: Rows) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class Sampling:
    """How a network makes images, step by step: the images that `sample` makes of the same seeds.

    A state is what a step starts from: of a teacher x at sigma, float64, as in `integrate`; of a student the noised
    image of the step before, as in `multistep`.

    Args:
        model, steps, unit, n, seed, class_labels: As for `trace`.

    Attributes:
        inputs: Noise, labels, and the noise level that each step starts from.
        net: What is called.
        name: Of the sampler.
        calls: The noise levels of the network calls of each step.
    """

    def __init__(
        self, model: nn.Module, steps: Timesteps, *, unit: Unit = "sigma", n: int, seed: int, class_labels: Labels
    ):
        net = denoiser_of(model)
        self.student = net if isinstance(net, OneStepPrecond) else None
        if self.student is not None and unit == "sigma":
            how: dict[str, Any] = {"steps" if steps is None or isinstance(steps, int) else "sigmas": steps}
            levels: Any = resolve(self.student, **how)
        else:
            levels = 18 if steps is None else steps
        try:
            images: Any = {"n": n, "seed": seed, "class_labels": class_labels}
            self.inputs = Inputs(model, levels, unit=unit, states="trajectory", **images)
        except GddlabError as e:
            raise GddlabError(str(e).replace("timesteps", "steps")) from None
        self.net = self.inputs.denoiser
        sigmas = self.inputs.sigmas
        self.name = f"heun-{len(sigmas)}" if self.student is None else sampler_name(tuple(sigmas))
        self.calls = [[s] for s in sigmas]
        if self.student is None:
            self.calls = [list(pair) for pair in itertools.pairwise(sigmas)] + [sigmas[-1:]]

    def __len__(self) -> int:
        return len(self.inputs.sigmas)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.inputs.float64 else torch.float32

    def begin(self, i: int, j: int, device: torch.device) -> Float[Tensor, "n c h w"]:
        """The states of images i to j that the first step starts from."""
        z = self.inputs.noise(i, j).to(device)
        return self.inputs.sigmas[0] * (z.double() if self.student is None else z.to(self.dtype))

    def step(
        self, k: int, x: Float[Tensor, "n c h w"], i: int, j: int, around: Around = _plain
    ) -> Float[Tensor, "n c h w"]:
        """The states of images i to j after step k, or their final images."""
        sigma, following = (*self.inputs.sigmas, 0.0)[k : k + 2]
        labels = None if self.inputs.labels is None else self.inputs.labels[i:j].to(x.device)
        calls = itertools.count()

        def denoise(x: Tensor, sigma: float) -> Tensor:
            rows = (x.to(self.dtype), torch.full((len(x),), sigma, dtype=self.dtype, device=x.device), labels)
            with around(next(calls), rows):
                return denoised(self.net, rows)

        if self.student is not None:
            x = denoise(x, sigma)
            if k + 1 < len(self):
                x = noised_again(self.student, x, following, self._noise(i, j, k + 1))
            return x

        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - denoise(x, sigma).double()) / sigma

        if following == 0:
            return x - sigma * slope(x, sigma)
        return heun_step(slope, x, sigma, following)

    def _noise(self, i: int, j: int, k: int) -> Tensor:
        """What a student's step k adds: each image's generator continues after its first noise."""
        noise = ImageNoise(range(self.inputs.seed + i, self.inputs.seed + j), self.inputs.shape)
        noise(torch.float32)
        return [noise() for _ in range(k)][-1]


def final(x: Tensor) -> Float[Tensor, "n c h w"]:
    """Images as `sample` gives them: float32 in [-1, 1], on the CPU."""
    return x.float().clamp(-1, 1).cpu()


class Compared:
    """A set of images, and how another of the same seeds differs from it.

    Args:
        images: float32 in [-1, 1], (n, C, R, R).
        spec: Whose features are compared.
        real: What the sets' distances are to; None for no such distance.
        device: Where features are computed.

    Attributes:
        features: (n, D), float64; NaN where an image is not finite.
        distance: Frechet distance of the set to the real images; NaN without them.
    """

    def __init__(self, images: Tensor, spec: Extractor, real: Reference | None, device: torch.device):
        self.spec, self.device = spec, device
        self.bytes = to_uint8(images)
        self.features = torch.zeros(len(images), spec.dims, dtype=torch.float64)
        self.features = self._filled(images, torch.ones(len(images), dtype=torch.bool))
        self.distance = math.nan
        if real is not None:
            found = real.against(spec, device=device)
            self._mean, covariance = found if isinstance(found, Statistics) else statistics(found)
            values, vectors = torch.linalg.eigh(covariance)
            kept = values > 1e-12 * values[-1]  # of a small set most are rounding
            self._trace, self._root = values.sum(), vectors[:, kept] * values[kept].sqrt()  # root root^T = covariance
            self._distances = self._to_real(self.features)
            self.distance = float(self._distances[0])

    def features_of(self, images: Tensor) -> Float[Tensor, "n d"]:
        """Of images of the same seeds; those that equal the set's in every pixel have the set's."""
        other = (to_uint8(images) != self.bytes).flatten(1).any(1) | ~images.isfinite().flatten(1).all(1)
        return self._filled(images, other)

    def _filled(self, images: Tensor, chosen: Tensor) -> Tensor:
        out = self.features.clone()
        if chosen.any():
            out[chosen] = image_features(to_uint8(images[chosen]), self.spec, device=self.device).double()
        out[~images.isfinite().flatten(1).all(1)] = math.nan
        return out

    def farther(self, features: Float[Tensor, "n d"]) -> tuple[float, float]:
        """How much farther from the real images the set of these features is, and the jackknife's error."""
        change = self._to_real(features) - self._distances
        parts = change[1:]
        spread = (parts - parts.mean()).square().mean() * (len(parts) - 1)
        return float(change[0]), float(spread.sqrt())

    def _to_real(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " 1_g"]:
        """Frechet distances (Heusel et al. 2017, equation 6) of all images, and of all but each group of them.

        With features x of n images, the real covariance R R^T and y = R^T (x - mean), the trace of the root of the
        covariances' product is the sum of the singular values of y over sqrt(n - 1): of n numbers if n is small.
        """
        n = len(features)
        if not features.isfinite().all():
            return torch.full((1 + min(n, GROUPS),), torch.nan, dtype=torch.float64)
        projected = features @ self._root
        group = torch.arange(n) % min(n, GROUPS)
        out = []
        for left_out in range(-1, min(n, GROUPS)):
            x, y = features[group != left_out], projected[group != left_out]
            if len(x) < 2:
                out.append(math.nan)
                continue
            mean = x.mean(0)
            variance = (x - mean).square().sum() / (len(x) - 1)
            y = y - y.mean(0)
            gram = y @ y.T if len(y) < y.shape[1] else y.T @ y
            shared = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum() / math.sqrt(len(x) - 1)
            out.append(float((mean - self._mean).square().sum() + variance + self._trace - 2 * shared))
        return torch.tensor(out, dtype=torch.float64)
