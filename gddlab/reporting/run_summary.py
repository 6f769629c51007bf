"""What a run directory says of its run, read leniently: what is missing or cannot be read is named, nothing is refused."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.evaluation import Record, compare, load_records
from gddlab.files import data_dir, read_json
from gddlab.freezing import FreezeMask
from gddlab.launch import RunHandle
from gddlab.reporting.style import look
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "NOT_RUN",
    "Facts",
    "Reading",
    "Same",
    "differing",
    "facts",
    "provenance_rows",
    "python_of",
    "read",
    "runs_folder",
    "select",
    "shown",
    "teacher_levels",
    "teacher_scores",
    "trained_rows",
]

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


T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """A run as it lies there.

    Attributes:
        name: How it is called on the page.
        run: Its folder.
        state: "done", or what it is instead, with how far it came.
        config: Its configuration; None where this version cannot read it.
        fields: What config.json holds, with the defaults of fields that did not exist when it was written.
        mask: What is frozen; None where nothing is, or where the file cannot be read.
        metrics: A row a tick.
        records: Its scores, oldest first.
        card: teacher.json.
        teacher: The teacher's scores on that card.
        provenance, status: The files of these names.
        alarms: A row an alarm.
        problems: What could not be read, a line each.
    """

    name: str
    run: RunHandle
    state: str
    config: TrainConfig | None
    fields: dict[str, Any]
    mask: FreezeMask | None
    metrics: pd.DataFrame
    records: tuple[Record, ...]
    card: dict[str, Any]
    teacher: tuple[Record, ...]
    provenance: dict[str, Any]
    status: dict[str, Any]
    alarms: pd.DataFrame
    problems: tuple[str, ...]

    @property
    def short_state(self) -> str:
        """The state without its reason."""
        return self.state.partition(":")[0]

    @property
    def experiment(self) -> str:
        """Its name without the seed, where its folder is one seed of an experiment."""
        head, _, tail = self.name.rpartition("/")
        return head if head and tail.startswith("seed-") else self.name

    @property
    def kimg(self) -> float:
        """Thousands of images seen."""
        if "kimg" in self.metrics:
            return float(self.metrics["kimg"].iloc[-1])
        return float(self.status.get("nimg", 0)) / 1000

    def last(self, records: Iterable[Record]) -> Record | None:
        """The newest score of this run that is among `records`."""
        among = list(records)
        own = [r for r in self.records if r in among]
        return max(own, key=lambda r: -1.0 if r.kimg is None else r.kimg, default=None)


def facts(run_dir: Path, name: str) -> Facts:
    """Reads a run directory."""
    import pandas as pd

    run = RunHandle(run_dir)
    problems: list[str] = []

    def lenient(what: str, get: Callable[[], T], otherwise: T) -> T:
        try:
            return get()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            why = f"no {e}" if isinstance(e, KeyError) else str(e).replace(f"{run.run_dir}/", "")
            problems.append(f"{what}: {why}")
            return otherwise

    def file(name: str) -> dict[str, Any]:
        if not (run.run_dir / name).exists():
            problems.append(f"{name}: not there")
            return {}
        found = read_json(run.run_dir / name)
        if not isinstance(found, dict):
            raise GddlabError("no JSON object")
        return found

    nothing: dict[str, Any] = {}
    written = lenient("config.json", lambda: file("config.json"), nothing)
    mask_file = run.run_dir / "mask.json"
    card = lenient("teacher.json", lambda: file("teacher.json"), nothing)
    status = lenient("status.json", lambda: run.written_status, nothing)
    return Facts(
        name=name,
        run=run,
        state=lenient("state", lambda: _state(run, status), "unknown"),
        config=lenient("configuration", lambda: run.config, None),
        fields=_defaults() | written,
        mask=lenient("mask.json", lambda: FreezeMask.load(mask_file), None) if written.get("mask") else None,
        metrics=lenient("metrics.jsonl", lambda: run.metrics, pd.DataFrame()),
        records=lenient("evaluation.jsonl", lambda: tuple(load_records(run.run_dir)), ()),
        card=card,
        teacher=lenient("scores in teacher.json", lambda: tuple(map(Record.from_dict, card.get("scores") or ())), ()),
        provenance=lenient("provenance.json", lambda: file("provenance.json"), nothing),
        status=status,
        alarms=lenient("alarms.jsonl", lambda: run.alarms, pd.DataFrame()),
        problems=tuple(problems),
    )


def _state(run: RunHandle, status: dict[str, Any]) -> str:
    state = read(run).state
    if run.status == "failed" and status.get("state") in ("starting", "running"):
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(status.get("heartbeat", 0))))
        return f"failed: its processes ended without a word; last sign of life {when}"
    return state


def _defaults() -> dict[str, Any]:
    return TrainConfig.model_construct(run_dir=Path()).model_dump(mode="json", exclude={"run_dir"})


def trained_rows(f: Facts) -> list[list[str]]:
    """What was trained, one row per subject; the configuration as it is written where this version cannot read it."""
    if f.config is None:
        return [["configuration", json.dumps(f.fields)]]
    c, about = f.fields, f.card
    parameters = f"{about['parameters']:,} parameters" if "parameters" in about else ""
    network = ", ".join(str(x) for x in (about.get("precond"), about.get("unet"), parameters) if x)
    steps = 1 + len(c["mid_sigmas"])
    begins = "" if c["student"] == "teacher" else f"; it begins with {c['student']} weights"
    rows = [
        ["method", method(f.config)],
        ["teacher", f"{c['teacher']}: {network}" if network else str(c["teacher"])],
        ["student", f"{steps} network call{'s' if steps > 1 else ''} an image{begins}"],
        ["mask", str(f.mask) if f.mask is not None else "none" if not c["mask"] else f"sha256 {c['mask'][:16]}"],
    ]
    discriminator, instance, augment = f.config.discriminator, f.config.instance, f.config.augment
    if discriminator is not None:
        r1 = f"R1 {c['r1_gamma']:g} every {c['r1_interval']} iterations" if c["r1_gamma"] else "no R1"
        loss = {"ns": "non-saturating", "hinge": "hinge"}.get(c["loss"], c["loss"])
        rows += [
            ["discriminator", discriminator.describe()],
            ["adversarial loss", f"{loss}, factor {c['adversarial_weight']:g}; {r1}"],
            ["augmentation", "none" if augment is None else augment.describe()],
        ]
    if instance is not None:
        rows.append(["instance loss", instance.describe()])
    reused = ", fakes reused" if c["reuse_fakes"] else ""
    images = f", {c['max_images']} images" if c["max_images"] else ""
    rows += [
        ["data", f"{c['data']}{images}{', mirrored too' if c['xflip'] else ''}"],
        ["length", f"{c['total_kimg']:g} thousand images, {c['batch']} an iteration{reused}"],
        ["learning rates", f"student {c['lr_g']:g}, discriminator {c['lr_d']:g}"],
        ["average", f"half-life {c['ema_halflife_kimg']:g} kimg, ramp {shown(c['ema_rampup'])}"],
        ["precision", f"student {c['precision']}, discriminator {c['precision_d']}"],
        ["seed", shown(c["seed"])],
    ]
    return rows


def method(config: TrainConfig) -> str:
    """GDD, GDD-I, an instance-based baseline, or both."""
    names = []
    if config.discriminator is not None:
        names.append("GDD" if config.mask is None else "GDD-I")
    if config.instance is not None:
        names.append(config.instance.kind.upper())
    return " + ".join(names)


def provenance_rows(f: Facts) -> list[list[str]]:
    """What ran where, a row a subject; empty where nothing was written."""
    p = f.provenance
    if not p:
        return []
    machine = ", ".join(f"{k} {shown(v)}" for k, v in p.get("hardware", {}).items() if v)
    rows = [
        ["commit", p.get("commit") or "installed package"],
        ["versions", ", ".join(f"{k} {v}" for k, v in p.get("versions", {}).items())],
        ["teacher, sha256", p.get("teacher_sha256", "")],
        ["data, sha256", p.get("dataset_sha256", "")],
        ["mask, sha256", p.get("mask") or "none"],
        ["processes", p.get("world_size", "")],
        ["machine", machine],
    ]
    return [[k, str(v)] for k, v in rows if v not in ("", None)]


def python_of(f: Facts) -> str:
    """The call that makes this run again, with the fields that are not at their default."""
    default = _defaults()
    given = {k: v for k, v in f.fields.items() if v != default.get(k) and k != "mask"}
    lines = [f"    {k}={tuple(v) if isinstance(v, list) else v!r}," for k, v in given.items()]
    if f.fields["mask"]:
        lines.append('    mask="mask.json",  # of this run')
    nproc = f.provenance.get("world_size", 1)
    inside = "\n".join(['    run_dir="again",', *lines])
    return f"import gddlab\n\nconfig = gddlab.TrainConfig(\n{inside}\n)\ngddlab.train(config{f', nproc={nproc}' if nproc > 1 else ''})"


def differing(runs: Sequence[Facts]) -> dict[str, list[str]]:
    """Fields in which configurations differ, with each run's value; the mask by what it freezes."""
    rows = [_flat(f.fields) for f in runs]
    out: dict[str, list[str]] = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        values = [row.get(name) for row in rows]
        if any(v != values[0] for v in values):
            out[name] = [_mask_cell(f) if name == "mask" else shown(v) for f, v in zip(runs, values, strict=True)]
    return out


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a part beside the others, as "discriminator.input_size"."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


def _mask_cell(f: Facts) -> str:
    if f.mask is None:
        return shown(f.fields["mask"])[:12]
    score = f.mask.arguments.get("score")
    what = f", {shown(score)} {f.mask.arguments.get('freeze') or ''}".rstrip() if score else ""
    return f"{f.mask.strategy}{what}: {f.mask.fraction:.1%} ({f.mask.hash[:6]})"


def shown(value: Any) -> str:
    """A value of a configuration, for people."""
    if value is None or value == [] or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {shown(v)}" for k, v in value.items())
    return str(value)


ACCEPTED = ("runs",)


def runs_folder(names: Mapping[str, Any]) -> Path:
    """The folder of `gddlab reproduce --out` that a notebook reads: its parameter `runs`, or the shipped runs where that is empty.

    papermill writes the parameters it was given into a cell of its own and only warns where the notebook has no such parameter; here that is refused.

    Args:
        names: The notebook's `globals()`.

    Returns:
        A folder that holds a folder for each list of experiments, such as "digits".

    Raises:
        GddlabError: A parameter has another name, or `runs` is the folder of one list.
        NotFound: There is no such folder.
    """
    for name in _injected(names):
        if name not in ACCEPTED:
            raise unknown("parameter", name, ACCEPTED)
    given = names.get("runs") or ""
    folder = Path(given) if given else data_dir() / "runs"
    if not folder.is_dir():
        raise NotFound(
            f"runs={str(given)!r}: no such folder; give the --out of gddlab reproduce, or '' for the shipped runs"
        )
    if any(folder.glob("*/seed-*/config.json")) and not any(folder.glob("*/*/seed-*/config.json")):
        raise GddlabError(f"runs={str(given)!r} is the folder of one list: give {str(folder.parent)!r}, which holds it")
    return folder


def _injected(names: Mapping[str, Any]) -> Iterator[str]:
    """Names assigned in papermill's cell, which begins with its comment; `In` holds the cells that IPython has run."""
    for source in names.get("In", ()):
        if source.startswith("# Parameters\n"):
            for statement in ast.parse(source).body:
                if isinstance(statement, ast.Assign):
                    yield from (t.id for t in statement.targets if isinstance(t, ast.Name))
