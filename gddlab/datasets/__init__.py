"""Images and labels: digits, emoji, EDM zips, folders, arrays, CIFAR-10, Hugging Face; `prepare` makes EDM zips."""

from __future__ import annotations

from gddlab.datasets.base import BatchReader, ImageDataset, Manifest, digits, order
from gddlab.datasets.listing import HELD_OUT, PARTS, TRAIN, name_and_part
from gddlab.datasets.open import BUILT_IN, Source, data_of, open_dataset, parts_of
from gddlab.datasets.prepare import PrepareReport, prepare

__all__ = [
    "BUILT_IN",
    "HELD_OUT",
    "PARTS",
    "TRAIN",
    "BatchReader",
    "ImageDataset",
    "Manifest",
    "PrepareReport",
    "Source",
    "data_of",
    "digits",
    "name_and_part",
    "open_dataset",
    "order",
    "parts_of",
    "prepare",
]
