"""`decode`: what a linear readout finds in each layer's output: image, noise, class, noise level."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown, validated, warn
from gddlab.nets.bare import denoiser_of
from gddlab.probing.ablate import select_sites, sized
from gddlab.probing.effects import AtSite, tapped, that_run
from gddlab.probing.guard import as_it_was, eager, exactly, warn_nonfinite
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Rows, Timesteps, Unit, dataset_of
from gddlab.probing.layers import Layer, LayerSelection
from gddlab.probing.reductions import PIECE
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.sites import again
from gddlab.probing.statistics import PerImage, Statistic, declare, stacked
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs, generator
from gddlab.sampling.samplers import precision

Target = Literal["image", "noise", "class", "sigma"]
TARGETS: tuple[Target, ...] = ("image", "noise", "class", "sigma")
PIXELS = ("image", "noise")
"""Targets with a number per pixel."""

STRENGTHS = torch.logspace(-10, 2, 49, dtype=torch.float64)
"""Strengths of ridge regressions that are compared, as shares of the features' largest eigenvalue."""
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of logistic regressions that are compared: scikit-learn's C, for features of unit variance."""
SET_ASIDE = 5
"""One of this many fitting images judges the strengths of logistic regressions."""
SHUFFLES = 1 << 20
"""Position of the first random numbers of `decode` in the sequence of a seed; images' orders are at small ones."""


class Explained(PerImage):
    """1 - error / spread, from the squared error and the squared distance from the mean of each image, (n, S, 2)."""

    def value(self, means: Tensor) -> Tensor:
        error, spread = means.unbind(1)
        return 1 - error / spread


def _statistics(target: str) -> dict[str, type[PerImage]]:
    """The statistic of a target and its chance level, by name."""
    read = "a linear readout from a seeded Gaussian projection of the layer's output, fitted on other images,"
    ridge = "ridge regression, strength by generalised cross-validation (Golub, Heath, Wahba 1979)"
    base, axes, unit = PerImage, "mean over held-out images", "share"
    if target in PIXELS:
        what = {"image": "clean image", "noise": "standard normal noise"}[target]
        base, unit, axes = Explained, "R²", "sums over channels, pixels, held-out images; ratio of sums"
        definition = (
            f"share of the variance of the {what} that {read} explains on held-out images: 1 - sum |y - y'|^2 / "
            f"sum |y - m|^2, m the mean of the fitting images; {ridge}; sem over held-out images by the delta method"
        )
    elif target == "class":
        definition = (
            f"share of held-out images whose class {read} finds: multinomial logistic regression on standardised "
            f"features, strength by the log loss on one of {SET_ASIDE} fitting images"
        )
    else:
        unit = "R²"
        definition = (
            f"how well {read} finds ln sigma: 1 - (mean squared error at this sigma) / (variance of ln sigma over the "
            "noise levels), one readout for all noise levels, so that the mean over them is the usual R² and a single "
            f"value may be far below 0; {ridge}"
        )
    among = "levels of each image" if target == "sigma" else "images"
    by = {"": definition, "_chance": f"chance level: as decode_{target}, with the targets shuffled among {among}"}
    names = {end: f"decode_{target}{end}" for end in by}
    return {names[end]: declare(base, names[end], text, axes=axes, unit=unit) for end, text in by.items()}


STATISTICS: Mapping[str, Mapping[str, type[PerImage]]] = {target: _statistics(target) for target in TARGETS}


@beside_runs()
@validated
def decode(
    model: Any,
    timesteps: Timesteps = 18,
    targets: Target | Sequence[Target] = TARGETS,
    *,
    unit: Unit = "sigma",
    data: Data = None,
    layers: LayerSelection = "block",
    n: PositiveInt = 1280,
    held_out: PositiveInt = 512,
    dims: PositiveInt = 256,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures what can be read out of each layer at each noise level: a linear readout, scored on held-out images.

    Readouts are fitted on a random projection of a layer's output, at each noise level anew ("sigma": one for all),
    on `n` images with their own noise, and scored on `held_out` others. Each is fitted and scored once more with
    shuffled targets: the chance level, which is not 0 where images are few.

    Ridge regressions are fitted from sums, so memory does not grow with images or noise levels; only "class" keeps the
    features of one noise level, 4 * `dims` bytes per image and layer. The sums take 8 * `dims` * (`dims` + 4 * numbers
    of an image) bytes per layer, the projection 4 * `dims` bytes per number of the largest output. Numbers do not
    depend on `batch_size` beyond rounding, and the network is left as it was.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`, as for `probe`.
        timesteps, unit, data, class_labels, device, dtype, progress: As in `probe`.
        targets: What is read out: "image", the clean image; "noise", the standard normal noise added to it; "class",
            its class, also where the network is unconditional; "sigma", ln sigma, which needs two noise levels or more.
        layers: Whose outputs are read: "block" for residual blocks; presets, names, globs and so on, as in `probe`.
        n: Images that readouts are fitted on, the first of the dataset's order under `seed`.
        held_out: Images that they are scored on, those that follow.
        dims: Numbers kept of each output; an output with fewer is used whole. Of noise no more than a share `dims` /
            (numbers of an image) can be found, so compare layers, and results of equal `dims`. Fewer images than
            numbers give poor readouts and uncertain scores, which a warning says.
        batch_size: Images of one forward pass, which holds one noise level.
        seed: Of the images' order, the noise, the projection and the shuffles.

    Returns:
        One row per layer, noise level and statistic, with standard errors over held-out images: `decode_image`,
        `decode_noise` and `decode_sigma`, R² (1 is perfect, 0 no better than the mean); `decode_class`, accuracy; and
        `decode_image_chance` and so on. Exact definitions are in `meta["stats"]`. `ProbeResult.readouts` draws them.
        Results `join` with a probe of the same network, and do not merge: each image belongs to one readout.
        `meta["nonfinite"]` lists layers and noise levels without a finite value.

    Raises:
        GddlabError: Unknown targets; "class" of images without labels, or of one class; "sigma" at a single noise
            level; more images than there are; a named layer that does not run, one that returns no tensor with one
            row per image; and whatever `probe` refuses.
    """
    wanted: list[str] = list(dict.fromkeys([targets] if isinstance(targets, str) else targets))
    if not wanted:
        raise GddlabError(f"targets is empty: accepted are {', '.join(TARGETS)}")
    inputs = inputs_for(model, timesteps, unit, data, seed, class_labels, n=n, held_out=held_out)
    answers = Answers(inputs, n, wanted)
    layers = again(layers)
    chosen = select_sites(model, layers)
    fitting, judging = spans(0, n, batch_size), spans(n, inputs.n, batch_size)
    by_level = [t for t in wanted if t != "sigma"]
    kinds = {name: kind for target in wanted for name, kind in STATISTICS[target].items()}
    bad: defaultdict[tuple[str, float], dict[int, int]] = defaultdict(dict)
    passes = len(fitting) + len(judging) * (bool(by_level) + ("sigma" in wanted))
    with (
        as_it_was(inputs.denoiser, device=device, dtype=dtype) as target,
        torch.no_grad(),
        eager(model),
        progress_bar(total=passes * len(inputs.sigmas), desc="decoding", unit="pass", enabled=progress) as bar,
    ):
        one = inputs.rows(0, 1, device=target, sigmas=inputs.sigmas[:1])
        selected, not_run = that_run(model, one, chosen, layers)
        reader = Reader(model, inputs.denoiser, selected, dims, seed)
        parts: list[dict[str, dict[str, Statistic]]] = [
            {a.name: {name: kind() for name, kind in kinds.items()} for a in selected} for _ in inputs.sigmas
        ]
        whole = {a.name: Ridge() for a in selected}  # of all noise levels, for "sigma"

        def features(sigma: float, images: Spans) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
            for i, j in images:
                found = reader(inputs.rows(i, j, device=target, sigmas=[sigma]))
                for name, x in found.items():
                    if count := int((~x.isfinite()).any(1).sum()):
                        bad[name, sigma][i] = count  # by image: held-out ones come twice
                yield i, j, found
                bar.update()

        for s, sigma in enumerate(inputs.sigmas):
            fits = {a.name: (Ridge(), Logistic()) for a in selected}
            for i, j, found in features(sigma, fitting):
                if not s and not i:
                    warn_few(max(x.shape[1] for x in found.values()), n=n, held_out=held_out)
                pixels, classes, levels = answers.pixels(i, j), answers.classes(i, j), answers.levels(i, j, s)
                for name, x in found.items():
                    fits[name][0].add(x, pixels)
                    fits[name][1].add(x, classes)
                    whole[name].add(x, levels)
            fitted = {name: {t: fit.readout(t) for fit in both for t in fit.targets} for name, both in fits.items()}
            for i, j, found in features(sigma, judging if by_level else ()):
                right = answers.pixels(i, j) | answers.classes(i, j)
                for name, x in found.items():
                    for t, y in right.items():
                        parts[s][name][f"decode_{t}"].update(x=fitted[name][t].score(x, y)[:, None])
        if "sigma" in wanted:
            readouts = {name: {t: ridge.readout(t) for t in ridge.targets} for name, ridge in whole.items()}
            for s, sigma in enumerate(inputs.sigmas):
                for i, j, found in features(sigma, judging):
                    levels = answers.levels(i, j, s)
                    for name, x in found.items():
                        for t, y in levels.items():
                            error = readouts[name][t].score(x, y)[:, 0]
                            parts[s][name][f"decode_{t}"].update(x=(1 - error / answers.variance)[:, None])
    found_bad = [
        {"layer": a, "side": "output", "sigma": s, "images": sum(counts.values())} for (a, s), counts in bad.items()
    ]
    warn_nonfinite(found_bad, "activations")
    measured = [sized(layer, reader.shapes[layer.name]) for layer in selected]
    meta = network_meta(model, measured) | inputs.describe() | {"nonfinite": found_bad}
    meta |= {"not_run": not_run} if not_run else {}
    meta["settings"] = {"tier": "decode", "dims": dims, "n": n, "held_out": held_out, "dtype": precision(dtype)}
    # a sum over other held-out images would be of other readouts: without sums, merge refuses
    return ProbeResult.of(measured, inputs.sigmas, stacked(parts), meta).copy(statistics={})


def inputs_for(
    model: nn.Module, timesteps: Timesteps, unit: Unit, data: Data, seed: int, class_labels: Labels, **images: int
) -> Inputs:
    """Groups of images, all different, one after the other; `images` are their counts, as the call names them."""
    dataset, n = dataset_of(denoiser_of(model), data, "noised"), sum(images.values())
    if dataset is not None and n > len(dataset):
        counts = " and ".join(f"{name}={count}" for name, count in images.items())
        raise GddlabError(f"{counts} different images, but {dataset.name!r} has {len(dataset)}: give fewer")
    return Inputs(model, timesteps, unit=unit, data=dataset, n=n, seed=seed, class_labels=class_labels)


Spans = Sequence[tuple[int, int]]
"""First and last image of each pass."""


def spans(first: int, last: int, batch_size: int) -> Spans:
    """First and last image of each pass."""
    return [(i, min(i + batch_size, last)) for i in range(first, last, batch_size)]


def warn_few(features: int, **images: int) -> None:
    """Warns of readouts with fewer images than features; `images` by the names that the call has for them."""
    if min(images.values()) < features:
        counts = " and ".join(f"{name}={count}" for name, count in images.items())
        warn(
            f"{features} features are read from {counts} images: readouts of fewer images than features are poor and "
            f"their scores uncertain, give more images, or dims={max(1, min(images.values()) - 1)} or less"
        )


class Answers:
    """What readouts should find, of images in their order and, as NAME_chance, shuffled.

    Args:
        inputs: The images; fitting ones, then held-out ones.
        n: Number of fitting images: both groups are shuffled within.
        wanted: Targets.

    Attributes:
        variance: Of ln sigma over the noise levels.
    """

    def __init__(self, inputs: Inputs, n: int, wanted: Sequence[str]):
        self.inputs, self.wanted = inputs, wanted
        rest = inputs.n - n
        random = generator(inputs.seed, SHUFFLES)
        self._other = torch.cat([torch.randperm(n, generator=random), n + torch.randperm(rest, generator=random)])
        self._level = torch.rand(inputs.n, len(inputs.sigmas), generator=random).argsort(1)
        self._logs = torch.tensor(inputs.sigmas, dtype=torch.float64).log()
        self.variance = float(self._logs.var(correction=0))
        if "sigma" in wanted and len(inputs.sigmas) < 2:
            where = f"noise level {inputs.sigmas[0]:g} alone"
            raise GddlabError(f'target "sigma" at {where}: give several, or targets={_without("sigma", wanted)}')
        self._classes: dict[str, Tensor] = {}
        if "class" in wanted:
            ids, few = inputs.class_ids(), n - n // SET_ASIDE
            if ids is None:
                data = shown(inputs.dataset.name) if inputs.dataset else "these images"
                raise GddlabError(f'target "class": {data} has no labels, give targets={_without("class", wanted)}')
            if len(np.unique(ids[:few])) < 2:
                raise GddlabError(f'target "class": the first {few} of n={n} images are of one class, give a larger n')
            self._classes = {"class": torch.from_numpy(ids), "class_chance": torch.from_numpy(ids)[self._other]}

    def pixels(self, i: int, j: int) -> dict[str, Float[Tensor, "b k"]]:
        """Clean images and noise of images i to j, as wanted, float64."""
        out = {}
        for target, read in (("image", self.inputs.clean), ("noise", self.inputs.noise)):
            if target in self.wanted:
                out[target] = read(i, j).flatten(1).double()
                shuffled = [read(k, k + 1) for k in self._other[i:j].tolist()]
                out[f"{target}_chance"] = torch.cat(shuffled).flatten(1).double()
        return out

    def classes(self, i: int, j: int) -> dict[str, Int[Tensor, " b"]]:
        """Class ids of images i to j, if wanted."""
        return {name: ids[i:j] for name, ids in self._classes.items()}

    def levels(self, i: int, j: int, s: int) -> dict[str, Float[Tensor, "b 1"]]:
        """ln sigma of level `s`, and that of another level for each image."""
        if "sigma" not in self.wanted:
            return {}
        return {"sigma": self._logs[s].expand(j - i, 1), "sigma_chance": self._logs[self._level[i:j, s], None]}


def _without(target: str, wanted: Sequence[str]) -> str:
    """The other targets, as a call gives them."""
    return str(tuple(t for t in wanted if t != target) or ("image",)).replace("'", '"')


class Reader:
    """Runs a network and keeps of each layer's output at most `dims` numbers per row: its features.

    Of a layer with several sites they are of that which its name means: its first run, the image, the branch "cond".
    They are products with a seeded Gaussian matrix, or all numbers where there are not more. One matrix serves all
    layers, an output of D numbers takes its first D rows; it is made in pieces as larger outputs come, so that a
    layer's features do not depend on which others are read.

    Attributes:
        shapes: Of the layers' outputs in the last pass.
    """

    def __init__(self, model: nn.Module, net: nn.Module, layers: Sequence[Layer], dims: int, seed: int):
        self.model, self.net, self.dims, self.seed = model, net, dims, seed
        self.names = [layer.name for layer in layers]
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: list[Tensor] = []

    def __call__(self, rows: Rows) -> dict[str, Float[Tensor, "b d"]]:
        """Features by layer, float64; on the CPU where the device has no float64."""
        found: dict[str, Tensor] = {}

        def read(name: str, output: Tensor, key: str) -> None:
            if key == name or name not in found:  # of several sites the one that the name means
                with exactly(output.device):
                    found[name] = self.features(output)

        readers = {name: AtSite(functools.partial(read, name)) for name in self.names}
        with tapped(self.model, readers, len(rows[0])) as shapes:
            self.net(*rows)
        self.shapes = shapes
        return {name: found[name] for name in self.names}

    def features(self, output: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        x = output.reshape(len(output), -1)
        if x.shape[1] <= self.dims:
            return _exact(x.clone())  # the network may write into its output
        x = x.float()
        parts = (_exact(part @ self._piece(k, x)[: part.shape[1]]) for k, part in enumerate(x.split(PIECE, 1)))
        return functools.reduce(torch.add, parts) / math.sqrt(self.dims)

    def _piece(self, k: int, like: Tensor) -> Tensor:
        while len(self._pieces) <= k:
            random = generator(self.seed, SHUFFLES + 1 + len(self._pieces))
            self._pieces.append(torch.randn(PIECE, self.dims, generator=random).to(like.device))
        return self._pieces[k]


def _exact(x: Tensor) -> Tensor:
    return x.cpu().double() if x.device.type == "mps" else x.double()


class Readout(NamedTuple):
    """A linear function of features: (x - centre) weight + mean."""

    weight: Float[Tensor, "d k"]
    centre: Float[Tensor, " d"]
    mean: Float[Tensor, " k"]

    def __call__(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return (x - self.centre) @ self.weight + self.mean

    def score(self, x: Float[Tensor, "b d"], y: Float[Tensor, "b k"]) -> Float[Tensor, "b 2"]:
        """Squared error of each row, and its squared distance from the mean of the fitting rows; on the CPU."""
        y = y.to(x.device)
        error, spread = (y - self(x)).square().sum(1), (y - self.mean).square().sum(1)
        return torch.stack([error, spread], 1).cpu()


class Ridge:
    """Ridge regressions of several targets on the same features, from sums over rows, which come in batches.

    The strength is that of `STRENGTHS` with the lowest generalised cross-validation score (Golub, Heath, Wahba 1979),
    an estimate of the error on other rows that needs the sums alone and no rows set aside; one for all numbers of a
    target.
    """

    def __init__(self) -> None:
        self._gram: Any = 0.0  # of features and a column of ones: (d + 1, d + 1)
        self._cross: dict[str, Any] = {}  # (d + 1, k) by target
        self._square: dict[str, Any] = {}  # sum of squares, by target
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def targets(self) -> list[str]:
        return list(self._cross)

    def add(self, x: Float[Tensor, "b d"], targets: Mapping[str, Float[Tensor, "b k"]]) -> None:
        """Adds rows, float64."""
        if not targets:
            return
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self._gram = self._gram + x.T @ x
        self._spectrum = None
        for name, y in targets.items():
            y = y.to(x.device)
            self._cross[name] = self._cross.get(name, 0.0) + x.T @ y
            self._square[name] = self._square.get(name, 0.0) + y.square().sum()

    def readout(self, target: str) -> Readout:
        """The readout of one target; NaN throughout if features were not finite."""
        rows, centre = self._gram[-1, -1], self._gram[-1, :-1] / self._gram[-1, -1]
        cross = self._cross[target]
        mean = cross[-1] / rows
        if not self._gram.isfinite().all():
            return Readout(torch.full_like(cross[:-1], torch.nan), centre, mean)
        if self._spectrum is None:
            size, vectors = torch.linalg.eigh(self._gram[:-1, :-1] - rows * torch.outer(centre, centre))
            self._spectrum = size.clamp(min=0), vectors
        size, vectors = self._spectrum  # (d,), (d, d)
        along = vectors.T @ (cross[:-1] - torch.outer(centre, cross[-1]))  # (d, k)
        total = self._square[target] - cross[-1].square().sum() / rows
        strength = STRENGTHS.to(size) * size[-1].clamp(min=1e-200)  # where features are constant, too
        shrunk = 1 / (size + strength[:, None])  # (strengths, d)
        explained = (along.square().sum(1) * (size + 2 * strength[:, None]) * shrunk.square()).sum(1)
        left = (total - explained).clamp(min=1e-12 * total)  # what is less is rounding
        free = rows - 1 - (size * shrunk).sum(1)
        best = strength[(left / free.square()).argmin()]
        return Readout(vectors @ (along / (size + best)[:, None]), centre, mean)


class Logistic:
    """scikit-learn's multinomial logistic regressions on the same rows, which are kept, with standardised features.

    The strength is that of `INVERSE_STRENGTHS` with the lowest log loss on the last of the rows, one in `SET_ASIDE`;
    the fit is then repeated with all.
    """

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._classes: dict[str, list[np.ndarray]] = {}

    @property
    def targets(self) -> list[str]:
        return list(self._classes)

    def add(self, x: Float[Tensor, "b d"], targets: Mapping[str, Int[Tensor, " b"]]) -> None:
        """Adds rows, which are kept in float32."""
        if targets:
            self._rows.append(x.float().cpu().numpy())
        for name, ids in targets.items():
            self._classes.setdefault(name, []).append(ids.numpy())

    def readout(self, target: str) -> Classifier:
        """The readout of one target, with the class NaN for every row if features were not finite."""
        x, y = np.concatenate(self._rows), np.concatenate(self._classes[target])
        if not np.isfinite(x).all():
            return Classifier(None)
        few = len(x) - len(x) // SET_ASIDE
        losses = {}
        for c in INVERSE_STRENGTHS if few < len(x) else ():
            model = _logistic(c).fit(x[:few], y[:few])
            column = {k: i for i, k in enumerate(model[-1].classes_)}
            likely = np.pad(model.predict_proba(x[few:]), ((0, 0), (0, 1)))  # the last column: classes not seen
            at = [column.get(k, -1) for k in y[few:]]
            losses[c] = -np.log(np.maximum(likely[np.arange(len(at)), at], 1e-12)).mean()
        best = min(losses, key=losses.__getitem__) if losses else INVERSE_STRENGTHS[0]
        return Classifier(_logistic(best).fit(x, y))


class Classifier(NamedTuple):
    """A fitted model of scikit-learn's; None gives NaN."""

    model: Any

    def score(self, x: Float[Tensor, "b d"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """1 where the class is found, 0 elsewhere; NaN where features are not finite."""
        rows, ids = x.float().cpu().numpy(), y.numpy()
        finite = np.isfinite(rows).all(1) & (self.model is not None)
        found = np.full(len(rows), np.nan)
        if finite.any():
            found[finite] = self.model.predict(rows[finite]) == ids[finite]
        return torch.from_numpy(found)


def _logistic(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
