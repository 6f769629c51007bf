"""Image datasets of Hugging Face, through its package `datasets`: "hf:NAME[:CONFIG][:SPLIT]"."""

from __future__ import annotations

import functools
import importlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from gddlab.datasets.listing import Listing, Problem
from gddlab.datasets.pixels import BadImage
from gddlab.errors import GddlabError

__all__ = ["HuggingFaceReader", "of_huggingface"]

_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "all")
_IMAGES = ("image", "img")
_LABELS = ("label", "labels")


@dataclass(frozen=True)
class HuggingFaceReader:
    """Rows of a dataset; each process loads it from the local cache."""

    address: str

    def read(self, name: str) -> bytes:
        table, column = _load(self.address, os.getpid())[:2]
        value = table[int(name)][column]
        content = value.get("bytes") if isinstance(value, dict) else None
        if content is None and isinstance(value, dict) and value.get("path"):
            with open(value["path"], "rb") as f:
                content = f.read()
        if not isinstance(content, bytes):
            raise BadImage("empty file", "no image in this row")
        return content

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def part(self, names: Sequence[str]) -> HuggingFaceReader:
        return self


def of_huggingface(address: str) -> Listing:
    """The images and, where a column holds them, the labels of "hf:NAME[:CONFIG][:SPLIT]".

    NAME is what `datasets.load_dataset` takes, or a folder written by `save_to_disk`. A single addition is a split if it
    is called like one (train, test, validation ... or with + or []), a configuration otherwise; the split is "train" if
    none is named. The column of images is the one called "image" or "img", or the only one; the labels are the column
    called "label" or "labels", or the first one of class labels.

    Raises:
        GddlabError: `datasets` is missing, the dataset cannot be loaded, or it has no column of images.
    """
    absolute = _absolute(address)
    table, _, label = _load(absolute, os.getpid())
    names = [f"{i:08d}" for i in range(len(table))]
    labels, class_names, classes, problems = None, None, 0, []
    if label is not None:
        values = table.with_format(None)[label][:]
        class_names = getattr(table.features[label], "names", None)
        limit = len(class_names) if class_names else None
        for name, y in zip(names, values, strict=True):
            if type(y) is not int or y < 0 or (limit is not None and y >= limit):
                kind = "no label" if y is None or y == -1 else "class id out of range"
                problems.append(Problem(name, kind, f"{label}={y}"))
        if not problems:
            labels = np.array(values, dtype=np.int64)
            classes = limit or int(labels.max(initial=-1)) + 1
    return Listing(
        name=address.removeprefix("hf:").replace("/", "-"),
        source=address,
        names=names,
        reader=HuggingFaceReader(absolute),
        labels=labels,
        classes=classes,
        class_names=class_names,
        fingerprint=str(table._fingerprint),
        about={"crop": "unknown", "filter": "unknown", "codec": "unknown"},
        problems=problems,
    )


def _parts(address: str) -> tuple[str, str | None, str]:
    name, *rest = address.removeprefix("hf:").split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise GddlabError(f"data={address!r}: give hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and (rest[0] in _SPLITS or "[" in rest[0] or "+" in rest[0]):
        return name, None, rest[0]
    return name, rest[0] if rest else None, "train"


def _absolute(address: str) -> str:
    """A local folder by its whole path: in another working folder its name means another."""
    name = _parts(address)[0]
    return address.replace(name, os.path.abspath(name), 1) if os.path.isdir(name) else address


@functools.lru_cache(maxsize=2)
def _load(address: str, pid: int) -> tuple[Any, str, str | None]:
    """The rows, the name of the column of images (not decoded), and that of the labels."""
    name, config, split = _parts(address)
    try:
        hf = importlib.import_module("datasets")
    except ImportError:
        raise GddlabError(f"data={address!r} needs the package datasets: run pip install datasets") from None
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
            table = hf.load_from_disk(name)
            table = table[split] if isinstance(table, dict) else table
        else:
            table = hf.load_dataset(name, config, split=split)
    except Exception as e:  # its own errors, those of its readers, of the network, of the hub
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise GddlabError(
            f"data={address!r} cannot be loaded ({reason}): check name, configuration, split, network"
        ) from None
    column = _column(address, table.features, hf)
    numbers = [key for key, f in table.features.items() if isinstance(f, hf.ClassLabel)]
    named = [k for k in _LABELS if k in numbers or str(getattr(table.features.get(k), "dtype", "")).startswith("int")]
    return table.cast_column(column, hf.Image(decode=False)), column, next(iter([*named, *numbers]), None)


def _column(address: str, features: Any, hf: Any) -> str:
    columns = [key for key, f in features.items() if isinstance(f, hf.Image)]
    named = [key for key in _IMAGES if key in columns]
    if named or len(columns) == 1:
        return str((named or columns)[0])
    raise GddlabError(
        f"data={address!r} has {len(columns)} columns of images (columns: {', '.join(features)}): "
        "give a dataset with one, or with one called image"
    )
