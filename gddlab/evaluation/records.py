"""Scores with their provenance: one record a metric, comparable only where comparison means something."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import read_jsonl, write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Record", "Scores", "append_records", "compare", "load_records"]

FILE = "evaluation.jsonl"


@dataclass(frozen=True)
class Record:
    """One score and what it is of.

    Attributes:
        metric: Name with the number of images, such as `fd-lite2@1797`; `fid@n` is said of Inception features only.
        value: The score; distances have no unit, precision and recall are in [0, 1].
        std: Spread over subsets where the metric has them (kernel distance).
        n: Images scored.
        seeds: First and last seed of the images; None where the images were given.
        extractor, extractor_sha256, extractor_input_size: The network, its weights file, its input side in pixels.
        reference, reference_sha256, reference_n: The real images: name, hash of the manifest, how many.
        sampler: "one-step", "heun-18" and so on, "data", "images".
        model_sha256: Hash of the model's tensors; None where the images were given.
        images_sha256: Hash of the images scored, uint8.
        settings: Settings of the metric and what else must agree for scores to be comparable.
        versions: Of Python and the packages whose numerics matter.
        seconds: Wall time; sampling and features, shared by the metrics, count in each.
        kimg: Thousands of real images that the model had seen in training; None where that is not known.
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
    reference_n: int
    sampler: str
    model_sha256: str | None
    images_sha256: str
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    kimg: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise GddlabError(f"{self.metric} is {self.value}: look at the images, the model may have diverged")

    @property
    def name(self) -> str:
        """The metric without its n."""
        return self.metric.partition("@")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON."""
        return asdict(self) | {"seeds": list(self.seeds) if self.seeds else None}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Record:
        """The record that `to_dict` gave.

        Raises:
            GddlabError: Fields are missing or unknown.
        """
        names = {f.name for f in fields(cls)}
        if wrong := set(d) ^ names - ({"kimg"} - set(d)):  # records had no kimg once
            raise GddlabError(f"not an evaluation record: fields {sorted(wrong)} are missing or unknown")
        return cls(**d | {"seeds": tuple(d["seeds"]) if d["seeds"] else None})


@dataclass(frozen=True)
class Scores:
    """The records of one evaluation; `scores["fd-lite2"]` or `scores["fd-lite2@1797"]` is the value."""

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

        return pd.DataFrame([r.to_dict() for r in self.records], columns=[f.name for f in fields(Record)])


class Comparison(NamedTuple):
    """`difference` is a - b; `ratio` is a / b, None where b is not above 0 (a kernel distance may be below)."""

    difference: float
    ratio: float | None


def compare(a: Record, b: Record) -> Comparison:
    """Compares two scores of the same metric.

    Raises:
        GddlabError: The metric, n, extractor, reference or a setting differs, which alone moves the score.
    """
    same = ("metric", "n", "extractor", "extractor_sha256", "extractor_input_size")
    for field in (*same, "reference", "reference_sha256", "reference_n", "settings"):
        x, y = getattr(a, field), getattr(b, field)
        if x != y:
            raise GddlabError(f"{a.metric} and {b.metric} differ in {field}, {x!r} and {y!r}: evaluate both alike")
    return Comparison(a.value - b.value, a.value / b.value if b.value > 0 else None)


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
    """Records of a run directory, oldest first; none if it was never evaluated."""
    return [Record.from_dict(d) for d in read_jsonl(Path(run_dir) / FILE)]
