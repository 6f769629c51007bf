"""What training costs: time, memory, parameters, on which machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gddlab.errors import GddlabError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cost_table"]

COLUMNS = ("experiment", "kimg", "sec_per_kimg", "peak_mem_mib", "parameters", "trained", "discriminator", "state")


def cost_table(study: pd.DataFrame) -> pd.DataFrame:
    """A row an experiment: what a step of its training costs. Evaluation is not counted.

    Args:
        study: "costs", as `gddlab.load_study` gives it.

    Returns:
        Indexed by experiment: trained (parameters of the student), share (of all), discriminator (its trained parameters), sec_per_kimg (median over iterations,
        R1's share included), minutes (of the whole training), peak_mem_mib (of the process on a CPU, of the accelerator otherwise), state.

    Raises:
        GddlabError: Another table.
    """
    import pandas as pd

    if missing := [c for c in COLUMNS if c not in study]:
        raise GddlabError(f"no column {missing[0]!r}: give the study costs, gddlab.load_study(...)")
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
