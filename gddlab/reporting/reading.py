"""What a run has come to, for tables: what is unfinished or cannot be read says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError
from gddlab.evaluation import Record, compare, load_records
from gddlab.files import read_json
from gddlab.reporting.networks import look
from gddlab.runs import Run

__all__ = ["NOT_RUN", "Reading", "Same", "read", "select", "teacher_levels", "teacher_scores"]

NOT_RUN = "not run"


@dataclass(frozen=True)
class Reading:
    """A run as it lies there.

    Attributes:
        experiment: Name of the folder above the run's.
        config: None where this version cannot read it.
        records: Its scores, oldest first.
        state: "done", or what keeps it from being so, such as "stopped at 3 of 12 kimg" or "older format: ...".
    """

    experiment: str
    config: TrainConfig | None
    records: tuple[Record, ...]
    state: str

    def at_end(self, metric: str) -> Record | None:
        """The newest score of a metric (named without its n) at the end of the training; of several blocks of seeds, the first block's."""
        if self.config is None:
            return None
        found = [r for r in self.records if r.name == metric and r.kimg == self.config.end_kimg]
        return min(reversed(found), key=lambda r: r.seeds[0] if r.seeds else 0, default=None)

    def state_of(self, metric: str) -> str:
        """The state, or that a finished run lacks this score."""
        return f"no {metric} at the end" if self.state == "done" and self.at_end(metric) is None else self.state


def read(run: Run) -> Reading:
    """Reads configuration, status and scores; a run that another version wrote and this one cannot read has that as its state."""
    experiment = run.run_dir.parent.name
    try:
        config, status = run.config, run.written_status
        records = tuple(load_records(run.run_dir))
    except (ValueError, KeyError, TypeError) as e:  # GddlabError is a ValueError; so is a line that is not JSON
        why = f"no {e}" if isinstance(e, KeyError) else str(e).replace(f"{run.run_dir}/", "")
        return Reading(experiment, None, (), f"older format: {why}")
    state = str(status.get("state", "not started"))
    if state != "done" and "nimg" in status:
        state += f" at {status['nimg'] / 1000:g} of {config.total_kimg:g} kimg"
    return Reading(experiment, config, records, state)


def select(runs: Sequence[Run], rows: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Runs by experiment: those named by `rows`, in that order and also where there is no run; all for ().

    Raises:
        GddlabError: Neither runs nor rows.
    """
    if isinstance(rows, str):
        raise GddlabError(f"rows={rows!r}: give a list of experiments")
    if not runs and not rows:
        raise GddlabError("no runs given: load them with gddlab.load_runs(folder)")
    out: dict[str, list[Run]] = {name: [] for name in rows}
    for run in runs:
        name = run.run_dir.parent.name
        if name in out or not rows:
            out.setdefault(name, []).append(run)
    return out


class Same:
    """Lets scores through that can be compared with the first one.

    Raises:
        GddlabError: n, extractor, reference or a setting differs.
    """

    def __init__(self) -> None:
        self.first: Record | None = None

    def __call__(self, record: Record) -> Record:
        if self.first is not None:
            compare(record, self.first)
        self.first = self.first or record
        return record


def teacher_scores(runs: Sequence[Run], metric: str = "fd-lite2") -> dict[int, float]:
    """The teacher's scores by its number of Heun steps, from the card that lies in the first run; {} where it has none.

    Raises:
        GddlabError: They cannot be compared with the runs' scores.
    """
    found = [run for run in runs if (run.run_dir / "teacher.json").exists()]
    if not found:
        return {}
    records = [Record.from_dict(s) for s in read_json(found[0].run_dir / "teacher.json").get("scores", ())]
    own = next((r for run in runs for r in read(run).records if r.name == metric), None)
    out: dict[int, float] = {}
    for record in records:
        if record.name == metric and record.sampler.startswith("heun-"):
            if own is not None:
                compare(record, own)
            out[int(record.sampler.removeprefix("heun-"))] = record.value
    return dict(sorted(out.items()))


def teacher_levels(
    runs: Sequence[Run], metric: str = "fd-lite2", *, steps: Sequence[int] | None = None
) -> dict[str, float]:
    """The same by label, such as "teacher, 18 steps", for figures.

    Args:
        runs, metric: As for `teacher_scores`.
        steps: Which to keep, of those there are; None keeps all.
    """
    scores = teacher_scores(runs, metric)
    return {look(f"teacher-{n}").label: v for n, v in scores.items() if steps is None or n in steps}
