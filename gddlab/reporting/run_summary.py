"""What a run directory says about its run, read leniently: what is missing or damaged is named, nothing is refused."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd

from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.evaluation import Record, compare, load_records, scores_of
from gddlab.files import data_dir
from gddlab.freezing import FreezeMask
from gddlab.launch import RunHandle
from gddlab.reporting.style import look
from gddlab.runs import ARCHIVE, Run, load_study

NOT_RUN = "not run"
CASES = ("copier", "missing class")
"""Of the study "known-cases": what figures show."""
T = TypeVar("T")


class Lenient(Generic[T]):
    """An attribute of `Summary` that is read once, when asked; `otherwise` where it is missing or damaged.

    `what` is its name in `Summary.problems`; one that is `needed` is a problem also where it is empty.
    """

    def __init__(self, what: str, read: Callable[[Summary], T], otherwise: T, *, needed: bool = False) -> None:
        self.what, self.read, self.otherwise, self.needed = what, read, otherwise, needed

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, summary: Summary, owner: type) -> T:
        if summary is None:  # of the class
            return self
        found = self.otherwise
        try:
            found = self.read(summary)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:  # a GddlabError is a ValueError
            why = f"no {e}" if isinstance(e, KeyError) else str(e).replace(f"{summary.run.run_dir}/", "")
            summary.problem_of[self.what] = why
        if self.needed and not found:
            summary.problem_of.setdefault(self.what, "not there")
        vars(summary)[self.name] = found  # the next look finds it there
        return found


class Summary:
    """A run directory, read when asked: what is missing or damaged has a neutral value, and `problems` says why.

    Attributes:
        run: The run.
        name: Its name on a page.
        written: config.json as it is.
        card, provenance: teacher.json, provenance.json.
        records, teacher: Scores of the run, oldest first; those of its teacher, on the card.
        mask: What is frozen; None where nothing is.
        metrics, alarms: One row per tick, per alarm.
        problem_of: What could not be read -> why.
    """

    run: RunHandle
    written: Lenient[dict[str, Any]] = Lenient("config.json", lambda s: s.run.written_config, {})
    card: Lenient[dict[str, Any]] = Lenient("teacher.json", lambda s: s.run.card, {}, needed=True)
    status: Lenient[dict[str, Any]] = Lenient("status.json", lambda s: s.run.written_status, {})
    config: Lenient[TrainConfig | None] = Lenient("configuration", lambda s: s.run.config, None)
    records: Lenient[tuple[Record, ...]] = Lenient("evaluation.jsonl", lambda s: tuple(load_records(s.run.run_dir)), ())
    mask: Lenient[FreezeMask | None] = Lenient("mask.json", lambda s: s.run.mask if s.fields["mask"] else None, None)
    metrics: Lenient[pd.DataFrame] = Lenient("metrics.jsonl", lambda s: s.run.metrics, pd.DataFrame())
    teacher: Lenient[tuple[Record, ...]] = Lenient(
        "scores in teacher.json", lambda s: tuple(map(Record.from_dict, s.card.get("scores") or ())), ()
    )
    provenance: Lenient[dict[str, Any]] = Lenient("provenance.json", lambda s: s.run.provenance, {}, needed=True)
    alarms: Lenient[pd.DataFrame] = Lenient("alarms.jsonl", lambda s: s.run.alarms, pd.DataFrame())
    best: Lenient[dict[str, Any] | None] = Lenient("best.json", lambda s: _complete(s.run.best), None)

    def __init__(self, run: Run, name: str = "") -> None:
        self.run, self.name = RunHandle(run.run_dir), name
        self.problem_of: dict[str, str] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read and why, one line each."""
        for name, part in vars(Summary).items():
            if isinstance(part, Lenient):
                getattr(self, name)
        return tuple(f"{what}: {why}" for what, why in self.problem_of.items())

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration as it was written, with the defaults of fields that did not exist then."""
        return _defaults() | self.written

    @cached_property
    def state(self) -> str:
        """ "done", or what keeps it from being so, such as "stopped at 3 of 12 kimg" or "older format: ..."."""
        config, status, _ = self.config, self.status, self.records
        for what in ("configuration", "status.json", "evaluation.jsonl"):
            if what in self.problem_of:
                return f"older format: {self.problem_of[what]}"
        assert config is not None
        state = str(status.get("state", "not started"))
        if state in ("starting", "running") and self.run.status == "failed":
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(status.get("heartbeat", 0))))
            return f"failed: its processes ended without an error; last heartbeat {when}"
        if state != "done" and "nimg" in status:
            state += f" at {status['nimg'] / 1000:g} of {config.total_kimg:g} kimg"
        return state

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

    @cached_property
    def scores(self) -> list[Record]:
        """The scores that count, of those in `records`; all where the configuration cannot be read."""
        return [*self.records] if self.config is None else scores_of(self.records, self.config)

    def at_end(self, metric: str, kimg: float | None = None) -> Record | None:
        """The score of a metric, by its label, after `kimg` or at the end."""
        if self.config is None:
            return None
        kimg = self.config.end_kimg if kimg is None else kimg
        return next((r for r in self.scores if r.label == metric and r.kimg == kimg), None)

    def state_of(self, metric: str, kimg: float | None = None) -> str:
        """The state, or why a finished run lacks this score."""
        if self.state != "done" or self.at_end(metric, kimg) is not None:
            return self.state
        if kimg is not None and self.config is not None and kimg > self.config.end_kimg:
            return f"ends at {self.config.end_kimg:g} kimg"
        return f"no {metric} {'at the end' if kimg is None else f'at {kimg:g} kimg'}"

    def last(self, records: Iterable[Record]) -> Record | None:
        """The score of this run after the most images that counts and is among `records`."""
        among = list(records)
        own = [r for r in self.scores if r in among]
        return max(own, key=lambda r: -1.0 if r.kimg is None else r.kimg, default=None)


def _complete(best: dict[str, Any] | None) -> dict[str, Any] | None:
    """best.json, where it has what is told of it."""
    return best if best is None else {name: best[name] for name in ("metric", "value", "kimg")}


NUMBERS = dict.fromkeys(("seed", "nfe", "images"), "Int64") | dict.fromkeys(("frozen", "kimg", "value"), "float64")


def table_of(
    runs: Sequence[Run],
    rows: Sequence[str],
    columns: Sequence[str],
    tell: Callable[[Summary], Iterable[dict[str, Any]]],
) -> pd.DataFrame:
    """The rows that `tell` gives for each run, by experiment; an experiment of `rows` without a run is one, "not run".

    A row's `record` gives it `metric` and `value`; records that cannot be compared with the first are refused, and so
    are runs of trainers whose numbers differ.
    """
    if isinstance(rows, str):
        raise GddlabError(f"rows={rows!r}: give a list of experiments")
    if not runs and not rows:
        raise GddlabError("no runs given: load them with gddlab.load_runs(folder)")
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    trainers: dict[int, str] = {}
    for run in runs:
        name = run.run_dir.parent.name
        if name in told or not rows:
            summary = Summary(run)
            told.setdefault(name, []).extend(tell(summary))
            if summary.provenance:
                trainers.setdefault(summary.provenance.get("trainer", 1), f"{name}/{run.run_dir.name}")
    if len(trainers) > 1:
        (a, one), (b, other), *_ = sorted(trainers.items())
        raise GddlabError(f"{one} was trained by trainer {a}, {other} by {b}, whose numbers differ: train both anew")
    out = [{"experiment": name} | row for name, some in told.items() for row in some or [{"state": NOT_RUN}]]
    scored = [row for row in out if "record" in row]
    for row in scored:
        compare(row["record"], scored[0]["record"])
        record = row["record"]
        _, colon, images = record.label.partition(":")  # held against other images than those trained on
        row |= {"metric": record.metric + colon + images, "value": record.value}
    types = {name: kind for name, kind in NUMBERS.items() if name in columns}
    return pd.DataFrame(out, columns=["experiment", *columns]).astype(types)


def teacher_scores(runs: Sequence[Run], metric: str = "fd-lite2") -> dict[int, float]:
    """The teacher's scores by its number of Heun steps, from the first card in the runs; {} without one.

    Raises:
        GddlabError: The card is damaged, or its scores cannot be compared with those of the runs.
    """
    card = next((card for run in runs if (card := run.card)), {})
    scores = [Record.from_dict(d) for d in card.get("scores") or ()]
    named = {r.sampler: r for r in scores if r.name == metric}
    found = {int(steps[1]): r for text, r in named.items() if (steps := re.fullmatch(r"heun-(\d+)", text))}
    for own in [r for run in runs for r in Summary(run).records if r.name == metric][:1]:
        for record in found.values():
            compare(record, own)
    return {steps: found[steps].value for steps in sorted(found)}


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


def known_levels(folder: str | Path, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """What scores are held against in figures: those of the full teacher, of a copier, and of a missing class.

    Args:
        folder: Of one list, with the studies "teacher-steps" and "known-cases"; one that is not there adds nothing.
        metrics: Names of scores, as for `run_table`.

    Returns:
        Score -> label -> value.
    """
    if isinstance(metrics, str):
        raise GddlabError(f"metrics={metrics!r}: give a list of scores")
    out: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    for study in ("teacher-steps", "known-cases"):
        if not (Path(folder) / study / "meta.json").is_file():
            continue
        frame = load_study(Path(folder) / study)
        full = frame["steps"] == frame["steps"].max() if "steps" in frame else frame["case"].isin(CASES)
        for row in frame[frame["label"].isin(metrics) & full].to_dict("records"):
            name = look(f"teacher-{row['steps']}").label if "steps" in row else str(row["case"])
            out[str(row["label"])][name] = float(row["value"])
    return out


def _defaults() -> dict[str, Any]:
    return TrainConfig.model_construct(run_dir=Path()).model_dump(mode="json", exclude={"run_dir"})


def trained_rows(f: Summary) -> list[list[str]]:
    """What was trained, one row per subject; the configuration as it is written if this version cannot read it."""
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
        ["average", f"half-life {c['ema_halflife_kimg']:g} kimg, ramp {in_words(c['ema_rampup'])}"],
        ["precision", f"student {c['precision']}, discriminator {c['precision_d']}"],
        ["seed", in_words(c["seed"])],
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


def provenance_rows(f: Summary) -> list[list[str]]:
    """What ran where, one row per subject; empty where nothing was written."""
    p = f.provenance
    if not p:
        return []
    machine = ", ".join(f"{k} {in_words(v)}" for k, v in p.get("hardware", {}).items() if v)
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


def python_of(f: Summary) -> str:
    """The call that repeats this run, with the fields that differ from their defaults."""
    default = _defaults()
    given = {k: v for k, v in f.fields.items() if v != default.get(k) and k != "mask"}
    lines = [f"    {k}={tuple(v) if isinstance(v, list) else v!r}," for k, v in given.items()]
    if f.fields["mask"]:
        lines.append('    mask="mask.json",  # of this run')
    nproc = f.provenance.get("world_size", 1)
    inside = "\n".join(['    run_dir="again",', *lines])
    call = f"gddlab.train(config{f', nproc={nproc}' if nproc > 1 else ''})"
    return f"import gddlab\n\nconfig = gddlab.TrainConfig(\n{inside}\n)\n{call}"


def differing(runs: Sequence[Summary]) -> dict[str, list[str]]:
    """Fields in which configurations differ, with each run's value; the mask by what it freezes."""
    rows = [_flat(f.fields) for f in runs]
    out: dict[str, list[str]] = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        values = [row.get(name) for row in rows]
        if any(v != values[0] for v in values):
            out[name] = [_mask_cell(f) if name == "mask" else in_words(v) for f, v in zip(runs, values, strict=True)]
    return out


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a part beside the others, as "discriminator.input_size"."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


def _mask_cell(f: Summary) -> str:
    if f.mask is None:
        return in_words(f.fields["mask"])[:12]
    score = f.mask.arguments.get("score")
    what = f", {in_words(score)} {f.mask.arguments.get('freeze') or ''}".rstrip() if score else ""
    return f"{f.mask.strategy}{what}: {f.mask.fraction:.1%} ({f.mask.hash[:6]})"


def in_words(value: Any) -> str:
    """A value of a configuration, for people."""
    if value is None or value == [] or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {in_words(v)}" for k, v in value.items())
    return str(value)


def runs_folder(names: Mapping[str, Any]) -> Path:
    """The folder of `gddlab reproduce --out` that a notebook reads: its parameter `runs`, or the shipped runs if empty.

    Prints for other runs than those shipped that the notebook's text does not describe them. papermill writes the
    parameters it was given into a cell of its own and only warns where the notebook has no such parameter; here that is
    refused.

    Args:
        names: The notebook's `globals()`.

    Returns:
        A folder that holds a folder for each list of experiments, such as "digits".

    Raises:
        GddlabError: A parameter has another name, or `runs` is the folder of one list.
        NotFound: There is no such folder.
    """
    for cell in names.get("In", ()):  # what IPython has run; papermill's own begins with its comment
        for name in re.findall(r"^(\w+) = ", cell, re.MULTILINE) if cell.startswith("# Parameters\n") else ():
            if name != "runs":
                raise unknown("parameter", name, ["runs"])
    given = names.get("runs") or ""
    folder = Path(given) if given else data_dir() / "runs"
    if not folder.is_dir():
        wanted = "give the --out of gddlab reproduce, or '' for the shipped runs"
        if not given:
            wanted = "the shipped runs come with a clone of gddlab, not with its wheel; or give your own"
        raise NotFound(f"runs={str(given)!r}: no such folder; {wanted}")
    found = [
        any(True for kind in ("/seed-*/config.json", ARCHIVE) for _ in folder.glob(n + kind)) for n in ("*", "*/*")
    ]
    if found == [True, False]:
        raise GddlabError(f"runs={str(given)!r} is the folder of one list: give its parent {str(folder.parent)!r}")
    if given:
        sys.stdout.write(f"Figures and tables show {folder}. Numbers in the text are those of the shipped runs.\n")
    return folder
