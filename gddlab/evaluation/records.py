"""Scores with their provenance: one record per metric; which may be compared; how one was made."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from gddlab.datasets import HELD_OUT, name_and_part
from gddlab.distill.config import TrainConfig
from gddlab.distill.status import name_of
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.evaluation.extractors import argument_of
from gddlab.evaluation.metrics import METRICS, metric_of, names_of
from gddlab.files import hash_json, hash_tensors, path_of, read_json, read_jsonl, write_text, writing
from gddlab.nets import SIGMA_MAX, load_network
from gddlab.runs import Run
from gddlab.sampling.samplers import sampler_name
from gddlab.teachers.catalog import bundled_file, bundled_teachers, load_teacher, tensors_of

if TYPE_CHECKING:
    import pandas as pd

FILE = "evaluation.jsonl"


def label_of(name: str, part: str | None) -> str:
    """The label of a score against the images of a part."""
    return f"{name}:{part}" if part == HELD_OUT else name


@dataclass(frozen=True)
class Record:
    """One score and what it is a score of.

    Attributes:
        metric: Name with the number of images, such as `fd-lite2@1797`; only Inception features give `fid@n`.
            `fid-min3@n` is the least of three blocks.
        value: The score; distances have no unit, precision and recall are in [0, 1].
        std: Spread over subsets where the metric has them (kernel distance).
        n: Number of images scored.
        seeds: First and last seed of the images; None if the images were given.
        extractor, extractor_sha256, extractor_input_size: The network, hash of its weights file, its input side in
            pixels.
        reference, reference_sha256, reference_n: The real images: name, hash of the manifest, number; of EDM's
            statistics the file's name and hash, and None.
        sampler: "one-step", "heun-18" and so on, with every setting that is not EDM's default; "data", "images".
        model_sha256: Hash of the model's tensors; None if the images were given.
        images_sha256: Hash of the images scored, uint8.
        settings: Settings of the metric and whatever else must agree for scores to be comparable.
        versions: Of Python and the packages that affect the numbers.
        seconds: Wall time; sampling and features, shared by the metrics, count in each.
        kimg: Thousands of real images that the model was trained on; None if unknown.
        preprocessing: What the extractor does to a uint8 image; None in older records.
        source, data: What was scored and against what, if given by name or path.
        interval: Of 95 %, where the metric has one; None in older records.
        run_dir: Run directory that the record belongs to; it is not written.
    """

    metric: str
    value: float
    std: float | None
    n: int
    seeds: tuple[int, int] | None
    extractor: str
    extractor_sha256: str
    extractor_input_size: int
    reference: str
    reference_sha256: str
    reference_n: int | None
    sampler: str
    model_sha256: str | None
    images_sha256: str
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    kimg: float | None = None
    preprocessing: str | None = None
    source: str | None = None
    data: str | None = None
    interval: tuple[float, float] | None = None
    run_dir: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise GddlabError(f"{self.metric} is {self.value}: look at the images, the model may have diverged")

    @property
    def name(self) -> str:
        """The metric without its n."""
        return self.metric.partition("@")[0]

    @property
    def label(self) -> str:
        """The metric without its n, and whether the real images were held out: "kd-lite2:held-out"."""
        return label_of(self.name, name_and_part(self.reference)[1])

    @property
    def against(self) -> str:
        """The real images, with their number where it is known."""
        return self.reference if self.reference_n is None else f"{self.reference_n} images of {self.reference}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON."""
        pairs = {"seeds": self.seeds, "interval": self.interval}
        d = asdict(self) | {name: None if pair is None else list(pair) for name, pair in pairs.items()}
        del d["run_dir"]
        return d

    def trace(self) -> Trace:
        """Where the number comes from: run, configuration, file, and the commands that repeat training and scoring."""
        folder, source = self.run_dir, self.source
        if self.reference.endswith(_HALF):
            return Trace(self, "one half of the real images", repeated_by=_split_command(self))
        if self.sampler == "data":
            return Trace(self, source or "a dataset", repeated_by=source and _command(self, source, self.data))
        if self.model_sha256 is None:
            return Trace(self, source or "images given in memory")
        if folder is not None and (folder / "config.json").is_file() and (folder / "provenance.json").is_file():
            return _trace_student(self, Run(folder))
        if source is not None and _holds(Path(source), self.model_sha256):
            return Trace(self, source, file=Path(source), repeated_by=_command(self, source))
        for name in bundled_teachers():
            if load_teacher(name).card.sha256 == self.model_sha256:
                return _trace_teacher(self, name)
        again = source and _command(self, source, self.data)
        return Trace(self, source or "a network given in memory", repeated_by=again)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Record:
        """The record that `to_dict` gave.

        Raises:
            GddlabError: Fields are missing or unknown.
        """
        if wrong := set(d) ^ set(FIELDS) - (_LATER - set(d)):
            raise GddlabError(f"not an evaluation record: fields {sorted(wrong)} are missing or unknown")
        return cls(**d | {name: tuple(d[name]) if d.get(name) else None for name in ("seeds", "interval")})


FIELDS = tuple(f.name for f in fields(Record) if f.name != "run_dir")
_LATER = {"kimg", "preprocessing", "source", "data", "interval"}
"""Fields that older records lack."""


@dataclass(frozen=True)
class Scores:
    """The records of one evaluation; `scores["fd-lite2"]` or `scores["fd-lite2@1797"]` is the value.

    Several blocks have their records one after another: `scores["fd-lite2"]` is the first block's, and
    `scores["fd-lite2-min3"]` the least of three.
    """

    records: tuple[Record, ...]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, name: object) -> bool:
        return any(name in (r.name, r.metric) for r in self.records)

    def __getitem__(self, name: str) -> float:
        return self.record(name).value

    def __str__(self) -> str:
        return "\n".join(f"{r.metric:<24} {_text(r):<11} against {r.against}" for r in self.records)

    def record(self, name: str) -> Record:
        """The record of a metric, named with or without its n."""
        if found := [r for r in self.records if name in (r.name, r.metric)]:
            return found[0]
        raise unknown("score", name, [r.name for r in self.records])

    def to_frame(self) -> pd.DataFrame:
        """One row per record."""
        import pandas as pd

        return pd.DataFrame([r.to_dict() for r in self.records], columns=FIELDS)


def _text(record: Record) -> str:
    """The value, and its interval if it has one."""
    if record.interval is None:
        return f"{record.value:.6g}"
    low, high = record.interval
    return f"{record.value:.6g} [{low:.4g}, {high:.4g}]"


def append_records(run_dir: str | Path, records: Iterable[Record]) -> Path:
    """Adds records to `evaluation.jsonl` of a run directory; the file is replaced as a whole, atomically.

    Processes that add at the same time wait for each other.

    Raises:
        NotFound: No such directory.
    """
    run_dir = path_of("run_dir", run_dir)
    if not run_dir.is_dir():
        raise NotFound(f"no such run directory: {run_dir}")
    with writing(run_dir), FileLock(run_dir / f".{FILE}.lock"):
        lines = [*read_jsonl(run_dir / FILE), *(r.to_dict() for r in records)]
        write_text(run_dir / FILE, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return run_dir / FILE


def load_records(run_dir: str | Path) -> list[Record]:
    """Records of a run directory or study, oldest first; none if it was never evaluated. They know their `run_dir`."""
    folder = path_of("run_dir", run_dir)
    return [replace(Record.from_dict(d), run_dir=folder) for d in read_jsonl(folder / FILE)]


class Comparison(NamedTuple):
    """`difference` is a - b; `ratio` is a / b, None where b is not above 0 (a kernel distance may be below)."""

    difference: float
    ratio: float | None


ACROSS = {
    "n": ("n",),
    "extractor": ("extractor", "extractor_sha256", "extractor_input_size", "preprocessing"),
    "reference": ("reference", "reference_sha256", "reference_n"),
    "preprocessing": ("preprocessing", "extractor_input_size"),
}
COMPARED = ("metric", *dict.fromkeys(f for some in ACROSS.values() for f in some), "settings")
"""Fields that must agree for scores to be comparable."""
_PLAIN = {"fd": "fid", "kd": "kid"}


def compare(a: Record, b: Record, *, across: str | Sequence[str] = ()) -> Comparison:
    """Compares two scores of the same metric.

    Args:
        a, b: The records.
        across: What may differ, although it changes a score: some of "n", "extractor", "reference", "preprocessing".

    Raises:
        GddlabError: The metric, n, extractor, reference, preprocessing or a setting differs.
    """
    across = (across,) if isinstance(across, str) else tuple(across)
    for name in across:
        if name not in ACROSS:
            raise unknown("field in across", name, ACROSS)
    free = {f for name in across for f in ACROSS[name]}
    for name in COMPARED:
        x, y = (_compared(r, name, across) for r in (a, b))
        if name in free or x == y or (name == "preprocessing" and None in (x, y)):  # older records do not say
            continue
        raise GddlabError(
            f"{a.metric} and {b.metric} differ in {name}, {x!r} and {y!r}: evaluate both alike, or name in across= "
            "what may differ"
        )
    return Comparison(a.value - b.value, a.value / b.value if b.value > 0 else None)


def _compared(r: Record, name: str, across: Sequence[str]) -> Any:
    """A field without what may differ: a metric's name holds n and extractor, its settings a size that depends on n."""
    if name == "settings" and "n" in across:
        return {k: v for k, v in r.settings.items() if k != "subset_size"}
    if name != "metric":
        return getattr(r, name)
    metric, _, n = r.metric.partition("@")
    if "extractor" in across:
        metric = kind_of(metric)
    return metric if "n" in across else f"{metric}@{n}"


def kind_of(name: str) -> str:
    """The kind in the name of a score: "fid" of "fid", "clip-fid", "fd-lite2"; "class-chi2" of "class-chi2-digits"."""
    for kind in sorted((k for m in METRICS for k in names_of(m)), key=len, reverse=True):
        if f"{name}-".startswith(f"{kind}-"):
            return kind
    first = name.removeprefix("clip-").partition("-")[0]
    return _PLAIN.get(first, first)


def least_name(name: str, blocks: int) -> str:
    """Name of the least of several blocks: `fid-min3` of `fid`."""
    return f"{name}-min{blocks}"


@dataclass(frozen=True)
class Trace:
    """Where a score comes from; `str()` of it is for people.

    Attributes:
        record: The score.
        subject: What was scored, in words.
        run_dir: The run; None if the score belongs to none.
        file: The weights that were scored, found by their hash; None if they are not on this machine.
        config: First fields of the configuration, as text; all of them are in `run_dir`/config.json.
        config_sha256: Hash of the configuration.
        trained_by: Command that repeats the training, in a new folder; None if nothing was trained or that is unknown.
        repeated_by: Command that repeats the score; None if the images were given in memory.
    """

    record: Record
    subject: str
    run_dir: Path | None = None
    file: Path | None = None
    config: tuple[str, ...] = ()
    config_sha256: str | None = None
    trained_by: str | None = None
    repeated_by: str | None = None

    def __str__(self) -> str:
        r = self.record
        seeds = "" if r.seeds is None else f", seeds {r.seeds[0]} to {r.seeds[1]}"
        preprocessing = r.preprocessing or f"{r.extractor_input_size} pixels"
        rows: list[tuple[str, Any]] = [
            ("score", f"{r.metric} = {_text(r)}"),
            ("of", f"{self.subject}, {r.sampler}, n = {r.n}{seeds}"),
            ("against", f"{r.reference}, {r.reference_n or '?'} images, sha256 {r.reference_sha256[:16]}"),
            ("features", f"{r.extractor}, sha256 {r.extractor_sha256[:16]}; {preprocessing}"),
            ("images", f"sha256 {r.images_sha256[:16]}"),
            ("settings", json.dumps(r.settings) if r.settings else None),
            ("run", self.run_dir),
            ("trained on", None if r.kimg is None else f"{r.kimg:g} thousand images"),
            ("weights", r.model_sha256 and f"{self.file or 'not here'}, sha256 {r.model_sha256[:16]}"),
            ("configuration", self.config_sha256 and f"sha256 {self.config_sha256[:16]}"),
            *(("", line) for line in self.config),
            ("versions", ", ".join(f"{k} {v}" for k, v in r.versions.items())),
            ("train again", self.trained_by),
            ("score again", self.repeated_by),
        ]
        return "\n".join(f"{name:<14} {value}".rstrip() for name, value in rows if value is not None)


_HALF = ", other half"
_FIRST = ("teacher", "data", "student", "mask", "seed", "total_kimg", "batch", "lr_g")
"""Fields of a configuration that a trace shows."""


def _trace_student(record: Record, run: Run) -> Trace:
    """A student of a run: the final one, a snapshot, or the best."""
    folder, config = record.run_dir, run.config.to_json()
    assert folder is not None and record.model_sha256 is not None
    near = sorted(run.snapshots(), key=lambda p: abs(float(p.stem) - (record.kimg or 0)))
    files = (run.run_dir / "student.safetensors", *near, run.run_dir / "best.safetensors")
    file = next((p for p in files if _holds(p, record.model_sha256)), None)
    data = record.data or str(config["data"])
    if file is None:
        snapshot = None if record.kimg is None else name_of(round(1000 * record.kimg))
        again = f"train again, then: {_command(record, f'{folder}-again', data, snapshot)}"
    else:
        again = _command(record, str(folder), data, None if file.stem == "student" else file.stem)
    code = (
        f"import gddlab, pathlib; c = gddlab.load_run({json.dumps(str(folder))}).config; "
        f"c = c.model_copy(update=dict(run_dir=pathlib.Path({json.dumps(f'{folder}-again')}))); "
        f"gddlab.train(c, nproc={run.provenance.get('world_size', 1)}).wait()"
    )
    found = Trace(record, f"student of {folder.name}", run_dir=folder, file=file, repeated_by=again)
    return _trained(found, config, code)


def _trace_teacher(record: Record, name: str) -> Trace:
    """A teacher that ships with gddlab."""
    path = bundled_file(name)
    file = path.parent / "config.json"
    config = read_json(file)
    code = (
        f"import gddlab, json; c = json.load(open({json.dumps(str(file))})); "
        f'gddlab.train_teacher(gddlab.TeacherConfig(run_dir="{path.parent.name}-again", **c))'
    )
    found = Trace(record, f"teacher {name}", file=path, repeated_by=_command(record, name, record.data))
    return _trained(found, config, code)


def _trained(found: Trace, config: dict[str, Any], code: str) -> Trace:
    """With the configuration of a training, and the code that repeats it."""
    shown = [f"{n} = {json.dumps(config[n])}" for n in _FIRST if n in config]
    lines, command = (*shown, f"and {len(config) - len(shown)} more fields"), shlex.join(["python", "-c", code])
    return replace(found, config=lines, config_sha256=hash_json(config), trained_by=command)


def _holds(path: Path, model_sha256: str) -> bool:
    """Whether a file holds the network with this hash; weights of 16 bits count as what they are loaded as."""
    try:
        return (
            path.suffix == ".safetensors"
            and hash_tensors(load_network(path, beside=tensors_of)[0].state_dict()) == model_sha256
        )
    except GddlabError:
        return False


def scores_of(
    records: Iterable[Record], config: TrainConfig, *, data: str | None = None, n: int | None = None
) -> list[Record]:
    """The scores that count for a run: of its students by their own steps.

    Of several, one against the data that the run trains on goes before others, then as many images as real ones, then
    more images, then the first block of seeds, then the newest.

    Args:
        records: Of its evaluation.jsonl, which may hold others: by other steps, of other images.
        config: The run's.
        data: Against these real images alone, by name or path.
        n: Of so many images alone.

    Returns:
        One record per label and thousands of images, in the order of the records.
    """
    own = sampler_name((SIGMA_MAX, *config.mid_sigmas))

    def against(r: Record, given: str) -> bool:  # whatever the part, which the label has
        ours, theirs = (os.path.abspath(name_and_part(x)[0]) for x in (given, r.data or config.data))
        return ours == theirs

    def rank(r: Record) -> tuple[bool, bool, int, int]:
        return against(r, config.data), r.n == r.reference_n, r.n, -(r.seeds or (0, 0))[0]

    out: dict[tuple[str, float], Record] = {}
    for r in records:
        if r.sampler != own or r.kimg is None or n not in (None, r.n) or not (data is None or against(r, data)):
            continue
        if rank(r) >= rank(out.get((r.label, r.kimg), r)):
            out[r.label, r.kimg] = r
    return list(out.values())


def sampler_settings(text: str) -> dict[str, str]:
    """The options in the name of a sampler: "heun-18 S_churn=4.0" has steps 18, S_churn 4.0."""
    first, *rest = text.split(" ")
    given = dict(part.split("=", 1) for part in rest)
    solver, _, steps = first.rpartition("-")
    if solver in ("heun", "euler"):
        return {"steps": steps} | ({"solver": solver} if solver != "heun" else {}) | given
    return given


def _command(record: Record, source: str, data: str | None = None, snapshot: str | None = None) -> str:
    """`gddlab evaluate` with the arguments of a record."""
    seed = record.settings.get("first_seed", record.seeds[0] if record.seeds else 0)
    options: dict[str, Any] = {"snapshot": snapshot, "data": data, "metrics": _metric(record), "n": record.n}
    options |= {"seed": seed, "blocks": record.settings.get("minimum_of_blocks")} | sampler_settings(record.sampler)
    options["extractor"] = _extractor(record)
    words = ["gddlab", "evaluate", source]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(value.split(",") if name == "sigmas" else [str(value)])]
    return shlex.join(words)


def _split_command(record: Record) -> str:
    """`gddlab.real_split` with the arguments of a record."""
    name, seed = record.data or record.reference.removesuffix(_HALF), record.seeds[0] if record.seeds else 0
    n = record.n if record.n == record.reference_n else None
    code = (
        f'import gddlab; print(gddlab.real_split({json.dumps(name)}, metrics="{_metric(record)}", n={n}, seed={seed}, '
        f'extractor="{_extractor(record)}"))'
    )
    return shlex.join(["python", "-c", code])


def _metric(record: Record) -> str:
    """The entry of `metrics` that gives the record."""
    return metric_of(kind_of(record.name))


def _extractor(record: Record) -> str:
    """What finds the extractor; of a judge that does not ship with gddlab the hash alone is known."""
    found = argument_of(record.extractor, record.extractor_sha256)
    if found is None and not record.extractor.startswith("judge-"):
        raise GddlabError(
            f"{record.metric} is of extractor {record.extractor!r}, which this version of gddlab does not know"
        )
    return found or "PATH/judge.safetensors"
