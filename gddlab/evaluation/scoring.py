"""`evaluate`: scores of a model, a dataset or images against real images, and the real split as their yardstick."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.errors import GddlabError
from gddlab.evaluation.cache import recall
from gddlab.evaluation.extractors import Extractor, find_extractor
from gddlab.evaluation.features import image_features, real_features, real_images
from gddlab.evaluation.metrics import METRICS, Value, check_metrics
from gddlab.evaluation.records import Record, Scores
from gddlab.evaluation.sources import SourceImages, images_of
from gddlab.files import hash_json, hash_tensors, write_json
from gddlab.nets import Precond
from gddlab.provenance import versions

__all__ = ["evaluate", "real_split"]


def evaluate(
    source: Precond | ImageDataset | Tensor,
    *,
    data: str | ImageDataset | None = None,
    metrics: str | Sequence[str] = ("fid", "kid"),
    n: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    extractor: str = "lite2",
    batch_size: int = 128,
    progress: bool = True,
) -> Scores:
    """Scores images against real ones; features are computed once for all metrics, those of real images once for ever.

    Args:
        source: Student, teacher, dataset, or images, float32 in [-1, 1], (N, C, R, R).
        data: The real images, by name or as a dataset; None takes the dataset on the model's card.
        metrics: Some of "fid" (Frechet distance), "kid" (kernel distance), "prc" (precision, recall). Scores are named
            after the extractor, `fd-lite2@n`; "fid" and "kid" remain the names with Inception only.
        n: Images scored; as many as there are real ones if None (given images: all).
        seed: Image i of a model comes from seed + i and has the class of real image i mod N; part of a dataset is drawn
            with it.
        steps: Heun steps of a teacher, 18 if None; network calls of a student, 1 if None.
        extractor: "lite2", "lite0", or "inception" where its weights are on this machine.
        batch_size: Images sampled at once.
        progress: Shows bars when at a terminal.

    Raises:
        GddlabError: An unknown name, no dataset, images that do not fit the real ones or are not finite.
    """
    start = time.perf_counter()
    kinds, spec = check_metrics(metrics), find_extractor(extractor)
    if data is None:
        data = getattr(getattr(source, "card", None), "data", None)
        if data is None:
            raise GddlabError(f"no dataset to score against: the {type(source).__name__} names none, give data=")
    real = open_dataset(data)
    about = _about(spec, real) | {"reference_n": len(real)}
    about["kimg"] = getattr(getattr(source, "card", None), "kimg", None)
    # missing weights are refused before sampling takes minutes
    images = images_of(source, real, n=n, seed=seed, steps=steps, batch_size=batch_size, progress=progress)
    if len(images.uint8) < 2 or len(real) < 2:
        raise GddlabError(f"{len(images.uint8)} images against {len(real)}: give at least 2 of each")
    device = next(source.parameters()).device if isinstance(source, Precond) else torch.device("cpu")
    theirs = real_features(real, spec, device=device, progress=progress)
    if images.whole is not None:
        ours = real_features(images.whole, spec, device=device, progress=progress)
    else:
        ours = image_features(images.uint8, spec, device=device, progress=progress)
    shared = time.perf_counter() - start
    return Scores(tuple(r for kind in kinds for r in _score(kind, ours, theirs, images, spec, about, shared)))


def real_split(
    data: str | ImageDataset,
    *,
    metrics: str | Sequence[str] = ("fid", "kid"),
    n: int | None = None,
    seed: int = 0,
    extractor: str = "lite2",
    progress: bool = True,
) -> Scores:
    """Distance of real data to itself, the yardstick: two disjoint random parts of the dataset against each other.

    Its n is at most half the dataset's, and distances fall with n, so `compare` refuses it beside a score at full n.

    Args:
        data: Dataset, or its name.
        metrics: As for `evaluate`.
        n: Images in each part; None splits all of them, the second part getting the odd one.
        seed: Of the split.
        extractor: As for `evaluate`.
        progress: Shows bars when at a terminal.

    Returns:
        Scores, from the cache if the same split was scored before; `reference` is "NAME, other half".

    Raises:
        GddlabError: An unknown name, or an n that does not fit twice into the dataset.
    """
    start = time.perf_counter()
    kinds, spec, real = check_metrics(metrics), find_extractor(extractor), open_dataset(data)
    if (n is not None and not 2 <= n <= len(real) // 2) or len(real) < 4:
        raise GddlabError(f"n={n} images in each half of {real.name!r}: accepted are 2..{len(real) // 2}")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    size = len(real) // 2 if n is None else n
    first, second = order[:size], order[size:] if n is None else order[size : 2 * size]

    def compute(kind: str) -> list[Record]:
        f = real_features(real, spec, progress=progress)
        shared = time.perf_counter() - start
        images = SourceImages(real_images(real)[first], "data", seeds=(seed, seed))
        about = _about(spec, real) | {"reference": f"{real.name}, other half", "reference_n": len(second)}
        return _score(kind, f[first], f[second], images, spec, about, shared)

    def read(path: Path) -> list[Record]:
        return [Record.from_dict(d) for d in json.loads(path.read_text())]

    def write(path: Path, records: list[Record]) -> None:
        write_json(path, [r.to_dict() for r in records])

    out: list[Record] = []
    for kind in kinds:
        key = hash_json([real.manifest.sha256, spec.identity, kind, len(first), len(second), seed, versions()])[:16]
        file = f"split-{spec.name}-{kind}-{key}.json"
        records: list[Record] = recall(file, partial(compute, kind), read=read, write=write)
        out += records
    return Scores(tuple(out))


def _about(spec: Extractor, real: ImageDataset) -> dict[str, Any]:
    return {
        "extractor": spec.name,
        "extractor_sha256": spec.sha256,
        "extractor_input_size": spec.input_size,
        "reference": real.name,
        "reference_sha256": real.manifest.sha256,
        "versions": versions(),
    }


def _score(
    kind: str, ours: Tensor, theirs: Tensor, images: SourceImages, spec: Extractor, about: dict[str, Any], shared: float
) -> list[Record]:
    start = time.perf_counter()
    values: list[Value] = METRICS[kind](ours, theirs)
    seconds = round(shared + time.perf_counter() - start, 3)
    n = len(ours)
    digest = hash_tensors({"images": images.uint8})
    return [
        Record(
            metric=f"{spec.metric_name(v.kind)}@{n}",
            value=v.value,
            std=v.std,
            n=n,
            seeds=images.seeds,
            sampler=images.sampler,
            model_sha256=images.model_sha256,
            images_sha256=digest,
            settings=v.settings,
            seconds=seconds,
            **about,
        )
        for v in values
    ]
