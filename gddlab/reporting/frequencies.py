"""Radial power spectra of images, and which frequencies the layers carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.scales import plain, sigma_axis
from gddlab.probing.plots.table import STAGES
from gddlab.reporting.layers import measured_layers
from gddlab.reporting.style import WIDE, checked, known, look, name_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["draw_bands", "draw_denoised", "draw_spectra", "spectrum_table"]

STUDY = "spectra"
COLUMNS = ("network", "source", "sigma", "frequency", "power", "sem", "n")
BANDS = ("0 to 1/4", "1/4 to 1/2", "1/2 to 1", "beyond 1")
"""Of the Nyquist frequency; `spectral_share_0` and so on."""
COLOURS = {"teacher": "#009E73"}
"""Beside data in black and noise in grey, the teacher needs a colour of its own."""
SHADES = ("#000000", "#0072B2", "#009E73", "#E69F00")


def spectrum_table(study: pd.DataFrame, networks: Sequence[str] | None = None) -> pd.DataFrame:
    """Power of sampled images over that of the data, at each frequency.

    Args:
        study: Columns network, source, sigma, frequency, power, sem, n.
        networks: Sampled networks; all if None.

    Returns:
        Networks down, frequencies (cycles an image, without the constant) across; 1 is as much as in the data.

    Raises:
        GddlabError: The table is another one, or a network was not sampled.
    """
    study = checked(study, COLUMNS, STUDY)
    data = _spectrum(study, "data")["power"]
    sampled = study[(study["source"] == "sampled") & (study["frequency"] > 0)]
    names = known(list(dict.fromkeys(sampled["network"])), networks)
    wide = sampled.pivot(index="network", columns="frequency", values="power")
    return wide.loc[names] / data


def draw_spectra(study: pd.DataFrame, networks: Sequence[str] | None = None, *, width: float = 6.4) -> Figure:
    """Power over radial frequency of the data and of sampled images, and their ratio to the data; both axes are logarithmic.

    Bands are one standard error over images. The constant, frequency 0, is left out: a logarithmic axis has no place for it.

    Args:
        study: Columns network, source, sigma, frequency, power, sem, n.
        networks: Sampled networks; all if None.
        width: Of the figure, inches; in a narrow one the two pictures stand one above the other.

    Raises:
        GddlabError: The table is another one, or a network was not sampled.
    """
    import matplotlib.pyplot as plt

    study = checked(study, COLUMNS, STUDY)
    names = list(spectrum_table(study, networks).index)
    data = _spectrum(study, "data")
    narrow = width < WIDE
    shape, size = ((2, 1), (width, 1.45 * width + 0.15 * len(names))) if narrow else ((1, 2), (width, 0.44 * width))
    figure, (left, right) = plt.subplots(*shape, figsize=size, layout="constrained")
    lines: list[tuple[float, str, Any]] = []
    for name in ["data", *names]:
        part = data if name == "data" else _spectrum(study, "sampled", name)
        style, colour = _style(name), _colour(name)
        x, y, sem = part.index.to_numpy(), part["power"].to_numpy(), part["sem"].to_numpy()
        base = data["power"].to_numpy()
        for ax, scale in ((left, 1.0), (right, 1 / base)):
            ax.plot(x, y * scale, color=colour, label=look(name).label, **style)
            ax.fill_between(x, (y - sem) * scale, (y + sem) * scale, color=colour, alpha=0.2, linewidth=0)
        lines.append((float(y[-1] / base[-1]), look(name).label, colour))
    for ax, text in ((left, "power: mean square of coefficients"), (right, "power over that of the data")):
        ax.set_xscale("log")
        ax.set_yscale("log")
        _frequencies(ax, data.index.to_numpy())
        ax.set_ylabel(text, fontsize=8)
    right.yaxis.set_major_formatter("{x:g}")
    name_lines(right, lines)
    return figure


def draw_denoised(study: pd.DataFrame, *, width: float = 6.4) -> Figure:
    """What denoising keeps at each noise level: power of noised and denoised images over frequency, beside that of the data, a picture a noise level.

    Args:
        study: Columns network, source, sigma, frequency, power, sem, n; source "noised" and "denoised".
        width: Of the figure, inches.

    Raises:
        GddlabError: The table is another one, or has no denoised images.
    """
    from matplotlib.lines import Line2D

    study = checked(study, COLUMNS, STUDY)
    part = study[study["source"] == "denoised"]
    if not len(part):
        raise GddlabError(f"the table has no denoised images: give that of the study {STUDY!r}")
    names = list(dict.fromkeys(part["network"]))
    sigmas = sorted(set(part["sigma"]), reverse=True)
    data = _spectrum(study, "data")
    columns = 3 if width >= WIDE else 2
    figure, axes = _panels(len(sigmas), columns, width, height=0.9 * width / columns, above=0.35)
    looks: dict[str, dict[str, Any]] = {
        "data": {"color": "black", "linewidth": 1.4},
        "noised": {"color": "0.6", "linewidth": 1.0, "linestyle": ":"},
    }
    looks |= {n: {"color": COLOURS.get(n, look(n).colour), "linewidth": 1.4} for n in names}
    for ax, sigma in zip(axes.flat, sigmas, strict=False):
        ax.plot(data.index, data["power"], **looks["data"])
        noised = study[(study["source"] == "noised") & (study["sigma"] == sigma)]
        ax.plot(noised["frequency"], noised["power"], **looks["noised"])
        for name in names:
            mine = part[(part["network"] == name) & (part["sigma"] == sigma)].sort_values("frequency")
            ax.plot(mine["frequency"], mine["power"], **looks[name])
        ax.set_xscale("log")
        ax.set_yscale("log")
        _frequencies(ax, data.index.to_numpy())
        ax.set_title(f"σ = {plain(sigma)}", fontsize=8, loc="left", pad=3)
    for ax in axes.flat:
        ax.set_xlabel("")
    shown = np.concatenate([data["power"], part.loc[part["frequency"] > 0, "power"]])
    axes[0, 0].set_ylim(shown.min() / 2, 5 * shown.max())  # much noise lies above, out of sight
    figure.supxlabel("frequency, cycles an image", fontsize=8)
    figure.supylabel("power", fontsize=8)
    labels = {"data": "data", "noised": "data with noise"} | {n: f"denoised by {look(n).label}" for n in names}
    handles = [Line2D([], [], label=labels[k], **style) for k, style in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=7)
    return figure


def draw_bands(study: pd.DataFrame, student: str, *, teacher: str = "teacher", width: float = 6.4) -> Figure:
    """Shares of a layer's power in four bands of frequency over noise levels: a picture a stage and resolution, mean over its layers; the teacher solid, the student dashed.

    Args:
        study: The study "layers": columns of `ProbeResult.frame`, network, states, with the statistics `spectral_share_0` to `spectral_share_3`.
        student: A network of the study.
        teacher: Another one.
        width: Of the figure, inches.

    Raises:
        GddlabError: The table is another one, or has no such network or statistic.
    """
    from matplotlib.lines import Line2D

    tables = {
        (name, i): measured_layers(study, name, f"spectral_share_{i}") for name in (teacher, student) for i in range(4)
    }
    first = tables[teacher, 0]
    groups = list(dict.fromkeys(zip(first["stage"], first["resolution"], strict=True)))
    columns = min(len(groups), 4 if width >= WIDE else 2)
    figure, axes = _panels(len(groups), columns, width, height=1.75, above=0.55)
    for ax, (stage, resolution) in zip(axes.flat, groups, strict=False):
        count = 0
        for (name, i), table in tables.items():
            mine = table[(table["stage"] == stage) & (table["resolution"] == resolution)]
            count = mine["layer"].nunique()
            mean = mine.groupby("sigma")["value"].mean()
            style = "-" if name == teacher else "--"
            ax.plot(mean.index, mean, color=SHADES[i], linestyle=style, linewidth=1.2)
        sigma_axis(ax, sorted(set(first["sigma"])))
        ends = min(first["sigma"]), max(first["sigma"])
        ticks = [ends[0], *(t for t in (0.1, 1.0, 10.0) if 4 * ends[0] < t < ends[1] / 4), ends[1]]
        ax.set_xticks(ticks, [plain(t) for t in ticks])
        ax.set_title(f"{STAGES.get(stage, stage)} {resolution}: {count} layers", fontsize=8, loc="left", pad=3)
        ax.set_ylim(0, 1)
        ax.set_xlabel("σ", fontsize=8, labelpad=1)
        ax.tick_params(labelsize=6.5)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of power", fontsize=8)
    handles = [Line2D([], [], color=c, label=b) for b, c in zip(BANDS, SHADES, strict=True)]
    handles[0].set_label(f"{BANDS[0]} of Nyquist")
    handles.append(Line2D([], [], color="0.4", linestyle="-", label=look(teacher).label))
    handles.append(Line2D([], [], color="0.4", linestyle="--", label=look(student).label))
    columns = len(handles) if width >= WIDE else 3
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=7, handlelength=1.6
    )
    return figure


def _panels(count: int, columns: int, width: float, *, height: float, above: float) -> tuple[Figure, Any]:
    """A grid of pictures that share their axes, `height` inches each, with room above; places beyond `count` stay empty."""
    import matplotlib.pyplot as plt

    rows = -(-count // columns)
    shape: dict[str, Any] = {"figsize": (width, rows * height + above), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, sharex=True, sharey=True, **shape)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, axes


def _spectrum(study: pd.DataFrame, source: str, network: str = "data") -> pd.DataFrame:
    """Power and its standard error by frequency, without the constant."""
    part = study[(study["source"] == source) & (study["network"] == network)]
    if not len(part):
        have = study[["network", "source"]].drop_duplicates().agg(" ".join, axis=1)
        raise unknown("images", f"{network} {source}", have)
    return part[part["frequency"] > 0].set_index("frequency").sort_index()[["power", "sem"]]


def _frequencies(ax: Any, frequencies: np.ndarray) -> None:
    """The x axis: whole frequencies, powers of two named."""
    from matplotlib.ticker import NullLocator

    ticks = [2**k for k in range(12) if 2**k <= frequencies.max()]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("frequency, cycles an image", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    steps = name.removeprefix("teacher-")
    return look(name).colour if not steps.isdigit() else str(max(0.3, 0.75 - 0.45 * int(steps) / 18))


def _style(name: str) -> dict[str, Any]:
    if name == "data":
        return {"linewidth": 1.8}
    return {"linewidth": 1.0, "linestyle": "--"} if name.startswith("teacher") else {"linewidth": 1.2}
