"""Scores with their provenance: one record a metric, comparable only where comparison means something."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import read_jsonl, write_text

if TYPE_CHECKING:
    import pandas as pd

    from gddlab.evaluation.tracing import Trace

__all__ = ["Comparison", "Record", "Scores", "append_records", "compare", "load_records"]

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
        from gddlab.evaluation.tracing import trace

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
