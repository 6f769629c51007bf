"""Radial power spectra of images, and which frequencies the layers carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.axes import place_name, plain, sigma_axis
from gddlab.reporting.layer_changes import measured_layers
from gddlab.reporting.style import checked, known, look
from gddlab.theme import BLACK, GREY, PALETTE, banded, themed

STUDY = "spectra"
COLUMNS = ("network", "source", "sigma", "frequency", "power", "sem", "n")
BANDS = ("0 to 1/4 of Nyquist", "1/4 to 1/2", "1/2 to 1", "beyond 1")
"""`spectral_share_0` and so on."""
FREQUENCY = "frequency, cycles per image"


def spectrum_table(study: pd.DataFrame, networks: Sequence[str] | None = None) -> pd.DataFrame:
    """Power of sampled images over that of the data, at each frequency.

    Args:
        study: Columns network, source, sigma, frequency, power, sem, n.
        networks: Sampled networks; all if None.

    Returns:
        Networks down, frequencies (cycles per image, without the constant) across; 1 is as much as in the data.

    Raises:
        GddlabError: The table is another one, or a network was not sampled.
    """
    study = checked(study, COLUMNS, STUDY)
    data = _spectrum(study, "data")["power"]
    sampled = study[(study["source"] == "sampled") & (study["frequency"] > 0)]
    names = known(list(dict.fromkeys(sampled["network"])), networks)
    return sampled.pivot(index="network", columns="frequency", values="power").loc[names] / data


@themed
def draw_spectra(study: pd.DataFrame, networks: Sequence[str] | None = None) -> Figure:
    """Power over radial frequency of the data and of sampled images, and their ratio to the data.

    Both axes are logarithmic, so the constant, frequency 0, is omitted. Bands are one standard error over images.
    Arguments and errors are those of `spectrum_table`.
    """
    study = checked(study, COLUMNS, STUDY)
    names = list(spectrum_table(study, networks).index)
    data = _spectrum(study, "data")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name in ["data", *names]:
        part = data if name == "data" else _spectrum(study, "sampled", name)
        style: dict[str, Any] = {"color": look(name).colour, "linestyle": "--" if name.startswith("teacher") else "-"}
        for ax, scale in ((left, 1.0), (right, 1 / data["power"])):
            banded(ax, part.index, part["power"] * scale, part["sem"] * scale, label=look(name).label, **style)
    for ax, text in ((left, "power: mean square of coefficients"), (right, "power over that of the data")):
        ax.set_yscale("log")
        _frequencies(ax, data.index.to_numpy())
        ax.set_ylabel(text)
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    left.set_title(f"n = {int(study['n'].max())} images, bands: standard error over images", loc="left")
    return figure


@themed
def draw_denoised(study: pd.DataFrame) -> Figure:
    """What denoising keeps at each noise level: power of noised and denoised images over frequency, and of the data.

    Args:
        study: As for `spectrum_table`, with the sources "noised" and "denoised".

    Raises:
        GddlabError: The table is another one, or has no denoised images.
    """
    study = checked(study, COLUMNS, STUDY)
    part = study[study["source"] == "denoised"]
    if not len(part):
        raise GddlabError(f"the table has no denoised images: give that of the study {STUDY!r}")
    sigmas = sorted(set(part["sigma"]), reverse=True)
    data = study[study["source"] == "data"]
    panels = [data.assign(sigma=s, of="data") for s in sigmas]
    panels += [study[study["source"] == "noised"].assign(of="data with noise")]
    panels += [part.assign(of="denoised by " + part["network"].map(lambda n: look(n).label))]
    long = pd.concat(panels, ignore_index=True)
    long = long[(long["frequency"] > 0) & long["sigma"].isin(sigmas)]
    names = list(dict.fromkeys(long["of"]))
    colours = dict(zip(names, [BLACK, GREY, *PALETTE], strict=False))
    shape: dict[str, Any] = {"col": "sigma", "col_order": sigmas, "col_wrap": min(3, len(sigmas)), "height": 2.2}
    dashes = ["", (1, 1), *[""] * 9][: len(names)]
    lines: dict[str, Any] = {"hue": "of", "style": "of", "palette": colours, "dashes": dashes}
    grid = sns.relplot(long, x="frequency", y="power", kind="line", errorbar=None, **shape, **lines)
    shown = long.loc[long["of"] != "data with noise", "power"]
    grid.set(yscale="log", ylim=(shown.min() / 2, 5 * shown.max()))  # much of the noise lies above
    grid.set_titles("")
    for ax, sigma in zip(grid.axes.flat, sigmas, strict=True):
        _frequencies(ax, np.unique(long["frequency"]))
        ax.set_title(f"σ = {plain(sigma)}", loc="left")
    grid.set_axis_labels(FREQUENCY, "power")
    grid.legend.set_title(f"n = {int(part['n'].max())} images\n({int(data['n'].max())} of the data)")
    grid.tight_layout()
    return grid.figure


@themed
def draw_bands(study: pd.DataFrame, student: str, *, teacher: str = "teacher") -> Figure:
    """Shares of a layer's power in four bands of frequency over noise levels, means over the layers of a place.

    A panel is a stage and resolution; the teacher is solid, the student dashed. Arguments and errors are those of
    `draw_activations`; the statistics are `spectral_share_0` to `spectral_share_3`.
    """
    parts = [
        measured_layers(study, name, f"spectral_share_{i}").assign(frequencies=band, network=look(name).label)
        for name in (teacher, student)
        for i, band in enumerate(BANDS)
    ]
    long = pd.concat(parts, ignore_index=True)
    long["place"] = [place_name(s, int(r)) for s, r in zip(long["stage"], long["resolution"], strict=True)]
    counts = long.groupby("place", sort=False)["layer"].nunique()
    long["place"] = long["place"].map(lambda place: f"{place}: {counts[place]} layers")
    shape: dict[str, Any] = {"col": "place", "col_wrap": min(4, len(counts)), "height": 2.2, "aspect": 0.9}
    lines: dict[str, Any] = {"hue": "frequencies", "style": "network", "palette": [BLACK, *PALETTE[:3]]}
    grid = sns.relplot(long, x="sigma", y="value", kind="line", errorbar=None, **shape, **lines)
    grid.set_titles("")
    grid.set_titles("{col_name}", loc="left")
    for ax in grid.axes.flat:
        sigma_axis(ax, long["sigma"].unique())
    grid.set(ylim=(0, 1))
    grid.set_axis_labels("noise level σ", f"share of power,\nmean over layers, n = {int(long['n_images'].max())}")
    grid.tight_layout()
    return grid.figure


def _spectrum(study: pd.DataFrame, source: str, network: str = "data") -> pd.DataFrame:
    """Power and its standard error by frequency, without the constant."""
    part = study[(study["source"] == source) & (study["network"] == network)]
    if not len(part):
        have = study[["network", "source"]].drop_duplicates().agg(" ".join, axis=1)
        raise unknown("images", f"{network} {source}", have)
    return part[part["frequency"] > 0].set_index("frequency").sort_index()[["power", "sem"]]


def _frequencies(ax: Any, frequencies: np.ndarray) -> None:
    """A logarithmic x axis of whole frequencies, powers of two named."""
    ax.set_xscale("log")
    ticks = [2**k for k in range(12) if 2**k <= frequencies.max()]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(FREQUENCY)
