"""Studies as tables: what steps cost, whom students follow, groups of layers put back."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from gddlab.reporting.statistics import interval
from gddlab.reporting.style import checked

COST_COLUMNS = ("experiment", "kimg", "sec_per_kimg", "peak_mem_mib", "parameters", "trained", "discriminator", "state")


def cost_table(study: pd.DataFrame) -> pd.DataFrame:
    """One row per experiment: the cost of a step of its training, without evaluation.

    Args:
        study: "costs", as `gddlab.load_study` gives it.

    Returns:
        Indexed by experiment: trained (parameters of the student), share trained (of all), discriminator (its trained
        parameters), sec_per_kimg (median over iterations, R1's share included), minutes (of the whole training),
        peak_mem_mib (of the process on a CPU, of the accelerator otherwise), state.

    Raises:
        GddlabError: Another table.
    """
    study = checked(study, COST_COLUMNS, "costs")
    out = pd.DataFrame(
        {
            "trained": study["trained"].astype("Int64"),
            "share trained": study["trained"] / study["parameters"],
            "discriminator": study["discriminator"].astype("Int64"),
            "sec_per_kimg": study["sec_per_kimg"],
            "minutes": study["sec_per_kimg"] * study["kimg"] / 60,
            "peak_mem_mib": study["peak_mem_mib"],
            "state": study["state"],
        }
    )
    return out.set_index(study["experiment"])


def followed_table(study: pd.DataFrame) -> pd.DataFrame:
    """The study "followed" as a table for `draw_dose`: means over seeds, with their 95 % intervals.

    Scores are "teacher's image found", the share of a student's images to which the teacher's image of the same noise
    is the most alike of all, and "correlation with it", as `found_again` gives them.

    Raises:
        GddlabError: Another table.
    """
    names = {"found": "teacher's image found", "correlation": "correlation with it"}
    study = checked(study, ("experiment", "seed", "frozen", *names), "followed")
    rows = []
    for (column, name), (arm, own) in itertools.product(names.items(), study.groupby("experiment", sort=False)):
        x = own[column].to_numpy(float)
        low, high = interval(x)
        row = {"metric": name, "experiment": arm, "frozen": own["frozen"].mean(), "seeds": len(x), "mean": x.mean()}
        rows.append(row | {"low": low, "high": high, "state": "done"})
    return pd.DataFrame(rows)


def rewound_table(study: pd.DataFrame, into: str = "student") -> pd.DataFrame:
    """The study "rewound" as a table for `draw_arms`: what each score becomes when a group of layers is put back.

    Args:
        study: "rewound", as `gddlab.load_study` gives it.
        into: "student" for the teacher's weights in a student, "teacher" for the reverse.

    Returns:
        metric, experiment (the group; "none" is the network as it was, "all" the other one), frozen (the group's share
        of the squared movement of all weights), mean, state; one training seed, so that there are no intervals.

    Raises:
        GddlabError: Another table.
    """
    study = checked(study, ("into", "group", "share", "metric", "value"), "rewound")
    own = study[study["into"] == into].rename(columns={"group": "experiment", "share": "frozen", "value": "mean"})
    return own.assign(seeds=1, low=np.nan, high=np.nan, state="done")
