"""What a run directory says of its run, read leniently: what is missing or cannot be read is named, nothing is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError
from gddlab.evaluation import Record, load_records
from gddlab.files import read_json
from gddlab.freezing import FreezeMask
from gddlab.freezing.mask import mask_line
from gddlab.launch import RunHandle
from gddlab.reporting.reading import read

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Facts", "differing", "facts", "provenance_rows", "python_of", "shown", "trained_rows"]

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """A run as it lies there.

    Attributes:
        name: How it is called on the page.
        run: Its folder.
        state: "done", or what it is instead, with how far it came.
        fields: Its configuration, with the defaults of fields that did not exist when it was written.
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
    lenient("configuration", lambda: run.config, None)
    return Facts(
        name=name,
        run=run,
        state=lenient("state", lambda: _state(run, status), "unknown"),
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
    """What was trained, a row a subject."""
    c, about = f.fields, f.card
    parameters = f"{about['parameters']:,} parameters" if "parameters" in about else ""
    network = ", ".join(str(x) for x in (about.get("precond"), about.get("unet"), parameters) if x)
    steps = 1 + len(c["mid_sigmas"])
    begins = "" if c["student"] == "teacher" else f"; it begins with {c['student']} weights"
    rows = [
        ["method", method(f)],
        ["teacher", f"{c['teacher']}: {network}" if network else str(c["teacher"])],
        ["student", f"{steps} network call{'s' if steps > 1 else ''} an image{begins}"],
        ["mask", mask_line(f.mask) if f.mask is not None else "none" if not c["mask"] else f"sha256 {c['mask'][:16]}"],
    ]
    if c["adversarial_weight"]:
        names = f" on {', '.join(c['backbones'])}" if c["discriminator"] == "projected" else ""
        size = "" if c["discriminator"] == "stylegan2" else f", images resized to {c['input_size']} pixels"
        kept = {k: v for k, v in c["backbone_weights"].items() if k in c["backbones"]}
        weights = f", weights {', '.join(f'{k}: {v}' for k, v in kept.items())}" if kept else ""
        r1 = f"R1 {c['r1_gamma']:g} every {c['r1_interval']} iterations" if c["r1_gamma"] else "no R1"
        augment = f"{', '.join(c['augment'])}" if c["augment"] else "none"
        if c["ada_target"]:
            augment += f", ADA with target {c['ada_target']:g}"
        loss = {"ns": "non-saturating", "hinge": "hinge"}.get(c["loss"], c["loss"])
        rows += [
            ["discriminator", f"{c['discriminator']}{names}{weights}{size}"],
            ["adversarial loss", f"{loss}, factor {c['adversarial_weight']:g}; {r1}"],
            ["augmentation", augment],
        ]
    if c["instance"]:
        what = (
            f"{c['instance']}, factor {c['instance_weight']:g}, {c['instance_steps']} steps, distance {c['distance']}"
        )
        rows.append(["instance loss", what])
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


def method(f: Facts) -> str:
    """GDD, GDD-I, an instance-based baseline, or both."""
    gan = ("GDD-I" if f.fields["mask"] else "GDD") if f.fields["adversarial_weight"] else ""
    return " + ".join(x for x in (gan, str(f.fields["instance"] or "").upper()) if x)


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
    names = dict.fromkeys(k for f in runs for k in f.fields)
    out: dict[str, list[str]] = {}
    for name in names:
        values = [f.fields.get(name) for f in runs]
        if any(v != values[0] for v in values):
            out[name] = [_mask_cell(f) if name == "mask" else shown(f.fields.get(name)) for f in runs]
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
