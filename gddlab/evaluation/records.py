"""Scores with their provenance: one record a metric, comparable only where comparison means something."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gddlab.distill.recorder import name_of
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.evaluation.extractors import EXTRACTORS
from gddlab.evaluation.metrics import metric_of
from gddlab.files import hash_json, hash_tensors, read_json, read_jsonl, write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "Record",
    "Scores",
    "Trace",
    "append_records",
    "compare",
    "load_records",
    "sampler_settings",
    "trace",
]

FILE = "evaluation.jsonl"


@dataclass(frozen=True)
class Record:
    """One score and what it is of.

    Attributes:
        metric: Name with the number of images, such as `fd-lite2@1797`; `fid@n` is said of Inception features only. `fid-min3@n` is the least of three blocks.
        value: The score; distances have no unit, precision and recall are in [0, 1].
        std: Spread over subsets where the metric has them (kernel distance).
        n: Images scored.
        seeds: First and last seed of the images; None where the images were given.
        extractor, extractor_sha256, extractor_input_size: The network, its weights file, its input side in pixels.
        reference, reference_sha256, reference_n: The real images: name, hash of the manifest, how many; of EDM's statistics the file's
            name and hash, and None.
        sampler: "one-step", "heun-18" and so on, with every setting that is not EDM's default; "data", "images".
        model_sha256: Hash of the model's tensors; None where the images were given.
        images_sha256: Hash of the images scored, uint8.
        settings: Settings of the metric and what else must agree for scores to be comparable.
        versions: Of Python and the packages whose numerics matter.
        seconds: Wall time; sampling and features, shared by the metrics, count in each.
        kimg: Thousands of real images that the model had seen in training; None where that is not known.
        preprocessing: What the extractor does to a uint8 image; None in older records.
        source, data: What was scored and against what, where they were given by name or path.
        run_dir: Run directory that the record was read from or is of; it is not written.
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
    run_dir: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise GddlabError(f"{self.metric} is {self.value}: look at the images, the model may have diverged")

    @property
    def name(self) -> str:
        """The metric without its n."""
        return self.metric.partition("@")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON."""
        d = asdict(self) | {"seeds": list(self.seeds) if self.seeds else None}
        del d["run_dir"]
        return d

    def trace(self) -> Trace:
        """Where the number comes from: run, configuration, file, and the commands that make them and it again."""

        return trace(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Record:
        """The record that `to_dict` gave.

        Raises:
            GddlabError: Fields are missing or unknown.
        """
        if wrong := set(d) ^ set(FIELDS) - (_LATER - set(d)):
            raise GddlabError(f"not an evaluation record: fields {sorted(wrong)} are missing or unknown")
        return cls(**d | {"seeds": tuple(d["seeds"]) if d["seeds"] else None})


FIELDS = tuple(f.name for f in fields(Record) if f.name != "run_dir")
_LATER = {"kimg", "preprocessing", "source", "data"}
"""Fields that records did not have once."""


@dataclass(frozen=True)
class Scores:
    """The records of one evaluation; `scores["fd-lite2"]` or `scores["fd-lite2@1797"]` is the value.

    Of several blocks, each has its records, one after another, and `scores["fd-lite2"]` is the first block's; `scores["fd-lite2-min3"]` is the least of three.
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
        return "\n".join(f"{r.metric:<24} {r.value:.6g}" for r in self.records)

    def record(self, name: str) -> Record:
        """The record of a metric, named with or without its n."""
        for r in self.records:
            if name in (r.name, r.metric):
                return r
        raise unknown("score", name, [r.name for r in self.records])

    def to_frame(self) -> pd.DataFrame:
        """One row a record."""
        import pandas as pd

        return pd.DataFrame([r.to_dict() for r in self.records], columns=FIELDS)


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
        across: What may differ, though it alone moves a score: some of "n", "extractor", "reference", "preprocessing".

    Raises:
        GddlabError: The metric, n, extractor, reference, preprocessing or a setting differs, which alone moves the score.
    """
    across = (across,) if isinstance(across, str) else tuple(across)
    for name in across:
        if name not in ACROSS:
            raise unknown("field in across", name, ACROSS)
    free = {f for name in across for f in ACROSS[name]}
    for field_ in COMPARED:
        x, y = (_compared(r, field_, across) for r in (a, b))
        if field_ in free or x == y or (field_ == "preprocessing" and None in (x, y)):  # older records do not say
            continue
        raise GddlabError(
            f"{a.metric} and {b.metric} differ in {field_}, {x!r} and {y!r}: evaluate both alike, or name in across= what may differ"
        )
    return Comparison(a.value - b.value, a.value / b.value if b.value > 0 else None)


def _compared(r: Record, name: str, across: Sequence[str]) -> Any:
    """A field, without what may differ: the name of a metric holds n and extractor, its settings a size that follows n."""
    if name == "settings" and "n" in across:
        return {k: v for k, v in r.settings.items() if k != "subset_size"}
    if name != "metric":
        return getattr(r, name)
    metric, _, n = r.metric.partition("@")
    if "extractor" in across:
        metric = kind_of(metric)
    return metric if "n" in across else f"{metric}@{n}"


def kind_of(name: str) -> str:
    """The kind in the name of a score: "fid" of "fid", "clip-fid", "fd-lite2"; "precision" of "precision-lite2"."""
    first = name.removeprefix("clip-").partition("-")[0]
    return _PLAIN.get(first, first)


def least_name(name: str, blocks: int) -> str:
    """Name of the least of several blocks: `fid-min3` of `fid`."""
    return f"{name}-min{blocks}"


def append_records(run_dir: str | Path, records: Iterable[Record]) -> Path:
    """Adds records to `evaluation.jsonl` of a run directory; the file is rewritten whole, atomically.

    Raises:
        NotFound: No such directory.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise NotFound(f"no such run directory: {run_dir}")
    lines = [*read_jsonl(run_dir / FILE), *(r.to_dict() for r in records)]
    write_text(run_dir / FILE, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return run_dir / FILE


def load_records(run_dir: str | Path) -> list[Record]:
    """Records of a run directory, oldest first; none if it was never evaluated. They know where they are from, for `Record.trace`."""
    folder = Path(run_dir)
    return [replace(Record.from_dict(d), run_dir=folder) for d in read_jsonl(folder / FILE)]


_HALF = ", other half"
_SHOWN = 8
_FIRST = (
    "teacher",
    "data",
    "student",
    "mask",
    "seed",
    "total_kimg",
    "batch",
    "lr_g",
    "lr_d",
    "discriminator",
)
"""Fields of a configuration shown first."""


@dataclass(frozen=True)
class Trace:
    """Where a score comes from; `str()` of it is for people.

    Attributes:
        record: The score.
        subject: What was scored, in words.
        run_dir: The run; None where the score is of no run.
        file: The weights that were scored, found by their hash; None where they are not here.
        config: First fields of the configuration, as text; all of them are in `run_dir`/config.json.
        config_sha256: Hash of the configuration.
        trained_by: Command that makes the weights, in a new folder; None where nothing was trained or nobody knows how.
        repeated_by: Command that makes the score again; None where the images were given in memory.
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
        rows: list[tuple[str, Any]] = [
            ("score", f"{r.metric} = {r.value:.6g}"),
            ("of", f"{self.subject}, {r.sampler}, n = {r.n}{seeds}"),
            (
                "against",
                f"{r.reference}, {r.reference_n or 'unknown number of'} images, sha256 {r.reference_sha256[:16]}",
            ),
            (
                "features",
                f"{r.extractor}, sha256 {r.extractor_sha256[:16]}; {r.preprocessing or f'{r.extractor_input_size} pixels'}",
            ),
            ("images", f"sha256 {r.images_sha256[:16]}"),
            ("settings", json.dumps(r.settings) if r.settings else None),
            ("run", self.run_dir),
            ("trained on", None if r.kimg is None else f"{r.kimg:g} thousand images"),
            ("weights", None if r.model_sha256 is None else f"{self.file or 'not here'}, sha256 {r.model_sha256[:16]}"),
            ("configuration", None if self.config_sha256 is None else f"sha256 {self.config_sha256[:16]}"),
            *(("", line) for line in self.config),
            ("versions", ", ".join(f"{k} {v}" for k, v in r.versions.items())),
            ("train again", self.trained_by),
            ("score again", self.repeated_by),
        ]
        return "\n".join(f"{name:<14} {value}".rstrip() for name, value in rows if value is not None)


def trace(record: Record) -> Trace:
    """As `Record.trace`."""
    if record.reference.endswith(_HALF):
        return Trace(record, "one half of the real images", repeated_by=_split(record))
    if record.model_sha256 is None:
        given = record.source or (f"data:{record.data or record.reference}" if record.sampler == "data" else None)
        subject = record.source or ("a dataset" if record.sampler == "data" else "images given in memory")
        again = None if record.sampler != "data" or record.source is None else _command(record, given, record.data)
        return Trace(record, subject, repeated_by=again)
    folder = record.run_dir
    if folder is not None and (folder / "config.json").is_file() and (folder / "provenance.json").is_file():
        return _of_run(record, folder)
    if record.source is not None and _holds(Path(record.source), record.model_sha256):
        return Trace(record, record.source, file=Path(record.source), repeated_by=_command(record, record.source))
    return _of_teacher(record)


def _of_run(record: Record, folder: Path) -> Trace:
    """A student of a run directory, its end or one of its snapshots."""
    from gddlab.distill.config import TrainConfig

    config = TrainConfig.load(folder).to_json()
    world = int(read_json(folder / "provenance.json").get("world_size", 1))
    file = _student(record, folder)
    source = _command(record, str(folder), record.data or str(config["data"]), file) if file is not None else None
    new = f"{folder}-again"
    train = (
        f"import gddlab, pathlib; c = gddlab.TrainConfig.load({str(folder)!r}); "
        f"gddlab.train(c.model_copy(update={{'run_dir': pathlib.Path({new!r})}}), nproc={world}).wait()"
    )
    return Trace(
        record,
        f"student of {folder.name}",
        run_dir=folder,
        file=file,
        config=_lines(config),
        config_sha256=hash_json(config),
        trained_by=_python(train),
        repeated_by=source
        or f"train again, then: {_command(record, new, record.data or str(config['data']), at=record.kimg)}",
    )


def _of_teacher(record: Record) -> Trace:
    """A teacher that ships with gddlab, known by its weights; else a network that only its hash names."""
    from gddlab.files import data_dir
    from gddlab.teachers import bundled_teachers

    for name in bundled_teachers():
        path = data_dir() / "teachers" / name / "teacher.safetensors"
        if record.model_sha256 is None or not _holds(path, record.model_sha256):
            continue
        config = read_json(path.parent / "config.json")
        train = (
            f"import gddlab, json, pathlib; c = json.loads(pathlib.Path({str(path.parent / 'config.json')!r}).read_text()); "
            f"gddlab.train_teacher(gddlab.TeacherConfig(run_dir='{name}-again', **c))"
        )
        return Trace(
            record,
            f"teacher {name}",
            file=path,
            config=_lines(config),
            config_sha256=hash_json(config),
            trained_by=_python(train),
            repeated_by=_command(record, name, record.data),
        )
    again = None if record.source is None else _command(record, record.source, record.data)
    return Trace(record, record.source or "a network given in memory", repeated_by=again)


def _student(record: Record, folder: Path) -> Path | None:
    """The file of a run that holds the student scored."""
    snapshots = sorted(
        (folder / "snapshots").glob("*.safetensors"), key=lambda p: abs(float(p.stem) - (record.kimg or 0))
    )
    for path in (folder / "student.safetensors", *snapshots, folder / "best.safetensors"):
        if record.model_sha256 is not None and _holds(path, record.model_sha256):
            return path
    return None


def _holds(path: Path, model_sha256: str) -> bool:
    """Whether a file holds the network of a hash."""
    from safetensors.torch import load_file

    return path.suffix == ".safetensors" and path.is_file() and hash_tensors(load_file(path)) == model_sha256


def _python(code: str) -> str:
    """A command that runs code; in double quotes, which are easier to read, where nothing in it is special there."""
    plain = not set(code) & set('"$`\\!')
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def _lines(config: dict[str, Any]) -> tuple[str, ...]:
    names = [n for n in _FIRST if n in config] + [n for n in config if n not in _FIRST]
    shown = [f"{n} = {json.dumps(config[n])}" for n in names[:_SHOWN]]
    rest = len(names) - len(shown)
    return (*shown, *([f"and {rest} fields more"] if rest > 0 else []))


def sampler_settings(text: str) -> dict[str, str]:
    """The options behind the name of a sampler: "heun-18 S_churn=4.0" is steps 18, S_churn 4.0; what is EDM's default is left out."""
    first, *rest = text.split(" ")
    given = dict(part.split("=", 1) for part in rest)
    solver, _, steps = first.rpartition("-")
    if solver in ("heun", "euler"):
        return {"steps": steps} | ({"solver": solver} if solver != "heun" else {}) | given
    return given


def _command(
    record: Record, source: str | None, data: str | None = None, file: Path | None = None, at: float | None = None
) -> str:
    """`gddlab evaluate` with the arguments of a record."""
    words = ["gddlab", "evaluate", str(source)]
    if file is not None and file.parent.name == "snapshots":
        words += ["--snapshot", file.stem]
    elif file is not None and file.name == "best.safetensors":
        words += ["--snapshot", "best"]
    elif file is None and at is not None:
        words += ["--snapshot", name_of(round(1000 * at))]
    if data is not None:
        words += ["--data", data]
    words += ["--metrics", _asked(record), "--n", str(record.n)]
    first = record.settings.get("first_seed", record.seeds[0] if record.seeds else 0)
    words += ["--seed", str(first)]
    if "minimum_of_blocks" in record.settings:
        words += ["--blocks", str(record.settings["minimum_of_blocks"])]
    for name, value in sampler_settings(record.sampler).items():
        words += [f"--{name.replace('_', '-')}", *(value.split(",") if name == "sigmas" else [value])]
    return shlex.join([*words, "--extractor", _label(record)])


def _split(record: Record) -> str:
    name = record.data or record.reference.removesuffix(_HALF)
    seed = record.seeds[0] if record.seeds else 0
    call = (
        f"import gddlab; print(gddlab.real_split({name!r}, metrics={_asked(record)!r}, "
        f"n={record.n if record.n == record.reference_n else None}, seed={seed}, extractor={_label(record)!r}))"
    )
    return _python(call)


def _asked(record: Record) -> str:
    """The word in `metrics` that gives the record."""
    return metric_of(kind_of(record.name))


def _label(record: Record) -> str:
    for label, spec in EXTRACTORS.items():
        if spec.name == record.extractor:
            return label
    raise GddlabError(
        f"{record.metric} is of extractor {record.extractor!r}, which this version of gddlab does not know"
    )
