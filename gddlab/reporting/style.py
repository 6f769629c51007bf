"""The names and colours of the networks of a study, the same in every figure, and the checks of its table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from gddlab.errors import GddlabError, unknown
from gddlab.theme import BLACK, GREY, PALETTE

BLUE, ORANGE, GREEN, RED, PINK = PALETTE[:5]
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
    "gdd": ("GDD", "GAN loss", BLUE),
    "gdd-i": ("GDD-I", "GAN loss", ORANGE),
    "scratch": ("GDD, random start", "GAN loss", PINK),
    "pd": ("PD", "instance loss", RED),
    "cd": ("CD", "instance loss", RED),
    "ctm": ("CTM", "instance loss", RED),
    "rcd": ("RCD", "instance loss", RED),
    "gdd-cd": ("GDD + CD", "GAN and instance loss", GREEN),
}


@dataclass(frozen=True)
class Look:
    """A network in figures: its label, its sort (a key of `SORTS`), and a colour of its own."""

    label: str
    sort: str
    colour: str


def look(name: str) -> Look:
    """How a network is shown: "teacher-18" as "teacher, 18 steps", "gdd-i" as "GDD-I"; an unknown name as itself."""
    if name in NAMES:
        return Look(*NAMES[name])
    if steps := re.fullmatch(r"teacher-(\d+)(.*)", name):
        count = int(steps[1])
        shade = str(max(0.3, 0.75 - 0.45 * count / 18))
        return Look(f"teacher, {count} step{'s' if count > 1 else ''}{steps[2]}", "teacher", shade)
    return Look(name, "teacher", "0.25") if name == "teacher" else Look(name, "other", SORTS["other"])


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
