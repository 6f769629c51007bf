"""`lens`: the denoised image as it would be if the network ended after each block, or as a readout finds it there."""

from __future__ import annotations

import hashlib
import io
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound, numbers_in, shown, validated
from gddlab.files import atomic_path, check_kind, folder_of, holds_format, path_of, read_json
from gddlab.nets.bare import denoiser_of
from gddlab.probing.ablate import all_sites, means_of, outputs_of, select_sites
from gddlab.probing.decode import Reader, Readout, Ridge, Spans, inputs_for, spans, warn_few
from gddlab.probing.effects import AtSite, Change, denoised, tapped, that_run
from gddlab.probing.guard import as_it_was, eager
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Rows, Timesteps, Unit, within_range
from gddlab.probing.layers import LayerSelection, named_layers
from gddlab.probing.plots.axes import plain, short_names
from gddlab.probing.result import network_meta
from gddlab.probing.sites import again, channel_axis, layer_of, spread
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.runtime import beside_runs
from gddlab.sampling import image_grid
from gddlab.sampling.samplers import precision
from gddlab.theme import themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FORMAT = "gddlab-lens-1"
NONE, OUTPUT = "none", "output"
"""Names of the row in which no layer is intact, and of the network's own output."""
LEVELS = (80.0, 5.0, 1.0, 0.2)
"""Noise levels, by default."""
SHOWN = 4
"""Images of a grid, by default."""
INCH_PER_IMAGE = 0.3

Mode = Literal["bypass", "mean", "readout"]

MODES = {
    "bypass": "all layers after the one named are bypassed: branch and attention of a block add zeros",
    "mean": "all layers after the one named give their channel means: branch and attention of a block add theirs",
    "readout": "the clean image as a ridge regression reads it from the layer's output",
}
"""What the images of a layer are."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The image as layers see it, at some noise levels.

    Attributes:
        images: float32 on the scale of [-1, 1], (L + 1, S, n, C, H, W): images of each of `layers`, at each of
            `sigmas`.
        layers: Names of the L layers in the order of the network, and one more: before them "none", where all are
            bypassed, so that the last is the network's own output; for readouts after them "output".
        sigmas: Noise levels, descending.
        clean: The images themselves, (n, C, H, W).
        noisy: What the network was given, clean + sigma * noise, (S, n, C, H, W); of latents, whose images all of these
            are, decoded after they were scaled to the spread of the data.
        meta: Network, data, seed, mode, versions.
    """

    images: Float[Tensor, "steps s n c h w"]
    layers: tuple[str, ...]
    sigmas: tuple[float, ...]
    clean: Float[Tensor, "n c h w"]
    noisy: Float[Tensor, "s n c h w"]
    meta: dict[str, Any]

    def __repr__(self) -> str:
        steps, levels, n = self.images.shape[:3]
        return f"<Lens: {self.meta['settings']['mode']}, {steps - 1} layers at {levels} noise levels, {n} images>"

    def to_frame(self) -> pd.DataFrame:
        """How far the images are from the network's output and from the clean images.

        Returns:
            One row per layer, noise level and statistic, with columns layer, sigma, stat, value, sem, n_images:
            `to_output` and `to_clean`, root mean square over channels and pixels, mean and standard error over images.
        """
        import pandas as pd

        rows = []
        for stat, other in (("to_output", self.images[-1:]), ("to_clean", self.clean)):
            away = (self.images.double() - other.double()).square().mean((3, 4, 5)).sqrt()  # (L + 1, S, n)
            n = away.shape[2]
            sem = away.std(2) / n**0.5 if n > 1 else torch.full(away.shape[:2], torch.nan)
            for k, layer in enumerate(self.layers):
                for s, sigma in enumerate(self.sigmas):
                    rows.append((layer, sigma, stat, float(away[k, s].mean()), float(sem[k, s]), n))
        return pd.DataFrame(rows, columns=["layer", "sigma", "stat", "value", "sem", "n_images"])

    @themed
    def grid(self, images: Iterable[int] | None = None) -> Figure:
        """Draws layers down and noise levels across, with the clean images and the network's input above.

        Values beyond [-1, 1] are cut off; the input is scaled to the spread of the data.

        Args:
            images: Which to show, by position; None takes the first four.

        Raises:
            GddlabError: No such image.
        """
        import matplotlib.pyplot as plt

        n = len(self.clean)
        try:
            chosen = [operator.index(k) for k in numbers_in(range(min(n, SHOWN)) if images is None else images)]
        except TypeError:
            chosen = []
        if not chosen or not all(0 <= k < n for k in chosen):
            raise GddlabError(f"images={shown(images)}: give a list of positions in 0..{n - 1}")
        names = ["clean image", "input", *_step_names(self.layers)]
        size, columns = INCH_PER_IMAGE, len(chosen)
        room = 0.058 * max(map(len, names)) + 0.1
        width, height = room + len(self.sigmas) * (size * columns + 0.1), size * (len(names) + 0.4) + 0.55
        figure, axes = plt.subplots(
            1, len(self.sigmas), squeeze=False, figsize=(width, height), layout="constrained", sharey=True
        )
        figure.get_layout_engine().set(w_pad=0.02, wspace=0)  # type: ignore[union-attr, call-arg]
        for s, (ax, sigma) in enumerate(zip(axes[0], self.sigmas, strict=True)):
            scale = 1.0 if "codec" in self.meta else 0.5 / (sigma**2 + 0.25) ** 0.5
            above = _tiles([self.clean[chosen], self.noisy[s, chosen] * scale])
            below = _tiles(list(self.images[:, s, chosen]))
            side = (above.shape[0] + 1) / 2
            gap = round(0.4 * side)
            ax.imshow(
                np.concatenate([above, np.full((gap, *above.shape[1:]), 255, np.uint8), below]),
                interpolation="nearest",
            )
            middles = [side * (k + 0.5) + (gap - 1) * (k > 1) for k in range(len(names))]
            ax.set_yticks(middles, names, fontsize=7)
            ax.set_xticks([])
            ax.tick_params(length=0, labelleft=s == 0)
            ax.spines[:].set_visible(False)
            ax.set_title(f"σ = {plain(sigma)}")
        settings, data = self.meta["settings"], self.meta["data"]["name"]
        figure.suptitle(f"{data}: {MODES[settings['mode']]}", x=0.01, ha="left", fontsize=8, wrap=True)
        return figure

    @staticmethod
    def check_place(folder: str | Path) -> Path:
        """The folder for a lens. Raises GddlabError where it is a file, or holds other files and no lens."""
        place = folder_of("folder", folder)
        check_kind(place, lambda path: holds_format(path / "lens.json", FORMAT), "lens")
        return place

    def save(self, folder: str | Path) -> None:
        """Writes `lens.npz` and `lens.json`. Raises GddlabError as `check_place`: only another lens is replaced."""
        folder = self.check_place(folder)
        npz = io.BytesIO()
        np.savez_compressed(npz, images=self.images.numpy(), clean=self.clean.numpy(), noisy=self.noisy.numpy())
        about: dict[str, Any] = {"format": FORMAT, "sha256": hashlib.sha256(npz.getvalue()).hexdigest()}
        about |= {"layers": list(self.layers), **self.meta}
        text = json.dumps(about, indent=2, allow_nan=False) + "\n"
        with atomic_path(folder / "lens.npz") as arrays, atomic_path(folder / "lens.json") as meta:
            arrays.write_bytes(npz.getvalue())
            meta.write_text(text)

    @classmethod
    def load(cls, folder: str | Path) -> Lens:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such folder, or a file is missing in it.
            GddlabError: Not a lens, or its files do not belong together.
        """
        folder = path_of("folder", folder)
        meta = read_json(folder / "lens.json")
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
            raise GddlabError(f"{folder} holds no lens: give a folder that Lens.save wrote")
        if not (folder / "lens.npz").is_file():
            raise NotFound(f"no such file: {folder / 'lens.npz'}")
        content = (folder / "lens.npz").read_bytes()
        if missing := {"sha256", "layers", "sigmas", "settings", "data"} - meta.keys():
            raise GddlabError(f"{folder / 'lens.json'} lacks {min(missing)!r}: make or restore it again")
        if hashlib.sha256(content).hexdigest() != meta.pop("sha256"):
            raise GddlabError(f"{folder / 'lens.npz'} is not the file that lens.json names: make or restore it again")
        with np.load(io.BytesIO(content), allow_pickle=False) as z:
            arrays = {name: torch.from_numpy(z[name]) for name in ("images", "clean", "noisy")}
        return cls(layers=tuple(meta.pop("layers")), sigmas=tuple(meta["sigmas"]), meta=meta, **arrays)


def _step_names(layers: Sequence[str]) -> list[str]:
    """Layers without the path that all share; "none" and "output" are no layers."""
    known = [name for name in layers if name not in (NONE, OUTPUT)]
    short = dict(zip(known, short_names(known), strict=True))
    return [short.get(name, name) for name in layers]


def _tiles(lines: Sequence[Float[Tensor, "n c h w"]]) -> np.ndarray:
    """uint8 RGB with white lines between images; images of neither 1 nor 3 channels as the mean of theirs."""
    x = torch.cat(list(lines))
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    grid = image_grid(x, columns=len(lines[0]))
    h, w = x.shape[-2] + 1, x.shape[-1] + 1
    grid[h - 1 :: h] = grid[:, w - 1 :: w] = 255
    return grid


@beside_runs()
@validated
def lens(
    model: Any,
    timesteps: Timesteps = None,
    *,
    unit: Unit = "sigma",
    layers: LayerSelection = "block",
    mode: Mode = "bypass",
    data: Data = None,
    n: PositiveInt = 4,
    fit: PositiveInt = 1280,
    dims: PositiveInt = 256,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> Lens:
    """Shows the denoised image as it is after each layer: the rest of the network bypassed, or a readout of the layer.

    With "bypass" and "mean" it takes one forward pass of the images per layer and noise level. Images do not depend on
    `batch_size` beyond rounding, and the network is left as it was.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`, as for `probe`.
        timesteps: The noise levels themselves, standard deviations on the scale of [-1, 1], or their number. In Python
            None means 80, 5, 1 and 0.2, within the network's range.
        layers: After which the image is shown, "block" for residual blocks; presets, names, globs and so on, as in
            `probe`. What is bypassed are those of them that follow; the rest of the network stays.
        mode: "bypass" lets what follows add nothing, so that of a residual block its skip path remains; "mean" lets it
            add its channel means at this sigma; "readout" shows the clean image as the ridge regression of `decode`
            reads it from the layer's output.
        unit, data, class_labels, device, dtype, progress: As in `probe`.
        n: Images to show, the first of the dataset's order under `seed`.
        fit: Images on which "mean" and "readout" are measured, those that follow; "bypass" needs none.
        dims: Numbers kept of each output for "readout", as in `decode`.
        batch_size: Images of one forward pass, which holds one noise level.
        seed: Of the images' order, the noise and the projection.

    Returns:
        The images, (layers + 1, noise levels, n, C, H, W), with the network's own output as the last; `grid` draws
        them, and `to_frame` says how far each is from the output and from the clean image.

    Raises:
        GddlabError: An unknown mode; more images than there are; a named layer that does not run, one that returns no
            tensor with one row per image; a network whose answer is no image; and whatever `probe` refuses.
    """
    counts = {"n": n} if mode == "bypass" else {"n": n, "fit": fit}
    if timesteps is None:
        timesteps, unit = within_range(denoiser_of(model), LEVELS), "sigma"
    inputs = inputs_for(model, timesteps, unit, data, seed, class_labels, **counts)
    layers = again(layers)
    net, chosen, modules = inputs.denoiser, select_sites(model, layers), named_layers(model)
    showing, fitting = spans(0, n, batch_size), spans(n, inputs.n, batch_size)
    by_name = {a.name: outputs_of(a, modules) for a in chosen}
    with (
        as_it_was(net, device=device, dtype=dtype) as target,
        torch.no_grad(),
        eager(model),
        progress_bar(desc="looking", unit="pass", enabled=progress) as bar,
    ):
        one = inputs.rows(0, 1, device=target, sigmas=inputs.sigmas[:1])
        selected, not_run = that_run(model, one, chosen, layers, None if mode == "readout" else by_name)
        names = [layer.name for layer in selected]
        outputs = [by_name[name] for name in names]
        parts = {part for by in outputs for part in by}
        images = torch.empty(len(names) + 1, len(inputs.sigmas), n, *inputs.image_shape)
        noisy = torch.empty(images.shape[1:])
        passes = len(fitting) + len(showing) * (2 if mode == "readout" else len(names) + 1)
        bar.reset(total=passes * len(inputs.sigmas))
        reader = Reader(model, net, selected, dims, seed)
        for s, sigma in enumerate(inputs.sigmas):

            def rows_of(i: int, j: int, sigma: float = sigma) -> Rows:
                bar.update()
                return inputs.rows(i, j, device=target, sigmas=[sigma])

            if mode == "readout":
                readouts = _readouts(reader, rows_of, inputs, fitting)
            else:
                means = _channel_means(model, net, parts, sigma, rows_of, fitting) if mode == "mean" else {}
                changes = [{part: _replacement(part, means, modules) for part in by} for by in outputs]
            for i, j in showing:
                rows = rows_of(i, j)
                noisy[s, i:j] = rows[0] if inputs.codec is None else inputs.shown(rows[0] / (1 + sigma**2) ** 0.5)
                images[-1, s, i:j] = inputs.shown(denoised(net, rows))
                if mode == "readout":
                    for k, (name, x) in enumerate(reader(rows_of(i, j)).items()):
                        images[k, s, i:j] = inputs.shown(readouts[name](x).reshape(j - i, *inputs.shape))
                    continue
                for k in range(len(names)):
                    after = {part: change for by in changes[k:] for part, change in by.items()}
                    with tapped(model, after, j - i):
                        images[k, s, i:j] = inputs.shown(denoised(net, rows))
                    bar.update()
    if mode == "readout":
        warn_few(max(len(readout.weight) for readout in readouts.values()), fit=fit)
    meta = {"model": network_meta(model)["model"], "versions": versions()} | inputs.describe()
    meta |= {"not_run": not_run} if not_run else {}
    meta["settings"] = {"mode": mode, "n": n, "dtype": precision(dtype)}
    meta["settings"] |= {"fit": fit} if mode != "bypass" else {}
    meta["settings"] |= {"dims": dims} if mode == "readout" else {}
    steps = (*names, OUTPUT) if mode == "readout" else (NONE, *names)
    with torch.no_grad():
        clean = inputs.shown(inputs.clean(0, n))
    return Lens(images, steps, tuple(inputs.sigmas), clean, noisy, meta)


def _replacement(part: str, means: Mapping[str, Float[Tensor, "1 c"]], modules: Mapping[str, nn.Module]) -> Change:
    """Zeros, or the mean of each channel at its site."""
    if not means:
        return torch.zeros_like
    axis = channel_axis(modules[layer_of(part, modules)])

    def mean_at(output: Tensor, key: str) -> Tensor:
        return spread(means[key].expand(len(output), -1), output, axis).expand(output.shape)

    return AtSite(mean_at)


def _channel_means(
    model: nn.Module, net: nn.Module, parts: set[str], sigma: float, rows_of: Callable[[int, int], Rows], fitting: Spans
) -> dict[str, Float[Tensor, "1 c"]]:
    """Mean of each channel of each site of the `parts` over the fitting images and all pixels."""
    with all_sites(model, [sigma], parts) as measure:
        for i, j in fitting:
            with measure.images(j - i):
                net(*rows_of(i, j))
    return means_of(measure)


def _readouts(
    reader: Reader, rows_of: Callable[[int, int], Rows], inputs: Inputs, fitting: Spans
) -> dict[str, Readout]:
    """Of the clean image, from each layer."""
    ridges = {name: Ridge() for name in reader.names}
    for i, j in fitting:
        clean = inputs.clean(i, j).flatten(1).double()
        for name, x in reader(rows_of(i, j)).items():
            ridges[name].add(x, {"image": clean})
    return {name: ridge.readout("image") for name, ridge in ridges.items()}
