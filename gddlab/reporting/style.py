"""The names and colours of the networks of a study, the same in every figure, and the checks of its table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from gddlab.errors import GddlabError, unknown
from gddlab.theme import BLACK, GREY, PALETTE

BLUE, ORANGE, GREEN, RED, PINK, LIGHT, BROWN = PALETTE[:7]
SPAN = 5
"""Values that differ by more than this factor get a logarithmic axis."""
SORTS = {
    "data": BLACK,
    "teacher": GREY,
    "GAN loss": BLUE,
    "instance loss": RED,
    "GAN and instance loss": GREEN,
    "other": PINK,
}
"""Sort of network -> colour."""
NAMES = {
    "data": ("data", "data", BLACK),
    "gdd": ("GDD (preset's rate)", "GAN loss", BLUE),
    "gdd-lr-0.0002": ("GDD (learning rate 0.0002)", "GAN loss", "#0b2a4a"),
    "gdd-i": ("GDD-I", "GAN loss", ORANGE),
    "scratch": ("GDD, random start", "GAN loss", PINK),
    "pd": ("PD", "instance loss", "#6b2c00"),
    "cd": ("CD", "instance loss", "#a34700"),
    "ctm": ("CTM", "instance loss", "#f0a06c"),
    "rcd": ("RCD", "instance loss", RED),
    "gdd-cd": ("GDD + CD", "GAN and instance loss", GREEN),
}
"""Network, or experiment -> its label, sort and colour."""
BACKBONES = {"lite0": "lite0", "vgg16": "VGG16", "deit": "DeiT", "lpips": "LPIPS"}
VARIED = (
    (r"random-([\d.]+)", "{0} % frozen, at random", LIGHT),
    (r"ordered-([\d.]+)", "{0} % frozen, in the rule's order", BROWN),
    (r"option-([23])", "the authors' option {0}", BROWN),
    (r"norms-only", "only norms trained", BROWN),
    (r"(.+)-lr-([\d.e-]+)", "{0} (learning rate {1})", None),
    (r"(.+)-images-(\d+)", "{0}, {1} images", None),
    (r"(.+)-other-images", "{0}, images new to the teacher", None),
    (r"(.+)-teacher-(\d+)", "{0}, another teacher ({1})", None),
    (r"(rcd|cd|pd|ctm)-(\d+)", "{0} of the teacher in {1} steps", None),
    (r"(.+)-then-(.+)", "{0}, then {1}", GREEN),
    (r"(scratch)-augment", "{0}, augmented", None),
    (r"age-(\d+)", "GDD, teacher after {0} kimg", BLUE),
    (r"shuffled", "GDD, teacher's weights shuffled", PINK),
    (r"from-high", "GDD, teacher that knows sigma 80", BLUE),
    (r"from-low", "GDD, network of low noise alone", PINK),
    (r"second-step-([\d.]+)", "GDD-I, second step at sigma {0}", ORANGE),
    (r"no-r1", "GDD-I without R1", ORANGE),
    (r"fresh-fakes", "GDD-I, fresh images for D", ORANGE),
    (r"reuse-fakes", "GDD-I, D's images reused", ORANGE),
    (r"augment", "GDD-I, augmented", ORANGE),
    (r"ada", "GDD-I, ADA", ORANGE),
    (r"stylegan2", "GDD-I, StyleGAN2's D", ORANGE),
    (r"(lite0|vgg16|deit|lpips)", "GDD-I, D on {0}", ORANGE),
    (r"(lite0|vgg16|deit|lpips)-random", "GDD-I, D on {0}, random weights", ORANGE),
    (r"layers-(\d+)", "row {0} of the factorial", BLUE),
    (r"chosen", "half frozen as the factorial predicts", GREEN),
    (r"chosen-inverse", "the other half frozen", PINK),
    (r"(lite0)-(\d+)", "GDD-I, D on {0} at {1} pixels", ORANGE),
)
"""Experiments by pattern -> label, in which a name stands by its own label, and colour; None for that of the first."""


@dataclass(frozen=True)
class Look:
    """A network in figures: its label, its sort (a key of `SORTS`), and a colour of its own."""

    label: str
    sort: str
    colour: str


def look(name: str) -> Look:
    """How a network or experiment is shown: "teacher-18" as "teacher, 18 steps"; an unknown name as itself."""
    if name in NAMES:
        return Look(*NAMES[name])
    if steps := re.fullmatch(r"teacher-(\d+)(.*)", name):
        count = int(steps[1])
        shade = str(max(0.3, 0.75 - 0.45 * count / 18))
        return Look(f"teacher, {count} step{'s' if count > 1 else ''}{steps[2]}", "teacher", shade)
    for pattern, label, colour in VARIED:
        if found := re.fullmatch(pattern, name):
            parts = [BACKBONES.get(part) or (look(part) if part[0].isalpha() else part) for part in found.groups()]
            looks = [part for part in parts if isinstance(part, Look)] or [Look("", "GAN loss", BLUE)]
            sort = looks[0].sort if len({p.sort for p in looks}) == 1 else "GAN and instance loss"
            text = label.format(*(p.label.partition(" (")[0] if isinstance(p, Look) else p for p in parts))
            return Look(text, sort, colour or looks[0].colour)
    return Look(name, "teacher", "0.25") if name == "teacher" else Look(name, "other", SORTS["other"])


def fit_scale(ax: Axes, values: Iterable[float], axis: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic where its positive values span more than a factor of five."""
    values = list(values)
    if values and min(values) > 0 and max(values) > SPAN * min(values):
        ax.set(**{f"{axis}scale": "log", f"{axis}lim": (0.8 * min(values), 1.25 * max(values))})
        log_ticks(ax, axis)


def log_ticks(ax: Axes, axis: Literal["x", "y"]) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each decade, written as plain numbers."""
    ticks = ax.xaxis if axis == "x" else ax.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


DASHES = ("--", ":", "-.")


def draw_levels(ax: Axes, levels: Mapping[str, float], axis: Literal["x", "y"], *, told: bool = False) -> None:
    """Grey lines at what scores are held against, each in its own dashes; with their values in the legend if `told`.

    A level that is NaN has no line.
    """
    for (label, value), dashes in zip(levels.items(), DASHES * 9, strict=False):
        if math.isnan(value):
            continue
        text = f"{label}: {value:{'.0f' if abs(value) >= 10 else '.3g'}}" if told else label
        how: dict[str, Any] = {"color": GREY, "linewidth": 1, "zorder": 0, "linestyle": dashes, "label": text}
        (ax.axhline if axis == "y" else ax.axvline)(value, **how)


def checked(frame: pd.DataFrame, columns: Iterable[str], study: str) -> pd.DataFrame:
    """The table of a study, each row once, with text in place of categories.

    Raises:
        GddlabError: A column is missing, or there are no rows.
    """
    if missing := [c for c in columns if c not in frame]:
        have = ", ".join(map(str, frame.columns)) or "none"
        raise GddlabError(f"no column {missing[0]!r}, but {have}: give the table of the study {study!r}")
    if not len(frame):
        raise GddlabError(f"the table has no rows: give the table of the study {study!r}")
    return frame.drop_duplicates().astype({c: object for c in frame if frame[c].dtype == "category"})


def known(names: Sequence[str], wanted: Sequence[str] | None, what: str = "network") -> list[str]:
    """`wanted`, all of which must be among `names`; `names` for None.

    Raises:
        GddlabError: One is not.
    """
    if isinstance(wanted, str):
        raise GddlabError(f"{what}s {wanted!r}: give a list of names")
    for name in wanted or ():
        if name not in names:
            raise unknown(what, name, names)
    return list(names if wanted is None else wanted)


def seeds_text(counts: Iterable[int]) -> str:
    """ "3 seeds", or "1 to 3 seeds" where lines differ; "" without any."""
    found = sorted(set(counts))
    if not found:
        return ""
    many = f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])
    return f"{many} seed{'s' if found[-1] > 1 else ''}"
